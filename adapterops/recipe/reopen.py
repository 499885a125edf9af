"""The adapters of an earlier run, opened as they were: alphas that were given, labels, bases."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from adapterops.adapter import Adapter
from adapterops.basemodel import open_model
from adapterops.batch.search import WEIGHTS
from adapterops.errors import AdapterOpsError, UsageError
from adapterops.formats import AdapterFile, open_adapter_file, read_adapter
from adapterops.formats.locate import locate
from adapterops.rebased.rebase import rebase
from adapterops.recipe.calls import Verb
from adapterops.recipe.document import shown
from adapterops.recipe.made import Made

_NUMBERED = re.compile(r"(.+)#(\d+)", re.DOTALL)


def reopened(
    made: Made, verb: Verb, given: Mapping[str, Any], paths: Sequence[str], allow_pickle: bool
) -> dict[str, Any]:
    """The adapters at `paths` as the verb takes them, under the names that key their random bits.

    `given` are the call's other arguments. Raises what opening adapters and models raises.
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

    labels = undistinct([origin["name"] for origin in made.inputs])
    weights = [float(origin["weight"]) for origin in made.inputs]
    files = []
    for index, (path, label) in enumerate(zip(paths, labels, strict=True)):
        where = _as_given(path, label)
        alpha, wins = _alpha(made, index, where, allow_pickle)
        file = read(where, alpha=alpha, alpha_wins=wins, allow_pickle=allow_pickle)
        files.append(replace(file, label=label))
    if verb.name == "calc":
        names: Mapping[str, int] = made.options["names"]
        return {"adapters": {name: Adapter(((1.0, files[at]),)) for name, at in names.items()}}
    if "adapters" in verb.keys:
        return {"adapters": [Adapter(((1.0, file),)) for file in files], "weights": weights}
    return {"adapter": Adapter(tuple(zip(weights, files, strict=True)))}


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
    alphas = made.options.get("alpha")
    alpha = alphas.get(str(index)) if isinstance(alphas, dict) else None
    if alpha is None:
        return None, False
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise UsageError(f"its provenance has the alpha {shown(alpha)}", path=made.path)
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


def undistinct(names: Sequence[str]) -> list[str]:
    """The names before those of equal ones were numbered: a, a#2 are a, a."""
    found: list[str] = []
    for name in names:
        numbered = _NUMBERED.fullmatch(name)
        again = numbered and found.count(numbered[1]) == int(numbered[2]) - 1 > 0
        found.append(numbered[1] if numbered and again else name)
    return found
