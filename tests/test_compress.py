"""compress: ranks, forms and scales against dense float64, and against the files read back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import adapterops as ao
from adapterops import ranks
from adapterops.errors import BudgetError, UsageError
from adapterops.ranks import Ranks
from tests.support import write_kohya, write_peft

SHAPES = {
    "model.layers.0.self_attn.q_proj": (24, 16),
    "model.layers.0.self_attn.v_proj": (8, 16),
    "model.layers.1.self_attn.q_proj": (24, 16),
    "model.layers.1.mlp.down_proj": (16, 40),
}


def graded(
    shape: tuple[int, int], rank: int, seed: int, fall: float = 2.0, dtype: type = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """B and A whose product has singular values that fall by a factor."""
    rng = np.random.default_rng(seed)
    m, n = shape
    U = np.linalg.qr(rng.standard_normal((m, rank)))[0]
    V = np.linalg.qr(rng.standard_normal((n, rank)))[0]
    root = fall ** (-np.arange(rank) / 2)
    return (U * root).astype(dtype), np.ascontiguousarray(root[:, None] * V.T, dtype)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    pairs = {
        stem: graded(shape, 6, seed, fall=1.3 + 0.4 * seed)
        for seed, (stem, shape) in enumerate(SHAPES.items())
    }
    return write_peft(tmp_path / "a", pairs, alpha=9.0)


def deltas(path: Path) -> dict[str, np.ndarray]:
    """ΔW of every module, dense, by adapterops' own reader (which other tests hold to PEFT)."""
    return {stem: f.dense() for stem, f in ao.open_adapter(path).items()}


def distance(one: dict, other: dict) -> float:
    lost = [np.linalg.norm(one.get(stem, 0.0) - value) for stem, value in other.items()]
    return float(np.linalg.norm(lost) / np.linalg.norm([np.linalg.norm(v) for v in other.values()]))


def tails(dense: dict) -> np.ndarray:
    """Error of the best uniform rank k, relative, k = 0, 1, …"""
    values = [np.linalg.svd(v, compute_uv=False) for v in dense.values()]
    whole = np.sqrt(sum((v**2).sum() for v in values))
    return np.array([np.sqrt(sum((v[k:] ** 2).sum() for v in values)) / whole for k in range(9)])


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("form", ["balanced", "svd", "orthonormal-a", "orthonormal-b"])
def test_the_error_is_that_of_the_best_approximation(adapter, tmp_path, rank, form):
    before = deltas(adapter)
    report = ao.compress(adapter, out=tmp_path / "c", rank=rank, form=form)
    assert report.truncation == pytest.approx(tails(before)[rank], rel=1e-9)
    assert report.error == pytest.approx(distance(deltas(tmp_path / "c"), before), rel=1e-6)
    assert report.schema == "adapterops.compress/1"
    assert report.parameters == rank * sum(m + n for m, n in SHAPES.values())
    assert report.parameters_before == 6 * sum(m + n for m, n in SHAPES.values())
    assert report.size == (tmp_path / "c" / "adapter_model.safetensors").stat().st_size
    assert report.size_before == (adapter / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("form", ["balanced", "svd", "orthonormal-a", "orthonormal-b"])
def test_storage_error_is_measured_on_what_is_read_back(adapter, tmp_path, dtype, form):
    before = deltas(adapter)
    report = ao.compress(adapter, out=tmp_path / "c", form=form, dtype=dtype)
    measured = distance(deltas(tmp_path / "c"), before)
    assert report.error == pytest.approx(measured, rel=1e-6, abs=1e-12)
    assert report.truncation == 0.0


def factors_of(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    tensors = load_file(path / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name]
    return {
        name: (
            tensors[f"{name}.lora_B.weight"].astype(float),
            tensors[f"{name}.lora_A.weight"].astype(float),
        )
        for name in names
    }


@pytest.mark.parametrize("rank", [4, 12])
def test_forms_are_what_they_say(adapter, tmp_path, rank):
    for form in ("svd", "orthonormal-a", "orthonormal-b"):
        ao.compress(adapter, out=tmp_path / form, form=form, rank=rank)
        for B, A in factors_of(tmp_path / form).values():
            sigma = np.linalg.svd(B @ A, compute_uv=False)[:rank]
            if form == "svd":
                seen = len(sigma)
                np.testing.assert_allclose(
                    (B.T @ B)[:seen, :seen], np.diag(sigma), atol=1e-5 * sigma[0]
                )
                np.testing.assert_allclose(
                    (A @ A.T)[:seen, :seen], np.diag(sigma), atol=1e-5 * sigma[0]
                )
            else:
                fixed, other = (A, B.T) if form == "orthonormal-a" else (B.T, A)
                side = min(rank, fixed.shape[1])
                np.testing.assert_allclose((fixed @ fixed.T)[:side, :side], np.eye(side), atol=1e-5)
                norms = np.linalg.norm(other, axis=1)
                assert (np.diff(norms) <= 1e-6 * norms[0]).all()  # σ descending, zeros last


def test_raising_the_rank_loses_nothing(adapter, tmp_path):
    report = ao.compress(adapter, out=tmp_path / "c", rank=16)
    assert report.rank == 16
    assert distance(deltas(tmp_path / "c"), deltas(adapter)) < 1e-7


def test_energy_and_max_error_find_the_smallest_uniform_rank(adapter, tmp_path):
    tail = tails(deltas(adapter))
    for index, k in enumerate((1, 2, 4, 5)):
        bound = float(tail[k]) * 1.001
        report = ao.compress(adapter, out=tmp_path / f"e{index}", max_error=bound)
        assert report.rank == k and report.error <= bound
        report = ao.compress(adapter, out=tmp_path / f"n{index}", energy=1 - bound**2)
        assert report.rank == k


def test_a_bound_that_the_type_cannot_hold_is_refused(adapter, tmp_path):
    with pytest.raises(BudgetError, match="--dtype float32"):
        ao.compress(adapter, out=tmp_path / "c", max_error=1e-4, dtype="bfloat16")
    assert not (tmp_path / "c").exists()
    assert ao.compress(adapter, out=tmp_path / "c", max_error=1e-4, dtype="float32").error <= 1e-4


class TestRagged:
    def test_every_module_at_its_own_rank(self, tmp_path):
        pairs = {}
        for k, (stem, shape) in enumerate(SHAPES.items()):
            B, A = graded(shape, 6, k)
            B[:, k + 1 :] = 0.0
            pairs[stem] = (B, A)
        source = write_peft(tmp_path / "a", pairs, alpha=6.0)
        report = ao.compress(source, out=tmp_path / "c", ragged=True)
        assert [report.modules[stem].rank for stem in SHAPES] == [1, 2, 3, 4]
        assert distance(deltas(tmp_path / "c"), deltas(source)) < 1e-6

    def test_a_module_of_zeros_is_left_out_and_named(self, tmp_path):
        pairs = {stem: graded(shape, 4, k) for k, (stem, shape) in enumerate(SHAPES.items())}
        zero = next(iter(SHAPES))
        pairs[zero] = (np.zeros_like(pairs[zero][0]), pairs[zero][1])
        source = write_peft(tmp_path / "a", pairs, alpha=4.0)
        report = ao.compress(source, out=tmp_path / "c", ragged=True)
        assert report.dropped == (zero,)
        config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
        assert zero not in config["target_modules"]
        assert distance(deltas(tmp_path / "c"), deltas(source)) < 1e-6

    def test_max_error_holds_in_every_module(self, adapter, tmp_path):
        report = ao.compress(adapter, out=tmp_path / "c", max_error=0.2, ragged=True)
        assert all(module.error <= 0.2 for module in report.modules.values())
        assert len({module.rank for module in report.modules.values()}) > 1
        for stem, module in report.modules.items():  # and no rank is larger than needed
            values = np.linalg.svd(deltas(adapter)[stem], compute_uv=False)
            assert np.linalg.norm(values[module.rank - 1 :]) > 0.2 * np.linalg.norm(values)

    def test_dialects_of_one_rank_refuse(self, adapter, tmp_path):
        with pytest.raises(UsageError, match="one rank"):
            ao.compress(adapter, out=tmp_path / "c", energy=0.9, ragged=True, to="mlx")


class TestKohya:
    """sd-scripts' rules, restated on the dense matrix."""

    RULES: ClassVar = {
        "sv_ratio": lambda S, p: int((S[0] / p < S).sum()),
        "sv_fro": lambda S, p: next(
            k for k in range(1, len(S) + 1) if (S[:k] ** 2).sum() >= p**2 * (S**2).sum()
        ),
        "sv_cumulative": lambda S, p: next(
            k for k in range(1, len(S) + 1) if S[:k].sum() >= p * S.sum()
        ),
    }

    @pytest.mark.parametrize(
        "rule,value",
        [
            ("sv_ratio", 2.0),
            ("sv_ratio", 4.5),
            ("sv_fro", 0.9),
            ("sv_fro", 0.99),
            ("sv_cumulative", 0.6),
            ("sv_cumulative", 0.95),
        ],
    )
    def test_rules(self, adapter, tmp_path, rule, value):
        report = ao.compress(adapter, out=tmp_path / "c", **{rule: value})
        for stem, dense in deltas(adapter).items():
            S = np.linalg.svd(dense, compute_uv=False)
            assert report.modules[stem].rank == self.RULES[rule](S, value)

    def test_the_ceiling_caps(self, adapter, tmp_path):
        report = ao.compress(adapter, out=tmp_path / "c", sv_fro=0.999, max_rank=2)
        assert {module.rank for module in report.modules.values()} == {2}

    def test_written_as_sd_scripts_does(self, tmp_path):
        pairs = {f"lora_unet_m{k}": graded((12, 10), 5, k, 1.5 + k) for k in range(3)}
        source = write_kohya(tmp_path / "a.safetensors", pairs, alpha=2.5)
        out = tmp_path / "c.safetensors"
        report = ao.compress(source, out=out, sv_fro=0.9)
        ranks_written = {m.rank for m in report.modules.values()}
        assert len(ranks_written) > 1
        tensors = load_file(out)
        for stem, module in report.modules.items():
            assert tensors[f"{stem}.lora_down.weight"].shape[0] == module.rank
            assert tensors[f"{stem}.alpha"] == module.rank
        assert distance(deltas(out), deltas(source)) == pytest.approx(report.error, rel=1e-6)


class TestGlobal:
    def test_beats_uniform_at_equal_size(self, adapter, tmp_path):
        uniform = ao.compress(adapter, out=tmp_path / "u", rank=3)
        spread = ao.compress(adapter, out=tmp_path / "g", rank=3, allocate="global")
        assert spread.parameters <= uniform.parameters
        assert spread.error < uniform.error
        assert spread.gap == 0.0

    def test_a_target_is_met_with_fewer_parameters(self, adapter, tmp_path):
        uniform = ao.compress(adapter, out=tmp_path / "u", max_error=0.2)
        spread = ao.compress(adapter, out=tmp_path / "g", max_error=0.2, allocate="global")
        assert spread.error <= 0.2
        assert spread.parameters < uniform.parameters
        assert distance(deltas(tmp_path / "g"), deltas(adapter)) == pytest.approx(spread.error)

    def test_modules_at_rank_zero_are_named(self, adapter, tmp_path):
        report = ao.compress(adapter, out=tmp_path / "g", ratio=0.05, allocate="global")
        assert report.dropped
        for stem in report.dropped:
            assert report.modules[stem].rank == 0
            assert report.modules[stem].error == pytest.approx(1.0, rel=1e-12)
        assert set(deltas(tmp_path / "g")) == set(SHAPES) - set(report.dropped)
        assert distance(deltas(tmp_path / "g"), deltas(adapter)) == pytest.approx(report.error)

    def test_floor_and_ceiling(self, adapter, tmp_path):
        report = ao.compress(
            adapter, out=tmp_path / "g", ratio=0.5, allocate="global", min_rank=2, max_rank=4
        )
        assert {m.rank for m in report.modules.values()} <= {2, 3, 4}

    def test_size_counts_the_whole_file(self, adapter, tmp_path):
        for size in (4_000, 6_000, 9_000):
            out = tmp_path / str(size)
            report = ao.compress(adapter, out=out, size=size, allocate="global")
            assert (out / "adapter_model.safetensors").stat().st_size == report.size <= size

    def test_needs_a_budget(self, adapter, tmp_path):
        with pytest.raises(UsageError, match="--allocate global"):
            ao.compress(adapter, out=tmp_path / "g", allocate="global", dtype="float16")


class TestScaling:
    def test_keep_keeps_every_bit(self, adapter, tmp_path):
        report = ao.compress(adapter, out=tmp_path / "c", scaling="keep", ragged=True)
        before, after = factors_of(adapter), factors_of(tmp_path / "c")
        assert report.error == 0.0
        for name, (B, A) in before.items():
            np.testing.assert_array_equal(B, after[name][0])
            np.testing.assert_array_equal(A, after[name][1])
        config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (6, 9, False)

    def test_rslora(self, adapter, tmp_path):
        ao.compress(adapter, out=tmp_path / "c", scaling="rslora", rank=4)
        config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
        assert config["use_rslora"] is True
        assert config["lora_alpha"] / 2 == pytest.approx(1.5)
        back = ao.compress(tmp_path / "c", out=tmp_path / "d", scaling="keep", rank=4)
        assert back.error == 0.0
        assert distance(deltas(tmp_path / "d"), deltas(tmp_path / "c")) < 1e-12

    def test_kohya_rounds_alpha_and_says_so(self, tmp_path):
        pairs = {"lora_unet_m": graded((12, 10), 3, 1)}
        source = write_kohya(tmp_path / "a.safetensors", pairs, alpha=1.1)
        report = ao.compress(
            source, out=tmp_path / "c.safetensors", scaling="keep", rank=2, dtype="float32"
        )
        assert report.error == pytest.approx(
            distance(deltas(tmp_path / "c.safetensors"), deltas(source)), rel=1e-6
        )

    def test_dialects_without_a_place(self, adapter, tmp_path):
        with pytest.raises(UsageError, match="rslora"):
            ao.compress(adapter, out=tmp_path / "c", scaling="rslora", to="mlx")


class TestTargets:
    def test_ratio_counts_parameters(self, adapter, tmp_path):
        report = ao.compress(adapter, out=tmp_path / "c", ratio=0.5)
        assert report.rank == 3
        with pytest.raises(BudgetError, match=r"--ratio 0\.1"):
            ao.compress(adapter, out=tmp_path / "d", ratio=0.1)

    def test_a_size_too_small_says_what_is_possible(self, adapter, tmp_path):
        with pytest.raises(BudgetError) as caught:
            ao.compress(adapter, out=tmp_path / "c", size=500)
        smallest = ao.compress(adapter, out=tmp_path / "one", rank=1).size
        stated = int(re.search(r"([\d,]+) bytes", str(caught.value))[1].replace(",", ""))
        assert abs(stated - smallest) <= 24  # the option itself is recorded in the header

    def test_a_ceiling_below_what_is_needed(self, adapter, tmp_path):
        with pytest.raises(BudgetError, match="--max-rank is 2"):
            ao.compress(adapter, out=tmp_path / "c", energy=0.999, max_rank=2)

    def test_two_targets(self, adapter, tmp_path):
        with pytest.raises(UsageError, match="--rank and --ratio"):
            ao.compress(adapter, out=tmp_path / "c", rank=2, ratio=0.5)

    def test_nothing_to_do(self, adapter, tmp_path):
        with pytest.raises(UsageError, match="nothing to do"):
            ao.compress(adapter, out=tmp_path / "c")

    @pytest.mark.parametrize(
        "wrong",
        [
            {"ratio": 0.0},
            {"ratio": 1.5},
            {"sv_ratio": 0.5},
            {"sv_fro": 1.5},
            {"rank": 4, "max_rank": 2},
            {"energy": 0.9, "min_rank": 5, "max_rank": 2},
            {"energy": 0.9, "min_rank": 0},
            {"rank": 4, "allocate": "best"},
            {"rank": 4, "metric": "l1"},
            {"rank": 4, "form": "qr"},
            {"rank": 4, "scaling": "none"},
        ],
        ids=str,
    )
    def test_bad_options(self, adapter, tmp_path, wrong):
        with pytest.raises(UsageError):
            ao.compress(adapter, out=tmp_path / "c", **wrong)
        assert not (tmp_path / "c").exists()


def test_thresholds_agree_with_convert_to_lora(adapter, tmp_path):
    """PEFT's `convert_to_lora` keeps, per layer, the fewest directions with Σσ² ≥ t·total."""
    for threshold in (0.5, 0.9, 0.99):
        report = ao.compress(adapter, out=tmp_path / str(threshold), energy=threshold, ragged=True)
        for stem, dense in deltas(adapter).items():
            share = np.cumsum(np.linalg.svd(dense, compute_uv=False) ** 2)
            expected = int(np.argmax(share / share[-1] >= threshold)) + 1
            assert report.modules[stem].rank == expected


@pytest.mark.parametrize("amplify", [1e3, 1e6])
def test_a_gauge_changes_nothing(tmp_path, amplify):
    rng = np.random.default_rng(3)
    G = np.linalg.qr(rng.standard_normal((6, 6)))[0] * np.geomspace(1, amplify, 6)
    plain = {
        stem: graded(shape, 6, k, 2.0, np.float64) for k, (stem, shape) in enumerate(SHAPES.items())
    }
    bent = {stem: (B @ G, np.linalg.inv(G) @ A) for stem, (B, A) in plain.items()}
    one = write_peft(tmp_path / "a", plain, alpha=6.0)
    two = write_peft(tmp_path / "b", bent, alpha=6.0)
    first = ao.compress(one, out=tmp_path / "c", max_error=0.1, dtype="float32")
    second = ao.compress(two, out=tmp_path / "d", max_error=0.1, dtype="float32")
    assert first.rank == second.rank
    assert first.error == pytest.approx(second.error, rel=1e-6)


def test_an_adapter_doubled_inside_itself(tmp_path):
    """[B, −B₀]·[A; A₀] with A near A₀, as converted PiSSA adapters are, cancels inside."""
    rng = np.random.default_rng(5)
    pairs = {}
    for stem, (m, n) in SHAPES.items():
        B0, A0 = rng.standard_normal((m, 4)), rng.standard_normal((4, n))
        B, A = B0 + 1e-4 * rng.standard_normal((m, 4)), A0 + 1e-4 * rng.standard_normal((4, n))
        pairs[stem] = (np.hstack([B, -B0]), np.vstack([A, A0]))
    source = write_peft(tmp_path / "a", pairs, alpha=8.0)
    before = deltas(source)
    report = ao.compress(source, out=tmp_path / "c", rank=5, dtype="float32")
    assert report.truncation == pytest.approx(tails(before)[5], rel=1e-6)
    assert report.error == pytest.approx(distance(deltas(tmp_path / "c"), before), rel=1e-6)


def test_near_rank_deficient(tmp_path):
    pairs = {
        stem: graded(shape, 6, k, 1e4, np.float64) for k, (stem, shape) in enumerate(SHAPES.items())
    }
    source = write_peft(tmp_path / "a", pairs, alpha=6.0)
    before = deltas(source)
    for rank in (1, 2, 3):
        report = ao.compress(source, out=tmp_path / f"c{rank}", rank=rank, dtype="float32")
        assert report.truncation == pytest.approx(tails(before)[rank], rel=1e-3)


def test_the_choice_of_rules_is_one_of_all(tmp_path):
    with pytest.raises(ValueError, match="no rule"):
        ranks.by_kohya(np.ones(3), Ranks(rank=1))


class TestBatches:
    """Modules of one shape share a job on a device, experts of one tensor everywhere."""

    @pytest.mark.parametrize(
        "options",
        [
            {"energy": 0.9, "ragged": True},
            {"max_error": 0.2, "allocate": "global"},
            {"ratio": 0.5, "allocate": "global"},
            {"rank": 3, "form": "svd"},
        ],
        ids=str,
    )
    def test_a_device_gives_every_module_its_own_rank(self, adapter, tmp_path, options):
        one = ao.compress(adapter, out=tmp_path / "c", device="cpu", spectra=True, **options)
        two = ao.compress(adapter, out=tmp_path / "d", device="torch", spectra=True, **options)
        assert {s: m.rank for s, m in one.modules.items()} == {
            s: m.rank for s, m in two.modules.items()
        }
        assert two.error == pytest.approx(one.error, rel=1e-9)
        for stem, values in one.spectra.items():
            np.testing.assert_allclose(two.spectra[stem], values, rtol=1e-9, atol=1e-12)


def test_growing_is_said(tmp_path):
    """A LoHa of dim 4 has rank 16: its LoRA is twice as large, at half the rank as large as it."""
    rng = np.random.default_rng(4)
    shapes = {"w1_a": (60, 4), "w1_b": (4, 50), "w2_a": (60, 4), "w2_b": (4, 50)}
    tensors = {
        f"lora_unet_m.hada_{name}": rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "a.safetensors")
    grown = ao.convert(tmp_path / "a.safetensors", out=tmp_path / "b.safetensors")
    assert grown.parameters == 2 * grown.parameters_before == 1760
    assert any("as loha it took 880 numbers" in note for note in grown.notes)
    same = ao.compress(tmp_path / "a.safetensors", out=tmp_path / "c.safetensors", rank=8)
    assert same.parameters == 880 and not any("it took" in note for note in same.notes)
