"""What diff says two adapters are to each other: each verdict beside its near miss; real pairs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterops as ao
from adapterops.errors import IncompatibleError, UnsupportedError
from tests.support import pairs, write_peft
from tests.trained import (
    ANY,
    BASE,
    COARSE,
    HALF,
    SHAPES,
    STEM,
    bfloat16,
    cast,
    compare,
    mapped,
    mixed,
    nudged,
    refactored,
    rotated,
    trained,
    turned,
)

# A, B, alpha of B (rank 8, so that 8 is scale 1), kind, words
VERDICTS: dict[str, tuple[Any, Any, float, str, str]] = {
    "equal": (BASE, BASE, 8, "identical", "identical bytes"),
    "equal bytes, another alpha": (BASE, BASE, 16, "scaled", "scaled by 2"),
    "one number of one factor": (BASE, nudged(BASE, STEM, 1e-3), 8, "one-run", "two times"),
    "another type": (COARSE, HALF, 8, "same-factors", "float16 and float32"),
    "another type, a number moved": (COARSE, nudged(HALF, STEM, 1e-3), 8, "one-run", ""),
    "scale in the factors": (
        BASE,
        mapped(BASE, lambda B, A: (B * 4, A / 2)),
        4,
        "same-factors",
        "the scale split otherwise",
    ),
    "B doubled, scale not": (
        BASE,
        mapped(BASE, lambda B, A: (B * 2, A)),
        8,
        "scaled",
        "by 2",
    ),
    "rounded": (BASE, COARSE, 8, "rounded", "B is A rounded to float16"),
    "rounded, the other way": (COARSE, BASE, 8, "rounded", "A is B rounded to float16"),
    "rounded from float64": (ANY, BASE, 8, "same-factors", "float64 and float32"),
    "truncated instead": (
        BASE,
        mapped(
            BASE,
            lambda B, A: tuple(
                (x.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float16) for x in (B, A)
            ),
        ),
        8,
        "same-factors",
        "to within the rounding of their storage",
    ),
    "rounded, then one module moved": (BASE, nudged(COARSE, STEM, 0.05), 8, "one-run", ""),
    "gauge 1e6 in float64": (ANY, turned(BASE, np.float64), 8, "same-delta", "another gauge"),
    "gauge 1e6 in float32": (BASE, turned(BASE, np.float32), 8, "same-delta", "another gauge"),
    "gauge 1e6 in float64, a module moved": (
        ANY,
        turned(nudged(ANY, "layers.1.v", 1e-6), np.float64),
        8,
        "one-run",
        "",
    ),
    "by its SVD in float16": (COARSE, refactored(COARSE, np.float16), 8, "same-delta", "gauge"),
    "rotated thirty times in float32": (BASE, rotated(BASE, 30), 8, "same-delta", "gauge"),
    "by its SVD, a module moved": (
        COARSE,
        refactored(nudged(cast(COARSE, np.float32), STEM, 0.02), np.float16),
        8,
        "one-run",
        "",
    ),
    "scaled by -0.3": (BASE, refactored(BASE, np.float32), -2.4, "scaled", "scaled by -0.3"),
    "scaled by 0.001": (COARSE, refactored(COARSE, np.float16), 0.008, "scaled", "by 0.001"),
    "scaled, a module otherwise": (
        BASE,
        {**BASE, STEM: (BASE[STEM][0] * np.float32(1.25), BASE[STEM][1])},
        16,
        "scaled-parts",
        "from 2 to 2.5",
    ),
    "scaled, a module moved": (BASE, nudged(BASE, STEM, 0.01), 16, "one-run", ""),
    "parts left out": (
        BASE,
        {name: BASE[name] for name in list(BASE)[:4]},
        8,
        "scaled-parts",
        "from 0 to 1",
    ),
    "later in one run": (BASE, mixed(BASE, trained(2, 50), 0.35), 8, "one-run", "continued"),
    "the same start, hardly alike": (
        BASE,
        mixed(BASE, trained(2, 50), 0.25),
        8,
        "shared-start",
        "shared initialisation, different training",
    ),
    "the same start, unrelated": (BASE, trained(2, 50), 8, "shared-start", "different training"),
    "later in one run, refactored": (
        BASE,
        refactored(mixed(BASE, trained(2, 50), 0.8), np.float32),
        8,
        "one-run",
        "continued",
    ),
    "another start, another task": (BASE, trained(2, 51), 8, "unrelated", "unrelated"),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdict(tmp_path: Path, case: str) -> None:
    a, b, alpha, kind, words = VERDICTS[case]
    write_peft(tmp_path / "a", a)
    if alpha < 0:  # a sign that alpha cannot carry
        b, alpha = mapped(b, lambda B, A: (-B, A)), -alpha
    write_peft(tmp_path / "b", b, alpha=alpha)
    found = compare(tmp_path / "a", tmp_path / "b").verdict
    assert (found.kind, words in found.text) == (kind, True), found
    assert all(math.isfinite(figure.value) for figure in found.evidence.values())
    for name in ("distance", "residual"):
        figure = found.evidence.get(name)
        assert figure is None or figure.threshold is None or figure.value <= figure.threshold


def test_rounded_to_bfloat16(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    write_peft(tmp_path / "a", BASE)
    for name, rounded in (("b", BASE), ("c", mapped(BASE, lambda B, A: (B, A * np.float32(1.01))))):
        write_peft(tmp_path / name, rounded)
        tensors = {}
        for stem, (B, A) in rounded.items():
            prefix = f"base_model.model.{stem}"
            tensors[f"{prefix}.lora_B.weight"] = torch.from_numpy(bfloat16(B)).bfloat16()
            tensors[f"{prefix}.lora_A.weight"] = torch.from_numpy(bfloat16(A)).bfloat16()
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
    found = compare(tmp_path / "a", tmp_path / "b").verdict
    assert (found.kind, found.text) == ("rounded", "the same values: B is A rounded to bfloat16")
    assert compare(tmp_path / "a", tmp_path / "c").verdict.text == "B is A scaled by 1.01"


def test_what_a_narrow_type_cannot_hold_is_no_rounding_of_it(tmp_path: Path) -> None:
    """Numbers beyond float16 would round to infinity; looking whether they do must not warn."""
    large = mapped(BASE, lambda B, A: (B * np.float32(1e6), A * np.float32(1e-6)))
    write_peft(tmp_path / "a", large)
    write_peft(tmp_path / "b", cast(BASE, np.float16))
    assert compare(tmp_path / "a", tmp_path / "b").verdict.kind == "same-delta"


def test_rounding_noise_is_what_storage_does(tmp_path: Path) -> None:
    """The error that a verdict allows three times of is measured here, in every type and gauge."""
    for dtype in (np.float16, np.float32):
        for name, exact in (("plain", ANY), ("turned", turned(BASE, np.float64))):
            if (name, dtype) == ("turned", np.float16):
                continue  # beyond what float16 can hold
            write_peft(tmp_path / "exact", exact)
            write_peft(tmp_path / "stored", cast(exact, dtype))
            found = compare(tmp_path / "exact", tmp_path / "stored")
            if dtype is np.float32 and name == "plain":
                assert found.distance == 0.0
                continue
            assert 0.7 < found.distance / found.noise[1] < 1.3
    tiny = mapped(ANY, lambda B, A: (B * 1e-6, A))  # below float16's normal range
    write_peft(tmp_path / "exact", tiny)
    write_peft(tmp_path / "stored", cast(tiny, np.float16))
    found = compare(tmp_path / "exact", tmp_path / "stored")
    assert 0.7 < found.distance / found.noise[1] < 1.3
    assert found.verdict.kind == "rounded"


def test_alike_without_a_common_start(tmp_path: Path) -> None:
    """One strong direction in common, everything else noise: what runs on one task learn."""
    strong = {name: (B[:, :1], A[:1]) for name, (B, A) in pairs(7, SHAPES, 1).items()}
    for name, seed in (("a", 60), ("b", 61)):
        noise = trained(seed, start=seed)
        write_peft(
            tmp_path / name,
            {
                stem: (
                    np.hstack([4 * strong[stem][0], 0.5 * noise[stem][0]]),
                    np.vstack([strong[stem][1], noise[stem][1]]),
                )
                for stem in SHAPES
            },
        )
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.cosine > 0.5 and found.verdict.kind == "alike"
    assert found.verdict.evidence["shared_rows"].value < 0.5
    opposed = compare(tmp_path / "a", -1.0 * ao.open_adapter(tmp_path / "b"))
    assert opposed.verdict.text.startswith("opposed")


def test_zero_is_similar_to_nothing(tmp_path: Path) -> None:
    zero = mapped(BASE, lambda B, A: (0 * B, A))
    write_peft(tmp_path / "a", BASE)
    write_peft(tmp_path / "zero", zero)
    write_peft(tmp_path / "other", mapped(trained(2, 51), lambda B, A: (0 * B, A)), alpha=4)
    for first, second, text in (
        ("a", "zero", "B is zero"),
        ("zero", "a", "A is zero"),
        ("zero", "other", "both are zero"),
    ):
        found = compare(tmp_path / first, tmp_path / second)
        assert found.verdict.kind == "zero" and found.verdict.text.startswith(text)
        assert found.cosine == 0.0 and all(any(m.zero) for m in found.modules.values())
    assert compare(tmp_path / "zero", tmp_path / "a").relative is None
    assert compare(tmp_path / "a", tmp_path / "zero").relative == 1.0
    report = ao.diff([tmp_path / name for name in ("a", "zero", "other")])
    json.dumps(dataclasses.asdict(report), allow_nan=False)
    assert [item.zero for item in report.inputs] == [False, True, True]
    assert report.cosine[1] == (0.0, 0.0, 0.0) and report.cosine[0][0] == 1.0
    assert report.distance[1] == (None, None, None) and report.distance[0][1] == 1.0
    half = {name: (B * (index < 3), A) for index, (name, (B, A)) in enumerate(BASE.items())}
    write_peft(tmp_path / "half", half)
    # An adapter that cancels inside itself is zero too, whatever rounding leaves of it.
    doubled = mapped(BASE, lambda B, A: (np.hstack([B, B, -2 * B]), np.vstack([A, A, A])))
    write_peft(tmp_path / "doubled", doubled)
    found = compare(tmp_path / "doubled", tmp_path / "a")
    assert found.verdict.text.startswith("A is zero") and found.cosine == 0.0
    assert all(m.zero == (True, False) and m.cosine == 0.0 for m in found.modules.values())
    report = ao.diff([tmp_path / name for name in ("a", "doubled", "half")])
    assert report.inputs[1].zero and report.distance[1] == (None, None, None)
    # One whose half is zero is not.
    assert compare(tmp_path / "a", tmp_path / "half").verdict.kind == "scaled-parts"


# Real adapters

RUNS = {
    "AguLeon__LoRA_RoBERTa_AGNews": [f"checkpoint-{n}" for n in (500, 1000, 1200)],
    "paulohenriquecrs__RoBERTa_SEQ_CLS_LoRA_Portuguese": [
        f"checkpoint-{n}" for n in (500, 2000, 5000, 8500, 8610)
    ],
    "wyek1n__MLX-CLI": ["0000100", "0000200"],
}


@pytest.mark.parametrize("folder", RUNS)
def test_checkpoints_of_one_run(corpus: Path, folder: str) -> None:
    for a, b in itertools.combinations([corpus / folder / name for name in RUNS[folder]], 2):
        for one, other in ((a, b), (b, a)):
            found = compare(one, other)
            assert found.verdict.kind == "one-run" and found.cosine > 0.5
            assert found.verdict.evidence["shared_rows"].value > 0.85
            assert "which is older the files do not say" in found.verdict.caveat
        assert compare(a, a).verdict.kind == "identical"


def test_owners_on_one_base_are_unrelated(corpus: Path) -> None:
    (one, mine), (other, yours) = list(RUNS.items())[:2]
    for a, b in itertools.product(mine, yours):
        found = compare(corpus / one / a, corpus / other / b)
        assert found.verdict.kind == "unrelated" and abs(found.cosine) < 0.1
        assert found.verdict.evidence["shared_rows"].value < 0.05
        assert len(found.only_a) == 12 and not found.only_b
    report = ao.diff([*(corpus / one / x for x in mine), *(corpus / other / x for x in yours)])
    cosine = np.array(report.cosine)
    assert cosine[:3, 3:].max() < 0.1 and cosine[:3, :3].min() > 0.9 and cosine[3:, 3:].min() > 0.5


def test_two_files_of_one_folder_are_different_adapters(corpus: Path) -> None:
    folder = corpus / "catundchat__stable-diffusion-v1.5-lora"
    files = [folder / f"pytorch_lora_weights.{suffix}" for suffix in ("bin", "safetensors")]
    found = compare(*files, allow_pickle=True)
    assert found.verdict.kind == "unrelated" and abs(found.cosine) < 0.005


def test_bases_that_share_nothing_are_refused(corpus: Path) -> None:
    with pytest.raises((IncompatibleError, UnsupportedError)):
        ao.diff(
            [
                corpus / "wyek1n__MLX-CLI" / "0000100",
                corpus / "AguLeon__LoRA_RoBERTa_AGNews" / "checkpoint-500",
            ]
        )
