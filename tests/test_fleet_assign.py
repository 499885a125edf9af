"""assign: what a plan does for newcomers, by exact errors of files that were planted."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import adapterops as ao
from adapterops.cli import app
from adapterops.errors import (
    FileError,
    FormatError,
    IncompatibleError,
    OutputExistsError,
    UnsupportedError,
    UsageError,
)
from adapterops.files.output import stage
from adapterops.fleet.assign import assign
from adapterops.fleet.exact import Error
from adapterops.fleet.joining import Added, Newcomer, joined, singleton, sketch_of
from adapterops.fleet.nearest import nearest, searched
from adapterops.fleet.newcomers import partition_key
from adapterops.fleet.plan import Plan, Served
from adapterops.fleet.plandiff import diff
from adapterops.fleet.planfile import Sketched, read_plan, read_sketches, write_plan
from adapterops.fleet.policy import Consent, Rule, policy_from
from adapterops.fleet.replanning import hint
from adapterops.fleet.signature import signature
from adapterops.fleet.standing import check_consent
from adapterops.fleet.types import Layout, Signature, Tenant
from tests.planted import Fleet, plant
from tests.policies import CONSENTS, NAMES
from tests.support import pairs, write_peft

SEED = 7
KINDS = ("bytes", "refactored", "padded", "louder", "one-module", "absent", "flipped", "decoy")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Fleet:
    """Clusters at errors of 0.02, 0.05, 0.1, 0.2, 0.35 and 0.5 from their centres."""
    return plant(tmp_path_factory.mktemp("planted"), 6, members=2, kinds=(*KINDS, "no-op"))


def newcomer(fleet, name, consent):
    path = str(fleet.root / name)
    found = signature(path, SEED)
    return Newcomer(
        Tenant(name, path, os.path.abspath(path)), found, partition_key(found, name, {}, consent)
    )


def write_plan_of(folder, fleet, served, *, max_error=0.2, consent=None, own=()):
    """A plan in which planted tenants serve these others: {representative: [others]}.

    Those in `own` lie within the plan, as an average would.
    """
    consent = consent or Consent("all")
    items = {name: newcomer(fleet, name, consent) for name in served}
    plan = Plan("FLEET", SEED, max_error, "frobenius", consent.to_dict(), {}, {})
    with stage(folder, directory=True, overwrite=False) as staging:
        added, given = [], {}
        for name, others in served.items():
            rep = replace(singleton(items[name], ()), members=(name, *others), id=f"of {name}")
            if name in own:
                place = f"representatives/{name.replace('/', '-')}"
                shutil.copytree(fleet.root / name, staging.path(place))
                rep = replace(rep, kind="mean", path=place, location="")
            added.append(Added(rep, sketch_of(rep.id, items[name])))
            for other in rep.members:
                error = fleet.tenants[other].error if other != name else 0.0
                given[other] = Served(rep.id, error)
        reps = {one.representative.id: one.representative for one in added}
        plan = replace(plan, served=given, representatives=reps)
        plan, sketched = joined(plan, [one.sketched for one in added], (), ())
        write_plan(staging, plan, sketched)
    return Path(folder)


def centres(fleet, count=6):
    return {f"c{n:05d}/centre": [] for n in range(count)}


def assigned(report):
    return {item.tenant: item for item in report.assigned}


def named(fleet, *names):
    return [f"{name}={fleet.root / name}" for name in names]


def test_who_is_within_the_bound_joins_and_nobody_else(fleet, tmp_path):
    plan = write_plan_of(tmp_path / "plan", fleet, centres(fleet))
    others = [name for name in fleet.tenants if not name.endswith(("centre", "no-op"))]
    report = ao.assign(plan, named(fleet, *others), out=tmp_path / "plan2")
    found = assigned(report)
    close = {name for name in others if fleet.tenants[name].error <= 0.2 - 1e-6}
    assert {name for name in close if found[name].fate == "joined"} == close
    assert len(close) >= 4 * 6  # the four clusters up to 0.2, 0.2 itself planted to the last digit
    for name, item in found.items():
        if item.by.startswith("of "):
            assert item.by == f"of {fleet.tenants[name].cluster}/centre"
            assert item.error == pytest.approx(fleet.tenants[name].error, abs=2e-7)
            assert item.error <= 0.2
            assert item.error**2 == pytest.approx(item.missing**2 + item.foreign**2, abs=1e-12)
    for name in fleet.of("decoy", "flipped"):
        assert found[name.name].fate == "alone"
        assert found[name.name].error == 0.0
    made = read_plan(tmp_path / "plan2")
    assert made.served.keys() == {*others, *centres(fleet)}
    assert {s.by for s in made.served.values()} == made.representatives.keys()
    for id, rep in made.representatives.items():
        assert rep.members == tuple(sorted(n for n, s in made.served.items() if s.by == id))
    assert report.adapters == len(made.representatives)


def test_newcomers_share_among_themselves(fleet, tmp_path):
    """The second of two alike, neither like anything in the plan, joins the first."""
    plan = write_plan_of(tmp_path / "plan", fleet, centres(fleet, 1))
    both = named(fleet, "c00001/centre", "c00001/refactored", "c00001/decoy")
    found = assigned(ao.assign(plan, both, out=tmp_path / "plan2"))
    assert [found[f"c00001/{x}"].fate for x in ("centre", "refactored", "decoy")] == [
        "alone",
        "joined",
        "alone",
    ]
    made = read_plan(tmp_path / "plan2")
    rep = made.representatives[found["c00001/centre"].by]
    assert (rep.kind, rep.holds, rep.members) == (
        "medoid",
        ("c00001/centre",),
        ("c00001/centre", "c00001/refactored"),
    )
    assert made.routes["c00001/refactored"] == str(fleet.root / "c00001/centre")
    again = ao.assign(tmp_path / "plan2", named(fleet, "c00001/bytes"), out=tmp_path / "plan3")
    assert again.assigned[0].by == rep.id  # what was alone has left its sketch


def test_nothing_of_the_plan_changes_and_the_new_one_stands_alone(fleet, tmp_path):
    own = ["c00000/centre"]
    plan = write_plan_of(tmp_path / "plan", fleet, centres(fleet, 2), own=own)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in plan.rglob("*") if p.is_file()}
    report = ao.assign(plan, named(fleet, "c00000/member0"), out=tmp_path / "plan2")
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before} == before
    assert {p for p in plan.rglob("*") if p.is_file()} == set(before)
    [item] = report.assigned
    shutil.rmtree(plan)
    assert (tmp_path / "plan2" / item.path / "adapter_model.safetensors").is_file()
    made = read_plan(tmp_path / "plan2")
    assert made.routes["c00000/member0"] == made.routes["c00000/centre"] == item.path
    third = ao.assign(tmp_path / "plan2", named(fleet, "c00000/bytes"), out=tmp_path / "plan3")
    assert third.assigned[0].by == item.by
    ao.assign(
        tmp_path / "plan2", named(fleet, "c00001/bytes"), out=tmp_path / "plan3", overwrite=True
    )
    assert "c00000/bytes" not in read_plan(tmp_path / "plan3").served


def test_sharing_by_default_is_for_duplicates(fleet, tmp_path):
    plan = write_plan_of(tmp_path / "plan", fleet, centres(fleet, 1), consent=Consent())
    names = [f"c00000/{x}" for x in ("bytes", "louder", "member0", "padded", "refactored")]
    found = assigned(ao.assign(plan, named(fleet, *names), out=tmp_path / "plan2"))
    assert [found[name].fate for name in names] == ["joined", "alone", "alone", "alone", "joined"]
    assert found["c00000/refactored"].by == found["c00000/member0"].by
    assert found["c00000/member0"].reason.startswith("no duplicate of it")


@pytest.mark.parametrize(
    ("rules", "fate"),
    [
        ({}, "joined"),
        ({"c00000/bytes": {"private": True}}, "alone"),
        ({"c00000/centre": {"private": True}}, "alone"),
        ({"c00000/centre": {"may_represent": False}}, "alone"),
        ({"c00000/bytes": {"may_be_served_by": []}}, "alone"),
        ({"c00000/bytes": {"may_be_served_by": ["c00000/centre"]}}, "joined"),
        ({"c00000/bytes": {"share_group": "x"}}, "alone"),
        ({"*": {"share_group": "x"}}, "joined"),
    ],
)
def test_consent_of_the_plan_or_of_a_new_policy(fleet, tmp_path, rules, fate):
    policy = policy_from(rules)
    kept = write_plan_of(tmp_path / "a", fleet, centres(fleet, 1), consent=Consent("all", policy))
    assert (
        ao.assign(kept, named(fleet, "c00000/bytes"), out=tmp_path / "b").assigned[0].fate == fate
    )
    plan = write_plan_of(tmp_path / "c", fleet, centres(fleet, 1))
    (tmp_path / "policy.json").write_text(json.dumps(rules))
    given = {"out": tmp_path / "d", "policy": tmp_path / "policy.json"}
    assert ao.assign(plan, named(fleet, "c00000/bytes"), **given).assigned[0].fate == fate
    assert read_plan(tmp_path / "d").options == Consent("all", policy).to_dict()


def test_a_private_newcomer_serves_nobody_later(fleet, tmp_path):
    plan = write_plan_of(tmp_path / "plan", fleet, centres(fleet, 1))
    (tmp_path / "p.csv").write_text("tenant,private\nc00001/centre,true\n")
    both = named(fleet, "c00001/centre", "c00001/bytes")
    report = ao.assign(plan, both, out=tmp_path / "b", policy=tmp_path / "p.csv")
    assert [item.fate for item in report.assigned] == ["alone", "alone"]
    assert [item.reason for item in report.assigned] == [
        "nothing that may serve it is near enough",
        "private",
    ]
    third = ao.assign(tmp_path / "b", named(fleet, "c00001/refactored"), out=tmp_path / "c")
    assert third.assigned[0].by == assigned(report)["c00001/bytes"].by


def test_a_policy_that_the_plan_breaks_is_refused(fleet, tmp_path):
    plan = write_plan_of(tmp_path / "plan", fleet, {"c00000/centre": ["c00000/member0"]})
    policy = tmp_path / "policy.csv"
    policy.write_text("tenant,private\nc00000/member0,true\n")
    new = named(fleet, "c00000/bytes")
    with pytest.raises(IncompatibleError, match="'c00000/member0' must not be served"):
        ao.assign(plan, new, out=tmp_path / "b", policy=policy)
    policy.write_text("tenant,private\nsomebody,true\n")
    with pytest.raises(IncompatibleError, match=r"'somebody' \(line 2\)"):
        ao.assign(plan, new, out=tmp_path / "b", policy=policy)
    assert not (tmp_path / "b").exists()


def test_new_versions_of_tenants(fleet, tmp_path):
    """One that stays near, one that drifts off, one that finds another, one whose file serves."""
    served = {
        "c00000/centre": ["c00000/member0", "c00000/member1", "c00000/louder"],
        "c00001/centre": ["c00001/member0"],
        "c00002/centre": [],
    }
    plan = write_plan_of(tmp_path / "plan", fleet, served)
    new = {
        "c00000/member0": fleet.root / "c00000/refactored",
        "c00000/member1": fleet.root / "c00000/decoy",
        "c00000/louder": fleet.root / "c00001/member1",
        "c00001/centre": fleet.root / "c00001/member1",
        "c00002/centre": fleet.root / "c00002/member0",
    }
    report = ao.assign(plan, new, out=tmp_path / "plan2")
    fates = {name.partition("/")[2] + name[5]: x.fate for name, x in assigned(report).items()}
    assert fates == {
        "member00": "kept",
        "member10": "alone",
        "louder0": "joined",
        "centre1": "kept",  # by its own former file, which still serves another
        "centre2": "alone",  # its former file served nobody else
    }
    found, made = assigned(report), read_plan(tmp_path / "plan2")
    assert found["c00000/louder"].by == "of c00001/centre"
    assert found["c00000/member1"].before == "of c00000/centre"
    assert "of c00002/centre" not in made.representatives
    assert made.representatives["of c00000/centre"].members == ("c00000/centre", "c00000/member0")
    assert made.routes["c00002/centre"] == str(fleet.root / "c00002/member0")
    assert "of c00002/centre" not in {
        id for part in read_sketches(tmp_path / "plan2") for id in part.ids
    }
    changes = diff(read_plan(plan), made)
    assert [move.tenant for move in changes.moved] == [
        "c00000/louder",
        "c00000/member1",
        "c00002/centre",
    ]
    assert (report.drift["moved"], report.drift["kept"]) == (3, 2)


def test_the_same_version_again_changes_nothing(fleet, tmp_path):
    plan = write_plan_of(tmp_path / "plan", fleet, centres(fleet, 1))
    first = ao.assign(plan, named(fleet, "c00000/decoy", "c00000/bytes"), out=tmp_path / "b")
    again = ao.assign(
        tmp_path / "b", named(fleet, "c00000/decoy", "c00000/bytes"), out=tmp_path / "c"
    )
    assert [item.fate for item in again.assigned] == ["kept", "kept"]
    assert [item.by for item in again.assigned] == [item.by for item in first.assigned]
    assert diff(read_plan(tmp_path / "b"), read_plan(tmp_path / "c")).empty
    ids = [id for part in read_sketches(tmp_path / "c") for id in part.ids]
    assert sorted(ids) == sorted(read_plan(tmp_path / "c").representatives)


def test_a_file_that_serves_others_must_not_be_replaced(fleet, tmp_path):
    shutil.copytree(fleet.root, tmp_path / "own")
    own = Fleet(tmp_path / "own", fleet.tenants)
    plan = write_plan_of(tmp_path / "plan", own, {"c00000/centre": ["c00000/member0"]})
    shutil.rmtree(own.root / "c00000/centre")
    shutil.copytree(own.root / "c00000/decoy", own.root / "c00000/centre")
    with pytest.raises(IncompatibleError, match="serves 1 other tenants") as caught:
        ao.assign(plan, named(own, "c00000/centre"), out=tmp_path / "plan2")
    assert "cluster FLEET --previous PLAN" in str(caught.value)


def test_no_ops_broken_and_ineligible_ones(fleet, tmp_path):
    plan = write_plan_of(tmp_path / "plan", fleet, {"c00000/centre": ["c00000/member0"]})
    broken = tmp_path / "new/broken"
    shutil.copytree(fleet.root / "c00000/bytes", broken)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    write_peft(tmp_path / "new/dora", pairs(1, {"model.q": (8, 8)}, 2), use_dora=True)
    shutil.copytree(broken, tmp_path / "member0")
    new = [
        tmp_path / "new",
        *named(fleet, "c00000/no-op"),
        f"c00000/member0={tmp_path / 'member0'}",
    ]
    report = ao.assign(plan, new, out=tmp_path / "plan2")
    found, made = assigned(report), read_plan(tmp_path / "plan2")
    assert [(name, item.fate) for name, item in found.items()] == [
        ("broken", "failed"),
        ("c00000/member0", "failed"),
        ("c00000/no-op", "base"),
        ("dora", "alone"),
    ]
    assert made.routes["c00000/no-op"] is None
    assert made.excluded.keys() == {"broken"}
    assert made.served["c00000/member0"] == read_plan(plan).served["c00000/member0"]
    assert made.routes["dora"] == f"{tmp_path}/new/dora"
    assert report.failed == 2
    assert len(report.warnings) == 2
    for name, kind in (("broken", FormatError), ("dora", UnsupportedError)):
        with pytest.raises(kind):
            ao.assign(plan, tmp_path / "new" / name, out=tmp_path / "c", strict=True)


def test_bad_input(fleet, tmp_path):
    plan = write_plan_of(tmp_path / "plan", fleet, centres(fleet, 1), own=["c00000/centre"])
    one = named(fleet, "c00000/bytes")
    with pytest.raises(UsageError, match="no input"):
        ao.assign(plan, [], out=tmp_path / "b")
    with pytest.raises(UsageError, match="both of the tenant 'c00000/bytes'"):
        ao.assign(plan, one * 2, out=tmp_path / "b")
    with pytest.raises(UsageError, match=r"there are 1\d adapters"):
        ao.assign(plan, f"a={fleet.root / 'c00000'}", out=tmp_path / "b")
    with pytest.raises(FileError):
        ao.assign(plan, tmp_path / "nothing", out=tmp_path / "b")
    with pytest.raises(OutputExistsError):
        ao.assign(plan, one, out=plan, overwrite=True)
    with pytest.raises(FileError):
        ao.assign(tmp_path / "nothing", one, out=tmp_path / "b")
    document = json.loads((plan / "plan.json").read_text())
    for rep in document["representatives"].values():
        rep["path"] = "../outside"
    document["routes"] = dict.fromkeys(document["routes"], "../outside")
    (plan / "plan.json").write_text(json.dumps(document))
    with pytest.raises(FormatError, match="leads out of it"):
        ao.assign(plan, named(fleet, "c00003/decoy"), out=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_the_command_line(fleet, tmp_path):
    plan = write_plan_of(tmp_path / "plan", fleet, centres(fleet, 1))
    runner = CliRunner()
    new = str(fleet.root / "c00000/refactored")
    arguments = ["assign", str(plan), new, "-o", str(tmp_path / "b"), "--no-progress"]
    shown = runner.invoke(app, [*arguments, "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "1 joined an adapter that was there" in shown.stdout
    assert not (tmp_path / "b").exists()
    told = runner.invoke(app, [*arguments, "--json"])
    document = json.loads(told.stdout)
    assert document["schema"] == "adapterops.assign/1"
    assert document["assigned"][0]["tenant"] == "refactored"
    assert (
        json.loads((tmp_path / "b/adapterops.json").read_text())["assigned"] == document["assigned"]
    )
    (tmp_path / "bad.safetensors").write_bytes(b"no adapter")
    failed = runner.invoke(
        app, ["assign", str(plan), str(tmp_path / "bad.safetensors"), "-o", str(tmp_path / "c")]
    )
    assert failed.exit_code == 3
    assert "could not be assigned" in failed.stdout


def test_counters_add_up_over_plans(fleet, tmp_path):
    plan = write_plan_of(
        tmp_path / "plan", fleet, {"c00000/centre": ["c00000/member0"], "c00001/centre": []}
    )
    first = ao.assign(plan, named(fleet, "c00000/member1", "c00000/decoy"), out=tmp_path / "b")
    second = ao.assign(tmp_path / "b", named(fleet, "c00001/member0"), out=tmp_path / "c")
    errors = [x.error for r in (first, second) for x in r.assigned if x.fate == "joined"]
    drift = dict(second.drift)
    assert drift.pop("planned") == {
        "tenants": 3,
        "alone": 1,
        "mean_error": pytest.approx(fleet.tenants["c00000/member0"].error / 2),
    }
    assert drift.pop("mean_error") == pytest.approx(sum(errors) / 2)
    assert "a new plan may serve more by fewer" in drift.pop("hint")
    assert drift == {"assigned": 3, "kept": 0, "alone": 1, "moved": 0, "shared": 2}
    assert read_plan(tmp_path / "c").assigned == second.drift


@pytest.mark.parametrize(
    ("assigned", "alone", "said"),
    [(0, 0, ""), (9, 9, ""), (19, 19, ""), (20, 9, ""), (30, 20, "67%"), (101, 1, "101 were")],
)
def test_when_to_plan_again(assigned, alone, said):
    planned = {"tenants": 1000, "alone": 300, "mean_error": 0.1}
    text = hint({"planned": planned, "assigned": assigned, "alone": alone})
    assert (said in text) if said else (text == "")


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


def one_of_many(name, consent, layout, sketch):
    """A newcomer with the sketch of everybody else."""
    found = Signature("ok", norm=1.0, layout=layout, sketch=sketch, content=f"content of {name}")
    place = f"/new/{name}"
    return Newcomer(Tenant(name, place, place), found, partition_key(found, name, {}, consent))


@given(CONSENTS, st.floats(0, 0.25), st.permutations(NAMES), st.integers(0, 7))
def test_weights_go_nowhere_without_consent(consent, error, names, split):
    """Whatever the order and the errors; the first few are there already, each by its own."""
    layout = Layout(("m",), ((9, 9),), 2)
    sketch = np.full((1, 2, 2), 0.5, np.float16)

    def verify(rep, tenants):
        return {name: Error(error, 0.0, error, 1.0, ("m", 0.0), None, 1.0, 0.0) for name in tenants}

    plan = Plan("FLEET", SEED, 0.2, "frobenius", consent.to_dict(), {}, {})
    sketched = ()
    for part in (names[:split], names[split:]):
        items = [one_of_many(name, consent, layout, sketch) for name in part]
        found = assign(plan, sketched, items, consent, verify)
        plan, sketched = found.plan, found.sketched
    assert sorted(plan.served) == NAMES
    assert sorted(x for rep in plan.representatives.values() for x in rep.members) == NAMES
    for rep in plan.representatives.values():
        for server in rep.holds:
            assert all(consent.may_be_served_by(member, server) for member in rep.members)
        if len({*rep.members, *rep.holds}) > 1:
            assert not any(consent.policy.rule(x).private for x in (*rep.members, *rep.holds))
    for name, served in plan.served.items():
        assert served.error <= consent.bound(name, 0.2)
    check_consent(plan, consent, 0.2)
    if error == 0.0 and not consent.policy.rules and consent.policy.default == Rule():
        assert len(plan.representatives) == 1
