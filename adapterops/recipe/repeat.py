"""A provenance as the call that made it: names of options, inputs found again by their hashes.

What a verb records are the values that decided the tensors; most are keywords of the verb under the
same name. `_RENAMED` has those that are not, `_LEFT_OUT` what follows from the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import adapterops
from adapterops.baking.provenance import base_record
from adapterops.basemodel import open_model
from adapterops.errors import IncompatibleError, MissingInputsError, UsageError
from adapterops.originals import Originals
from adapterops.recipe.calls import Call, Verb
from adapterops.recipe.document import Document, shown
from adapterops.recipe.fitting import check_patterns, fitted
from adapterops.recipe.made import Made
from adapterops.recipe.reopen import reopened

_RENAMED = {"floor": "min_rank", "ceiling": "max_rank"}
# What adapters are opened with, and the kind of a group's average, which its weights tell.
_LEFT_OUT = {"alpha", "labels", "sum", "representative"}
_TARGETS = ("rank", "energy", "max_error", "size")


@dataclass
class _Search:
    """Where inputs are looked for, and what was not found."""

    originals: Originals
    made: Made
    missing: list[str] = field(default_factory=list)

    def found(self, path: str | None, what: str, hashed: str) -> str:
        """The path, or "" and a note of what is missing."""
        if path is None:
            self.missing.append(f"{what} ({hashed})")
        return path or ""

    def model(self, role: str, recorded: Any, fits: Callable[[str], bool] = os.path.exists) -> str:
        """A base model, recorded by its hash or with its name."""
        known = recorded if isinstance(recorded, dict) else {"sampled_sha256": recorded}
        identity, name = str(known.get("sampled_sha256")), str(known.get("name", ""))
        path = self.originals.model(identity, name, fits)
        return self.found(path, f"the {role} {name}".rstrip(), f"sampled sha256 {identity}")

    def check(self) -> None:
        """Raise MissingInputsError where something is missing."""
        if self.missing:
            raise MissingInputsError(
                f"{len(self.missing)} of what it was made from is not below "
                f"{self.originals.folder}: {'; '.join(self.missing)}",
                path=self.made.path,
                hint="say where it is with --inputs DIR; names count for nothing, hashes do",
            )


def repeated(
    made: Made, verbs: Callable[[str], Verb], originals: Originals, *, allow_pickle: bool
) -> Call:
    """The call that makes the output again, but for where it goes; `verbs` gives verbs by name.

    Raises UsageError, naming it, for what cannot be repeated, MissingInputsError, and whatever
    opening the inputs raises.
    """
    verb = _verb(made, verbs)
    options = dict(made.options)
    search = _Search(originals, made)
    given: dict[str, Any] = {}
    if verb.name == "extract":
        for role in ("base", "tuned"):
            given[role] = search.model(role, options.pop(role, None))
        paths: list[str] = []
    else:
        paths = _adapters(search)
        given |= _beside(search, options, verb)
    if verb.name == "convert":
        options.setdefault("scaling", "folded")
        if not any(name in options for name in _TARGETS):
            options.pop("as_stored", None)
    if verb.name == "calc" and not isinstance(options.pop("names", None), dict):
        raise UsageError("its provenance does not say what the names are", path=made.path)
    given |= _plain(made, options, verb)
    search.check()

    def activations(digest: str) -> str:
        path: str = _activations(search, digest)
        search.check()
        return path

    given |= reopened(made, verb, given, paths, activations, allow_pickle)
    if "allow_pickle" in verb.keys:
        given["allow_pickle"] = allow_pickle
    return Call(verb, given, _warnings(made))


def _verb(made: Made, verbs: Callable[[str], Verb]) -> Verb:
    """The verb that repeats it: for sums that Python saved with options of compress, that."""
    repeats = ("merge", "calc", "compress", "convert", "extract", "bake")
    if made.verb not in repeats:
        raise UsageError(
            f"was made by {shown(made.verb)}, which is not repeated; {', '.join(repeats)} are",
            path=made.path,
        )
    verb = verbs(made.verb)
    names = {_RENAMED.get(name, name) for name in made.options} - _LEFT_OUT
    other = verbs("compress") if made.verb == "merge" else verb
    return other if names - verb.keys.keys() and not names - other.keys.keys() else verb


def _adapters(search: _Search) -> list[str]:
    """Where the adapters are, in the order of the provenance."""
    origins = search.made.inputs
    found = search.originals.find_all(origins)
    return [
        search.found(path, origin["name"], f"sha256 {origin['sha256']}")
        for path, origin in zip(found, origins, strict=True)
    ]


def _beside(search: _Search, options: dict[str, Any], verb: Verb) -> dict[str, Any]:
    """Models and activations that the verb takes; they are taken out of `options`."""
    found: dict[str, Any] = {}
    base = options.pop("base", None) if "base" in verb.keys else None
    shapes = options.pop("shapes", None) if "base" in verb.keys else None
    if base is not None and verb.name == "bake":
        kind = os.path.isdir if search.made.is_directory else os.path.isfile
        found |= {"base": search.model("base", base, kind), **_hashing(base, options)}
        _check_configs(found["base"], base)
    elif base is not None:
        found["base"] = search.model("base", base)
    elif shapes is not None:
        path = search.originals.shapes(str(shapes))
        found["base"] = search.found(path, "the base", f"sha256 of shapes {shapes}")
    if "residual" in options and "residual" in verb.keys:
        found["residual"] = search.model("residual", options.pop("residual"))
    if "activations" in options and "activations" in verb.keys:
        found["activations"] = _activations(search, options.pop("activations"))
    return found


def _activations(search: _Search, recorded: Any) -> Any:
    """Files of activations by their digests: one, or one for each adapter."""
    if isinstance(recorded, list):
        return [_activations(search, each) for each in recorded]
    if isinstance(recorded, dict):
        return {name: _activations(search, each) for name, each in recorded.items()}
    path = search.originals.activations(str(recorded))
    return search.found(path, "activations", f"digest {recorded}")


def _hashing(base: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the files of the base were hashed because that was asked for."""
    files = base.get("files") if isinstance(base, dict) else None
    hashed = isinstance(files, list) and any("sha256" in file for file in files)
    return {"hash": True} if hashed and not options.get("reversible") else {}


def _check_configs(path: str, recorded: Any) -> None:
    """Configs say what a weight's rows are, so those of the base must be the same."""
    wanted = recorded.get("configs_sha256") if isinstance(recorded, dict) else None
    if path and wanted and base_record(open_model(path), hashed=False)["configs_sha256"] != wanted:
        raise IncompatibleError(
            "has the weights that it was baked from, and another config", path=path
        )


def _plain(made: Made, options: Mapping[str, Any], verb: Verb) -> dict[str, Any]:
    """Options that are keywords of the verb. Raises UsageError for any other."""
    document = Document(made.path, options)
    found = {}
    for name, value in options.items():
        keyword = _RENAMED.get(name, name)
        if name in _LEFT_OUT:
            continue
        if keyword not in verb.keys:
            raise UsageError(
                f"was made by {verb.name} of version {made.version} with {name} = {shown(value)}, "
                f"which version {adapterops.__version__} cannot repeat",
                path=made.path,
            )
        if name in ("modules", "module_weights"):
            check_patterns(document, (name,), value)
        found[keyword] = fitted(document, (name,), value, verb.keys[keyword], "")
    return found


def _warnings(made: Made) -> tuple[str, ...]:
    if made.version == adapterops.__version__:
        return ()
    return (
        f"{made.path} was made by version {made.version}; version {adapterops.__version__} may "
        "round otherwise",
    )
