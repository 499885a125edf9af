"""A baked SmolLM2-135M: its tensors, what it predicts, and the verdicts on merges of it.

A bfloat16 checkpoint of the model, the example adapters, transformers and PEFT as users have them.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from adapterops import casts
from adapterops.verbs.bake import bake
from adapterops.verbs.drift import drift
from tests import changes, merges

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
peft = pytest.importorskip("peft")

EXAMPLES = Path(__file__).parent.parent / "examples"
ADAPTER, OTHER = (EXAMPLES / "adapters" / name for name in ("code-seed0", "docs-seed0"))
MODULES = 60
LOST = "model.layers.7.mlp.down_proj.weight"

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and torch's own


@pytest.fixture(scope="module")
def examples():
    """The example script's own functions."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import verify_on_model
    finally:
        sys.path.remove(str(EXAMPLES))
    return verify_on_model


@pytest.fixture(scope="module")
def base(smollm2):
    """The model as an ordinary bfloat16 checkpoint."""
    return smollm2


@pytest.fixture(scope="module")
def baked(tmp_path_factory, base):
    """An adapter baked into it, and the report."""
    out = tmp_path_factory.mktemp("smollm2") / "baked"
    return SimpleNamespace(folder=out, report=bake(base, ADAPTER, out=out))


def load(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def tensors(folder):
    return load_file(folder / "model.safetensors")


def unmerged(base, adapter, dtype=torch.float32):
    """The adapter on the fly, as PEFT serves it."""
    return peft.PeftModel.from_pretrained(load(base, dtype), str(adapter)).eval()


def test_every_change_is_rounded_once(base, baked):
    before, after = tensors(base), tensors(baked.folder)
    adapter = merges.read_adapter(ADAPTER)
    assert len(adapter) == MODULES
    decided = 0
    for module, (B, A, scale) in adapter.items():
        W, found = (each[f"{module}.weight"].double().numpy() for each in (before, after))
        sums = W + scale * (B.double().numpy() @ A.double().numpy())
        low, nearest, high = (
            casts.round_to(sums * factor, "BF16") for factor in (1 - 2**-45, 1.0, 1 + 2**-45)
        )
        doubtful = (low != high) | (found != nearest)
        np.testing.assert_array_equal(found[~doubtful], nearest[~doubtful])
        for row, column in np.argwhere(doubtful):
            rows, columns = slice(row, row + 1), slice(column, column + 1)
            pair = (scale, B[rows].numpy(), A[:, columns].numpy())
            stored = before[f"{module}.weight"][rows, columns]
            whole, unit = changes.exact_sums(stored, [pair])
            assert found[row, column] == changes.rounded(whole, unit, "BF16").item()
        decided += int(doubtful.sum())
    assert 0 < decided < 1000  # ties there are: the factors are 16-bit numbers too


def test_all_else_is_as_it_was(base, baked):
    before, after = tensors(base), tensors(baked.folder)
    assert list(before) == list(after)
    assert {name: (x.dtype, x.shape) for name, x in before.items()} == {
        name: (x.dtype, x.shape) for name, x in after.items()
    }
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{module}.weight" for module in merges.read_adapter(ADAPTER)}
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (base / name).read_bytes() == (baked.folder / name).read_bytes()


def test_predicts_what_the_adapter_on_the_fly_does(base, baked, examples):
    tokenizer = transformers.AutoTokenizer.from_pretrained(baked.folder)

    def logits(model):
        return examples.logits_of(model, tokenizer)

    wanted = logits(unmerged(base, ADAPTER))
    alone = examples.compare_logits(logits(load(base)), wanted)
    found = examples.compare_logits(logits(load(baked.folder)), wanted)
    total = baked.report.total
    assert 0.05 < total.error < 0.1
    # KL grows with the square of a change: what rounding leaves of it is ‖E‖/‖D‖ of the change at
    # most, for D lies where the model's inputs are and E does not.
    assert found["mean_kl"] < total.error**2 * alone["mean_kl"] / 10
    assert found["mean_kl"] > 0  # it was rounded
    assert found["top1_agreement"] > 0.98 > alone["top1_agreement"]


@pytest.fixture(scope="module")
def by_peft(tmp_path_factory, base):
    """PEFT's merge of the same, as its users save it."""
    out = tmp_path_factory.mktemp("smollm2") / "peft"
    unmerged(base, ADAPTER, torch.bfloat16).merge_and_unload().save_pretrained(out)
    return out


def test_pefts_merge_is_right(base, by_peft, baked):
    report = drift(base, ADAPTER, by_peft)
    assert (report.implementation, report.representation, report.exit_code) == ("ok", "ok", 0)
    assert report.rung == 1 and report.detectable < 1e-3
    assert len(report.tensors) == MODULES and not report.findings
    assert report.total.gain == pytest.approx(baked.report.total.gain, abs=1e-5)
    assert report.total.subspace_error == pytest.approx(baked.report.total.subspace_error, rel=1e-2)


def test_own_merge_is_exact(base, baked):
    report = drift(base, ADAPTER, baked.folder)
    assert (report.implementation, report.rung) == ("ok", 0)


FEW = (".layers.9.", ".layers.17.", ".layers.25.")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Three layers of both adapters: causes are sought in every tensor that is wrong."""
    folders = []
    for adapter in (ADAPTER, OTHER):
        folders.append(tmp_path_factory.mktemp("few") / adapter.name)
        shutil.copytree(adapter, folders[-1])
        file = folders[-1] / "adapter_model.safetensors"
        kept = {n: x for n, x in load_file(file).items() if any(layer in n for layer in FEW)}
        save_file(kept, file, {"format": "pt"})
    return folders


# tensors that are wrong, kind of the cause, what the summary says
DIAGNOSES = {
    "not_applied": (1, "not-applied", "not applied"),
    "wrong_scale": (6, "wrong-scale", "alpha/√r, 5.657, in place of alpha/r, 2"),
    "transposed": (1, "transposed", "transpose"),
    "sign": (1, "sign", "subtracted"),
    "partial": (1, "partial-rank", "4 of the change's 8 directions"),
    "twice": (6, "twice", "merged twice"),
    "other": (6, "another-adapter", "another change"),
}


@pytest.mark.parametrize("defect", DIAGNOSES)
def test_broken_merges_are_judged_wrong(base, few, tmp_path, defect):
    adapter, other = few
    broken = merges.broken_checkpoint(defect, base, adapter, tmp_path / "broken", other=other)
    report = drift(base, adapter, broken)
    shutil.rmtree(broken)
    count, kind, said = DIAGNOSES[defect]
    wrong = [t for t in report.tensors.values() if t.implementation == "failed"]
    assert (report.implementation, report.exit_code) == ("failed", 5)
    assert len(report.tensors) == 6 and len(wrong) == count
    kinds = Counter(t.cause.kind for t in wrong)
    assert kinds.most_common(1)[0][0] == kind
    # Adapters trained from one seed are alike in some modules, which nothing then explains.
    assert len(kinds) == 1 or defect == "other"
    assert all(t.cause.certain for t in wrong) == (defect != "other")
    assert said in report.summary[0]
    assert not report.findings


def without_a_tensor(base, adapter, out):
    """A right merge that lost a tensor which no adapter changes."""
    return merges.merge_checkpoint(base, [adapter], out, change=lambda state: state.pop(LOST))


def with_a_zeroed_norm(base, adapter, out):
    """A right merge with a norm of zeros."""
    return merges.broken_checkpoint("zeroed_norm", base, adapter, out)


@pytest.mark.parametrize(
    ("spoil", "name", "kind"),
    [(with_a_zeroed_norm, "model.norm.weight", "zeroed"), (without_a_tensor, LOST, "lost")],
    ids=["zeroed norm", "lost tensor"],
)
def test_what_no_adapter_changes_is_judged_too(base, few, tmp_path, spoil, name, kind):
    broken = spoil(base, few[0], tmp_path / "broken")
    report = drift(base, few[0], broken)
    shutil.rmtree(broken)
    assert (report.implementation, report.exit_code) == ("failed", 5)
    assert [(f.name, f.kind) for f in report.findings if f.fails] == [(name, kind)]
    assert {t.implementation for t in report.tensors.values()} == {"ok"}
    assert name in report.summary[0]
