"""diff: figures against dense float64, what is no factor pair, matrices of many, refusals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import adapterops as ao
from adapterops.difference import matrix
from adapterops.errors import FileError, IncompatibleError, NumericsError, UsageError
from adapterops.files.source import LocalFile
from adapterops.render.diff import comparison
from tests import kinds
from tests.kinds import KINDS
from tests.support import Pairs, dense, pairs, write_peft
from tests.trained import BASE, SHAPES, STEM, compare, flat, refactored, small_fleet

# Figures


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_figures_are_the_dense_ones(tmp_path: Path, dtype: Any) -> None:
    """Other ranks, scales and targets: a module that one lacks is zero there."""
    a = pairs(1, SHAPES, 3, dtype)
    b = pairs(2, {**SHAPES, "head.q": (8, 12)}, 5, dtype)
    del b["layers.2.v"]
    write_peft(tmp_path / "a", a, alpha=6)
    write_peft(tmp_path / "b", b, alpha=2.5)
    x, y = dense(a, 2.0), dense(b, 0.5)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.only_a == ("layers.2.v",) and found.only_b == ("head.q",)
    for name, module in found.modules.items():
        shape = module.shape
        one, other = x.get(name, np.zeros(shape)), y.get(name, np.zeros(shape))
        norms = np.linalg.norm(one), np.linalg.norm(other)
        assert module.norms == pytest.approx(norms, rel=1e-12)
        assert module.distance == pytest.approx(np.linalg.norm(one - other), rel=1e-12)
        if not all(norms):
            assert module.cosine == 0.0 and module.factors == "alone" and any(module.zero)
            assert module.columns.degrees == () and module.shared is None
            continue
        assert module.relative == pytest.approx(module.distance / norms[0], rel=1e-12)
        assert module.cosine == pytest.approx(np.sum(one * other) / norms[0] / norms[1], abs=1e-12)
        assert module.ratio == pytest.approx(np.sum(one * other) / norms[0] ** 2, abs=1e-12)
        left = np.linalg.norm(other - module.ratio * one)
        assert module.residual == pytest.approx(left, rel=1e-12)
        for angles, first, second in (
            (module.columns, a[name][0], b[name][0]),
            (module.rows, a[name][1].T, b[name][1].T),
        ):
            wide = scipy.linalg.subspace_angles(first.astype(float), second.astype(float))
            assert angles.degrees == pytest.approx(np.degrees(np.sort(wide)), abs=1e-10)
    whole = {name: np.zeros(module.shape) for name, module in found.modules.items()}
    p, q = flat({**whole, **x}), flat({**whole, **y})
    assert found.norms == pytest.approx((np.linalg.norm(p), np.linalg.norm(q)), rel=1e-12)
    assert found.relative == pytest.approx(np.linalg.norm(p - q) / np.linalg.norm(p), rel=1e-12)
    cosine = p @ q / np.linalg.norm(p) / np.linalg.norm(q)
    assert found.cosine == pytest.approx(cosine, abs=1e-12)
    assert found.ratio == pytest.approx(p @ q / (p @ p), abs=1e-12)
    assert found.residual == pytest.approx(np.linalg.norm(q - found.ratio * p), rel=1e-12)
    both = [m for m in found.modules.values() if m.factors != "alone"]
    spread = found.spread["relative"]
    assert spread.largest == max(m.relative for m in both)
    assert spread.mean == pytest.approx(np.mean([m.relative for m in both]))
    assert found.spread["rows"].largest == max(m.rows.degrees[-1] for m in both)


@given(seed=st.integers(0, 2**20), rank=st.integers(1, 6), factor=st.floats(0.01, 100.0))
def test_laws(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rank: int, factor: float
) -> None:
    """Exchanging A and B mirrors every figure; scaling both scales distances and nothing else."""
    folder = tmp_path_factory.mktemp("laws")
    shapes = {"x.q": (12, 10), "x.v": (6, 10)}
    a, b = pairs(seed, shapes, rank, np.float64), pairs(seed + 1, shapes, 3, np.float64)
    write_peft(folder / "a", a)
    write_peft(folder / "b", b)
    there, back = compare(folder / "a", folder / "b"), compare(folder / "b", folder / "a")
    assert back.distance == pytest.approx(there.distance, rel=1e-12)
    assert back.relative * back.norms[0] == pytest.approx(there.relative * there.norms[0])
    assert back.cosine == pytest.approx(there.cosine, abs=1e-13)
    assert back.verdict.kind == there.verdict.kind
    for stem, module in there.modules.items():
        other = back.modules[stem].columns.degrees
        assert other == pytest.approx(module.columns.degrees, abs=1e-9)
    one, other = ao.open_adapter(folder / "a"), ao.open_adapter(folder / "b")
    scaled = compare(factor * one, factor * other)
    assert scaled.distance == pytest.approx(factor * there.distance, rel=1e-9)
    assert scaled.relative == pytest.approx(there.relative, rel=1e-9)
    assert scaled.cosine == pytest.approx(there.cosine, abs=1e-12)


def test_small_distances_are_read_from_the_difference(tmp_path: Path) -> None:
    """1e-11 of the norm, stored in float64, where squares of norms would give out at 1e-8."""
    a = pairs(1, SHAPES, 4, np.float64)
    shift = np.random.default_rng(5).standard_normal(a[STEM][0].shape)
    b = {**a, STEM: (a[STEM][0] + 1e-11 * shift, a[STEM][1])}
    write_peft(tmp_path / "a", a)
    write_peft(tmp_path / "b", b)
    found = compare(tmp_path / "a", tmp_path / "b")
    exact = np.linalg.norm((b[STEM][0] - a[STEM][0]) @ a[STEM][1])
    assert found.distance == pytest.approx(exact, rel=1e-3)
    equal = found.modules["layers.1.v"]
    assert equal.distance == 0.0 and equal.cosine == 1.0 and set(equal.columns.degrees) == {0.0}


def test_a_sum_is_compared_with_what_was_written_of_it(tmp_path: Path) -> None:
    write_peft(tmp_path / "a", pairs(1, SHAPES, 4), alpha=8)
    write_peft(tmp_path / "b", pairs(2, SHAPES, 3))
    mix = 0.7 * ao.open_adapter(tmp_path / "a") + 0.3 * ao.open_adapter(tmp_path / "b")
    report = mix.save(tmp_path / "m", rank=4)
    found = ao.diff([mix, tmp_path / "m"])
    assert found.inputs[0].name == "0.7·a + 0.3·b" and found.inputs[0].rank == 4
    assert found.pair is not None and found.pair.extras.equal == ()
    assert found.pair.relative == pytest.approx(report.error, rel=1e-9)
    mix.save(tmp_path / "whole", dtype="float32")
    same = compare(mix, tmp_path / "whole")
    assert same.verdict.kind == "same-delta"


# Extras, biases, full deltas, kinds


def head(value: float, name: str = "score.weight") -> dict[str, np.ndarray]:
    return {f"base_model.model.{name}": np.full((2, 3), value, np.float32)}


def test_same_factors_different_head(tmp_path: Path) -> None:
    write_peft(tmp_path / "a", BASE, extras=head(1.0), modules_to_save=["score"])
    write_peft(tmp_path / "b", BASE, extras=head(2.0), modules_to_save=["score"])
    write_peft(tmp_path / "none", BASE)
    write_peft(tmp_path / "turned", refactored(BASE, np.float32), extras=head(2.0))
    bias = {f"base_model.model.{STEM}.bias": np.ones(40, np.float32)}
    write_peft(tmp_path / "bias", BASE, extras={**head(1.0), **bias})
    moved = {f"base_model.model.{STEM}.base_layer.bias": np.ones(40, np.float32)}
    write_peft(tmp_path / "moved", BASE, extras={**head(1.0), **moved})
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.verdict.kind == "same-factors"
    score = "base_model.model.score.weight"
    assert found.verdict.text == f"the same factors, different head ({score})"
    assert found.extras.differ == (score,) and found.extras.equal == ()
    found = compare(tmp_path / "a", tmp_path / "none")
    assert found.verdict.text == f"the same factors, only A has {score}"
    found = compare(tmp_path / "a", tmp_path / "turned")
    assert "another gauge" in found.verdict.text and "different head" in found.verdict.text
    found = compare(tmp_path / "bias", tmp_path / "moved")  # one bias, as PEFT may name it
    assert found.verdict.text == "the same factors" and len(found.extras.equal) == 2
    assert compare(tmp_path / "a", tmp_path / "a").extras.equal == (score,)
    other = {f"base_model.model.{STEM}.bias": np.zeros(40, np.float32)}
    write_peft(tmp_path / "other", BASE, extras={**head(1.0), **other})
    assert "different extras" in compare(tmp_path / "bias", tmp_path / "other").verdict.text


def test_extras_are_compared_to_the_last_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapterops.difference.pair._AT_ONCE", 7)
    values = {f"base_model.model.{name}.weight": np.arange(12.0) for name in ("a", "b", "c")}
    other = {name: value.copy() for name, value in values.items()}
    other["base_model.model.b.weight"][-1] += 1e-15 * 11
    other["base_model.model.c.weight"] = other["base_model.model.c.weight"].reshape(3, 4)
    write_peft(tmp_path / "a", BASE, extras=values)
    write_peft(tmp_path / "b", BASE, extras=other)
    found = compare(tmp_path / "a", tmp_path / "b").extras
    assert found.equal == ("base_model.model.a.weight",)
    assert found.differ == ("base_model.model.b.weight", "base_model.model.c.weight")
    assert compare(tmp_path / "a", tmp_path / "a").verdict.kind == "identical"


def test_biases_of_factors_are_counted(tmp_path: Path) -> None:
    shift = np.random.default_rng(1).standard_normal(40).astype(np.float32)
    name = f"base_model.model.{STEM}.lora_B.bias"
    write_peft(tmp_path / "a", BASE, alpha=16, lora_bias=True, extras={name: shift})
    write_peft(tmp_path / "b", BASE, alpha=16, lora_bias=True, extras={name: 0.5 * shift})
    write_peft(tmp_path / "c", BASE, alpha=16)
    found = compare(tmp_path / "a", tmp_path / "b")
    size = np.linalg.norm(2.0 * shift.astype(np.float64))
    bias = found.deltas[f"{STEM}.bias"]
    assert found.distance == pytest.approx(0.5 * size) == bias.distance
    assert bias.cosine == pytest.approx(1.0) and bias.ratio == pytest.approx(0.5)
    assert bias.residual == pytest.approx(0.0, abs=1e-12)
    assert found.norms[0] == pytest.approx(math.hypot(np.linalg.norm(flat(dense(BASE, 2.0))), size))
    assert found.verdict.kind == "scaled-parts"
    assert compare(tmp_path / "a", tmp_path / "c").distance == pytest.approx(size)


def test_full_deltas_are_compared_element_by_element(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stem = "lora_unet_down_blocks_0"
    rng = np.random.default_rng(2)
    values = {f"{stem}_proj.diff": (24, 30), f"{stem}_proj.diff_b": (24,)}
    values |= {f"{stem}_n.w_norm": (24,)}
    deltas = [
        {name: rng.standard_normal(shape).astype(np.float32) for name, shape in values.items()}
        for _ in "ab"
    ]
    del deltas[1][f"{stem}_n.w_norm"]
    pair = pairs(1, {f"{stem}_q": (24, 30)}, 2)
    low = pairs(3, {f"{stem}_proj": (24, 30)}, 2)
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for file, tensors in zip(files, deltas, strict=False):
        _kohya(file, pair, tensors)
    _kohya(files[2], {**pair, **low}, {})
    for block in (1 << 20, 100):  # in stretches or at once
        monkeypatch.setattr("adapterops.difference.dense._BLOCK", block)
        found = compare(*files[:2])
        x, y = (
            {name: one.get(name, np.zeros(shape)).astype(float) for name, shape in values.items()}
            for one in deltas
        )
        assert found.distance == pytest.approx(np.linalg.norm(flat(x) - flat(y)), rel=1e-12)
        for name, delta in found.deltas.items():
            product = float(np.sum(x[name] * y[name]))
            assert delta.norms == pytest.approx([np.linalg.norm(z[name]) for z in (x, y)])
            assert delta.cosine * math.prod(delta.norms) == pytest.approx(product)
            left = np.linalg.norm(y[name] - product / np.sum(x[name] ** 2) * x[name])
            assert delta.residual == pytest.approx(left)
        against = compare(files[0], files[2])  # the same weight, full here and low-rank there
        name = f"{stem}_proj.diff"
        gap = np.linalg.norm(x[name] - dense(low)[f"{stem}_proj"])
        assert against.deltas[name].distance == pytest.approx(gap, rel=1e-9)
        report = ao.diff(files)
        assert report.distance[0][1] == pytest.approx(found.relative)
        assert report.distance[0][2] == pytest.approx(against.relative)
        assert report.cosine[0][2] == pytest.approx(against.cosine)
    only = compare(*files[:2], modules=f"{stem}_proj")
    assert set(only.deltas) == {f"{stem}_proj.diff", f"{stem}_proj.diff_b"} and not only.modules
    again = compare(files[0], files[0])
    assert again.verdict.kind == "identical" and again.cosine == pytest.approx(1.0)
    broken = {**deltas[0], f"{stem}_proj.diff": np.full((24, 30), np.nan, np.float32)}
    _kohya(tmp_path / "nan.safetensors", pair, broken)
    with pytest.raises(NumericsError, match=r"proj\.diff"):
        ao.diff([files[0], tmp_path / "nan.safetensors"])


def _kohya(file: Path, factors: Pairs, deltas: Mapping[str, np.ndarray]) -> None:
    tensors = dict(deltas)
    for name, (B, A) in factors.items():
        tensors |= {f"{name}.lora_up.weight": B, f"{name}.lora_down.weight": A}
        tensors[f"{name}.alpha"] = np.array(float(len(A)), np.float32)
    save_file(tensors, file)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.scaled], ids=lambda kind: kind.title)
def test_any_kind_is_its_own_expansion(tmp_path: Path, kind: kinds.Kind) -> None:
    """LoHa, LoKr, Tucker …: the same ΔW as a plain LoRA that holds the expanded factors."""
    stem = "lora_unet_mid_block_to_q"
    file, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({f"{stem}.{name}": value for name, value in kind.draw(1, 2).items()}, file)
    site = ao.open_adapter(file).terms[0][1].sites[stem]
    B, A = site.factors()
    shape = (len(A), A.shape[1] // math.prod(kind.kernel), *kind.kernel)
    tensors = {
        f"{stem}.lora_up.weight": (B * site.scale).reshape(*B.shape, *(1 for _ in kind.kernel)),
        f"{stem}.lora_down.weight": A.reshape(shape),
        f"{stem}.alpha": np.array(float(len(A))),
    }
    save_file({n: np.ascontiguousarray(x, np.float32) for n, x in tensors.items()}, other)
    found = compare(file, other)
    assert found.verdict.kind in ("same-delta", "same-factors")
    assert found.relative < 1e-6


def test_experts_that_share_their_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT stacks the experts' A and interleaves their B; each expert is a module of its own."""
    read = []
    monkeypatch.setattr(LocalFile, "pread_into", counted(LocalFile.pread_into, read))
    count, rank, rng = 5, 2, np.random.default_rng(1)
    stem, exact = "layers.0.mlp.experts", []
    for name in "abc":
        A = rng.standard_normal((count * rank, 12)).astype(np.float32)
        B = rng.standard_normal((10, count * rank)).astype(np.float32)
        target = {"target_modules": [], "target_parameters": ["experts.up"], "r": rank}
        write_peft(tmp_path / name, {stem: (B, A)}, alpha=rank, **target)
        pairs_of = [(B[:, e::count], A[e * rank : (e + 1) * rank]) for e in range(count)]
        exact.append(np.stack([b.astype(float) @ a.astype(float) for b, a in pairs_of]))
    found = compare(tmp_path / "a", tmp_path / "b")
    assert list(found.modules) == [f"{stem}[{e}]" for e in range(count)]
    for e, module in enumerate(found.modules.values()):
        assert module.distance == pytest.approx(np.linalg.norm(exact[0][e] - exact[1][e]))
    assert read.count(B.nbytes) == 2  # once for each adapter, not for each expert
    report = ao.diff([tmp_path / name for name in "abc"])
    for i, j in itertools.product(range(3), repeat=2):
        gap = np.linalg.norm(exact[i] - exact[j]) / np.linalg.norm(exact[i])
        assert report.distance[i][j] == pytest.approx(gap, abs=1e-12)


def counted(original: Any, read: list[int]) -> Any:
    """`pread_into` that notes how many bytes were asked for."""

    def wrapped(self: LocalFile, offset: int, buffer: memoryview) -> None:
        read.append(len(buffer))
        original(self, offset, buffer)

    return wrapped


# Many


def test_matrix_is_every_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = small_fleet(tmp_path)
    report = ao.diff(files)
    assert report.pair is None
    for i, j in itertools.permutations(range(len(files)), 2):
        pair = compare(files[i], files[j])
        noise = pair.floor / pair.norms[0]
        assert report.distance[i][j] == pytest.approx(pair.relative, rel=1e-9, abs=10 * noise)
        assert report.cosine[i][j] == pytest.approx(pair.cosine, abs=1e-9)
        assert report.floor[i][j] == pytest.approx(noise, rel=1e-9)
    assert all(report.distance[i][i] == 0.0 and report.cosine[i][i] == 1.0 for i in range(5))
    assert [item.modules for item in report.inputs] == [6, 6, 6, 6, 4]
    for columns in (1, 7, 12):  # tiles of one, two or a few adapters
        monkeypatch.setattr(matrix, "_COLUMNS", columns)
        tiled = ao.diff(files)
        assert np.allclose(tiled.distance, report.distance, rtol=1e-9, atol=1e-9)
        assert np.allclose(tiled.cosine, report.cosine, atol=1e-9)


def test_permuting_inputs_permutes_the_matrix(tmp_path: Path) -> None:
    files = small_fleet(tmp_path)
    straight = ao.diff(files)
    for order in itertools.islice(itertools.permutations(range(5)), 7, 120, 37):
        mixed_up = ao.diff([files[i] for i in order])
        assert [item.name for item in mixed_up.inputs] == [straight.inputs[i].name for i in order]
        for name in ("distance", "cosine"):
            one, other = np.array(getattr(straight, name)), np.array(getattr(mixed_up, name))
            assert np.allclose(one[np.ix_(order, order)], other, rtol=1e-9, atol=1e-9)


def test_threads_and_memory_change_nothing(tmp_path: Path) -> None:
    files = small_fleet(tmp_path)
    for chosen in (files, files[:2]):
        found = [
            ao.diff(chosen, jobs=jobs, memory=memory).to_dict()
            for jobs, memory in ((1, "1GB"), (4, "1GB"), (2, "1KB"))
        ]
        assert found[0] == found[1] == found[2]


def test_names_tell_inputs_apart(tmp_path: Path) -> None:
    for run in ("one", "two"):
        write_peft(tmp_path / run / "checkpoint-5", BASE)
    write_peft(tmp_path / "one" / "final", BASE)
    files = [tmp_path / name for name in ("one/checkpoint-5", "two/checkpoint-5", "one/final")]
    names = [item.name for item in ao.diff(files).inputs]
    assert names == ["one/checkpoint-5", "two/checkpoint-5", "final"]
    names = [item.name for item in ao.diff([files[2], files[2]]).inputs]
    assert names == ["final", "final#2"]


# Refusals


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    write_peft(tmp_path / "a", BASE)
    write_peft(tmp_path / "wide", pairs(1, {STEM: (40, 50)}, 2))
    write_peft(tmp_path / "other", pairs(1, {"h.0.q": (40, 48)}, 2))
    write_peft(tmp_path / "base", BASE, base_model_name_or_path="other/base")
    with pytest.raises(IncompatibleError, match=f"module {STEM}: .*in=48.*in=50"):
        ao.diff([tmp_path / "a", tmp_path / "wide"])
    with pytest.raises(IncompatibleError, match="no module in common"):
        ao.diff([tmp_path / "a", tmp_path / "other"])
    with pytest.raises(UsageError, match="at least two adapters, and was given 1"):
        ao.diff([tmp_path / "a"])
    with pytest.raises(UsageError, match="matches none of the 6 modules"):
        ao.diff([tmp_path / "a", tmp_path / "base"], modules="q")
    with pytest.raises(FileError, match="no such file"):
        ao.diff([tmp_path / "a", tmp_path / "gone"])
    with pytest.raises(UsageError, match="not among the inputs"):
        ao.diff([tmp_path / "a", tmp_path / "base"], alpha={"c": 4})
    report = ao.diff([tmp_path / "a", tmp_path / "base"])
    assert len(report.warnings) == 1 and "different base models" in report.warnings[0]
    with pytest.raises(IncompatibleError, match=r"--strict.*different base models"):
        ao.diff([tmp_path / "a", tmp_path / "base"], strict=True)


@pytest.mark.parametrize("count", [2, 3])
def test_numbers_that_are_none_are_named(tmp_path: Path, count: int) -> None:
    names = ["a", "bad", "c"][:count]
    for name in names:
        factors = dict(BASE)
        if name == "bad":
            B = factors[STEM][0].copy()
            B[3, 1] = np.inf
            factors[STEM] = B, factors[STEM][1]
        write_peft(tmp_path / name, factors)
    with pytest.raises(NumericsError, match=rf"bad.*module {STEM}: 1 of 320 values of .*lora_B"):
        ao.diff([tmp_path / name for name in names])


def test_modules_by_pattern(tmp_path: Path) -> None:
    files = small_fleet(tmp_path)
    report = ao.diff(files[:2], modules=r"layers\.\d\.q")
    assert report.pair is not None and report.left_out == 3
    assert set(report.pair.modules) == {f"layers.{i}.q" for i in range(3)}
    assert "3 modules left out" in comparison(report)


@pytest.mark.parametrize("how", [("ties", "dense"), ("ties", "core"), ("tsv", "dense")], ids=str)
def test_what_a_method_makes_is_an_adapter_like_others(how, tmp_path):
    method, space = how
    folders = [write_peft(tmp_path / f"m{i}", pairs(i, SHAPES, 2), alpha=4.0) for i in range(3)]
    made = ao.combine(method, folders[:2], space=space)
    other = ao.open_adapter(folders[2])
    found = ao.diff([made, folders[2]])
    gap = (made - other).norm()
    assert found.distance[0][1] == pytest.approx(gap / made.norm(), rel=1e-6)
