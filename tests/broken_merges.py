"""Merges as other tools do them, restated in a few lines of torch, and ways to get them wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapterops.changes.targets import Target, Term
from adapterops.files.source import MemoryFile
from adapterops.formats.model import Ref, Site
from adapterops.judging.measure import Pair

NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass(frozen=True)
class Adapter:
    """B (m, r) and A (r, n) in their stored type, alpha and r in `scale`."""

    B: torch.Tensor
    A: torch.Tensor
    scale: float


def weight(dtype: torch.dtype, m: int = 256, n: int = 512, seed: int = 0) -> torch.Tensor:
    """A layer's weight as models have it."""
    generator = torch.Generator().manual_seed(seed)
    return (0.02 * torch.randn(m, n, generator=generator)).to(dtype)


def adapter(
    dtype: torch.dtype,
    m: int = 256,
    n: int = 512,
    scale: float = 2.0,
    size: float = 5e-3,
    rank: int = 8,
    seed: int = 1,
) -> Adapter:
    """An adapter whose change has `size` times the norm of `weight`."""
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(m, rank, generator=generator)
    A = torch.randn(rank, n, generator=generator) * n**-0.5
    B *= size * 0.02 * (m * n) ** 0.5 / ((B @ A).norm() * scale)
    return Adapter(B.to(dtype), A.to(dtype), scale)


def ref(x: torch.Tensor, name: str = "w") -> Ref:
    """A tensor as if it were in a file."""
    raw = bytes(x.contiguous().view(-1).view(torch.uint8).numpy())
    return Ref(
        MemoryFile(f"{name}.safetensors", raw), name, NAMES[x.dtype], tuple(x.shape), 0, len(raw)
    )


def site(B: Ref, A: Ref, scale: float, stem: str = "layer") -> Site:
    """A plain LoRA's module."""
    rank = B.shape[1]
    return Site(
        stem=stem,
        dialect="peft",
        kind="lora",
        layer="linear",
        shape=(B.shape[0], A.shape[1]),
        kernel=(),
        rank=rank,
        dim=rank,
        parts={"B": B, "A": A},
        scale=scale,
        scale_from="the config",
        alpha=scale * rank,
    )


def pair(
    W: torch.Tensor,
    after: torch.Tensor,
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    first: int = 0,
) -> Pair:
    """W and its merge; the adapters change the rows from `first` on."""
    terms = tuple(
        Term(
            index,
            w * x.scale,
            site(ref(x.B, f"B{index}"), ref(x.A, f"A{index}"), x.scale),
            slice(first, first + len(x.B), 1),
            slice(0, W.shape[1], 1),
        )
        for index, (x, w) in enumerate(zip(adapters, weights or [1.0] * len(adapters), strict=True))
    )
    target = Target("model.layers.0.q_proj.weight", ref(W), tuple(W.shape), terms)
    return Pair(target, ref(after, "merged"))


def exact(W: torch.Tensor, adapters: Sequence[Adapter], scale: float = 1.0) -> torch.Tensor:
    """W + D in float64."""
    total = W.double()
    for x in adapters:
        total = total + scale * x.scale * (x.B.double() @ x.A.double())
    return total


def nearest(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 rounded to `dtype` once."""
    from adapterops.casts import store

    return store(x, NAMES[dtype])


def peft(W: torch.Tensor, adapters: Sequence[Adapter]) -> torch.Tensor:
    """merge_and_unload of each: the change in the adapter's type, added in place."""
    W = W.clone()
    for x in adapters:
        W += (x.B.float() @ x.A.float() * x.scale).to(x.B.dtype)
    return W


def peft_safe(W: torch.Tensor, adapters: Sequence[Adapter]) -> torch.Tensor:
    """safe_merge: the change is cast to the weight's type, then added."""
    W = W.clone()
    for x in adapters:
        delta = (x.B.float() @ x.A.float() * x.scale).to(x.B.dtype)
        W = W + delta.to(W.dtype)
    return W


def half_factors(W: torch.Tensor, adapters: Sequence[Adapter]) -> torch.Tensor:
    """Product and scale in 16 bits, each rounded."""
    narrow = next((t for t in (W.dtype, adapters[0].B.dtype) if t != torch.float32), torch.bfloat16)
    W = W.clone()
    for x in adapters:
        W = W + ((x.B.to(narrow) @ x.A.to(narrow)) * x.scale).to(W.dtype)
    return W


def axolotl(W: torch.Tensor, adapters: Sequence[Adapter]) -> torch.Tensor:
    """All in float32, cast back."""
    total = W.float()
    for x in adapters:
        total = total + x.scale * (x.B.float() @ x.A.float())
    return total.to(W.dtype)


def unsloth(W: torch.Tensor, adapters: Sequence[Adapter]) -> torch.Tensor:
    """addmm into a float32 copy."""
    total = W.float()
    for x in adapters:
        total = total.addmm(x.B.float(), x.A.float(), alpha=x.scale)
    return total.to(W.dtype)


def cast_factors(W: torch.Tensor, adapters: Sequence[Adapter]) -> torch.Tensor:
    """Factors cast to the base's type, the rest in float32."""
    cast = [Adapter(x.B.to(W.dtype), x.A.to(W.dtype), x.scale) for x in adapters]
    return axolotl(W, cast)


def numpy_double(W: torch.Tensor, adapters: Sequence[Adapter]) -> torch.Tensor:
    """float64 throughout, rounded once."""
    return nearest(exact(W, adapters), W.dtype)


def tf32(W: torch.Tensor, adapters: Sequence[Adapter]) -> torch.Tensor:
    """Factors rounded to ten bits of mantissa, as tensor cores read float32."""

    def cut(x: torch.Tensor) -> torch.Tensor:
        bits = x.float().view(torch.int32)
        return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)

    total = W.float()
    for x in adapters:
        total = total + x.scale * (cut(x.B) @ cut(x.A))
    return total.to(W.dtype)


TOOLS = {
    "peft": peft,
    "peft-safe": peft_safe,
    "half": half_factors,
    "axolotl": axolotl,
    "unsloth": unsloth,
    "cast": cast_factors,
    "numpy": numpy_double,
    "tf32": tf32,
}
