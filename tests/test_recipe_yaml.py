"""YAML as recipes have it: plain values with places, and every trap an error that says where."""

from __future__ import annotations

import math

import pytest

from adapterops.errors import UsageError
from adapterops.recipe.document import Document, written
from adapterops.recipe.strict import DEEPEST, LARGEST, read_yaml


def value(text: str) -> object:
    return read_yaml(text.encode(), "r.yaml").value


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        ("-.5e+2", -50.0),
        ("1.", 1.0),
        ("+7", 7),
        ("0777", 777),
        ("0o17", 15),
        ("0x1F", 31),
        ("-.inf", -math.inf),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
    ],
)
def test_plain_values_are_those_of_the_core_schema(text, wanted):
    found = value(f"a: {text}")["a"]
    assert found == wanted and type(found) is type(wanted)


def test_not_a_number_is_a_number():
    assert math.isnan(value("a: .nan")["a"])


@pytest.mark.parametrize(
    "text",
    [
        *("on", "off", "yes", "No", "y", "n", "1:30", "2024-01-01", "1_000", "0b11", "+.nan"),
        *("TrUe", "1e", "e3", ".", "1.2.3", "0o9", "${HOME}", "$HOME", "=", "<<"),
    ],
)
def test_the_rest_is_text(text):
    assert value(f"a: {text}") == {"a": text}


@pytest.mark.parametrize("text", ["'1e-3'", '"true"', "'~'", "|-\n  12", ">-\n  12"])
def test_quoted_values_are_text(text):
    assert isinstance(value(f"a: {text}")["a"], str)


def test_a_whole_recipe_with_the_places_of_its_values():
    text = "# mix\nmerge_method: ties\nmodels:\n  - model: a b\n    parameters: {weight: 1e-3}\n"
    found = read_yaml(b"\xef\xbb\xbf" + text.encode(), "r.yaml")
    models = [{"model": "a b", "parameters": {"weight": 0.001}}]
    assert found.value == {"merge_method": "ties", "models": models}
    assert found.places["models", 0] == (4, 5)
    assert found.places["models", 0, "parameters", "weight"] == (5, 18)


def test_json_is_yaml():
    assert value('{"verb": "merge", "weights": [1, 2.5e-1, null], "x": {"y": false}}') == {
        "verb": "merge",
        "weights": [1, 0.25, None],
        "x": {"y": False},
    }


BOMB = "a: &a [x, x]\n" + "".join(
    f"{key}: &{key} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, key in zip("abcdefgh", "bcdefghi", strict=True)
)
TRAPS = {
    "duplicate key": ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3", "5:3", "'c' stands twice, first in line"),
    "duplicate in flow": ("{a: {b: 1, b: 2}}", "1:12", "'b' stands twice"),
    "duplicate quoted": ("a: 1\n'a': 2", "2:1", "'a' stands twice"),
    "alias bomb": (BOMB, "1:4", "&a is an anchor"),
    "alias": ("a: *b", "1:4", "*b is an alias"),
    "alias as a key": ("*a : 1", "1:1", "an alias stands where a key"),
    "anchor of a mapping": ("&a {b: 1}", "1:1", "&a is an anchor"),
    "merge key": ("a: 1\n<<: *a", "2:5", "*a is an alias"),
    "python tag": ("a: !!python/object/apply:os.system [x]", "1:4", "is a tag"),
    "standard tag": ("a: !!str 1", "1:4", "is a tag"),
    "local tag": ("a:\n  - !x 1", "2:5", "is a tag"),
    "tagged key": ("!!str a: 1", "1:1", "is a tag"),
    "tab": ("a:\n\tb: 1", "2:1", "indent with spaces, not tabs"),
    "tab inside": ("a:\n  b: 1\n\tc: 2", "3:1", "indent with spaces"),
    "NUL": ("a: x\x00y", "1:5", "U+0000"),
    "escape": ("a: 1\nb: \x1b[31m", "2:4", "U+001B"),
    "two documents": ("a: 1\n---\nb: 2", "2:1", "a second document"),
    "directive": ("%YAML 1.1\n---\na: on", "1:1", "a directive"),
    "tag directive": ("%TAG ! tag:x,2000:\n---\na: 1", "1:1", "a directive"),
    "number as a key": ("a: 1\n2: 3", "2:1", "the key 2 is no text"),
    "switch as a key": ("true: 3", "1:1", "the key true is no text"),
    "no key": ("? \n: 3", "1:2", "the key nothing is no text"),
    "list as a key": ("? [a]\n: 3", "1:3", "a list or a mapping stands where a key"),
    "deep in brackets": ("[" * 5000, f"1:{DEEPEST + 2}", "nested deeper"),
    "deep in braces": ("{a: " * 5000, f"1:{4 * DEEPEST + 2}", "nested deeper"),
    "deep in lines": ("- " * 2000 + "a", f"1:{2 * DEEPEST + 3}", "nested deeper"),
    "colon in text": ("a: b: c", "1:5", "text with a colon stands in quotes"),
    "unclosed list": ("a: [1, 2", "1:9", "is no YAML"),
    "unclosed text": ("a: 'x", "1:6", "is no YAML"),
    "wrong indent": ("a:\n  b: 1\n c: 2", "3:2", "is no YAML"),
    "number without end": ("a: " + "9" * 5000, "1:4", "a number of 5000 characters"),
}


@pytest.mark.parametrize("name", TRAPS)
def test_traps_are_errors_with_line_and_column(name):
    text, place, message = TRAPS[name]
    with pytest.raises(UsageError) as caught:
        value(text)
    assert str(caught.value).startswith(f"r.yaml:{place}: ") and message in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "r.yaml: is empty"),
        (b"# nothing\n\n", "r.yaml: is empty"),
        (b"a: \xff", "r.yaml:1:4: is no text in UTF-8: byte 0xff"),
        ("a: ä\nb: 1".encode("utf-16"), "r.yaml:1:1: is no text in UTF-8"),
        ("a: \ud800".encode("utf-8", "surrogatepass"), "r.yaml:1:4: is no text in UTF-8"),
        (bytes(range(256)), "r.yaml:"),
        (b"a: " + b"x" * LARGEST, f"a recipe has at most {LARGEST}"),
    ],
    ids=["empty", "comment", "latin", "utf-16", "surrogate", "binary", "huge"],
)
def test_what_is_no_text_is_an_error(data, message):
    with pytest.raises(UsageError) as caught:
        read_yaml(data, "r.yaml")
    assert message in str(caught.value)


def test_whatever_bytes_come_only_usage_errors_do():
    """Mutations of a recipe: each is read, or is an error with exit code 2."""
    import random

    rng = random.Random(7)
    whole = b"verb: merge\nadapters: [a, 'b c']\nweights: [1e-3, .5]\nparameters: {t: ~}\n"
    pieces = [b"&a", b"*a", b"\t", b"!!x", b"---", b"\n", b"{", b"[", b"'", b'"', b": ", b"\xff"]
    outcomes = set()
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.randint(0, 3)] = rng.choice(pieces)
        try:
            read_yaml(bytes(data), "r.yaml")
            outcomes.add("read")
        except UsageError as error:
            assert str(error).startswith("r.yaml")
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_keys_in_messages():
    assert written(("models", 1, "parameters", "weight")) == "models[1].parameters.weight"
    assert written(("alpha", "a/b c")) == "alpha['a/b c']"
    document = Document("r.yaml", {}, {("a",): (3, 1)})
    assert str(document.error(("a", "b"), "is wrong")) == "r.yaml:3:1: a.b: is wrong"
    assert str(Document("", {}).error(("a",), "is wrong")) == "a: is wrong"
