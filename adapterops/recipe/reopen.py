"""The adapters of an earlier run, opened as they were: alphas that were given, labels, bases."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from adapterops.adapter import Adapter
from adapterops.basemodel import open_model
from adapterops.batch.search import WEIGHTS
from adapterops.errors import AdapterOpsError, UsageError
from adapterops.formats import AdapterFile, open_adapter_file, read_adapter
from adapterops.formats.locate import locate
from adapterops.provenance import undistinct
from adapterops.rebased.rebase import rebase
from adapterops.recipe.calls import Verb
from adapterops.recipe.composing import Composer
from adapterops.recipe.document import Document, shown
from adapterops.recipe.fitting import fitted, is_held
from adapterops.recipe.made import Made


def reopened(
    made: Made,
    verb: Verb,
    given: Mapping[str, Any],
    paths: Sequence[str],
    activations: Callable[[str], str],
    allow_pickle: bool,
) -> dict[str, Any]:
    """The adapters at `paths` as the verb takes them, under the names that key their random bits.

    `given` are the call's other arguments, `activations` finds files by digests. Raises what
    opening adapters and models raises, UsageError for what adapters were never put together like.
    """
    if verb.name == "extract":
        return {}
    if verb.name == "convert" and "base" in given:
        return _by_path(made, paths, allow_pickle)
    base = open_model(given["base"]) if verb.name == "bake" else None
    left = open_model(given["residual"]) if base and given.get("residual") else None

    def read(path: str, **how: Any) -> AdapterFile:
        return (
            rebase(read_adapter(path, **how), base, left)
            if base
            else open_adapter_file(path, **how)
        )

    weights = [float(origin["weight"]) for origin in made.inputs]
    files = []
    for index, (path, label) in enumerate(zip(paths, _labels(made), strict=True)):
        where = _as_given(path, label)
        alpha, wins = _alpha(made, index, where, allow_pickle)
        file = read(where, alpha=alpha, alpha_wins=wins, allow_pickle=allow_pickle)
        files.append(replace(file, label=label))
    composer = Composer(Document(made.path, {}), files, activations)
    if verb.name == "calc":
        names = made.options["names"].items()
        trees = {name: of if isinstance(of, list) else [[1.0, of]] for name, of in names}
        return {"adapters": {n: composer.adapter(of, ("names", n)) for n, of in trees.items()}}
    if "sum" in made.options:
        _check_alone(made)
        total = composer.adapter(made.options["sum"], ("sum",))
        many = "adapters" in verb.keys
        return {"adapters": [total], "weights": [1.0]} if many else {"adapter": total}
    if "adapters" in verb.keys:
        return {"adapters": [Adapter(((1.0, file),)) for file in files], "weights": weights}
    return {"adapter": Adapter(tuple(zip(weights, files, strict=True)))}


def _check_alone(made: Made) -> None:
    """A sum says all: a method beside it would be another one."""
    for name in ("method", "module_weights"):
        if name in made.options:
            raise UsageError(f"sum: stands beside {name}, which it has within", path=made.path)


def _labels(made: Made) -> list[str]:
    """What each input was called, before equal names were numbered."""
    names = undistinct([origin["name"] for origin in made.inputs])
    document = Document(made.path, {})
    given = made.options.get("labels")
    labels = names if given is None else fitted(document, ("labels",), given, list[str], "")
    if len(labels) != len(names):
        raise document.error(("labels",), f"is a list of {len(labels)}; expected {len(names)}")
    return labels


def _by_path(made: Made, paths: Sequence[str], allow_pickle: bool) -> dict[str, Any]:
    """One adapter that its verb makes summable itself, by its path."""
    where = _as_given(paths[0], made.inputs[0]["name"])
    alpha, wins = _alpha(made, 0, where, allow_pickle)
    found: dict[str, Any] = {"adapter": where}
    return found if alpha is None else {**found, "alpha": {where: alpha} if wins else alpha}


def _alpha(made: Made, index: int, path: str, allow_pickle: bool) -> tuple[float | None, bool]:
    """The alpha given for an input, and whether it was to win over what the file says.

    It was given for modules without a scale, or for all where there are none such.
    """
    alphas = made.options.get("alpha", {})
    known = isinstance(alphas, dict) and alphas.keys() <= set(map(str, range(len(made.inputs))))
    if not known or not all(is_held(each) and each > 0 for each in alphas.values()):
        raise UsageError(f"its provenance has the alpha {shown(alphas)}", path=made.path)
    alpha = alphas.get(str(index))
    if alpha is None:
        return None, False
    file = read_adapter(path, alpha=alpha, allow_pickle=allow_pickle)
    file.source.close()
    return float(alpha), not any(site.alpha_given for site in file.sites.values())


def _as_given(weights: str, name: str) -> str:
    """The folder of a weights file, unless the file itself was named: what lies beside counts."""
    folder = os.path.dirname(weights)
    if name.lower().endswith(WEIGHTS) or not folder:
        return weights
    try:
        return folder if os.path.samefile(locate(folder).weights, weights) else weights
    except AdapterOpsError:  # several, or none that a folder would be opened for
        return weights
