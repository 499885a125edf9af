"""Limits from a bracket are those of a sort, and a bracket that does not serve is given up."""

from __future__ import annotations

import numpy as np
import pytest

from adapterops.combining import combine
from adapterops.derived import elementwise
from adapterops.errors import NumericsError
from adapterops.rules import brackets, limits
from tests.support import pairs, write_peft

ROWS, COLUMNS = 1100, 1000  # more than limits.py gathers
RANKS = (1, 220_000, 1_099_999)


def matrices(dtype=np.float32) -> np.ndarray:
    """Of rank 3 with rows of very different sizes, of noise, and with many equal entries."""
    rng = np.random.default_rng(4)
    low = rng.standard_normal((ROWS, 3)) * np.exp(rng.standard_normal((ROWS, 1)))
    noise = rng.standard_normal((ROWS, COLUMNS))
    return np.stack([low @ rng.standard_normal((3, COLUMNS)), noise]).astype(dtype)


def blocks_of(X, rows=64):
    return lambda: (X[:, i : i + rows] for i in range(0, X.shape[1], rows))


def sample_of(X, groups=20):
    rng = np.random.default_rng(1)
    rows, columns = rng.permutation(X.shape[1]), rng.permutation(X.shape[2])
    return lambda: (X[:, rows[g::groups]][:, :, columns[g::groups]] for g in range(groups))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rank", [1_000, 220_000, 800_000])
def test_a_bracketed_limit_is_that_of_a_sort(dtype, rank):
    X = matrices(dtype)
    found = brackets.bracketed(blocks_of(X), sample_of(X), X[0].size, [rank])
    assert found is not None
    values, near = found
    for matrix, value, count in zip(X, values[:, 0], near[:, 0], strict=True):
        sizes = np.sort(np.abs(matrix).ravel())[::-1].astype(np.float64)
        assert value == sizes[rank - 1]
        assert count == (np.abs(sizes - value) <= brackets.NEAR * value).sum() >= 1


def test_limits_are_the_same_with_a_sample_and_without():
    X = matrices()
    alone = limits.limits(blocks_of(X), X[0].size, RANKS)
    helped = limits.limits(blocks_of(X), X[0].size, RANKS, sample_of(X))
    assert (alone.values == helped.values).all() and (alone.near == helped.near).all()


def test_one_pass_is_enough(monkeypatch):
    monkeypatch.setattr(limits, "_searched", None)
    X = matrices()
    passes = []

    def blocks():
        passes.append(1)
        return blocks_of(X)()

    limits.limits(blocks, X[0].size, [220_000], sample_of(X))
    assert len(passes) == 2  # the first block is looked at before


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("groups", [3, 20])
def test_the_middle_of_a_bracket_is_that_of_the_whole_sample(bad, groups):
    X = matrices()
    X[0, 5, 6] = bad
    shares = [0.001, 0.2, 0.8]
    parts = [np.abs(group).reshape(2, -1) for group in sample_of(X, groups)()]
    whole = np.concatenate(parts, axis=1)
    each = np.array([brackets._at(part, shares) for part in parts])
    found = brackets._within(whole, shares, each.min(axis=0), each.max(axis=0))
    assert (found == brackets._at(whole, shares)).all()
    outside = brackets._within(whole, shares, each.max(axis=0) + 1, each.max(axis=0) + 2)
    assert (outside == brackets._at(whole, shares)).all()


@pytest.mark.parametrize("what", ["misleading", "wide", "zeros"])
def test_a_sample_that_does_not_help_is_given_up(what):
    X = matrices()
    sample = sample_of(X)
    if what == "misleading":
        sample = sample_of(3 * X)
    elif what == "wide":

        def sample():
            return (X[:, :, :5] * np.float32(2.0**k) for k in range(8))

    else:
        X[:] = 0
    assert brackets.bracketed(blocks_of(X), sample, X[0].size, [220_000]) is None
    expected = limits.limits(blocks_of(X), X[0].size, [220_000])
    found = limits.limits(blocks_of(X), X[0].size, [220_000], sample)
    assert (found.values == expected.values).all() and (found.near == expected.near).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found(bad):
    X = matrices()
    sample = sample_of(X.copy())
    X[1, 77, 3] = bad
    assert brackets.bracketed(blocks_of(X), sample, X[0].size, [220_000]) is None
    with pytest.raises(NumericsError, match="infinite or NaN"):
        limits.limits(blocks_of(X), X[0].size, [220_000], sample)


def test_methods_on_dense_changes_use_a_sample_and_need_none(tmp_path, monkeypatch):
    """The sample of an operator is like the whole, and changes nothing."""
    shapes = {"layers.0.q_proj": (ROWS, COLUMNS)}
    folders = [write_peft(tmp_path / f"a{i}", pairs(i, shapes, 3)) for i in range(2)]
    taken = []
    original = brackets.bracketed

    def watched(*given):
        taken.append(original(*given))
        return taken[-1]

    monkeypatch.setattr(brackets, "bracketed", watched)

    def found():
        [site] = combine("ties", folders).terms[0][1].sites.values()
        return site.made.operator().limits

    helped = found()
    assert len(taken) == 1 and taken[0] is not None
    monkeypatch.setattr(elementwise, "LEAST_SAMPLED", 1 << 20)
    alone = found()
    assert len(taken) == 1
    assert (helped.at == alone.at).all() and (helped.near == alone.near).all()
