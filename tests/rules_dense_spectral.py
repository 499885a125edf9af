"""Gram and spectral methods on dense matrices, from the papers' formulas, and adapters to try."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adapterops.factors import Factors

Array = np.ndarray


def orthonormal(rng: np.random.Generator, m: int, k: int) -> Array:
    return np.linalg.qr(rng.standard_normal((m, k)))[0]


def adapter(seed: int, m: int, n: int, values: Sequence[float]) -> Factors:
    """An adapter of these singular values, in a random gauge."""
    rng = np.random.default_rng(seed)
    U, V = (orthonormal(rng, size, len(values)) for size in (m, n))
    return regauged(Factors(U * np.asarray(values, dtype=float), V.T), seed + 1000)


def regauged(factors: Factors, seed: int) -> Factors:
    """The same adapter as (BG, G⁻¹A), G of condition about 30."""
    rng = np.random.default_rng(seed)
    left, right = (orthonormal(rng, factors.rank, factors.rank) for _ in range(2))
    G = (left * np.logspace(0, 1.5, factors.rank)) @ right.T
    return Factors(factors.B @ G, np.linalg.solve(G, factors.A))


def saved(factors: Factors) -> tuple[Factors, float]:
    """The adapter as fp16 keeps it, and how far off that is."""
    again = Factors(*(x.astype(np.float16).astype(float) for x in (factors.B, factors.A)))
    return again, float(np.linalg.norm(again.dense() - factors.dense()))


def frame(members: Sequence[Factors]) -> tuple[Array, Array, Array]:
    """Q_B, Q_A and the cores (T, R, R'): plain QR of the stacks, so they depend on the gauge."""
    left = np.linalg.qr(np.concatenate([one.B for one in members], axis=1))[0]
    right = np.linalg.qr(np.concatenate([one.A.T for one in members], axis=1))[0]
    return left, right, np.stack([(left.T @ one.B) @ (one.A @ right) for one in members])


def gram(deltas: Sequence[Array]) -> Array:
    return np.array([[float((a * b).sum()) for b in deltas] for a in deltas])


def leading(delta: Array, k: int) -> tuple[Array, Array, Array]:
    U, values, Vh = np.linalg.svd(delta, full_matrices=False)
    return U[:, :k], values[:k], Vh[:k].T


def polar(columns: Array) -> Array:
    """S(SᵀS)^{+½}: from eigenvalues, not from the SVD of S."""
    values, vectors = np.linalg.eigh(columns.T @ columns)
    root = np.where(values > 1e-9, 1 / np.sqrt(np.maximum(values, 1e-300)), 0.0)
    return columns @ (vectors * root) @ vectors.T


def mean_norm(deltas: Sequence[Array], w: Array) -> float:
    own = [i for i in range(len(w)) if w[i] and np.abs(deltas[i]).max()]
    total = sum(abs(w[i]) for i in own)
    return float(sum(abs(w[i]) * np.linalg.norm(deltas[i]) for i in own) / total)


def tsv(deltas: Sequence[Array], w: Array, ranks: Sequence[int]) -> Array:
    """Gargiulo et al. 2025, section 4.2."""
    parts = [leading(c * D, k) for c, D, k in zip(w, deltas, ranks, strict=True)]
    U, values, V = (np.concatenate([part[j] for part in parts], axis=-1) for j in range(3))
    return polar(U) @ np.diag(values) @ polar(V).T


def iso_c(deltas: Sequence[Array], w: Array, rank: int, scale: str) -> Array:
    """Marczak et al. 2025, section 4.1."""
    U, values, V = leading(sum(c * D for c, D in zip(w, deltas, strict=True)), rank)
    flat = U @ V.T
    if scale == "mean":
        return values.mean() * flat
    return mean_norm(deltas, w) / np.linalg.norm(flat) * flat


def iso_cts(deltas: Sequence[Array], w: Array, common: int, each: int, scale: str) -> Array:
    """Marczak et al. 2025, section 4.2, algorithm 1."""
    total = sum(c * D for c, D in zip(w, deltas, strict=True))
    parts = [leading(total, common)]
    outside = np.eye(len(total)) - parts[0][0] @ parts[0][0].T
    parts += [leading(outside @ (c * D), each) for c, D in zip(w, deltas, strict=True)]
    U, values, V = (np.concatenate([part[j] for part in parts], axis=-1) for j in range(3))
    flat = polar(U) @ polar(V).T
    if scale == "mean":
        return values.mean() * flat
    return mean_norm(deltas, w) / np.linalg.norm(flat) * flat


def hooi(deltas: Sequence[Array], rank: int, beta: float, steps: int = 400) -> tuple[Array, Array]:
    """Bases of the Tucker-2 decomposition of He et al. 2026, by SVD of the dense unfoldings."""
    sizes = np.array([np.linalg.norm(D) for D in deltas])
    X = [
        D / size * (beta * size + (1 - beta) * sizes.mean())
        for D, size in zip(deltas, sizes, strict=True)
    ]
    V = leading(np.concatenate([x.T for x in X], axis=1), rank)[0]
    for _ in range(steps):
        U = leading(np.concatenate([x @ V for x in X], axis=1), rank)[0]
        V = leading(np.concatenate([x.T @ U for x in X], axis=1), rank)[0]
    return U, V


def project(deltas: Sequence[Array], k: int, side: str, share: float) -> Array:
    """Chen et al. 2025: the first delta in the span of the others' leading k directions."""
    parts = [leading(D, k) for D in deltas[1:]]
    left, right = (np.concatenate([part[j] for part in parts], axis=1) for j in (0, 2))
    result = share * deltas[0]
    if side in ("left", "both"):
        result = left @ np.linalg.lstsq(left, result, rcond=None)[0]
    if side in ("right", "both"):
        result = (right @ np.linalg.lstsq(right, result.T, rcond=None)[0]).T
    return result


def pico(deltas: Sequence[Array], ranks: Sequence[int]) -> list[Array]:
    """Tang & Yang 2026, section 4, on the balanced factors."""
    parts = [leading(D, k) for D, k in zip(deltas, ranks, strict=True)]
    U, values, _ = np.linalg.svd(
        np.concatenate([U * np.sqrt(values) for U, values, _ in parts], axis=1), full_matrices=False
    )
    share = values**2 / (values**2).sum()
    damping = 1 / (1 + (len(deltas) - 1) * share)
    return [D + U @ np.diag(damping - 1) @ U.T @ D for D in deltas]


def svc(merged: Array, deltas: Sequence[Array], w: Array, rank: int, alpha: float) -> Array:
    """Li et al. 2026, section 4, direction by direction."""
    U, values, V = leading(merged, rank)
    result = np.zeros_like(merged)
    for r in range(rank):
        answer = U[:, r] @ merged
        votes = []
        for c, D in zip(w, deltas, strict=True):
            own = U[:, r] @ (c * D)
            votes.append(max(alpha, float(answer @ own / (own @ own))))
        result += values[r] * len(votes) / sum(votes) * np.outer(U[:, r], V[:, r])
    return result


def log_map(x: Array, u: Array) -> Array:
    """The tangent at the unit vector x towards the unit vector u."""
    across = u - (x @ u) * x
    size = np.linalg.norm(across)
    return np.zeros_like(x) if size == 0 else np.arctan2(size, x @ u) * across / size
