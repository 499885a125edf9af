"""Train a fleet of 24 small LoRA adapters on SmolLM2-135M-Instruct: six domains, four tenants each.

Tenant `a` starts from the seed that all domains share, `b` from one of its own; `a-fork` continues
`a` on other text of the domain, `a-more` continues it on the same text. Adapters that are already
there are kept; the record is written after each, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from smollm2 import load_model, load_tokenizer, quiet_peft  # first: it says what to install

# isort: split

import peft
import torch
from texts import DOMAINS
from train_adapters import (
    BLOCK_TOKENS,
    HELD_OUT_BLOCKS,
    TARGETS,
    mean_loss,
    read_record,
    save_adapter,
    split_documents,
    spread,
    to_blocks,
    train,
    versions,
)

HERE = Path(__file__).resolve().parent
RANK = 4
ALPHA = 8
SHARED_SEED = 0
SOURCES = ("numpy", "sympy")  # of text, beside Python and torch
STEPS, LR = 100, 2e-3
# Rates of the continuations, domain by domain: they set how far each ends from where it started.
MORE_STEPS, MORE_LR = 12, (2e-4, 3e-4, 4e-4, 5e-4, 6e-4, 8e-4)
FORK_STEPS, FORK_LR = 24, (4e-4, 6e-4, 8e-4, 1e-3, 1.2e-3, 1.4e-3)


@dataclass(frozen=True)
class Run:
    """One adapter: where it starts, on which half of the domain's text, how long and how fast.

    `parent` is the tenant that it continues; the seed sets the order of the text and, without a
    parent, the initial weights.
    """

    domain: str
    kind: str
    seed: int
    half: int
    steps: int
    lr: float
    parent: str | None = None

    @property
    def tenant(self) -> str:
        return f"{self.domain}-{self.kind}"


def runs() -> Iterator[Run]:
    """All adapters, those that others continue first."""
    rates = zip(DOMAINS, MORE_LR, FORK_LR, strict=True)
    for number, (domain, more, fork) in enumerate(rates, 1):
        first = f"{domain}-a"
        yield Run(domain, "a", SHARED_SEED, 0, STEPS, LR)
        yield Run(domain, "a-more", 100 + number, 0, MORE_STEPS, more, first)
        yield Run(domain, "a-fork", 200 + number, 1, FORK_STEPS, fork, first)
        yield Run(domain, "b", number, 0, STEPS, LR)


@dataclass(frozen=True)
class Blocks:
    """Rows of BLOCK_TOKENS tokens: the two halves of the training text, and the held-out text."""

    halves: tuple[torch.Tensor, torch.Tensor]
    held_out: torch.Tensor


def load_domain(domain: str, tokenizer: Any) -> Blocks:
    """Read a domain's text; every other document of the training text is in the second half."""
    training, held_out = split_documents(DOMAINS[domain]())
    halves = (to_blocks(training[::2], tokenizer), to_blocks(training[1::2], tokenizer))
    return Blocks(halves, spread(to_blocks(held_out, tokenizer), HELD_OUT_BLOCKS))


def started(base: Any, run: Run, out: Path) -> Any:
    """The model with a fresh adapter, or with the parent's as it lies on disk."""
    with quiet_peft():
        if run.parent is not None:
            return peft.PeftModel.from_pretrained(base, str(out / run.parent), is_trainable=True)
        torch.manual_seed(run.seed)
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM"
        )
        return peft.get_peft_model(base, config)


def missing(out: Path, record: dict[str, Any], domains: list[str]) -> list[Run]:
    """The runs still to be made."""

    def is_made(run: Run) -> bool:
        file = out / run.tenant / "adapter_model.safetensors"
        return run.tenant in record["adapters"] and file.is_file()

    return [run for run in runs() if run.domain in domains and not is_made(run)]


def train_missing(out: Path, place: Path, domains: list[str]) -> dict[str, Any]:
    """Train what is missing, writing the record to `place` after each adapter."""
    record = read_record(place)
    wanted = missing(out, record, domains)
    if not wanted:
        return record
    tokenizer, base = load_tokenizer(), load_model()
    for domain in dict.fromkeys(run.domain for run in wanted):
        blocks = load_domain(domain, tokenizer)
        before = mean_loss(base, blocks.held_out)
        for run in (run for run in wanted if run.domain == domain):
            rows = blocks.halves[run.half]
            print(f"{run.tenant}: {len(rows)} training blocks", flush=True)
            start = time.perf_counter()
            model = started(base, run, out)
            train(model, rows, run.seed, run.steps, run.lr)
            seconds = time.perf_counter() - start
            loss = mean_loss(model, blocks.held_out)
            save_adapter(model, out / run.tenant)
            base = model.unload()
            record["adapters"][run.tenant] = {
                **asdict(run),
                "training_blocks": [len(half) for half in blocks.halves],
                "tokens_per_step": BLOCK_TOKENS,
                "rank": RANK,
                "alpha": ALPHA,
                "target_modules": list(TARGETS),
                "held_out_loss_base": round(before, 4),
                "held_out_loss_adapted": round(loss, 4),
                "train_seconds": round(seconds, 1),
                "versions": versions() | {name: metadata.version(name) for name in SOURCES},
            }
            place.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
            print(f"  held out: {before:.3f} -> {loss:.3f} in {seconds:.0f} s", flush=True)
    return record


def table(record: dict[str, Any]) -> str:
    """The losses as a Markdown table."""
    lines = ["| tenant | seed | continues | held out: base | adapted | seconds |"]
    lines.append("|---|---:|---|---:|---:|---:|")
    for name, entry in sorted(record["adapters"].items()):
        lines.append(
            f"| {name} | {entry['seed']} | {entry['parent'] or ''} | "
            f"{entry['held_out_loss_base']:.3f} | {entry['held_out_loss_adapted']:.3f} | "
            f"{entry['train_seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=HERE / "adapters", help="folder of adapters")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--domains", nargs="+", choices=list(DOMAINS), default=list(DOMAINS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    record = train_missing(options.out, options.out.parent / "training.json", options.domains)
    print(f"Mean held-out loss in nats per token:\n\n{table(record)}")


if __name__ == "__main__":
    main()
