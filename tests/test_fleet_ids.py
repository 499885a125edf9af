"""Ids of representatives: never empty, never two alike."""

from __future__ import annotations

import dataclasses

from adapterops.fleet.consent.policy import Consent
from adapterops.fleet.indexing.opened import Fleet
from adapterops.fleet.planning.drafting import Draft
from adapterops.fleet.plans.ids import fresh
from adapterops.fleet.types import Record, Tenant


def test_files_that_were_not_read_have_ids_of_their_own(tmp_path):
    """Pickles that nobody allowed have no content hash; each is a tenant's own adapter."""
    record = Record(
        Tenant("a", "a", "a"), "", "ineligible", "a pickle", "", "", "", "", "", 1, 0, (0, 0), 0.0
    )
    other = dataclasses.replace(record, tenant=Tenant("b", "b", "b"))
    fleet = Fleet("f", 0, (record, other), (), frozenset(), frozenset(), {}, {}, {})
    draft = Draft(fleet, Consent(), tmp_path, "representatives")
    draft.add_others((), strict=False)
    assert {name: item.by for name, item in draft.served.items()} == {
        "a": "unread",
        "b": "unread-2",
    }
    plan = draft.plan(
        max_error=0.2,
        metric="frobenius",
        options={},
        discovery=0.05,
        pareto=(),
        gain={},
        related=(),
    )
    assert plan.options["adapters_before"] == 2


def test_numbers_go_on_until_one_is_free():
    assert fresh("x", ()) == "x"
    assert fresh("x", {"x", "x-2"}) == "x-3"
