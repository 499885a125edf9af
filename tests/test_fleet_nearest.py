"""Which representatives sketches propose: against a full search."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from adapterops.fleet.plans.planfile import Sketched
from adapterops.fleet.replanning.nearest import nearest, searched
from adapterops.fleet.types import Layout, Signature


def random_part(count, layout, rng, clusters=50):
    width = len(layout.stems) * layout.side**2
    rows = rng.standard_normal((clusters, width))[np.arange(count) % clusters]
    rows = rows + 0.3 * rng.standard_normal((count, width))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    norms = rng.uniform(1, 1.2, count)
    return Sketched(
        ("", "", ""),
        tuple(f"r{i:05}" for i in range(count)),
        layout,
        norms,
        rows.astype(np.float32),
    )


def signature_of(layout, row, norm):
    sketch = row.reshape(len(layout.stems), layout.side, layout.side).astype(np.float16)
    return Signature("ok", norm=float(norm), layout=layout, sketch=sketch)


def everyone(id):
    return True


def test_the_nearest_are_those_of_a_full_search():
    rng = np.random.default_rng(1)
    layout = Layout(tuple("abcdefgh"), ((9, 9),) * 8, 8)
    part = random_part(700, layout, rng)
    among = searched(part)
    for index in (0, 13, 699):
        own = part.sketches[index] + 0.002 * rng.standard_normal(512)
        found = nearest(among, signature_of(layout, own, part.norms[index]), 0.6, everyone)
        unit_own = own / np.linalg.norm(own)
        ratio = part.norms[:, None] / part.norms[index]
        true = np.linalg.norm(unit_own - ratio * part.sketches, axis=1)
        order = np.argsort(true)[: len(found)]
        assert [near.id for near in found] == [part.ids[i] for i in order]
        assert [near.estimate for near in found] == pytest.approx(true[order], abs=1e-3)
        assert len(found) >= 10
        kept = nearest(
            among, signature_of(layout, own, part.norms[index]), 0.6, lambda id: id > "r00400"
        )
        assert {near.id for near in kept} <= set(part.ids[401:])
        assert len(kept) >= 3


def test_sketches_of_other_sides_modules_and_norms_compare():
    rng = np.random.default_rng(2)
    stems = tuple(f"m{i}" for i in range(6))
    wide = Layout(stems, ((9, 9),) * 6, 8)
    part = random_part(50, wide, rng, clusters=50)
    among = searched(part)
    whole = part.sketches[7].reshape(6, 8, 8)
    narrow = Layout(("m1", "m3", "z"), ((9, 9), (9, 9), (4, 4)), 4)
    foreign = 0.05 * rng.standard_normal((1, 4, 4))  # of a module that nobody else has
    other = np.concatenate([whole[[1, 3], :4, :4], foreign])
    found = nearest(among, signature_of(narrow, other, part.norms[7]), 2.0, everyone)
    assert found[0].id == "r00007"
    product = np.sum(whole[[1, 3], :4, :4] ** 2)
    cosine = product / np.linalg.norm(whole[:, :4, :4]) / np.linalg.norm(other)
    assert found[0].estimate == pytest.approx(np.sqrt(2 - 2 * cosine), abs=2e-3)
    shaped = Layout(("m1",), ((9, 8),), 8)
    assert nearest(among, signature_of(shaped, whole[:1], 1.0), 2.0, everyone) == []
    loud = nearest(among, signature_of(wide, part.sketches[7], 3 * part.norms[7]), 0.2, everyone)
    assert loud == []
    scaled = searched(replace(part, sketches=part.sketches * np.float32(1.05)))
    same = signature_of(wide, part.sketches[7], part.norms[7])
    assert [near.id for near in nearest(scaled, same, 1e-3, everyone)] == ["r00007"]
