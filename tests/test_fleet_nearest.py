"""Which representatives sketches propose: against a full search."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from adapterops.fleet.grouping.vectors import Vectors
from adapterops.fleet.plans.planfile import Sketched
from adapterops.fleet.replanning.nearest import nearest, nearest_of_all, searched
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
        ratio = part.norms[:, None] / part.norms[index]
        true = np.linalg.norm(own - ratio * part.sketches, axis=1)
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
    half = 2 * whole[:, :4, :4]  # as it would be at side 4
    other = np.concatenate([half[[1, 3]], foreign])
    found = nearest(among, signature_of(narrow, other, part.norms[7]), 2.0, everyone)
    assert found[0].id == "r00007"
    lacking = np.sum(half[[0, 2, 4, 5]] ** 2) + np.sum(foreign**2)
    assert found[0].estimate == pytest.approx(np.sqrt(lacking), abs=2e-3)
    shaped = Layout(("m1",), ((9, 8),), 8)
    assert nearest(among, signature_of(shaped, whole[:1], 1.0), 2.0, everyone) == []
    loud = nearest(among, signature_of(wide, part.sketches[7], 3 * part.norms[7]), 0.2, everyone)
    assert loud == []


def test_copies_and_louder_ones_are_as_far_as_they_are_whatever_a_sketch_measures():
    """A sketch's own norm is 1 on average only: the difference of two has nothing of that."""
    rng = np.random.default_rng(3)
    layout = Layout(tuple("abcdefgh"), ((9, 9),) * 8, 8)
    part = random_part(20, layout, rng)
    part = replace(part, sketches=part.sketches * rng.uniform(0.9, 1.1, (20, 1)).astype("f4"))
    for scale, distance in ((1.0, 0.0), (1.25, 0.2)):
        same = signature_of(layout, part.sketches[7], scale * part.norms[7])
        first = nearest(searched(part), same, 0.25, everyone)[0]
        size = np.linalg.norm(part.sketches[7])
        assert first.id == "r00007" and first.estimate == pytest.approx(distance * size, abs=1e-3)


@pytest.mark.parametrize("limit", [0.3, 0.6, np.inf])
@pytest.mark.parametrize("side", [8, 4])
def test_many_at_once_are_each_by_itself(limit, side):
    rng = np.random.default_rng(4)
    layout = Layout(tuple("abcdefgh"), ((9, 9),) * 8, 8)
    part = random_part(150, layout, rng, clusters=40)
    own = Layout(("aa", *"bcdefgh"), ((9, 9),) * 8, side)  # another first module
    rows = random_part(150, layout, np.random.default_rng(4), clusters=40).sketches
    rows = rows + 0.01 * rng.standard_normal(rows.shape).astype("f4")
    blocks = rows.reshape(150, 8, 8, 8)[:, :, :side, :side] * (8 / side)
    blocks[:, 0] *= 0.1
    norms = rng.uniform(0.9, 1.1, 150)
    vectors = Vectors(blocks.reshape(150, -1).astype("f2"), norms, np.ones((150, 8)) / 8, side)
    usable = np.arange(150) % 3 > 0
    ids = {id for id, yes in zip(part.ids, usable, strict=True) if yes}
    found = list(nearest_of_all(searched(part), own, vectors, np.full(150, limit), usable))
    assert sum(map(len, found)) > 50
    for row, hits in enumerate(found):
        alone = signature_of(own, vectors.sketches[row], norms[row])
        wanted = nearest(searched(part), alone, limit, ids.__contains__)
        assert [near.id for near in hits] == [near.id for near in wanted]
        assert [near.estimate for near in hits] == pytest.approx([n.estimate for n in wanted])
    nobody = nearest_of_all(searched(part), own, vectors, np.full(150, limit), usable & False)
    assert list(nobody) == [[]] * 150
    shaped = Layout(own.stems, ((9, 8),) * 8, side)
    none = nearest_of_all(searched(part), shaped, vectors, np.full(150, limit), usable)
    assert list(none) == [[]] * 150
