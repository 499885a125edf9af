"""The table of what is supported is generated from the cases that the tests run on."""

from pathlib import Path

from tests.dialects import DIFFUSERS, EXTRAS, KOHYA, PEFT, REFUSED, table

FILE = Path(__file__).with_name("dialects.md")


def test_the_table_is_current() -> None:
    assert FILE.read_text() == table(), "run: python -m tests.dialects > tests/dialects.md"


def test_no_two_rows_are_the_same() -> None:
    rows = [line for line in table().splitlines() if line.startswith("| ")]
    headings = 2
    assert len(rows) == headings + sum(map(len, (PEFT, EXTRAS, KOHYA, DIFFUSERS, REFUSED)))
    assert len(rows) == len(set(rows))
