"""Sketches of what adapters make of inputs: against dense float64, linear, and what fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterops as ao
from adapterops import metric
from adapterops.activations import open_activations, write_activations
from adapterops.errors import IncompatibleError, NumericsError
from adapterops.fleet.grouping.responses import response_vectors
from adapterops.fleet.grouping.vectors import Vectors
from adapterops.fleet.indexing.opened import open_fleet
from adapterops.metric import Inputs
from adapterops.stream import Compute
from tests.support import pairs, write_peft

SHAPES = {f"model.layers.{n}.self_attn.q_proj": (20, 24) for n in range(6)}


def inputs_of(kind: str, rank: int, width: int, folder: Path) -> tuple[Inputs, np.ndarray]:
    """One module's inputs from a file, and their exact second moments."""
    rng = np.random.default_rng([rank, width])
    X = (rng.standard_normal((3 * rank, rank)) @ rng.standard_normal((rank, width))).astype("f4")
    moments = X.T.astype(float) @ X / len(X)
    value = X if kind == "samples" else moments.astype("f4")
    write_activations(folder / "x", {"m": (kind, value)}, tokens=9, model="x")
    return open_activations(folder / "x").modules["m"], moments


@pytest.mark.parametrize("kind", ["gram", "samples"])
@pytest.mark.parametrize(("rank", "probes"), [(5, 16), (16, 16), (40, 40)])
def test_a_root_of_the_moments(kind: str, rank: int, probes: int, tmp_path: Path) -> None:
    found, moments = inputs_of(kind, rank, 40, tmp_path)
    probe = np.sign(np.random.default_rng(0).standard_normal((40, probes)))
    F, spread = metric.outer(found, probe)
    both = F @ F.T + np.diag(spread**2)
    np.testing.assert_allclose(both, moments, atol=2e-4 * np.abs(moments).max())


def test_a_gram_of_too_high_a_rank_keeps_its_diagonal(tmp_path: Path) -> None:
    found, moments = inputs_of("gram", 40, 40, tmp_path)
    probe = np.sign(np.random.default_rng(0).standard_normal((40, 8)))
    F, spread = metric.outer(found, probe)
    assert F.shape == (40, 8)
    both = F @ F.T + np.diag(spread**2)
    np.testing.assert_allclose(np.diag(both), np.diag(moments), rtol=1e-5)
    assert np.linalg.eigvalsh(moments - F @ F.T)[0] > -1e-4 * np.trace(moments)


@pytest.mark.parametrize("kind", ["gram", "samples"])
def test_what_is_not_finite_is_said(kind: str, tmp_path: Path) -> None:
    found, _ = inputs_of(kind, 4, 4, tmp_path)
    raw = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(raw[:-4] + np.float32("inf").tobytes())
    found = open_activations(tmp_path / "x").modules["m"]
    with pytest.raises(NumericsError, match=f"m.{kind} holds NaN or infinities"):
        metric.outer(found, np.ones((4, 2)))


def vectors_of(tmp_path: Path, members: dict[str, Any], kind: str, threads: int = 2) -> Vectors:
    """The vectors of tenants in the order of their names, for inputs of low rank."""
    rng = np.random.default_rng(1)
    given = {}
    for stem in SHAPES:
        X = (rng.standard_normal((30, 7)) @ rng.standard_normal((7, 24))).astype("f4")
        given[stem] = (kind, X if kind == "samples" else X.T @ X / len(X))
    if not (tmp_path / "x").exists():
        write_activations(tmp_path / "x", given, tokens=30, model="tiny/base")
        for name, factors in members.items():
            write_peft(tmp_path / "a" / name, factors)
        ao.index(tmp_path / "a", out=tmp_path / "fleet")
    fleet = open_fleet(tmp_path / "fleet")
    inputs = open_activations(tmp_path / "x")
    return response_vectors(fleet, fleet.records, inputs, Compute(threads=threads))


@pytest.mark.parametrize("kind", ["gram", "samples"])
def test_norms_and_distances_are_those_of_responses(kind: str, tmp_path: Path) -> None:
    members = {f"t{n:02}": pairs(n % 4, SHAPES, 2) for n in range(24)}
    for n in range(4, 24):
        rng = np.random.default_rng(n)
        members[f"t{n:02}"] = {
            stem: (B, (A + 0.02 * rng.standard_normal(A.shape)).astype("f4"))
            for stem, (B, A) in members[f"t{n:02}"].items()
        }
    found = vectors_of(tmp_path, members, kind)
    inputs = open_activations(tmp_path / "x")
    moments = {}
    for stem in SHAPES:
        raw = inputs.modules[stem].ref.read()
        moments[stem] = raw if kind == "gram" else raw.T @ raw / len(raw)

    def size(deltas: dict[str, np.ndarray]) -> float:
        return float(np.sqrt(sum(np.trace(d @ moments[s] @ d.T) for s, d in deltas.items())))

    names = sorted(members)
    dense = {n: {s: B @ A for s, (B, A) in members[n].items()} for n in names}
    rows = found.sketches.astype(float) * found.norms[:, None]
    true, seen = [], []
    for i in range(24):
        for j in range(i):
            difference = {s: dense[names[i]][s] - dense[names[j]][s] for s in SHAPES}
            true.append(size(difference))
            seen.append(np.linalg.norm(rows[i] - rows[j]))
    ratio = np.array(seen) / np.array(true)
    assert 0.9 < np.median(ratio) < 1.1 and np.ptp(np.log(ratio)) < 1.0
    norms = np.array([size(dense[name]) for name in names])
    assert np.abs(np.log(found.norms / norms)).max() < 0.25
    np.testing.assert_allclose(found.energies.sum(1), 1, rtol=1e-6)
    assert not found.failed


def test_threads_change_nothing_and_copies_are_equal(tmp_path: Path) -> None:
    members = {"a": pairs(0, SHAPES, 2), "b": pairs(0, SHAPES, 2), "c": pairs(1, SHAPES, 2)}
    first = vectors_of(tmp_path, members, "gram", 1)
    other = vectors_of(tmp_path, members, "gram", 3)
    for name in ("sketches", "norms", "energies"):
        assert np.array_equal(getattr(first, name), getattr(other, name))
    assert np.array_equal(first.sketches[0], first.sketches[1])
    assert not np.array_equal(first.sketches[0], first.sketches[2])


def test_who_cannot_be_measured_is_a_row_of_zeros(tmp_path: Path) -> None:
    other = {"model.layers.7.self_attn.q_proj": pairs(0, SHAPES, 2)[next(iter(SHAPES))]}
    members = {"a": pairs(0, SHAPES, 2), "b": pairs(0, SHAPES, 2) | other}
    found = vectors_of(tmp_path, members, "gram")
    assert found.failed.keys() == {1} and isinstance(found.failed[1], IncompatibleError)
    assert found.norms[1] == 0 and not found.sketches[1].any() and found.norms[0] > 0
    part = found.rows(np.array([1]))
    assert part.failed.keys() == {0} and part.norms.tolist() == [0]
    assert not found.rows(np.array([0])).failed
