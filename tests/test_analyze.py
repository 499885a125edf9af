"""analyze: every figure against dense float64, planted situations, files of all kinds."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import adapterops as ao
from adapterops.analysis.candidates import methods
from adapterops.analysis.kernel import Settings, figures, peak
from adapterops.analysis.report import AnalysisReport, PairAnalysis
from adapterops.combining import combine
from adapterops.difference.task import plan_task
from adapterops.errors import IncompatibleError, NumericsError, UnsupportedError, UsageError
from adapterops.options import compute
from adapterops.render.analyze import page
from tests.support import dense, pairs, write_kohya, write_peft
from tests.trained import SHAPES, mapped, mixed, trained, turned

Dense = Mapping[str, np.ndarray]
ALL = 10**6  # samples: every entry of the small modules


def looked_at(adapters: Sequence[Any], *args: Any, **options: Any) -> AnalysisReport:
    """The report, which must survive JSON and be printable."""
    report = ao.analyze(adapters, *args, **options)
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["schema"] == "adapterops.analyze/1"
    assert page(report) and page(report, verbose=True)
    return report


def flat(deltas: Dense, stems: Sequence[str]) -> np.ndarray:
    """All modules as one vector; one that is absent is zero."""
    return np.concatenate(
        [deltas.get(stem, np.zeros(SHAPES[stem])).ravel().astype(float) for stem in stems]
    )


def spaces(delta: np.ndarray, side: int) -> np.ndarray:
    U, values, Vh = np.linalg.svd(delta)
    kept = int((values > 1e-9 * values[0]).sum())
    return (U if side == 0 else Vh.T)[:, :kept]


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Dense]]:
    """Three adapters of ranks 8, 5 and 3, of different scales, the last without two modules."""
    folder = tmp_path_factory.mktemp("mix")
    part = {name: pairs(4, SHAPES, 3)[name] for name in list(SHAPES)[:4]}
    files = [
        write_peft(folder / "one", trained(1, 50)),
        write_peft(folder / "two", pairs(2, SHAPES, 5), alpha=10),
        write_peft(folder / "three", part, alpha=1),
    ]
    deltas = [dense(trained(1, 50)), dense(pairs(2, SHAPES, 5), 2.0), dense(part, 1 / 3)]
    return files, deltas


WEIGHTS = [0.7, -0.4, 2.0]


@pytest.fixture(scope="module")
def report(mix: tuple[list[Path], list[Dense]]) -> AnalysisReport:
    return looked_at(mix[0], WEIGHTS, samples=ALL)


def test_norms_and_shares(mix: Any, report: AnalysisReport) -> None:
    vectors = [flat(one, list(SHAPES)) for one in mix[1]]
    sizes = [abs(w) * np.linalg.norm(x) for w, x in zip(WEIGHTS, vectors, strict=True)]
    for one, vector, size, weight in zip(report.inputs, vectors, sizes, WEIGHTS, strict=True):
        assert one.norm == pytest.approx(np.linalg.norm(vector), rel=1e-12)
        assert one.share == pytest.approx(size / sum(sizes), rel=1e-12)
        assert one.weight == weight and not one.zero
    assert [one.rank for one in report.inputs] == [8, 5, 3]
    assert [one.modules for one in report.inputs] == [6, 6, 4]
    assert [one.scales for one in report.inputs] == [(1, 1), (2, 2), (1 / 3, 1 / 3)]
    for stem, module in report.modules.items():
        own = [
            w * one.get(stem, np.zeros(SHAPES[stem]))
            for w, one in zip(WEIGHTS, mix[1], strict=True)
        ]
        norms = [float(np.linalg.norm(x)) for x in own]
        assert module.shares == pytest.approx([x / sum(norms) for x in norms], abs=1e-12)
        assert [abs(w) * n for w, n in zip(WEIGHTS, module.norms, strict=True)] == pytest.approx(
            norms, rel=1e-12
        )
        assert module.norm == pytest.approx(np.linalg.norm(sum(own)), rel=1e-11)
        assert module.ranks == (8, 5, 3 if stem in mix[1][2] else 0)
    dominated = [
        sum((module.shares[i] or 0) > 0.8 for module in report.modules.values()) for i in range(3)
    ]
    assert [one.dominates for one in report.inputs] == dominated


def test_cosines_and_distances(mix: Any, report: AnalysisReport) -> None:
    assert [(pair.first, pair.second) for pair in report.pairs] == [(0, 1), (0, 2), (1, 2)]
    for place, pair in enumerate(report.pairs):
        one, other = mix[1][pair.first], mix[1][pair.second]
        x, y = flat(one, list(SHAPES)), flat(other, list(SHAPES))
        norms = np.linalg.norm(x), np.linalg.norm(y)
        assert pair.cosine == pytest.approx(x @ y / norms[0] / norms[1], abs=1e-13)
        assert pair.distance == pytest.approx(np.linalg.norm(x - y) / max(norms), rel=1e-12)
        assert pair.factor == pytest.approx(x @ y / norms[0] ** 2, rel=1e-10)
        both = {
            stem: np.sum(one[stem] * other[stem])
            / np.linalg.norm(one[stem])
            / np.linalg.norm(other[stem])
            for stem in one
            if stem in other
        }
        assert pair.lowest and pair.highest
        assert pair.lowest.module == min(both, key=both.__getitem__)
        assert pair.highest.value == pytest.approx(max(both.values()), abs=1e-13)
        for stem, module in report.modules.items():
            assert module.cosines[place] == pytest.approx(both.get(stem, 0.0), abs=1e-13)


@pytest.mark.parametrize("side", [0, 1], ids=["columns", "rows"])
def test_overlaps(mix: Any, report: AnalysisReport, side: int) -> None:
    for place, pair in enumerate(report.pairs):
        squares = least = chance = 0.0
        cosines: list[float] = []
        for stem, module in report.modules.items():
            members = [mix[1][pair.first].get(stem), mix[1][pair.second].get(stem)]
            found = (module.columns, module.rows)[side][place]
            if members[1] is None:
                assert found is None
                continue
            first, second = (spaces(x, side) for x in members)
            values = np.linalg.svd(first.T @ second)[1]
            count = min(first.shape[1], second.shape[1])
            assert found == pytest.approx(np.sum(values**2) / count, rel=1e-9)
            squares, least = squares + float(np.sum(values**2)), least + count
            chance += first.shape[1] * second.shape[1] / len(first)
            cosines += values.tolist()
        total = (pair.columns, pair.rows)[side]
        assert total is not None
        assert total.overlap == pytest.approx(squares / least, rel=1e-9)
        assert total.expected == pytest.approx(chance / least, rel=1e-12)
        assert total.mean == pytest.approx(np.mean(cosines), rel=1e-9)
        assert total.largest == pytest.approx(max(cosines), rel=1e-9)


def test_random_spaces_overlap_as_expected(tmp_path: Path) -> None:
    shapes = {f"layers.{i}.q": (60, 80) for i in range(30)}
    files = [write_peft(tmp_path / str(i), pairs(i, shapes, 6)) for i in range(2)]
    [pair] = looked_at(files, samples=50).pairs
    for overlap, size in ((pair.columns, 60), (pair.rows, 80)):
        assert overlap is not None and overlap.expected == pytest.approx(6 / size)
        assert overlap.overlap == pytest.approx(6 / size, rel=0.1)


def test_conflict_of_all_entries(mix: Any, report: AnalysisReport) -> None:
    vectors = np.array(
        [w * flat(one, list(SHAPES)) for w, one in zip(WEIGHTS, mix[1], strict=True)]
    )
    for pair in report.pairs:
        x, y = vectors[pair.first], vectors[pair.second]
        both, apart, mass = x * y != 0, x * y < 0, abs(x) + abs(y)
        assert pair.conflict is not None
        assert pair.conflict.count == pytest.approx(apart.sum() / both.sum(), rel=1e-12)
        assert pair.conflict.mass == pytest.approx(mass[apart].sum() / mass[both].sum(), rel=1e-10)
        assert pair.conflict.count_error == pair.conflict.mass_error == 0.0
        assert pair.conflict.entries == both.sum()
    some = np.count_nonzero(vectors, axis=0) > 1
    apart = (vectors.max(0) > 0) & (vectors.min(0) < 0)
    mass = np.abs(vectors).sum(0)
    assert report.conflict is not None
    assert report.conflict.count == pytest.approx(apart.sum() / some.sum(), rel=1e-12)
    assert report.conflict.mass == pytest.approx(mass[apart].sum() / mass[some].sum(), rel=1e-10)


def test_errors_by_rank(mix: Any, report: AnalysisReport) -> None:
    sums = [
        sum(w * one[stem] for w, one in zip(WEIGHTS, mix[1], strict=True) if stem in one)
        for stem in SHAPES
    ]
    spectra = [np.linalg.svd(x)[1] for x in sums]
    norm = math.hypot(*(float(np.linalg.norm(x)) for x in sums))
    assert report.norm == pytest.approx(norm, rel=1e-12)
    assert report.lossless == 16

    def error(rank: int) -> float:
        return math.hypot(*(float(np.linalg.norm(x[rank:])) for x in spectra)) / norm

    assert [hint.rank for hint in report.hints] == [1, 8]
    for hint in report.hints:
        assert hint.error == pytest.approx(error(hint.rank), rel=1e-10)
    assert [one.within for one in report.needed] == [0.01, 0.05, 0.1]
    for one in report.needed:
        assert one.error == pytest.approx(error(one.rank), abs=1e-13) and one.error <= one.within
        assert error(one.rank - 1) > one.within
    for stem, values in zip(SHAPES, spectra, strict=True):
        rank = report.modules[stem].rank
        tails = [np.linalg.norm(values[k:]) / np.linalg.norm(values) for k in (rank - 1, rank)]
        assert tails[0] > 0.01 >= tails[1]


def options_of(words: Sequence[str]) -> dict[str, str]:
    names = {"-m": "method", "--space": "space", "--calibrate": "calibrate"}
    return {names[name]: value for name, value in zip(words[::2], words[1::2], strict=True)}


@pytest.mark.parametrize("weights", [[0.7, -0.4, 2.0], [1 / 3, 1 / 3, 1 / 3]], ids=str)
def test_candidates_are_what_a_merge_gives(mix: Any, weights: list[float]) -> None:
    report = looked_at(mix[0], weights, samples=10)
    names = [one.name for one in report.candidates]
    assert names[0] == "linear" and len(names) == 10 and "nuslerp" not in names
    mean = np.mean([one.norm for one in report.inputs])
    vectors = [flat(one, list(SHAPES)) for one in mix[1]]
    for one in report.candidates:
        chosen = {"method": "linear", **options_of(one.options)}
        made = combine(chosen.pop("method"), mix[0], weights, **chosen)
        result = flat({stem: made[stem].dense() for stem in made}, list(SHAPES))
        assert one.size == pytest.approx(np.linalg.norm(result) / mean, rel=1e-7), one.name
        wanted = [result @ x / (x @ x) for x in vectors]
        assert one.retention == pytest.approx(wanted, rel=1e-6, abs=1e-9), one.name


def test_two_adapters_have_an_arc(mix: Any) -> None:
    report = looked_at(mix[0][:2], [1, 1], samples=10)
    [arc] = [one for one in report.candidates if one.name == "nuslerp"]
    made = combine("nuslerp", mix[0][:2], [1, 1])
    result = flat({stem: made[stem].dense() for stem in made}, list(SHAPES))
    first = flat(mix[1][0], list(SHAPES))
    assert arc.retention[0] == pytest.approx(result @ first / (first @ first), rel=1e-8)


def test_opposite_adapters_have_no_mean_direction(tmp_path: Path) -> None:
    one = trained(1, 50)
    files = [
        write_peft(tmp_path / "a", one),
        write_peft(tmp_path / "b", mapped(one, lambda B, A: (-B, A))),
    ]
    report = looked_at(files, samples=ALL)
    [pair] = report.pairs
    assert pair.cosine == pytest.approx(-1) and pair.conflict and pair.conflict.count == 1.0
    by_name = {one.name: one for one in report.candidates}
    assert "opposite" in by_name["nuslerp"].note and by_name["nuslerp"].retention == (None, None)
    assert by_name["linear"].size == pytest.approx(0.0, abs=1e-14)
    assert by_name["linear"].retention == pytest.approx((0.0, 0.0), abs=1e-14)
    assert report.norm <= report.floor and report.hints == report.needed == ()
    assert any("cancel" in reason for reason in report.suggestion.reasons)
    assert any("ties" in command for _, command in report.suggestion.others)


SITUATIONS: dict[str, tuple[Any, str, str]] = {
    "same seed": (trained(2, 50), "shared-start", "nearly orthogonal"),
    "another gauge": (turned(trained(1, 50), np.float64), "duplicate", "near duplicates"),
    "continued": (mixed(trained(1, 50), trained(2, 50), 0.8), "one-run", "linear is"),
    "scaled": (mapped(trained(1, 50), lambda B, A: (3 * B, A)), "scaled", "linear is"),
    "unrelated": (trained(7, 60), "orthogonal", "nearly orthogonal"),
    "against": (mixed(trained(1, 50), trained(2, 50), -0.8), "shared-start", "conflict"),
    "dominant": (mapped(trained(7, 60), lambda B, A: (20 * B, A)), "orthogonal", "dominates"),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_situations(tmp_path: Path, name: str) -> None:
    other, relation, reason = SITUATIONS[name]
    files = [write_peft(tmp_path / "a", trained(1, 50)), write_peft(tmp_path / "b", other)]
    report = looked_at(files, samples=200)
    [pair] = report.pairs
    assert pair.relation == relation
    assert any(reason in said for said in report.suggestion.reasons), report.suggestion
    command = report.suggestion.command
    assert command and command.startswith("adapterops merge") and "-w 0.5,0.5" in command
    assert "-m" not in command.split()  # linear
    assert not any("best" in said for said in report.suggestion.reasons)


def test_start_is_of_the_factors_as_stored(mix: Any, tmp_path: Path) -> None:
    files = [write_peft(tmp_path / "a", trained(1, 50)), write_peft(tmp_path / "b", trained(2, 50))]
    [pair] = looked_at(files, samples=10).pairs
    cosines = []
    for stem in SHAPES:
        x, y = (trained(seed, 50)[stem][1].astype(float) for seed in (1, 2))
        cosines.append(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y))
    assert pair.start == pytest.approx(np.mean(cosines), rel=1e-12)
    mixture = ao.open_adapter(files[0]) + ao.open_adapter(files[1])
    report = looked_at([mixture, files[0]], samples=10)
    assert report.pairs[0].start is None and report.suggestion.command is None


def test_a_sum_is_one_adapter(mix: Any) -> None:
    one, two, three = map(ao.open_adapter, mix[0])
    report = looked_at([2.0 * one - two, three], [1, 1], samples=10)
    wanted = 2.0 * flat(mix[1][0], list(SHAPES)) - flat(mix[1][1], list(SHAPES))
    assert report.inputs[0].norm == pytest.approx(np.linalg.norm(wanted), rel=1e-12)
    assert report.inputs[0].rank == 13


def test_dominance_offers_weights_that_level_it(tmp_path: Path) -> None:
    other = mapped(trained(7, 60), lambda B, A: (20 * B, A))
    files = [write_peft(tmp_path / "a", trained(1, 50)), write_peft(tmp_path / "b", other)]
    report = looked_at(files, samples=10)
    assert (report.inputs[1].share or 0) > 0.9 and report.inputs[1].dominates == 6
    level = next(c for what, c in report.suggestion.others if "alike" in what)
    words = level.split()
    weights = [float(x) for x in words[words.index("-w") + 1].split(",")]
    again = looked_at(files, weights, samples=10)
    assert [one.share for one in again.inputs] == pytest.approx([0.5, 0.5], rel=1e-4)
    assert sum(weights) == pytest.approx(1.0, rel=1e-5)


def test_duplicates_that_are_added_are_averaged(tmp_path: Path) -> None:
    files = [write_peft(tmp_path / name, trained(1, 50)) for name in "ab"]
    others = looked_at(files, [1, 1], samples=10).suggestion.others
    assert any("--normalize" in command for _, command in others)
    assert not looked_at(files, samples=10).suggestion.others


def test_rank_comes_from_the_table(tmp_path: Path) -> None:
    low = {name: (B[:, :1], A[:1]) for name, (B, A) in trained(1, 50, 20).items()}
    padded = mapped(low, lambda B, A: (np.repeat(B, 10, 1), np.repeat(A, 10, 0)))
    files = [
        write_peft(tmp_path / "a", padded),
        write_peft(tmp_path / "b", mapped(trained(2, 60, 9), lambda B, A: (1e-4 * B, A))),
    ]
    report = looked_at(files, samples=10)
    assert report.modules["layers.0.q"].ranks == (1, 9) and report.lossless == 10
    assert report.suggestion.command and "--rank 1" in report.suggestion.command


def test_zero_adapters_and_zero_weights(tmp_path: Path) -> None:
    zero = mapped(trained(1, 50), lambda B, A: (0 * B, A))
    files = [write_peft(tmp_path / "a", trained(1, 50)), write_peft(tmp_path / "z", zero)]
    report = looked_at([*files, write_peft(tmp_path / "b", trained(2, 60))], samples=10)
    assert report.inputs[1].zero and report.inputs[1].share == 0.0
    assert [pair.relation for pair in report.pairs] == ["zero", "orthogonal", "zero"]
    assert all(one.retention[1] is None for one in report.candidates)
    assert any("z is zero" in note for note in report.notes)
    first: PairAnalysis = report.pairs[0]
    assert first.cosine == 0.0 and first.conflict is first.columns is first.factor is None
    both = looked_at([files[1], write_peft(tmp_path / "y", zero)], samples=10)
    assert both.norm == 0.0 and both.inputs[0].share is None and both.hints == ()
    assert all(one.size is None and one.retention == (None, None) for one in both.candidates)
    off = looked_at([files[0], tmp_path / "b"], [1, 0], samples=10)
    assert [one.share for one in off.inputs] == [1.0, 0.0]
    assert off.pairs[0].conflict is None and off.pairs[0].columns is not None


def test_bad_input(mix: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least two adapters"):
        ao.analyze(mix[0][:1])
    with pytest.raises(UsageError, match="every weight is zero"):
        ao.analyze(mix[0][:2], [0, 0])
    with pytest.raises(UsageError, match="3 weights for 2 adapters"):
        ao.analyze(mix[0][:2], [1, 2, 3])
    with pytest.raises(UsageError, match="--samples 1"):
        ao.analyze(mix[0][:2], samples=1)
    with pytest.raises(UsageError, match="--seed"):
        ao.analyze(mix[0][:2], seed=-1)
    with pytest.raises(UsageError, match="matches none"):
        ao.analyze(mix[0][:2], modules="nothing")
    other = write_peft(tmp_path / "wide", pairs(1, {"layers.0.q": (40, 50)}, 2))
    with pytest.raises(IncompatibleError, match="same base model"):
        ao.analyze([mix[0][0], other])
    broken = mapped(trained(1, 50), lambda B, A: (B * np.nan, A))
    with pytest.raises(NumericsError, match="NaN"):
        ao.analyze([mix[0][0], write_peft(tmp_path / "nan", broken)])
    whole = combine("ties", mix[0][:2], [1, 1])
    with pytest.raises(UnsupportedError, match="whole matrix"):
        ao.analyze([whole, mix[0][0]])


def test_a_method_s_result_is_an_adapter(mix: Any) -> None:
    made = combine("tsv", mix[0][:2], [1, 1])
    report = looked_at([made, mix[0][2]], samples=10)
    wanted = flat({stem: made[stem].dense() for stem in made}, list(SHAPES))
    assert report.inputs[0].norm == pytest.approx(np.linalg.norm(wanted), rel=1e-10)


def test_only_some_modules(mix: Any) -> None:
    report = looked_at(mix[0], modules=r"layers\.0\..*", samples=10)
    assert list(report.modules) == ["layers.0.q", "layers.0.v"] and report.left_out == 4
    command = report.suggestion.command
    assert command and r"--modules 'layers\.0\..*'" in command


def test_nothing_depends_on_memory_or_threads(mix: Any) -> None:
    first, *rest = (
        ao.analyze(mix[0], WEIGHTS, samples=64, memory=memory, jobs=jobs).to_dict()
        for memory, jobs in ((None, 1), ("1MB", 3))
    )
    assert rest == [first]


def test_nothing_dense_is_formed(tmp_path: Path) -> None:
    shapes = {"layers.0.q": (3000, 5000)}
    files = [write_peft(tmp_path / str(i), pairs(i, shapes, 4)) for i in range(3)]
    opened = [ao.open_adapter(file) for file in files]
    task = plan_task(opened, None, compute("cpu", None, 1), None)
    settings = Settings(np.ones(3), tuple(methods(3)), 0, 4096)
    sides = [task.parts(module) for module in task.plan.modules]
    tracemalloc.start()
    try:
        figures(task.plan.modules, sides, settings)
        used = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert used <= peak(task.plan.modules, 3, settings) < 8 * 3000 * 5000 / 5


def test_full_deltas_count_in_norms(tmp_path: Path) -> None:
    stem, rng = "lora_unet_down_blocks_0_proj", np.random.default_rng(0)
    factors = [pairs(i, {"lora_unet_mid_block_q": (20, 24)}, 2) for i in range(2)]
    extra = [rng.standard_normal((12, 10)).astype(np.float32) for _ in range(2)]
    files = []
    for i in range(2):
        file = write_kohya(tmp_path / f"{i}.safetensors", factors[i], alpha=2)
        B, A = factors[i]["lora_unet_mid_block_q"]
        tensors = {
            "lora_unet_mid_block_q.lora_up.weight": B,
            "lora_unet_mid_block_q.lora_down.weight": A,
            "lora_unet_mid_block_q.alpha": np.array(2.0, np.float32),
            f"{stem}.diff": extra[i],
        }
        save_file(tensors, file)
        files.append(file)
    weights = [0.7, -0.2]
    report = looked_at(files, weights, samples=10)
    low = [dense(one)["lora_unet_mid_block_q"] for one in factors]
    vectors = [
        np.concatenate([x.ravel(), y.astype(float).ravel()])
        for x, y in zip(low, extra, strict=True)
    ]
    total = weights[0] * vectors[0] + weights[1] * vectors[1]
    assert report.inputs[0].norm == pytest.approx(np.linalg.norm(vectors[0]), rel=1e-7)
    assert report.norm == pytest.approx(np.linalg.norm(total), rel=1e-7)
    [linear] = report.candidates
    for kept, x in zip(linear.retention, vectors, strict=True):
        assert kept == pytest.approx(total @ x / (x @ x), rel=1e-7)
    tail = np.linalg.svd(weights[0] * low[0] + weights[1] * low[1])[1][1:]
    assert report.hints[0].error == pytest.approx(
        np.linalg.norm(tail) / np.linalg.norm(total), rel=1e-7
    )
    assert any("full deltas" in note for note in report.notes)


@pytest.mark.parametrize("count", [2, 3], ids=["two", "three"])
def test_pairs_are_in_order(mix: Any, count: int) -> None:
    report = looked_at(mix[0][:count], samples=10)
    assert [(p.first, p.second) for p in report.pairs] == list(combinations(range(count), 2))
