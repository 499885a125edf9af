"""Groups verified pair by pair: everyone ends up in exactly one, whatever verification refuses."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from adapterops.errors import AdapterOpsError, FormatError
from adapterops.fleet.grouping.graph import graph
from adapterops.fleet.grouping.groups import Group, Node, verified_groups
from adapterops.fleet.grouping.sets import placed
from adapterops.fleet.types import Layout, Record, Signature, Tenant
from adapterops.fleet.verifying.exact import Error, Result


def node(number: int) -> Node:
    tenant = Tenant(f"t{number}", f"t{number}", f"t{number}")
    return Node(
        (
            Record(
                tenant, "", "ok", "", f"c{number}", "", "", "peft", "F16", 1, 1, (1, 1), 1.0, 0, 0
            ),
        )
    )


def error(value: float) -> Error:
    return Error(value, 0.0, value, 1.0, ("", 0.0), None, 1.0, 0.0)


def grouped(
    count: int, edges: Iterable[tuple[int, int]], wrong: dict[tuple[int, int], Result]
) -> list[Group]:
    """Groups at a bound of 0.2: each edge is verified at 0.1, those of `wrong` as they say."""
    centers, members = np.array(sorted(edges)).T

    def compare(files: Sequence[tuple[str, Sequence[str]]]) -> Iterable[list[Result]]:
        for server, served in files:
            pairs = [(int(server[1:]), int(name[1:])) for name in served]
            yield [wrong.get(pair, error(0.1)) for pair in pairs]

    found = verified_groups(
        [node(n) for n in range(count)],
        graph(count, centers, members, np.full(len(centers), 0.1)),
        np.full(count, 0.2),
        compare,
        lambda item: item.error,
    )
    return list(found.groups)


def members_of(groups: Sequence[Group]) -> list[int]:
    return sorted(member for group in groups for member in group.errors)


def test_who_begins_to_serve_others_leaves_the_group_that_served_it() -> None:
    """t2 is refused by t0 and served by t1, which t0 served until then."""
    groups = grouped(3, [(0, 1), (0, 2), (1, 2)], {(0, 2): error(0.5)})
    assert {group.center: sorted(group.errors) for group in groups} == {0: [0], 1: [1, 2]}


@pytest.mark.parametrize("seed", range(60))
def test_everyone_is_in_one_group_and_within_the_bound(seed: int) -> None:
    choose = random.Random(seed)
    count = choose.randint(2, 14)
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    edges = [pair for pair in pairs if choose.random() < 0.5] or pairs[:1]
    wrong: dict[tuple[int, int], Result] = {
        pair: error(0.5) if choose.random() < 0.8 else FormatError("broken")
        for pair in edges
        if choose.random() < 0.4
    }
    groups = grouped(count, edges, wrong)
    assert members_of(groups) == list(range(count))
    for group in groups:
        assert group.center in group.errors
        for member, found in group.errors.items():
            refused = wrong.get((group.center, member))
            assert not isinstance(refused, AdapterOpsError) and found.error <= 0.2
            assert member == group.center or (group.center, member) in edges


def test_a_sketch_over_the_modules_of_another_layout() -> None:
    onto = Layout(("a", "b", "c"), ((9, 9),) * 3, 2)
    blocks = np.arange(32.0).reshape(2, 4, 4)
    own = Signature("ok", layout=Layout(("b", "z"), ((9, 9),) * 2, 4), sketch=blocks)
    found = placed(own, onto).reshape(3, 2, 2)
    assert not found[[0, 2]].any() and np.array_equal(found[1], 2 * blocks[0, :2, :2])
    assert placed(Signature("no-op"), onto).tolist() == [0.0] * 12
