"""What may have been meant by a name that there is not."""

from __future__ import annotations

from pathlib import Path

import pytest

import adapterops
from adapterops.suggestion import meant, nearest


@pytest.mark.parametrize(
    ("name", "known", "found"),
    [
        ("tise", ("ties", "dare"), "ties"),
        ("TIES", ("ties", "dare"), "ties"),
        ("inal", ("INALL", "MIDD"), "INALL"),
        ("max-error", ("max_error", "energy"), "max_error"),
        ("tenant-07", ("tenant-70", "other"), "tenant-70"),
        ("moon", ("ties", "dare"), None),
        ("", ("ties",), None),
        ("ties", (), None),
    ],
)
def test_the_nearest_name(name, known, found):
    assert nearest(name, known) == nearest(name, reversed(known)) == found
    assert meant(name, known) == (f"did you mean {found}?" if found else None)


def test_something_is_nearest_where_that_is_asked_for():
    assert nearest("moon", ("layers.0", "norm"), least=0.0) == "norm"


def test_it_is_said_in_one_place():
    package = Path(adapterops.__file__).parent
    assert [p.name for p in package.rglob("*.py") if "difflib" in p.read_text()] == [
        "suggestion.py"
    ]
