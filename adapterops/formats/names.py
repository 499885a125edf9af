"""One module's name in two dialects: translated where both name the same thing, found out where a
merge by name would take one module for two.

PEFT knows module paths, diffusers puts the component in front (`unet.`), kohya flattens the dots to
underscores behind a prefix of its own; PEFT and MLX agree. Flattening loses the dots; they come
back only where every piece of the name is one that the U-Net or the text encoder has. Fused
projections, SGM block names and language models have no counterpart here.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping

from adapterops.formats import diffusers

_KOHYA_PREFIX = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_UNET_HEADS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding.")
_TRANSFORMER_HEADS = ("transformer_blocks.", "single_transformer_blocks.")
_TEXT_HEADS = ("text_model.",)

# Pieces of U-Net and CLIP module paths, longest first so that to_out is not read as to + out.
_PIECES = """
    down_blocks up_blocks mid_block attentions resnets transformer_blocks attn1 attn2 to_q to_k to_v
    to_out ff net proj proj_in proj_out conv1 conv2 conv conv_in conv_out conv_shortcut
    time_emb_proj time_embedding linear_1 linear_2 downsamplers upsamplers text_model encoder layers
    self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection
"""
_PIECE = re.compile(rf"({'|'.join(sorted(_PIECES.split(), key=len, reverse=True))}|\d+)(?:_|$)")


DIRECTORIES = ("peft", "mlx")  # dialects of a directory with a config; the others are one file

_ROOTS = [
    (re.compile(r"lora_(unet|transformer)_+(unet_)?|lycoris_"), "denoiser"),
    (re.compile(r"lora_te(?P<number>[23])_"), "text_encoder"),
    (re.compile(r"lora_te1?_"), "text_encoder"),
    (re.compile(r"(unet|transformer|diffusion_model)\."), "denoiser"),
    (re.compile(r"text_encoder(?P<number>_[23])?\."), "text_encoder"),
]
# Ways to call one model's blocks that never meet in one adapter.
_VOCABULARIES = {
    "SGM's names (input_blocks)": re.compile(r"(input|output|middle)_blocks?_"),
    "diffusers' names (down_blocks)": re.compile(r"(down|up|mid)_blocks?_"),
    "XLabs' names (processor)": re.compile(r"(double|single)_blocks_\d+_processor_"),
    "Flux' names (double_blocks)": re.compile(r"(double|single)_blocks_"),
    "diffusers' names (transformer_blocks)": re.compile(r"(single_)?transformer_blocks_"),
    "cloneofsimo's numbers": re.compile(r"(unet|list):"),
}
_UNET = list(_VOCABULARIES)[:2]
_FLUX = list(_VOCABULARIES)[2:5]
_NUMBERS = list(_VOCABULARIES)[5:]
_APART = [_UNET, _FLUX, _NUMBERS + _UNET[:1], _NUMBERS + _UNET[1:]]
_EXPERTS = re.compile(r"(?P<parent>.*_|)(?P<name>switch_mlp|experts)(_|\[|$)")
_FUSED = re.compile(
    r"(?P<parent>.*?_|)(qkv|qkv_proj|to_qkv|in_proj|c_attn|query_key_value|gate_up_proj)$"
)
_SPLIT = re.compile(
    r"(?P<parent>.*?_|)(to_[qkv]|[qkv]_proj|[qkv]|query|key|value|gate_proj|up_proj)$"
)


def two_names(files: Mapping[str, Iterable[str]]) -> str | None:
    """What is wrong if the stems of several files call one module by two names, else None."""
    where: dict[str, str] = {}
    for path, stems in files.items():
        for stem in stems:
            where.setdefault(stem, path)
    names: dict[str, str] = {}
    vocabularies: dict[str, str] = {}
    moe: dict[str, tuple[str, str]] = {}
    fused: dict[str, str] = {}
    split: dict[str, str] = {}
    for stem in where:
        root, flat = flatten(stem)
        other = names.setdefault(f"{root}:{flat}", stem)
        if other != stem:
            return _clash(other, stem, where, "one module in two dialects")
        vocabulary = _vocabulary(flat) if root == "denoiser" else None
        if vocabulary:
            vocabularies.setdefault(vocabulary, stem)
        experts = _EXPERTS.match(flat)
        if experts:  # MLX stacks in switch_mlp what others keep in experts
            mine = moe.setdefault(f"{root}:{experts['parent']}", (experts["name"], stem))
            if mine[0] != experts["name"]:
                return _clash(mine[1], stem, where, "the experts of one layer in two dialects")
        for pattern, found_in in ((_FUSED, fused), (_SPLIT, split)):
            found = pattern.match(flat)
            if found:
                found_in.setdefault(f"{root}:{found['parent']}", stem)
    for group in _APART:
        one, two, *_ = *(name for name in group if name in vocabularies), "", ""
        if two:
            return _clash(vocabularies[one], vocabularies[two], where, f"{one} and {two}")
    for parent in fused.keys() & split.keys():
        one, two = fused[parent], split[parent]
        if where[one] != where[two]:  # in one file both are modules of one model
            return _clash(one, two, where, "a fused and a split projection")
    return None


def _clash(one: str, two: str, where: Mapping[str, str], what: str) -> str:
    return f"{one!r} ({where[one]}) and {two!r} ({where[two]}) are {what}"


def flatten(stem: str) -> tuple[str, str]:
    """Which model a stem is in, and its path with underscores for dots."""
    for pattern, root in _ROOTS:
        found = pattern.match(stem)
        if found:
            number = (found.groupdict().get("number") or "").strip("_")
            return root + number, stem[found.end() :].replace(".", "_")
    flat = stem.replace(".", "_")
    return "denoiser" if _vocabulary(flat) else "", flat


def _vocabulary(flat: str) -> str | None:
    return next((name for name, pattern in _VOCABULARIES.items() if pattern.match(flat)), None)


def factored_weight(name: str, stems: Container[str]) -> str | None:
    """The module, among those that have factors, whose weight the full delta `name` changes too."""
    stem = name.removesuffix(".diff")
    if stem == name:
        return None
    return next((each for each in (stem, diffusers.canonical(stem)) if each in stems), None)


def translate(stems: list[str], source: str, target: str) -> dict[str, str] | None:
    """stem -> its name in the target dialect, or None if some stem has none there."""
    if target not in ("diffusers", "peft", "kohya"):  # MLX has language models only
        return None
    paths = {stem: _to_diffusers(stem, source) for stem in stems}
    parts = {diffusers.component(path) for path in paths.values() if path}
    if None in paths.values():
        return None
    result = {stem: _from_diffusers(path or "", target, parts) for stem, path in paths.items()}
    names = {name for name in result.values() if name is not None}
    if len(names) < len(stems):  # without a name, or with another module's
        return None
    return {stem: name or "" for stem, name in result.items()}


def _to_diffusers(stem: str, source: str) -> str | None:
    if source == "diffusers":
        return stem if diffusers.component(stem) else None
    if source == "peft":
        for heads, part in (
            (_UNET_HEADS, "unet"),
            (_TRANSFORMER_HEADS, "transformer"),
            (_TEXT_HEADS, "text_encoder"),
        ):
            if stem.startswith(heads):
                return f"{part}.{stem}"
        return None
    for prefix, part in _KOHYA_PREFIX.items():
        if stem.startswith(prefix):
            path = _unflatten(stem.removeprefix(prefix))
            return None if path is None else f"{part}.{path}"
    return None


def _unflatten(flat: str) -> str | None:
    """Dots for underscores where every piece is known: `attn1_to_out_0` is `attn1.to_out.0`."""
    pieces = []
    position = 0
    while position < len(flat):
        found = _PIECE.match(flat, position)
        if found is None:
            return None
        pieces.append(found[1])
        position = found.end()
    return ".".join(pieces)


def _from_diffusers(path: str, target: str, parts: set[str]) -> str | None:
    part = diffusers.component(path)
    inner = path.removeprefix(part + ".")
    if target == "diffusers":
        return path
    if target == "peft":
        return inner if len(parts) == 1 else None
    two_encoders = "text_encoder_2" in parts
    prefix = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te1_" if two_encoders else "lora_te_",
        "text_encoder_2": "lora_te2_",
    }.get(part)
    flat = inner.replace(".", "_")  # a name that cannot come back is none that kohya's tools know
    return None if prefix is None or _unflatten(flat) != inner else prefix + flat
