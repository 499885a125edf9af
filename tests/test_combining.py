"""Merge methods on files: every one against its rule on dense matrices, and as it is used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file as save_torch

import adapterops as ao
from adapterops import casts
from adapterops.activations import write_activations
from adapterops.combining import combine
from adapterops.derived.rule import storage_noise
from adapterops.errors import (
    BudgetError,
    IncompatibleError,
    NumericsError,
    UnsupportedError,
    UsageError,
)
from adapterops.factors import Factors
from adapterops.rules import canonical, draws, modify
from adapterops.rules.registry import METHODS
from tests import rules_dense_elements as elements
from tests.support import dense, load_file, pairs, write_kohya, write_peft

SHAPES = {"layers.0.q_proj": (34, 31), "layers.1.up_proj": (24, 36)}
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16}
WEIGHTS = np.array([0.7, 0.5, -0.3])
ELEMENTS = sorted(name for name, each in METHODS.items() if each.signature == "elements")
FACTORED = sorted(name for name, each in METHODS.items() if each.signature in ("gram", "core"))


@pytest.fixture
def three(tmp_path):
    """Three adapters of different ranks and scales, and their dense changes."""
    folders, changes = [], []
    for i, rank in enumerate((3, 2, 4)):
        factors = pairs(i, SHAPES, rank)
        folders.append(write_peft(tmp_path / f"a{i}", factors, alpha=2.0 * rank))
        changes.append(dense(factors, 2.0))
    return folders, changes


def written(folder: Path) -> dict[str, np.ndarray]:
    """ΔW of every module of a PEFT directory whose alpha is its rank."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    heads = [name for name in tensors if name.endswith("lora_B.weight")]
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_B.weight"): (
            tensors[name].astype(float) @ tensors[name.replace("lora_B", "lora_A")].astype(float)
        )
        for name in heads
    }


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 3e-6) -> None:
    size = np.abs(expected).max() or 1.0
    assert np.abs(found - expected).max() <= tolerance * size


def given(name: str) -> dict[str, object]:
    return {"rank": 2} if name == "svd" else {}


def some(name: str, three) -> tuple[list[Path], list[dict[str, np.ndarray]], np.ndarray]:
    count = METHODS[name].most or 3
    return three[0][:count], three[1][:count], WEIGHTS[:count]


@pytest.mark.parametrize("name", FACTORED)
def test_a_method_in_factors_is_that_of_the_dense_changes(name, three, tmp_path):
    folders, changes, w = some(name, three)
    method = METHODS[name]
    values = method.values(given(name))
    ao.merge(folders, w, out=tmp_path / "out", method=name, parameters=given(name), dtype="float32")
    for module, found in written(tmp_path / "out").items():
        D = np.stack([each[module] for each in changes])
        if method.signature == "gram":
            G = np.einsum("imn,jmn->ij", D, D)
            expected = np.tensordot(method.function(G, w, **method.arguments(values)), D, 1)
        else:
            noise = np.full(len(D), 1e-9)
            expected = method.function(D, w, noise, **values).core
        close(found, expected)


@pytest.mark.parametrize("name", ELEMENTS)
def test_an_elementwise_method_is_that_of_the_dense_changes(name, three, tmp_path):
    folders, changes, w = some(name, three)
    ao.merge(
        folders,
        w,
        out=tmp_path / "out",
        method=name,
        rank=24,
        seed=5,
        dtype="float32",
        strict=False,
    )
    reference = getattr(elements, "dare" if name == "dare_linear" else name)
    module = "layers.1.up_proj"  # of rank 24 at most, so that nothing is cut off
    D = np.stack([each[module] for each in changes])
    m, n = SHAPES[module]
    bits = draws.stacked(5, ["a0", "a1", "a2"], module, 0, m, n)
    close(written(tmp_path / "out")[module], reference(D, w, bits), 1e-5)


def test_the_certificate_of_a_cut_result_is_exact(three, tmp_path):
    folders, changes = three
    report = ao.merge(folders, WEIGHTS, out=tmp_path / "out", method="ties", rank=4)
    full = ao.merge(
        folders, WEIGHTS, out=tmp_path / "full", method="ties", rank=31, dtype="float32"
    )
    exact, found = written(tmp_path / "full"), written(tmp_path / "out")
    lost = np.sqrt(sum(np.sum((found[k] - exact[k]) ** 2) for k in exact))
    size = np.sqrt(sum(np.sum(exact[k] ** 2) for k in exact))
    assert report.error == pytest.approx(lost / size, rel=1e-5)
    assert report.norm == pytest.approx(size, rel=1e-5)
    assert full.error < 1e-6
    assert report.method == "ties"
    assert any("bake BASE" in text for text in report.warnings)
    for index, each in enumerate(report.inputs):
        product = sum(np.sum(found[k] * changes[index][k]) for k in found)
        own = sum(np.sum(changes[index][k] ** 2) for k in found)
        assert each.retention == pytest.approx(product / own, rel=1e-5)
        assert each.weight == WEIGHTS[index]
        assert each.norm == pytest.approx(np.sqrt(own), rel=1e-6)


def test_what_is_cut_much_is_an_error_under_strict(three, tmp_path):
    with pytest.raises(BudgetError, match="full rank"):
        ao.merge(three[0], WEIGHTS, out=tmp_path / "out", method="dare", rank=2, strict=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_small_spaces_do_not_depend_on_the_gauge(name, space, three, tmp_path):
    folders, _ = three
    rng = np.random.default_rng(3)
    again = []
    for i, rank in enumerate((3, 2, 4)):
        turn = rng.standard_normal((rank, rank)) + 3 * np.eye(rank)
        factors = {
            stem: (B.astype(float) @ turn, np.linalg.solve(turn, A.astype(float)))
            for stem, (B, A) in pairs(i, SHAPES, rank).items()
        }
        again.append(write_peft(tmp_path / "again" / f"a{i}", factors, alpha=2.0 * rank))
    made = [
        combine(name, which, WEIGHTS, space=space, seed=1)["layers.0.q_proj"].dense()
        for which in (folders, again)
    ]
    size = np.abs(made[0]).max()
    assert size > 0
    assert np.abs(made[0] - made[1]).max() < 1e-5 * size  # float32 files


def test_the_rank_of_the_result_is_known_before(three, tmp_path):
    plan = ao.merge(three[0], WEIGHTS, out=tmp_path / "o", method="subtract", dry_run=True)
    assert plan.rank == 3  # the first adapter's: nothing is added to its columns
    assert ao.merge(three[0], WEIGHTS, out=tmp_path / "o", method="ctm").rank == 4


def test_an_adapter_that_lacks_a_module_is_zero_there(tmp_path):
    one, two = pairs(0, SHAPES, 3), pairs(1, SHAPES, 3)
    del two["layers.1.up_proj"]
    folders = [write_peft(tmp_path / "a", one), write_peft(tmp_path / "b", two)]
    for name in ("slerp", "karcher", "model_stock", "tsv", "iso_cts", "ties"):
        made = combine(name, folders, space="knots" if name == "ties" else "dense")
        found = made["layers.1.up_proj"].dense()
        assert np.isfinite(found).all()
        assert np.abs(found).max() > 0
    averaged = combine("linear", folders, [1, 3], parameters={"normalize": True})
    close(averaged["layers.1.up_proj"].dense(), dense(one)["layers.1.up_proj"] / 4)
    first = combine("project", folders[::-1])["layers.1.up_proj"].dense()
    assert np.abs(first).max() == 0


def test_zero_adapters_and_zero_weights_change_nothing(three, tmp_path):
    folders, _ = three
    zero = {stem: (0 * B, A) for stem, (B, A) in pairs(9, SHAPES, 2).items()}
    empty = write_peft(tmp_path / "zero", zero)
    for name, method in METHODS.items():
        if method.signature == "factors" or method.most:
            continue
        for space in method.spaces or ("dense",):
            plain = combine(name, folders, WEIGHTS, space=space, parameters=given(name))
            more = combine(
                name,
                [*folders, empty, folders[0]],
                [*WEIGHTS, 1.0, 0.0],
                space=space,
                parameters=given(name),
            )
            for module in SHAPES:
                close(more[module].dense(), plain[module].dense(), 1e-6)


def test_only_zero_adapters_give_zero(tmp_path):
    zero = {stem: (0 * B, A) for stem, (B, A) in pairs(9, SHAPES, 2).items()}
    folders = [write_peft(tmp_path / name, zero) for name in "ab"]
    for name, method in METHODS.items():
        if method.signature == "factors":
            continue
        for space in method.spaces or ("dense",):
            made = combine(name, folders, space=space, parameters=given(name))
            assert all(np.abs(made[module].dense()).max() == 0 for module in SHAPES), name
    report = ao.merge(folders, out=tmp_path / "out", method="ties", rank=2)
    assert report.norm == 0
    assert all(each.retention is None for each in report.inputs)


def test_methods_of_methods_and_of_sums(three):
    a, b, c = (ao.open_adapter(folder) for folder in three[0])
    changes = three[1]
    total = combine("slerp", [0.5 * a + 0.25 * b, c]) - 2 * a
    for module in SHAPES:
        D = [each[module] for each in changes]
        x, y = 0.5 * D[0] + 0.25 * D[1], D[2]
        angle = np.arccos(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y))
        middle = np.sin(angle / 2) / np.sin(angle) * (x + y)
        close(total[module].dense(), middle - 2 * D[0])
    assert total.norm() == pytest.approx(
        np.sqrt(sum(np.sum(total[module].dense() ** 2) for module in SHAPES))
    )


def test_a_sum_with_a_method_in_it_names_every_adapter_once(three, tmp_path):
    a, b, c = (ao.open_adapter(folder) for folder in three[0])
    report = (combine("tsv", [a, b]) + 0.5 * a - c).save(tmp_path / "out", dtype="float32")
    assert [(each.name, each.weight) for each in report.inputs] == [
        ("a0", None),  # it has two places, a1 one in a method: no number says what is theirs
        ("a1", None),
        ("a2", -1.0),
    ]
    found = written(tmp_path / "out")
    for index, each in enumerate(report.inputs):
        D = three[1][index]
        product = sum(np.sum(found[k] * D[k]) for k in D)
        assert each.retention == pytest.approx(product / sum(np.sum(D[k] ** 2) for k in D))


@pytest.mark.parametrize("name", ["linear", "slerp", "tsv", "ties", "dare_ties"])
def test_the_same_bytes_from_python_and_for_any_threads_and_memory(name, three, tmp_path):
    folders, _, w = some(name, three)
    rank = 5 if METHODS[name].signature == "elements" else None
    plain = ao.merge(folders, w, out=tmp_path / "a", method=name, rank=rank, jobs=1)
    ao.merge(folders, w, out=tmp_path / "b", method=name, rank=rank, jobs=4, memory="1MB")
    combine(name, folders, w).save(tmp_path / "c", rank=rank)
    files = [(tmp_path / x / "adapter_model.safetensors").read_bytes() for x in "ab"]
    assert files[0] == files[1]
    assert plain.method == name
    one, other = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ac")
    assert all(np.array_equal(one[key], other[key]) for key in one)


def test_random_bits_go_with_the_name(three, tmp_path):
    folders = three[0]
    plain = combine("dare", folders, seed=2, parameters={"density": 0.3})
    turned = combine("dare", folders[::-1], seed=2, parameters={"density": 0.3})
    other = combine("dare", folders, seed=3, parameters={"density": 0.3})
    module = "layers.0.q_proj"
    close(plain[module].dense(), turned[module].dense(), 1e-6)
    assert np.abs(plain[module].dense() - other[module].dense()).max() > 0.1
    named = [ao.open_adapter(folder, label=f"a{i}") for i, folder in enumerate(folders)]
    assert np.array_equal(
        combine("dare", named, seed=2, parameters={"density": 0.3})[module].dense(),
        plain[module].dense(),
    )


@pytest.mark.parametrize("to", ["mean", "max", "sum"])
@pytest.mark.parametrize(
    ("name", "space"),
    [
        ("linear", "dense"),
        ("tsv", "dense"),
        ("ties", "dense"),
        ("ties", "knots"),
        ("peft_linear", "dense"),
    ],
)
def test_match_norm(name, space, to, tmp_path):
    factors = [pairs(i, SHAPES, 3) for i in range(2)]
    folders = [write_peft(tmp_path / f"a{i}", each) for i, each in enumerate(factors)]
    made = combine(name, folders, [0.5, 1.5], space=space, match_norm=to)
    for module in SHAPES:
        sizes = np.array([np.linalg.norm(dense(each)[module]) for each in factors])
        wanted = {
            "mean": sizes @ [0.25, 0.75],
            "max": sizes.max(),
            "sum": sizes @ [0.5, 1.5],
        }[to]
        assert np.linalg.norm(made[module].dense()) == pytest.approx(wanted, rel=1e-6)


def test_calibrated_sums(three):
    folders, changes = three
    w = np.ones(3)
    made = {how: combine("linear", folders, w, calibrate=how) for how in ("pico", "svc")}
    for module in SHAPES:
        D = np.stack([each[module] for each in changes])
        close(made["pico"][module].dense(), modify.pico_map(D, w) @ D.sum(axis=0))
        close(made["svc"][module].dense(), modify.svc(D.sum(axis=0), D, w, np.full(3, 1e-9)))


def test_the_norm_is_matched_once_and_last(three):
    """svc compares a result with the adapters: it has to see it at its own size."""
    folders, changes = three
    w = np.array([1.0, 0.8, 0.6])
    made = combine("linear", folders, w, calibrate="svc", match_norm="sum")
    for module in SHAPES:
        D = np.stack([each[module] for each in changes])
        merged = modify.svc(np.tensordot(w, D, 1), D, w, np.full(3, 1e-9))
        size = w @ np.linalg.norm(D, axis=(1, 2))
        close(made[module].dense(), merged * size / np.linalg.norm(merged))


@pytest.mark.parametrize(
    ("name", "space"), [("linear", "dense"), ("tsv", "dense"), ("ties", "dense"), ("ties", "knots")]
)
def test_after_pico_the_norm_is_that_of_the_adapters_before(name, space, three):
    folders, changes = three
    w = np.array([1.0, 0.5, 2.0])
    made = combine(name, folders, w, space=space, calibrate="pico", match_norm="sum")
    for module in SHAPES:
        sizes = np.array([np.linalg.norm(each[module]) for each in changes])
        assert np.linalg.norm(made[module].dense()) == pytest.approx(w @ sizes, rel=1e-6)


def test_the_norm_of_a_small_difference_is_matched(tmp_path):
    factors = pairs(0, SHAPES, 3)
    other = {name: (B.copy(), A.copy()) for name, (B, A) in factors.items()}
    for _, A in other.values():
        A[0, 0] = np.nextafter(A[0, 0], np.float32(9), dtype=np.float32)
    folders = [write_peft(tmp_path / "a", factors), write_peft(tmp_path / "b", other)]
    made = combine("linear", folders, [1, -1], match_norm="max")
    for module in SHAPES:
        sizes = [np.linalg.norm(dense(each)[module]) for each in (factors, other)]
        assert np.linalg.norm(made[module].dense()) == pytest.approx(max(sizes), rel=1e-6)


def test_svc_of_tsv_takes_its_own_floor(three):
    """The paper's α is 1 for TSV, whose directions add up to no more than one adapter's."""
    folders, changes = three
    w = np.array([1.0, 0.8, 0.6])
    plain, made = combine("tsv", folders, w), combine("tsv", folders, w, calibrate="svc")
    for module in SHAPES:
        D = np.stack([each[module] for each in changes])
        expected = modify.svc(plain[module].dense(), D, w, np.full(3, 1e-9), alpha=1.0)
        close(made[module].dense(), expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["ties", "dare", "sce", "magnitude_prune"])
def test_entries_beyond_float32_are_named(name, tmp_path):
    factors = {name: (1e12 * B, 1e12 * A) for name, (B, A) in pairs(0, SHAPES, 2).items()}
    folder = write_peft(tmp_path / "a", factors)
    with pytest.raises(NumericsError, match=r"module layers\.0\.q_proj: .* too large for float32"):
        ao.merge([folder], out=tmp_path / "o", method=name, rank=2)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["ties", "tsv", "karcher"])
def test_weights_are_what_can_be_computed_with(name, three, tmp_path):
    for w in ([1e300, 1, 1], [1, 1e-50, 1]):
        with pytest.raises(UsageError, match="can be computed with"):
            ao.merge(three[0], w, out=tmp_path / "o", method=name, rank=2)
    with pytest.raises(NumericsError, match="every weight is zero"):
        ao.merge(three[0], [0, 0, 0], out=tmp_path / "o", method=name, rank=2)
    assert not (tmp_path / "o").exists()


def test_a_result_of_zero_is_no_zero_input(tmp_path):
    factors = pairs(0, SHAPES, 2)
    other = {name: (-B, A + 0.1) for name, (B, A) in factors.items()}
    folders = [write_peft(tmp_path / "a", factors), write_peft(tmp_path / "b", other)]
    report = ao.merge(folders, [0.5, 0.5], out=tmp_path / "o", method="model_stock")
    assert report.norm == 0
    assert not any("all inputs are zero" in note for note in report.notes)
    assert any("the result is zero" in each for each in report.warnings)
    with pytest.raises(BudgetError, match="the result is zero"):
        ao.merge(folders, [0.5, 0.5], out=tmp_path / "p", method="model_stock", strict=True)
    assert not (tmp_path / "p").exists()


def test_kohya_files_and_other_dialects(tmp_path):
    shapes = {"lora_unet_a_to_q": (18, 16), "lora_unet_b_to_k": (17, 19)}
    files = []
    for i in range(2):
        files.append(write_kohya(tmp_path / f"{i}.safetensors", pairs(i, shapes, 2), alpha=1.0))
    report = ao.merge(files, out=tmp_path / "o.safetensors", method="slerp", dtype="float32")
    assert report.dialect == "kohya"
    again = ao.open_adapter(tmp_path / "o.safetensors")
    for module in shapes:
        close(again[module].dense(), combine("slerp", files)[module].dense())


def test_modules_that_are_left_out_may_be_of_any_kind(tmp_path, three):
    extra = {"base_model.model.head.weight": np.ones((2, 3), np.float32)}
    folder = write_peft(tmp_path / "h", pairs(0, SHAPES, 2), extras=extra, modules_to_save=["head"])
    report = ao.merge([folder, three[0][0]], out=tmp_path / "o", method="tsv")
    assert "base_model.model.head.weight" in report.extras
    assert load_file(tmp_path / "o" / "adapter_model.safetensors")[
        "base_model.model.head.weight"
    ].shape == (2, 3)


def test_what_cannot_be_is_refused(three, tmp_path):
    folders = three[0]
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="did you mean ties"):
        ao.merge(folders, out=out, method="tise")
    with pytest.raises(UsageError, match="did you mean density"):
        ao.merge(folders, out=out, method="ties", parameters={"desity": 0.2})
    with pytest.raises(UsageError, match="above 0 to 1"):
        ao.merge(folders, out=out, method="ties", parameters={"density": 2}, rank=2)
    with pytest.raises(UsageError, match="takes 2 adapters; there are 3"):
        ao.merge(folders, out=out, method="slerp")
    with pytest.raises(UsageError, match="at least 2"):
        ao.merge(folders[0], out=out, method="project")
    with pytest.raises(UsageError, match="same in every space"):
        ao.merge(folders, out=out, method="tsv", space="knots")
    with pytest.raises(UsageError, match="svc"):
        ao.merge(folders, out=out, method="ties", calibrate="svc", rank=2)
    with pytest.raises(UsageError, match="bake BASE"):
        ao.merge(folders, out=out, method="ties")
    with pytest.raises(UsageError, match="--activations"):
        ao.merge(folders, out=out, method="regmean")
    with pytest.raises(UsageError, match="takes no --activations"):
        ao.merge(folders, out=out, method="tsv", activations="x")
    with pytest.raises(NumericsError, match="opposite") as failed:
        a = ao.open_adapter(folders[0])
        combine("slerp", [a, -a]).save(out)
    assert failed.value.module in SHAPES
    with pytest.raises(IncompatibleError, match="ranks have to agree"):
        ao.merge(folders, out=out, method="peft_linear")
    assert not out.exists()


def test_full_deltas_have_no_method(tmp_path):
    factors = pairs(0, {"lora_unet_a": (16, 16)}, 2)
    plain = write_kohya(tmp_path / "a.safetensors", factors, alpha=2.0)
    more = {"lora_unet_b.diff": np.ones((4, 4), np.float32)}
    from safetensors.numpy import save_file

    full = load_file(plain) | more
    save_file(full, tmp_path / "b.safetensors")
    with pytest.raises(UnsupportedError, match="full delta"):
        ao.merge([plain, tmp_path / "b.safetensors"], out=tmp_path / "o", method="tsv")
    report = ao.merge(
        [plain, tmp_path / "b.safetensors"],
        out=tmp_path / "o.safetensors",
        method="tsv",
        modules="lora_unet_a",
    )
    assert list(report.modules) == ["lora_unet_a"]


def test_modules_that_only_one_adapter_keeps(three, tmp_path):
    """Rules may leave two adapters nothing in common."""
    folders, changes = three
    rules = ["re:.*q_proj: 1,0,0", "re:.*up_proj: 0,0.5,0"]
    for method in ("linear", "tsv"):
        out = tmp_path / method
        report = ao.merge(
            folders, [1, 1, 1], out=out, method=method, module_weights=rules, dtype="float32"
        )
        found = written(out)
        close(found["layers.0.q_proj"], changes[0]["layers.0.q_proj"])
        close(found["layers.1.up_proj"], 0.5 * changes[1]["layers.1.up_proj"])
        assert report.inputs[0].retention == pytest.approx(1)
        assert report.inputs[1].retention == pytest.approx(1)


def test_check_computes_it_again(three, tmp_path):
    folders, _ = three
    out = tmp_path / "out"
    rules = ["re:.*up_proj: 1,0.5,0.25"]
    ao.merge(folders, WEIGHTS, out=out, method="dare_ties", rank=6, module_weights=rules)
    report = ao.check(out, recompute=True, inputs=tmp_path)
    assert [each.code for each in report.findings] == ["recompute-equal"]
    tensors = load_file(out / "adapter_model.safetensors")
    assert len(tensors) == 4


def test_what_is_made_of_what_is_recorded(three, tmp_path):
    """Nothing else tells two outputs of the same files apart."""
    a, b, c = (ao.open_adapter(folder) for folder in three[0])
    seeds = [combine("dare", [a, b], space="core", seed=seed) for seed in (1, 2)]
    results = [
        *seeds,
        seeds[0] + c,
        combine("slerp", [seeds[0], c]),
        combine("slerp", [a + b, c]),
        combine("slerp", [a + 2 * b, c]),
        combine("tsv", [a, b, c]),
    ]
    found = []
    for index, each in enumerate(results):
        each.save(tmp_path / str(index))
        document = json.loads((tmp_path / str(index) / "adapterops.json").read_text())
        found.append(json.dumps(document["provenance"], sort_keys=True))
    assert len(set(found)) == len(found)
    made = json.loads(found[3])["options"]["sum"]
    assert made[0][1]["method"] == "slerp"
    assert made[0][1]["of"][0][1]["seed"] == 1
    assert made[0][1]["of"][0][1]["of"] == [[1.0, 0], [1.0, 1]]


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_the_noise_of_storage_is_what_rounding_does(dtype, decay):
    """Of a size that matters: 50 times as much would cut every 16-bit adapter to pieces."""
    rng = np.random.default_rng(5)
    for m, n, rank, mixed in ((300, 200, 16, False), (64, 64, 4, False), (200, 300, 8, True)):
        B = rng.standard_normal((m, rank)) * decay ** np.arange(rank)
        A = rng.standard_normal((rank, n))
        if mixed:
            turn = rng.standard_normal((rank, rank))
            B, A = B @ turn, np.linalg.solve(turn, A)
        b, a = (casts.widen(casts.store(x, dtype), dtype) for x in (B, A))
        off = np.linalg.norm(b @ a - B @ A, 2)
        assert off < storage_noise({dtype, "F32"}, Factors(b, a)) < 2.5 * off


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts", "ctm"])
def test_sixteen_bits_keep_every_direction_of_ordinary_adapters(name, dtype, tmp_path):
    rng = np.random.default_rng(8)
    folders, changes = [], []
    for i in range(4):
        B = np.linalg.qr(rng.standard_normal((96, 8)))[0] * 0.9 ** np.arange(8)
        A = np.linalg.qr(rng.standard_normal((80, 8)))[0].T
        tensors = {
            "base_model.model.m.q_proj.lora_B.weight": torch.from_numpy(B)
            .to(TORCH[dtype])
            .contiguous(),
            "base_model.model.m.q_proj.lora_A.weight": torch.from_numpy(A)
            .to(TORCH[dtype])
            .contiguous(),
        }
        folder = write_peft(tmp_path / f"a{i}", {"m.q_proj": (B, A)})
        save_torch(tensors, folder / "adapter_model.safetensors")
        folders.append(folder)
        changes.append(B @ A)
    report = ao.merge(folders, out=tmp_path / "out", method=name, dtype="float32")
    [said] = report.modules["m.q_proj"].methods
    assert said.name == name
    assert said.rank >= (8 if name == "ctm" else 31)
    assert 0 < said.cut < 0.3
    D = np.stack(changes)
    exact = METHODS[name].function(D, np.ones(4), np.zeros(4), **METHODS[name].values({})).core
    if said.rank == (8 if name == "ctm" else 32):  # a direction less turns all of iso_cts
        close(written(tmp_path / "out")["m.q_proj"], exact, 0.05)


def test_what_a_method_leaves_out_is_in_the_report(tmp_path):
    """Where it cut, how clear the cut was, and a warning where it fell into a crowd."""
    rng = np.random.default_rng(2)
    U, V = (np.linalg.qr(rng.standard_normal((size, 6)))[0] for size in (40, 30))
    sizes = np.array([1.0, 0.9, 0.8, 0.00095, 0.0009, 0.0008])
    A = np.ascontiguousarray(V.T, np.float32)
    factors = {"m.q_proj": ((U * sizes).astype(np.float32), A)}
    folder = write_peft(tmp_path / "a", factors)
    given = {"method": "iso_c", "parameters": {"cut": 0.00086}}
    report = ao.merge(folder, out=tmp_path / "out", **given)
    [said] = report.modules["m.q_proj"].methods
    assert (said.rank, said.cut) == (5, pytest.approx(0.00086, rel=1e-3))
    assert said.gap == pytest.approx(0.8 / 0.9, rel=1e-3)
    assert any("iso_c: directions were left out" in text for text in report.warnings)
    with pytest.raises(BudgetError, match="directions were left out"):
        ao.merge(folder, out=tmp_path / "x", strict=True, **given)
    document = json.loads((tmp_path / "out" / "adapterops.json").read_text())
    assert document["modules"]["m.q_proj"]["methods"][0]["rank"] == 5
    assert not (tmp_path / "x").exists()
    for space in ("dense", "core"):
        plain = combine("ties", folder, space=space)
        plain["m.q_proj"]
        assert plain.terms[0][1].sites["m.q_proj"].made.said.near <= 1


def test_entries_at_a_limit_are_counted(tmp_path):
    """All entries of one size: which of them are the largest is rounding's to say."""
    ones = {"m.q_proj": (np.ones((40, 1), np.float32), np.ones((1, 30), np.float32))}
    folder = write_peft(tmp_path / "a", ones)
    report = ao.merge(folder, out=tmp_path / "t", method="ties", rank=8)
    assert report.modules["m.q_proj"].methods[0].near == 40 * 30 - 1
    assert any("1,199 entries lie within" in text for text in report.notes)


def test_knots_of_more_columns_than_the_module_has_inputs(tmp_path):
    """U of [D₁ | … | D_T] has more columns than the result has a rank."""
    shapes = {"layers.0.gate": (40, 5)}
    folders = [write_peft(tmp_path / f"n{i}", pairs(i, shapes, 4), alpha=4.0) for i in range(3)]
    changes = np.stack([dense(pairs(i, shapes, 4))["layers.0.gate"] for i in range(3)])
    given = {"density": 1.0, "normalize": False}
    found = combine("ties", folders, parameters=given, space="knots")["layers.0.gate"]
    U = canonical.knots([ao.open_adapter(folder)["layers.0.gate"] for folder in folders])[0]
    assert U.shape[1] > 5
    expected = U @ elements.ties(U.T @ changes, np.ones(3), None, density=1.0, normalize=False)
    close(found.dense(), expected)


def test_regmean_of_more_columns_than_the_module_has_sides(tmp_path):
    shapes = {"layers.0.gate": (40, 5)}
    folders = [write_peft(tmp_path / f"n{i}", pairs(i, shapes, 4), alpha=4.0) for i in range(3)]
    moments = tmp_path / "moments.safetensors"
    write_activations(moments, {"layers.0.gate": ("gram", np.eye(5))}, tokens=40, model="any")
    found = combine("regmean", folders, activations=moments)["layers.0.gate"]
    close(found.dense(), sum(dense(pairs(i, shapes, 4))["layers.0.gate"] for i in range(3)) / 3)
