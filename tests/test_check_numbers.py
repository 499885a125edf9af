"""The counts of one pass over integer codes are those of the decoded values."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import adapterops as ao
from adapterops import casts
from adapterops.checking import codes, measure, numbers, size
from adapterops.checking.codes import Figures, scan
from adapterops.formats import read_adapter
from adapterops.options import compute
from tests.defects import at, bfloat16, llama, write_file

CODES = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32, "F64": np.uint64}
NORMAL = {"F16": 2.0**-14, "BF16": 2.0**-126, "F32": 2.0**-126, "F64": 2.0**-1022}


def expected(raw: np.ndarray, dtype: str) -> Figures:
    """The same figures from decoded values."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        x = casts.decode(raw, dtype, (-1,))
    finite = np.abs(x[np.isfinite(x)])
    normal = {**NORMAL, "F8_E4M3": 2.0**-6, "F8_E5M2": 2.0**-14}[dtype]
    wide = dtype in ("BF16", "F32", "F64")
    return Figures(
        count=x.size,
        zeros=int((x == 0).sum()),
        nan=int(np.isnan(x).sum()),
        infinite=int(np.isinf(x).sum()),
        subnormal=int(((finite > 0) & (finite < normal)).sum()),
        beyond=int((finite >= 65520).sum()) if wide else 0,
        largest=float(finite.max(initial=0.0)),
    )


def counted(figures: Figures) -> tuple[object, ...]:
    return (
        figures.count,
        figures.zeros,
        figures.nan,
        figures.infinite,
        figures.subnormal,
        figures.beyond,
        figures.largest,
    )


@pytest.mark.parametrize("dtype", CODES)
@given(data=st.data())
def test_counts_are_those_of_the_values(dtype: str, data: st.DataObject) -> None:
    kind = CODES[dtype]
    raw = data.draw(arrays(kind, st.integers(1, 40), elements=st.integers(0, np.iinfo(kind).max)))
    raw = raw.view(np.uint8)
    assert counted(scan(raw, dtype, ())) == counted(expected(raw, dtype))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_counts_of_all_16_bit_codes(dtype: str) -> None:
    raw = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    assert counted(scan(raw, dtype, ())) == counted(expected(raw, dtype))
    long = np.tile(raw, 5)  # more than one block
    assert scan(long, dtype, ()).subnormal == 5 * scan(raw, dtype, ()).subnormal


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_counts_of_all_8_bit_codes(dtype: str) -> None:
    raw = np.arange(256, dtype=np.uint8)
    assert counted(scan(raw, dtype, ())) == counted(expected(raw, dtype))


def test_the_edges_of_float16() -> None:
    below, at_it = np.float32(np.nextafter(np.float32(65520), np.float32(0))), np.float32(65520)
    with np.errstate(over="ignore"):
        assert np.isfinite(np.float16(below)) and np.isinf(np.float16(at_it))
    x = np.array([below, at_it, -at_it, 1.0], np.float32)
    assert scan(x.view(np.uint8), "F32", ()).beyond == 2


def test_integers_are_no_numbers_but_tell_tensors_apart() -> None:
    a, b = (scan(np.full(4, n, np.int64).view(np.uint8), "I64", (4,)) for n in (1, 2))
    assert a.count == 0 and a.checksum != b.checksum


@given(st.binary(max_size=40), st.integers(0, 8))
def test_the_checksum_of_stretches_is_that_of_the_whole(data: bytes, words: int) -> None:
    raw = np.frombuffer(data + bytes(-len(data) % 2), np.uint8)
    cut = min(8 * words, len(raw))
    whole = scan(raw, "F16", ())
    parts = [scan(part, "F16", ()) for part in (raw[:cut], raw[cut:])]
    joined = codes.joined(*parts)
    assert joined.checksum == whole.checksum
    assert counted(joined) == counted(whole)


def test_norms_are_estimated_from_all_columns() -> None:
    rng = np.random.default_rng(1)
    for shape in ((64, 1000), (1000, 64), (3, 5), (4096, 16), (16, 4096), (128, 512)):
        for line in (np.s_[:, 1], np.s_[1]):  # one column, or one row, holds most of the norm
            x = rng.standard_normal(shape).astype(np.float32)
            x[line] *= 30.0
            found = scan(x.view(np.uint8).reshape(-1), "F32", shape).norm
            assert found == pytest.approx(np.linalg.norm(x), rel=0.35)
    small = rng.standard_normal((40, 50)).astype(np.float32)
    exact = scan(small.view(np.uint8).reshape(-1), "F32", small.shape).norm
    assert exact == pytest.approx(float(np.linalg.norm(small.astype(float))))


def test_one_huge_value_shows_in_the_norm() -> None:
    x = np.full(1 << 20, 1e-3, np.float32)
    x[123_457] = 1e6
    assert scan(x.view(np.uint8), "F32", ()).norm >= 1e6


def test_tensors_larger_than_a_read_are_measured_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same figures whatever the size of reads, on one thread or several."""
    path = llama(dtype=np.float32).write(tmp_path / "a")
    file = read_adapter(path)
    once = measure.measure(file.tensors, compute("cpu", None, 1))
    assert once.keys() == file.tensors.keys()
    for read, split, jobs in ((1 << 10, 32 << 20, 2), (1 << 10, 256, 2), (64, 64, 1)):
        monkeypatch.setattr(measure, "_READ", read)
        monkeypatch.setattr(measure, "_SPLIT", split)
        again = measure.measure(file.tensors, compute("cpu", None, jobs))
        assert {name: counted(f) for name, f in again.items()} == {
            name: counted(f) for name, f in once.items()
        }
        assert [f.checksum for _, f in sorted(again.items())] == [
            f.checksum for _, f in sorted(once.items())
        ]


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A file of 50 MB is checked with a quarter of it in memory at once."""
    import tracemalloc

    rng = np.random.default_rng(1)
    some = rng.standard_normal(99_991).astype(np.float16)
    tensors = {}
    for layer in range(6):
        stem = f"lora_unet_down_blocks_{layer}_proj_in"
        big = np.resize(np.roll(some, layer) / np.float16(64), (512, 4096))
        tensors[f"{stem}.lora_down.weight"] = big
        tensors[f"{stem}.lora_up.weight"] = (big.T * np.float16(0.02)).copy()
        tensors[f"{stem}.alpha"] = np.array(512.0, np.float16)
    path = write_file(tmp_path / "x.safetensors", tensors)
    del tensors, big
    tracemalloc.start()
    report = ao.check(path, jobs=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.findings == () and peak < 12.5e6 < path.stat().st_size / 4


def test_equal_columns_are_proved_on_the_whole_tensor(tmp_path: Path) -> None:
    """A sample that agrees is not enough, and one that hides a column is looked through."""
    rng = np.random.default_rng(1)
    for change, expected_codes in ((False, {"equal-columns"}), (True, set())):
        draft = llama(rank=4)
        name = at(2, "mlp.down_proj", "A")
        x = np.zeros((4, 128), np.float16)
        x[:, 1:40] = rng.standard_normal((4, 39)).astype(np.float16)
        x[3] = x[2]
        if change:
            x[3, 9] += np.float16(0.5)
        draft.tensors[name] = x
        report = ao.check(draft.write(tmp_path / str(change)), jobs=1)
        assert {finding.code for finding in report.findings} == expected_codes


def test_gains_of_flagged_modules_are_exact(tmp_path: Path) -> None:
    draft = llama(dtype=np.float32)
    draft.map(lambda x: x * np.float32(500), "lora_B")
    report = ao.check(draft.write(tmp_path / "a"), jobs=1)
    gains = {}
    for layer in range(8):
        for module, (out, _) in (("self_attn.v_proj", (32, 64)), ("mlp.down_proj", (64, 128))):
            B = draft.tensors[at(layer, module, "B")].astype(float)
            A = draft.tensors[at(layer, module, "A")].astype(float)
            gains[f"model.layers.{layer}.{module}"] = 2 * np.linalg.norm(B @ A) / math.sqrt(out)
    [finding] = report.findings
    assert finding.code == "diverged" and finding.module in gains
    assert f"{gains[finding.module]:.4g}" in finding.message


def test_a_bound_never_lies_below_the_gain(tmp_path: Path) -> None:
    """‖ΔW‖ is never above what the sample says by more than the margin kept for it."""
    for seed in range(5):
        file = read_adapter(llama(seed, rank=16, dtype="bfloat16").write(tmp_path / str(seed)))
        found = numbers.Measured(file, measure.measure(file.tensors, compute("cpu", None, 1)))
        for stem, site in file.sites.items():
            assert size._gain(found, stem) <= 2.0 * numbers.gain_bound(found, site)


def test_bfloat16_helper_truncates() -> None:
    assert bfloat16(np.array([1.0], np.float32))[0] == 0x3F80
