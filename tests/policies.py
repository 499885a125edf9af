"""Policies and consents as hypothesis draws them, over seven tenants and two share groups."""

from __future__ import annotations

from hypothesis import strategies as st

from adapterops.fleet.consent.policy import Consent, Policy, Rule

NAMES = [f"t{index}" for index in range(7)]
GROUPS = ["", "red", "blue"]
ENTRIES = st.one_of(
    st.none(),
    st.lists(st.sampled_from([*NAMES, "group:red", "group:blue"]), max_size=3, unique=True),
)
RULES = st.builds(
    Rule,
    private=st.booleans(),
    share_group=st.sampled_from(GROUPS),
    may_represent=st.booleans(),
    may_be_served_by=ENTRIES.map(lambda names: None if names is None else tuple(names)),
)
CONSENTS = st.builds(
    Consent,
    st.sampled_from(["none", "group", "all"]),
    st.builds(Policy, st.dictionaries(st.sampled_from(NAMES), RULES), RULES),
)
