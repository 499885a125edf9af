"""What baked weights predict, beside the adapter on the fly and PEFT's own merge, on SmolLM2-135M.

`python benchmarks/bake_quality.py [--quick] [--dtype bfloat16] [--mix code]`. The model is saved
once in bfloat16 and once in float16; the example adapters are merged into each by `bake` with three
roundings and by PEFT's `merge_and_unload`, and what was written is read back by transformers.

The reference is PEFT with the adapters unmerged, in float32, on the same 16-bit weights. Everything
else is run in float32 too, so that only the rounding of the weights differs; one mix also in
bfloat16, where the arithmetic of that type comes on top (float16 takes a CPU nine times as long).
KL is the mean of KL(reference ‖ other) over positions of held-out text, in nats; losses are nats
per token, of the same tokens throughout; *kept* is the share of the reference's improvement over
the base, its ± one standard error over tokens. Gain and subspace error are recomputed here from
the files, and must be those of `bake`'s report.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from harness import Row

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import torch  # noqa: E402
import train_adapters as training  # noqa: E402
from peft import PeftModel  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from smollm2 import load_tokenizer, quiet_peft, save_checkpoint  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.utils import logging  # noqa: E402
from verify_on_model import weighted_sum  # noqa: E402

from adapterops.verbs.bake import bake  # noqa: E402

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDINGS = ("exact", "nearest", "compensated")
PEFT_MERGES = {"PEFT": False, "PEFT safe_merge": True}

Figures = dict[str, float]


@dataclass(frozen=True)
class Mix:
    """Adapters with weights, and the domains of the text that they are judged on.

    `more` multiplies the number of blocks: a small change needs more text to be told from none.
    `in_dtype`: run in bfloat16 as well.
    """

    name: str
    weights: dict[str, float]
    domains: tuple[str, ...]
    more: int = 1
    in_dtype: bool = False

    @property
    def folders(self) -> list[Path]:
        """The adapters' directories."""
        return [EXAMPLES / "adapters" / name for name in self.weights]


SMALL = Mix("code x 0.08", {"code-seed0": 0.08}, ("code",), more=2, in_dtype=True)
MIXES = (
    SMALL,
    Mix("docs x 0.068", {"docs-seed0": 0.068}, ("docs",), more=2),  # δ/W as of the first
    Mix("code", {"code-seed0": 1.0}, ("code",)),
    Mix("docs", {"docs-seed0": 1.0}, ("docs",)),
    Mix("both x 0.5", {"code-seed0": 0.5, "docs-seed0": 0.5}, ("code", "docs")),
    Mix("both", {"code-seed0": 1.0, "docs-seed0": 1.0}, ("code", "docs")),
)
QUICK = (SMALL, MIXES[2])


@dataclass(frozen=True)
class Predicted:
    """Of every position: the loss of the next token, KL, and whether the first choice is equal."""

    losses: torch.Tensor
    kl: torch.Tensor
    same: torch.Tensor


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A checkpoint as transformers reads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def unmerged(folder: Path, mix: Mix, dtype: torch.dtype = torch.float32) -> Any:
    """The base with the adapters of a mix beside it, all active."""
    first, *others = mix.weights
    with quiet_peft():
        paths = {name: str(path) for name, path in zip(mix.weights, mix.folders, strict=True)}
        model = PeftModel.from_pretrained(load(folder, dtype), paths[first], adapter_name=first)
        for name in others:
            model.load_adapter(paths[name], adapter_name=name)
        model.base_model.set_adapter(list(mix.weights))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name, weight in mix.weights.items():
                layer.set_scale(name, weight)
    return model.eval()


def merge_by_peft(folder: Path, mix: Mix, dtype: torch.dtype, safe: bool, out: Path) -> None:
    """Write PEFT's own merge of a model that was loaded in the weights' type."""
    model = unmerged(folder, mix, dtype)
    model.merge_and_unload(safe_merge=safe, adapter_names=list(mix.weights)).save_pretrained(out)


def logits(model: Any, blocks: torch.Tensor) -> Iterator[torch.Tensor]:
    """(tokens, vocabulary) of one block after the other."""
    with torch.inference_mode():
        for block in blocks:
            yield model(input_ids=block[None]).logits[0].float()


def losses_of(logits: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Loss of every token but the first, in nats."""
    return -logits[:-1].double().log_softmax(-1).gather(1, block[1:, None])[:, 0]


def predict(model: Any, blocks: torch.Tensor, reference: list[torch.Tensor]) -> Predicted:
    """What a model says about the blocks, against the reference's logits."""
    losses, kl, same = [], [], []
    for block, expected, found in zip(blocks, reference, logits(model, blocks), strict=True):
        p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
        losses.append(-q[:-1].gather(1, block[1:, None])[:, 0])
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append((expected.argmax(-1) == found.argmax(-1)).double())
    return Predicted(torch.cat(losses), torch.cat(kl), torch.cat(same))


def weight_figures(before: Path, after: Path, mix: Mix) -> Figures:
    """Gain, subspace error and relative error of the change that a merge holds, in float64."""
    W, merged = (load_file(folder / "model.safetensors") for folder in (before, after))
    deltas = weighted_sum(mix.folders, list(mix.weights.values()))
    factors = [load_file(folder / "adapter_model.safetensors") for folder in mix.folders]
    sums = torch.zeros(5, dtype=torch.float64)
    for module, D in deltas.items():
        old = W[f"{module}.weight"].double()
        moved = merged[f"{module}.weight"].double() - old
        read = torch.cat([each[f"base_model.model.{module}.lora_A.weight"] for each in factors])
        inside = (moved - D) @ torch.linalg.qr(read.double().T)[0]
        terms = D * D, moved * D, inside * inside, (moved - D) ** 2, old * old
        sums += torch.stack([term.sum() for term in terms])
    size, realised, seen, error, weights = sums.tolist()
    return {
        "gain": realised / size,
        "subspace": math.sqrt(seen / size),
        "error": math.sqrt(error / size),
        "δ/W": math.sqrt(size / weights),
    }


def differing_codes(one: Path, other: Path) -> int:
    """Elements that two merges hold differently."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return sum(int((first[name] != second[name]).sum()) for name in first)


def merges(
    base: Path, mix: Mix, dtype: torch.dtype, work: Path
) -> Iterator[tuple[str, Path, Figures]]:
    """Every merge of a mix, with what became of the change; the first stays, others for a turn."""
    for way in (*ROUNDINGS, *PEFT_MERGES):
        out = work / f"{mix.name} {way}"
        if way in PEFT_MERGES:
            merge_by_peft(base, mix, dtype, PEFT_MERGES[way], out)
            found = weight_figures(base, out, mix)
        else:
            report = bake(base, mix.folders, list(mix.weights.values()), out=out, round=way)  # type: ignore[arg-type]
            found = weight_figures(base, out, mix)
            said = {"gain": report.total.gain, "subspace": report.total.subspace_error}  # type: ignore[union-attr]
            if any(not math.isclose(said[key] or 0.0, found[key], rel_tol=1e-3) for key in said):
                raise RuntimeError(f"{out.name}: reported {said}, is {found}")
        yield way, out, found
        if way != ROUNDINGS[0]:
            shutil.rmtree(out)  # 270 MB each


def measure(
    base: Path, dtype: str, mix: Mix, texts: dict[str, torch.Tensor], blocks: int, work: Path
) -> Iterator[Row]:
    """A row for the base and for every merge of a mix."""
    kind = DTYPES[dtype]
    in_dtype = mix.in_dtype and kind == torch.bfloat16
    count = blocks * mix.more // len(mix.domains)
    tokens = torch.cat([training.spread(texts[domain], count) for domain in mix.domains])
    reference = list(logits(unmerged(base, mix), tokens))
    whole = torch.cat([losses_of(*pair) for pair in zip(reference, tokens, strict=True)])
    alone = predict(load(base), tokens, reference)
    improvement = alone.losses.mean() - whole.mean()
    about = f"{mix.name}, on held-out {' and '.join(mix.domains)}, {tokens.numel()} tokens"

    def row(way: str, found: Predicted, more: Figures, errors: Figures) -> Row:
        spread = (found.losses - whole).std() / math.sqrt(len(whole)) / improvement
        figures = {
            "KL": float(found.kl.mean()),
            "top-1": float(found.same.mean()),
            "loss": float(found.losses.mean()),
            "kept": float((alone.losses.mean() - found.losses.mean()) / improvement),
            "kept ±": float(spread),
            **more,
        }
        print(f"{dtype}, {mix.name}, {way}: {figures}, {errors}", file=sys.stderr, flush=True)
        return Row(
            f"bake quality: {dtype}, {mix.name}, {way}", about, figures=figures, errors=errors
        )

    yield row("base", alone, {"loss of the reference": float(whole.mean())}, {})
    if in_dtype:
        found = predict(unmerged(base, mix, kind), tokens, reference)
        yield row(f"unmerged, run in {dtype}", found, {}, {})
    exact = work / f"{mix.name} {ROUNDINGS[0]}"
    for way, out, size in merges(base, mix, kind, work):
        found = predict(load(out), tokens, reference)
        more = {key: size.pop(key) for key in ("gain", "δ/W")}
        yield row(way, found, {**more, "unlike exact": differing_codes(exact, out)}, size)
        if in_dtype and way in ROUNDINGS:
            yield row(f"{way}, run in {dtype}", predict(load(out, kind), tokens, reference), {}, {})
    shutil.rmtree(exact)


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| type | adapters | δ/W | merged by | KL | top-1 | loss | improvement kept "
        "| gain | subspace error | codes unlike `exact` |",
        "|---|---|---:|---|" + "---:|" * 7,
    ]
    for row in rows:
        dtype, mix, way = row.name.removeprefix("bake quality: ").split(", ", 2)
        figures = {key: float(value) for key, value in row.figures.items()}
        known = "gain" in figures
        cells = [
            dtype,
            mix,
            f"{figures['δ/W']:.2g}" if known else "",
            way,
            f"{figures['KL']:.2g}",
            f"{figures['top-1']:.2%}",
            f"{figures['loss']:.4f}",
            f"{figures['kept']:.1%} ± {figures['kept ±']:.1%}",
            f"{figures['gain']:.4f}" if known else "",
            f"{row.errors['subspace']:.2g}" if known else "",
            f"{figures['unlike exact']:,.0f}" if known else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="bfloat16, two mixes, 256 tokens")
    parser.add_argument("--dtype", choices=DTYPES, help="only this one")
    parser.add_argument("--mix", action="append", choices=[mix.name for mix in MIXES])
    parser.add_argument("--blocks", type=int, default=6, help="held-out blocks of 128 tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--date", help="date in the results file's name; default today")
    # Not among the timings, of which the README shows the newest file.
    parser.add_argument("--results", type=Path, default=harness.RESULTS / "bake_quality")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    blocks = 2 if options.quick else options.blocks
    dtypes = [options.dtype] if options.dtype else list(DTYPES)[: 1 if options.quick else None]
    tokenizer = load_tokenizer()
    texts = {domain: training.load_domain(domain, tokenizer)[1] for domain in training.DOMAINS}
    chosen = [mix for mix in MIXES if mix.name in options.mix] if options.mix else MIXES
    mixes = QUICK if options.quick else chosen
    rows: list[Row] = []
    for dtype in dtypes:
        with tempfile.TemporaryDirectory() as work:
            base = Path(work) / "base"
            save_checkpoint(base, DTYPES[dtype])
            for mix in mixes:
                rows += measure(base, dtype, mix, texts, blocks, Path(work))
    harness.save(rows, options.results, day=options.date)
    print(table(rows))


if __name__ == "__main__":
    main()
