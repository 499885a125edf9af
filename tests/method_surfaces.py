"""One merge, asked for in every way there is: the command line, recipes, `calc` and Python.

A `Case` is what is asked for. Each surface writes it and gives a `Found`: the tensors' bytes, or
what was said where it is refused. Paths are spelled differently by each, labels never are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import adapterops as ao
from adapterops.errors import AdapterOpsError
from adapterops.expression.calls import spelled
from adapterops.rules.registry import METHODS, Method, Parameter
from tests.inspecting import attempt

NAMES = "abcdefgh"


@dataclass(frozen=True)
class Case:
    """Weights and options are those of `merge`; `saved` are those of saving, which all have."""

    method: str
    adapters: tuple[Path, ...]
    weights: tuple[float, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    general: Mapping[str, Any] = field(default_factory=dict)
    module_weights: tuple[str, ...] = ()
    normalize: bool = False
    activations: tuple[Path, ...] = ()
    saved: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_valid(self) -> bool:
        """Whether there is such a combination: what `adapterops methods` and README rule out."""
        method, calibrate = METHODS[self.method], self.general.get("calibrate")
        dense = method.signature == "elements" and self.general.get("space", "dense") == "dense"
        return not (calibrate and method.signature == "factors") and not (
            calibrate == "svc" and dense
        )

    @property
    def shares(self) -> list[float]:
        total = sum(self.weights) if self.normalize else 1.0
        return [weight / total for weight in self.weights]


@dataclass(frozen=True)
class Found:
    """Exit code; the digest of all tensors of what was written, or why nothing was."""

    code: int
    digest: str = ""
    module: str | None = None
    said: str = ""


Surface = Callable[[Case, Path], Found]


def digest(out: Path) -> str:
    """Of the names, types, shapes and bytes of an output's tensors; not of its provenance."""
    files = sorted(out.rglob("*.safetensors")) if out.is_dir() else [out]
    assert files, f"{out} has no tensors"
    total = hashlib.sha256()
    for file in files:
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        header.pop("__metadata__", None)
        total.update(json.dumps(header, sort_keys=True).encode() + data[end:])
    return total.hexdigest()


def written(out: Path) -> Path:
    """Where an output is: dialects of one file add the suffix."""
    return out if out.exists() else out.with_name(f"{out.name}.safetensors")


def _refused(code: int, module: str | None, message: str) -> Found:
    # Folders are spelled as they were given; calc shows the place below the first line.
    said = re.sub(r"[^\s'\"]*/", "", message.split("\n")[0])
    return Found(code, "", module, said)


def _called(out: Path, *arguments: str | Path, cwd: Path) -> Found:
    code, done = attempt(*arguments, "-o", out, "--json", "--no-progress", cwd=cwd)
    if code == 0:
        return Found(0, digest(written(out)))
    assert not written(out).exists()
    error = json.loads(done.stderr.splitlines()[-1])["error"]
    return _refused(code, error.get("module"), error["message"])


def _made(out: Path, make: Callable[[], Any]) -> Found:
    try:
        make()
    except AdapterOpsError as error:
        assert not written(out).exists()
        return _refused(error.exit_code, error.module, error.message)
    return Found(0, digest(written(out)))


def _flags(options: Mapping[str, Any]) -> list[str]:
    found = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        found += [flag] if value is True else [flag, str(value)]
    return found


def _method_flags(case: Case) -> list[str | Path]:
    """What `merge` and `bake` have in common."""
    found: list[str | Path] = ["-w", ",".join(map(repr, case.weights)), "-m", case.method]
    for name, value in case.parameters.items():
        found += ["--param", f"{name}={str(value).lower() if value in (True, False) else value}"]
    for spec in case.module_weights:
        found += ["--module-weights", spec]
    for path in case.activations:
        found += ["--activations", path]
    return [*found, *_flags(case.general), *_flags(case.saved)]


def by_command(case: Case, out: Path) -> Found:
    """`adapterops merge`, beside the first adapter."""
    cwd = case.adapters[0].parent
    names = [os.path.relpath(path, cwd) for path in case.adapters]
    flags = [*_method_flags(case), *["--normalize"] * case.normalize]
    return _called(out, "merge", *names, *flags, cwd=cwd)


def _recipe(case: Case, folder: Path) -> dict[str, Any]:
    """The keys that both kinds of recipes have."""
    files = [os.path.relpath(path, folder) for path in case.activations]
    found = {**case.general, **case.saved}
    found |= {"module_weights": list(case.module_weights)} if case.module_weights else {}
    found |= {"activations": files} if files else {}
    return found | ({"normalize": True} if case.normalize else {})


def _run(out: Path, recipe: Mapping[str, Any]) -> Found:
    folder = out.parent / f"{out.name}-recipe"
    folder.mkdir()
    (folder / "r.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return _called(out, "run", folder / "r.yaml", cwd=folder)


def by_recipe(case: Case, out: Path) -> Found:
    """`adapterops run`, with paths relative to the recipe."""
    folder = out.parent / f"{out.name}-recipe"
    recipe = {
        "verb": "merge",
        "adapters": [os.path.relpath(path, folder) for path in case.adapters],
        "weights": list(case.weights),
        "method": case.method,
        "parameters": dict(case.parameters),
        **_recipe(case, folder),
    }
    return _run(out, recipe)


def by_mergekit(case: Case, out: Path) -> Found:
    """`adapterops run` of a recipe of mergekit's shape."""
    folder = out.parent / f"{out.name}-recipe"
    models = [
        {"model": os.path.relpath(path, folder), "parameters": {"weight": weight}}
        for path, weight in zip(case.adapters, case.weights, strict=True)
    ]
    recipe = {
        "merge_method": case.method,
        "models": models,
        "parameters": dict(case.parameters),
        **_recipe(case, folder),
    }
    return _run(out, recipe)


def expression(case: Case) -> str:
    """The case as `calc` has it; weights of single modules it has not."""
    options = {
        **{spelled(name): value for name, value in case.parameters.items()},
        **case.general,
        "weights": case.shares,
    }
    arguments = [*NAMES[: len(case.adapters)], *(f"{n}={v!r}" for n, v in options.items())]
    return f"{case.method}({', '.join(arguments)})"


def by_calc(case: Case, out: Path) -> Found:
    """`adapterops calc`, with absolute paths."""
    named = [f"{n}={path.absolute()}" for n, path in zip(NAMES, case.adapters, strict=False)]
    files: list[str | Path] = []
    for name, path in zip(NAMES, case.activations, strict=False):
        files += ["--activations", f"{name}={path}" if len(case.activations) > 1 else path]
    saved = _flags(case.saved)
    return _called(out, "calc", expression(case), *named, *files, *saved, cwd=out.parent)


def by_merge(case: Case, out: Path) -> Found:
    """`ao.merge`, of paths."""
    options = {**case.general, **case.saved, "normalize": case.normalize}
    return _made(
        out,
        lambda: ao.merge(
            list(case.adapters),
            list(case.weights),
            method=case.method,
            parameters=case.parameters,
            module_weights=case.module_weights,
            activations=case.activations or None,
            out=out,
            **options,
        ),
    )


def by_combine(case: Case, out: Path) -> Found:
    """`ao.combine` of opened adapters, saved."""
    saved = dict(case.saved)
    pickles = {"allow_pickle": saved.pop("allow_pickle", False)}

    def make() -> None:
        made = ao.combine(
            case.method,
            [ao.open_adapter(path, **pickles) for path in case.adapters],
            case.shares,
            parameters=case.parameters,
            module_weights=case.module_weights,
            activations=case.activations or None,
            modules=saved.get("modules"),
            **case.general,
        )
        made.save(out, **saved)

    return _made(out, make)


SURFACES: dict[str, Surface] = {
    "command": by_command,
    "recipe": by_recipe,
    "mergekit": by_mergekit,
    "calc": by_calc,
    "merge": by_merge,
    "combine": by_combine,
}


def every_surface(case: Case, folder: Path) -> dict[str, Found]:
    """What each surface makes of a case, and `run` of what the first of them wrote."""
    found = {
        name: surface(case, folder / name)
        for name, surface in SURFACES.items()
        if name != "calc" or not case.module_weights
    }
    if found["command"].code == 0:
        place = os.path.commonpath([*case.adapters, *case.activations])
        again = ("run", written(folder / "command"), "--inputs", place)
        pickles = _flags({"allow_pickle": True} if case.saved.get("allow_pickle") else {})
        found["again"] = _called(folder / "again", *again, *pickles, cwd=folder)
    return found


def assert_one(found: Mapping[str, Found]) -> Found:
    """All of them, which have to be one and the same; calc says more than the others."""
    first = found["command"]
    for name, one in found.items():
        if name == "calc" and one.code and one.said.startswith(first.said):
            one = Found(one.code, "", one.module, first.said)
        assert one == first, (name, found)
    return first


def bakes(case: Case, base: Path, folder: Path) -> dict[str, Found]:
    """`bake --method` from the command line, by recipes and from Python, and of an adapter made."""
    out = {name: folder / name for name in ("command", "recipe", "mergekit", "bake", "combine")}
    place = out["recipe"].with_name("recipe-recipe")
    flags = ("bake", base, *case.adapters, *_method_flags(case))
    shared = _recipe(case, place)
    models = [
        {"model": str(path), "parameters": {"weight": weight}}
        for path, weight in zip(case.adapters, case.weights, strict=True)
    ]
    options = {
        "method": case.method,
        "parameters": case.parameters,
        "module_weights": case.module_weights,
        "activations": case.activations or None,
        **case.general,
    }
    weights = list(case.weights)

    def of_one() -> None:
        modules = case.saved.get("modules")
        method = options["method"]
        rest = {name: value for name, value in options.items() if name != "method"}
        made = ao.combine(method, case.adapters, weights, modules=modules, **rest)
        ao.bake(base, made, out=out["combine"], **case.saved)

    return {
        "command": _called(out["command"], *flags, cwd=folder),
        "recipe": _run(
            out["recipe"],
            {
                "verb": "bake",
                "base": os.path.relpath(base, place),
                "adapters": [os.path.relpath(path, place) for path in case.adapters],
                "weights": weights,
                "method": case.method,
                "parameters": dict(case.parameters),
                **shared,
            },
        ),
        "mergekit": _run(
            out["mergekit"],
            {
                "verb": "bake",
                "base_model": str(base),
                "merge_method": case.method,
                "models": models,
                "parameters": dict(case.parameters),
                **shared,
            },
        ),
        "bake": _made(
            out["bake"],
            lambda: ao.bake(base, case.adapters, weights, out=out["bake"], **options, **case.saved),
        ),
        "combine": _made(out["combine"], of_one),
    }


def other(parameter: Parameter, turn: int) -> Any:
    """A value of a parameter that is not its default."""
    if parameter.kind == "switch":
        return not parameter.default
    if parameter.kind == "text":
        rest = [each for each in parameter.choices if each != parameter.default]
        return rest[turn % len(rest)]
    if parameter.kind == "whole":
        return int(parameter.default or 4) * 3 // 4
    assert isinstance(parameter.default, float | int) and parameter.default
    return 0.75 * parameter.default


SPACES = ("dense", "core", "knots")
CALIBRATIONS = (None, "pico", "svc")
NORMS = (None, "max", None, "mean", None, "sum")
SAVED: tuple[dict[str, Any], ...] = (
    {"rank": 3},
    {"max_error": 0.75},
    {"rank": "same", "dtype": "bfloat16"},
    {"energy": 0.5},
)
WEIGHTS = ((0.6, 0.3, 0.8), (1.25, -0.5, 0.3), (0.75, 1.0, 0.5), (1e-2, 3e-2, 2e-2))


def options(method: Method, turn: int) -> dict[str, Any]:
    """Fields of the turn's `Case`: every option of every method occurs in one of them."""
    place = sorted(METHODS).index(method.name) + turn
    general: dict[str, Any] = {}
    if method.spaces and place % 3:
        general["space"] = SPACES[place % 3]
    if "seed" in method.needs and place % 2:
        general["seed"] = 7 + turn
    if calibrate := CALIBRATIONS[place // 2 % 3] if method.signature != "factors" else None:
        general["calibrate"] = calibrate
    if match := NORMS[place % len(NORMS)]:
        general["match_norm"] = match
    needed = [each for each in method.parameters if each.default is None]
    chosen = method.parameters if turn % 2 == 0 else needed
    return {
        "parameters": {each.name: other(each, place) for each in chosen},
        "general": general,
        "normalize": turn % 3 == 1,
        "saved": SAVED[place % len(SAVED)],
    }
