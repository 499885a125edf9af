"""The range finder on dense changes: near the optimum, its errors measured, held or streamed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from adapterops import casts, operators, rangefinder, sums
from adapterops.errors import NumericsError
from adapterops.files.source import MemoryFile
from adapterops.formats.model import Ref, Site
from adapterops.rangefinder import Sum
from tests.sums import low, module, site, spread, stored

DTYPES = ["F32", "BF16", "F16"]


class TestOptimality:
    @pytest.mark.parametrize("kind", ["flat", "noise", "graded", "steps", "rank8"])
    @pytest.mark.parametrize("rank", [4, 32])
    @pytest.mark.parametrize("shape", [(300, 220), (90, 400), (40, 70)], ids=str)
    def test_excess_over_the_best(self, kind: str, rank: int, shape: tuple[int, int]):
        rng = np.random.default_rng(1)
        base = 0.3 * rng.standard_normal(shape)
        tuned = base + spread(kind, *shape)
        exact = stored(tuned, "F32") - stored(base, "F32")
        values = np.linalg.svd(exact, compute_uv=False)
        best = float(np.linalg.norm(values[rank:]))
        total = Sum(module((1.0, site(base, tuned))), "cpu")
        found = rangefinder.truncate(total, rank)
        lost = np.linalg.norm(exact - found.B @ found.A)
        assert lost <= best * (1 + 1e-3) + 1e-7
        assert found.tail == pytest.approx(lost, rel=1e-5, abs=3e-8)
        np.testing.assert_allclose(found.values, values[: len(found.values)], rtol=2e-2, atol=1e-6)
        balance = np.linalg.norm(found.B, axis=0) - np.linalg.norm(found.A, axis=1)
        assert np.abs(balance).max() < 1e-5

    @pytest.mark.parametrize("kind", ["noise", "graded", "rank8"])
    def test_spectrum_up_to_a_cap(self, kind: str):
        rng = np.random.default_rng(1)
        base = 0.3 * rng.standard_normal((400, 300))
        tuned = base + spread(kind, 400, 300)
        exact = stored(tuned, "F32") - stored(base, "F32")
        values = np.linalg.svd(exact, compute_uv=False)
        total = Sum(module((1.0, site(base, tuned))), "cpu")
        found = rangefinder.spectrum(total, 16)
        assert len(found.values) == 16
        np.testing.assert_allclose(found.values, values[:16], rtol=2e-2, atol=1e-6)
        assert found.norm == pytest.approx(np.linalg.norm(exact), rel=1e-6)
        rest = np.linalg.norm(values[16:])
        assert found.rest == pytest.approx(rest, rel=1e-3, abs=1e-7)
        assert np.hypot(np.linalg.norm(found.values), found.rest) == pytest.approx(found.norm)
        wide = rangefinder.spectrum(total, 250)
        np.testing.assert_allclose(wide.values, values[:250], rtol=1e-9, atol=1e-12)
        assert wide.rest == pytest.approx(np.linalg.norm(values[250:]), rel=1e-9)


class TestMeasure:
    @pytest.mark.parametrize("turned", [False, True], ids=["as is", "transposed"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("device", ["cpu", "torch"])
    def test_every_figure(self, turned: bool, dtype: str, device: str):
        rng = np.random.default_rng(2)
        base = 0.1 * rng.standard_normal((150, 130))
        tuned = base + 0.02 * rng.standard_normal((150, 5)) @ rng.standard_normal((5, 130))
        tuned[3] = base[3]
        exact = stored(tuned, dtype) - stored(base, dtype)
        exact = exact.T if turned else exact
        total = Sum(module((1.0, site(base, tuned, dtype, turned))), device)
        found = rangefinder.truncate(total, 4)
        B, A = (casts.round_to(x, "BF16") for x in (found.B, found.A))
        seen = rangefinder.measure(total, found, B, A)
        plain = [np.asarray(x) for x in (found.B, found.A, B, A)]
        assert seen.norm == pytest.approx(np.linalg.norm(exact), rel=1e-12)
        assert seen.cut == pytest.approx(np.linalg.norm(exact - plain[0] @ plain[1]), rel=1e-6)
        written = plain[2] @ plain[3]
        assert seen.total == pytest.approx(np.linalg.norm(exact - written), rel=1e-12)
        assert seen.inner == (pytest.approx(np.sum(exact * written), rel=1e-10),)
        assert seen.sizes == (pytest.approx(seen.norm, rel=1e-12),)
        assert seen.changed == np.count_nonzero(exact)
        bits = {"F32": 23, "BF16": 7, "F16": 10}[dtype]
        exponents = np.floor(np.log2(np.abs(stored(tuned, dtype))))
        if dtype == "F16":
            exponents = np.maximum(exponents, -14)
        noise = np.sqrt(np.sum(4.0 ** (exponents - bits)) / 12)
        assert seen.noise == pytest.approx(noise, rel=1e-5)

    def test_an_error_far_below_what_the_identity_resolves(self):
        rng = np.random.default_rng(3)
        base = rng.integers(-8, 8, (200, 180)).astype(float)
        tuned = base + rng.integers(-2, 3, (200, 3)) @ rng.integers(-2, 3, (3, 180))
        total = Sum(module((1.0, site(base, tuned))), "cpu")
        found = rangefinder.truncate(total, 3)
        seen = rangefinder.measure(total, found, found.B, found.A)
        lost = float(np.linalg.norm(tuned - base - found.B @ found.A))
        assert seen.cut == pytest.approx(lost) and lost < 1e-12 * seen.norm

    @pytest.mark.parametrize("turned", [False, True], ids=["as is", "transposed"])
    def test_dense_parts_and_factors_of_one_module(self, turned: bool):
        rng = np.random.default_rng(4)
        shape = (80, 120)
        base, tuned = rng.standard_normal((2, *shape))
        B, A = rng.standard_normal((80, 3)), rng.standard_normal((3, 120))
        pair = (base.T, tuned.T) if turned else (base, tuned)
        both = module((0.5, site(*pair, turned=turned)), (-2.0, low(B, A)))
        one = 0.5 * (stored(tuned, "F32") - stored(base, "F32"))
        two = -2.0 * stored(B, "F32") @ stored(A, "F32")
        total = Sum(both, "cpu")
        found = rangefinder.truncate(total, 10)
        seen = rangefinder.measure(total, found, found.B, found.A)
        written = found.B @ found.A
        best = np.linalg.norm(np.linalg.svd(one + two, compute_uv=False)[10:])
        assert np.linalg.norm(one + two - written) <= best * (1 + 1e-3)
        assert seen.total == pytest.approx(np.linalg.norm(one + two - written), rel=1e-9)
        assert seen.sizes == tuple(pytest.approx(np.linalg.norm(x), rel=1e-9) for x in (one, two))
        assert seen.inner == tuple(pytest.approx(np.sum(x * written), rel=1e-9) for x in (one, two))
        sizes = (np.linalg.norm(one), np.linalg.norm(two))
        assert total.beta >= sizes[0] and total.beta >= sizes[1]


def test_held_and_streamed_agree(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(5)
    base = rng.standard_normal((200, 160))
    tuned = base + 0.01 * rng.standard_normal((200, 160)) + spread("graded", 200, 160)
    change = module((1.0, site(base, tuned, "BF16")))
    held = rangefinder.truncate(Sum(change, "cpu"), 12)
    monkeypatch.setattr(sums, "HELD_SINGLE", 0)
    monkeypatch.setattr(sums, "DENSE_BLOCK_NUMBERS", 1000)
    streamed = rangefinder.truncate(Sum(change, "cpu"), 12)
    assert np.linalg.norm(held.B @ held.A - streamed.B @ streamed.A) < 1e-4 * held.norm
    assert streamed.tail == pytest.approx(held.tail, rel=1e-6)


class TestOperator:
    @pytest.mark.parametrize("dtype", [*DTYPES, "F64", "F8_E4M3"])
    def test_rows_are_exact(self, dtype: str):
        rng = np.random.default_rng(6)
        if dtype == "F8_E4M3":
            codes = rng.integers(0, 120, (2, 40 * 30), dtype=np.uint8)
            refs = [
                Ref(MemoryFile("x", row.tobytes()), "x", dtype, (40, 30), 0, 1200) for row in codes
            ]
            parts = {"base": refs[0], "tuned": refs[1]}
            each = Site("x", "peft", "difference", "linear", (40, 30), (), 30, 30, parts)
            exact = refs[1].read() - refs[0].read()
        else:
            base, tuned = rng.standard_normal((2, 40, 30)) * np.logspace(-9, 3, 30)
            each = site(base, tuned, dtype)
            exact = stored(tuned, dtype) - stored(base, dtype)
        operator = operators.Difference(each)
        np.testing.assert_array_equal(operator.rows(7, 23), exact[7:23])
        single = operator.single(7, 23)
        assert single.dtype == np.float32
        np.testing.assert_allclose(single, exact[7:23], rtol=2.0**-24, atol=0)

    @pytest.mark.parametrize("dtype", ["BF16", "F16"])
    def test_every_16_bit_code_is_widened_exactly(self, dtype: str):
        codes = np.arange(65536, dtype="<u2")
        whole = Ref(MemoryFile("x", codes.tobytes()), "x", dtype, (256, 256), 0, 131072)
        half = MemoryFile("x", codes[:0x7C00].tobytes())
        finite = Ref(half, "x", "F16", (124, 256), 0, 2 * 0x7C00)
        with np.errstate(invalid="ignore"):
            wanted = whole.read().astype(np.float32)
            got = operators._single(whole, 0, 256)
        np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(operators._single(finite, 0, 124), finite.read())

    def test_noise_is_that_of_the_coarser_of_two_formats(self):
        rng = np.random.default_rng(7)
        weight = rng.standard_normal((64, 64))
        rounded = operators.Difference(site(weight, weight, "BF16", was="F32"))
        noise = rounded.noise(0, 64)
        assert np.sum(rounded.rows(0, 64) ** 2) == pytest.approx(noise, rel=0.1)
        turned_round = operators.Difference(site(weight, weight, "F32", was="BF16"))
        assert turned_round.noise(0, 64) == noise

    @pytest.mark.parametrize("where", ["base", "tuned"])
    @pytest.mark.parametrize("bad", [np.nan, np.inf], ids=["nan", "inf"])
    @pytest.mark.parametrize("call", ["truncate", "spectrum"])
    @pytest.mark.parametrize("size", [80, 20])
    def test_a_tensor_that_is_not_finite_is_named(
        self, where: str, bad: float, call: str, size: int
    ):
        values: dict[str, Any] = {"base": np.ones((90, size)), "tuned": np.full((90, size), 2.0)}
        values[where][5, 6] = bad
        total = Sum(module((1.0, site(values["base"], values["tuned"], "F16"))), "cpu")
        with pytest.raises(NumericsError, match=f"1 of {90 * size} values of {where} are NaN"):
            getattr(rangefinder, call)(total, 4)
