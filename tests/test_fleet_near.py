"""Near duplicates of an index: found whatever the factors look like, by the sketches alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import adapterops as ao
from adapterops.fleet.indexing import alike, near
from adapterops.fleet.indexing.near import TOLERANCE, near_duplicates
from adapterops.fleet.indexing.opened import open_fleet
from adapterops.fleet.indexing.store import Store
from adapterops.fleet.types import Signature
from adapterops.render.fleet_index import text
from tests.support import Pairs, pairs, write_peft
from tests.test_fleet_store import signed, tenant

SHAPES = {f"model.layers.{i}.self_attn.{n}_proj": (40, 32) for i in range(3) for n in "qv"}


def refactored(factors: Pairs) -> Pairs:
    """The same products from other factors."""
    turn = np.array([[2.0, 1.0], [-1.0, 3.0]])
    return {
        name: ((B @ turn).astype(np.float32), np.linalg.solve(turn, A).astype(np.float32))
        for name, (B, A) in factors.items()
    }


def one_module(factors: Pairs, by: float) -> Pairs:
    """The first module multiplied."""
    name = min(factors)
    return {**factors, name: (factors[name][0] * np.float32(by), factors[name][1])}


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """A folder `in`: `a` in three forms, a byte copy, and what is near `a` in norm alone."""
    made = pairs(1, SHAPES, 2)
    inside = tmp_path / "in"
    write_peft(inside / "a", made)
    write_peft(inside / "a-bytes", made)
    write_peft(inside / "a-refactored", refactored(made))
    half = {name: (B.astype(np.float16), A.astype(np.float16)) for name, (B, A) in made.items()}
    write_peft(inside / "a-half", half)
    write_peft(inside / "a-one-module", one_module(made, 1.05))
    write_peft(inside / "a-flipped", {name: (-B, A) for name, (B, A) in made.items()})
    write_peft(inside / "a-louder", {name: (B * 1.01, A) for name, (B, A) in made.items()})
    write_peft(inside / "a-part", {name: made[name] for name in list(made)[:3]})
    for i in range(5):
        write_peft(inside / f"b{i}", pairs(10 + i, SHAPES, 2))
    return tmp_path


def test_copies_in_other_forms_are_candidates(fleet):
    report = ao.index(fleet / "in", out=fleet / "f")
    assert report.duplicates == (("a", "a-bytes"),)
    assert report.near_duplicates == (("a", "a-bytes", "a-half", "a-refactored"),)
    assert report.to_dict()["near_duplicates"] == report.near_duplicates
    said = text(report, verbose=False)
    assert "4 tenants in 1 group of other bytes" in said
    assert "candidates by sketch, not verified" in said


def test_byte_duplicates_alone_are_no_near_ones(fleet):
    report = ao.index([fleet / "in" / "a", fleet / "in" / "a-bytes"], out=fleet / "f")
    assert report.duplicates and report.near_duplicates == ()
    assert "re-factored" not in text(report, verbose=True)


def moved(found: Signature, distance: float, seed: int) -> Signature:
    """A signature whose sketch is this far from another's, of its own content and no copy."""
    noise = np.random.default_rng(seed).standard_normal(found.sketch.shape)
    sketch = found.sketch + distance * noise / np.linalg.norm(noise)
    return replace(found, content=f"{seed:064x}", sketch=sketch.astype(np.float16))


def unit(seed: int, norm: float) -> Signature:
    found = signed(seed, tuple(f"m.{i}" for i in range(12)), 8)
    sketch = found.sketch.astype(float)
    return replace(found, norm=norm, sketch=(sketch / np.linalg.norm(sketch)).astype(np.float16))


@pytest.mark.parametrize("block", [2, 5, 64])
def test_groups_do_not_depend_on_the_blocks(block, tmp_path, monkeypatch):
    """Eight families of three among forty others, norms that agree across the families too."""
    monkeypatch.setattr(near, "_BLOCK", block)
    batch, expected = [], []
    for family in range(8):
        base = unit(family, 1 + 0.1 * family)
        batch.append((f"f{family}-0", base))
        for copy in (1, 2):
            batch.append((f"f{family}-{copy}", moved(base, 3e-4, 100 + 10 * family + copy)))
        batch.append((f"f{family}-far", moved(base, 0.05, 300 + family)))
        loud = replace(base, content=f"{400 + family:064x}", norm=base.norm * (1 + 3 * TOLERANCE))
        batch.append((f"f{family}-loud", loud))
        expected.append(tuple(f"f{family}-{copy}" for copy in range(3)))
    batch += [
        (f"other-{i}", unit(500 + i, 1 + 0.1 * (i % 8))) for i in range(40 if block > 2 else 8)
    ]
    with Store.create(tmp_path / "f", 5) as store:
        store.put([(tenant(name), "v", found) for name, found in batch], "/in")
    assert sorted(near_duplicates(open_fleet(tmp_path / "f"))) == expected


def test_nothing_is_looked_for_again_where_nothing_changed(fleet, monkeypatch):
    calls = []
    real = alike.near_duplicates
    monkeypatch.setattr(alike, "near_duplicates", lambda f: calls.append("n") or real(f))
    first = ao.index(fleet / "in", out=fleet / "f")
    again = ao.index(fleet / "in", out=fleet / "f")
    assert calls == ["n"] and first.near_duplicates == again.near_duplicates
    assert first.lineages == again.lineages != ()
    removed = ao.index(remove="a-half", out=fleet / "f")
    assert calls == ["n", "n"]
    assert removed.near_duplicates == (("a", "a-bytes", "a-refactored"),)


def test_nothing_noted_outlives_a_removal(fleet):
    ao.index(fleet / "in", out=fleet / "f")
    with Store.open(fleet / "f") as store:
        store.note("digest", "names")
        assert store.noted("digest") == "names"
        store.forget(["a-half"])
        assert store.noted("digest") is None
