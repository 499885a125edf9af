"""Bases by products are as orthonormal as Householder's, which are there where they fail."""

from __future__ import annotations

import numpy as np
import pytest

from adapterops.rules import orthonormal as module
from adapterops.rules.orthonormal import orthonormal

ROWS, COLUMNS = 300, 24


def columns(kind: str) -> np.ndarray:
    rng = np.random.default_rng(11)
    X = rng.standard_normal((ROWS, COLUMNS))
    if kind == "of many sizes":
        X *= 10.0 ** np.linspace(-150, 150, COLUMNS)
    elif kind == "correlated":
        X += 20 * X[:, :1]
    elif kind == "nearly dependent":
        X[:, 5] = X[:, 3] + 1e-9 * X[:, 5]
    elif kind == "dependent":
        X[:, 5] = X[:, 3]
    elif kind == "with a column of zeros":
        X[:, 5] = 0
    elif kind == "wide":
        X = X[: COLUMNS // 2]
    elif kind == "none":
        X = X[:, :0]
    return X


FAST = ("plain", "of many sizes", "correlated")
SLOW = ("nearly dependent", "dependent", "with a column of zeros", "wide", "none")


@pytest.mark.parametrize("kind", [*FAST, *SLOW])
def test_the_basis_is_orthonormal_and_gives_the_columns_back(kind):
    X = columns(kind)
    Q, R = orthonormal(X)
    width = min(X.shape)
    assert Q.shape == (len(X), width) and R.shape == (width, X.shape[1])
    assert np.abs(Q.T @ Q - np.eye(width)).max(initial=0.0) < 5e-15
    sizes = np.linalg.norm(X, axis=0)
    assert (np.linalg.norm(Q @ R - X, axis=0) <= 1e-13 * sizes).all()
    assert not np.tril(R, -1).any()


@pytest.mark.parametrize("kind", [*FAST, *SLOW])
def test_householder_is_for_what_products_cannot_do(kind):
    X = columns(kind)
    alone = module._by_products(X) if X.size and X.shape[0] >= X.shape[1] else None
    assert (alone is not None) == (kind in FAST)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_taken_for_a_basis(bad):
    X = columns("plain")
    X[7, 2] = bad
    assert module._by_products(X) is None
