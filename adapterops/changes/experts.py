"""Experts: one by one in a checkpoint and stacked in the model that is trained, or the other way.

transformers 5 stacks in memory what most checkpoints number: `mlp.experts.gate_up_proj` (E, 2I, H),
gate above up, is `experts.0.gate_proj.weight`, `experts.0.up_proj.weight`, … in a file, Mixtral's
are `block_sparse_moe.experts.0.w1` and `w3`. gpt-oss and Llama 4 keep (E, H, 2I), gpt-oss with
columns of gate and up in turn. MLX stacks them apart, as `switch_mlp.gate_proj` (E, I, H).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from adapterops.changes.pieces import Piece, Reading, region
from adapterops.errors import IncompatibleError
from adapterops.formats.model import AdapterFile, Ref, Site

Tensors = Mapping[str, Ref]

_NAMES = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}
_ROLES = {name: role for role, names in _NAMES.items() for name in names}
_FUSED = "gate_up_proj"
_BLOCKS = ("mlp", "block_sparse_moe", "feed_forward")
_MODULE = re.compile(r"(?P<block>.+)\.(experts|switch_mlp)(\.(?P<index>\d+))?\.(?P<leaf>\w+)$")
# Kinds of models whose stacks are (E, in, out), and of those whose module says so (is_transposed),
# by which PEFT goes; and the kind whose gate and up take turns.
_IN_OUT = ("gpt_oss", "llama4", "llama4_text", "openai_privacy_filter", "aria", "aria_text")
_SAYS_SO = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")
_IN_TURN = ("gpt_oss", "openai_privacy_filter")
_STRAIGHT = (0, 19)  # the version of PEFT whose A has a parameter's inputs, whatever comes first


def readings(site: Site, path: str, tensors: Tensors, config: Mapping[str, Any]) -> list[Reading]:
    """Every way in which a checkpoint may hold what a site of an expert changes, by names alone.

    `path` is the module's, of a parameter its owner's. Where a stack may be either way round there
    are two, of which shapes choose.
    """
    index = site.expert[0] if site.expert else 0
    if site.owned:
        return [
            reading
            for name in site.meant
            for reading in _of(f"{path}.{name}", index, site, tensors, config)
        ]
    return list(_of(path, index, site, tensors, config))


def _of(
    path: str, index: int, site: Site, tensors: Tensors, config: Mapping[str, Any]
) -> Iterator[Reading]:
    direct = next((name for name in (path, f"{path}.weight") if name in tensors), None)
    if direct and len(tensors[direct].shape) in (2, 3) and (site.owned or site.expert):
        count = tensors[direct].shape[0] if len(tensors[direct].shape) == 3 else 1
        for turned in (False, True):
            yield (region(direct, tensors[direct], index, turned, in_out=turned, experts=count),)
        return
    found = _MODULE.fullmatch(path)
    if not found:
        return
    index = int(found["index"]) if found["index"] else index
    blocks = [found["block"], *_others(found["block"])]
    if found["leaf"] == _FUSED:
        yield from _both(blocks, index, site, tensors)
        for name in _stack_names(blocks, _FUSED):
            if name in tensors:
                yield from _whole(name, tensors[name], index)
    elif found["leaf"] in _ROLES:
        yield from _one(blocks, _ROLES[found["leaf"]], index, site, tensors, config)


def _one(
    blocks: list[str],
    role: str,
    index: int,
    site: Site,
    tensors: Tensors,
    config: Mapping[str, Any],
) -> Iterator[Reading]:
    """Gate, up or down: a matrix of its own, a stack's, or half of a fused stack's."""
    for name, ref, count in _apart(blocks, role, index, site, tensors):
        for turned in (False, True) if site.owned or len(ref.shape) == 3 else (False,):
            in_out = turned and not site.owned
            yield (region(name, ref, index, turned, in_out=in_out, experts=count),)
        return
    if role == "down":
        for name in _stack_names(blocks, "down_proj"):
            if name in tensors and len(tensors[name].shape) == 3:
                yield from _whole(name, tensors[name], index)
        return
    kind = str(config.get("model_type") or "")
    for name in _stack_names(blocks, _FUSED):
        if name not in tensors or len(tensors[name].shape) != 3:
            continue
        ref = tensors[name]
        for in_out in (False, True):
            total = ref.shape[2 if in_out else 1]
            place = ("gate", "up").index(role)
            half = slice(place * (total // 2), (place + 1) * (total // 2), 1)
            if kind in _IN_TURN:
                half = slice(place, total, 2)
            yield (region(name, ref, index, in_out, half, in_out=in_out, experts=ref.shape[0]),)


def _both(blocks: list[str], index: int, site: Site, tensors: Tensors) -> Iterator[Reading]:
    """A fused parameter where gate and up are apart."""
    halves = [next(_apart(blocks, role, index, site, tensors), None) for role in ("gate", "up")]
    if None in halves:
        return
    for turned in (False, True):
        pieces: list[Piece] = []
        at = 0
        for found in halves:
            assert found is not None
            name, ref, count = found
            part = slice(at, at + ref.shape[-2])
            at = part.stop
            pieces.append(region(name, ref, index, turned, part=part, experts=count))
        yield tuple(pieces)


def _apart(
    blocks: list[str], role: str, index: int, site: Site, tensors: Tensors
) -> Iterator[tuple[str, Ref, int]]:
    """A role's tensor where it has one of its own: its name, itself, and how many experts."""
    for block in blocks:
        for leaf in _NAMES[role]:
            name = f"{block}.experts.{index}.{leaf}.weight"
            if name in tensors:
                last = site.expert[1] - 1 if site.expert else 0
                ends = [f"{block}.experts.{at}.{leaf}.weight" in tensors for at in (last, last + 1)]
                yield name, tensors[name], last + 1 if ends == [True, False] else -1
            for stack in (f"{block}.switch_mlp.{leaf}.weight", f"{block}.experts.{leaf}.weight"):
                if stack in tensors and len(tensors[stack].shape) == 3:
                    yield stack, tensors[stack], tensors[stack].shape[0]


def _whole(name: str, ref: Ref, index: int) -> Iterator[Reading]:
    """A stack of what the site changes, either way round."""
    for turned in (False, True):
        yield (region(name, ref, index, turned, in_out=turned, experts=ref.shape[0]),)


def _stack_names(blocks: list[str], leaf: str) -> Iterator[str]:
    granite = {_FUSED: "input_linear", "down_proj": "output_linear"}[leaf]
    for block in blocks:
        yield f"{block}.experts.{leaf}"
        yield f"{block}.experts.{leaf}.weight"
        yield f"{block}.{granite}.weight"


def _others(block: str) -> Iterator[str]:
    """A block by the other names that blocks of experts go by."""
    owner, dot, leaf = block.rpartition(".")
    return (f"{owner}{dot}{name}" for name in _BLOCKS if leaf in _BLOCKS and name != leaf)


def choose(
    file: AdapterFile, site: Site, fitting: list[Reading], config: Mapping[str, Any]
) -> Reading:
    """Which way round a square expert was trained, of two readings that differ in nothing else.

    PEFT before 0.19 gave A the first axis of every parameter, since then the inputs' unless the
    model says otherwise. Raises IncompatibleError where the version or the model is not known.
    """
    tensors = {tuple(piece.name for piece in reading) for reading in fitting}
    kind = str(config.get("model_type") or "")
    turned: bool | None
    if len(tensors) > 1:
        turned = None
    elif not site.owned:
        turned = False if site.dialect == "mlx" or kind else None
        turned = kind in _IN_OUT if kind and site.dialect != "mlx" else turned
    else:
        version = _version(str(file.config.get("peft_version") or ""))
        turned = True if version and version < _STRAIGHT else None
        if version and version >= _STRAIGHT and kind:
            turned = kind in _SAYS_SO
    found = [reading for reading in fitting if reading[0].turned == turned]
    if turned is None or len(found) != 1:
        names = " or ".join(sorted(", ".join(name) for name in tensors))
        raise IncompatibleError(
            f"its weight in {names} is square, and nothing says which of its axes are the inputs "
            "(peft_version in adapter_config.json and model_type in the base's config.json would)",
            path=file.path,
            module=site.stem,
            hint="put both configs beside their weights, or leave it out with --modules",
        )
    return found[0]


def _version(text: str) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None
