"""Fused projections: where q, k and v, or gate and up, lie in one weight, and the other way round.

Three orders are in use, all of rows of (out, in), for h query heads, g key heads and numbers d of
each head (transformers 5.23, the models' own `forward`):

- one after the other, h·d + g·d + g·d: Phi-3, GPT-2, Qwen 1, MPT, DBRX, Falcon 7B (g = 1), ChatGLM;
- by head, h · (d + d + d): BLOOM, GPT-NeoX, Persimmon, GPT-BigCode with many keys, Falcon RW;
- by group of heads, g · (h/g·d + d + d): Falcon 40B, InternLM 2.

h, g and d are the config's: other ones may make as many rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from adapterops.basemodel.parts import Part, Parts, Shapes, stacked
from adapterops.errors import IncompatibleError, UnsupportedError

_QKV = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
)
_FUSED_QKV = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "W_pack", "qkv", "to_qkv")
_THIRDS = ("qkv", "to_qkv", "in_proj_weight")  # of image models and MultiheadAttention: no config
_GATE_UP = (("gate_proj", "up_proj"), ("w1", "w3"))
_FUSED_GATE_UP = ("gate_up_proj", "weights_in")  # the latter is DINOv2's
_UP_GATE = ("up_gate_proj",)  # GTE's, the other way round
_BY_HEAD = ("bloom", "gpt_neox", "gpt_neox_japanese", "persimmon")
_FALCON = ("falcon", "RefinedWeb", "RefinedWebModel")
_BY_GROUP = ("internlm2",)
_OWN = ("query_key_value", "wqkv")  # names of models that differ in the order

Config = Mapping[str, Any]


def inside(path: str, shapes: Shapes, config: Config, turned: Callable[[str], bool]) -> Parts:
    """The rows of a fused weight that a split module `path` is, () if there is none.

    `turned` says whether a tensor is stored as (in, out); `config` is the base's. Raises
    IncompatibleError where the config does not say how many heads there are, or says otherwise
    than the weight; UnsupportedError for an order that is not known.
    """
    role, modules = wholes(path)
    for module in modules:
        name = module.rpartition(".")[2]
        tensor = module if module.endswith("_weight") else f"{module}.weight"
        if tensor not in shapes or len(shapes[tensor]) != 2:
            continue
        is_turned = turned(tensor)
        height = shapes[tensor][1 if is_turned else 0]
        if name in (*_FUSED_GATE_UP, *_UP_GATE):
            place = 1 - role if name in _UP_GATE else role
            ranges = [(stacked(height, 2)[place], slice(0, height // 2))]
        else:
            ranges = _attention(name, tensor, height, config)[role]
        return tuple(Part(tensor, rows, is_turned, of) for rows, of in ranges)
    return ()


def wholes(path: str) -> tuple[int, list[str]]:
    """Which part of a fused projection a split module is, and what that may be called."""
    owner, dot, leaf = path.rpartition(".")
    gate_up = (*_FUSED_GATE_UP, *_UP_GATE)
    for groups, into in ((_QKV, (*_FUSED_QKV, "in_proj_weight")), (_GATE_UP, gate_up)):
        for names in groups:
            if leaf in names:
                return names.index(leaf), [f"{owner}{dot}{name}" for name in into]
    return 0, []


def across(path: str, shapes: Shapes, turned: Callable[[str], bool]) -> Parts:
    """The split weights that a fused module `path` is made of, () if there are none.

    Raises UnsupportedError for names that stand for several orders.
    """
    owner, dot, leaf = path.rpartition(".")
    groups = _QKV if leaf in _FUSED_QKV else _GATE_UP if leaf in _FUSED_GATE_UP else ()
    for names in groups:
        tensors = [f"{owner}{dot}{name}.weight" for name in names]
        if any(name not in shapes or len(shapes[name]) != 2 for name in tensors):
            continue
        if leaf in _OWN:
            raise UnsupportedError(
                f"{leaf} of several models is fused in several orders; which was trained does not "
                f"show here, where {', '.join(names)} are apart",
                module=path,
            )
        parts, at = [], 0
        for name in tensors:
            height = shapes[name][1 if turned(name) else 0]
            parts.append(Part(name, None, turned(name), slice(at, at + height)))
            at += height
        return tuple(parts)
    return ()


_Ranges = list[tuple[slice, slice]]  # rows of the fused weight, outputs of the split one


def _attention(name: str, tensor: str, height: int, config: Config) -> list[_Ranges]:
    """Where q, k and v lie in `height` rows."""
    if name in _THIRDS:
        return [[(rows, slice(0, height // 3))] for rows in stacked(height, 3)]
    kind = str(config.get("model_type") or "")
    heads, keys, width = _heads(config, kind, tensor)
    if heads * width + 2 * keys * width != height:
        raise IncompatibleError(
            f"the config's {heads} heads, {keys} of keys, of {width} make "
            f"{(heads + 2 * keys) * width} rows, {tensor!r} has {height}",
            hint="is this the config.json of these weights?",
        )
    order = _order(name, kind, config, tensor)
    if order == "whole":
        sizes = (heads * width, keys * width, keys * width)
        starts = (0, sizes[0], sizes[0] + sizes[1])
        return [
            [(slice(start, start + size), slice(0, size))]
            for start, size in zip(starts, sizes, strict=True)
        ]
    groups = heads if order == "head" else keys
    each = (heads // groups * width, width, width)
    result: list[_Ranges] = []
    for role, size in enumerate(each):
        first = sum(each[:role])
        begins = [group * sum(each) + first for group in range(groups)]
        result.append(
            [
                (slice(begin, begin + size), slice(group * size, (group + 1) * size))
                for group, begin in enumerate(begins)
            ]
        )
    return result


def _order(name: str, kind: str, config: Config, tensor: str) -> str:
    """How a model of this kind fuses: "whole", by "head" or by "group"."""
    if kind in _FALCON:
        if config.get("new_decoder_architecture"):
            return "group"
        return "whole" if config.get("multi_query", True) else "head"
    if kind == "gpt_bigcode":
        return "whole" if config.get("multi_query", True) else "head"
    if kind in _BY_HEAD:
        return "head"
    if kind in _BY_GROUP:
        return "group"
    if kind == "codegen" or (name in _OWN and kind != "chatglm"):
        raise UnsupportedError(
            f"in what order {kind or 'a model of no known kind'} fuses q, k and v in {tensor!r} is "
            "not known here",
            hint="train the fused module, or put the model's config.json beside it",
        )
    return "whole"


def _heads(config: Config, kind: str, tensor: str) -> tuple[int, int, int]:
    """Query heads, key heads, and numbers of a head."""
    inner = config.get("text_config")
    given = {**config, **inner} if isinstance(inner, dict) else config
    attention = given.get("attn_config")
    more = attention if isinstance(attention, dict) else {}

    def number(*names: str) -> int | None:
        found = (source.get(name) for source in (given, more) for name in names)
        value = next((v for v in found if isinstance(v, int) and not isinstance(v, bool)), None)
        return value if value is None or value > 0 else None

    heads = number("num_attention_heads", "n_head", "n_heads", "num_heads")
    size = number("hidden_size", "n_embd", "n_embed", "d_model")
    width = number("head_dim", "kv_channels") or (size // heads if size and heads else None)
    if heads is None or width is None:
        raise IncompatibleError(
            f"{tensor!r} fuses q, k and v, and no config says how many heads there are",
            hint="put the base's config.json beside its weights",
        )
    if kind == "gpt_bigcode" or (kind in _FALCON and not given.get("new_decoder_architecture")):
        return heads, 1 if given.get("multi_query", True) else heads, width
    names = ["num_key_value_heads", "kv_n_heads", "num_kv_heads", "n_head_kv"]
    if given.get("multi_query_attention"):
        names.append("multi_query_group_num")
    return heads, number(*names) or heads, width
