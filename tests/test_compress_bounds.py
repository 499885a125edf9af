"""Bounds, budgets and ceilings at their edges: met to the last rank or refused by name."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import adapterops as ao
import adapterops.save
from adapterops import casts
from adapterops.activations import write_activations
from adapterops.basemodel import open_model
from adapterops.choosing import Known, choose_ranks
from adapterops.choosing.known import cut_off, storage_bound
from adapterops.errors import BudgetError, FinishedError, OutputExistsError, UsageError
from adapterops.extraction.adapter import difference
from adapterops.options import compute
from adapterops.save import save_sum
from tests import checkpoints, kinds, peft_models
from tests.support import Pairs, distance, load_file, pairs, write_kohya, write_peft

STEM = "lora_unet_down_blocks_{}_attentions_0_transformer_blocks_0_attn1_to_q"
LAYER = "model.layers.{}.self_attn.{}_proj"
MODES: dict[str, dict[str, Any]] = {
    "uniform": {},
    "ragged": {"ragged": True},
    "global": {"allocate": "global"},
}
modes = pytest.mark.parametrize("mode", MODES)


def ranks_of(report: Any) -> list[int]:
    return [module.rank for module in report.modules.values()]


def read(path: Path) -> dict[str, np.ndarray]:
    """ΔW of every module, dense, by adapterops' own reader (which other tests hold to PEFT)."""
    return {stem: factors.dense() for stem, factors in ao.open_adapter(path).items()}


def singular(values: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return [np.linalg.svd(value, compute_uv=False) for value in values.values()]


def tails(spectra: Sequence[np.ndarray]) -> np.ndarray:
    """Error of the best uniform rank k = 0, 1, …, relative."""
    width = max(map(len, spectra))
    squares = sum(np.pad(s**2, (0, width + 1 - len(s))) for s in spectra)
    left = np.cumsum(squares[::-1])[::-1]
    return np.sqrt(left / left[0])


def layers(count: int, names: str = "qv") -> list[str]:
    return [LAYER.format(i, name) for i in range(count) for name in names]


def random_adapter(folder: Path, rank: int = 16, modules: int = 6, dtype: Any = "f4") -> Path:
    return write_peft(folder, pairs(1, dict.fromkeys(layers(modules // 2), (48, 40)), rank, dtype))


def planted(
    values: Sequence[float], shape: tuple[int, int], seed: int, dtype: Any = "f8"
) -> tuple[np.ndarray, np.ndarray]:
    """B and A with these singular values, in no particular columns."""
    rng = np.random.default_rng(seed)
    rank = len(values)
    U, V = (np.linalg.qr(rng.standard_normal((size, rank)))[0] for size in shape)
    turn = np.linalg.qr(rng.standard_normal((rank, rank)))[0]
    root = np.sqrt(np.asarray(values, dtype=float))
    B, A = (U * root) @ turn, turn.T @ (root[:, None] * V.T)
    return np.ascontiguousarray(B, dtype), np.ascontiguousarray(A, dtype)


def loha(file: Path, sides: Mapping[str, tuple[int, int, int]]) -> dict[str, np.ndarray]:
    """A LoHa file of (out, in, dim) by stem, and the ΔW that it means; alpha = dim."""
    rng = np.random.default_rng(3)
    modules = {}
    for stem, (m, n, dim) in sides.items():
        shapes = {"w1_a": (m, dim), "w1_b": (dim, n), "w2_a": (m, dim), "w2_b": (dim, n)}
        modules[stem] = {
            f"hada_{name}": rng.standard_normal(shape).astype("f4")
            for name, shape in shapes.items()
        }
    kinds.write(file, modules, {stem: np.float32(sides[stem][2]) for stem in sides})
    return {stem: kinds.dense(arrays) for stem, arrays in modules.items()}


def lokr(file: Path) -> dict[str, np.ndarray]:
    """A LoKr file of one module with 1,030 columns, and the ΔW that it means."""
    rng = np.random.default_rng(4)
    arrays = {
        "lokr_w1": rng.standard_normal((5, 5)).astype("f4"),
        "lokr_w2": (rng.standard_normal((206, 206)) / 10).astype("f4"),
    }
    stem = STEM.format(1)
    kinds.write(file, {stem: arrays}, {stem: np.float32(5)})
    return {stem: kinds.dense(arrays)}


@pytest.fixture(scope="module", params=["LoHa", "LoKr"])
def weighed(request: Any, tmp_path_factory: Any) -> tuple[Path, Path, np.ndarray, np.ndarray]:
    """An adapter of more than 1,024 columns and inputs, as files and as ΔW and X."""
    folder = tmp_path_factory.mktemp("inputs")
    file = folder / "a.safetensors"
    made = lokr(file) if request.param == "LoKr" else loha(file, {STEM.format(1): (40, 48, 33)})
    [(stem, delta)] = made.items()
    rng = np.random.default_rng(5)
    n = delta.shape[1]
    X = (rng.standard_normal((150, n)) * np.geomspace(1, 1e-3, n)).astype("f4")
    write_activations(folder / "x", {stem: ("samples", X)}, tokens=150, model="m")
    return file, folder / "x", delta, X.astype(float)


@pytest.mark.parametrize("target", ["rank", "max_error"])
def test_inputs_of_many_columns(target: str, weighed: Any, tmp_path: Path) -> None:
    """Plain sums of so many go through the range finder, which knows nothing of inputs."""
    file, inputs, delta, X = weighed
    best = tails([np.linalg.svd(delta @ X.T, compute_uv=False)])
    options = {"rank": 8} if target == "rank" else {"max_error": float(best[8]) * 1.0001}
    out = tmp_path / "b.safetensors"
    report = ao.compress(file, out=out, metric="activation", activations=inputs, **options)
    [written] = read(out).values()
    lost = np.linalg.norm((delta - written) @ X.T) / np.linalg.norm(delta @ X.T)
    assert report.rank == 8
    assert report.metric_error == pytest.approx(lost, rel=1e-6)
    assert report.metric_error == pytest.approx(best[8], rel=1e-6)
    plain = np.linalg.norm(delta - written) / np.linalg.norm(delta)
    assert report.error == pytest.approx(plain, rel=1e-6)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: Any) -> tuple[Path, Path, np.ndarray]:
    """Two checkpoints whose difference has a spectrum that hardly falls, and its best errors."""
    folder = tmp_path_factory.mktemp("noisy")
    rng = np.random.default_rng(0)
    size, name = 600, f"{LAYER.format(0, 'q')}.weight"
    base = (0.02 * rng.standard_normal((size, size))).astype("f4")
    low = rng.standard_normal((size, 40)) @ rng.standard_normal((40, size)) / 6
    tuned = (base + 1e-3 * (low + 0.6 * rng.standard_normal((size, size)))).astype("f4")
    checkpoints.write(folder / "base", {name: base})
    checkpoints.write(folder / "tuned", {name: tuned})
    best = tails([np.linalg.svd(tuned.astype(float) - base, compute_uv=False)])
    return folder / "base", folder / "tuned", best


def between(best: float, measured: float) -> float:
    """A target that the estimate of a rank's error is below and its error as written is not."""
    assert measured > best * (1 + 1e-7)
    return measured - 0.1 * (measured - best)


class TestRangeFinder:
    """Its factors lose a little more than the spectrum says; the next rank makes up for it."""

    @pytest.mark.parametrize("rank", [44, 60])
    def test_of_checkpoints(self, rank: int, noisy: Any, tmp_path: Path) -> None:
        base, tuned, best = noisy
        report = ao.extract(base, tuned, out=tmp_path / "rank", rank=rank)
        target = between(best[rank], report.error)
        met = ao.extract(base, tuned, out=tmp_path / "error", max_error=target)
        assert (met.rank, met.modules[LAYER.format(0, "q")].route) == (rank + 1, "range")
        assert best[met.rank] < met.error <= target

    @pytest.mark.parametrize("rank", [44, 60])
    def test_energy_is_kept_as_measured(self, rank: int, noisy: Any, tmp_path: Path) -> None:
        base, tuned, best = noisy
        report = ao.extract(base, tuned, out=tmp_path / "rank", rank=rank)
        energy = 1 - between(best[rank], report.truncation) ** 2
        met = ao.extract(base, tuned, out=tmp_path / "energy", energy=energy)
        assert met.rank == rank + 1
        assert met.truncation**2 <= 1 - energy

    def test_of_columns(self, tmp_path: Path) -> None:
        file = tmp_path / "a.safetensors"
        best = tails(singular(lokr(file)))
        report = ao.compress(file, out=tmp_path / "rank.safetensors", rank=60)
        assert {module.route for module in report.modules.values()} == {"range"}
        target = between(best[60], report.error)
        for mode, options in MODES.items():
            out = tmp_path / f"{mode}.safetensors"
            met = ao.compress(file, out=out, max_error=target, **options)
            assert met.rank == 61 and best[61] < met.error <= target, mode
        out = tmp_path / "again.safetensors"
        assert ao.compress(file, out=out, max_error=report.error, ragged=True).rank == 60
        energy = 1 - target**2
        met = ao.compress(file, out=tmp_path / "energy.safetensors", energy=energy)
        assert met.rank == 61 and met.truncation**2 <= 1 - energy

    @pytest.mark.parametrize("target", ["energy", "max_error"])
    @pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
    def test_what_was_not_computed_counts_by_its_square(
        self, size: float, target: str, tmp_path: Path
    ) -> None:
        """Allocated over two changes of which 16 directions are known and the rest as one norm."""
        rng = np.random.default_rng(2)
        plain, changed = {}, {}
        for index, fall in enumerate((1.25, 1.1)):
            B, A = planted(fall ** -np.arange(60.0), (300, 260), index)
            name = f"{LAYER.format(index, 'q')}.weight"
            plain[name] = (size * rng.standard_normal((300, 260))).astype("f4")
            changed[name] = (plain[name] + size * B @ A).astype("f4")
        paths = [
            checkpoints.write(tmp_path / name, values)
            for name, values in (("base", plain), ("tuned", changed))
        ]
        found = difference(
            *map(open_model, paths),
            modules=None,
            vectors="error",
            embeddings="lora",
            on=compute("cpu", None, 1),
            progress=None,
        )
        spectra = singular({name: changed[name].astype(float) - plain[name] for name in plain})
        squares = np.sort(np.concatenate(spectra) ** 2)[::-1]
        left = 1 - np.cumsum(squares) / np.sum(squares)  # of equal shapes the largest go first
        count = 14
        wanted = math.sqrt(left[count - 1]) * 1.005
        options = {"energy": 1 - wanted**2, "max_error": wanted}
        report = save_sum(
            [found.file],
            [1.0],
            tmp_path / "out",
            verb="extract",
            allocate="global",
            max_rank=16,
            jobs=1,
            **{target: options[target]},
        )
        assert sum(ranks_of(report)) == count and max(ranks_of(report)) < 16
        assert report.error == pytest.approx(math.sqrt(left[count - 1]), rel=1e-3)
        assert report.error <= wanted


class TestReachedAgain:
    @pytest.mark.parametrize("mode", ["uniform", "global"])
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_an_error_that_was_reached(self, dtype: str, mode: str, tmp_path: Path) -> None:
        adapter = random_adapter(tmp_path / "a")
        first = ao.compress(adapter, out=tmp_path / "b", rank=8, dtype=dtype)
        again = ao.compress(
            adapter, out=tmp_path / "c", max_error=first.error, dtype=dtype, **MODES[mode]
        )
        assert set(ranks_of(again)) == {8}
        assert again.error == first.error

    @modes
    @pytest.mark.parametrize("bound", [5e-5, 1e-4])
    def test_what_a_narrow_type_holds_as_it_is(self, bound: float, mode: str, tmp_path: Path):
        """Other ranks cost 3·10⁻⁴ in float16; the whole adapter is one already."""
        values = [1, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 1e-6]
        factors = {stem: planted(values, (48, 40), i, "f2") for i, stem in enumerate(layers(2))}
        adapter = write_peft(tmp_path / "a", factors)
        report = ao.compress(adapter, out=tmp_path / "b", max_error=bound, **MODES[mode])
        assert report.error == 0.0 and set(ranks_of(report)) == {8}
        before, after = (
            load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "b")
        )
        assert before.keys() == after.keys()
        assert all((before[name] == after[name]).all() for name in before)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_where_storing_decides(self, dtype: str, tmp_path: Path) -> None:
        """What it loses differs a little from rank to rank: every rank is found again."""
        factors = {stem: planted(10.0 ** -np.arange(7.0), (14, 11), 0, "f4") for stem in layers(1)}
        adapter = write_peft(tmp_path / "a", factors)
        out = outputs(tmp_path)
        errors = [
            ao.compress(adapter, out=next(out), rank=rank, dtype=dtype).error
            for rank in range(1, 8)
        ]
        for error in errors:
            least = next(rank for rank, each in enumerate(errors, 1) if each <= error)
            again = ao.compress(adapter, out=next(out), max_error=error, dtype=dtype)
            assert again.rank == least, error

    @modes
    def test_columns_that_add_nothing(self, mode: str, tmp_path: Path) -> None:
        """Of rank 3 as numbers go, of rank 6 as it is stored, which costs nothing."""
        factors = {}
        for i, stem in enumerate(layers(2)):
            B, A = planted([1, 0.8, 0.6], (48, 40), i, "f2")
            factors[stem] = np.hstack([B, B]), np.vstack([A, A])
        adapter = write_peft(tmp_path / "a", factors)
        report = ao.compress(adapter, out=tmp_path / "b", max_error=1e-5, **MODES[mode])
        assert report.error == 0.0 and set(ranks_of(report)) == {6}


class TestCeilings:
    @modes
    @pytest.mark.parametrize("ceiling", [4, 8])
    def test_the_same_rank_is_capped(self, mode: str, ceiling: int, tmp_path: Path) -> None:
        adapter = random_adapter(tmp_path / "a")
        out = tmp_path / "b"
        report = ao.compress(adapter, out=out, rank="same", max_rank=ceiling, **MODES[mode])
        assert set(ranks_of(report)) == {ceiling}

    @modes
    @pytest.mark.parametrize("target", [{"size": 40_000}, {"ratio": 0.5}], ids=str)
    def test_a_budget_is_capped(self, mode: str, target: Any, tmp_path: Path) -> None:
        adapter = random_adapter(tmp_path / "a")
        free = ao.compress(adapter, out=tmp_path / "b", **target, **MODES[mode])
        assert max(ranks_of(free)) > 4
        report = ao.compress(adapter, out=tmp_path / "c", max_rank=4, **target, **MODES[mode])
        assert set(ranks_of(report)) == {4}

    def test_a_ragged_size_keeps_the_floor(self, tmp_path: Path) -> None:
        """Also where a module needs less; what the floor takes may not fit at all."""
        factors = {
            stem: planted(0.9 ** -np.arange(rank), (48, 40), rank, "f4")
            for stem, rank in zip(layers(2), (16, 3, 16, 16), strict=True)
        }
        factors = {
            stem: (np.pad(B, ((0, 0), (0, 16 - len(A)))), np.pad(A, ((0, 16 - len(A)), (0, 0))))
            for stem, (B, A) in factors.items()
        }
        adapter = write_peft(tmp_path / "a", factors)
        sizes = {
            rank: ao.compress(adapter, out=tmp_path / f"u{rank}", rank=rank).size for rank in (5, 6)
        }
        spare = 300  # of names and options in the header
        for room, expected in ((sizes[6] + spare, [6, 6, 6, 6]), (sizes[6] + 1500, [7, 6, 7, 7])):
            report = ao.compress(
                adapter, out=tmp_path / str(room), size=room, min_rank=6, ragged=True
            )
            assert ranks_of(report) == expected and report.size <= room
        with pytest.raises(BudgetError, match="the smallest adapter of rank 6"):
            out = tmp_path / "no"
            ao.compress(adapter, out=out, size=sizes[5] + spare, min_rank=6, ragged=True)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"rank": 12, "max_rank": 12}, "--rank 12 needs rank 16, --max-rank is 12"),
            ({"rank": "same", "max_rank": 12}, "--rank same needs rank 16, --max-rank is 12"),
            ({"size": 40_000, "max_rank": 4}, "--size 40000 needs rank 8, --max-rank is 4"),
            ({"ratio": 0.9, "max_rank": 4}, r"--ratio 0\.9 needs rank 8, --max-rank is 4"),
        ],
        ids=["rank", "same", "size", "ratio"],
    )
    def test_an_engine_with_no_rank_below(self, options: Any, says: str, tmp_path: Path) -> None:
        """LoRAX takes 8, 16, 32, …"""
        adapter = random_adapter(tmp_path / "a", dtype="f2")
        with pytest.raises(BudgetError, match=says) as caught:
            ao.compress(adapter, out=tmp_path / "b", engine="lorax", **options)
        assert "LoRAX" in str(caught.value) and not (tmp_path / "b").exists()
        larger = {**options, "max_rank": 16}
        report = ao.compress(adapter, out=tmp_path / "b", engine="lorax", **larger)
        assert report.rank in (8, 16)

    def test_a_ceiling_of_nothing(self, tmp_path: Path) -> None:
        adapter = random_adapter(tmp_path / "a")
        with pytest.raises(UsageError, match="--max-rank bounds what a target chooses"):
            ao.convert(adapter, out=tmp_path / "b", max_rank=4)
        assert ao.convert(adapter, out=tmp_path / "c", rank="same", max_rank=4).rank == 4


class TestStoredParameters:
    def test_a_ragged_ratio_is_of_what_each_module_stores(self, tmp_path: Path) -> None:
        """A LoHa of dim d stores 2·d·(m + n) numbers and is of rank up to d²."""
        sides = {
            STEM.format(1): (40, 48, 8),
            STEM.format(2): (64, 48, 5),
            STEM.format(3): (9, 8, 6),
        }
        loha(tmp_path / "a.safetensors", sides)
        out = tmp_path / "b.safetensors"
        report = ao.compress(tmp_path / "a.safetensors", out=out, ratio=0.5, ragged=True)
        ranks = {stem: module.rank for stem, module in report.modules.items()}
        assert ranks == {stem: dim for stem, (*_, dim) in sides.items()}
        numbers = dict.fromkeys(sides, 0)
        for name, value in load_file(out).items():
            if value.ndim == 2:
                numbers[name.partition(".")[0]] += value.size
        for stem, (m, n, dim) in sides.items():
            assert numbers[stem] <= 0.5 * 2 * dim * (m + n) < numbers[stem] + m + n

    def test_loha_of_unequal_rank_is_no_larger_than_it_is(self, tmp_path: Path) -> None:
        """All at the largest rank would outgrow the dense changes; each at its own does not."""
        sides = {STEM.format(i): (100, 100, 2) for i in range(6)} | {STEM.format(6): (64, 64, 8)}
        before = loha(tmp_path / "a.safetensors", sides)
        assert 64 * sum(m + n for m, n, _ in sides.values()) > sum(x.size for x in before.values())
        report = ao.convert(tmp_path / "a.safetensors", out=tmp_path / "b.safetensors")
        assert ranks_of(report) == [4] * 6 + [64] and report.error < 1e-7
        assert distance(kinds.plain(tmp_path / "b.safetensors"), before) < 1e-7
        large = {stem: (m, n, 9) for stem, (m, n, _) in sides.items()}
        loha(tmp_path / "c.safetensors", large)
        with pytest.raises(UsageError, match="rank 81 and"):
            ao.convert(tmp_path / "c.safetensors", out=tmp_path / "d.safetensors")


class TestOptions:
    @pytest.mark.parametrize("to", ["kohya", "diffusers", "mlx"])
    def test_an_engine_reads_peft(self, to: str, tmp_path: Path) -> None:
        adapter = write_kohya(tmp_path / "a.safetensors", pairs(1, {STEM.format(1): (48, 40)}, 8))
        with pytest.raises(UsageError, match=f"--engine vllm reads PEFT's dialect.*--to {to}"):
            ao.compress(adapter, out=tmp_path / "b", rank=4, engine="vllm", to=to)

    def test_a_base_that_says_nothing(self, tmp_path: Path) -> None:
        adapter = random_adapter(tmp_path / "a")
        with pytest.raises(UsageError, match="--base"):
            ao.compress(adapter, out=tmp_path / "b", rank=4, base=tmp_path / "none")
        with pytest.raises(UsageError, match="open already"):
            opened = ao.open_adapter(adapter)
            ao.convert(opened, out=tmp_path / "b", rank=4, base=tmp_path / "none")

    @pytest.mark.parametrize("based", [False, True], ids=["alone", "with its base"])
    def test_an_alpha_for_no_input(self, based: bool, tmp_path: Path) -> None:
        adapter = random_adapter(tmp_path / "a")
        weights = {f"{stem}.weight": np.ones((48, 40)) for stem in layers(3)}
        base = checkpoints.write(tmp_path / "base", weights) if based else None
        with pytest.raises(UsageError, match="--alpha names 'zz', which is not among the inputs"):
            ao.convert(adapter, out=tmp_path / "b", base=base, alpha={"zz": 3})

    @pytest.mark.parametrize(
        "options",
        [
            {"max_error": np.float64(0.3)},
            {"max_error": np.float32(0.25)},
            {"energy": np.float32(0.75), "max_rank": np.int64(14)},
            {"energy": np.float64(0.9), "min_rank": np.int32(15)},
            {"rank": np.int64(5)},
            {"rank": np.int16(5), "allocate": "global", "max_rank": np.uint8(7)},
            {"ratio": np.float16(0.5)},
            {"sv_fro": np.float64(0.9), "max_rank": np.int64(9)},
        ],
        ids=str,
    )
    def test_numbers_of_numpy(self, options: Any, tmp_path: Path) -> None:
        """The same outputs to the last byte, sidecars too."""
        adapter = random_adapter(tmp_path / "a")
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in options.items()}
        for name, each in (("numpy", options), ("plain", plain)):
            (tmp_path / name).mkdir()
            ao.compress(adapter, out=tmp_path / name / "out", **each)
        files = sorted(path.name for path in (tmp_path / "plain" / "out").iterdir())
        assert "adapter_model.safetensors" in files
        for name in files:
            one, two = (
                (tmp_path / each / "out" / name).read_bytes() for each in ("numpy", "plain")
            )
            assert one == two or name == "adapterops.json", name

    @pytest.mark.parametrize("name", ["verb", "recorded", "metric", "as_stored", "with_spectra"])
    def test_save_knows_its_options(self, name: str, tmp_path: Path) -> None:
        opened = ao.open_adapter(random_adapter(tmp_path / "a"))
        values: dict[str, Any] = {"verb": "compress", "metric": "frobenius", "recorded": {"x": 1}}
        with pytest.raises(TypeError, match=f"unexpected option '{name}'"):
            opened.save(tmp_path / "b", rank=4, **{name: values.get(name, True)})
        assert not (tmp_path / "b").exists()

    def test_save_takes_forms_and_ragged_ranks(self, tmp_path: Path) -> None:
        opened = ao.open_adapter(random_adapter(tmp_path / "a"))
        both = opened + 0.5 * opened
        report = both.save(tmp_path / "b", form="svd", ragged=True, energy=0.9)
        assert report.error <= math.sqrt(0.1) * (1 + 1e-6)
        exact = {stem: factors.dense() for stem, factors in both.items()}
        assert distance(read(tmp_path / "b"), exact) == pytest.approx(report.error, rel=1e-6)
        tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
        for stem, module in report.modules.items():
            B = tensors[f"base_model.model.{stem}.lora_B.weight"].astype(float)
            assert B.shape[1] == module.rank
            np.testing.assert_allclose(B.T @ B, np.diag(np.diag(B.T @ B)), atol=1e-5)


def test_other_samples_are_another_input(tmp_path: Path) -> None:
    """They differ after 4 KiB only: an output made of the first is not finished for the second."""
    stem = "model.layers.0.mlp.down_proj"
    adapter = write_peft(tmp_path / "a", pairs(2, {stem: (32, 1100)}, 8))
    rng = np.random.default_rng(6)
    first = rng.standard_normal((64, 1100))
    second = np.concatenate([first[:1], rng.standard_normal((63, 1100))])
    options: dict[str, Any] = {"out": tmp_path / "out", "rank": 2, "metric": "activation"}
    for name, X in (("first", first), ("second", second)):
        write_activations(tmp_path / name, {stem: ("samples", X)}, tokens=64, model="m")
    ao.compress(adapter, activations=tmp_path / "first", **options)
    with pytest.raises(OutputExistsError, match="another input") as caught:
        ao.compress(adapter, activations=tmp_path / "second", **options)
    assert not isinstance(caught.value, FinishedError)
    with pytest.raises(FinishedError, match="nothing to do"):
        ao.compress(adapter, activations=tmp_path / "first", **options)


class TestConverted:
    @pytest.mark.parametrize(
        "options",
        [{}, {"dtype": "bfloat16"}, {"scaling": "rslora"}, {"scaling": "folded"}, {"rank": "same"}],
        ids=str,
    )
    def test_ranks_of_their_own_are_read_back_by_peft(self, options: Any, tmp_path: Path) -> None:
        """`rank="same"` asks for one rank for all, the largest."""
        config: dict[str, Any] = {
            "r": 6,
            "lora_alpha": 9,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 4, "layers.1.mlp.down_proj": 3},
            "alpha_pattern": {"down_proj": 11},
        }
        peft_models.trained(tmp_path / "a", 1, "llama", **config)
        report = ao.convert(tmp_path / "a", out=tmp_path / "b", **options)
        written = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
        same = "rank" in options
        expected = {
            stem: 6 if same else 4 if "v_proj" in stem else 3 if "1.mlp.down" in stem else 6
            for stem in report.modules
        }
        assert {stem: module.rank for stem, module in report.modules.items()} == expected
        assert bool(written["rank_pattern"]) != same
        one, two = (peft_models.reloaded(tmp_path / name, "llama") for name in "ab")
        held = {stem: layer.r["default"] for stem, layer in peft_models.layers(two).items()}
        assert held == expected
        before, after = peft_models.deltas(one), peft_models.deltas(two)
        limit = {"bfloat16": 4e-3}.get(options.get("dtype", ""), 2e-7)
        assert distance(after, before) < limit

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"dtype": "float32"},
            {"scaling": "rslora"},
            {"scaling": "folded"},
            {"to": "mlx"},
            {"rank": "same"},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("ragged", [False, True], ids=["one rank", "ranks of their own"])
    def test_zeros_keep_their_sign(self, ragged: bool, options: Any, tmp_path: Path) -> None:
        factors = pairs(3, dict.fromkeys(layers(1), (12, 10)), 4)
        for B, A in factors.values():
            B[::3, 1], A[2, ::2], B[0, 0] = -0.0, -0.0, 0.0
        short = layers(1)[1]
        if ragged:
            B, A = factors[short]
            factors[short] = np.ascontiguousarray(B[:, :3]), np.ascontiguousarray(A[:3])
        pattern = {short: 3} if ragged else {}
        adapter = write_peft(
            tmp_path / "a", factors, r=4, alpha=4, rank_pattern=pattern, alpha_pattern=pattern
        )
        ao.convert(adapter, out=tmp_path / "b", **options)
        [file] = (tmp_path / "b").glob("adapter*.safetensors")
        written = load_file(file)
        for stem, pair in factors.items():
            for value, theirs, mlx in zip(pair, "BA", "ba", strict=True):
                name = f"base_model.model.{stem}.lora_{theirs}.weight"
                found = written[name] if name in written else written[f"{stem}.lora_{mlx}"].T
                rows, columns = value.shape
                bits = np.ascontiguousarray(found[:rows, :columns]).view("u4")
                assert (bits == value.view("u4")).all(), (stem, theirs)
                assert not found[rows:].any() and not found[:, columns:].any()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("embeddings", ["save", "lora"])
def test_the_tied_head_of_gpt_neox(embeddings: str, tmp_path: Path) -> None:
    """Its files call a head of its own `embed_out`; what the model calls it, PEFT must find."""
    import torch
    from peft import PeftModel
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    def made() -> Any:
        torch.manual_seed(1)
        config = GPTNeoXConfig(
            hidden_size=24,
            intermediate_size=36,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=32,
            max_position_embeddings=16,
            tie_word_embeddings=True,
        )
        return GPTNeoXForCausalLM(config).eval()

    model = made()
    model.save_pretrained(tmp_path / "base")
    checkpoints.change(model, lambda name: name.endswith("weight") and "norm" not in name)
    model.save_pretrained(tmp_path / "tuned")
    after = checkpoints.logits(model)
    out = tmp_path / "out"
    ao.extract(tmp_path / "base", tmp_path / "tuned", out=out, rank=2, embeddings=embeddings)
    with peft_models.quiet():
        got = checkpoints.logits(PeftModel.from_pretrained(made(), str(out)).eval())
    assert np.abs(after - checkpoints.logits(made())).max() > 1e-3
    assert np.abs(got - after).max() < 2e-5 * max(1.0, np.abs(after).max())


# ---- any small adapter ---------------------------------------------------------------------------

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@st.composite
def small(draw: Any) -> tuple[Pairs, str]:
    """Factors of one to three modules as a file of this type would hold them."""
    rank = draw(st.integers(1, 6))
    size, fall = 10.0 ** draw(st.integers(-6, 2)), draw(st.sampled_from([1.0, 1.3, 2.0, 10.0]))
    gauge = 10.0 ** draw(st.integers(-2, 2))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    factors = {}
    for stem in layers(draw(st.integers(1, 3)), "q"):
        shape = draw(st.integers(rank, 14)), draw(st.integers(rank, 14))
        B, A = planted(size * fall ** -np.arange(rank), shape, draw(st.integers(0, 2**16)))
        stored = (casts.round_to(value, DTYPES[dtype]) for value in (B * gauge, A / gauge))
        factors[stem] = tuple(value.astype("f4") for value in stored)
    return factors, dtype


def written(folder: Path, factors: Pairs, dtype: str) -> Path:
    """A PEFT directory of this type."""
    write_peft(folder, factors)
    tensors = load_file(folder / "adapter_model.safetensors")
    data = checkpoints.encode(tensors, DTYPES[dtype])
    (folder / "adapter_model.safetensors").write_bytes(data)
    return folder


def outputs(folder: Path) -> Iterator[Path]:
    return (folder / f"out{index}" for index in itertools.count())


NARROW = planted([1, 0.1, 1e-2, 1e-3], (12, 10), 7, "f4")


@given(small(), st.floats(-5, -0.1), st.sampled_from(["keep", *DTYPES]))
@example(({layers(1)[0]: NARROW}, "float32"), -3.2, "bfloat16")
@example(({layers(1)[0]: NARROW}, "float32"), -5.0, "float16")
def test_a_bound_is_met_or_out_of_reach(made: Any, exponent: float, dtype: str) -> None:
    """In every way of choosing; refused only where at every rank storing alone costs more."""
    (factors, held), bound = made, 10.0**exponent
    with tempfile.TemporaryDirectory() as folder:
        paths = outputs(Path(folder))
        adapter = written(next(paths), factors, held)
        exact = read(adapter)
        best = tails(singular(exact))
        for mode, options in MODES.items():
            given = {"dtype": dtype, "jobs": 1, **options}
            out = next(paths)
            try:
                report = ao.compress(adapter, out=out, max_error=bound, **given)
            except BudgetError as error:
                assert "cannot be met: storing the result" in str(error), mode
                for rank in range(1, max(len(A) for _, A in factors.values()) + 1):
                    one = ao.compress(adapter, out=next(paths), rank=rank, dtype=dtype, jobs=1)
                    assert one.metric_error > bound
                continue
            assert report.metric_error <= bound
            kept = read(out)
            lost = distance({stem: kept.get(stem, 0 * exact[stem]) for stem in exact}, exact)
            assert lost <= bound * (1 + 1e-9)
            assert lost == pytest.approx(report.metric_error, rel=1e-6, abs=1e-14)
            near = np.abs(best / bound - 1).min() < 1e-6
            storage = {"F32": 1e-6}.get(DTYPES.get(dtype, DTYPES[held]), 1e-2)
            if mode == "uniform" and bound > 100 * storage and not near:
                assert report.rank == max(1, int(np.argmax(best <= bound)))  # exactly the least
            if mode == "ragged":
                for stem, module in report.modules.items():
                    values = np.linalg.svd(exact[stem], compute_uv=False)
                    cut = np.linalg.norm(values[module.rank :]) / np.linalg.norm(values)
                    assert cut <= bound * (1 + 1e-6)


@given(small(), st.sampled_from(["keep", *DTYPES]), st.booleans())
def test_what_storing_loses_is_bounded(made: Any, dtype: str, mixed: bool) -> None:
    """No trial is made where this bound says that none is needed: it holds at every rank."""
    factors, held = made
    tried = []

    def spy(chosen: Any, known: Known) -> Any:
        count, top = len(known.plan.modules), max(len(A) for _, A in factors.values())
        assert known.bounded
        for rank in range(1, top + 2):
            ranks = [max(1, rank - mixed * i) for i in range(count)]
            error = known.error_at(ranks)
            assert error <= (cut_off(known, ranks) + storage_bound(ranks, known)) * (1 + 1e-12)
            tried.append(error)
        return choose_ranks(chosen, known)

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(adapterops.save, "choose_ranks", spy),
    ):
        adapter = written(Path(folder, "a"), factors, held)
        ao.compress(adapter, out=Path(folder, "b"), energy=0.9, dtype=dtype, jobs=1)
    assert tried
