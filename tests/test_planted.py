"""The planted fleets are what they claim, by dense float64 arithmetic on the files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import adapterops as ao
from tests import planted
from tests.planted_files import read

CLUSTERS = len(planted.EPSILONS)
Dense = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> planted.Fleet:
    return planted.plant(tmp_path_factory.mktemp("fleet"), CLUSTERS)


def dense(fleet: planted.Fleet, name: str) -> Dense:
    """Every module's ΔW as the package reads it, zero where the adapter lacks it."""
    found = ao.open_adapter(fleet.root / name)
    return {
        stem: found[stem].dense() if stem in found else np.zeros(shape)
        for stem, shape in planted.SHAPES.items()
    }


def far(C: Dense, D: Dense) -> float:
    size = math.hypot(*map(np.linalg.norm, D.values()))
    return math.hypot(*(np.linalg.norm(C[s] - D[s]) for s in D)) / size if size else math.inf


@pytest.mark.parametrize("number", range(CLUSTERS))
def test_errors_are_those_of_the_files(fleet: planted.Fleet, number: int) -> None:
    cluster = f"c{number:05d}"
    centre = dense(fleet, f"{cluster}/centre")
    for tenant in fleet.tenants.values():
        if tenant.cluster != cluster:
            continue
        measured = far(centre, dense(fleet, tenant.name))
        assert tenant.error == pytest.approx(measured, abs=3e-8), tenant.name
        if tenant.kind in ("member", *planted.NEAR):
            assert measured == pytest.approx(planted.EPSILONS[number], rel=1e-5), tenant.name
        if tenant.kind in planted.FAR:
            assert measured > 1.2, tenant.name


def test_copies_do_the_same_in_another_form(fleet: planted.Fleet) -> None:
    limits = {"bytes": 2e-8, "fp16": 1e-3, "bf16": 5e-3}
    for tenant in fleet.of(*planted.COPIES):
        source = dense(fleet, tenant.copy_of)
        assert far(source, dense(fleet, tenant.name)) <= limits.get(tenant.kind, 1e-6), tenant.name
        assert tenant.drift <= limits.get(tenant.kind, 1e-6), tenant.name
    one = fleet.of("bytes")[0]
    files = [fleet.root / name / "adapter_model.safetensors" for name in (one.name, one.copy_of)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_clusters_are_far_apart_whatever_their_first_weights(fleet: planted.Fleet) -> None:
    centres = [tenant.name for tenant in fleet.of("centre")]
    deltas = [dense(fleet, name) for name in centres]
    first = [read(fleet.root / name)["model.layers.0.self_attn.q_proj"][1] for name in centres]
    for i, D in enumerate(deltas):
        for j, C in enumerate(deltas):
            if i != j:
                size = math.hypot(*map(np.linalg.norm, D.values()))
                inner = sum(float((C[stem] * D[stem]).sum()) for stem in D)
                other = math.hypot(*map(np.linalg.norm, C.values()))
                assert abs(inner / size / other) < 0.4
    alike = float((first[0] * first[2]).sum() / np.linalg.norm(first[0]) / np.linalg.norm(first[2]))
    assert alike > 0.95


def test_a_cluster_depends_on_its_number_alone(tmp_path: Path, fleet: planted.Fleet) -> None:
    again = planted.plant(tmp_path, 1, first=3)
    assert again.tenants == {n: t for n, t in fleet.tenants.items() if t.cluster == "c00003"}
    for name in again.tenants:
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / name / file).read_bytes() == (fleet.root / name / file).read_bytes()


def test_adjusted_rand() -> None:
    assert planted.adjusted_rand([0, 0, 1, 1], ["b", "b", "a", "a"]) == 1.0
    assert planted.adjusted_rand([0, 0, 1, 2], [0, 0, 1, 1]) == pytest.approx(4 / 7)
    assert planted.adjusted_rand([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(-0.5)
    assert planted.adjusted_rand([0, 1, 2], [0, 0, 0]) == 0.0
