"""Random bits depend on seed, label, module and place alone."""

from __future__ import annotations

import numpy as np
import pytest

from adapterops.rules.draws import draws, stacked

FIRST = [[41463, 22425, 16421, 18281], [32486, 30089, 51769, 19601]]


@pytest.mark.parametrize("columns", [1, 7, 16, 33, 4096])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_any_block_of_rows_has_the_same_bits(columns, rows):
    whole = draws(3, "a", "m.q", 0, 48, columns)
    parts = [draws(3, "a", "m.q", at, min(48, at + rows), columns) for at in range(0, 48, rows)]
    assert whole.dtype == np.uint16 and whole.shape == (48, columns)
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(draws(3, "a", "m.q", 17, 23, columns), whole[17:23])


def test_bits_are_those_of_philox_at_their_counter():
    """numpy's own way to skip, `advance`, gives the same words."""
    from adapterops.rules.draws import _key

    philox = np.random.Philox(key=_key(5, "a", "m"), counter=2**256 - 1)
    philox.advance(40)
    words = philox.random_raw(4).astype("<u8").view("<u2")
    assert np.array_equal(draws(5, "a", "m", 40, 41, 16)[0], words)


def test_bits_stay_what_they_were():
    """A merge of today has to give the same file tomorrow."""
    assert draws(0, "a", "m.q", 0, 2, 4).tolist() == FIRST


def test_every_part_of_the_key_counts():
    keys = [
        (0, "a", "m"),
        (1, "a", "m"),
        (0, "b", "m"),
        (0, "a", "n"),
        (0, "a\0", "m"),
        (-1, "", ""),
    ]
    keys += [(0, "a\0m", ""), (0, "", "a\0m"), (0, "\udce9", "m")]
    blocks = {draws(*key, 0, 1, 64).tobytes() for key in keys}
    assert len(blocks) == len(keys)


def test_bits_are_uniform():
    bits = draws(11, "a", "m", 0, 512, 512).astype(float)
    assert abs(bits.mean() - 32767.5) < 5 * 65536 / np.sqrt(12 * bits.size)
    ones = [(draws(11, "a", "m", 0, 512, 512) >> b & 1).mean() for b in range(16)]
    assert np.abs(np.array(ones) - 0.5).max() < 5 * 0.5 / 512


def test_adapters_have_their_own_bits_wherever_they_stand():
    one, other = stacked(0, ["a", "b"], "m", 2, 5, 10), stacked(0, ["b", "a"], "m", 2, 5, 10)
    assert np.array_equal(one, other[::-1])
    assert np.array_equal(one[0], draws(0, "a", "m", 2, 5, 10))
    assert not np.array_equal(one[0], one[1])


def test_no_rows_and_no_columns():
    assert draws(0, "a", "m", 4, 4, 9).shape == (0, 9)
    assert draws(0, "a", "m", 0, 3, 0).shape == (3, 0)
