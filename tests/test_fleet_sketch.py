"""Sketches against theory and dense float64: mean, variance, nesting, linearity, other modules."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from adapterops.fleet.signing import sketch as sk

SHAPE = (40, 56)
DRAWS = 1500
PINNED = [
    [[-1, -1, 1, -1, 1, -1, -1, 1], [1, -1, -1, -1, 1, 1, -1, 1]],
    [[1, -1, -1, 1, 1, -1, 1, 1], [-1, 1, -1, 1, -1, -1, -1, -1]],
]


def drawn(seed: int, rank: int, shape: tuple[int, int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """B (m, r) and A (r, n)."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, shape[1]))


def sketches(D: np.ndarray, side: int, draws: int = DRAWS) -> np.ndarray:
    """(draws, p, p) independent sketches of one dense matrix."""
    eye = np.eye(D.shape[0])
    found = (sk.sides(draw, "drawn", D.shape, (side, side)) for draw in range(draws))
    return np.stack([sk.sketch(eye, D, P, Q) for P, Q in found])


def by_outputs(B: np.ndarray, A: np.ndarray, seed: int, stem: str = "m") -> np.ndarray:
    """The numbers of PᵀΔWΔWᵀP of one module."""
    P, _ = sk.sides(seed, stem, (len(B), A.shape[1]), (sk.COLUMNS, 1))
    return sk.output_numbers((P @ B)[None], (A @ A.T)[None])[0]


def test_signs_are_raw_philox_bits() -> None:
    P, Q = sk.sides(5, "a.b", (70, 9), (3, 2))
    for signs, role, length in ((P, "P", 70), (Q, "Q", 9)):
        key = hashlib.sha256(f"5\0a.b\x0070x9\0{role}".encode()).digest()[:16]
        words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(
            len(signs) * -(-length // 64)
        )
        wanted = [
            [
                1 - 2 * (1 - (int(words[-(-length // 64) * row + at // 64]) >> at % 64 & 1))
                for at in range(length)
            ]
            for row in range(len(signs))
        ]
        assert signs.dtype == np.int8
        assert signs.tolist() == wanted


def test_signs_do_not_change_between_versions() -> None:
    P, Q = sk.sides(0, "model.layers.0.self_attn.q_proj", (8, 8), (2, 2))
    assert [P.tolist(), Q.tolist()] == PINNED


def test_signs_depend_on_seed_stem_and_shape_and_nothing_else() -> None:
    first = sk.sides(1, "a", (64, 64), (4, 4))
    assert all(map(np.array_equal, first, sk.sides(1, "a", (64, 64), (4, 4))))
    for other in (
        sk.sides(2, "a", (64, 64), (4, 4)),
        sk.sides(1, "b", (64, 64), (4, 4)),
        sk.sides(1, "a", (64, 65), (4, 4)),
    ):
        assert not np.array_equal(first[0], other[0])
        assert not np.array_equal(first[1], other[1][:, :64])
    assert not np.array_equal(*first)


def test_remembered_signs_are_bounded() -> None:
    signs = sk._Signs(1000)
    made = {name: signs.get(name, 4, 64).copy() for name in "abcdef"}
    assert signs._size <= 1000 and len(signs._kept) == 3
    assert all(np.array_equal(signs.get(name, 4, 64), value) for name, value in made.items())
    assert signs.get("huge", 40, 64).nbytes > 1000
    assert list(signs._kept) == [("huge", 40)]


@pytest.mark.parametrize(("modules", "side"), [(1, 16), (24, 16), (25, 8), (96, 8), (224, 4)])
def test_the_side_keeps_to_the_size(modules: int, side: int) -> None:
    assert sk.side_of(modules) == side
    assert sk.side_of(10_000) == 2


def test_a_smaller_sketch_is_the_block_of_a_larger() -> None:
    B, A = drawn(0, 3)
    wide = sk.sketch(B, A, *sk.sides(3, "m", SHAPE, (16, 16)))
    for side in (2, 4, 8, 16):
        own = sk.sketch(B, A, *sk.sides(3, "m", SHAPE, (side, side)))
        np.testing.assert_allclose(sk.smaller(wide, side), own, rtol=1e-12)


def test_a_sketch_is_linear_and_blind_to_the_gauge() -> None:
    P, Q = sk.sides(3, "m", SHAPE, (8, 8))
    B, A = drawn(1, 4)
    C, D = drawn(2, 6)
    both = sk.sketch(np.hstack([0.7 * B, -2 * C]), np.vstack([A, D]), P, Q)
    np.testing.assert_allclose(
        both, 0.7 * sk.sketch(B, A, P, Q) - 2 * sk.sketch(C, D, P, Q), rtol=1e-11, atol=1e-11
    )
    G = np.random.default_rng(3).standard_normal((4, 4))
    turned = sk.sketch(B @ G, np.linalg.solve(G, A), P, Q)
    np.testing.assert_allclose(turned, sk.sketch(B, A, P, Q), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("side", [2, 4, 8])
@pytest.mark.parametrize("rank", [1, 6])
def test_mean_and_variance_are_those_of_theory(rank: int, side: int) -> None:
    B, A = drawn(rank, rank)
    D = B @ A
    energy = float((D * D).sum())
    values = np.linalg.svd(D, compute_uv=False)[:rank]
    rho = float((values**4).sum() / energy**2)
    wanted = 2 / side**2 + 2 * rho * (2 / side + 1 / side**2)
    found = (sketches(D, side) ** 2).sum((1, 2)) / energy
    assert found.mean() == pytest.approx(1, abs=4 * np.sqrt(wanted / DRAWS))
    # Signs have a little less than Gaussian numbers; a variance of heavy tails is itself uncertain.
    assert 0.6 * wanted < found.var() < 1.25 * wanted
    assert sk.deviation(np.array([energy]), side) >= np.sqrt(0.99 * wanted)


def test_inner_products_are_unbiased() -> None:
    D = np.matmul(*drawn(1, 3))
    E = 0.6 * D + np.matmul(*drawn(2, 3))
    found = (sketches(D, 4) * sketches(E, 4)).sum((1, 2))
    error = float(found.std()) / np.sqrt(DRAWS)
    assert found.mean() == pytest.approx(float((D * E).sum()), abs=4 * error)


def test_the_deviation_adds_up_over_modules() -> None:
    single = 2 / 16 + 2 * (2 / 4 + 1 / 16)
    energies = np.array([[4.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [2, 1, 1, 0]])
    wanted = np.sqrt(single * np.array([1, 1 / 4, 0, 6 / 16]))
    np.testing.assert_allclose(sk.deviation(energies, 4), wanted)


def test_many_modules_are_as_accurate_as_said() -> None:
    shapes = [(24, 20), (16, 48), (40, 12), (32, 32)] * 12
    parts = [drawn(10 + i, 2, shape) for i, shape in enumerate(shapes)]
    energies = np.array([np.square(B @ A).sum() for B, A in parts])
    ratios = []
    for seed in range(120):
        found = [
            sk.sketch(B, A, *sk.sides(seed, f"m{i}", shape, (4, 4)))
            for i, ((B, A), shape) in enumerate(zip(parts, shapes, strict=True))
        ]
        ratios.append(np.square(found).sum() / energies.sum())
    worst = float(sk.deviation(energies, 4))
    assert 0.5 * worst < np.std(ratios) < 1.1 * worst  # rank 2: less than the worst case
    assert np.mean(ratios) == pytest.approx(1, abs=4 * worst / np.sqrt(120))


def test_outputs_estimate_the_gram_of_outputs() -> None:
    B, A = drawn(1, 3)
    C, D = 0.8 * B + 0.6 * drawn(2, 3)[0], drawn(3, 3)[1]
    M, N = B @ A @ A.T @ B.T, C @ D @ D.T @ C.T
    pairs = [(by_outputs(B, A, seed), by_outputs(C, D, seed)) for seed in range(DRAWS)]
    products = np.array([(x @ y) / len(x) for x, y in pairs])
    error = float(products.std()) / np.sqrt(DRAWS)
    assert products.mean() == pytest.approx(float((M * N).sum()), abs=4 * error)
    squares = np.array([(x @ x) / len(x) for x, _ in pairs])
    error = float(squares.std()) / np.sqrt(DRAWS)
    assert squares.mean() == pytest.approx(float((M * M).sum()), abs=4 * error)


def test_outputs_do_not_see_the_right_side() -> None:
    """Another start of A, orthogonal to the first: nothing in common in ΔW, everything here."""
    B, A = drawn(1, 3)
    basis = np.linalg.qr(np.random.default_rng(2).standard_normal((56, 6)))[0].T
    root = np.linalg.cholesky(A @ A.T)
    first, second = root @ basis[:3], root @ basis[3:]
    assert abs(float(((B @ first) * (B @ second)).sum())) < 1e-10
    np.testing.assert_allclose(by_outputs(B, first, 5), by_outputs(B, second, 5), rtol=1e-9)


def test_folding_keeps_inner_products_and_counts_absent_modules_as_zero() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 30, 16))
    x += y
    stems = tuple(f"m{i}" for i in range(30))
    size = 256
    found, part = [], []
    for seed in range(400):
        left = sk.folded(x, seed, stems, "role", size)
        found.append(left @ sk.folded(y, seed, stems, "role", size))
        part.append(left @ sk.folded(y[10:], seed, stems[10:], "role", size))
    for values, wanted in ((found, (x * y).sum()), (part, (x[10:] * y[10:]).sum())):
        noise = np.linalg.norm(x) * np.linalg.norm(y) * np.sqrt(2 / size)
        assert np.mean(values) == pytest.approx(float(wanted), abs=4 * noise / 20)
        assert np.std(values) < 1.15 * noise
