"""Residuals of predicted bits: they compress, restore every bit, and damage is noticed."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterops.errors import FormatError
from adapterops.files.source import MemoryFile
from adapterops.undoing import residual

FRAME = residual.FRAME


def frames_of(true, predicted, cuts=()):
    """The frames of arrays cut into several calls, as a reader of them."""
    edges = [0, *cuts, len(true)]
    parts = [residual.encode(true[a:b], predicted[a:b]) for a, b in itertools.pairwise(edges)]
    return b"".join(parts)


def reader(data, count, width):
    return residual.Residuals(MemoryFile("x.undo", data), 0, len(data), count, width)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 1000, FRAME - 1, FRAME, FRAME + 1])
def test_what_is_encoded_is_restored(width, count):
    rng = np.random.default_rng(width)
    predicted = np.frombuffer(rng.bytes(count * width), f"<u{width}")
    steps = np.array([0, 0, 0, 0, 1, -1, 2, -2, 100, -100, -(1 << (8 * width - 1))])
    true = predicted + rng.choice(steps, count).astype(f"<u{width}")
    data = frames_of(true, predicted)
    assert np.array_equal(reader(data, count, width).restore(0, predicted), true)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 65535)), max_size=64),
    st.data(),
)
def test_any_codes_any_cuts_any_reading(pairs, data):
    true = np.array([a for a, _ in pairs], "<u2")
    predicted = np.array([b for _, b in pairs], "<u2")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(true)), max_size=4)))
    found = reader(frames_of(true, predicted, cuts), len(true), 2)
    start = data.draw(st.integers(0, len(true)))
    stop = data.draw(st.integers(start, len(true)))
    assert np.array_equal(found.restore(start, predicted[start:stop]), true[start:stop])


def test_reading_does_not_depend_on_how_the_writer_cut_it():
    rng = np.random.default_rng(0)
    count = 2 * FRAME + 77
    predicted = rng.integers(0, 65536, count).astype("<u2")
    true = (predicted + rng.choice([0, 0, 0, 1, 7], count).astype("<u2")).astype("<u2")
    whole, pieces = frames_of(true, predicted), frames_of(true, predicted, range(1000, count, 9999))
    for data in (whole, pieces):
        found = reader(data, count, 2)
        got = [found.restore(i, predicted[i : i + 50_001]) for i in range(0, count, 50_001)]
        assert np.array_equal(np.concatenate(got), true)


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_likely_codes_are_coded_apart(share):
    rng = np.random.default_rng(3)
    count = 2 * FRAME + 5
    predicted = rng.integers(0, 65536, count).astype("<u2")
    likely = rng.random(count) < share
    wrong = np.where(likely, rng.choice([0, 1, -1, 300], count), rng.random(count) < 1e-3)
    true = predicted + wrong.astype("<u2")
    data = residual.encode(true, predicted, likely)
    found = reader(data, count, 2)
    assert np.array_equal(found.restore(0, predicted, likely), true)
    part = slice(FRAME, 2 * FRAME)
    assert np.array_equal(found.restore(FRAME, predicted[part], likely[part]), true[part])
    if share == 0.05:
        assert len(data) < 0.85 * len(residual.encode(true, predicted))
        for start, mask in ((1, likely), (0, None)):  # a part of a frame, or no mask
            with pytest.raises(FormatError, match="all of them at once"):
                found.restore(start, predicted[start:], None if mask is None else mask[start:])


def test_equal_codes_take_a_head_a_frame():
    codes = np.arange(3 * FRAME, dtype="<u4")
    assert len(residual.encode(codes, codes.copy())) == 3 * 32


def test_codes_of_two_types_or_sizes_are_a_mistake():
    codes = np.zeros(4, "<u2")
    for other in (np.zeros(4, "<u4"), np.zeros(3, "<u2"), np.zeros(4, "<i2")):
        with pytest.raises(ValueError, match="codes"):
            residual.encode(codes, other)


def head(size, chosen=0, apart=(0, 0, 0), main=(0, 0, 0)):
    return struct.pack("<8I", size, chosen, *apart, *main)


DAMAGE = {
    "cut in a head": lambda d: d[:7],
    "cut in a body": lambda d: d[:-3],
    "a frame too many": lambda d: d + head(5),
    "no codes": lambda d: head(0) + d,
    "too many codes": lambda d: head(FRAME + 1),
    "more likely codes than codes": lambda d: d[:4] + struct.pack("<I", 1001) + d[8:],
    "more escapes than there are": lambda d: d[:20] + struct.pack("<I", 1 << 30) + d[24:],
    "another count of escapes": lambda d: d[:20] + struct.pack("<I", 3) + d[24:],
    "a body that is none": lambda d: d[:32] + b"\xff" * (len(d) - 32),
    "too large a body": lambda d: head(4, 0, (0, 0, 0), (0, 1 << 20, 0)) + bytes(1 << 20),
    "escapes without symbols": lambda d: head(1000, 0, (0, 0, 0), (0, 0, 2)) + b"ab",
    "a likely part without symbols": lambda d: head(1000, 7, (1, 0, 2), (0, 0, 0)) + b"ab",
    "other likely codes": lambda d: residual.encode(
        np.arange(1000, dtype="<u2"), np.zeros(1000, "<u2"), np.arange(1000) < 8
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_frames_are_refused(damage):
    rng = np.random.default_rng(0)
    predicted = rng.integers(0, 65536, 1000).astype("<u2")
    true = predicted + rng.choice([0, 1, 900], 1000).astype("<u2")
    data = DAMAGE[damage](residual.encode(true, predicted))
    with pytest.raises(FormatError, match="damaged"):
        reader(data, 1000, 2).restore(0, predicted, np.arange(1000) < 7)


def test_a_body_that_inflates_too_far_is_not_inflated():
    import zlib

    engine = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = engine.compress(bytes(1 << 20)) + engine.flush()
    data = head(FRAME, main=(0, len(bomb), 0)) + bomb
    with pytest.raises(FormatError, match=f"holds {FRAME // 4 + 1} bytes where"):
        reader(data, FRAME, 2).restore(0, np.zeros(FRAME, "<u2"))
