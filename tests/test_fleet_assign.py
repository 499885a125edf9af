"""assign: what a plan does for newcomers, by exact errors of files that were planted."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner

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
from adapterops.fleet.indexing.store import Store
from adapterops.fleet.plans.plandiff import diff
from adapterops.fleet.plans.planfile import read_plan, read_sketches
from adapterops.fleet.replanning import assign as assigning
from adapterops.fleet.replanning.drifted import hint
from tests.assigning import KINDS, SEED, assigned, centres, named, write_plan_of
from tests.planted import Fleet, plant
from tests.support import pairs, write_peft


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Fleet:
    """Clusters at errors of 0.02, 0.05, 0.1, 0.2, 0.35 and 0.5 from their centres."""
    return plant(tmp_path_factory.mktemp("planted"), 6, members=2, kinds=(*KINDS, "no-op"))


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
    assert [text.split(":")[0] for text in report.warnings[1:]] == ["broken", "c00000/member0"]
    for name, kind in (("broken", FormatError), ("dora", UnsupportedError)):
        with pytest.raises(kind):
            ao.assign(plan, tmp_path / "new" / name, out=tmp_path / "c", strict=True)


def test_who_left_since_is_not_taken_back_and_serves_nobody(fleet, tmp_path):
    with Store.create(tmp_path / "index", SEED) as store:
        store.put([])
        store.forget(["c00000/bytes", "gone"])
    planned = {"c00000/centre": ["c00000/member0"]}
    plan = write_plan_of(
        tmp_path / "plan", fleet, planned, index=tmp_path / "index", removed=["earlier"]
    )
    report = ao.assign(plan, named(fleet, "c00000/member1"), out=tmp_path / "a")
    assert not report.warnings
    assert read_plan(tmp_path / "a").options["removed"] == ["c00000/bytes", "earlier", "gone"]
    with pytest.raises(IncompatibleError, match="'c00000/bytes' was off-boarded"):
        ao.assign(plan, named(fleet, "c00000/bytes"), out=tmp_path / "b")
    with Store.open(tmp_path / "index") as store:
        store.forget(["c00000/centre"])
    with pytest.raises(IncompatibleError, match="still holds weights of c00000/centre,"):
        ao.assign(plan, named(fleet, "c00000/member1"), out=tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("index", "said"),
    [("nothing", "no such index"), ("other", "has the seed 8"), ("damaged", "is damaged")],
)
def test_an_index_that_cannot_be_read_is_warned_of(fleet, tmp_path, index, said):
    with Store.create(tmp_path / "other", SEED + 1):
        pass
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "fleet.sqlite").write_bytes(b"no database at all" * 100)
    plan = write_plan_of(
        tmp_path / "plan", fleet, centres(fleet, 1), index=tmp_path / index, removed=["earlier"]
    )
    report = ao.assign(plan, named(fleet, "c00000/bytes"), out=tmp_path / "b")
    [warning] = report.warnings
    assert said in warning and "off-boarded since is not known" in warning
    assert read_plan(tmp_path / "b").options["removed"] == ["earlier"]


def test_many_that_nothing_serves_are_found_by_later_ones(fleet, tmp_path, monkeypatch):
    """Sketches of newcomers are put together as they become many, and each still finds its own."""
    plan = write_plan_of(tmp_path / "plan", fleet, {"c00005/decoy": []})
    sizes = []

    def asked(parts, more):
        found = grown(parts, more)
        sizes.append([len(one.part.ids) for one in found])
        return found

    grown = assigning.grown
    monkeypatch.setattr(assigning, "grown", asked)
    twins = [f"c{n:05d}/refactored" for n in range(6)]
    copied = {name: fleet.tenants[name].copy_of for name in twins}
    alone = [*copied.values(), *(f"c{n:05d}/decoy" for n in range(5))]
    report = ao.assign(plan, named(fleet, *alone, *twins), out=tmp_path / "b")
    found = assigned(report)
    assert {name: item.fate for name, item in found.items()} == {
        **dict.fromkeys(alone, "alone"),
        **dict.fromkeys(twins, "joined"),
    }
    assert sizes[-1] == [8, 2, 1]
    for name, other in copied.items():
        assert found[name].by == found[other].by


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
    with pytest.raises(UsageError, match="not UTF-8"):
        ao.assign(plan, {"\udcff": fleet.root / "c00000/bytes"}, out=tmp_path / "b")
    document = json.loads((plan / "plan.json").read_text())
    document["options"]["removed"] = ["c00000/bytes"]
    (plan / "plan.json").write_text(json.dumps(document))
    with pytest.raises(IncompatibleError, match="'c00000/bytes' was off-boarded"):
        ao.assign(plan, {"c00000/bytes": fleet.root / "c00000/bytes"}, out=tmp_path / "b")
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
