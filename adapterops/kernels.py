"""What one job computes: pure functions from module plans to bytes and figures.

A job holds modules of one shape and column structure: one on the CPU, many on CUDA. Where CUDA
memory runs out the job is done on the CPU instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from adapterops import linalg, metric, rangefinder
from adapterops.arrays import Array, host, is_out_of_device_memory, namespace, put
from adapterops.certificate import Figures
from adapterops.errors import NumericsError
from adapterops.formats.model import Read, Ref
from adapterops.linalg import Core, Form, Spectrum, Truncation
from adapterops.origins import with_origins
from adapterops.plan import Module
from adapterops.rangefinder import Sum
from adapterops.storing import Piece, Stored, stored_bias


def peak(modules: Sequence[Module], cap: int | None = None) -> int:
    """Bytes that `factors` needs at most for these modules; `spectra` if `cap` is not None."""
    module = modules[0]
    columns, perimeter = module.columns, sum(module.shape)
    rank = module.kept if cap is None else 0
    made = sum(part.site.made.peak for part in module.parts if part.site.made)
    if _is_streamed(module, None if cap is not None else rank):
        dense = (
            0 if rangefinder.is_dense(module) or cap is None else 8 * 3 * math.prod(module.shape)
        )
        return rangefinder.peak(module, cap or rank) + dense + made
    files = [site.parts for _, site in module.origins]
    shared = sum(parts["B"].nbytes for parts in files if "B" in parts) if module.expert else 0
    if any("base" in part.site.parts for part in module.parts):  # its weight is decomposed whole
        shared += 8 * 4 * math.prod(module.shape)
    work = 8 * (perimeter * (3 * columns + 6 * rank) + 8 * columns * columns)
    return len(modules) * work + shared + made


def _is_streamed(module: Module, rank: int | None) -> bool:
    """Whether a module goes through the range finder: at a rank, or for its spectrum.

    What is measured by its inputs never does: it is stacked, and reduced to its own sides first.
    """
    if rangefinder.is_dense(module):
        return True
    if module.inputs is not None:
        return False
    return module.columns > rangefinder.LARGE and (
        rank is None or rangefinder.applies(module, rank)
    )


def spectra(modules: Sequence[Module], cap: int, device: str) -> list[tuple[str, Spectrum]]:
    """Singular values, in the metric, and numerical rank of each module's exact sum, by stem.

    Of a dense change only the first `cap` are computed, and the norm of the rest.
    """
    try:
        if _is_streamed(modules[0], None):
            found = [rangefinder.spectrum(Sum(module, device), cap) for module in modules]
        else:
            B, A, cores = _stacked(modules, device)
            found = [linalg.spectrum(B[i], A[i], core) for i, core in enumerate(cores)]
            for i, module in enumerate(modules):
                if module.inputs is not None and module.columns:
                    found[i] = metric.spectrum(B[i], A[i], module.inputs, found[i])
    except RuntimeError as error:
        if device == "cpu" or not is_out_of_device_memory(error):
            raise
        return [one for module in modules for one in spectra([module], cap, "cpu")]
    return [(m.stem, each.times(m.weight)) for each, m in zip(found, modules, strict=True)]


def factors(modules: Sequence[Module], dtype: str, form: Form, device: str) -> list[Piece]:
    """Each module's sum at its rank, rounded once to `dtype`, with its exact error."""
    first = modules[0]
    rank = min(first.kept, max(first.columns, *first.shape))  # beyond that all is zero
    scaled = [_without_scale(module) for module in modules]
    try:
        if _is_streamed(modules[0], rank):
            found = [_streamed(Sum(module, device), rank, dtype, form) for module in scaled]
        elif modules[0].inputs is not None and modules[0].columns:
            found = [_for_inputs(module, rank, dtype, form, device) for module in scaled]
        else:
            B, A, cores = _stacked(scaled, device)
            same = all(_is_stored_so(module, dtype) for module in scaled) and form == "balanced"
            results = linalg.truncate(B, A, rank, cores, form, untouched=same)
            found = [
                _piece(module, B[i], A[i], cores[i], result, dtype)
                for i, (module, result) in enumerate(zip(scaled, results, strict=True))
            ]
    except RuntimeError as error:
        if device == "cpu" or not is_out_of_device_memory(error):
            raise
        return [piece for module in modules for piece in factors([module], dtype, form, "cpu")]
    return [
        with_origins(module, piece.times(module.scale), rank, dtype).padded(module, rank)
        for piece, module in zip(found, modules, strict=True)
    ]


def _is_stored_so(module: Module, dtype: str) -> bool:
    """Whether the factors are, to the last bit, what one input holds in the output's type."""
    return [(part.coefficient, part.site.kind, part.site.dtype) for part in module.parts] == [
        (1.0, "lora", dtype)
    ]


def _without_scale(module: Module) -> Module:
    """The module whose factors are stored: what its loader multiplies by the scale."""
    if module.scale == 1.0:
        return module
    parts = (replace(p, coefficient=_near_one(p.coefficient / module.scale)) for p in module.parts)
    return replace(module, parts=tuple(parts), scale=1.0)


def _near_one(quotient: float) -> float:
    """1 where a scale that went through alpha and back is off by its last bits."""
    return 1.0 if abs(quotient - 1.0) <= 4 * linalg.EPSILON else quotient


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
    if not pairs:
        empty = np.zeros((module.shape[0], 0)), np.zeros((0, module.shape[1]))
        return put(empty[0], device), put(empty[1], device)
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
    stored = Stored.of(module, result, dtype)
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


def _streamed(total: Sum, rank: int, dtype: str, form: Form) -> Piece:
    result = rangefinder.truncate(total, rank)
    if form != "balanced":
        shaped = linalg.truncate(result.B[None], result.A[None], rank, form=form)[0]
        result = replace(result, B=shaped.B, A=shaped.A)
    stored = Stored.of(total.module, result, dtype)
    if total.is_dense:
        return _measured(total, result, stored)
    change_b, change_a = stored.change(result)
    cross = rangefinder.inner_with_sum(total, change_b, change_a) - _inner(
        result.B, result.A, change_b, change_a
    )
    return stored.piece(
        total.module,
        result,
        linalg.norm(change_b, change_a),
        cross,
        total.part_norms,
        rangefinder.inner(total, stored.B, stored.A),
    )


def _measured(total: Sum, result: Truncation, stored: Stored) -> Piece:
    """A dense change, its figures taken from its rows and the factors as they are stored."""
    module = total.module
    seen = rangefinder.measure(total, result, stored.B, stored.A)
    figures = Figures(
        norm=seen.norm,
        beta=result.beta,
        floor=linalg.rank_floor(*module.shape, result.beta),
        truncation=seen.cut,
        storage=linalg.norm(*stored.change(result)),
        total=seen.total,
        input_norms=seen.sizes,
        inner=seen.inner,
        subnormal=stored.subnormal,
        route=result.route,
        noise=seen.noise,
        changed=seen.changed,
    )
    return Piece(module.stem, stored.bytes_b, stored.bytes_a, None, figures)


def _for_inputs(module: Module, rank: int, dtype: str, form: Form, device: str) -> Piece:
    """One module truncated and measured by what its inputs make of it.

    The directions that go are no singular directions of ΔW, so every figure is the norm of its own
    difference.
    """
    stacked_b, stacked_a, cores = _stacked([module], device)
    B, A = stacked_b[0], stacked_a[0]
    inputs = module.inputs
    assert inputs is not None
    xp = namespace(B)
    near_b, near_a = (B, A) if module.columns <= rank else metric.truncate(B, A, rank, inputs)
    result = linalg.truncate(near_b[None], near_a[None], rank, form=form)[0]
    stored = Stored.of(module, result, dtype)
    lost_b, lost_a = xp.concat([stored.B, -B], -1), xp.concat([stored.A, A], 0)
    cut = linalg.norm(xp.concat([near_b, -B], -1), xp.concat([near_a, A], 0))
    core = cores[0]
    figures = Figures(
        norm=core.norm,
        beta=core.beta,
        floor=linalg.rank_floor(*module.shape, core.beta),
        truncation=cut if module.columns > rank else 0.0,
        storage=linalg.norm(*stored.change(result)),
        total=linalg.norm(lost_b, lost_a),
        input_norms=_input_norms(module, B, A, core),
        inner=tuple(_inner(stored.B, stored.A, B[:, rows], A[rows]) for rows in _slices(module)),
        subnormal=stored.subnormal,
        route="activation",
        metric=(metric.norm(B, A, inputs)[0], metric.norm(lost_b, lost_a, inputs)[0]),
    )
    bias = stored_bias(module, dtype)
    return Piece(module.stem, stored.bytes_b, stored.bytes_a, bias, figures)


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
