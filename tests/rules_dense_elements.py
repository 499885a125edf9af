"""Elementwise merge methods in dense float64, from the papers' formulas, an entry at a time.

D is (T, m, n), w (T,), bits (T, m, n) the random numbers 0 … 65535 of every entry. Nothing here is
fast, and nothing of it is shared with the package.
"""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray
LEVELS = 65536


def largest(D: Array, k: int) -> Array:
    """Of each matrix the entries that are not below its k-th largest size."""
    kept = np.zeros(D.shape, bool)
    for t, each in enumerate(np.abs(D)):
        if k:
            kept[t] = each >= sorted(each.ravel().tolist(), reverse=True)[k - 1]
    return kept


def rounded(fraction: float, total: int) -> int:
    return max(1, round(fraction * total))


def disjoint(
    z: Array, w: Array, normalize: bool, frequency: bool = False, count: bool = False
) -> Array:
    """TIES, sign election and disjoint merge, with weights."""
    result = np.zeros(z.shape[1:])
    for at in np.ndindex(*result.shape):
        terms = [(weight * each[at], abs(weight)) for weight, each in zip(w, z, strict=True)]
        terms = [(value, size) for value, size in terms if value != 0]
        mass = math.fsum(size * math.copysign(1, v) if frequency else v for v, size in terms)
        all_mass = math.fsum(size if frequency else abs(v) for v, size in terms)
        if abs(mass) <= 2.0**-20 * all_mass:
            continue
        agreeing = [(v, size) for v, size in terms if v * mass > 0]
        result[at] = math.fsum(v for v, _ in agreeing)
        if normalize:
            result[at] /= len(agreeing) if count else math.fsum(size for _, size in agreeing)
    return result


def total(z: Array, w: Array, normalize: bool) -> Array:
    result = np.einsum("t,tmn->mn", w, z)
    return result / np.abs(w).sum() if normalize else result


def magnitude_prune(D: Array, w: Array, bits: Array, density: float = 0.5) -> Array:
    return total(D * largest(D, rounded(density, D[0].size)), w, False)


def ties(
    D: Array,
    w: Array,
    bits: Array,
    density: float = 0.2,
    normalize: bool = True,
    majority_sign_method: str = "total",
) -> Array:
    z = D * largest(D, rounded(density, D[0].size))
    return disjoint(z, w, normalize, majority_sign_method == "frequency")


def crumbs(D: Array, density: float, gamma: float) -> Array:
    N = D[0].size
    keep = rounded(density, N)
    top = min(round(gamma * N), N - keep)
    return D * (largest(D, top + keep) & ~largest(D, top))


def breadcrumbs(
    D: Array,
    w: Array,
    bits: Array,
    density: float = 0.9,
    gamma: float = 0.01,
    normalize: bool = False,
) -> Array:
    return total(crumbs(D, density, gamma), w, normalize)


def breadcrumbs_ties(
    D: Array,
    w: Array,
    bits: Array,
    density: float = 0.9,
    gamma: float = 0.01,
    normalize: bool = False,
) -> Array:
    return disjoint(crumbs(D, density, gamma), w, normalize)


def drop(D: Array, bits: Array, density: float, rescale: bool = True) -> Array:
    level = max(1, round(density * LEVELS))
    return D * (bits < level) / (level / LEVELS if rescale else 1)


def dare(
    D: Array,
    w: Array,
    bits: Array,
    density: float = 0.5,
    rescale: bool = True,
    normalize: bool = False,
) -> Array:
    return total(drop(D, bits, density, rescale), w, normalize)


def dare_ties(
    D: Array,
    w: Array,
    bits: Array,
    density: float = 0.5,
    rescale: bool = True,
    normalize: bool = False,
    majority_sign_method: str = "total",
) -> Array:
    z = drop(D, bits, density, rescale)
    return disjoint(z, w, normalize, majority_sign_method == "frequency")


def magprune(D: Array, bits: Array, density: float, epsilon: float, rescale: bool) -> Array:
    """DELLA, MAGPRUNE: keep probabilities by rank in the row, from d − ε to d + ε."""
    if density == 1:
        return D
    T, m, n = D.shape
    z = np.zeros(D.shape)
    for t in range(T):
        for i in range(m):
            order = sorted(range(n), key=lambda j: (abs(D[t, i, j]), j))
            for rank, j in enumerate(order):
                p = density - epsilon + 2 * epsilon * rank / (n - 1) if n > 1 else density
                level = min(LEVELS, max(1, round(p * LEVELS)))
                if bits[t, i, j] < level:
                    z[t, i, j] = D[t, i, j] / (level / LEVELS if rescale else 1)
    return z


def della(
    D: Array,
    w: Array,
    bits: Array,
    density: float = 0.5,
    epsilon: float = 0.15,
    rescale: bool = True,
    normalize: bool = True,
) -> Array:
    return disjoint(magprune(D, bits, density, epsilon, rescale), w, normalize)


def della_linear(
    D: Array,
    w: Array,
    bits: Array,
    density: float = 0.5,
    epsilon: float = 0.15,
    rescale: bool = True,
    normalize: bool = False,
) -> Array:
    return total(magprune(D, bits, density, epsilon, rescale), w, normalize)


def sce(D: Array, w: Array, bits: Array, select_topk: float = 1.0) -> Array:
    """Select by variance, calculate η from energies, erase the minority sign."""
    turned = D * np.sign(w)[:, None, None]
    shares = np.abs(w) / np.abs(w).sum()
    mean = np.einsum("t,tmn->mn", shares, turned)
    variance = np.einsum("t,tmn->mn", shares, (turned - mean) ** 2)
    z = turned * largest(variance[None], rounded(select_topk, variance.size))
    eta = np.abs(w) * (z**2).sum((1, 2))
    elected = np.sign(np.einsum("t,tmn->mn", np.abs(w), z))
    agree = (np.sign(z) == elected) & (z != 0)
    weight = np.einsum("t,tmn->mn", eta, agree)
    summed = np.einsum("t,tmn->mn", eta, z * agree)
    return np.divide(summed, weight, out=np.zeros_like(summed), where=weight > 0)
