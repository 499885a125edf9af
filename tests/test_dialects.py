"""The table of what is supported is generated from the cases that the tests run on."""

from pathlib import Path

from adapterops.formats.kinds import KINDS
from tests.dialects import (
    DIFFUSERS,
    EXTRAS,
    KIND_NAMES,
    KOHYA,
    PEFT,
    REFUSED,
    table,
    wild_rows,
)

FILE = Path(__file__).with_name("dialects.md")


def test_the_table_is_current() -> None:
    assert FILE.read_text() == table(), "run: python -m tests.dialects > tests/dialects.md"


def test_no_two_rows_are_the_same() -> None:
    rows = [line for line in table().splitlines() if line.startswith("| ")]
    headings = 4
    cases = sum(map(len, (PEFT, EXTRAS, KOHYA, DIFFUSERS, REFUSED, KIND_NAMES, wild_rows())))
    assert len(rows) == headings + cases
    assert len(rows) == len(set(rows))


def test_every_kind_that_is_read_has_a_row() -> None:
    judged = {kind for _, _, kind in wild_rows()}
    assert {*KINDS, "experts", "full"} <= judged
