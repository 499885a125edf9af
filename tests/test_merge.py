"""merge end to end: files in, files out, judged densely in float64."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adapterops as ao
from adapterops import linalg
from adapterops.errors import (
    BudgetError,
    FileError,
    IncompatibleError,
    NumericsError,
    UnsafeFileError,
    UnsupportedError,
    UsageError,
)
from tests.support import (
    dense,
    distance,
    load_file,
    pairs,
    read_kohya,
    read_peft,
    weighted,
    write_kohya,
    write_peft,
)

SHAPES = {f"model.layers.{i}.self_attn.{p}_proj": (24, 32) for i in range(2) for p in "qv"}
# Set ADAPTEROPS_TEST_DEVICE=cuda where there is one; "torch" is the same code on the host.
DEVICES = ["cpu", os.environ.get("ADAPTEROPS_TEST_DEVICE", "torch")]
STORAGE = {"float32": 1e-7, "float16": 2e-3, "bfloat16": 1.5e-2}


def two(tmp_path: Path, **kwargs) -> tuple[Path, Path, dict, dict]:
    """Two adapters of rank 3 and 2 with different alphas, and their dense deltas."""
    a, b = pairs(1, SHAPES, 3), pairs(2, SHAPES, 2)
    left = write_peft(tmp_path / "a", a, alpha=6, **kwargs)
    right = write_peft(tmp_path / "b", b, alpha=1, **kwargs)
    return left, right, dense(a, 2.0), dense(b, 0.5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rank", [None, 1, 3, 5, 9, "same"])
def test_sum_is_exact_and_certificate_is_true(tmp_path, dtype, device, rank):
    a, b, da, db = two(tmp_path)
    report = ao.merge(
        [a, b], [0.7, -0.3], out=tmp_path / "m", dtype=dtype, rank=rank, device=device
    )
    exact = weighted((0.7, da), (-0.3, db))
    got = read_peft(tmp_path / "m")
    assert report.rank == {None: 5, "same": 3}.get(rank, rank)
    error = distance(got, exact)
    assert error == pytest.approx(report.error, rel=1e-6, abs=1e-14)
    best = weighted_truncation(exact, report.rank)
    assert error <= math.hypot(best, STORAGE[dtype]) and report.truncation == pytest.approx(
        best, rel=1e-9, abs=1e-12
    )
    for name, module in report.modules.items():
        one = distance({name: got[name]}, {name: exact[name]})
        assert module.error == pytest.approx(one, rel=1e-6, abs=1e-14)
        assert module.norm == pytest.approx(np.linalg.norm(exact[name]), rel=1e-12)
        sizes = 0.7 * np.linalg.norm(da[name]), 0.3 * np.linalg.norm(db[name])
        assert module.shares == pytest.approx([s / sum(sizes) for s in sizes])
        kept = [np.sum(got[name] * d[name]) / np.sum(d[name] ** 2) for d in (da, db)]
        assert module.retention == pytest.approx(kept, rel=1e-9)


def weighted_truncation(exact, rank: int) -> float:
    """The least relative error of any adapter of this uniform rank."""
    values = [np.linalg.svd(value, compute_uv=False) for value in exact.values()]
    lost = sum(float(np.sum(s[rank:] ** 2)) for s in values)
    return math.sqrt(lost / sum(float(np.sum(s**2)) for s in values))


def test_kohya_pair_by_the_missions_command_shape(tmp_path):
    shapes = {f"lora_unet_down_blocks_{i}_attn_to_q": (16, 20) for i in range(3)}
    a, b = pairs(1, shapes, 4), pairs(2, shapes, 4)
    files = [
        write_kohya(tmp_path / f"{n}.safetensors", f, alpha=2)
        for n, f in zip("ab", (a, b), strict=True)
    ]
    report = ao.merge(files, [0.7, 0.3], out=tmp_path / "merged")
    assert report.output == str(tmp_path / "merged.safetensors")
    assert any("one file" in note for note in report.notes)
    exact = weighted((0.7, dense(a, 0.5)), (0.3, dense(b, 0.5)))
    assert distance(read_kohya(tmp_path / "merged.safetensors"), exact) < 1e-7
    assert (tmp_path / "merged.adapterops.json").is_file()


def test_different_targets_ranks_dtypes(tmp_path):
    a = pairs(1, {"x.q": (16, 24), "x.k": (16, 24)}, 3, np.float16)
    b = pairs(2, {"x.k": (16, 24), "x.v": (8, 24)}, 2, np.float32)
    write_peft(tmp_path / "a", a)
    write_peft(tmp_path / "b", b, use_rslora=True, alpha=5.0)
    ao.merge([tmp_path / "a", tmp_path / "b"], [1, 2], out=tmp_path / "m", dtype="fp32")
    exact = weighted((1, dense(a)), (2, dense(b, 5 / math.sqrt(2))))
    assert distance(read_peft(tmp_path / "m"), exact) < 1e-7


class TestLaws:
    def test_identity(self, tmp_path):
        a, b, da, _ = two(tmp_path)
        report = ao.merge([a, b], [1, 0], out=tmp_path / "m")
        assert distance(read_peft(tmp_path / "m"), da) < 1e-15 and report.rank == 3

    def test_copies_at_one_over_k(self, tmp_path):
        a, _, da, _ = two(tmp_path)
        report = ao.merge([a] * 4, [0.25] * 4, out=tmp_path / "m", dtype="float32")
        assert distance(read_peft(tmp_path / "m"), da) < 1e-7
        assert report.rank == 3  # the numerical rank, not 12

    def test_order_does_not_matter(self, tmp_path):
        a, b, *_ = two(tmp_path)
        ao.merge([a, b], [0.7, 0.3], out=tmp_path / "m", rank=2)
        ao.merge([b, a], [0.3, 0.7], out=tmp_path / "n", rank=2)
        assert distance(read_peft(tmp_path / "m"), read_peft(tmp_path / "n")) < 1e-6

    def test_linear_in_the_weights(self, tmp_path):
        a, b, da, db = two(tmp_path)
        ao.merge([a, b], [2.5, -4.0], out=tmp_path / "m", dtype="float32")
        assert distance(read_peft(tmp_path / "m"), weighted((2.5, da), (-4.0, db))) < 1e-7

    @pytest.mark.parametrize("rank", [None, 2])
    def test_same_bytes_for_any_threads_and_memory(self, tmp_path, rank):
        a, b, *_ = two(tmp_path)
        outputs = set()
        for jobs, memory in itertools.product([1, 2, 3], ["1kB", "1GB"]):
            out = tmp_path / f"{jobs}{memory}"
            ao.merge([a, b], [0.7, 0.3], out=out, rank=rank, jobs=jobs, memory=memory)
            outputs.add((out / "adapter_model.safetensors").read_bytes())
        assert len(outputs) == 1

    def test_gauge_does_not_matter(self, tmp_path):
        factors = pairs(1, SHAPES, 3, np.float64)
        G = np.array([[1, 5, 0], [0, 1e-3, 7], [0, 0, 1e3]])
        turned = {k: (B @ G, np.linalg.solve(G, A)) for k, (B, A) in factors.items()}
        write_peft(tmp_path / "a", factors)
        write_peft(tmp_path / "b", turned)
        for name in "ab":
            ao.merge([tmp_path / name], out=tmp_path / f"m{name}", rank=2, dtype="float32")
        assert distance(read_peft(tmp_path / "ma"), read_peft(tmp_path / "mb")) < 1e-6


class TestRanks:
    def test_energy_keeps_its_share_with_the_smallest_rank(self, tmp_path):
        a, b, da, db = two(tmp_path)
        exact = weighted((1, da), (1, db))
        for energy in (0.5, 0.9, 0.99, 1.0):
            report = ao.merge([a, b], [1, 1], out=tmp_path / f"e{energy}", energy=energy)
            limit = math.sqrt(1 - energy)
            assert weighted_truncation(exact, report.rank) <= limit + 1e-9
            assert report.rank == 1 or weighted_truncation(exact, report.rank - 1) > limit

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("bound", [0.6, 0.3, 0.1, 0.02])
    def test_max_error_is_a_promise_at_the_smallest_rank(self, tmp_path, bound, dtype):
        a, b, da, db = two(tmp_path)
        exact = weighted((1, da), (1, db))
        report = ao.merge([a, b], [1, 1], out=tmp_path / "m", max_error=bound, dtype=dtype)
        assert distance(read_peft(tmp_path / "m"), exact) <= bound
        assert report.error <= bound
        assert report.rank == 1 or weighted_truncation(exact, report.rank - 1) > 0.99 * bound

    def test_max_error_counts_what_the_format_costs(self, tmp_path):
        """A rank whose truncation alone just fits does not fit once it is stored."""
        a, b, da, db = two(tmp_path)
        exact = weighted((0.7, da), (1, db))
        for rank in (2, 3, 4):
            bound = weighted_truncation(exact, rank) * (1 + 1e-9)
            out = tmp_path / f"m{rank}"
            report = ao.merge([a, b], [0.7, 1], out=out, max_error=bound, dtype="bfloat16")
            assert report.rank == rank + 1 and distance(read_peft(out), exact) <= bound

    def test_max_error_below_the_formats_floor_is_refused(self, tmp_path):
        a, b, *_ = two(tmp_path)
        with pytest.raises(BudgetError, match=r"BF16|bfloat16.*") as caught:
            ao.merge([a, b], [0.7, 1], out=tmp_path / "m", max_error=1e-4, dtype="bfloat16")
        assert "--dtype float32" in str(caught.value) and caught.value.exit_code == 5
        assert not (tmp_path / "m").exists()
        ao.merge([a, b], [0.7, 1], out=tmp_path / "m", max_error=1e-4, dtype="float32")

    def test_size_counts_the_whole_file(self, tmp_path):
        a, b, *_ = two(tmp_path)
        full = ao.merge([a, b], [1, 1], out=tmp_path / "full")
        for size in (full.size, full.size - 1, full.size - 3000):
            report = ao.merge([a, b], [1, 1], out=tmp_path / f"s{size}", size=size)
            written = (tmp_path / f"s{size}" / "adapter_model.safetensors").stat().st_size
            assert written == report.size <= size
        assert report.rank < full.rank
        with pytest.raises(BudgetError, match="smallest adapter of rank 1 has"):
            ao.merge([a, b], [1, 1], out=tmp_path / "no", size="1kB")

    def test_hints_are_what_a_smaller_rank_really_costs(self, tmp_path):
        a, b = pairs(1, {"q": (40, 50)}, 9), pairs(2, {"q": (40, 50)}, 9)
        write_peft(tmp_path / "a", a)
        write_peft(tmp_path / "b", b)
        inputs = [tmp_path / "a", tmp_path / "b"]
        report = ao.merge(inputs, [1, 1], out=tmp_path / "m")
        assert [hint.rank for hint in report.hints] == [1, 8, 9, 16]
        for hint in report.hints:
            cut = ao.merge(inputs, [1, 1], out=tmp_path / f"m{hint.rank}", rank=hint.rank)
            assert cut.truncation == pytest.approx(hint.error, rel=1e-9)

    @pytest.mark.parametrize(
        "options",
        [
            {"rank": 4, "energy": 0.9},
            {"rank": 0},
            {"rank": -1},
            {"energy": 0},
            {"energy": 1.1},
            {"max_error": 0},
            {"max_error": math.nan},
            {"size": "ten"},
            {"size": 0},
        ],
        ids=str,
    )
    def test_nonsense_is_refused(self, tmp_path, options):
        a, b, *_ = two(tmp_path)
        with pytest.raises(UsageError):
            ao.merge([a, b], [1, 1], out=tmp_path / "m", **options)

    def test_lossless_larger_than_dense_is_refused_with_the_way_out(self, tmp_path):
        shapes = {"q": (12, 12)}
        for name, seed in zip("ab", (1, 2), strict=True):
            write_peft(tmp_path / name, pairs(seed, shapes, 4))
        inputs = [tmp_path / "a", tmp_path / "b"]
        with pytest.raises(UsageError, match=r"192 numbers.*144.*--rank") as caught:
            ao.merge(inputs, [1, 1], out=tmp_path / "m")
        assert caught.value.exit_code == 2
        assert ao.merge(inputs, [1, 1], out=tmp_path / "m", rank="same").rank == 4


class TestManyInputs:
    def test_streamed_sum_of_many_columns(self, tmp_path):
        shapes = {"x.q": (64, 80), "x.gate": (3, 80)}
        rng = np.random.default_rng(0)
        weights = rng.standard_normal(140).tolist()
        terms = []
        for index, weight in enumerate(weights):
            factors = pairs(index, shapes, 8, np.float16)
            write_peft(tmp_path / f"a{index}", factors)
            terms.append((weight, dense(factors)))
        inputs = [tmp_path / f"a{index}" for index in range(140)]
        exact = weighted(*terms)
        for device in DEVICES:
            out = tmp_path / f"m{device}"
            report = ao.merge(inputs, weights, out=out, rank=4, device=device)
            assert {m.route for m in report.modules.values()} == {"range"}
            got = read_peft(out)
            assert distance(got, exact) == pytest.approx(report.error, rel=1e-9)
            assert report.truncation <= weighted_truncation(exact, 4) * (1 + 1e-3)
            kept = np.sum(got["x.q"] * terms[5][1]["x.q"]) / np.sum(terms[5][1]["x.q"] ** 2)
            assert report.modules["x.q"].retention[5] == pytest.approx(kept, rel=1e-9)
        by_energy = ao.merge(inputs, weights, out=tmp_path / "e", energy=0.5)
        assert weighted_truncation(exact, by_energy.rank) <= math.sqrt(0.5) + 1e-9
        assert weighted_truncation(exact, by_energy.rank - 1) > math.sqrt(0.5)


class TestBadInput:
    @pytest.mark.parametrize(
        ("weights", "normalize", "message"),
        [
            (None, False, "2 adapters need 2 weights"),
            ([1.0], False, "1 weights for 2 adapters"),
            ([1.0, math.nan], False, "not a finite number"),
            ([1.0, math.inf], False, "not a finite number"),
            ([1.0, -1.0], True, "sum of the weights, which is 0"),
        ],
    )
    def test_weights(self, tmp_path, weights, normalize, message):
        a, b, *_ = two(tmp_path)
        with pytest.raises(UsageError, match=message) as caught:
            ao.merge([a, b], weights, out=tmp_path / "m", normalize=normalize)
        assert caught.value.exit_code == 2

    def test_normalize_and_zero_sum(self, tmp_path):
        a, b, da, db = two(tmp_path)
        ao.merge([a, b], [3, 1], out=tmp_path / "n", normalize=True, dtype="float32")
        assert distance(read_peft(tmp_path / "n"), weighted((0.75, da), (0.25, db))) < 1e-7
        ao.merge([a, b], [1, -1], out=tmp_path / "d", dtype="float32")  # Σw = 0 alone is legal
        assert distance(read_peft(tmp_path / "d"), weighted((1, da), (-1, db))) < 1e-7

    @pytest.mark.parametrize("weights", [[1, -1], [0, 0]], ids=str)
    def test_a_result_of_nothing_is_refused(self, tmp_path, weights):
        a, *_ = two(tmp_path)
        with pytest.raises(NumericsError) as caught:
            ao.merge([a, a], weights, out=tmp_path / "m")
        assert caught.value.exit_code == 5 and not (tmp_path / "m").exists()

    def test_a_refactored_copy_subtracted_is_seen_as_nothing(self, tmp_path):
        factors = pairs(1, SHAPES, 3, np.float64)
        G = np.array([[2.0, 0, 0], [1, 4, 0], [0, 0, 0.5]])
        inverse = np.linalg.inv(G)  # exact in binary
        turned = {k: (B @ G, inverse @ A) for k, (B, A) in factors.items()}
        write_peft(tmp_path / "a", factors)
        write_peft(tmp_path / "b", turned)
        with pytest.raises(NumericsError, match="cancel"):
            ao.merge([tmp_path / "a", tmp_path / "b"], [1, -1], out=tmp_path / "m")

    def test_one_cancelling_module_is_written_as_zeros(self, tmp_path):
        a = pairs(1, SHAPES, 3)
        b = {**pairs(2, SHAPES, 3), (name := next(iter(SHAPES))): a[next(iter(SHAPES))]}
        write_peft(tmp_path / "a", a)
        write_peft(tmp_path / "b", b)
        report = ao.merge([tmp_path / "a", tmp_path / "b"], [1, -1], out=tmp_path / "m")
        assert not np.any(read_peft(tmp_path / "m")[name])
        module = report.modules[name]
        assert module.norm <= module.floor and module.error is None

    def test_shapes_that_differ_name_both(self, tmp_path):
        write_peft(tmp_path / "a", pairs(1, {"m.q": (8, 12)}, 2))
        write_peft(tmp_path / "b", pairs(1, {"m.q": (8, 16)}, 2))
        with pytest.raises(IncompatibleError, match=r"module m\.q: .*in=12.*in=16") as caught:
            ao.merge([tmp_path / "a", tmp_path / "b"], [1, 1], out=tmp_path / "m")
        assert caught.value.exit_code == 4

    def test_nothing_in_common(self, tmp_path):
        write_peft(tmp_path / "a", pairs(1, {"m.q": (8, 12)}, 2))
        write_peft(tmp_path / "b", pairs(1, {"n.q": (8, 12)}, 2))
        with pytest.raises(IncompatibleError, match=r"nothing|no module in common"):
            ao.merge([tmp_path / "a", tmp_path / "b"], [1, 1], out=tmp_path / "m")

    def test_dialects_do_not_mix(self, tmp_path):
        write_peft(tmp_path / "a", pairs(1, {"m.q": (8, 12)}, 2))
        write_kohya(tmp_path / "b.safetensors", pairs(1, {"lora_unet_q": (8, 12)}, 2), alpha=2)
        with pytest.raises(UnsupportedError, match=r"peft.*kohya"):
            ao.merge([tmp_path / "a", tmp_path / "b.safetensors"], [1, 1], out=tmp_path / "m")

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("rank", [None, 1])
    def test_nonfinite_factors_name_tensor_and_count(self, tmp_path, value, rank):
        factors = pairs(1, SHAPES, 3)
        name = sorted(SHAPES)[1]
        factors[name][0][2, 1] = value
        write_peft(tmp_path / "a", factors)
        with pytest.raises(NumericsError, match=r"1 of 72 values.*lora_B.*NaN or infinite") as e:
            ao.merge([tmp_path / "a"], out=tmp_path / "m", rank=rank)
        assert e.value.module == name and e.value.exit_code == 5
        assert not (tmp_path / "m").exists()

    @pytest.mark.parametrize("weights", [[1.0], [0.5], [0.7, 0.3]], ids=str)
    def test_a_nonfinite_bias_is_named_too(self, tmp_path, weights):
        """Whether it is copied or summed: PEFT's lora_bias, `lora_B.bias`."""
        for name, value in (("a", np.nan), ("b", 1.0)):
            bias = np.array([1, value, *range(10)], np.float32)
            extras = {"base_model.model.x.q.lora_B.bias": bias}
            factors = pairs(1, {"x.q": (12, 16)}, 2)
            write_peft(tmp_path / name, factors, extras=extras, lora_bias=True)
        inputs = [tmp_path / "a", tmp_path / "b"][: len(weights)]
        message = r"module x\.q: 1 of 12 values of .*x\.q\.lora_B\.bias are NaN or infinite"
        with pytest.raises(NumericsError, match=message):
            ao.merge(inputs, weights, out=tmp_path / "m")
        assert not (tmp_path / "m").exists()

    def test_overflow_of_the_output_type(self, tmp_path):
        factors = {"q": (np.full((4, 1), 3e6, np.float32), np.full((1, 4), 3e6, np.float32))}
        write_peft(tmp_path / "a", factors)
        with pytest.raises(NumericsError, match=r"module q: .*float16.*--dtype float32"):
            ao.merge([tmp_path / "a"], out=tmp_path / "m", dtype="float16")
        ao.merge([tmp_path / "a"], out=tmp_path / "m", dtype="bfloat16")

    def test_bases_that_differ_warn_and_strict_refuses(self, tmp_path):
        a, b, *_ = two(tmp_path)
        config = json.loads((b / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "other/base"
        (b / "adapter_config.json").write_text(json.dumps(config))
        report = ao.merge([a, b], [1, 1], out=tmp_path / "m")
        assert any("tiny/base" in w and "other/base" in w for w in report.warnings)
        with pytest.raises(IncompatibleError, match="--strict"):
            ao.merge([a, b], [1, 1], out=tmp_path / "n", strict=True)

    @pytest.mark.parametrize("pattern", ["q_proj", "model[", "nothing.*"])
    def test_modules_must_match_as_a_whole(self, tmp_path, pattern):
        a, b, *_ = two(tmp_path)
        with pytest.raises(UsageError, match="--modules"):
            ao.merge([a, b], [1, 1], out=tmp_path / "m", modules=pattern)

    def test_modules_selects(self, tmp_path):
        a, b, da, db = two(tmp_path)
        ao.merge([a, b], [1, 1], out=tmp_path / "m", modules=r".*\.q_proj", dtype="float32")
        exact = {k: v for k, v in weighted((1, da), (1, db)).items() if k.endswith("q_proj")}
        assert distance(read_peft(tmp_path / "m"), exact) < 1e-7

    @pytest.mark.parametrize(
        "options",
        [{"dtype": "int8"}, {"device": "tpu"}, {"extras": "guess"}, {"jobs": 0}, {"memory": "0"}],
        ids=str,
    )
    def test_unknown_options(self, tmp_path, options):
        a, b, *_ = two(tmp_path)
        with pytest.raises(UsageError):
            ao.merge([a, b], [1, 1], out=tmp_path / "m", **options)

    def test_zero_adapter_is_a_result_not_an_error(self, tmp_path):
        factors = {k: (0 * B, A) for k, (B, A) in pairs(1, SHAPES, 2).items()}
        write_peft(tmp_path / "z", factors)
        _, b, _, db = two(tmp_path)
        report = ao.merge([tmp_path / "z", b], [1, 1], out=tmp_path / "m")
        assert distance(read_peft(tmp_path / "m"), db) < 1e-7
        assert report.inputs[0].retention is None and report.inputs[0].share == 0.0
        assert "NaN" not in json.dumps(report.to_dict())
        alone = ao.merge([tmp_path / "z"], out=tmp_path / "z2", rank=1)
        assert alone.error == 0.0 and any("zero" in note for note in alone.notes)


class TestAlgebra:
    def test_operators_write_the_same_bytes_as_merge(self, tmp_path):
        a, b, *_ = two(tmp_path)
        ao.merge([a, b], [0.7, 0.3], out=tmp_path / "m", rank=2)
        mix = 0.7 * ao.open_adapter(a) + 0.3 * ao.open_adapter(b)
        mix.save(tmp_path / "n", rank=2)
        ao.merge([mix], out=tmp_path / "o", rank=2)
        first = (tmp_path / "m" / "adapter_model.safetensors").read_bytes()
        for name in "no":
            assert (tmp_path / name / "adapter_model.safetensors").read_bytes() == first

    def test_lookup_is_the_exact_sum(self, tmp_path):
        a, b, da, db = two(tmp_path)
        mix = (ao.open_adapter(a) - 2 * ao.open_adapter(b)) / 4
        exact = weighted((0.25, da), (-0.5, db))
        assert set(mix) == set(exact) and len(mix) == len(exact)
        for name, factors in mix.items():
            np.testing.assert_allclose(factors.dense(), exact[name], rtol=1e-12, atol=1e-14)
        with pytest.raises(KeyError):
            mix["no.such"]

    def test_an_adapter_minus_itself_is_nothing(self, tmp_path):
        a, *_ = two(tmp_path)
        adapter = ao.open_adapter(a)
        assert (adapter + adapter).terms == ((2.0, adapter.terms[0][1]),)
        with pytest.raises(NumericsError, match="zero"):
            (adapter - adapter).save(tmp_path / "m")

    def test_only_adapters_and_numbers(self, tmp_path):
        a, *_ = two(tmp_path)
        with pytest.raises(TypeError):
            ao.open_adapter(a) + 1
        with pytest.raises(TypeError):
            ao.open_adapter(a) * "x"


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.floats(-3, 3).filter(lambda w: abs(w) > 1e-3), st.integers(1, 6)),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 1000),
)
def test_any_sum_matches_its_certificate(tmp_path_factory, terms, seed):
    tmp_path = tmp_path_factory.mktemp("law")
    shapes = {"a.q": (30, 41), "a.k": (33, 30)}
    summands = []
    for index, (weight, rank) in enumerate(terms):
        factors = pairs(seed + index, shapes, rank, np.float16)
        write_peft(tmp_path / str(index), factors, alpha=2 * rank)
        summands.append((weight, dense(factors, 2.0)))
    report = ao.merge(
        [tmp_path / str(i) for i in range(len(terms))],
        [weight for weight, _ in terms],
        out=tmp_path / "m",
        rank=3,
    )
    error = distance(read_peft(tmp_path / "m"), weighted(*summands))
    assert error == pytest.approx(report.error, rel=1e-5, abs=1e-13)


def test_a_job_that_outgrows_the_device_is_done_on_the_cpu(tmp_path, monkeypatch):
    import torch

    from adapterops import linalg

    a, b, da, db = two(tmp_path)
    cores = linalg.cores

    def full(B, A):
        if not isinstance(B, np.ndarray):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return cores(B, A)

    monkeypatch.setattr(linalg, "cores", full)
    ao.merge([a, b], [1, 1], out=tmp_path / "m", device="torch", dtype="float32")
    assert distance(read_peft(tmp_path / "m"), weighted((1, da), (1, db))) < 1e-7


class TestExtras:
    """Heads, biases and token rows are values; regression tests of what was once lost."""

    def head(self, value: float) -> dict[str, np.ndarray]:
        return {"base_model.model.score.weight": np.full((2, 3), value, np.float32)}

    def test_a_bias_moves_below_base_layer_where_the_result_adapts_the_layer(self, tmp_path):
        bias = {"base_model.model.head.bias": np.ones(12, np.float32)}
        write_peft(tmp_path / "a", pairs(1, {"x.q": (16, 24)}, 2), extras=bias, bias="all")
        write_peft(tmp_path / "b", pairs(2, {"x.q": (16, 24), "head": (12, 24)}, 2))
        ao.merge([tmp_path / "a", tmp_path / "b"], [0.7, 0.3], out=tmp_path / "m")
        names = set(load_file(tmp_path / "m" / "adapter_model.safetensors"))
        assert "base_model.model.head.base_layer.bias" in names
        assert "base_model.model.head.bias" not in names

    def test_both_spellings_are_one_tensor(self, tmp_path):
        one = {"base_model.model.head.bias": np.ones(12, np.float32)}
        two = {"base_model.model.head.base_layer.bias": np.zeros(12, np.float32)}
        write_peft(tmp_path / "a", pairs(1, {"x.q": (16, 24)}, 2), extras=one, bias="all")
        shapes = {"x.q": (16, 24), "head": (12, 24)}
        write_peft(tmp_path / "b", pairs(2, shapes, 2), extras=two, bias="all")
        with pytest.raises(IncompatibleError, match=r"head\.base_layer\.bias.*differs"):
            ao.merge([tmp_path / "a", tmp_path / "b"], [0.7, 0.3], out=tmp_path / "m")

    @pytest.mark.parametrize("policy", ["error", "average"])
    def test_rows_of_different_tokens_are_not_mixed(self, tmp_path, policy):
        name = "base_model.model.embed.token_adapter.trainable_tokens_delta"
        for index, tokens in enumerate(([5, 2], [7, 8])):
            rows = {name: np.full((2, 3), float(index), np.float32)}
            write_peft(
                tmp_path / str(index),
                pairs(index, SHAPES, 2),
                extras=rows,
                trainable_token_indices={"embed": tokens},
            )
        with pytest.raises(IncompatibleError, match="different tokens"):
            ao.merge([tmp_path / "0", tmp_path / "1"], [1, 1], out=tmp_path / "m", extras=policy)

    def test_an_input_of_weight_zero_has_no_say(self, tmp_path):
        for name, seed in (("a", 1), ("b", 2)):
            write_peft(tmp_path / name, pairs(seed, SHAPES, 2), extras=self.head(seed))
        ao.merge([tmp_path / "a", tmp_path / "b"], [1, 0], out=tmp_path / "m")
        written = load_file(tmp_path / "m" / "adapter_model.safetensors")
        assert np.all(written["base_model.model.score.weight"] == 1.0)


def test_a_1x1_convolution_keeps_its_kernel_whichever_input_has_it(tmp_path):
    shapes = {"lora_unet_mid_block_proj_in": (20, 24)}
    flat, deep = pairs(1, shapes, 3), pairs(2, shapes, 3)
    four = {k: (B[..., None, None], A[..., None, None]) for k, (B, A) in deep.items()}
    write_kohya(tmp_path / "flat.safetensors", flat, alpha=3)
    write_kohya(tmp_path / "four.safetensors", four, alpha=3)
    files = [tmp_path / "flat.safetensors", tmp_path / "four.safetensors"]
    ao.merge(files, [1, 1], out=tmp_path / "m.safetensors")
    exact = weighted((1, dense(flat)), (1, dense(deep)))
    assert distance(read_kohya(tmp_path / "m.safetensors"), exact) < 1e-6
    tensors = load_file(tmp_path / "m.safetensors")
    assert tensors["lora_unet_mid_block_proj_in.lora_down.weight"].shape == (6, 24, 1, 1)


class TestOutputNames:
    def test_a_foreign_file_where_the_sidecar_would_go_is_kept(self, tmp_path):
        factors = pairs(1, {"lora_unet_q": (16, 24)}, 2)
        write_kohya(tmp_path / "k.safetensors", factors, alpha=2)
        mine = tmp_path / "x.adapterops.json"
        mine.write_text('{"mine": 1}')
        with pytest.raises(UsageError, match=r"x\.adapterops\.json.*not written by adapterops"):
            ao.merge([tmp_path / "k.safetensors"], out=tmp_path / "x.safetensors", overwrite=True)
        assert mine.read_text() == '{"mine": 1}'
        mine.unlink()
        ao.merge([tmp_path / "k.safetensors"], out=tmp_path / "x.safetensors")
        ao.merge([tmp_path / "k.safetensors"], out=tmp_path / "x.safetensors", overwrite=True)

    @pytest.mark.parametrize("out", ["", "a\0b"])
    def test_no_file_name(self, tmp_path, out):
        a, *_ = two(tmp_path)
        with pytest.raises(UsageError, match="no file name"):
            ao.merge([a], out=out)

    def test_an_input_name_that_is_too_long_is_a_missing_file(self, tmp_path):
        with pytest.raises(FileError) as caught:
            ao.merge(["n" * 300], out=tmp_path / "m")
        assert caught.value.exit_code == 6


def test_a_sum_too_large_to_hold_gives_the_same(tmp_path, monkeypatch):
    from adapterops import sums

    shapes = {"x.q": (40, 50)}
    for index in range(140):
        write_peft(tmp_path / f"a{index}", pairs(index, shapes, 8, np.float16))
    inputs, weights = [tmp_path / f"a{index}" for index in range(140)], [1 / 140] * 140
    first = ao.merge(inputs, weights, out=tmp_path / "held", rank=3, dtype="float32")
    monkeypatch.setattr(sums, "HELD", 0)
    monkeypatch.setattr(sums, "BLOCK_NUMBERS", 300)
    second = ao.merge(inputs, weights, out=tmp_path / "read", rank=3, dtype="float32")
    assert distance(read_peft(tmp_path / "read"), read_peft(tmp_path / "held")) < 1e-6
    assert second.error == pytest.approx(first.error, rel=1e-9)
    assert second.norm == pytest.approx(first.norm, rel=1e-12)


class TestReviewed:
    """Defects that a reading found; each test failed before its fix."""

    def test_a_bound_that_only_full_rank_meets_is_met(self, tmp_path):
        """At full rank columns are scaled by powers of two: fp16 then costs next to nothing."""
        shapes = {"x.q": (60, 80)}
        for name, seed in (("a", 1), ("b", 2)):
            B, A = pairs(seed, shapes, 4, np.float16)["x.q"]
            graded = (B * np.logspace(0, -2, 4)).astype(np.float16)
            write_peft(tmp_path / name, {"x.q": (graded, A)})
        inputs = [tmp_path / "a", tmp_path / "b"]
        report = ao.merge(inputs, [1, 1], out=tmp_path / "m", max_error=1e-5)
        assert report.error <= 1e-5 and report.rank == 8

    def test_several_threads_may_save_the_same_adapters(self, tmp_path):
        from concurrent.futures import ThreadPoolExecutor

        a, b, *_ = two(tmp_path)
        first, second = ao.open_adapter(a), ao.open_adapter(b)

        def work(index: int) -> bytes:
            out = tmp_path / f"m{index}"
            (0.5 * first + 0.25 * second).save(out, rank=2)
            return (out / "adapter_model.safetensors").read_bytes()

        with ThreadPoolExecutor(4) as pool:
            assert len(set(pool.map(work, range(24)))) == 1

    def test_no_descriptor_stays_open(self, tmp_path):
        a, b, *_ = two(tmp_path)
        ao.merge([a, b], [1, 1], out=tmp_path / "m")
        links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        assert not [link for link in links if link.startswith(str(tmp_path))]

    def test_a_failed_save_gives_its_threads_back_though_the_error_is_kept(self, tmp_path):
        from threadpoolctl import threadpool_info

        before = [info["num_threads"] for info in threadpool_info()]
        factors = pairs(1, SHAPES, 3)
        factors[min(SHAPES)][0][0, 0] = np.nan
        write_peft(tmp_path / "a", factors)
        with pytest.raises(NumericsError) as kept:
            ao.merge([tmp_path / "a"], out=tmp_path / "m", rank=1)
        assert kept.value is not None
        assert [info["num_threads"] for info in threadpool_info()] == before

    def test_a_config_that_changed_changes_the_provenance(self, tmp_path):
        a, *_ = two(tmp_path)
        made = []
        for alpha in (4, 40):
            config = json.loads((a / "adapter_config.json").read_text())
            (a / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": alpha}))
            ao.merge([a], [0.5], out=tmp_path / f"m{alpha}")
            text = (tmp_path / f"m{alpha}" / "adapterops.json").read_text()
            made.append(json.loads(text)["provenance"])
        assert made[0]["inputs"] != made[1]["inputs"]

    def test_an_alpha_for_part_of_the_modules_is_recorded(self, tmp_path):
        from safetensors.numpy import save_file

        tensors = {}
        for name, (B, A) in pairs(1, {"lora_unet_a": (16, 20), "lora_unet_b": (16, 20)}, 2).items():
            tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"] = B, A
        tensors["lora_unet_a.alpha"] = np.array(2.0, np.float32)
        save_file(tensors, tmp_path / "k.safetensors")
        ao.merge([tmp_path / "k.safetensors"], out=tmp_path / "m.safetensors", rank=1, alpha=8)
        sidecar = json.loads((tmp_path / "m.adapterops.json").read_text())
        assert sidecar["provenance"]["options"]["alpha"] == {"0": 8.0}

    def test_rounding_noise_prints_as_a_bound(self, tmp_path):
        from adapterops.render.tables import page

        a, b, *_ = two(tmp_path)
        report = ao.merge([a, a, b], [1, 1, 1], out=tmp_path / "m", dtype="float32", rank=5)
        printed = page(report, verbose=True, command=str)
        assert 0 < report.truncation < report.floor / report.norm and "(rank < " in printed
        plain = re.findall(r"(?<!< )\b(\d[\d.e+-]*) %", printed)  # percentages that are no bounds
        assert plain and all(float(x) == 0 or float(x) > 1e-9 for x in plain), plain

    @pytest.mark.parametrize("text", ["[1, 2]", '{"description": "a note"}', "not json"])
    def test_notes_beside_a_file_are_not_its_config(self, tmp_path, text):
        factors = pairs(1, {"lora_unet_q": (16, 20)}, 2)
        write_kohya(tmp_path / "k.safetensors", factors, alpha=2)
        (tmp_path / "k.json").write_text(text)
        ao.merge([tmp_path / "k.safetensors"], [0.5], out=tmp_path / "m.safetensors")
        exact = dense(factors, 0.5)
        assert distance(read_kohya(tmp_path / "m.safetensors"), exact) < 1e-6

    def test_an_unreadable_tokenizer_is_an_input_error(self, tmp_path, monkeypatch):
        from adapterops.files.source import LocalFile

        a, b, *_ = two(tmp_path)
        (a / "tokenizer.json").write_text("{}")
        opened = LocalFile.open

        def denied(self):
            if self.path.endswith("tokenizer.json"):
                raise FileError("cannot be read: Permission denied", path=self.path)
            return opened(self)

        monkeypatch.setattr(LocalFile, "open", denied)
        with pytest.raises(FileError, match=r"tokenizer\.json"):
            ao.merge([a, b], [1, 1], out=tmp_path / "m")

    def test_a_weight_zero_input_does_not_write_the_config(self, tmp_path):
        head = {"base_model.model.score.weight": np.ones((2, 3), np.float32)}
        one, other = pairs(1, SHAPES, 2), pairs(2, SHAPES, 2)
        write_peft(tmp_path / "a", one, extras=head, modules_to_save=["score"])
        write_peft(tmp_path / "b", other, extras=head, modules_to_save=["other"])
        ao.merge([tmp_path / "a", tmp_path / "b"], [1, 0], out=tmp_path / "m")
        config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
        assert config["modules_to_save"] == ["score"]

    def test_numbers_of_other_kinds_are_numbers(self, tmp_path):
        a, b, *_ = two(tmp_path)
        report = ao.merge(
            [a, b], [1, 1], out=tmp_path / "m", rank=np.int64(2), memory=1e9, alpha={a: 6.0}
        )
        assert report.rank == 2
        for alpha in (0, -1.0, math.nan):
            with pytest.raises(UsageError, match="alpha"):
                ao.merge([a, b], [1, 1], out=tmp_path / "n", alpha=alpha)
        with pytest.raises(UsageError, match="not a finite number"):
            (math.nan * ao.open_adapter(a)).save(tmp_path / "n")

    @pytest.mark.parametrize("rank", [None, 24])
    def test_wide_modules_give_the_same_bytes_for_any_threads(self, tmp_path, rank):
        shapes = {f"x.{name}": (384, 512) for name in "qkv"}
        for name, seed in (("a", 1), ("b", 2)):
            write_peft(tmp_path / name, pairs(seed, shapes, 40, np.float16))
        outputs = set()
        for jobs, memory in ((1, "1GB"), (3, "1GB"), (2, "1MB")):
            out = tmp_path / f"{jobs}{memory}"
            inputs = [tmp_path / "a", tmp_path / "b"]
            ao.merge(inputs, [0.7, 0.3], out=out, rank=rank, jobs=jobs, memory=memory)
            outputs.add((out / "adapter_model.safetensors").read_bytes())
        assert len(outputs) == 1


def test_inputs_of_one_name_are_told_apart(tmp_path):
    for folder, seed in (("one", 1), ("two", 2)):
        write_peft(tmp_path / folder / "checkpoint-500", pairs(seed, SHAPES, 2))
    inputs = [tmp_path / folder / "checkpoint-500" for folder in ("one", "two")]
    report = ao.merge(inputs, [1, 2], out=tmp_path / "m")
    assert [item.name for item in report.inputs] == ["checkpoint-500", "checkpoint-500#2"]


class TestBroken:
    """What somebody who did not write it broke; each test failed before its fix."""

    def test_a_bound_below_the_rounding_noise_is_not_promised(self, tmp_path):
        """Ten digits cancel: what is left is known to 10⁻⁶ only, whatever the file can hold."""
        a, *_ = two(tmp_path)
        weights = [1.0, -0.9999999999]
        report = ao.merge([a, a], weights, out=tmp_path / "m", dtype="float32")
        assert report.floor / report.norm > 1e-6 and report.error < 1e-6
        with pytest.raises(BudgetError, match="cannot be promised"):
            ao.merge([a, a], weights, out=tmp_path / "n", dtype="float32", max_error=1e-6)

    def test_cancellation_is_seen_before_anything_is_planned(self, tmp_path):
        a, *_ = two(tmp_path)
        for options in ({"dry_run": True}, {"max_error": 0.1}):
            with pytest.raises(NumericsError, match="cancel"):
                ao.merge([a, a], [1, -1], out=tmp_path / "m", **options)

    @pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, np.int16])
    def test_an_integer_alpha_is_a_number(self, tmp_path, kind):
        from safetensors.numpy import save_file

        factors = pairs(1, {"lora_unet_q": (16, 20)}, 4)
        B, A = factors["lora_unet_q"]
        tensors = {"lora_unet_q.lora_up.weight": B, "lora_unet_q.lora_down.weight": A}
        save_file({**tensors, "lora_unet_q.alpha": np.array(2, kind)}, tmp_path / "k.safetensors")
        ao.merge([tmp_path / "k.safetensors"], [1], out=tmp_path / "m.safetensors", rank=4)
        assert distance(read_kohya(tmp_path / "m.safetensors"), dense(factors, 0.5)) < 1e-6

    def test_an_integer_factor_is_named(self, tmp_path):
        factors = {"q": (np.ones((4, 2), np.int32), np.ones((2, 4), np.float32))}
        write_peft(tmp_path / "a", factors)
        with pytest.raises(UnsupportedError, match=r"a/adapter_model.*module q:.*lora_B.*I32"):
            ao.merge([tmp_path / "a"], out=tmp_path / "m")

    def test_rank_patterns_that_lost_their_order_agree_with_the_tensors(self, tmp_path):
        factors = {**pairs(1, {"x.q_proj": (16, 20)}, 4), **pairs(2, {"x.v_proj": (16, 20)}, 2)}
        patterns = {".*proj": 4, "v_proj": 2}
        write_peft(tmp_path / "a", factors, r=8, alpha=4, rank_pattern=patterns)
        ao.merge([tmp_path / "a"], [1], out=tmp_path / "m", rank=4)
        exact = {"x.q_proj": dense(factors)["x.q_proj"], "x.v_proj": 2 * dense(factors)["x.v_proj"]}
        assert distance(read_peft(tmp_path / "m"), exact) < 1e-6

    def test_a_pattern_that_would_run_for_ever_is_refused(self, tmp_path):
        factors = pairs(1, {"x." + "a" * 30: (16, 20)}, 4)
        write_peft(tmp_path / "a", factors, alpha_pattern={"(a+)+c": 2})
        with pytest.raises(UnsafeFileError, match="nested repetition"):
            ao.merge([tmp_path / "a"], out=tmp_path / "m")

    def test_factors_of_two_adapters_are_not_paired(self, tmp_path):
        from safetensors.numpy import save_file

        (B, A), prefix = pairs(1, {"q": (16, 20)}, 4)["q"], "base_model.model.q.lora_"
        save_file(
            {f"{prefix}A.foo.weight": A, f"{prefix}B.bar.weight": B}, tmp_path / "x.safetensors"
        )
        with pytest.raises(ValueError, match=r"several adapters.*foo.*bar"):
            ao.merge([tmp_path / "x.safetensors"], out=tmp_path / "m", alpha=4)

    def test_an_fp8_adapter_is_copied_and_merged_into_another_format(self, tmp_path):
        import torch
        from safetensors.torch import save_file

        factors = pairs(1, {"lora_unet_q": (16, 20)}, 4)
        B, A = (torch.from_numpy(x).to(torch.float8_e4m3fn) for x in factors["lora_unet_q"])
        tensors = {"lora_unet_q.lora_up.weight": B, "lora_unet_q.lora_down.weight": A}
        save_file(tensors, tmp_path / "k.safetensors")
        report = ao.merge([tmp_path / "k.safetensors"], out=tmp_path / "c.safetensors")
        assert report.dtype == "F8_E4M3" and report.error == 0.0
        with pytest.raises(UsageError, match="--dtype"):
            ao.merge([tmp_path / "k.safetensors"], [0.5], out=tmp_path / "m.safetensors")
        ao.merge([tmp_path / "k.safetensors"], [0.5], out=tmp_path / "m.safetensors", dtype="fp32")
        exact = dense({"lora_unet_q": (B.float().numpy(), A.float().numpy())}, 0.5)
        assert distance(read_kohya(tmp_path / "m.safetensors"), exact) < 1e-6

    def test_a_copy_reports_the_format_that_it_copies(self, tmp_path):
        write_peft(tmp_path / "a", pairs(1, SHAPES, 2, np.float32))
        write_peft(tmp_path / "b", pairs(2, SHAPES, 2, np.float16))
        report = ao.merge([tmp_path / "a", tmp_path / "b"], [0, 1], out=tmp_path / "m")
        assert report.dtype == "float16"

    def test_a_coefficient_beyond_computing_is_refused(self, tmp_path):
        a, *_ = two(tmp_path)
        for weight in (1e-200, 1e200):
            with pytest.raises(UsageError, match="coefficient"):
                ao.merge([a], [weight], out=tmp_path / "m")

    def test_one_path_or_adapter_is_enough(self, tmp_path):
        a, b, da, _ = two(tmp_path)
        ao.merge(a, out=tmp_path / "m")
        ao.merge(ao.open_adapter(a), out=tmp_path / "n")
        ao.merge((p for p in (a, b)), [1, 0], out=tmp_path / "o")
        for name in "mno":
            assert distance(read_peft(tmp_path / name), da) < 1e-15

    def test_numbers_of_numpy_and_sum(self, tmp_path):
        a, b, *_ = two(tmp_path)
        one, other = ao.open_adapter(a), ao.open_adapter(b)
        mix = sum([np.float64(0.5) * one, other * np.float32(0.25)])
        assert [weight for weight, _ in mix.terms] == [0.5, 0.25]
        assert one == one and one != other and len({one, other}) == 2

    def test_a_local_base_path_stays_at_home(self, tmp_path):
        a, *_ = two(tmp_path, base_model_name_or_path="/home/somebody/secret/llama")
        ao.merge([a], [0.5], out=tmp_path / "m")
        for name in ("README.md", "adapterops.json"):
            assert "/home/somebody" not in (tmp_path / "m" / name).read_text()

    def test_a_folder_as_the_output_of_a_one_file_dialect(self, tmp_path, monkeypatch):
        write_kohya(tmp_path / "k.safetensors", pairs(1, {"lora_unet_q": (16, 20)}, 4), alpha=4)
        (tmp_path / "d").mkdir()
        for out in (tmp_path / "d", f"{tmp_path}/d/"):
            ao.merge([tmp_path / "k.safetensors"], out=out, overwrite=True)
            assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [
                "merged.adapterops.json",
                "merged.safetensors",
            ]
        a, *_ = two(tmp_path)
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")
        with pytest.raises(UsageError, match="current folder"):
            ao.merge([a], out=".")

    def test_a_git_lfs_pointer_is_recognised(self, tmp_path):
        file = tmp_path / "x.safetensors"
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\n")
        with pytest.raises(ValueError, match="Git LFS"):
            ao.merge([file], out=tmp_path / "m")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["balanced", "svd", "orthonormal-a", "orthonormal-b"])
def test_a_rank_beyond_every_side_adds_zeros(form, dtype, tmp_path, monkeypatch):
    shapes = {"layers.0.q_proj": (32, 20), "layers.0.v_proj": (6, 28)}
    folder = write_peft(tmp_path / "a", pairs(0, shapes, 4))
    ranks = []
    real = linalg.truncate

    def watched(B, A, rank, *more, **named):
        ranks.append(rank)
        return real(B, A, rank, *more, **named)

    monkeypatch.setattr(linalg, "truncate", watched)
    small = ao.compress(folder, out=tmp_path / "small", rank=32, form=form, dtype=dtype)
    large = ao.compress(folder, out=tmp_path / "large", rank=500, form=form, dtype=dtype)
    assert max(ranks) <= 32  # a product of two factors of rank 500 is what would cost
    assert (small.error, small.norm) == (large.error, large.norm)
    narrow, wide = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("small", "large")
    )
    for name, tensor in narrow.items():
        m, n = tensor.shape
        assert wide[name].shape == ((m, 500) if "lora_B" in name else (500, n))
        assert np.array_equal(wide[name][:m, :n], tensor)
        assert np.count_nonzero(wide[name]) == np.count_nonzero(tensor)
