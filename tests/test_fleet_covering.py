"""Families of near copies, of which few may serve: whoever those may not serve is not lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest

from adapterops.errors import FormatError
from adapterops.fleet.consent.policy import Consent, policy_from
from adapterops.fleet.grouping.covering import covered
from adapterops.fleet.grouping.groups import Grouped
from adapterops.fleet.grouping.partition import Partition
from adapterops.fleet.grouping.sets import Sets, set_of
from adapterops.fleet.grouping.vectors import Vectors
from adapterops.fleet.types import Record, Tenant
from adapterops.fleet.verifying.exact import Error, Result
from adapterops.stream import Compute

Serves = Callable[[int, int], bool]


def family(count: int, consent: Consent) -> tuple[Sets, Vectors]:
    """Tenants whose sketches say that they are copies of each other."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal(64) + 1e-5 * rng.standard_normal((count, 64))
    sizes = np.linalg.norm(rows, axis=1)
    records = tuple(
        Record(
            Tenant(f"t{n:03}", "", f"t{n:03}"), "", "ok", "", f"c{n}", "", "", "peft", "F16", 1, 1,
            (1, 1), float(sizes[n]), 0, n,
        )
        for n in range(count)
    )  # fmt: skip
    rows = rows / sizes[:, None]
    vectors = Vectors(rows.astype("f4"), sizes, np.square(rows).reshape(count, 1, 64).sum(2), 8)
    return set_of(Partition(records, ("",) * 6, ""), consent), vectors


def cover(count: int, serves: Serves, consent: Consent | None = None) -> tuple[Grouped, int]:
    """The groups where files say who may serve whom, and how many pairs were asked for."""
    each, vectors = family(count, consent or Consent("all"))
    asked = []

    def compare(files: Sequence[tuple[str, Sequence[str]]]) -> Iterable[list[Result]]:
        for server, served in files:
            pairs = [(int(server[1:]), int(name[1:])) for name in served]
            asked.extend(pairs)
            off = [1e-4 if serves(*pair) else 0.5 for pair in pairs]
            yield [Error(x, 0.0, x, 1.0, ("", 0.0), None, 1.0, 0.0) for x in off]

    found = covered(each, lambda _: vectors, None, 0.2, Compute(), compare, lambda item: item.error)
    members = [member for group in found.groups for member in group.errors]
    assert sorted(members) == list(range(count))
    for group in found.groups:
        assert all(m == group.center or serves(group.center, m) for m in group.errors)
    return found, len(asked)


def test_one_serves_a_family() -> None:
    found, asked = cover(300, lambda j, i: True)
    assert [group.center for group in found.groups] == [0] and asked == 299


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_a_family_that_files_show_to_be_several(parts: int) -> None:
    found, asked = cover(300, lambda j, i: j % parts == i % parts)
    assert parts <= len(found.groups) <= 2 * parts and asked < 300 * 8


def test_strangers_who_look_like_copies_end_alone() -> None:
    found, asked = cover(200, lambda j, i: False)
    assert len(found.groups) == 200 and asked < 200 * 12


def test_consent_counts_within_a_family() -> None:
    """The smallest may not represent, and only one may serve one who names whom it accepts."""
    rules = {f"t{n:03}": {"may_represent": False} for n in range(20)}
    rules["t100"] = {"may_be_served_by": ["t030"]}
    found, _ = cover(200, lambda j, i: True, Consent("all", policy_from(rules)))
    assert [group.center for group in found.groups] == [30]


def test_who_could_not_be_measured_is_said() -> None:
    each, vectors = family(3, Consent("all"))
    nothing = np.zeros_like(vectors.sketches), np.zeros(3), np.zeros((3, 1))
    bad = Vectors(*nothing, vectors.side, {1: FormatError("is broken")})
    found = covered(each, lambda _: bad, None, 0.2, Compute(), lambda _: [], lambda e: e.error)
    assert found.failed.keys() == {1} and len(found.groups) == 3
