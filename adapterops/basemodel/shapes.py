"""Shapes of a base model's weights by module path: from headers, or from its config.json alone."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterops.basemodel import config as baseconfig
from adapterops.basemodel import names
from adapterops.errors import FormatError
from adapterops.files import checkpoint
from adapterops.files.header import Entry
from adapterops.formats import peft
from adapterops.formats.locate import read_text
from adapterops.provenance import base_name

# Types whose header shape is that of the weight; 4-bit and packed integers hide it.
_PLAIN = {"F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"}
_INTEGERS = {"U8", "I8", "I32", "U32", "F4"}
# GPTQ's, compressed-tensors', bitsandbytes', and gpt-oss' stacks of experts in MXFP4.
_PACKED = re.compile(r"\.(qweight|weight_packed|weight\.absmax)$|(?<=_proj)_blocks$")
_SCALES = ("_scale", "_scale_inv", ".scales", ".qzeros")
HEADS = ("lm_head", "embed_out")
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared")

Shape = tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Base:
    """A base model: shapes of its weights by module path, None where packing hides them.

    `conv1d`: it keeps linear weights as (in, out); None where nothing says so. `tied`: embedding
    and head are one weight.
    """

    name: str
    shapes: Mapping[str, Shape]
    conv1d: bool | None
    tied: bool
    names: names.Names


def load(path: str) -> Base:
    """The base at `path`: a checkpoint's file, index or folder, a pipeline's, or a config.json.

    Raises FileError, FormatError, and UnsupportedError for a config of unknown architecture.
    """
    given = Path(path)
    beside = given if given.is_dir() else given.parent
    is_config = given.suffix == ".json" and not given.name.endswith(".index.json")
    where = given if is_config else beside / "config.json"
    config: dict[str, Any] = {}
    if is_config or where.is_file():
        config = peft.read_config(read_text(os.fspath(where)), os.fspath(where))
    entries = {} if is_config else checkpoint.tensors(given)
    if not entries and not config:
        raise FormatError("holds neither weights (.safetensors) nor a config.json", path=path)
    shapes = _of_headers(entries) if entries else baseconfig.shapes(config, os.fspath(where))
    tied = baseconfig.is_tied(config)
    if tied is None or entries:
        has_head = any(leaf(path) in HEADS for path in shapes)
        has_embedding = any(leaf(path) in EMBEDDINGS for path in shapes)
        tied = bool(tied) or (has_embedding and not has_head and not _is_pipeline(shapes))
    kind = config.get("model_type")
    return Base(
        name=base_name(path),
        shapes=shapes,
        conv1d=None if kind is None else kind in baseconfig.CONV1D,
        tied=tied,
        names=names.index(shapes, {"": config}),
    )


def _of_headers(entries: Mapping[str, Entry]) -> dict[str, Shape]:
    """Shapes by module path; of packed weights only that they are there."""
    shapes: dict[str, Shape] = {}
    packed: set[str] = set()
    for name, entry in entries.items():
        owner = _PACKED.sub("", name)
        if owner != name or (name.endswith(".weight") and entry.dtype in _INTEGERS):
            packed.add(owner.removesuffix(".weight"))
        elif entry.dtype in _PLAIN and not name.endswith(_SCALES):
            shapes[name.removesuffix(".weight")] = entry.shape
    shapes = {path: shape for path, shape in shapes.items() if owner_of(path) not in packed}
    return {**shapes, **dict.fromkeys(packed)}


def owner_of(path: str) -> str:
    """A module path without its last part."""
    return path.rpartition(".")[0]


def _is_pipeline(shapes: Mapping[str, Shape]) -> bool:
    """Whether it has a denoiser: text encoders beside one have no head to be tied."""
    return any(path.startswith(("unet.", "transformer.transformer_blocks")) for path in shapes)


def leaf(path: str) -> str:
    """The last part of a module path."""
    return path.rpartition(".")[2]


def digest(base: Base) -> str:
    """What identifies a base where only its shapes matter."""
    return hashlib.sha256(repr(sorted(base.shapes.items())).encode()).hexdigest()
