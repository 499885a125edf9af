"""assign: whatever the order, the errors and the options, weights go only where agreed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import adapterops as ao
from adapterops.errors import (
    IncompatibleError,
)
from adapterops.fleet.consent.policy import Consent, Rule, policy_from
from adapterops.fleet.plans.plan import Plan
from adapterops.fleet.plans.planfile import read_plan
from adapterops.fleet.plans.standing import check_consent
from adapterops.fleet.replanning.assign import assign
from adapterops.fleet.replanning.joining import Newcomer
from adapterops.fleet.replanning.newcomers import partition_key
from adapterops.fleet.types import Layout, Signature, Tenant
from adapterops.fleet.verifying.exact import Error
from tests.assigning import KINDS, SEED, assigned, centres, named, write_plan_of
from tests.planted import Fleet, plant
from tests.policies import CONSENTS, NAMES


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Fleet:
    """Clusters at errors of 0.02, 0.05, 0.1, 0.2, 0.35 and 0.5 from their centres."""
    return plant(tmp_path_factory.mktemp("planted"), 6, members=2, kinds=(*KINDS, "no-op"))


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
    assert read_plan(tmp_path / "d").options == {**Consent("all", policy).to_dict(), "removed": []}


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
