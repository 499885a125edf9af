"""What one job computes: pure functions from module plans to bytes and figures.

A job holds modules of one shape and column structure: one on the CPU, many on CUDA. Where CUDA
memory runs out the job is done on the CPU instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapterops import casts, linalg, streamed
from adapterops.arrays import Array, host, is_out_of_device_memory, namespace
from adapterops.certificate import Figures
from adapterops.errors import NumericsError
from adapterops.formats.model import Read, Ref
from adapterops.linalg import Core, Spectrum, Truncation
from adapterops.plan import Module
from adapterops.streamed import Sum


@dataclass(frozen=True, slots=True)
class Piece:
    """One module's finished tensors as bytes, and what was lost in making them."""

    stem: str
    B: memoryview
    A: memoryview
    bias: memoryview | None
    figures: Figures


def peak(modules: Sequence[Module], rank: int) -> int:
    """Bytes that `factors` needs at most for these modules; `spectra` is asked with rank 0."""
    module = modules[0]
    columns, perimeter = module.columns, sum(module.shape)
    if rank and streamed.applies(module, rank):
        return streamed.peak(module, rank)
    if not rank and columns > streamed.LARGE:
        return streamed.peak(module, rank) + 8 * 3 * math.prod(module.shape)
    shared = sum(part.site.parts["B"].nbytes for part in module.parts) if module.expert else 0
    work = 8 * (perimeter * (3 * columns + 6 * rank) + 8 * columns * columns)
    return len(modules) * work + shared


def spectra(modules: Sequence[Module], device: str) -> list[Spectrum]:
    """Singular values and numerical rank of each module's exact sum."""
    try:
        if modules[0].columns > streamed.LARGE:
            return [streamed.spectrum(Sum(module, device)) for module in modules]
        B, A, cores = _stacked(modules, device)
        return [linalg.spectrum(B[i], A[i], core) for i, core in enumerate(cores)]
    except RuntimeError as error:
        if device == "cpu" or not is_out_of_device_memory(error):
            raise
    return [one for module in modules for one in spectra([module], "cpu")]


def factors(modules: Sequence[Module], rank: int, dtype: str, device: str) -> list[Piece]:
    """Each module's sum at `rank`, rounded once to `dtype`, with its exact error."""
    try:
        if streamed.applies(modules[0], rank):
            return [_streamed(Sum(module, device), rank, dtype) for module in modules]
        B, A, cores = _stacked(modules, device)
        results = linalg.truncate(B, A, rank, cores)
        return [
            _piece(module, B[i], A[i], cores[i], result, dtype)
            for i, (module, result) in enumerate(zip(modules, results, strict=True))
        ]
    except RuntimeError as error:
        if device == "cpu" or not is_out_of_device_memory(error):
            raise
    return [piece for module in modules for piece in factors([module], rank, dtype, "cpu")]


def measures(modules: Sequence[Module]) -> list[tuple[str, Figures]]:
    """Figures of modules with a single factor pair that is copied bit for bit."""
    read = once(Ref.raw)
    return [(module.stem, _measure(module, read)) for module in modules]


def _measure(module: Module, read: Read) -> Figures:
    part = module.parts[0]
    B, A = part.site.factors("cpu", read)
    part.site.bias()  # raises where it is not finite
    scaled = A * part.coefficient
    size, bound = linalg.norm(B, scaled), linalg.cores(B[None], scaled[None])[0].beta
    return Figures(
        norm=size,
        beta=bound,
        floor=linalg.rank_floor(*module.shape, bound),
        truncation=0.0,
        storage=0.0,
        total=0.0,
        input_norms=(size,),
        inner=(size * size,),
        subnormal=0,
        route="copy",
    )


def _stacked(modules: Sequence[Module], device: str) -> tuple[Array, Array, list[Core]]:
    """All columns of each module, coefficients folded into A, (k, m, R) and (k, R, n); cores."""
    read = once(Ref.raw)
    pairs = [_columns(module, device, read) for module in modules]
    if len(pairs) == 1:
        B, A = pairs[0][0][None], pairs[0][1][None]
    else:
        xp = namespace(pairs[0][0])
        B, A = xp.stack([b for b, _ in pairs]), xp.stack([a for _, a in pairs])
    cores = linalg.cores(B, A)
    for module, core in zip(modules, cores, strict=True):
        _check_finite(module, core)
    return B, A, cores


def once(read: Read) -> Read:
    """`read` that keeps what it has read: experts of one job share their tensors."""
    kept: dict[tuple[int, int], np.ndarray[Any, Any]] = {}

    def cached(ref: Ref) -> np.ndarray[Any, Any]:
        if ref.every[1] == 1:
            return read(ref)
        key = (id(ref.source), ref.offset)
        if key not in kept:
            kept[key] = read(ref)
        return kept[key]

    return cached


def _columns(module: Module, device: str, read: Read) -> tuple[Array, Array]:
    if device == "cpu":
        B = np.empty((module.shape[0], module.columns))
        A = np.empty((module.columns, module.shape[1]))
        for part, rows in zip(module.parts, _slices(module), strict=True):
            part.site.factors_into(B[:, rows], A[rows], read)
            A[rows] *= part.coefficient
        return B, A
    pairs = [part.site.factors(device, read) for part in module.parts]
    xp = namespace(pairs[0][0])
    scaled = [A * part.coefficient for (_, A), part in zip(pairs, module.parts, strict=True)]
    return xp.concat([B for B, _ in pairs], -1), xp.concat(scaled, 0)


def _check_finite(module: Module, core: Core) -> None:
    """A NaN or infinity anywhere shows in β; who is to blame is found only then."""
    if math.isfinite(core.beta) and math.isfinite(core.norm):
        return
    for part in module.parts:
        part.site.factors()
    raise NumericsError("its factors are too large for float64 products", module=module.stem)


def _piece(module: Module, B: Array, A: Array, core: Core, result: Truncation, dtype: str) -> Piece:
    """Store the truncated factors W′ = B′·A′ and measure what the rounding E_B, E_A did.

    W̃ − W′ = E_B·A′ + B′·E_A + E_B·E_A; its norm and inner products are sums of small products, of
    which only those with E need the long factors. W′ spans singular directions of ΔW, so of W̃ − W′
    only E_B·E_A meets the part cut off.
    """
    stored = _Stored.of(module, result, dtype)
    down, up = core.scale[:, None], 1 / core.scale[:, None]
    with_b = host(B.mT @ stored.error_b) * down  # (R, k), columns scaled as in the core
    with_a = host(A @ stored.error_a.mT) * up
    if result.right is not None and result.left is not None:
        new_b, new_a = result.right.T @ core.gram_b, result.left @ core.gram_a
        own_b, own_a = new_b @ result.right, new_a @ result.left.T
        cross_b, cross_a = result.right.T @ with_b, result.left @ with_a
    else:
        new_b, new_a = host(result.B.mT @ B) * down.T, host(result.A @ A.mT) * up.T
        own_b, own_a = host(result.B.mT @ result.B), host(result.A @ result.A.mT)
        cross_b = host(result.B.mT @ stored.error_b)
        cross_a = host(result.A @ stored.error_a.mT)
    error_b = host(stored.error_b.mT @ stored.error_b)
    error_a = host(stored.error_a @ stored.error_a.mT)
    straight = np.sum(error_b * own_a) + np.sum(own_b * error_a) + np.sum(error_b * error_a)
    mixed = np.sum(cross_b.T * cross_a) + np.sum(error_b * cross_a) + np.sum(cross_b * error_a)
    squared = float(straight + 2 * mixed)
    if squared >= linalg.GRAM_NORM**2 * float(straight):
        storage = math.sqrt(max(squared, 0.0))
    else:
        storage = linalg.norm(*stored.change(result))
    cut = float(np.sum(with_b * with_a) - np.sum(cross_b * cross_a)) if result.tail else 0.0
    inner = np.sum((new_b + with_b.T) * (new_a + with_a.T), axis=0)
    return stored.piece(
        module,
        result,
        storage,
        cut,
        _input_norms(module, B, A, core),
        tuple(float(inner[rows].sum()) for rows in _slices(module)),
    )


def _streamed(total: Sum, rank: int, dtype: str) -> Piece:
    result = streamed.truncate(total, rank)
    stored = _Stored.of(total.module, result, dtype)
    change_b, change_a = stored.change(result)
    cross = streamed.inner_with_sum(total, change_b, change_a) - _inner(
        result.B, result.A, change_b, change_a
    )
    return stored.piece(
        total.module,
        result,
        linalg.norm(change_b, change_a),
        cross,
        total.part_norms,
        streamed.inner(total, stored.B, stored.A),
    )


@dataclass(frozen=True, slots=True)
class _Stored:
    """Factors as the file holds them (float64 values of the narrow type) and what rounding did."""

    dtype: str
    bytes_b: memoryview
    bytes_a: memoryview
    B: Array
    A: Array
    error_b: Array
    error_a: Array
    subnormal: int

    @classmethod
    def of(cls, module: Module, result: Truncation, dtype: str) -> _Stored:
        casts.check_range(result.B, dtype, module.stem)
        casts.check_range(result.A, dtype, module.stem)
        stored_b, stored_a = casts.store(result.B, dtype), casts.store(result.A, dtype)
        B, A = casts.widen(stored_b, dtype), casts.widen(stored_a, dtype)
        return cls(
            dtype,
            casts.stored_bytes(stored_b),
            casts.stored_bytes(stored_a),
            B,
            A,
            B - result.B,
            A - result.A,
            casts.count_subnormal(result.B, stored_b, dtype)
            + casts.count_subnormal(result.A, stored_a, dtype),
        )

    def change(self, result: Truncation) -> tuple[Array, Array]:
        """Factors of W̃ − W′ = E_B·A′ + B̃·E_A: no cancellation, unlike ‖W̃‖² − ‖W′‖²."""
        xp = namespace(self.B)
        return xp.concat([self.error_b, self.B], -1), xp.concat([result.A, self.error_a], 0)

    def piece(
        self,
        module: Module,
        result: Truncation,
        storage: float,
        cross: float,
        input_norms: tuple[float, ...],
        inner: tuple[float, ...],
    ) -> Piece:
        """The finished module; `storage` is ‖W̃ − W′‖, `cross` is ⟨ΔW − W′, W̃ − W′⟩."""
        squared = result.tail**2 + storage**2 - 2 * cross
        figures = Figures(
            norm=result.norm,
            beta=result.beta,
            floor=linalg.rank_floor(*module.shape, result.beta),
            truncation=result.tail,
            storage=storage,
            total=math.sqrt(max(squared, 0.0)) if result.tail else storage,
            input_norms=input_norms,
            inner=inner,
            subnormal=self.subnormal,
            route=result.route,
        )
        return Piece(module.stem, self.bytes_b, self.bytes_a, _bias(module, self.dtype), figures)


def _inner(B: Array, A: Array, other_b: Array, other_a: Array) -> float:
    """⟨B·A, B′·A′⟩ = Σ (BᵀB′ ∘ AA′ᵀ)."""
    return float(((B.mT @ other_b) * (A @ other_a.mT)).sum())


def _slices(module: Module) -> list[slice]:
    ends = np.cumsum([part.site.rank for part in module.parts]).tolist()
    return [slice(end - part.site.rank, end) for end, part in zip(ends, module.parts, strict=True)]


def _input_norms(module: Module, B: Array, A: Array, core: Core) -> tuple[float, ...]:
    """‖wᵢDᵢ‖ of each part, from the diagonal blocks of the Gram matrices where they can see it."""
    norms = []
    for rows in _slices(module):
        gram_b, gram_a = core.gram_b[rows, rows], core.gram_a[rows, rows]
        size = math.sqrt(max(float(np.sum(gram_b * gram_a)), 0.0))
        bound = float(np.sqrt(np.diagonal(gram_b) * np.diagonal(gram_a)).sum())
        seen = size >= linalg.GRAM_NORM * bound
        norms.append(size if seen else linalg.norm(B[:, rows], A[rows]))
    return tuple(norms)


def _bias(module: Module, dtype: str) -> memoryview | None:
    """Σ cᵢ·bᵢ of the parts that shift the bias (PEFT's lora_bias), None if none does."""
    if not any("bias" in part.site.parts for part in module.parts):
        return None
    bias = np.sum([part.coefficient * part.site.bias() for part in module.parts], axis=0)
    casts.check_range(bias, dtype, module.stem)
    return casts.stored_bytes(casts.store(bias, dtype))
