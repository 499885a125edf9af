"""Policies: their grammar, and that no option lets weights go where a tenant did not agree."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterops.errors import FileError, FormatError, IncompatibleError, UsageError
from adapterops.fleet.consent.policy import (
    NEAR_EXACT,
    Consent,
    Policy,
    Rule,
    consent_from,
    policy_from,
    read_policy,
)
from tests.policies import CONSENTS, NAMES

HEADER = "tenant,private,share_group,may_represent,may_be_served_by\n"


def written(tmp_path, text, name="policy.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_csv_and_json_say_the_same(tmp_path):
    rows = "acme,TRUE,,,\nnorth,,retail,,\nsouth,False,retail,false, north ; group:retail\n"
    rules = {
        "acme": Rule(private=True),
        "north": Rule(share_group="retail"),
        "south": Rule(False, "retail", False, ("north", "group:retail")),
    }
    listed = [
        {"tenant": "acme", "private": True},
        {"tenant": "north", "share_group": "retail", "may_represent": None},
        {
            "tenant": "south",
            "private": "false",
            "share_group": "retail",
            "may_represent": False,
            "may_be_served_by": ["north", "group:retail"],
        },
    ]
    named = {row["tenant"]: {k: v for k, v in row.items() if k != "tenant"} for row in listed}
    assert read_policy(written(tmp_path, HEADER + rows)).rules == rules
    assert read_policy(written(tmp_path, json.dumps(listed), "a.json")).rules == rules
    assert read_policy(written(tmp_path, json.dumps(named), "b")).rules == rules


def test_bom_crlf_quotes_blank_lines_and_any_order_of_columns(tmp_path):
    text = '\ufeff\r\nshare_group,tenant\r\n\r\nr,"a,b"\r\n,c\r\n'
    policy = read_policy(written(tmp_path, text))
    assert policy.rules == {"a,b": Rule(share_group="r"), "c": Rule()}


def test_the_star_row_is_the_default_of_every_column(tmp_path):
    text = HEADER + "*,true,g,false,a\na,false,,true,\nb,,,,*\nc,false,h,,group:h\n"
    policy = read_policy(written(tmp_path, text))
    assert policy.rule("unheard of") == Rule(True, "g", False, ("a",))
    assert policy.rule("a") == Rule(False, "g", True, ("a",))
    assert policy.rule("b") == Rule(True, "g", False, None)
    assert policy.rule("c") == Rule(False, "h", False, ("group:h",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: the header has no column 'tenant'"),
        ("name,private\na,true\n", "line 1: unknown column 'name'"),
        ("tenant,private,private\n", "line 1: column 'private' stands twice"),
        ("private\ntrue\n", "line 1: the header has no column 'tenant'"),
        (HEADER + "a,,,,\nb,yes,,,\n", "line 3: private of 'b' is 'yes'"),
        (HEADER + "a,,,1,\n", "line 2: may_represent of 'a' is '1'"),
        (HEADER + "a,true\n", "line 2: has 2 fields, the header 5"),
        (HEADER + ",true,,,\n", "line 2: names no tenant"),
        (HEADER + "a,,,,\n\nb,,,,\na,true,,,\n", "line 5: tenant 'a' has a row already, at line 2"),
        (HEADER + "*,,,,\n*,,,,\n", "line 3: tenant '*' has a row already"),
        (HEADER + "a,,,,*;b\n", "line 2: may_be_served_by of 'a' lists '*', which is anyone"),
        (HEADER + "a,,,,group:x\n", "line 2: may_be_served_by names 'group:x', a share group that"),
        (HEADER + "*,,,,group:x\n", "row '*': may_be_served_by names 'group:x'"),
        (
            HEADER + "a,,g,,b\nb,,h,,\n",
            "line 2: 'a' (share group 'g') may be served by 'b' (share group 'h')",
        ),
        (HEADER + "a,,,,group:h\nb,,h,,\n", "line 2: 'a' (no group) may be served by 'group:h'"),
        (HEADER + 'a,"tr"ue,,,\n', "line 2: "),
        (b"tenant\n\xff\n", "is not UTF-8"),
        ('[{"tenant": "a"}, {"tenant": "b", "privat": true}]', "entry 2: unknown column 'privat'"),
        ('[{"tenant": "a", "private": 1}]', "entry 1: private of 'a' is 1"),
        ('[{"tenant": "a", "share_group": ["x"]}]', "entry 1: share_group of 'a' is ['x']"),
        ('[{"tenant": "a", "may_be_served_by": [1]}]', "entry 1: may_be_served_by of 'a' is [1]"),
        ('[{"tenant": "a", "may_be_served_by": {}}]', "entry 1: may_be_served_by of 'a' is {}"),
        ('[{"private": true}]', "entry 1: names no tenant"),
        ("[3]", "entry 1: is 3, not an object"),
        ('{"a": {}, "a": {}}', "the key 'a' stands twice"),
        ('{"a": {"tenant": "b"}}', "entry 'a': names its tenant twice"),
        ('{"a":\n{', "line 2: "),
        ("[" * 100_000, "nested too deeply"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value)[:40],
)
def test_what_is_no_policy_is_refused_with_its_place(tmp_path, text, said):
    with pytest.raises(FormatError) as caught:
        read_policy(written(tmp_path, text))
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_missing_file_and_an_unknown_option():
    with pytest.raises(FileError, match="cannot be read"):
        read_policy("nowhere.csv")
    with pytest.raises(UsageError, match="none, group or all"):
        Consent("some")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("a,,,,\nzed,,,,\n", "names tenants that the fleet does not have: 'zed' (line 3)"),
        ("a,,,,zed\n", "line 2: may_be_served_by of 'a' names 'zed', which is no tenant"),
        ("*,,,,zed\n", "may_be_served_by of '*' names 'zed'"),
        ("group:x,,x,,\na,,x,,group:x\n", "line 3: may_be_served_by of 'a' names 'group:x', which"),
    ],
)
def test_names_that_the_fleet_does_not_have(tmp_path, rows, said):
    policy = read_policy(written(tmp_path, HEADER + rows))
    with pytest.raises(IncompatibleError) as caught:
        policy.check(["a", "b", "group:x"])
    assert said in str(caught.value)
    assert caught.value.exit_code == 4


def test_many_unknown_tenants_are_counted(tmp_path):
    policy = read_policy(written(tmp_path, "tenant\n" + "".join(f"t{n}\n" for n in range(9))))
    with pytest.raises(IncompatibleError, match=r"'t4' \(line 6\) and 4 more"):
        policy.check([])


def test_sharing_by_default_is_for_duplicates_only():
    for sharing, bounds in {
        "none": [0.0, NEAR_EXACT, NEAR_EXACT],
        "group": [0.0, 0.2, NEAR_EXACT],
        "all": [0.0, 0.2, 0.2],
    }.items():
        policy = policy_from({"p": {"private": True}, "g": {"share_group": "x"}})
        consent = Consent(sharing, policy)
        assert [consent.bound(name, 0.2) for name in "pgo"] == bounds
        assert consent.permissions("pgo").bounds(0.2).tolist() == bounds
        assert consent.bound("o", 1e-4) == 1e-4


@given(CONSENTS, st.data())
def test_a_private_tenant_shares_with_nobody(consent, data):
    permissions = consent.permissions(NAMES)
    members = np.array(data.draw(st.lists(st.integers(0, 6), min_size=2, unique=True)))
    blended = members[permissions.blend(members)]
    for index, name in enumerate(NAMES):
        if not consent.policy.rule(name).private:
            continue
        others = [other for other in NAMES if other != name]
        assert consent.bound(name, 0.5) == 0.0
        assert not consent.may_represent(name)
        assert not any(consent.may_be_served_by(name, other) for other in others)
        assert not any(consent.may_be_served_by(other, name) for other in others)
        assert consent.groups(NAMES).count(consent.key(name)) == 1
        assert permissions.allowed(index, np.arange(7)).sum() == 1
        assert index not in blended
        assert not (index in members and len(blended))


@pytest.mark.parametrize(
    ("sharing", "blended"),
    [("none", [False] * 3), ("group", [True, True, False]), ("all", [True, True, False])],
)
def test_averages_need_consent_to_differ(sharing, blended):
    rules = {"*": {"share_group": "x"}, "c": {"may_represent": False}}
    permissions = Consent(sharing, policy_from(rules)).permissions("abc")
    assert permissions.blend(np.arange(3)).tolist() == blended
    everyone = np.arange(3)
    assert [permissions.allowed(one, everyone).all() for one in range(3)] == [True, True, False]


@given(CONSENTS)
def test_arrays_say_what_single_questions_say(consent):
    permissions = consent.permissions(NAMES)
    single = [[consent.may_be_served_by(m, s) for m in NAMES] for s in NAMES]
    assert [permissions.allowed(s, np.arange(7)).tolist() for s in range(7)] == single
    assert permissions.differs.tolist() == [consent.may_differ(name) for name in NAMES]


@given(CONSENTS)
def test_weights_go_only_where_every_rule_agrees(consent):
    """The laws of the module, spelt out from the rules alone."""
    for server in NAMES:
        for member in set(NAMES) - {server}:
            giving, taking = consent.policy.rule(server), consent.policy.rule(member)
            entries = taking.may_be_served_by
            listed = (
                entries is None or server in entries or f"group:{giving.share_group}" in entries
            )
            agreed = (
                not (giving.private or taking.private)
                and giving.may_represent
                and giving.share_group == taking.share_group
                and listed
            )
            assert consent.may_be_served_by(member, server) == agreed


@given(CONSENTS, st.lists(st.integers(0, 6), min_size=2, unique=True))
def test_averages_hold_only_weights_that_may_serve_every_member(consent, members):
    permissions = consent.permissions(NAMES)
    chosen = np.array(members)
    blend = permissions.blend(chosen)
    expected = [
        consent.may_differ(NAMES[one])
        and consent.may_represent(NAMES[one])
        and all(consent.may_be_served_by(NAMES[other], NAMES[one]) for other in members)
        for one in members
    ]
    assert blend.tolist() == expected
    assert all(permissions.allowed(int(server), chosen).all() for server in chosen[blend])


@given(st.sampled_from(["none", "group", "all"]), st.data())
def test_a_plan_remembers_the_consent_it_was_made_with(sharing, data):
    entries = st.none() | st.lists(st.sampled_from([*NAMES, "group:red"]), unique=True).map(tuple)
    rules = st.builds(Rule, st.booleans(), st.just("red"), st.booleans(), entries)
    drawn = data.draw(st.dictionaries(st.sampled_from(NAMES), rules))
    consent = Consent(sharing, Policy(drawn, data.draw(rules)))
    assert consent_from(json.loads(json.dumps(consent.to_dict()))) == consent


def test_a_hundred_thousand_tenants_with_lists_are_arrays():
    names = [f"t{index:06}" for index in range(100_000)]
    rows = {name: {"may_be_served_by": [names[0], "group:g"]} for name in names[1:50_000]}
    rows |= {"*": {"share_group": "g"}, names[0]: {"share_group": "g"}}
    permissions = Consent("all", policy_from(rows)).permissions(names)
    assert permissions.limits.max() == 0
    assert permissions.allowed(0, np.arange(100_000)).all()
    assert permissions.allowed(7, np.arange(100_000)).all()


def test_a_tenant_without_a_group_under_a_default_with_one_is_remembered(tmp_path):
    policy = Policy({"a": Rule(), "b": Rule(share_group="g")}, Rule(share_group="g"))
    consent = Consent("group", policy)
    again = consent_from(json.loads(json.dumps(consent.to_dict())))
    assert again == consent and again.policy.rule("a").share_group == ""
    assert again.key("a") != again.key("b") == again.key("c")
    listed = '[{"tenant": "*", "share_group": "g"}, {"tenant": "a", "share_group": ""}]'
    read = read_policy(written(tmp_path, listed, "a.json"))
    assert read.rule("a") == Rule() and read.rule("c") == Rule(share_group="g")
    blank = read_policy(written(tmp_path, HEADER + "*,,g,,\na,,,,\n"))
    assert blank.rule("a") == Rule(share_group="g")
