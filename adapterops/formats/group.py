"""From tensor names to modules: which tensors belong together, in which dialect they are named.

The grammar decides for every module on its own, never one key for the whole file: there are mixed
files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapterops.errors import AdapterOpsError, FormatError, UnsupportedError
from adapterops.formats import diffusers, grammar, peft
from adapterops.formats.model import Ref


@dataclass(slots=True)
class Group:
    """The tensors of one module by role, and the family of suffixes that named them."""

    parts: dict[str, Ref] = field(default_factory=dict)
    spelling: str = ""


@dataclass(slots=True)
class Tensors:
    """A file's tensors: modules by stem, dense deltas, all others, and what is wrong with them."""

    groups: dict[str, Group] = field(default_factory=dict)
    deltas: dict[str, Ref] = field(default_factory=dict)
    rest: dict[str, Ref] = field(default_factory=dict)
    problems: list[AdapterOpsError] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)  # stems that tensors of a refused kind may have


def group(refs: Mapping[str, Ref], path: str, heads: Sequence[str] = ()) -> Tensors:
    """Sort a file's tensors by what their names say; PEFT saves modules named `heads` whole."""
    result = Tensors()
    tentative: list[tuple[grammar.Key, Ref]] = []
    adapters: dict[str, str] = {}
    for name, ref in refs.items():
        key = grammar.parse(name)
        if key is None:
            _file_away(name, ref, path, heads, result)
        elif key.role in grammar.TENTATIVE:
            tentative.append((key, ref))
        else:
            module = result.groups.setdefault(key.stem, Group())
            if key.role in module.parts:
                text = f"{module.parts[key.role].name!r} and {name!r} are both the {key.role}"
                result.problems.append(
                    FormatError(f"{text} of one module", path=path, module=key.stem)
                )
                continue
            module.parts[key.role] = ref
            adapters.setdefault(key.adapter, name)
            if key.spelling and key.role != "bias":
                module.spelling = key.spelling
    if len(adapters) > 1:
        shown = " and ".join(map(repr, adapters.values()))
        result.problems.append(
            FormatError(f"holds tensors of several adapters: {shown}", path=path)
        )
    for key, ref in tentative:
        _attach(key, ref, path, result)
    return result


def _file_away(name: str, ref: Ref, path: str, heads: Sequence[str], result: Tensors) -> None:
    problem = grammar.refused(name, path)
    saved = name.startswith(peft.PREFIX) and any(f".{head}." in name for head in heads)
    if problem and not saved:
        result.problems.append(problem)
        stem = name.rpartition(".")[0]
        result.refused |= {stem, stem.rpartition(".")[0]}
    elif grammar.is_delta(name) and not name.startswith(peft.PREFIX):
        result.deltas[name] = ref
    else:
        result.rest[name] = ref


def _attach(key: grammar.Key, ref: Ref, path: str, result: Tensors) -> None:
    """Give an alpha to its module, an MLX magnitude too; a saved head may have such names."""
    owner = key.stem if key.stem in result.groups else _processor_stem(key.stem, result.groups)
    if key.role == "m" and owner is not None and result.groups[owner].spelling == "mlx":
        result.groups[owner].parts["magnitude"] = ref
    elif key.role == "alpha" and owner is not None:
        result.groups[owner].parts["alpha"] = ref
    elif key.role == "alpha" and not key.stem.startswith(peft.PREFIX):
        if key.stem not in result.refused:  # of a kind that is refused, alpha has no pair either
            problem = FormatError(f"{ref.name!r} belongs to no factors in this file", path=path)
            result.problems.append(problem)
    else:
        result.rest[ref.name] = ref


def _processor_stem(stem: str, groups: Mapping[str, Any]) -> str | None:
    key = grammar.parse(f"{stem}.down.weight") or grammar.parse(f"{stem}_lora.down.weight")
    return key.stem if key and key.stem in groups else None


def not_an_adapter(refs: Mapping[str, Ref], path: str) -> FormatError:
    """The error for a file without a single LoRA factor, showing what it holds instead."""
    shown = ", ".join(repr(name) for name in list(refs)[:3]) or "none at all"
    return FormatError(
        f"is not a LoRA adapter: none of its {len(refs)} tensors is a LoRA factor ({shown})",
        path=path,
    )


_PEFT_TYPES = ("LORA", "ADALORA", "LOHA", "LOKR")
_FLAT = ("lora_", "lycoris_")  # what kohya's and LyCORIS' flattened stems begin with
_BY_SPELLING = {
    "kohya": "kohya",
    "mlx": "mlx",
    "xlabs": "xlabs",
    "cloneofsimo": "cloneofsimo",
    "lora": "diffusers",
    "processor": "diffusers",
    "embedding": "peft",
}


def dialect_of(stem: str, spelling: str, config: Mapping[str, Any]) -> str:
    """The dialect that names a module."""
    if spelling in _BY_SPELLING:
        return _BY_SPELLING[spelling]
    if stem.startswith(peft.PREFIX):
        return "peft"
    configured = str(config.get("peft_type", "")).upper() in _PEFT_TYPES
    if configured and not diffusers.component(stem):
        return "peft"
    return "kohya" if spelling == "lycoris" and stem.startswith(_FLAT) else "diffusers"


def style_of(groups: Mapping[str, Group], dialects: Mapping[str, str]) -> str:
    """The spelling of diffusers' modules, per component: "unet=processor text_encoder=lora"."""
    styles: dict[str, str] = {}
    for stem, module in groups.items():
        if dialects[stem] != "diffusers":
            continue
        part = diffusers.component(diffusers.canonical(stem))
        if styles.get(part) in (None, "lora"):
            spelling = "peft" if module.spelling == "lycoris" else module.spelling
            bare = spelling == "peft" and part and not diffusers.component(stem)
            styles[part] = "bare" if bare else spelling
    return " ".join(f"{part}={style}" for part, style in sorted(styles.items()))


def unclaimed(tensors: Tensors, dialects: Mapping[str, str], path: str) -> list[AdapterOpsError]:
    """Tensors below a module that has factors, of no known kind; PEFT keeps whole layers there."""
    owners = {stem for stem in tensors.groups if dialects[stem] != "peft"}
    problems: list[AdapterOpsError] = []
    for name in tensors.rest if owners else ():
        if any(name[:at] in owners for at, letter in enumerate(name) if letter == "."):
            problems.append(
                UnsupportedError(
                    f"the tensor {name!r} of an adapted module is of no known kind", path=path
                )
            )
    return problems
