"""What becomes of each tensor that differs: factors, a copy of the whole module, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from adapterops.basemodel import BaseModel
from adapterops.errors import IncompatibleError, UnsupportedError, UsageError
from adapterops.extraction.pairing import Pair
from adapterops.extraction.readers import unknown_reader
from adapterops.formats import diffusers

Vectors = Literal["save", "drop", "error"]
Embeddings = Literal["lora", "save", "drop"]
Kind = Literal["linear", "conv1d", "conv", "embedding", "head", "vector", "unknown"]

_LARGEST_KERNEL = 64
_SHOWN = 3


@dataclass(slots=True)
class Fate:
    """The tensors that differ: made into factors, with their kind; saved whole; left out.

    `modules` are saved whole by PEFT's modules_to_save, `biases` by its `bias`. `resized` is the
    number of tokens that the base model must be resized to before the adapter is loaded.
    """

    factors: list[tuple[Pair, Kind]] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    biases: list[Pair] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    resized: int | None = None


def check_policies(vectors: str, embeddings: str) -> None:
    """Raise UsageError for a policy that there is not."""
    for option, value, known in (
        ("vectors", vectors, get_args(Vectors)),
        ("embeddings", embeddings, get_args(Embeddings)),
    ):
        if value not in known:
            raise UsageError(f"--{option} {value!r}: expected one of {', '.join(known)}")


def decide(
    changed: Sequence[Pair],
    every: Sequence[Pair],
    tuned: BaseModel,
    dialect: str,
    vectors: str,
    embeddings: str,
) -> Fate:
    """What becomes of the `changed` of `every` pair.

    Raises UnsupportedError, naming them, for tensors that no LoRA changes and policies that the
    dialect has no place for; IncompatibleError for vectors that are not wanted.
    """
    fate = Fate()
    ranks = {pair.name: len(pair.tuned.shape) for pair in every}
    unknown: list[Pair] = []
    lengths: list[Pair] = []
    for pair in changed:
        kind = kind_of(pair, tuned)
        if kind == "vector":
            lengths.append(pair)
        elif kind in ("embedding", "head"):
            _embedding(pair, kind, tuned, dialect, embeddings, fate)
        elif kind == "unknown" or not _has_place(pair, dialect):
            unknown.append(pair)
        else:
            fate.factors.append((pair, kind))
    _refuse(unknown)
    _vectors(lengths, ranks, dialect, vectors, tuned, fate)
    if not fate.factors:
        rows = [pair for pair in changed if kind_of(pair, tuned) in ("embedding", "head")]
        able = embeddings != "lora" and any(not tuned.is_indirect(p.name) for p in rows)
        grown = any(pair.grown for pair in rows)
        raise UnsupportedError(
            f"no matrix is left to make factors of ({changed[0].name!r} differs): PEFT loads no "
            "adapter without a LoRA in it",
            hint="--embeddings lora makes factors of the embedding" if able and not grown else None,
        )
    return fate


def kind_of(pair: Pair, model: BaseModel) -> Kind:
    """What a tensor is, by name and shape."""
    shape = pair.tuned.shape
    if len(shape) < 2:
        return "vector"
    if pair.leaf != "weight":
        return "unknown"
    if model.is_head(pair.name):
        return "head"
    if len(shape) == 2:
        if model.is_embedding(pair.tuned.name):
            return "embedding"
        return "conv1d" if model.is_conv1d(pair.name) else "linear"
    grouped = shape[1] == 1 and shape[0] > 1
    small = max(shape[2:]) <= _LARGEST_KERNEL and "expert" not in pair.name
    return "conv" if len(shape) <= 5 and small and not grouped else "unknown"


def _has_place(pair: Pair, dialect: str) -> bool:
    """Whether adapters of a dialect reach the model of a pipeline that a tensor is in."""
    return dialect != "diffusers" or bool(diffusers.component(pair.name))


def _embedding(
    pair: Pair, kind: Kind, model: BaseModel, dialect: str, policy: str, fate: Fate
) -> None:
    """A changed embedding or head by policy; a tied one is both.

    One that PEFT has no LoRA for is saved whole instead.
    """
    if policy == "drop":
        fate.dropped.append(pair.name)
        return
    if dialect == "diffusers":
        raise UnsupportedError(
            "is an embedding, for which diffusers' LoRA files have no place",
            module=pair.module,
            hint="leave it out with --embeddings drop, or ship it as a textual inversion",
        )
    if kind == "embedding" and model.is_tokens(pair.tuned.name):
        reason = unknown_reader(pair.module, model)
        if reason:
            raise UnsupportedError(
                f"this embedding differs, and {reason}: an adapter would change a part of the "
                "model only",
                module=pair.module,
                hint="leave it out with --embeddings drop",
            )
    if policy == "lora" and not model.is_indirect(pair.name):
        if pair.grown:
            raise UnsupportedError(
                f"the vocabulary grew by {pair.grown} tokens, which no change of the old ones "
                "makes",
                module=pair.module,
                hint="--embeddings save stores embedding and head whole, --embeddings drop leaves "
                "them out",
            )
        fate.factors.append((pair, kind))
        return
    fate.modules.append(pair.module)
    if pair.grown:
        fate.resized = pair.tuned.shape[0]


def _refuse(unknown: Sequence[Pair]) -> None:
    if not unknown:
        return
    shown = ", ".join(
        f"{pair.name!r} of shape {' x '.join(map(str, pair.tuned.shape))}"
        for pair in unknown[:_SHOWN]
    )
    more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
    raise UnsupportedError(
        f"{shown}{more}: the change of these cannot be written as a LoRA of a linear layer, a "
        "convolution or an embedding",
        module=unknown[0].module,
        hint="leave them out with --modules, an expression for the modules to extract",
    )


def _vectors(
    pairs: Sequence[Pair],
    ranks: dict[str, int],
    dialect: str,
    policy: str,
    model: BaseModel,
    fate: Fate,
) -> None:
    """Norms and biases by policy: a norm is saved as a module, a layer's bias by itself."""
    if not pairs:
        return
    first = f"{pairs[0].name!r}" + (f" and {len(pairs) - 1} more" if len(pairs) > 1 else "")
    if policy == "drop":
        fate.dropped.extend(pair.name for pair in pairs)
        return
    if policy == "error":
        raise IncompatibleError(
            f"{first} differ: norms and biases are no matrices",
            hint="--vectors save stores them whole, --vectors drop leaves them out",
        )
    odd = [pair for pair in pairs if pair.leaf not in ("weight", "bias")]
    if dialect != "peft" or odd:
        what = f"{odd[0].name!r}, no norm and no bias" if odd else f"{first} (norms and biases)"
        place = "PEFT saves only these" if odd else f"{dialect} adapters have no place for them"
        raise UnsupportedError(
            f"{what}: {place}", hint="leave them out with --vectors drop; the report names them"
        )
    for pair in pairs:
        own = pair.leaf == "bias" and ranks.get(f"{pair.module}.weight", 1) > 1
        if not own and _is_container(pair, model):
            raise UnsupportedError(
                f"{pair.name!r} is a parameter of a module that has others in it, which PEFT "
                "cannot save",
                module=pair.module,
                hint="leave vectors out with --vectors drop, or this one with --modules",
            )
        if own:
            fate.biases.append(pair)
        elif pair.module not in fate.modules:
            fate.modules.append(pair.module)


def _is_container(pair: Pair, model: BaseModel) -> bool:
    """Whether the module of a parameter has modules with parameters of their own in it."""
    inside = f"{pair.tuned.name.rpartition('.')[0]}."
    owners = {name.rpartition(".")[0] for name in model.tensors}
    return any(owner.startswith(inside) for owner in owners)
