"""Groups that an average joins: beyond the reach of every original, within everyone's bound."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

import adapterops as ao
from adapterops.errors import AdapterOpsError
from adapterops.fleet.grouping.graph import graph
from adapterops.fleet.grouping.unions import Middle, middle, neighbours, unions
from adapterops.fleet.grouping.vectors import Vectors
from adapterops.fleet.plans.plan import Plan
from adapterops.fleet.plans.planfile import read_plan, read_sketches
from tests.planted_files import error, read, write

SHAPES = {"model.layers.0.self_attn.q_proj": (64, 16), "model.layers.1.mlp.up_proj": (60, 16)}
RANK = 4
BOUND = 0.2


def family(root: Path, number: int, size: int, apart: float) -> list[str]:
    """Adapters of one A, each `apart` of its norm from the middle in a direction of its own."""
    rng = np.random.default_rng([7, number])
    start = {
        stem: (rng.normal(size=(m, RANK)), rng.normal(size=(RANK, n)))
        for stem, (m, n) in SHAPES.items()
    }
    names = []
    for index in range(size):
        deltas = {}
        for stem, (B, A) in start.items():
            off = rng.normal(size=B.shape)
            off *= apart * np.linalg.norm(B @ A) / np.linalg.norm(off @ A)
            deltas[stem] = (B + off, A)
        names.append(f"f{number}-{index}")
        write(root / names[-1], deltas, RANK, "F32")
    return names


def planned(root: Path, work: Path, **options: object) -> Plan:
    """The plan, its errors checked against the files."""
    if not (work / "fleet").exists():
        ao.index(root, out=work / "fleet")
    given: dict[str, object] = {"max_error": BOUND, "allow_sharing": "all", **options}
    ao.cluster(work / "fleet", out=work / "plan", overwrite=True, **given)  # type: ignore[arg-type]
    plan = read_plan(work / "plan")
    for name, item in plan.served.items():
        rep = plan.representatives[item.by]
        place = Path(rep.location) if rep.location else work / "plan" / rep.path
        found = error(read(place), read(root / name))
        assert found == pytest.approx(item.error, rel=1e-5, abs=1e-6)
        assert found <= given["max_error"]
    return plan


def groups(plan: Plan) -> set[tuple[str, ...]]:
    return {rep.members for rep in plan.representatives.values()}


def test_an_average_joins_what_no_original_serves(tmp_path):
    # Originals are 0.24 apart, their middle is 0.17/√(3/2) = 0.14 from each.
    names = family(tmp_path / "all", 0, 3, 0.17)
    family(tmp_path / "all", 1, 1, 0.17)
    plan = planned(tmp_path / "all", tmp_path)
    assert groups(plan) == {tuple(names), ("f1-0",)}
    [rep] = [rep for rep in plan.representatives.values() if len(rep.members) == 3]
    assert rep.kind in ("mean", "minimax") and rep.holds == tuple(names)
    assert "average" in rep.reason
    alone = planned(tmp_path / "all", tmp_path, representative="medoid")
    assert all(len(members) == 1 for members in groups(alone))
    with pytest.raises(AdapterOpsError, match="max-adapters"):
        ao.cluster(tmp_path / "fleet", out=tmp_path / "x", max_adapters=2, max_error=0.1)


def test_who_is_over_after_all_leaves_the_groups_as_they_were(tmp_path):
    # Different A: the average of two has twice the rank, and cut to it is far from both.
    rng = np.random.default_rng(3)
    base = {s: (rng.normal(size=(m, 2)), rng.normal(size=(2, n))) for s, (m, n) in SHAPES.items()}
    for name in ("one", "two"):
        deltas = {}
        for stem, (B, A) in base.items():
            b, a = rng.normal(size=(len(B), 2)), rng.normal(size=(2, A.shape[1]))
            b *= 0.19 * np.linalg.norm(B @ A) / np.linalg.norm(b @ a)
            deltas[stem] = (np.hstack([B, b]), np.vstack([A, a]))
        write(tmp_path / "all" / name, deltas, RANK, "F32")
    plan = planned(tmp_path / "all", tmp_path, rank=2, max_error=0.15)
    assert groups(plan) == {("one",), ("two",)}
    assert not list((tmp_path / "plan").glob("representatives/*"))
    wide = planned(tmp_path / "all", tmp_path, rank=6, max_error=0.15)
    assert groups(wide) == {("one", "two")}


def test_what_is_farther_apart_than_its_own_norm_is_not_averaged(tmp_path):
    """Whatever the bound: sketches of small modules err by more than tells 1 from 1.1."""
    rng = np.random.default_rng(11)
    root = tmp_path / "all"
    for number in range(60):
        deltas = {}
        for stem in SHAPES:
            B, A = rng.normal(size=(8, 2)), rng.normal(size=(2, 4))
            deltas[stem] = (B, A)
        write(root / f"t{number:02}", deltas, 2, "F32")
    near = {stem: (B + 0.65 * rng.normal(size=B.shape), A) for stem, (B, A) in deltas.items()}
    write(root / "t59-near", near, 2, "F32")
    opened = {path.name: read(path) for path in sorted(root.iterdir())}
    far = [error(opened[a], opened[b]) for a in opened for b in opened if a != b]
    assert sum(1 < each < 1.15 for each in far) > 20
    plan = planned(root, tmp_path, max_error=0.6)
    together = [rep.members for rep in plan.representatives.values() if len(rep.members) > 1]
    assert ("t59", "t59-near") in together
    apart = [error(opened[a], opened[b]) for own in together for a in own for b in own if a != b]
    assert max(apart) <= 1


def test_groups_that_have_members_are_joined_too(tmp_path):
    for number in range(2):
        family(tmp_path / "all", number, 1, 0.0)
    rng = np.random.default_rng(5)
    ends = []
    center = read(tmp_path / "all" / "f0-0")
    for end in range(2):
        deltas = {}
        for stem, (B, A) in center.items():
            off = rng.normal(size=B.shape)
            deltas[stem] = B + off * 0.18 * np.linalg.norm(B @ A) / np.linalg.norm(off @ A), A
        for copy in range(3):
            ends.append(f"end{end}-{copy}")
            near = {
                stem: (B * (1 + 0.01 * copy * rng.normal(size=B.shape)), A)
                for stem, (B, A) in deltas.items()
            }
            write(tmp_path / "all" / ends[-1], near, RANK, "F32")
    for place in (tmp_path / "all" / "f0-0").iterdir():
        place.unlink()
    (tmp_path / "all" / "f0-0").rmdir()
    plan = planned(tmp_path / "all", tmp_path)
    assert groups(plan) == {tuple(sorted(ends)), ("f1-0",)}


@pytest.mark.parametrize(
    ("row", "together"),
    [
        ("f0-0,true,,,", False),
        ("f0-0,,,false,", False),
        ("f0-0,,,,f9-9", False),
        ("f0-0,,,,f0-1", True),
        ("f0-0,,other,,", False),
    ],
    ids=["private", "may not represent", "served by nobody here", "served by one", "other group"],
)
def test_consent_holds_for_averages_that_join(tmp_path, row, together):
    one, two = family(tmp_path / "all", 0, 2, 0.17)
    family(tmp_path / "all", 9, 10, 0.0) if "f9-9" in row else None
    policy = tmp_path / "policy.csv"
    policy.write_text(f"tenant,private,share_group,may_represent,may_be_served_by\n{row}\n")
    plan = planned(tmp_path / "all", tmp_path, policy=policy)
    # An average holds both; f0-0 may be in it only if f0-1 may be served by it.
    assert ((one, two) in groups(plan)) == together


@pytest.mark.parametrize("count", [2, 3, 6])
def test_middle_is_a_solvers(count):
    rng = np.random.default_rng(count)
    points = rng.normal(size=40) + 0.3 * rng.normal(size=(count, 40))
    points *= rng.uniform(0.8, 1.2, count)[:, None]
    norms = np.linalg.norm(points, axis=1)
    vectors = Vectors(points / norms[:, None], norms, np.ones((count, 1)), 2)
    bounds = rng.uniform(0.5, 0.6, count)
    limits = bounds * norms

    def shares_of(x):
        return np.linalg.norm(x[:-1] @ points - points, axis=1) / limits

    solved = minimize(
        lambda x: x[-1],
        np.append(np.full(count, 1 / count), 2.0),
        method="SLSQP",
        constraints=[
            {"type": "ineq", "fun": lambda x: x[-1] - shares_of(x)},
            {"type": "eq", "fun": lambda x: x[:-1].sum() - 1},
        ],
        options={"ftol": 1e-12, "maxiter": 500},
    )
    everyone = list(range(count)), np.ones(count, bool)
    found = middle(vectors, bounds * solved.fun * (1 + 1e-4), *everyone)
    assert found.share == pytest.approx(1, abs=2e-4)
    assert middle(vectors, bounds * solved.fun * (1 - 1e-4), *everyone) is None
    # Where the plain average is within all bounds it may be less than best.
    assert solved.fun * (1 - 1e-5) <= middle(vectors, bounds, *everyone).share <= 1
    worst = (np.linalg.norm(points[:, None] - points, axis=2) / limits[:, None]).max(0)
    assert found.center == int(worst.argmin())


def test_unions_take_the_nearest_first_and_stop_at_ceilings():
    spots = np.array([0.0, 1.0, 3.0, 3.5, 9.0])

    def estimate(rows):
        spread = float(np.ptp(spots[list(rows)]))
        return Middle(spread / 4, rows[0]) if spread <= 4 else None

    groups = {place: [place] for place in range(5)}
    near = [set(range(5)) - {place} for place in range(5)]
    found = unions(groups, near, estimate, [1.0] * 5)
    assert [one.parts for one in found] == [(0, 1, 2, 3)]
    assert found[0].rows == (0, 1, 2, 3) and found[0].middle == Middle(3.5 / 4, 0)
    found = unions(groups, near, estimate, [0.8] * 5)
    assert [one.parts for one in found] == [(0, 1), (2, 3)]
    found = unions(groups, near, estimate, [1.0, 1.0, 0.1, 1.0, 1.0])
    assert [one.parts for one in found] == [(0, 1, 3)]
    found = unions({0: [0], 1: [1], 4: [4]}, near, estimate, [1.0] * 5)
    assert [one.parts for one in found] == [(0, 1)]
    assert not unions(groups, [set() for _ in range(5)], estimate, [1.0] * 5)


def test_middle_of_what_is_too_far_or_may_not_be_averaged():
    rows = np.eye(3)
    vectors = Vectors(rows, np.ones(3), np.ones((3, 1)), 1)
    everyone = np.ones(3, bool)
    assert middle(vectors, np.full(3, 0.7), [0, 1, 2], everyone) is None
    found = middle(vectors, np.full(3, 0.9), [0, 1, 2], everyone)
    assert found.share == pytest.approx(math.sqrt(2 / 3) / 0.9)
    two = middle(vectors, np.full(3, 1.4), [0, 1, 2], np.array([True, True, False]))
    assert two.share == pytest.approx(math.sqrt(1.5) / 1.4) and two.center == 0
    assert middle(vectors, np.full(3, 1.4), [0, 1, 2], np.array([True, False, False])) is None
    assert middle(vectors, np.array([0.9, 0.9, 0.0]), [0, 1, 2], everyone) is None


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_file_that_cannot_be_read_again_stays_out(victim, tmp_path):
    names = family(tmp_path / "all", 0, 3, 0.17)
    ao.index(tmp_path / "all", out=tmp_path / "fleet")
    broken = tmp_path / "all" / names[victim] / "adapter_model.safetensors"
    state, size = broken.stat(), broken.stat().st_size
    broken.write_bytes(bytes(size))  # as a disk that loses bytes: nothing says that it changed
    os.utime(broken, ns=(state.st_atime_ns, state.st_mtime_ns))
    report = ao.cluster(
        tmp_path / "fleet", out=tmp_path / "plan", max_error=BOUND, allow_sharing="all"
    )
    others = tuple(name for name in names if name != names[victim])
    assert groups(read_plan(tmp_path / "plan")) == {others, (names[victim],)}
    [said] = report.warnings
    assert said.startswith(f"{names[victim]} could not be compared")


def test_middle_of_many_is_the_plain_average():
    rng = np.random.default_rng(11)
    points = rng.normal(size=60) + 0.2 * rng.normal(size=(300, 60))
    norms = np.linalg.norm(points, axis=1)
    vectors = Vectors(points / norms[:, None], norms, np.ones((300, 1)), 2)
    bounds, able = rng.uniform(0.5, 0.6, 300), np.arange(300) % 3 > 0
    limits = bounds * norms
    weights = able / limits**2
    away = np.linalg.norm(points - weights @ points / weights.sum(), axis=1)
    found = middle(vectors, bounds, list(range(300)), able)
    assert found.share == pytest.approx((away / limits).max())
    assert able[found.center] and np.sum(away[able] < away[found.center]) < 128
    assert middle(vectors, bounds * found.share * 0.999, list(range(300)), able) is None


def test_of_a_crowd_only_the_nearest_are_tried():
    count, tried = 200, set()
    pairs = np.array([(i, j) for i in range(count) for j in range(i + 1, count)])
    away = (pairs[:, 1] - pairs[:, 0]) / count
    near = neighbours(graph(count, pairs[:, 0], pairs[:, 1], away))
    assert near[100] == {*range(92, 100), *range(101, 109)}
    assert near[0] == set(range(1, 17)) and all(i in near[j] for i in range(count) for j in near[i])

    def estimate(rows):
        tried.add(rows)
        return Middle((max(rows) - min(rows)) / count, rows[0])

    [one] = unions({place: [place] for place in range(count)}, near, estimate, [1.0] * count)
    assert one.parts == tuple(range(count))
    assert len(tried) < 40 * count  # without: as many as there are pairs, and as many again


def test_an_average_of_more_modules_than_any_of_its_members(tmp_path):
    # 21 modules have sketches of side 16, the 41 of their average of side 8.
    rng = np.random.default_rng(5)
    common = {"model.layers.0.self_attn.q_proj": (rng.normal(size=(40, 2)), np.eye(2, 40))}
    own = [
        (f"model.layers.{number}.mlp.up_proj", (0.02 * rng.normal(size=(40, 2)), np.eye(2, 40)))
        for number in range(40)
    ]
    for name, part in (("one", own[:20]), ("two", own[20:])):
        write(tmp_path / "all" / name, {**common, **dict(part)}, 2, "F32")
    plan = planned(tmp_path / "all", tmp_path, representative="mean")
    assert groups(plan) == {("one", "two")}
    [rep] = plan.representatives.values()
    [part] = read_sketches(tmp_path / "plan")
    assert (part.layout.stems, part.layout.side) == (tuple(sorted({*common, *dict(own)})), 8)
    deltas = read(tmp_path / "plan" / rep.path)
    write(tmp_path / "new", {s: (1.1 * B, A) for s, (B, A) in deltas.items()}, 2, "F32")
    ao.assign(tmp_path / "plan", [tmp_path / "new"], out=tmp_path / "plan2")
    assert read_plan(tmp_path / "plan2").served["new"].by == rep.id


@pytest.mark.parametrize("small", [1e-4, 1e-12, 1e-24, 1e-30])
def test_middle_of_one_that_is_next_to_nothing_beside_the_other(small):
    vectors = Vectors(np.ones((2, 1)), np.array([1.0, small]), np.ones((2, 1)), 1)
    assert middle(vectors, np.full(2, 0.99), [0, 1], np.ones(2, bool)) is None


def test_an_average_that_is_left_with_one_member_goes(tmp_path):
    one, two = family(tmp_path / "all", 0, 2, 0.17)
    ao.index(tmp_path / "all", out=tmp_path / "fleet")
    options = {"max_error": BOUND, "allow_sharing": "all"}
    ao.cluster(tmp_path / "fleet", out=tmp_path / "before", **options)
    assert groups(read_plan(tmp_path / "before")) == {(one, two)}
    policy = tmp_path / "policy.csv"
    policy.write_text(f"tenant,may_represent\n{one},false\n")
    plan = planned(tmp_path / "all", tmp_path, previous=tmp_path / "before", policy=policy)
    # What holds the weights of both could serve the first still, with an error and for no gain.
    assert {rep.holds for rep in plan.representatives.values()} == {(one,), (two,)}
    assert all(item.error == 0.0 for item in plan.served.values())


@pytest.mark.parametrize(("apart", "together"), [(0.85, True), (1.2, False)])
def test_what_is_more_unlike_than_alike_is_not_averaged(tmp_path, apart, together):
    """0.92 and 1.09 of their norms from each other; a mean would be within 0.6 of both."""
    names = family(tmp_path / "all", 0, 2, apart)
    plan = planned(tmp_path / "all", tmp_path, max_error=0.6)
    assert (tuple(names) in groups(plan)) == together
