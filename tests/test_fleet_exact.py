"""Certified errors against dense float64: every way in which a tenant and its server may differ."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import fsspec
import numpy as np
import pytest

from adapterops.activations import open_activations, write_activations
from adapterops.errors import AdapterOpsError, IncompatibleError, NumericsError, UnsupportedError
from adapterops.files.remote import located
from adapterops.fleet.verifying import held, opening
from adapterops.fleet.verifying.exact import Error, compare, compare_groups, compare_many
from adapterops.fleet.verifying.opening import Opener
from adapterops.stream import Compute
from tests.support import pairs, write_kohya, write_peft

Dense = Mapping[str, np.ndarray]
Factors = dict[str, tuple[np.ndarray, np.ndarray]]
SHAPES = {
    "model.layers.0.q_proj": (24, 40),
    "model.layers.0.v_proj": (12, 40),
    "model.layers.1.q_proj": (24, 40),
    "model.layers.1.v_proj": (12, 40),
}


def dense(factors: Factors, scale: float = 1.0) -> dict[str, np.ndarray]:
    return {
        name: scale * (B.astype(np.float64) @ A.astype(np.float64))
        for name, (B, A) in factors.items()
    }


def oracle(served: Dense, own: Dense) -> tuple[float, float, float, float]:
    """error, missing, foreign, cosine of C against D."""
    names = sorted({*served, *own})
    shapes = {name: (served.get(name), own.get(name)) for name in names}
    C, D = (
        np.concatenate(
            [
                (pair[side] if pair[side] is not None else np.zeros_like(pair[1 - side])).ravel()
                for pair in shapes.values()
            ]
        )
        for side in (0, 1)
    )
    norm = np.linalg.norm(D)
    g = C @ D / norm**2
    cosine = C @ D / norm / np.linalg.norm(C) if np.any(C) else 0.0
    return np.linalg.norm(C - D) / norm, abs(1 - g), np.linalg.norm(C - g * D) / norm, cosine


def agrees(found: Error, served: Dense, own: Dense, rel: float = 1e-9) -> None:
    error, missing, foreign, cosine = oracle(served, own)
    slack = 1e-13
    assert found.error == pytest.approx(error, rel=rel, abs=slack)
    assert found.missing == pytest.approx(missing, rel=rel, abs=slack)
    assert found.foreign == pytest.approx(foreign, rel=rel, abs=slack)
    assert found.cosine == pytest.approx(cosine, rel=rel, abs=slack)
    assert found.error == pytest.approx(math.hypot(found.missing, found.foreign), rel=rel)


def regauged(factors: Factors, seed: int, condition: float = 10.0) -> Factors:
    """The same ΔW from other factors, in float64."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, (B, A) in factors.items():
        r = B.shape[1]
        left, right = (np.linalg.qr(rng.standard_normal((r, r)))[0] for _ in "ab")
        R = left @ np.diag(np.geomspace(1, condition, r)) @ right
        result[name] = (B.astype(float) @ R, np.linalg.solve(R, A.astype(float)))
    return result


def nudged(factors: Factors, size: float, seed: int, only: str = "") -> Factors:
    """Another adapter at about this relative distance: B moved in every module, or in one."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, (B, A) in factors.items():
        step = rng.standard_normal(B.shape)
        step *= size * np.linalg.norm(B) / np.linalg.norm(step)
        moved = B.astype(float) + step
        result[name] = (B if only and name != only else moved, A.astype(float))
    return result


def write(folder: Path, factors: Factors, dtype: type = np.float64, **config: object) -> str:
    cast = {name: (B.astype(dtype), A.astype(dtype)) for name, (B, A) in factors.items()}
    return str(write_peft(folder, cast, **config))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("ranks", [(4, 4), (4, 9), (8, 1), (16, 2)])
def test_unrelated_adapters(tmp_path: Path, dtype: type, ranks: tuple[int, int]) -> None:
    one, other = pairs(0, SHAPES, ranks[0], dtype), pairs(1, SHAPES, ranks[1], dtype)
    a = write(tmp_path / "a", one, dtype, alpha=3.0)
    b = write(tmp_path / "b", other, dtype, alpha=7.0, use_rslora=True)
    served = dense(one, 3 / ranks[0])
    agrees(compare(a, b), served, dense(other, 7 / math.sqrt(ranks[1])))


@pytest.mark.parametrize("only", ["", "model.layers.1.v_proj"], ids=["everywhere", "one-module"])
@pytest.mark.parametrize("gauge", [None, 10.0, 1e4], ids=["same", "regauged", "badly-regauged"])
@pytest.mark.parametrize("size", [0.3, 0.02, 1e-3, 1e-6])
def test_small_errors_are_exact(
    tmp_path: Path, size: float, gauge: float | None, only: str
) -> None:
    own = pairs(0, SHAPES, 4, np.float64)
    other = nudged(own, size, 3, only)
    stored = regauged(other, 4, gauge) if gauge else other
    a, b = write(tmp_path / "a", stored), write(tmp_path / "b", own)
    # What was stored is the reference; its own rounding is cond·u of it.
    rel = 1e-7 if gauge is None else max(1e-7, gauge * 1e-14 / size)
    agrees(compare(a, b), dense(stored), dense(own), rel)
    agrees(compare(b, a), dense(own), dense(stored), rel)


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0, -1.0])
def test_a_multiple_is_all_missing_and_nothing_foreign(tmp_path: Path, factor: float) -> None:
    own = pairs(0, SHAPES, 4, np.float32)
    other = {name: (B * factor, A) for name, (B, A) in regauged(own, 1).items()}
    found = compare(write(tmp_path / "a", other), write(tmp_path / "b", own, np.float32))
    assert found.missing == pytest.approx(abs(1 - factor), abs=1e-13)
    assert found.foreign < 1e-13 >= abs(found.error - found.missing)
    assert found.cosine == pytest.approx(math.copysign(1, factor), abs=1e-13)


def test_the_same_in_another_gauge_is_below_the_floor(tmp_path: Path) -> None:
    own = pairs(0, SHAPES, 4, np.float32)
    found = compare(write(tmp_path / "a", regauged(own, 1)), write(tmp_path / "b", own, np.float32))
    assert 0.0 <= found.error <= found.floor < 1e-11
    assert found.norm == pytest.approx(
        math.sqrt(sum(np.sum(w * w) for w in dense(own).values())), rel=1e-12
    )


@pytest.mark.parametrize("moved", [1e-2, 1e-4, 1e-6])
def test_an_adapter_that_cancels_within_itself(tmp_path: Path, moved: float) -> None:
    start, end = pairs(0, SHAPES, 4, np.float64), nudged(pairs(0, SHAPES, 4, np.float64), moved, 2)
    own = {
        name: (
            np.hstack([end[name][0], -start[name][0]]),
            np.vstack([end[name][1], start[name][1]]),
        )
        for name in SHAPES
    }
    other = nudged(end, 0.1 * moved, 5)
    served = {
        name: (
            np.hstack([other[name][0], -start[name][0]]),
            np.vstack([other[name][1], start[name][1]]),
        )
        for name in SHAPES
    }
    found = compare(write(tmp_path / "a", served), write(tmp_path / "b", own))
    agrees(found, dense(served), dense(own), 1e-13 / moved**2 if moved > 1e-5 else 1e-6)


@pytest.mark.parametrize("moved", [1e-3, 1e-6, 1e-9])
def test_one_that_cancels_outside_of_what_serves(tmp_path: Path, moved: float) -> None:
    """Gram matrices see nothing of a norm of 10⁻⁹β."""
    start = pairs(0, SHAPES, 4, np.float64)
    step = nudged(start, moved, 2)
    own = {
        name: (np.hstack([step[name][0], -start[name][0]]), np.vstack([step[name][1]] * 2))
        for name in SHAPES
    }
    # What is left, without cancellation; the subtraction itself is exact.
    left = {name: (step[name][0] - start[name][0], step[name][1]) for name in SHAPES}
    b = write(tmp_path / "b", own)
    assert compare(None, b).norm == pytest.approx(
        math.sqrt(sum(np.sum(w * w) for w in dense(left).values())), rel=1e-13 / moved
    )
    small = {name: (B * moved, A) for name, (B, A) in pairs(5, SHAPES, 3, np.float64).items()}
    found = compare(write(tmp_path / "a", small), b)
    agrees(found, dense(small), dense(left), max(1e-9, 1e-13 / moved))


def test_adapters_whose_spaces_do_not_meet(tmp_path: Path) -> None:
    """All of the difference lies outside of both of C's spaces, and is small."""
    rng = np.random.default_rng(1)
    own, other = {}, {}
    for name, (m, n) in SHAPES.items():
        left, right = np.linalg.qr(rng.standard_normal((m, 6)))[0], rng.standard_normal((6, n))
        own[name] = (left[:, :3], right[:3])
        apart = np.linalg.qr(np.vstack([right[:3], rng.standard_normal((3, n))]).T)[0][:, 3:].T
        other[name] = (
            np.hstack([left[:, :3], 1e-5 * left[:, 3:]]),
            np.vstack([right[:3], apart]),
        )
    a, b = write(tmp_path / "a", own), write(tmp_path / "b", other)
    agrees(compare(a, b), dense(own), dense(other), 1e-7)
    agrees(compare(b, a), dense(other), dense(own), 1e-7)


def test_tensors_at_uneven_distances(tmp_path: Path) -> None:
    shapes = {"a_proj": (9, 8), "b_proj": (5, 8), "c_proj": (9, 8), "d_proj": (9, 8)}
    one, other = pairs(0, shapes, 2), pairs(1, shapes, 2)
    a, b = write(tmp_path / "a", one, np.float32), write(tmp_path / "b", other, np.float32)
    agrees(compare(a, b), dense(one), dense(other))


def test_other_target_modules_count_as_zero(tmp_path: Path) -> None:
    names = list(SHAPES)
    one = pairs(0, {n: SHAPES[n] for n in names[:3]}, 4, np.float32)
    other = nudged(pairs(0, SHAPES, 4, np.float32), 0.05, 1)
    del other[names[0]]
    served, own = dense(one), dense(other)
    a, b = write(tmp_path / "a", one, np.float32), write(tmp_path / "b", other)
    found = compare(a, b)
    agrees(found, served, own)
    assert found.worst == (names[3], pytest.approx(1.0, abs=1e-12))
    agrees(compare(b, a), own, served)


def test_the_worst_module_is_judged_by_its_own_norm(tmp_path: Path) -> None:
    own = pairs(0, SHAPES, 4, np.float64)
    small = "model.layers.1.v_proj"
    own[small] = (own[small][0] * 1e-3, own[small][1])
    other = nudged(nudged(own, 0.01, 1), 0.5, 2, small)
    found = compare(write(tmp_path / "a", other), write(tmp_path / "b", own))
    C, D = dense(other)[small], dense(own)[small]
    expected = np.linalg.norm(C - D) / np.linalg.norm(D)
    assert found.worst == (small, pytest.approx(expected, rel=1e-9))
    assert found.error < 0.02 < 0.4 < found.worst[1]


def test_nothing_against_something(tmp_path: Path) -> None:
    own = pairs(0, SHAPES, 4, np.float32)
    zero = {name: (B * 0, A) for name, (B, A) in own.items()}
    a, z = write(tmp_path / "a", own, np.float32), write(tmp_path / "z", zero, np.float32)
    for nothing in (z, None):
        assert compare(nothing, z).error == 0.0 == compare(nothing, z).foreign
        found = compare(nothing, a)
        assert (found.error, found.missing, found.foreign, found.cosine) == (1.0, 1.0, 0.0, 0.0)
    found = compare(a, z)
    assert found.error == math.inf == found.foreign and found.cosine == 0.0


def test_scales_of_one_header(tmp_path: Path) -> None:
    """kohya files whose headers agree to the byte and whose alphas do not."""
    factors = pairs(0, {"lora_unet_a_proj": (20, 30), "lora_unet_b_proj": (20, 30)}, 4)
    paths = [
        str(write_kohya(tmp_path / f"{alpha}.safetensors", factors, alpha=alpha))
        for alpha in (4.0, 2.0, 4.0, 1.0)
    ]
    heads = {Path(path).read_bytes()[:400] for path in paths}
    assert len(heads) == 1
    found = list(compare_many(paths[0], paths, Compute()))
    assert [error.error for error in found if isinstance(error, Error)] == pytest.approx(
        [0.0, 1.0, 0.0, 3.0], abs=1e-12
    )


def test_a_known_header_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    parse = opening.open_adapter_file
    monkeypatch.setattr(
        opening, "open_adapter_file", lambda *a, **k: calls.append(a) or parse(*a, **k)
    )
    paths = [write(tmp_path / f"{i}", pairs(i, SHAPES, 4), np.float16) for i in range(5)]
    other = write(tmp_path / "o", pairs(9, SHAPES, 4), np.float16, alpha=5.0)
    opener = Opener()
    for path in [*paths, other, *paths]:
        opened = opener.open(path)
        stem = next(iter(opened.pieces))
        B, A = opened.stacks([stem])
        opened.close()
        site = parse(path).sites[stem]
        expected = site.factors()
        assert np.array_equal(B[0], expected[0]) and np.array_equal(A[0], expected[1] * site.scale)
    assert len(calls) == 2


@pytest.mark.parametrize("whole", [0, 1 << 23], ids=["by-tensor", "in-one-read"])
@pytest.mark.parametrize("chunk", [1, 1 << 21], ids=["module-by-module", "all-at-once"])
@pytest.mark.parametrize("budget", [1 << 10, 1 << 30], ids=["not-kept", "kept"])
def test_results_do_not_depend_on_how_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int, chunk: int, budget: int
) -> None:
    own = pairs(0, SHAPES, 4, np.float32)
    rep = write(tmp_path / "rep", nudged(own, 0.1, 7))
    members = [
        write(tmp_path / f"m{i}", nudged(own, 0.1 * i + 1e-4, i), np.float32) for i in range(5)
    ]
    expected = list(compare_many(rep, members, Compute(threads=1)))
    monkeypatch.setattr(opening, "_WHOLE", whole)
    monkeypatch.setattr(held, "CHUNK", chunk)
    found = list(compare_many(rep, members, Compute(threads=3, memory=budget)))
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, Error) and isinstance(other, Error)
        assert one.error == pytest.approx(other.error, rel=1e-10)
        assert one.foreign == pytest.approx(other.foreign, rel=1e-10)
        assert one.worst[0] == other.worst[0]


def test_groups_in_one_run(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}", pairs(i, SHAPES, 3), np.float16) for i in range(4)]
    groups: list[tuple[str | None, list[str]]] = [
        (paths[0], paths),
        (paths[1], []),
        (None, paths[:1]),
        (paths[2], paths * 9),
        (paths[3], []),
    ]
    found = list(compare_groups(groups, Compute(threads=2)))
    assert [len(one) for one in found] == [4, 0, 1, 36, 0]
    for (rep, members), results in zip(groups, found, strict=True):
        assert results == [compare(rep, member) for member in members]


def broken(folder: Path) -> str:
    write(folder, pairs(3, SHAPES, 4), np.float32)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    return str(folder)


def not_finite(folder: Path) -> str:
    factors = pairs(3, SHAPES, 4)
    factors["model.layers.1.v_proj"][0][2, 1] = np.nan
    return write(folder, factors, np.float32)


def missing(folder: Path) -> str:
    return str(folder)


def other_shape(folder: Path) -> str:
    return write(folder, pairs(3, {**SHAPES, "model.layers.0.q_proj": (24, 41)}, 4), np.float32)


def dora(folder: Path) -> str:
    return write(folder, pairs(3, SHAPES, 4), np.float32, use_dora=True)


@pytest.mark.parametrize("make", [broken, not_finite, missing, other_shape, dora])
def test_one_that_cannot_be_read_stops_nobody(tmp_path: Path, make: Callable[[Path], str]) -> None:
    good = [write(tmp_path / f"{i}", pairs(i, SHAPES, 4), np.float32) for i in range(2)]
    bad = make(tmp_path / "bad")
    first, second, third = compare_many(good[0], [good[0], bad, good[1]], Compute())
    assert isinstance(first, Error) and isinstance(third, Error)
    assert isinstance(second, AdapterOpsError) and "bad" in str(second)
    with pytest.raises(type(second)):
        compare(good[0], bad)
    found = list(compare_many(bad, good, Compute()))
    assert all(isinstance(one, AdapterOpsError) for one in found)


def test_errors_name_the_file_that_has_the_fault(tmp_path: Path) -> None:
    """It shares its header, and so its blueprint, with one that has none."""
    good, bad = (
        write(tmp_path / "good", pairs(0, SHAPES, 4), np.float32),
        not_finite(tmp_path / "b"),
    )
    [found] = compare_many(good, [bad], Compute())
    assert isinstance(found, NumericsError) and found.path == bad
    assert "layers.1.v_proj" in str(found)
    [found] = compare_many(good, [other_shape(tmp_path / "o")], Compute())
    assert isinstance(found, IncompatibleError) and "24, 41" in str(found)


def test_biases_and_full_deltas_count(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    factors = pairs(0, {"lora_unet_a_proj": (20, 30)}, 4)
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    write_kohya(one, factors, alpha=4.0)
    from safetensors.numpy import load_file, save_file

    extra = {
        "lora_unet_a_proj.diff_b": rng.standard_normal(20).astype(np.float32),
        "lora_unet_c_proj.diff": rng.standard_normal((6, 9)).astype(np.float32),
    }
    save_file({**load_file(one), **extra}, other)
    own = dense(factors) | {name: value.astype(float) for name, value in extra.items()}
    agrees(compare(str(one), str(other)), dense(factors), own)
    agrees(compare(str(other), str(one)), own, dense(factors))


@pytest.mark.parametrize("kind", ["gram", "samples"])
@pytest.mark.parametrize("size", [0.3, 1e-4])
def test_errors_by_what_inputs_make_of_them(tmp_path: Path, kind: str, size: float) -> None:
    rng = np.random.default_rng(4)
    own = pairs(0, SHAPES, 4, np.float64)
    other = nudged(own, size, 3)
    del other["model.layers.0.v_proj"]
    samples = {
        name: (rng.standard_normal((200, n)) * np.geomspace(1, 30, n)).astype(np.float32)
        for name, (_, n) in SHAPES.items()
    }
    moments = {name: x.T.astype(float) @ x / len(x) for name, x in samples.items()}
    stored = samples if kind == "samples" else moments
    file = tmp_path / "activations.safetensors"
    write_activations(
        file,
        {name: (kind, value) for name, value in stored.items()},  # type: ignore[misc]
        tokens=200,
        model="tiny/base",
    )
    a, b = write(tmp_path / "a", other), write(tmp_path / "b", own)
    found = compare(a, b, activations=open_activations(file))
    C, D = dense(other), dense(own)
    apart = {name: C.get(name, np.zeros_like(D[name])) - D[name] for name in D}
    energy = [
        math.sqrt(sum(np.sum((w @ moments[name]) * w) for name, w in one.items()))
        for one in (apart, D)
    ]
    assert found.measured == pytest.approx(energy[0] / energy[1], rel=1e-5)
    agrees(found, C, D)
    assert compare(None, b, activations=open_activations(file)).measured == pytest.approx(1.0)


def test_no_inputs_of_a_bias(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    file = tmp_path / "activations.safetensors"
    write_activations(
        file, {"a_proj": ("samples", np.ones((3, 30), np.float32))}, tokens=3, model="tiny/base"
    )
    one = tmp_path / "one.safetensors"
    write_kohya(one, pairs(0, {"lora_unet_a_proj": (20, 30)}, 4), alpha=4.0)
    bias = {"lora_unet_a_proj.diff_b": np.ones(20, np.float32)}
    save_file({**load_file(one), **bias}, tmp_path / "two.safetensors")
    with pytest.raises(UnsupportedError, match=r"a_proj.diff_b.*no inputs"):
        compare(str(one), str(tmp_path / "two.safetensors"), activations=open_activations(file))


def test_bfloat16_is_read_exactly(tmp_path: Path) -> None:
    factors = pairs(0, SHAPES, 4)
    for B, A in factors.values():  # numbers that bfloat16 holds
        for values in (B, A):
            values.view(np.uint32)[...] &= 0xFFFF0000
    folder = Path(write(tmp_path / "a", factors, np.float32))
    file = folder / "adapter_model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    body, parts, start = data[8 + size :], [], 0
    for entry in header.values():
        if "data_offsets" in entry:
            first, last = entry["data_offsets"]
            parts.append(body[first:last])
    entries = [entry for entry in header.values() if "data_offsets" in entry]
    halves = []
    for entry, part in zip(entries, parts, strict=True):
        half = (np.frombuffer(part, "<u4") >> 16).astype("<u2").tobytes()
        entry["dtype"], entry["data_offsets"] = "BF16", [start, start + len(half)]
        start += len(half)
        halves.append(half)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "adapter_config.json").write_bytes(
        (folder / "adapter_config.json").read_bytes()
    )
    (tmp_path / "b" / "adapter_model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + b"".join(halves)
    )
    found = compare(str(tmp_path / "b"), str(folder))
    assert found.error <= found.floor


def test_an_adapter_is_itself_exactly(tmp_path: Path) -> None:
    own = write(tmp_path / "a", pairs(0, SHAPES, 4), np.float16)
    found = compare(own, own)
    assert (found.error, found.missing, found.foreign, found.cosine) == (0.0, 0.0, 0.0, 1.0)
    assert found.worst[1] == 0.0 and found.norm > 0


def test_adapters_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is fetched once, copies are removed, and errors name it by its place there."""
    factors = [pairs(seed, SHAPES, 4) for seed in range(4)]
    factors[3]["model.layers.1.v_proj"][0][0, 0] = np.inf
    local = [write(tmp_path / f"t{i}", one, np.float32) for i, one in enumerate(factors)]
    bucket = f"memory://{tmp_path.name}"
    store = fsspec.filesystem("memory")
    for place in local:
        for file in Path(place).iterdir():
            store.pipe(f"{bucket}/{Path(place).name}/{file.name}", file.read_bytes())
    remote = [f"{bucket}/{Path(place).name}" for place in local]
    copies = tmp_path / "copies"
    copies.mkdir()
    monkeypatch.setenv("TMPDIR", str(copies))
    monkeypatch.setattr(tempfile, "tempdir", None)
    fetched = []
    monkeypatch.setattr(
        held, "located", lambda path, **how: fetched.append(path) or located(path, **how)
    )
    groups = [(local[0], remote[1:]), (remote[0], local), (remote[0], remote)]
    *found, last = compare_groups(groups, Compute(threads=2))
    assert found[0][:2] == [compare(local[0], place) for place in local[1:3]]
    assert last[1:3] == found[1][1:3]
    assert isinstance(last[3], NumericsError) and last[3].path == remote[3]
    assert fetched.count(remote[0]) == 3 and fetched.count(remote[1]) == 2
    assert list(copies.iterdir()) == []


def test_what_is_remembered_of_layouts_is_bounded(tmp_path):
    server = str(write_peft(tmp_path / "server", pairs(1, SHAPES, 4)))
    members = [
        str(write_peft(tmp_path / f"m{n}", pairs(2, SHAPES, 2), alpha=1.0 + n)) for n in range(20)
    ]
    own = held.Held(server, Opener(), None, 1 << 30)
    found = own.against(members)
    assert len(own._matches) == held._LAYOUTS < len(members)
    for member, error in zip(members, found, strict=True):
        assert isinstance(error, Error) and error == compare(server, member)
