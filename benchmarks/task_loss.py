"""Task loss of an example adapter against the error it was compressed to.

`python benchmarks/task_loss.py [--adapter docs-seed0] [--domain docs] [--blocks 16]`. An adapter of
SmolLM2-135M is cut to five ranks, once by the size of what goes (`--metric frobenius`) and once by
what the model's inputs make of it (`--metric activation`, second moments of 4,096 tokens of
training text), so that both have the same size. Each is loaded by PEFT and read on held-out text;
the base model and the whole adapter are the ends. Losses are nats per token, of the same tokens
throughout.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
from harness import Row

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import collect_activations as collecting  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import train_adapters as training  # noqa: E402
from peft import PeftModel  # noqa: E402
from smollm2 import HUB_NAME, load_model, load_tokenizer, quiet_peft  # noqa: E402

import adapterops as ao  # noqa: E402
from adapterops import metric  # noqa: E402
from adapterops.activations import for_modules, open_activations  # noqa: E402

RANKS = (6, 4, 3, 2, 1)
METRICS = ("frobenius", "activation")
TOKENS = 4096


def collect(model: Any, tokenizer: Any, domain: str, adapter: Path, out: Path) -> None:
    """Second moments of the inputs of the adapter's modules on training text."""
    modules = collecting.chosen_modules(model, str(adapter), None)
    texts = collecting.read_text(domain)
    batches = collecting.to_batches(texts, tokenizer, training.BLOCK_TOKENS, 4, TOKENS)
    collecting.save(out, model, modules, batches, name=HUB_NAME)


def errors(folder: Path, exact: Path, activations: Path) -> tuple[float, float]:
    """Relative error of ΔW and of ΔW·x over all modules, of the file as it is."""
    got, wanted = ao.open_adapter(folder), ao.open_adapter(exact)
    inputs = for_modules(open_activations(activations), wanted.terms[0][1].sites)
    squares = np.zeros((2, 2))
    for stem, factors in wanted.items():
        lost = got[stem] - factors
        for row, each in enumerate((lost, factors)):
            seen = metric.norm(each.B, each.A, inputs[stem])[0]
            squares[row] += each.norm() ** 2, seen**2
    plain, weighted = np.sqrt(squares[0] / squares[1])
    return float(plain), float(weighted)


def loss_of(base: Any, folder: Path, blocks: torch.Tensor) -> float:
    """Mean loss of the base model with an adapter."""
    with quiet_peft():
        model = PeftModel.from_pretrained(base, str(folder))
        try:
            return training.mean_loss(model, blocks)
        finally:
            model.unload()


def measure(adapter: Path, domain: str, blocks: int, work: Path) -> list[Row]:
    """A row for the base, the whole adapter and every rank."""
    base, tokenizer = load_model(), load_tokenizer()
    held_out = training.load_domain(domain, tokenizer)[1]
    held_out = training.spread(held_out, blocks)
    activations = work / "activations.safetensors"
    collect(base, tokenizer, domain, adapter, activations)
    ends = training.mean_loss(base, held_out), loss_of(base, adapter, held_out)
    full = ao.open_adapter(adapter).terms[0][1]
    kilobytes = Path(full.weights_file).stat().st_size / 1e3
    about = f"{adapter.name} on held-out {domain}, {held_out.numel()} tokens"
    rows = [
        Row(f"task loss: {domain}, base", about, figures={"loss": ends[0]}),
        Row(
            f"task loss: {domain}, rank {full.rank}",
            f"{about}, whole",
            figures={"kB": kilobytes, "loss": ends[1]},
        ),
    ]
    for rank in RANKS:
        figures: dict[str, float | str] = {}
        found: dict[str, float] = {}
        for name in METRICS:
            out = work / f"{name}-{rank}"
            given = {"activations": activations} if name == "activation" else {}
            report = ao.compress(adapter, out=out, rank=rank, metric=name, **given)  # type: ignore[arg-type]
            plain, weighted = errors(out, adapter, activations)
            measured = {"frobenius": plain, "activation": weighted}[name]
            if not math.isclose(measured, report.metric_error, rel_tol=1e-3):
                raise RuntimeError(f"{out.name}: certified {report.metric_error}, is {measured}")
            figures["kB"] = report.size / 1e3
            figures[f"loss {name}"] = loss_of(base, out, held_out)
            found[f"ΔW {name}"], found[f"ΔW·x {name}"] = plain, weighted
            print(f"rank {rank}, {name}: {figures[f'loss {name}']:.4f}", file=sys.stderr)
        rows.append(
            Row(
                f"task loss: {domain}, rank {rank}",
                f"{about}, by --metric frobenius and activation",
                figures=figures,
                errors=found,
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    """The rows as Markdown; in brackets, how much of the adapter's gain over the base is kept."""
    base, whole = (float(row.figures["loss"]) for row in rows[:2])

    def cell(row: Row, name: str) -> str:
        loss = float(row.figures[f"loss {name}"])
        kept = (base - loss) / (base - whole)
        seen = f"{row.errors[f'ΔW {name}']:.3f} | {row.errors[f'ΔW·x {name}']:.3f}"
        return f"{seen} | {loss:.4f} ({kept:.1%})"

    lines = [
        "| rank | kB | frobenius: error of ΔW | of ΔW·x | loss (gain kept) "
        "| activation: error of ΔW | of ΔW·x | loss (gain kept) |",
        "|---:|" + "---:|" * 7,
    ]
    full, end = rows[1].name.rpartition(" ")[2], f"0 | 0 | {whole:.4f} (100%)"
    lines.append(f"| {full} | {rows[1].figures['kB']:.0f} | {end} | {end} |")
    for row in rows[2:]:
        rank = row.name.rpartition(" ")[2]
        cells = " | ".join(cell(row, name) for name in METRICS)
        lines.append(f"| {rank} | {row.figures['kB']:.0f} | {cells} |")
    end = f"1 | 1 | {base:.4f} (0%)"
    lines.append(f"| none | 0 | {end} | {end} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", default="docs-seed0", help="of examples/adapters")
    parser.add_argument("--domain", default="docs", choices=training.DOMAINS)
    parser.add_argument("--blocks", type=int, default=16, help="held-out blocks of 128 tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--date", help="date in the results file's name; default today")
    # Not among the timings, of which the README shows the newest file.
    parser.add_argument("--results", type=Path, default=harness.RESULTS / "task_loss")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as work:
        adapter = EXAMPLES / "adapters" / options.adapter
        rows = measure(adapter, options.domain, options.blocks, Path(work))
    harness.save(rows, options.results, day=options.date)
    print(table(rows))


if __name__ == "__main__":
    main()
