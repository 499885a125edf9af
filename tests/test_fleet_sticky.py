"""Sticky planning and differences of plans, on fleets of plain vectors and by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterops.fleet.consent.policy import Consent, policy_from
from adapterops.fleet.plans.plan import Plan, Representative, Served
from adapterops.fleet.plans.plandiff import diff
from adapterops.fleet.replanning.sticky import exchanges, offers_of, place, survivors
from adapterops.render.fleet_diff import changes


def plan_of(groups, kinds=None, contents=None, holds=None, errors=None, traffic=None):
    """A plan with these members by id; what is not given is an adapter of the first member."""
    reps, served = {}, {}
    for id, members in groups.items():
        kind = (kinds or {}).get(id, "original" if len(members) == 1 else "medoid")
        reps[id] = Representative(
            id,
            kind,
            f"fleet/{id}",
            f"/fleet/{id}",
            tuple(members),
            (holds or {}).get(id, () if kind == "base" else (members[0],)),
            size=0 if kind == "base" else 100,
            content=(contents or {}).get(id, f"content of {members[0]}"),
        )
        for name in members:
            served[name] = Served(
                id, (errors or {}).get(name, 0.0), traffic=(traffic or {}).get(name, 1.0)
            )
    return Plan("FLEET", 0, 0.2, "frobenius", {}, served, reps)


def contents_of(names):
    return {name: f"content of {name}" for name in names}


OPEN = Consent("all")


def test_what_stands_is_what_nobody_left_and_nothing_changed():
    groups = {"m": "abc", "n": "def", "o": "g", "p": "hi", "z": "j"}
    plan = plan_of(
        groups,
        kinds={"n": "mean", "p": "minimax", "z": "base"},
        holds={"n": ("d", "e"), "p": ("h", "i")},
    )
    fleet = contents_of("abcdefghij") | {"d": "another", "g": "another"}
    found = survivors(plan, fleet, OPEN)
    assert list(found.kept) == ["m", "n", "p"]  # a built one does not hang on its tenants' files
    assert found.gone == {"o": "'g' has another adapter now"}
    assert survivors(plan, fleet, OPEN, removed={"i"}).gone == {
        "o": "'g' has another adapter now",
        "p": "holds weights of 'i', who left",
    }
    without = survivors(plan, {name: fleet[name] for name in "bcdfghij"}, OPEN)
    assert without.gone["m"] == "holds weights of 'a', who left"
    assert without.gone["n"] == "holds weights of 'e', who left"


def test_a_member_without_weights_in_it_leaves_no_trace():
    plan = plan_of({"m": "abc"})
    assert survivors(plan, contents_of("ab"), OPEN).kept["m"].members == ("a", "b")
    assert survivors(plan, contents_of("abc"), OPEN, removed={"c"}).kept["m"].members == ("a", "b")


@pytest.mark.parametrize(
    ("rules", "members"),
    [
        ({"a": {"private": True}}, "a"),
        ({"b": {"private": True}}, "ac"),
        ({"a": {"may_represent": False}}, "a"),
        ({"b": {"may_be_served_by": ["c"]}}, "ac"),
        ({"a": {"share_group": "x"}, "c": {"share_group": "x"}}, "ac"),
    ],
)
def test_consent_that_was_withdrawn_counts_at_once(rules, members):
    consent = Consent("all", policy_from(rules))
    kept = survivors(plan_of({"m": "abc"}), contents_of("abc"), consent).kept
    assert kept["m"].members == tuple(members)


def test_a_representative_nobody_may_use_goes():
    plan = plan_of({"m": "ab"}, kinds={"m": "mean"}, holds={"m": ("a", "b")})
    consent = Consent("all", policy_from({"a": {"private": True}}))
    assert survivors(plan, contents_of("ab"), consent).gone == {"m": "serves nobody any more"}


def test_tenants_try_what_serves_them_first_and_only_what_may():
    survival = survivors(plan_of({"m": "ab", "n": "c"}), contents_of("abcde"), OPEN)
    near = {"a": ["n", "m"], "d": ["n", "gone", "m"], "e": ["n", "m"]}
    consent = Consent("all", policy_from({"e": {"may_be_served_by": ["a"]}}))
    assert offers_of(survival, near, consent) == {
        "a": ["m", "n"],
        "b": ["m"],
        "c": ["n"],
        "d": ["n", "m"],
        "e": ["m"],
    }


def test_each_round_verifies_an_adapter_once_for_all_who_try_it():
    calls = []
    works = {("m", "a"): 1, ("n", "b"): 2, ("n", "c"): 3}

    def verify(asked):
        calls.append([(id, "".join(tenants)) for id, tenants in asked])
        return [{name: works.get((id, name)) for name in tenants} for id, tenants in asked]

    offers = {"d": [], "c": ["m", "n"], "b": ["m", "n"], "a": ["m"], "e": ["n", "m"]}
    placed = place(offers, verify)
    assert placed.found == {"a": ("m", 1), "b": ("n", 2), "c": ("n", 3)}
    assert placed.rest == ("d", "e")
    assert calls == [[("m", "abc"), ("n", "e")], [("m", "e"), ("n", "bc")]]


def test_a_gain_is_taken_only_where_it_is_worth_the_movement():
    before = dict.fromkeys("abcd", "m") | {"x": "p", "y": "q"}
    sticky = before | {"new": "new"}
    fresh = dict.fromkeys("abcd", "new") | {"new": "new", "x": "p", "y": "p"}
    assert exchanges(before, sticky, fresh, 0.3) == {"x", "y"}  # one adapter for one tenant
    assert exchanges(before, sticky, fresh, 0.2) == {*"abcdxy", "new"}  # one for four
    assert exchanges(before, sticky, fresh, 1.0) == set()
    assert exchanges(before, sticky, sticky, 0.0) == set()


def test_movement_that_happens_anyway_costs_nothing():
    before = {"a": "gone", "b": "gone", "c": "c"}
    sticky = {"a": "a", "b": "b", "c": "c"}
    fresh = {"a": "a", "b": "a", "c": "c"}
    assert exchanges(before, sticky, fresh, 5.0) == {"a", "b"}


LABELS = st.sampled_from("mnopq")
SERVED = st.dictionaries(st.sampled_from("abcdefgh"), st.tuples(LABELS, LABELS, LABELS))


@given(SERVED, st.floats(0, 2))
def test_exchanges_never_split_an_adapter_and_never_cost_more_than_they_save(served, cost):
    before, sticky, fresh = ({k: v[i] for k, v in served.items()} for i in range(3))
    taken = exchanges(before, sticky, fresh, cost)
    mixed = {name: (fresh if name in taken else sticky)[name] for name in served}
    for plan in (sticky, fresh):
        for label in set(plan.values()):
            members = {name for name in served if plan[name] == label}
            assert members <= taken or not members & taken
    saved = len(set(sticky.values())) - len(set(mixed.values()))
    moved = sum(mixed[k] != before[k] for k in served) - sum(sticky[k] != before[k] for k in served)
    assert not taken or saved > cost * max(moved, 0) - 1e-9
    assert saved >= 0


def test_a_vector_fleet_planned_again_keeps_everybody_within_bounds():
    """The pieces in the order that a planner uses them; errors are distances of plain vectors."""
    rng = np.random.default_rng(5)
    centres = rng.standard_normal((12, 40))
    names = [f"t{index:03}" for index in range(240)]
    own = {n: centres[i % 12] + 0.02 * rng.standard_normal(40) for i, n in enumerate(names)}
    old = names[:180]

    def error(id, name):
        return np.linalg.norm(own[id] - own[name]) / np.linalg.norm(own[name])

    plan = plan_of(
        {names[i]: names[i:180:12] for i in range(12)}, contents=contents_of(names), kinds={}
    )
    for name in (
        names[1],
        names[14],
        names[27],
    ):  # one whose file serves others, two who are served
        own[name] = rng.standard_normal(40)
    fleet = contents_of(names) | {names[1]: "another"}
    survival = survivors(plan, fleet, OPEN, removed={names[0]})
    assert list(survival.kept) == names[2:12]
    near = {n: sorted(survival.kept, key=lambda id: error(id, n))[:3] for n in names[1:]}

    def verify(asked):
        for id, tenants in asked:
            yield {n: e if (e := error(id, n)) <= 0.1 else None for n in tenants}

    placed = place(offers_of(survival, near, OPEN), verify)
    assert all(result <= 0.1 for _, result in placed.found.values())
    stayed = [name for name in old if placed.found.get(name, ("",))[0] == plan.served[name].by]
    assert len(stayed) == 180 - 30 - 2  # all but the groups of two that went and those who changed
    joined = [name for name in names[180:] if name in placed.found]
    assert len(joined) == 50
    assert set(placed.rest) == {n for i, n in enumerate(names) if i % 12 < 2 and i} | {
        names[14],
        names[27],
    }


def test_a_difference_names_who_moves_and_what_comes_and_goes():
    old = plan_of(
        {"m": "abc", "n": "d", "o": "ef"},
        kinds={"o": "mean"},
        errors={"b": 0.1},
        traffic={"d": 6.0},
    )
    new = plan_of(
        {"m": "abd", "o": "ef", "p": "g"},
        kinds={"o": "mean"},
        contents={"o": "rebuilt"},
        errors={"b": 0.1, "d": 0.15},
        traffic={"d": 6.0},
    )
    found = diff(old, new)
    assert (found.joined, found.left) == (("g",), ("c",))
    assert (found.added, found.removed, found.rebuilt) == (("p",), ("n",), ("o",))
    assert [(m.tenant, m.before, m.after, m.rebuilt) for m in found.moved] == [
        ("d", "n", "m", False),
        ("e", "o", "o", True),
        ("f", "o", "o", True),
    ]
    assert found.churn == 3 / 5
    assert found.churned_traffic == 8 / 10
    assert (found.before.adapters, found.after.adapters) == (3, 3)
    assert found.after.largest == 0.15
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["schema"] == "adapterops.plandiff/1"
    assert document["moved"][0]["error_after"] == 0.15
    text = changes(found)
    for part in ("3 tenants moved", "60 %", "80 %", "new adapters: 1, p", "15 %", "rebuilt"):
        assert part in text


def test_equal_plans_differ_in_nothing_even_if_files_lie_elsewhere():
    old = plan_of({"m": "ab", "base": "c"}, kinds={"base": "base"})
    reps = {id: replace(rep, path=f"x/{id}") for id, rep in old.representatives.items()}
    found = diff(old, replace(old, representatives=reps))
    assert found.empty
    assert found.churn == 0.0
    assert "as before" in changes(found)
    assert diff(plan_of({}), plan_of({})).churned_traffic == 0.0


def test_long_lists_are_cut_unless_all_is_asked_for():
    old = plan_of({f"r{i:03}": [f"t{i:03}"] for i in range(60)})
    new = plan_of({"all": [f"t{i:03}" for i in range(60)]})
    assert "and 40 more" in changes(diff(old, new))
    assert "and 55 more" in changes(diff(old, new))
    full = changes(diff(old, new), verbose=True)
    assert "more" not in full
    assert full.count("t059") == 1
