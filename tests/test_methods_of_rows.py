"""Methods of what is known by its rows alone: streamed, and right, like methods of files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import adapterops as ao
from adapterops.combining import combine
from adapterops.derived.grid import OnGrid
from adapterops.errors import NumericsError
from adapterops.formats.model import Site
from adapterops.rules.registry import METHODS
from tests import rules_dense_elements as elements
from tests.support import dense, pairs, write_peft

SHAPES = {"layers.0.q_proj": (150, 70), "layers.1.up_proj": (64, 96)}
TIES = {"density": 0.4}


@pytest.fixture
def three(tmp_path):
    """Adapters, as Adapters, and their dense changes."""
    folders = [write_peft(tmp_path / f"a{i}", pairs(i, SHAPES, 3), alpha=6.0) for i in range(3)]
    return (
        [ao.open_adapter(folder) for folder in folders],
        [dense(pairs(i, SHAPES, 3), 2.0) for i in range(3)],
    )


def trimmed(changes: list[dict[str, np.ndarray]], stem: str, w: list[float]) -> np.ndarray:
    D = np.stack([each[stem] for each in changes[: len(w)]])
    return elements.ties(D, np.array(w), None, **TIES)


def rows(adapter: ao.Adapter, stem: str) -> np.ndarray:
    """A module by its operator, in ranges that are not those of its grid."""
    [(weight, file)] = adapter.terms
    assert weight == 1.0
    operator = file.sites[stem].made.operator()
    assert isinstance(operator, OnGrid)
    m = SHAPES[stem][0]
    return np.concatenate([operator.rows(i, min(i + 23, m)) for i in range(0, m, 23)])


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


@pytest.fixture
def no_factors(monkeypatch):
    """No matrix known by its rows may be asked for as factors."""
    asked = Site.factors

    def factors(site, *given, **named):
        assert site.kind != "elementwise"
        return asked(site, *given, **named)

    monkeypatch.setattr(Site, "factors", factors)


@pytest.mark.parametrize("name", ["slerp", "nuslerp", "karcher", "model_stock", "linear"])
def test_gram_methods(name, three, no_factors):
    (a, b, c), changes = three
    method = METHODS[name]
    values = method.values({"normalize": True} if name == "linear" else {})
    result = combine(
        name,
        [combine("ties", [a, b], parameters=TIES), c],
        [0.7, 0.4],
        parameters={k: v for k, v in values.items() if k != "scope"},
    )
    for stem in SHAPES:
        D = np.stack([trimmed(changes, stem, [1, 1]), changes[2][stem]])
        G = np.einsum("imn,jmn->ij", D, D)
        shares = method.function(G, np.array([0.7, 0.4]), **method.arguments(values))
        close(rows(result, stem), np.tensordot(shares, D, 1))


def test_elementwise_methods(three, no_factors):
    (a, b, c), changes = three
    inner = combine("ties", [a, b], [1, -1], parameters=TIES)
    result = combine("ties", [inner, c], [0.7, 0.4], parameters=TIES)
    for stem in SHAPES:
        D = np.stack([trimmed(changes, stem, [1, -1]), changes[2][stem]]).astype(np.float32)
        close(
            rows(result, stem), elements.ties(D.astype(float), np.array([0.7, 0.4]), None, **TIES)
        )


@pytest.mark.parametrize("scope", ["module", "adapter"])
def test_three_levels_deep_and_of_every_scope(scope, three, no_factors):
    (a, b, c), changes = three
    inner = combine("ties", [a, b], parameters=TIES)
    arc = combine("slerp", [inner, c], parameters={"t": 0.3, "scope": scope})
    result = combine("magnitude_prune", [arc, a], parameters={"density": 0.5, "scope": scope})
    D = {stem: np.stack([trimmed(changes, stem, [1, 1]), changes[2][stem]]) for stem in SHAPES}
    G = {stem: np.einsum("imn,jmn->ij", each, each) for stem, each in D.items()}
    arcs = {
        stem: np.tensordot(
            METHODS["slerp"].function(
                sum(G.values()) if scope == "adapter" else G[stem], np.ones(2), t=0.3
            ),
            each,
            1,
        )
        for stem, each in D.items()
    }
    both = {stem: np.stack([arcs[stem], changes[0][stem]]) for stem in SHAPES}
    if scope == "adapter":
        flat = np.concatenate([each.reshape(2, 1, -1) for each in both.values()], axis=-1)
        limits = np.sort(np.abs(flat), axis=-1)[:, 0, -round(0.5 * flat.shape[-1])]
    for stem, each in both.items():
        if scope == "module":
            limits = np.sort(np.abs(each).reshape(2, -1), axis=-1)[:, -each[0].size // 2]
        kept = np.where(np.abs(each) >= (1 - 1e-6) * limits[:, None, None], each, 0)
        close(rows(result, stem), kept.sum(0))


def test_match_norm_leaves_out_adapters_without_a_say(three, no_factors):
    (a, b, c), changes = three
    inner = combine("ties", [a, b], parameters=TIES)
    result = combine("ties", [inner, b, c], [1, 0, 1], parameters=TIES, match_norm="mean")
    arc = combine("slerp", [inner, c], match_norm="max")
    for stem in SHAPES:
        norms = [np.linalg.norm(x) for x in (trimmed(changes, stem, [1, 1]), changes[2][stem])]
        assert np.linalg.norm(rows(result, stem)) == pytest.approx(np.mean(norms), rel=1e-5)
        assert np.linalg.norm(rows(arc, stem)) == pytest.approx(max(norms), rel=1e-5)


def test_what_cancels_has_no_say(three):
    (a, _, c), _ = three
    nothing = combine("ties", [a, a], [1, -1], parameters={"density": 1.0})
    result = combine("ties", [nothing, c], parameters={"density": 1.0})
    for stem in SHAPES:
        close(rows(result, stem), c[stem].dense())


def test_calibrated_and_spectral_methods_take_it_as_a_matrix(three):
    (a, b, c), changes = three
    inner = combine("ties", [a, b], parameters=TIES)
    stem = "layers.1.up_proj"
    D = np.stack([trimmed(changes, stem, [1, 1]), changes[2][stem]])
    method = METHODS["iso_c"]
    expected = method.function(D, np.ones(2), np.full(2, 1e-7), **method.values({})).core
    close(combine("iso_c", [inner, c])[stem].dense(), expected)
    damped = combine("slerp", [inner, c], calibrate="pico")[stem].dense()
    assert np.abs(damped - combine("slerp", [inner, c])[stem].dense()).max() > 1e-3


def test_what_is_saved_and_its_certificate(three, tmp_path: Path):
    (a, b, c), _ = three
    result = combine("slerp", [combine("ties", [a, b], parameters=TIES), c])
    exact = {stem: rows(result, stem) for stem in SHAPES}
    report = result.save(tmp_path / "out", rank=8, dtype="float32")
    saved = ao.open_adapter(tmp_path / "out")
    for stem, matrix in exact.items():
        error = np.linalg.norm(saved[stem].dense() - matrix) / np.linalg.norm(matrix)
        assert report.modules[stem].error == pytest.approx(error, rel=1e-4)
        sizes = np.linalg.svd(matrix, compute_uv=False)
        best = np.sqrt((sizes[8:] ** 2).sum() / (sizes**2).sum())
        assert error <= best * 1.001


@pytest.mark.parametrize("name", ["slerp", "karcher", "model_stock", "ties", "sce"])
def test_what_float32_does_not_hold_is_no_adapter_that_is_absent(name, three):
    (a, b, c), _ = three
    large = combine("ties", [a, b], parameters={"lambda": 1e39})
    quiet = np.errstate(over="ignore", invalid="ignore")
    with quiet, pytest.raises(NumericsError, match="too large for float32"):
        combine(name, [large, c])["layers.0.q_proj"].dense()
