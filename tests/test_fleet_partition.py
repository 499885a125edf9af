"""Who can be compared with whom, and names of bases that mean one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from adapterops.errors import FileError, FormatError
from adapterops.fleet.consent.policy import Consent, policy_from
from adapterops.fleet.grouping.aliases import read_aliases
from adapterops.fleet.grouping.partition import partitions
from adapterops.fleet.types import Layout, Record, Status, Tenant

Q, V, OUT = ("q", (8, 8)), ("v", (4, 8)), ("o", (8, 8))


@dataclass(frozen=True)
class Index:
    records: Sequence[Record]
    layouts: Sequence[Layout]


def layout(*modules: tuple[str, tuple[int, int]]) -> Layout:
    return Layout(tuple(stem for stem, _ in modules), tuple(shape for _, shape in modules), 16)


LAYOUTS = [
    layout(OUT, Q, V),
    layout(Q),
    layout(V),
    layout(("q", (16, 16)), V),
    layout(("q", (16, 16))),
    layout(("other", (3, 3))),
]


def record(
    name: str,
    layout: int = 0,
    *,
    base: str = "tiny/base",
    dialect: str = "peft",
    extras: str = "",
    status: Status = "ok",
    content: str = "",
) -> Record:
    tenant = Tenant(name, name, f"/{name}")
    return Record(
        tenant=tenant,
        version="1",
        status=status,
        reason="",
        content=content or name,
        extras=extras,
        base=base,
        dialect=dialect,
        dtype="F16",
        size=1,
        rank=4,
        needed=(4, 4),
        norm=1.0,
        layout=layout if status == "ok" else -1,
        row=0 if status == "ok" else -1,
    )


def split(
    *records: Record, aliases: dict[str, str] | None = None, consent: Consent | None = None
) -> list[str]:
    found = partitions(Index(records, LAYOUTS), aliases or {}, consent or Consent("all"))
    return [" ".join(one.tenant.name for one in part.records) for part in found]


@pytest.mark.parametrize(
    "other",
    [{"base": "tiny/other"}, {"dialect": "kohya"}, {"extras": "ab12"}, {"base": ""}],
    ids=["base", "dialect", "extras", "no-base"],
)
def test_what_keeps_tenants_apart(other: dict[str, str]) -> None:
    assert sorted(split(record("a"), record("b", **other), record("c"))) == ["a c", "b"]  # type: ignore[arg-type]


def test_only_tenants_with_a_change_are_in_a_partition() -> None:
    others = [record(status, status=status) for status in ("no-op", "ineligible", "broken")]
    assert split(*others) == [] and split(record("a"), *others) == ["a"]


def test_target_modules_may_differ_and_shapes_may_not() -> None:
    found = split(*(record(f"t{number}", number) for number in range(6)))
    assert found == ["t0 t1 t2", "t3 t4", "t5"]
    # Whichever comes first, the widest adapters decide which shapes belong together.
    assert split(record("a", 4), record("b", 2), record("c", 1), record("d", 0)) == ["b c d", "a"]


def test_names_of_one_base() -> None:
    records = [record("a"), record("b", base="/models/base"), record("c", base="")]
    assert split(*records, aliases={"/models/base": "tiny/base"}) == ["c", "a b"]
    assert split(*records, aliases={"/models/base": "tiny/base", "": "tiny/base"}) == ["a b c"]


def test_policy_divides() -> None:
    rules = [
        {"tenant": "a", "share_group": "x"},
        {"tenant": "b", "share_group": "x"},
        {"tenant": "c", "private": True},
        {"tenant": "d", "private": True},
    ]
    consent = Consent("all", policy_from(rules))
    assert split(*map(record, "edcba"), consent=consent) == ["e", "a b", "c", "d"]


def test_keys_are_distinct_and_say_why() -> None:
    records = [
        record("a"),
        record("b", 3),
        record("c", base=""),
        record("d", extras="0123456789"),
        record("e", dialect="kohya"),
    ]
    found = partitions(Index(records, LAYOUTS), {}, Consent("all"))
    assert len({part.key for part in found}) == 5
    words = {part.records[0].tenant.name: part.why for part in found}
    assert words["a"] == "base 'tiny/base', peft, set 1 of 2 of module shapes"
    assert words["b"] == "base 'tiny/base', peft, set 2 of 2 of module shapes"
    assert words["c"] == "no base named, peft"
    assert words["d"] == "base 'tiny/base', peft, extras 01234567"
    assert {len(part.key) for part in found} == {6}


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "aliases"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        "x,a/base\n y , a/base\n",
        "name,canonical\r\nx,a/base\r\n\r\n# a remark\r\ny,a/base\r\n",
        '\ufeffx,a/base\n"y","a/base"',
        json.dumps({"a/base": ["x", "y"]}),
        "y,x\nx,a/base\nx,a/base\n",
    ],
    ids=["lines", "header-and-remarks", "mark-and-quotes", "json", "chain"],
)
def test_forms_of_the_file(tmp_path: Path, text: str) -> None:
    assert read_aliases(written(tmp_path, text)) == {"x": "a/base", "y": "a/base"}


def test_more_forms(tmp_path: Path) -> None:
    assert read_aliases(written(tmp_path, ",a/base")) == {"": "a/base"}
    assert read_aliases(written(tmp_path, '{"a": "b", "c": ["d"]}')) == {"b": "a", "d": "c"}
    assert read_aliases(written(tmp_path, "")) == {}
    assert read_aliases(written(tmp_path, '"a,b",c')) == {"a,b": "c"}
    assert read_aliases(written(tmp_path, "a,a\nb,a")) == {"a": "a", "b": "a"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x\n", "line 1 is 'x'"),
        ("a,b\nx,y,z\n", "line 2 is 'x,y,z'"),
        ("a,b\nx,\n", "line 2 is 'x,'"),
        ('a,b\n"x,y\n', "line 2"),
        ("x,a\nx,b\n", "'x' stands for 'a' and for 'b'"),
        ("x,y\ny,z\nz,x\n", "'x' -> 'y' -> 'z' -> 'x'"),
        ('{"a": ["x"], "b": ["x"]}', "'x' stands for 'a' and for 'b'"),
        ('{"a": [1]}', "'a' has"),
        ('{"a": {"b": ["c"]}}', "'a' has"),
        ('{"a": ["b"]', "is no JSON"),
        ("{" * 100_000, "is no JSON"),
        (b"\xff\xfe", "is no UTF-8"),
    ],
    ids=[
        "one-cell",
        "three-cells",
        "no-canonical",
        "open-quote",
        "two-meanings",
        "circle",
        "two-meanings-json",
        "numbers",
        "nested",
        "cut-off",
        "deep",
        "binary",
    ],
)
def test_what_is_no_list_of_aliases(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(FormatError) as caught:
        read_aliases(path)
    assert message in str(caught.value) and caught.value.path == str(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file"):
        read_aliases(tmp_path / "none")
