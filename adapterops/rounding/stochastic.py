"""Stochastic rounding of W + D: up with the probability of the distance to the lower neighbour.

With g the lower neighbour of T = W + D on the grid and u the gap to the upper one, the result is
the upper one exactly if T > g + x·u, x = (b + ½)/2¹⁶, b 16 random bits of that element alone. The
expected result is T to within 2⁻¹⁷ u; T on the grid stays. What is compared is the real number T,
by the steps of `exact`, so that the result does not depend on device, threads or block size.

Random bits are the raw output of Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3") from numpy on the host: key = the first 128 bits of the SHA-256 of seed and
tensor name, counter = element index // 16 in the stored matrix, 16 bits an element.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from adapterops.rounding.exact import Array, Change, Counts, different, round_exactly, sum_to_odd
from adapterops.rounding.grid import multiples, rounding_limit

_MOST_DOUBT = 0.05  # beyond this share of a block all of it is decided in float64
_SLACK = 2.0**-22  # of |T|: two roundings of T and two of what is added to it
_DOUBLE_SLACK = 2.0**-51
_LEAST = 2.0**-149  # so that both signs of a zero are seen
_TILE = 1 << 13  # elements decided at once on a CPU: what that takes stays in its cache
_PER_COUNTER = 16  # elements that the 256 bits of a counter serve


def round_stochastically(
    W: Tensor,
    change: Change,
    start: int,
    stop: int,
    *,
    seed: int,
    name: str,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Counts]:
    """Rows [start, stop) of W + D rounded at random to `dtype`, W's (stop − start, n) by default.

    `name` is the stored tensor's. Beyond the rounding limit of the type the result is infinite,
    between it and the largest finite value it is that. A zero has T's sign, W's if T = 0. A dense
    change is computed in float64. float64 results are rounded to nearest.
    """
    dtype = dtype or W.dtype
    if dtype == torch.float64:
        return round_exactly(W, change, start, stop, dtype=dtype)
    x = thresholds(seed, name, start * W.shape[1], W.numel())
    if not change.is_exact or W.dtype == torch.float64:
        base = W.cpu().double()
        total = base + change.double(start, stop)
        total = torch.where(total == 0, torch.copysign(total, base), total)
        return _chosen(total, x.view(W.shape), dtype).to(W.device), Counts(plain=W.numel())
    rounded = torch.empty_like(W, dtype=dtype)
    flat = np.arange(W.numel())
    if dtype != torch.float32:
        T = change.onto(W, start, stop)
        flat = _by_single(T, change.bounds(start, stop), x, rounded)
    exact = _settle(W, change, start, x, rounded, flat) if len(flat) else 0
    return rounded, Counts(W.numel() - len(flat), len(flat) - exact, exact)


def thresholds(seed: int, name: str, first: int, count: int) -> Tensor:
    """The x of `count` elements of a tensor from element `first` on, float64."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    counter, skipped = divmod(first, _PER_COUNTER)
    philox = np.random.Philox(
        key=int.from_bytes(digest[:16], "little"),
        counter=(counter - 1) % 2**256,  # numpy counts before it draws
    )
    words = philox.random_raw(4 * -(-(skipped + count) // _PER_COUNTER)).astype("<u8", copy=False)
    bits = words.view("<u2")[skipped : skipped + count]
    return torch.from_numpy((bits + 0.5) * 2.0**-16)


def _chosen(T: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The rule for T, float32 or float64, and x of one shape: exact, and monotone in T."""
    chosen = torch.empty(T.shape, dtype=dtype, device=T.device)
    size = _TILE if T.device.type == "cpu" else max(1, T.numel())
    tiles = (tensor.reshape(-1).split(size) for tensor in (T, x))
    for part, t, at in zip(chosen.view(-1).split(size), *tiles, strict=True):
        part.copy_(_chosen_tile(t.double(), at, dtype))
    return chosen


def _chosen_tile(T: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    lower, upper = multiples(T, dtype)
    boundary = torch.sub(upper, lower).mul_(x).add_(lower)
    largest = torch.finfo(dtype).max
    chosen = torch.where(boundary < T, upper, lower).clamp_(-largest, largest)
    beyond = T.abs() >= rounding_limit(dtype)
    if bool(beyond.any()):
        chosen = torch.where(beyond, torch.full_like(T, torch.inf).copysign_(T), chosen)
    return chosen


def _by_single(T: Tensor, bounds: tuple[Tensor, Tensor], x: Tensor, rounded: Tensor) -> Array:
    """Fill `rounded` with what float32 T chooses; flat indices of what it leaves in doubt."""
    x = x.to(T.device).view(T.shape)
    reach = torch.addr(T.abs(), *bounds, beta=_SLACK).clamp_(min=_LEAST)
    low = _chosen(T - reach, x, rounded.dtype)
    rounded.copy_(_chosen(T.add_(reach), x, rounded.dtype))
    doubt = different(low, rounded)
    return doubt if len(doubt) <= _MOST_DOUBT * T.numel() else np.arange(T.numel())


def _settle(W: Tensor, change: Change, start: int, x: Tensor, rounded: Tensor, flat: Array) -> int:
    """Decide elements in float64, and exactly where that is not enough; how many those are."""
    places = torch.from_numpy(flat)
    x = x[places]
    base = W.reshape(-1)[places.to(W.device)].cpu().double().numpy()
    rows, columns = np.divmod(flat, W.shape[1])
    if len(flat) == W.numel():
        sums = change.double(start, start + len(W)).view(-1).numpy()
    else:
        sums = np.empty(len(flat))
        for chunk, left, c, right in change.at(rows + start, columns):
            sums[chunk] = np.einsum("er,r,er->e", left, c, right, optimize=False)
    u, v = change.double_bounds(start, start + len(W))
    T = base + sums
    reach = np.maximum(np.abs(T) * _DOUBLE_SLACK + u[rows] * v[columns], _LEAST)
    low = _chosen(torch.from_numpy(T - reach), x, rounded.dtype)
    high = _chosen(torch.from_numpy(T + reach), x, rounded.dtype)
    rest = different(low, high)
    if len(rest):
        odd = np.empty(len(rest))
        for chunk, left, c, right in change.at(rows[rest] + start, columns[rest]):
            odd[chunk] = sum_to_odd(base[rest][chunk], left, c, right)
        odd = np.where(odd == 0, np.copysign(0.0, base[rest]), odd)
        settled = torch.from_numpy(rest)
        high[settled] = _chosen(torch.from_numpy(odd), x[settled], rounded.dtype)
    rounded.view(-1)[places.to(W.device)] = high.to(W.device)
    return len(rest)
