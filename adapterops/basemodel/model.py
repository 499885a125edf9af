"""A base model on disk: its tensors, none of them read yet, and what its configs say of them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adapterops.basemodel import config as configs
from adapterops.basemodel import outputs
from adapterops.basemodel.quantised import quantised
from adapterops.basemodel.shapes import EMBEDDINGS, HEADS
from adapterops.errors import FormatError, UnsupportedError
from adapterops.files import checkpoint
from adapterops.files.source import LocalFile, read_bytes, read_header
from adapterops.formats.locate import read_text
from adapterops.formats.model import Ref
from adapterops.formats.peft import read_config
from adapterops.provenance import base_name

_TOKENS = (*EMBEDDINGS, "token_embedding")  # embeddings with a row for each token
# Of positions, distances and types: called with indices by every model of transformers 5.23 that
# has them, so that PEFT's LoRA of an Embedding takes their place, ...
_CALLED = ("wpe", "position_embeddings", "token_type_embeddings", "relative_attention_bias")
# ... and those that some class computes from otherwise, where PEFT would fail or change nothing.
_OTHERS = re.compile(
    r"(\w*_)?(position_embeddings?|token_type_embeddings)(_\d+)?|embed_positions|positions_embed"
    r"|(rel_|rel_attn_|query_)?(pos_)?embed|(rel_)?pos_emb|rel_embeddings|distance_embedding"
    r"|position_(embedding_table|embeds_layer)|pe_k|segment_(emb|embedding)|embed_timestep"
    r"|(level|point|label|cls)_embed|(row|column)_embed(der|dings)|entity_embeddings"
    r"|ngram_embeddings"
)
_COMMON = re.compile(r"(model|diffusion_pytorch_model)[.-].*safetensors(\.index\.json)?$")
_FACTOR = re.compile(r"(^|[._])(lora|hada|lokr)_|[._](lora|processor)\.(up|down)\.")
_HUB = re.compile(r"(?:^|/)models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$")


@dataclass(frozen=True)
class BaseModel:
    """A checkpoint: a file, shards, a folder of either, or a pipeline of several models.

    `tensors` are by name, those of a pipeline with the folder of their model in front;
    `configs` are by that folder, "" for a single model. `files` are the weights' files.
    """

    path: str
    tensors: Mapping[str, Ref]
    configs: Mapping[str, Mapping[str, Any]]
    files: tuple[str, ...]

    @cached_property
    def identity(self) -> str:
        """What tells two checkpoints apart without reading all of them, however they are sharded.

        sha256 of names, types, shapes and a sample of every tensor.
        """
        digest = hashlib.sha256()
        for name, ref in sorted(self.tensors.items()):
            digest.update(json.dumps([name, ref.dtype, ref.shape]).encode())
            digest.update(ref.sample())
        return digest.hexdigest()

    @property
    def name(self) -> str:
        """The model's name: that of its folder, of a file named otherwise than all are, or of its
        hub cache's repository."""
        path = os.path.abspath(self.path)
        if _COMMON.match(os.path.basename(path)):
            path = os.path.dirname(path)
        found = _HUB.search(path)
        return f"{found[1]}/{found[2]}" if found else base_name(path)

    @property
    def config(self) -> Mapping[str, Any]:
        """The config.json of a single model, {} where there is none."""
        return self.configs.get("", {})

    @property
    def is_pipeline(self) -> bool:
        """Whether it is a folder of several models."""
        return "" not in self.configs

    @cached_property
    def quantised(self) -> str:
        """What quantised it, "" if its weights are floating-point numbers."""
        for part, config in self.configs.items():
            prefix = f"{part}." if part else ""
            mine = ((name, ref) for name, ref in self.tensors.items() if name.startswith(prefix))
            found = quantised(config, mine)
            if found:
                return found
        return ""

    def check_not_quantised(self) -> None:
        """Raise UnsupportedError, naming the method, for quantised weights."""
        if self.quantised:
            raise UnsupportedError(
                f"is quantised by {self.quantised}: its numbers are codes",
                path=self.path,
                hint="give the model in float16, bfloat16 or float32, or dequantise it first",
            )

    def part(self, name: str) -> str:
        """The folder of the model of a pipeline that a tensor is in, "" of a single model."""
        return name.partition(".")[0] if self.is_pipeline else ""

    def is_conv1d(self, name: str) -> bool:
        """Whether a 2-D tensor is the weight of a Conv1D, stored (in, out).

        By the config; without one, by names and by attention's c_attn, which is d x 3d there and
        3d x d in a Linear.
        """
        stem = name.removesuffix(".weight")
        if not configs.is_conv1d_name(stem) or stem == name:
            return False
        kind = self.configs.get(self.part(name), {}).get("model_type")
        if kind is not None:
            return kind in configs.CONV1D
        return self._wide

    @cached_property
    def _wide(self) -> bool:
        shapes = (ref.shape for n, ref in self.tensors.items() if n.endswith(".c_attn.weight"))
        return any(len(shape) == 2 and shape[1] == 3 * shape[0] for shape in shapes)

    def is_embedding(self, name: str) -> bool:
        """Whether a tensor is the weight of an Embedding (V, d), by its name.

        One of another name is, if it has a row for each token of the config and is no head
        (CTRL's is called `w`).
        """
        owner, _, leaf = name.rpartition(".")
        last = owner.rpartition(".")[2]
        shape = self.tensors[name].shape if name in self.tensors else ()
        if leaf != "weight" or len(shape) != 2:
            return False
        config = self.configs.get(self.part(name), {})
        by_size = shape[0] == config.get("vocab_size") and ("emb" in last or last == "w")
        named = last in (*_TOKENS, *_CALLED, outputs.embedding(config))
        return named or by_size or self.is_indirect(name)

    def is_indirect(self, name: str) -> bool:
        """Whether a tensor is that of an Embedding which models read otherwise than by a call."""
        owner, _, leaf = name.rpartition(".")
        last = owner.rpartition(".")[2]
        return leaf == "weight" and last not in _CALLED and _OTHERS.fullmatch(last) is not None

    def is_tokens(self, name: str) -> bool:
        """Whether a tensor is the weight of an Embedding of tokens, not of positions or types."""
        last = name.rpartition(".")[0].rpartition(".")[2]
        return self.is_embedding(name) and last not in _CALLED and not self.is_indirect(name)

    def is_head(self, name: str) -> bool:
        """Whether a tensor is the weight of a language model's head (V, d)."""
        owner, _, leaf = name.rpartition(".")
        own = outputs.head(self.config)
        named = own is not None and f".{owner}".endswith(f".{own}")
        return leaf == "weight" and (named or owner.rpartition(".")[2] in HEADS)

    @cached_property
    def head(self) -> str | None:
        """The head's tensor, None where the model has none or ties it and stores it once."""
        return next((name for name in self.tensors if self.is_head(name)), None)

    @cached_property
    def embedding(self) -> str | None:
        """The tensor with a row for each token of a single model."""
        own = outputs.embedding(self.config)
        leaves = (f".{leaf}.weight" for leaf in (*_TOKENS, *([own] if own else [])))
        endings = tuple(leaves)
        found = [n for n in self.tensors if f".{n}".endswith(endings) and self.is_embedding(n)]
        return min(found, key=len, default=None)

    @cached_property
    def is_tied(self) -> bool:
        """Whether embedding and head are one weight: the config, or the same bytes, says so.

        A causal model without a head of its own is tied too.
        """
        said = configs.is_tied(self.config)
        if self.embedding is None or said is False:
            return False
        if self.head is None:
            return bool(said) or self.is_causal
        one, other = self.tensors[self.embedding], self.tensors[self.head]
        return bool(said) or same_bytes(one, other)

    @property
    def architecture(self) -> str:
        """The model class that the config names, "" where it names none."""
        named = self.config.get("architectures")
        return str(named[0]) if isinstance(named, list) and named else ""

    @property
    def is_causal(self) -> bool:
        """Whether the model ends in a language model's head."""
        return self.architecture.endswith(("ForCausalLM", "LMHeadModel"))


def open_model(path: str | os.PathLike[str]) -> BaseModel:
    """The base model at `path`; only headers and configs are read.

    `path` is a safetensors file, the index of shards, a model's folder, or a pipeline's. Links are
    followed. Raises FileError for what is missing or unreadable, FormatError for what is damaged,
    incomplete or no model, UnsafeFileError for hostile names, UnsupportedError for GGUF.
    """
    given = Path(path)
    tensors: dict[str, Ref] = {}
    if given.suffix == ".gguf":
        raise UnsupportedError(
            "is a GGUF file, for which there is no reader here",
            path=given,
            hint="give the model that it was made from, in float16, bfloat16 or float32",
        )
    found = checkpoint.model_files(given)
    if not found:
        raise _without_weights(given)
    if not given.is_dir() and checkpoint.is_shard(given) and not checkpoint.is_index(given):
        raise FormatError(
            "is one of several shards of a model", path=given, hint="name the folder they are in"
        )
    for prefix, file in found:
        source = LocalFile(file)
        header = read_header(source)
        start = header.data_start
        source.close()
        for name, entry in header.tensors.items():
            if prefix + name in tensors:
                raise FormatError(
                    f"{name!r} is in {tensors[prefix + name].source.path} too", path=file
                )
            tensors[prefix + name] = Ref(
                source, prefix + name, entry.dtype, entry.shape, start + entry.start, entry.nbytes
            )
    _check_index(given, found, tensors)
    _check_model(given, tensors)
    return BaseModel(
        path=os.fspath(path),
        tensors=tensors,
        configs=_configs(given, found),
        files=tuple(os.fspath(file) for _, file in found),
    )


def same_bytes(one: Ref, other: Ref, block: int = 1 << 22) -> bool:
    """Whether two tensors are of one type and shape and equal bit by bit; stops where they differ.

    Reads `block` bytes of each at a time.
    """
    if (one.dtype, one.shape, one.nbytes) != (other.dtype, other.shape, other.nbytes):
        return False
    for start in range(0, one.nbytes, block):
        size = min(block, one.nbytes - start)
        mine = read_bytes(one.source, one.offset + start, size)
        if mine != read_bytes(other.source, other.offset + start, size):
            return False
    return True


def _configs(given: Path, found: list[tuple[str, Path]]) -> dict[str, Mapping[str, Any]]:
    """The configs by model; the one beside a file is its own."""
    result: dict[str, Mapping[str, Any]] = {}
    for prefix, file in found:
        beside = file.parent / "config.json"
        if prefix.rstrip(".") not in result:
            there = beside.is_file()
            text = read_text(os.fspath(beside)) if there else b"{}"
            result[prefix.rstrip(".")] = read_config(text, os.fspath(beside))
    return result


def _check_index(given: Path, found: list[tuple[str, Path]], tensors: Mapping[str, Ref]) -> None:
    """Every tensor must be in the shard that the index has for it."""
    folders = {file.parent: prefix for prefix, file in found} if given.is_dir() else {}
    indexes = [(prefix, checkpoint.index_of(folder)) for folder, prefix in folders.items()]
    if checkpoint.is_index(given):
        indexes = [("", given)]
    for prefix, index in indexes:
        if index is None:
            continue
        for name, shard in checkpoint.weight_map(index).items():
            ref = tensors.get(prefix + name)
            if ref is None or os.path.basename(ref.source.path) != shard:
                where = "no shard" if ref is None else os.path.basename(ref.source.path)
                raise FormatError(
                    f"has {name!r} in {shard}, {where} holds it",
                    path=index,
                    hint="fetch the index and its shards again",
                )


def _check_model(given: Path, tensors: Mapping[str, Ref]) -> None:
    """Refuse an adapter: mostly factors, and no weight that they would be factors for."""
    factors = [name for name in tensors if _FACTOR.search(name)]
    if 2 * len(factors) <= len(tensors) or any(".base_layer." in name for name in tensors):
        return
    raise FormatError(
        f"is an adapter (it holds {factors[0]!r}), not a model",
        path=given,
        hint="name the model's own weights; diff compares adapters, merge adds them",
    )


def _without_weights(given: Path) -> FormatError:
    others = next(checkpoint.pickles(given), None)
    if others is None:
        return FormatError("holds no weights (.safetensors)", path=given)
    return FormatError(
        f"holds no .safetensors, but {others.name}, which is not read",
        path=given,
        hint="load it and save it again with transformers' or diffusers' save_pretrained",
    )
