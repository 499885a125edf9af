"""Other tools' merges, right and wrong, judged."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from adapterops.basemodel.model import BaseModel, open_model
from adapterops.changes.targets import Changes, DenseTerm, Target, Term, Values
from adapterops.errors import UnsupportedError
from adapterops.extras import Extra
from adapterops.judging.configs import compare_configs
from adapterops.judging.diagnosis import diagnose
from adapterops.judging.ladder import half_ulp
from adapterops.judging.measure import Pair, measure
from adapterops.judging.naming import match
from adapterops.judging.report import DriftReport, report
from adapterops.judging.trend import Trend, detectable, margins
from adapterops.judging.untargeted import (
    Finding,
    compare_copies,
    compare_values,
    match_models,
)
from adapterops.judging.verdict import Cause, Judged, judge
from adapterops.rounding.grid import ulp
from adapterops.rounding.precision import exact_arithmetic
from tests import broken_merges as merges
from tests.broken_merges import Adapter, adapter, exact, nearest, pair, weight
from tests.checkpoints import encode, write

BASES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(autouse=True)
def ieee():
    with exact_arithmetic():
        yield


def cause_of(found: Pair, names: tuple[str, ...] = ()) -> Cause:
    judged = judge(found)
    assert judged.implementation == "failed"
    return diagnose(found, judged, names)


# Right merges


@pytest.mark.parametrize(
    ("scale", "count"),
    [(2.0, 1), (1.4, 1), (0.7 * math.sqrt(2), 1), (1.4, 3)],
    ids=["2", "1.4", "0.7rt2", "three"],
)
@pytest.mark.parametrize("base", BASES)
def test_no_false_failure(base, scale, count):
    W = weight(BASES[base])
    sizes = ((torch.float32, 5e-4), (torch.bfloat16, 5e-3), (BASES[base], 5e-2))
    for dtype, size in sizes if count == 1 else sizes[:2]:
        adapters = [adapter(dtype, scale=scale, size=size, seed=5 + k) for k in range(count)]
        for name, tool in merges.TOOLS.items():
            found = judge(pair(W, tool(W, adapters), adapters))
            assert found.implementation == "ok", (name, dtype, size, found)


@pytest.mark.parametrize("base", BASES)
def test_small_changes_in_16_bits_are_no_failure(base):
    """Subnormal products and ties: where each rounding has a bias of its own."""
    W = weight(BASES[base], 512, 512)
    adapters = [adapter(torch.float16, 512, 512, scale=1.4, size=2e-4, seed=k) for k in (5, 6)]
    for tool in (merges.half_factors, merges.peft_safe, merges.peft):
        found = judge(pair(W, tool(W, adapters), adapters))
        assert found.implementation == "ok", (tool, found)


@pytest.mark.parametrize(
    ("tool", "rungs"),
    [
        ("numpy", {0}),
        ("axolotl", {0, 1}),
        ("unsloth", {0, 1}),
        ("peft-safe", {2}),
        ("half", {3, 4}),
        ("cast", {4}),
        ("tf32", {3, 4}),
    ],
)
def test_rung_says_how_it_was_computed(tool, rungs):
    W = weight(torch.bfloat16)
    one = adapter(torch.float32, scale=1.4, size=2e-2)
    found = judge(pair(W, merges.TOOLS[tool](W, [one]), [one]))
    assert found.rung in rungs
    assert found.model


def test_sequence_is_the_highest_rung():
    W = weight(torch.bfloat16)
    adapters = [adapter(torch.float32, size=2e-3, seed=k) for k in range(4)]
    found = judge(pair(W, merges.peft(W, adapters), adapters))
    assert (found.implementation, found.rung) == ("ok", 5)
    at_once = judge(pair(W, merges.numpy_double(W, adapters), adapters))
    assert (at_once.implementation, at_once.rung) == ("ok", 0)
    assert at_once.drift.error < found.drift.error


@pytest.mark.parametrize("grid", ["bf16", "fp16"])
def test_float32_base_in_16_bits(grid):
    """Loaded in the result's type and merged there, or merged in float32 and rounded."""
    W = weight(torch.float32)
    one = adapter(torch.float32, size=1e-3)
    late = nearest(exact(W, [one]), BASES[grid])
    early = nearest(exact(W.to(BASES[grid]), [one]), BASES[grid])
    found = judge(pair(W, late, [one]))
    assert (found.implementation, found.rung) == ("ok", 0)
    found = judge(pair(W, early, [one]))
    assert found.implementation == "ok"
    assert found.route.cast and "base was rounded" in found.model


def test_16_bit_merge_stored_in_float32_is_judged_on_its_own_grid():
    W = weight(torch.bfloat16)
    one = adapter(torch.float32, size=5e-3)
    found = judge(pair(W, merges.axolotl(W, [one]).float(), [one]))
    assert (found.implementation, found.grid, found.dtype) == ("ok", "BF16", "F32")
    wide = judge(pair(W, nearest(exact(W, [one]), torch.float32), [one]))
    assert (wide.implementation, wide.grid, wide.rung) == ("ok", "F32", 0)


def test_bfloat16_to_float16_and_back():
    one = adapter(torch.float32, size=5e-3)
    for base, other in ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)):
        W = weight(base)
        assert judge(pair(W, merges.axolotl(W.to(other), [one]), [one])).implementation == "ok"


def test_detours_through_the_other_16_bits():
    """A bfloat16 model merged in float16 and cast back; one merged in bfloat16, kept as float16."""
    W = weight(torch.bfloat16)
    for size in (5e-4, 5e-3, 5e-2):
        one = adapter(torch.float32, size=size)
        there = merges.axolotl(W.half(), [one]).bfloat16()
        found = judge(pair(W, there, [one]))
        assert (found.implementation, found.rung) == ("ok", 5)
        found = judge(pair(W, merges.axolotl(W, [one]).half(), [one]))
        assert (found.implementation, found.grid) == ("ok", "BF16")


def test_swallowed_change_is_undetermined():
    W = weight(torch.bfloat16)
    one = adapter(torch.float32, size=1e-8)
    found = judge(pair(W, W, [one]))
    assert found.implementation == "undetermined"
    assert found.drift.gain == 0.0


def test_zero_adapter_is_ok():
    W = weight(torch.bfloat16)
    one = adapter(torch.float32)
    one = replace(one, B=torch.zeros_like(one.B))
    found = judge(pair(W, W, [one]))
    assert (found.implementation, found.rung) == ("ok", 0)


def test_negative_zero_is_zero():
    W = weight(torch.bfloat16)
    W[0, :8] = -0.0
    one = adapter(torch.float32)
    one.B[0] = 0
    after = nearest(exact(W, [one]), torch.bfloat16)
    after[0, :8] = 0.0
    assert judge(pair(W, after, [one])).rung == 0


def test_declared_random_rounding():
    """Faithful rounding: either neighbour, and no slope against W + D itself."""
    W = weight(torch.bfloat16, 512, 512)
    one = adapter(torch.float32, 512, 512, size=5e-3)
    generator = torch.Generator().manual_seed(3)

    def stochastic(T: torch.Tensor) -> torch.Tensor:
        bits = T.float().view(torch.int32)
        noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32)
        return ((bits + noise) & ~0xFFFF).view(torch.float32).bfloat16()

    after = stochastic(exact(W, [one]))
    found = judge(pair(W, after, [one]), faithful=1)
    assert (found.implementation, found.rung, found.route.guessed) == ("ok", 6, False)
    strong = stochastic(exact(W, [one], 1.04))
    assert judge(pair(W, strong, [one]), faithful=1).implementation == "failed"


# Scale errors


@pytest.mark.parametrize(
    ("base", "size"), [("bf16", 0.2), ("fp16", 2e-2), ("fp16", 5e-3), ("fp32", 5e-4)]
)
@pytest.mark.parametrize("tool", ["axolotl", "peft-safe", "cast"])
def test_a_thousandth_is_caught(base, size, tool):
    n = 256 if base == "fp32" else 1024
    W = weight(BASES[base], n, n)
    one = adapter(torch.float32, n, n, size=size, rank=16)
    wrong = replace(one, scale=one.scale * 1.001)
    after = merges.TOOLS[tool](W, [wrong])
    assert int((after != merges.TOOLS[tool](W, [one])).sum()) >= 10_000
    found = judge(pair(W, after, [one]))
    assert found.implementation == "failed"
    assert abs(found.slope) == pytest.approx(1e-3, rel=0.35)


def test_what_would_not_show_is_said():
    W = weight(torch.bfloat16)
    one = adapter(torch.float32, size=5e-4)
    right = judge(pair(W, merges.axolotl(W, [one]), [one]))
    assert right.implementation == "ok"
    assert right.detectable is not None and 0.1 < right.detectable < 1.0
    codes = merges.axolotl(W, [replace(one, scale=one.scale * (1 + right.detectable))])
    changed = int((codes != merges.axolotl(W, [one])).sum())
    assert changed == pytest.approx(10_000, rel=0.35)  # four rows of 256 are sampled


def test_margins_count_codes():
    T = torch.tensor([[1.0 + 2**-9, 1.0 + 2**-8 - 2**-12]], dtype=torch.float64)
    D = torch.tensor([[2**-9, 2**-8 - 2**-12]], dtype=torch.float64)
    counts = margins(T, D, torch.full_like(T, 2.0**-7))
    assert counts.sum() == 2  # at x = 1 and at x = 1/15
    assert np.flatnonzero(counts).tolist() == [int((math.log2(1 / 15) + 16) * 2), 32]
    assert detectable(counts) is None
    assert detectable(counts * 20_000) == pytest.approx(1 / 15, rel=0.3)


def test_clusters_widen_the_standard_error():
    rng = np.random.default_rng(0)
    D = rng.standard_normal((40, 50))
    x = D * rng.standard_normal((40, 1))  # every row wrong by a factor of its own
    products = x * D
    trend = Trend(
        float(products.sum()),
        float((products**2).sum()),
        float((D * D).sum()),
        ((0, products.sum(1)),),
        products.sum(0),
    )
    rows, columns = (D * D).sum(1), (D * D).sum(0)
    assert trend.clustered(rows, columns) > 3 * trend.error
    assert trend.clustered(rows, columns) == pytest.approx(1 / math.sqrt(40), rel=0.5)


# What happened


def wrongly(base: str, size: float = 5e-3, n: int = 256) -> tuple[torch.Tensor, Adapter]:
    return weight(BASES[base], n, n), adapter(torch.bfloat16, n, n, size=size, scale=4.0, rank=16)


@pytest.mark.parametrize("size", [5e-3, 5e-4], ids=["large", "small"])
@pytest.mark.parametrize("base", BASES)
def test_not_applied(base, size):
    W, one = wrongly(base, size)
    cause = cause_of(pair(W, W, [one]))
    assert cause.kind == "not-applied" and cause.certain
    assert f"of {W.numel()}" in cause.text


@pytest.mark.parametrize(
    ("factor", "kind", "said"),
    [
        (4.0, "wrong-scale", "alpha/√r, 16, in place of alpha/r, 4"),
        (0.25, "wrong-scale", "the scale 4 was left out"),
        (16.0, "wrong-scale", "not divided by the rank"),
        (-1.0, "sign", "subtracted"),
        (1.04, "wrong-scale", "1.04 times as strong"),
        (0.3, "wrong-scale", "0.3 times as strong"),
        (-2.5, "wrong-scale", "subtracted, 2.5 times"),
    ],
)
@pytest.mark.parametrize("base", ["bf16", "fp16"])
def test_wrong_scale_is_named(base, factor, kind, said):
    W, one = wrongly(base, 1e-3, 512)
    after = merges.axolotl(W, [replace(one, scale=factor * one.scale)])
    cause = cause_of(pair(W, after, [one]))
    assert (cause.kind, cause.certain) == (kind, True)
    assert cause.factor == pytest.approx(factor, rel=3e-3)
    assert said in cause.text


def test_rslora_read_as_plain_lora():
    W, one = wrongly("bf16")
    found = pair(W, merges.axolotl(W, [replace(one, scale=one.scale / 4)]), [one])
    term = found.target.terms[0]
    site = replace(term.site, alpha=term.site.scale * 4)  # alpha/√16
    found = replace(found, target=replace(found.target, terms=(replace(term, site=site),)))
    assert "alpha/r, 1, in place of alpha/√r, 4" in cause_of(found).text


def test_missing_weight():
    W, one = wrongly("fp16")
    cause = cause_of(pair(W, merges.axolotl(W, [one]), [one], [0.7]))
    assert "the weight 0.7 was left out" in cause.text and cause.certain


@pytest.mark.parametrize("base", BASES)
def test_merged_twice(base):
    W, one = wrongly(base)
    cause = cause_of(pair(W, merges.peft(merges.peft(W, [one]), [one]), [one]))
    assert cause.kind == "twice" and cause.certain


@pytest.mark.parametrize("base", BASES)
def test_transposed(base):
    W, one = wrongly(base)
    D = exact(W, [one]) - W.double()
    cause = cause_of(pair(W, nearest(W.double() + D.T, BASES[base]), [one]))
    assert (cause.kind, cause.certain) == ("transposed", True)


@pytest.mark.parametrize("base", BASES)
def test_partial(base):
    W, one = wrongly(base)
    D = exact(W, [one]) - W.double()
    rows = D.clone()
    rows[100:200] = 0
    cause = cause_of(pair(W, nearest(W.double() + rows, BASES[base]), [one]))
    assert (cause.kind, cause.certain) == ("partial-rows", True)
    assert "rows 100-199 of 256" in cause.text
    columns = D.clone()
    columns[:, 128:] = 0
    cause = cause_of(pair(W, nearest(W.double() + columns, BASES[base]), [one]))
    assert (cause.kind, cause.certain) == ("partial-columns", True)
    half = 4.0 * (one.B[:, 8:].double() @ one.A[8:].double())
    cause = cause_of(pair(W, nearest(W.double() + half, BASES[base]), [one]))
    assert (cause.kind, cause.certain) == ("partial-rank", True)
    assert "8 of the change's 16 directions were added (8-15)" in cause.text


@pytest.mark.parametrize("base", BASES)
def test_one_of_several_is_missing(base):
    W, one = wrongly(base)
    other = adapter(torch.float32, 256, 256, seed=9)
    cause = cause_of(pair(W, merges.axolotl(W, [other]), [one, other]), ("style", "task"))
    assert (cause.kind, cause.certain) == ("missing-adapter", True)
    assert cause.text == "of 2 adapters style was not added"


def test_one_of_several_has_another_weight():
    W, one = wrongly("fp16")
    other = adapter(torch.float32, 256, 256, seed=9)
    after = merges.axolotl(W, [replace(one, scale=2.0), other])
    cause = cause_of(pair(W, after, [one, other]), ("style", "task"))
    assert cause.kind == "wrong-weight"
    assert "style was added 0.5" in cause.text


@pytest.mark.parametrize("base", BASES)
def test_another_adapter_or_more_or_another_base(base):
    W, one = wrongly(base)
    other = adapter(torch.float32, 256, 256, size=5e-3, seed=9)
    cause = cause_of(pair(W, merges.axolotl(W, [other]), [one]))
    assert cause.kind == "another-adapter" and "rank about 8" in cause.text
    cause = cause_of(pair(W, merges.axolotl(W, [one, other]), [one]))
    assert cause.kind == "more"
    cause = cause_of(pair(W, weight(BASES[base], 256, 256, seed=77), [one]))
    assert cause.kind == "another-base"


def test_values_out_of_range():
    W, one = wrongly("fp16")
    W[3, :16] = 65504.0
    big = replace(one, scale=1e7)
    T = exact(W, [big])
    after = nearest(T, torch.float16)
    assert not bool(after.isfinite().all())
    assert cause_of(pair(W, after, [big])).kind == "non-finite"
    clipped = after.nan_to_num(0.0, 65504.0, -65504.0)
    cause = cause_of(pair(W, clipped, [big]))
    assert cause.kind == "overflow" and "clipped" in cause.text


def test_single_wrong_element_fails():
    W, one = wrongly("bf16")
    after = merges.axolotl(W, [one])
    after[7, 9] += 1
    cause = cause_of(pair(W, after, [one]))
    assert cause.kind == "few" and "1 of 65536" in cause.text
    after[7, 9] = math.nan
    assert cause_of(pair(W, after, [one])).kind == "non-finite"


def test_rows_without_a_change_are_the_bases():
    W, one = weight(torch.bfloat16, 512, 256), adapter(torch.float32, 128, 256)
    total = W.double()
    total[300:428] += one.scale * (one.B.double() @ one.A.double())
    after = nearest(total, torch.bfloat16)
    found = pair(W, after, [one], first=300)
    assert judge(found).implementation == "ok"
    after[2, 2] += 1
    spoilt = pair(W, after, [one], first=300)
    judged = judge(spoilt)
    assert (judged.implementation, judged.outside) == ("failed", 1)
    assert diagnose(spoilt, judged).kind == "untargeted"


def test_input_along_rows():
    """Conv1D: the same sums of what the adapter's inputs see, stored the other way."""
    W, one = weight(torch.bfloat16), adapter(torch.float32)
    there = judge(pair(W, merges.axolotl(W, [one]), [one]))
    found = pair(W.T.contiguous(), merges.axolotl(W, [one]).T.contiguous(), [])
    term = pair(W, W, [one]).target.terms[0]
    turned = replace(term, rows=term.columns, columns=term.rows, turned=True)
    target = replace(found.target, terms=(turned,), inputs="rows")
    here = judge(replace(found, target=target))
    assert (here.implementation, here.rung) == ("ok", there.rung)
    assert here.drift.subspace_error == pytest.approx(there.drift.subspace_error, rel=1e-4)


class Dense:
    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.values[start:stop]


def test_dense_change_as_tools_compute_it():
    """DoRA by PEFT's steps in 16 bits, and left out."""
    W, one = weight(torch.bfloat16), adapter(torch.bfloat16)
    V = exact(W, [one])
    magnitude = 1.01 * V.norm(dim=1, keepdim=True)
    D = (magnitude / V.norm(dim=1, keepdim=True) * V - W.double()).numpy()
    target = Target(
        "w", merges.ref(W), (256, 512), (), (DenseTerm(0, 1.0, "layer", lambda: Dense(D)),)
    )

    def found(after: torch.Tensor) -> Judged:
        return judge(Pair(target, merges.ref(after)))

    assert found(nearest(W.double() + torch.from_numpy(D), torch.bfloat16)).rung == 0
    delta = (one.B @ one.A) * one.scale
    norm = (W + delta).norm(dim=1, keepdim=True)
    rounded = (magnitude.bfloat16() / norm) * (W + delta)
    assert found(rounded).implementation == "ok"
    assert found(W).implementation == "failed"


# Bounds


@pytest.mark.parametrize(("name", "bits", "least"), [("F16", 10, -14), ("BF16", 7, -126)])
def test_half_ulp(name, bits, least):
    values = [1.0, 1.5, 2.0 - 2**-20, 2.0, 0.1, 2.0**-14, 2.0**-20, 2.0**-130, 0.0, 1e4]
    found = half_ulp(torch.tensor(values, dtype=torch.float64), (name,)).tolist()
    for x, half in zip(values, found, strict=True):
        exponent = least
        while Fraction(2) ** (exponent + 1) <= Fraction(x):
            exponent += 1
        assert Fraction(half) == Fraction(2) ** (exponent - bits - 1)


def test_passes_add_up():
    W, one = weight(torch.bfloat16), adapter(torch.float32)
    found = measure(pair(W, merges.peft_safe(W, [one]), [one]))
    assert found.elements == W.numel()
    assert list(found.unexplained[:6]) == sorted(found.unexplained[:6], reverse=True)
    D = exact(W, [one]) - W.double()
    assert found.drift.delta == pytest.approx(float((D * D).sum()), rel=1e-5)


# Whole models

MODULE = "model.layers.0.q_proj"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64}


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "model.embed_tokens.weight": 0.02 * rng.standard_normal((64, 512)),
        f"{MODULE}.weight": 0.02 * rng.standard_normal((256, 512)),
        "model.layers.0.input_layernorm.weight": 1 + 0.1 * rng.standard_normal(512),
        "model.norm.weight": 1 + 0.1 * rng.standard_normal(512),
        "lm_head.weight": 0.02 * rng.standard_normal((64, 512)),
    }


def values_of(model: BaseModel) -> dict[str, np.ndarray]:
    return {name: np.asarray(ref.read()) for name, ref in model.tensors.items()}


def changes(base: BaseModel, one: Adapter) -> Changes:
    name = f"{MODULE}.weight"
    ref = base.tensors[name]
    site = merges.site(merges.ref(one.B, "B"), merges.ref(one.A, "A"), one.scale, MODULE)
    m, n = ref.shape
    term = Term(0, one.scale, site, slice(0, m, 1), slice(0, n, 1))
    return Changes(targets={name: Target(name, ref, (m, n), (term,))}, modules=1)


def judged(base: Path, baked: Path, one: Adapter, made: Changes | None = None) -> DriftReport:
    before, after = open_model(base), open_model(baked)
    made = made or changes(before, one)
    matched = match_models(before, after, made)
    verdicts = []
    for found in matched.targets.values():
        verdict = judge(found)
        if verdict.implementation == "failed":
            verdict = replace(verdict, cause=diagnose(found, verdict))
        verdicts.append(verdict)
    copied = [compare_copies(name, *refs) for name, refs in matched.copies.items()]
    found = [compare_values(name, *given) for name, given in matched.values.items()]
    more = [*compare_configs(before, after, made), *(x for x in found if x)]
    result = report("base", (("a", 1.0),), "baked", matched, verdicts, copied, more)
    json.dumps(result.to_dict(), allow_nan=False)
    return result


@pytest.mark.parametrize(
    ("before", "after"),
    [("model.", ""), ("", "model."), ("transformer.", ""), ("model.", "language_model.model.")],
)
def test_tensors_below_a_renamed_word(before, after):
    """They have no module of their own; the layers beside them tell what the word became."""
    names = ("layers.0.q.weight", "layers.0.q.bias", "norm.gamma", "scale", "rotary.freqs")
    wanted = {f"{before}{name}": (4, n + 1) for n, name in enumerate(names)}
    there = {
        f"{after}{n}": replace(merges.ref(torch.ones(shape), n), shape=shape)
        for n, shape in zip(names, wanted.values(), strict=True)
    }
    expected = dict(zip(wanted, there, strict=True))
    assert match(wanted, there) == expected
    changed = {**there, f"{after}scale": replace(there[f"{after}scale"], shape=(9,))}
    del expected[f"{before}scale"]
    assert match(wanted, changed) == expected


def models(
    tmp_path: Path, dtype: str = "BF16", scale: float = 1.0, size: float = 5e-3, **options: object
) -> tuple[Path, dict[str, np.ndarray], Adapter]:
    """A base on disk, and the values of its merge, which a test then spoils."""
    base = write(tmp_path / "base", tensors(), dtype, CONFIG)
    one = adapter(torch.bfloat16, size=size)
    after = values_of(open_model(base))
    after[f"{MODULE}.weight"] = (
        after[f"{MODULE}.weight"] + scale * one.scale * (one.B.double() @ one.A.double()).numpy()
    )
    return base, after, one


def save(
    tmp_path: Path, after: dict[str, np.ndarray], dtype: str = "BF16", **config: object
) -> Path:
    return write(tmp_path / "baked", after, dtype, {**CONFIG, **config})


def test_float32_merge_too_strong_by_four_percent(tmp_path):
    base, after, one = models(tmp_path, "F32", scale=1.04)
    found = judged(base, save(tmp_path, after, "F32"), one)
    assert (found.implementation, found.exit_code) == ("failed", 5)
    assert "1.04 times as strong" in found.summary[0]


def test_zeroed_norm(tmp_path):
    base, after, one = models(tmp_path)
    after["model.norm.weight"] = np.zeros(512)
    found = judged(base, save(tmp_path, after), one)
    assert (found.implementation, found.exit_code) == ("failed", 5)
    assert found.summary == ("model.norm.weight is all zeros, and no adapter changes it",)
    assert found.tensors[f"{MODULE}.weight"].implementation == "ok"


def test_lost_head(tmp_path):
    base, after, one = models(tmp_path)
    del after["lm_head.weight"]
    found = judged(base, save(tmp_path, after), one)
    assert found.implementation == "failed"
    assert [f.name for f in found.findings if f.kind == "lost"] == ["lm_head.weight"]


@pytest.mark.parametrize("size", [1e-3, 2e-3, 4e-3])
def test_right_bfloat16_merge_near_the_gate(tmp_path, size):
    """max|D| about 8 ulp of the largest weight and residuals above 5 %: right all the same."""
    base, after, one = models(tmp_path, size=size)
    found = judged(base, save(tmp_path, after), one)
    assert (found.implementation, found.exit_code, found.rung) == ("ok", 0, 0)
    assert found.tensors[f"{MODULE}.weight"].error > 0.05


def test_bfloat16_adapter_rounded_once(tmp_path):
    base, after, one = models(tmp_path)
    found = judged(base, save(tmp_path, after), one)
    assert (found.implementation, found.rung) == ("ok", 0)
    assert found.model == "rounded once, exactly"
    assert found.identical == 4


def test_representation_warns_and_says_what_to_do(tmp_path):
    base, after, one = models(tmp_path, size=3e-4)
    found = judged(base, save(tmp_path, after), one)
    assert (found.implementation, found.representation, found.exit_code) == ("ok", "lossy", 0)
    assert any("float32" in text and "compensated" in text for text in found.warnings)
    assert replace(found, max_drift=0.1).exit_code == 5


def test_changed_untargeted_value(tmp_path):
    base, after, one = models(tmp_path)
    after["model.embed_tokens.weight"][3, 4] += 0.5
    found = judged(base, save(tmp_path, after), one)
    assert found.implementation == "failed"
    assert "model.embed_tokens.weight 1 of 32768 values differ" in found.summary[0]


def test_shards_and_another_prefix(tmp_path):
    base, after, one = models(tmp_path)
    renamed = {
        name.replace("model.", "model.language_model."): value for name, value in after.items()
    }
    baked = write(tmp_path / "baked", renamed, "BF16", CONFIG, shards=3)
    found = judged(base, baked, one)
    assert (found.implementation, found.renamed, found.identical) == ("ok", 4, 4)
    renamed["model.language_model.norm.weight"] += 1
    baked = write(tmp_path / "again", renamed, "BF16", CONFIG)
    assert judged(base, baked, one).implementation == "failed"


def test_whole_model_in_another_type(tmp_path):
    base, after, one = models(tmp_path, "F32")
    found = judged(base, save(tmp_path, after, "F16"), one)
    assert (found.implementation, found.converted) == ("ok", {"F32 to F16": 4})
    after["model.norm.weight"] *= 1.002
    spoilt = write(tmp_path / "spoilt", after, "F16", CONFIG)
    assert judged(base, spoilt, one).implementation == "failed"


@pytest.mark.parametrize("stored", ["base-twice", "baked-twice"])
def test_tied_head_once_or_twice(tmp_path, stored):
    given = tensors()
    given["lm_head.weight"] = given["model.embed_tokens.weight"]
    tied = {**CONFIG, "tie_word_embeddings": True}
    once = {name: value for name, value in given.items() if name != "lm_head.weight"}
    first = given if stored == "base-twice" else once
    base = write(tmp_path / "base", first, "BF16", tied)
    one = adapter(torch.bfloat16)
    after = values_of(open_model(base))
    after[f"{MODULE}.weight"] += one.scale * (one.B.double() @ one.A.double()).numpy()
    if stored == "base-twice":
        del after["lm_head.weight"]
    else:
        after["lm_head.weight"] = after["model.embed_tokens.weight"]
    found = judged(base, save(tmp_path, after, tie_word_embeddings=True), one)
    assert found.implementation == "ok", found.findings
    assert [f.kind for f in found.findings] == ["tied"]


def test_adapter_saved_beside(tmp_path):
    base, after, one = models(tmp_path)
    after[f"{MODULE}.lora_A.weight"] = np.zeros((8, 512))
    found = judged(base, save(tmp_path, after), one)
    assert [f.kind for f in found.findings] == ["adapter"]
    assert found.implementation == "failed"


def test_buffers_are_notes(tmp_path):
    base, after, one = models(tmp_path)
    after["model.rotary_emb.inv_freq"] = np.ones(8)
    found = judged(base, save(tmp_path, after), one)
    assert (found.implementation, [f.kind for f in found.findings]) == ("ok", ["buffer"])


def test_stored_transposed(tmp_path):
    base, after, one = models(tmp_path)
    after[f"{MODULE}.weight"] = after[f"{MODULE}.weight"].T.copy()
    found = judged(base, save(tmp_path, after), one)
    assert "is stored transposed" in found.summary[0]
    assert found.implementation == "failed"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"tie_word_embeddings": True}, "loaders drop it"),
        ({"vocab_size": 65}, "64 rows"),
        ({"model_type": "mistral"}, "model_type"),
    ],
)
def test_config_that_contradicts(tmp_path, config, said):
    base, after, one = models(tmp_path)
    found = judged(base, save(tmp_path, after, **config), one)
    assert found.implementation == "failed"
    assert any(said in text for text in found.summary)


def test_harmless_config_changes(tmp_path):
    base, after, one = models(tmp_path)
    baked = save(tmp_path, after, transformers_version="5.0", torch_dtype="bfloat16")
    assert judged(base, baked, one).implementation == "ok"


ROPE = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
SIZED = {
    **CONFIG,
    **ROPE,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "attention_bias": False,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 2048,
}
V5_ROPE = {
    "rope_theta": None,
    "rope_scaling": None,
    "partial_rotary_factor": None,
    "rope_parameters": {
        "rope_type": "linear",
        "factor": 4,
        "rope_theta": 500000,
        "partial_rotary_factor": 0.5,
    },
}


def config_findings(tmp_path: Path, before: dict, after: dict) -> list[Finding]:
    """What two models of these configs differ in; an entry that is None is not there."""
    both = [
        open_model(write(tmp_path / name, tensors(), "BF16", {k: v for k, v in given.items()
                                                              if v is not None}))
        for name, given in (("base", before), ("baked", after))
    ]  # fmt: skip
    return compare_configs(*both, Changes(targets={}))


@pytest.mark.parametrize(
    "changed",
    [
        {"rope_theta": 1e4},
        {"rope_theta": None},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "linear", "factor": 8.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        {"partial_rotary_factor": 0.25},
        {**V5_ROPE, "rope_parameters": {**V5_ROPE["rope_parameters"], "rope_theta": 1e4}},
        {**V5_ROPE, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        {**V5_ROPE, "rope_parameters": None},
        {"attention_bias": True},
        {"logit_scale": 0.5},
        {"final_logit_softcapping": 20.0},
        {"activation_function": "relu"},
        {"layer_norm_epsilon": 1e-3},
        {"num_experts_per_tok": 1},
        {"norm_topk_prob": False},
        {"position_embedding_type": "relative"},
        {"architectures": ["MistralForCausalLM"]},
        {"some_new_entry": 2},
        {"text_config": {"qk_norm": True}},
    ],
    ids=lambda changed: ",".join(f"{k}={v}" for k, v in changed.items())[:60],
)
def test_every_entry_decides_unless_it_is_harmless(tmp_path, changed):
    base = {
        **SIZED,
        "logit_scale": 1.0,
        "final_logit_softcapping": 30.0,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "position_embedding_type": "absolute",
        "some_new_entry": 1,
        "text_config": {"qk_norm": False},
    }
    found = config_findings(tmp_path, base, {**base, **changed})
    assert found and all(f.kind == "config" for f in found)
    assert any(f.fails for f in found), found


@pytest.mark.parametrize(
    "changed",
    [
        {},
        V5_ROPE,
        {"rope_scaling": {"rope_type": "linear", "factor": 4}},
        {"torch_dtype": "float16", "dtype": "bfloat16", "transformers_version": "4.30.0"},
        {"use_cache": False, "eos_token_id": [1, 2], "pad_token_id": 0, "_name_or_path": "x"},
        {"attention_dropout": 0.1, "resid_pdrop": 0.1, "initializer_range": 0.5},
        {"id2label": {"0": "x"}, "auto_map": {"AutoConfig": "x.Y"}, "hidden_dropout_prob": 0.2},
        {"num_key_value_heads": 8, "head_dim": 64, "mlp_bias": False, "pretraining_tp": 1},
        {"attention_bias": None},
    ],
    ids=lambda changed: ",".join(changed)[:60],
)
def test_what_savers_rewrite_is_no_finding(tmp_path, changed):
    more = {"torch_dtype": "bfloat16", "transformers_version": "4.40.0", "use_cache": True}
    base = {**SIZED, **more, "eos_token_id": 2, "attention_dropout": 0.0, "resid_pdrop": 0.0}
    assert config_findings(tmp_path, base, {**base, **changed}) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"qk_norm": True}, "qk_norm True, the base none"),
        ({"hidden_act": None}, "no hidden_act, the base 'silu'"),
        ({"max_position_embeddings": 4096}, "max_position_embeddings 4096"),
        ({"head_dim": 32}, "head_dim 32"),
    ],
)
def test_what_only_one_config_has_is_a_note(tmp_path, changed, said):
    base = {**SIZED, "hidden_act": "silu"}
    (found,) = config_findings(tmp_path, base, {**base, **changed})
    assert not found.fails and said in found.text


def test_gemmas_first_configs(tmp_path):
    base = {**CONFIG, "hidden_act": "gelu", "tie_word_embeddings": False}
    tanh = {**base, "hidden_act": "gelu_pytorch_tanh"}
    assert [f.fails for f in config_findings(tmp_path, base, tanh)] == [True]
    base, tanh = ({**each, "model_type": "gemma"} for each in (base, tanh))
    assert config_findings(tmp_path / "x", base, tanh) == []


def test_rotary_embeddings_of_two_kinds_of_layers(tmp_path):
    flat = {**CONFIG, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0}}  # fmt: skip
    parts = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert config_findings(tmp_path, flat, {**CONFIG, "rope_parameters": parts}) == []
    swapped = dict(zip(parts, reversed(parts.values()), strict=True))
    found = config_findings(tmp_path / "x", flat, {**CONFIG, "rope_parameters": swapped})
    assert any(f.fails for f in found)


def test_a_base_that_went_through_float16(tmp_path):
    """Weights below float16's normal numbers, merged there and cast back."""
    rng = np.random.default_rng(3)
    given = {**tensors(), "model.tiny.weight": 1e-5 * rng.standard_normal((64, 512))}
    given[f"{MODULE}.weight"] *= 1e-3
    base = write(tmp_path / "base", given, "BF16", CONFIG)
    one = adapter(torch.bfloat16, size=5e-6)
    model = open_model(base)
    held = {n: torch.from_numpy(x).half() for n, x in values_of(model).items()}
    held[f"{MODULE}.weight"] += (one.scale * (one.B.float() @ one.A.float())).half()
    after = {name: value.double().numpy() for name, value in held.items()}
    found = judged(base, save(tmp_path, after), one)
    assert found.tensors[f"{MODULE}.weight"].implementation == "ok", found.tensors
    said = {f.name: f for f in found.findings}
    assert found.implementation == "failed" and "model.tiny.weight" in said
    assert all(f.kind == "cast" and "went through float16, which" in f.text for f in said.values())
    after["model.tiny.weight"][3, 4] += 1e-5
    spoilt = write(tmp_path / "spoilt", after, "BF16", CONFIG)
    kinds = {f.name: f.kind for f in judged(base, spoilt, one).findings}
    assert kinds["model.tiny.weight"] == "changed"


def stochastic(T: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """T rounded up or down at random, so that the mean is T."""
    step = ulp(T, dtype)
    noise = torch.rand(T.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return ((T / step + noise).floor() * step).to(dtype)


@pytest.mark.parametrize("size", [2e-4, 2e-3, 2e-2])
@pytest.mark.parametrize("base", ["bf16", "fp16"])
def test_a_faithful_rounding_that_nothing_tells_of(base, size):
    W, one = weight(BASES[base], 512, 1024), adapter(torch.float32, 512, 1024, size=size)
    T = exact(W, [one])
    found = judge(pair(W, stochastic(T, BASES[base]), [one]))
    assert (found.implementation, found.rung) == ("ok", 6)
    assert "neighbour of the right sum" in found.model
    D = T - W.double()
    step = ulp(T, BASES[base])
    cut = ((T.abs() / step).floor() * step * T.sign()).to(BASES[base])
    assert judge(pair(W, cut, [one])).implementation == "failed"
    for factor in (0.0, 0.5, 1.1, 2.0, -1.0):
        for rounded in (nearest, stochastic):
            spoilt = rounded(W.double() + factor * D, BASES[base])
            assert judge(pair(W, spoilt, [one])).implementation == "failed", (factor, rounded)
    if size > 2e-3:
        for rounded in (nearest, stochastic):
            spoilt = rounded(W.double() + 1.001 * D, BASES[base])
            assert judge(pair(W, spoilt, [one])).implementation == "failed", rounded
    spoilt = stochastic(T, BASES[base])
    spoilt[3, :40] += 4 * step[3, :40].to(BASES[base])
    assert judge(pair(W, spoilt, [one])).implementation == "failed"


def given_values(name: str, values: np.ndarray, shape: tuple[int, int], **more: object) -> Values:
    ref = merges.ref(torch.from_numpy(values).float(), name)
    return Values(name, "BF16", shape, Extra(name, "F32", ref.shape, (ref,), (1.0,)), **more)


def test_values_are_the_adapters_rounded_once(tmp_path):
    base, after, one = models(tmp_path)
    name = "lm_head.weight"
    head = np.random.default_rng(4).standard_normal((64, 512)).astype(np.float32).astype(float)
    made = replace(
        changes(open_model(base), one), values={name: given_values(name, head, (64, 512))}
    )
    after[name] = head
    found = judged(base, save(tmp_path, after), one, made)
    assert (found.implementation, found.values) == ("ok", (name,))
    after[name] = head.copy()
    after[name][5] *= 1.01
    found = judged(base, write(tmp_path / "wrong", after, "BF16", CONFIG), one, made)
    assert found.implementation == "failed" and "512 of 32768" in found.summary[0]


def test_averaged_values_are_rounded_once(tmp_path):
    """Their mean is above the middle between two values, and in float32 the middle itself."""
    base, after, one = models(tmp_path)
    name = "lm_head.weight"
    middle = np.full((64, 512), 1 + 2.0**-8)
    refs = tuple(
        merges.ref(torch.from_numpy(values).float(), name) for values in (middle, middle + 2.0**-23)
    )
    extra = Extra(name, "F32", (64, 512), refs, (1.0, 1.0))
    values = {name: Values(name, "BF16", (64, 512), extra)}
    made = replace(changes(open_model(base), one), values=values)
    after[name] = np.full((64, 512), 1 + 2.0**-7)
    assert judged(base, save(tmp_path, after), one, made).implementation == "ok"


def test_token_rows_leave_the_others(tmp_path):
    base, after, one = models(tmp_path)
    model = open_model(base)
    name = "model.embed_tokens.weight"
    rows = np.random.default_rng(4).standard_normal((2, 512)).astype(np.float32).astype(float)
    given = given_values(name, rows, (64, 512), rows=(7, 3), ref=model.tensors[name])
    made = replace(changes(model, one), values={name: given})
    after[name][[7, 3]] = rows
    assert judged(base, save(tmp_path, after), one, made).implementation == "ok"
    after[name][[3, 7]] = rows
    swapped = write(tmp_path / "swapped", after, "BF16", CONFIG)
    assert judged(base, swapped, one, made).implementation == "failed"


def test_quantised_result_is_refused_by_name(tmp_path):
    base, after, one = models(tmp_path)
    codes = np.zeros((256, 512), np.uint8)
    file = tmp_path / "packed.safetensors"
    file.write_bytes(encode({**after, f"{MODULE}.weight": codes}, "BF16"))
    with pytest.raises(UnsupportedError, match="is U8: merges are judged in"):
        judged(base, file, one)


def test_partial_modules_are_counted(tmp_path):
    rng = np.random.default_rng(1)
    names = [f"model.layers.{k}.q_proj.weight" for k in range(6)]
    base = write(
        tmp_path / "base", {n: 0.02 * rng.standard_normal((64, 512)) for n in names}, "BF16"
    )
    model = open_model(base)
    one = adapter(torch.float32, 64, 512)
    site = merges.site(merges.ref(one.B, "B"), merges.ref(one.A, "A"), one.scale)
    term = Term(0, one.scale, site, slice(0, 64, 1), slice(0, 512, 1))
    made = Changes({n: Target(n, model.tensors[n], (64, 512), (term,)) for n in names})
    after = values_of(model)
    for name in names[2:]:
        after[name] += one.scale * (one.B.double() @ one.A.double()).numpy()
    found = judged(base, write(tmp_path / "baked", after, "BF16"), one, made)
    assert found.summary[0].startswith(f"2 of 6 tensors ({names[0]}, {names[1]}): not applied")
    assert list(found.tensors)[:2] == names[:2]
