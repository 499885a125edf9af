"""Train four small LoRA adapters (two text domains x two seeds) on SmolLM2-135M-Instruct.

The texts ship with Python: "code" is the source of the standard library's top-level modules,
"docs" is the language reference behind ``help()``. Adapters already made are kept; ``--force``
makes them again.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smollm2 import (
    HUB_NAME,
    load_model,
    load_tokenizer,
    quiet_peft,
)  # first: it says what to install

# isort: split

import peft
import torch
import transformers
from safetensors.torch import save_file

DOMAINS = ("code", "docs")
SEEDS = (0, 1)
RANK = 8
ALPHA = 16
TARGETS = ("q_proj", "v_proj")
BLOCK_TOKENS = 128
BLOCKS_PER_DOCUMENT = 40
HELD_OUT_BLOCKS = 32
WARMUP_STEPS = 10
OUT = Path(__file__).resolve().parent / "adapters"

Documents = dict[str, str]


def read_documents(domain: str) -> Documents:
    """Return the domain's texts by name."""
    if domain == "docs":
        from pydoc_data.topics import topics

        return {str(name): str(text) for name, text in topics.items()}
    folder = Path(sysconfig.get_path("stdlib"))
    # Private modules are left out because some are generated for one machine.
    names = sorted(name for name in sys.stdlib_module_names if not name.startswith("_"))
    files = {name: folder / f"{name}.py" for name in names}
    return {name: path.read_text("utf-8") for name, path in files.items() if path.is_file()}


def is_held_out(name: str) -> bool:
    """Say whether a document is kept for measuring; the name alone decides."""
    return zlib.crc32(name.encode()) % 6 == 0


def paragraphs(text: str) -> list[str]:
    """Split a text at blank lines."""
    return [part.strip("\n") for part in text.split("\n\n") if part.strip()]


def split_documents(documents: Documents) -> tuple[list[str], list[str]]:
    """Return training texts and held-out texts that share no paragraph."""
    held_out = [text for name, text in sorted(documents.items()) if is_held_out(name)]
    # Some help() topics contain other topics whole, so splitting by name is not enough.
    seen = {part for text in held_out for part in paragraphs(text)}
    training = [
        "\n\n".join(part for part in paragraphs(text) if part not in seen)
        for name, text in sorted(documents.items())
        if not is_held_out(name)
    ]
    return training, held_out


def to_blocks(texts: list[str], tokenizer: Any) -> torch.Tensor:
    """Cut texts into rows of BLOCK_TOKENS tokens, at most BLOCKS_PER_DOCUMENT from each."""
    rows: list[list[int]] = []
    for text in texts:
        tokens = tokenizer(text)["input_ids"]
        starts = range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS)
        rows += [tokens[start : start + BLOCK_TOKENS] for start in starts[:BLOCKS_PER_DOCUMENT]]
    return torch.tensor(rows)


def spread(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Pick ``count`` rows at even distances."""
    return rows[torch.linspace(0, len(rows) - 1, count).long()]


def load_domain(domain: str, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the training blocks and the held-out blocks of a domain."""
    training, held_out = split_documents(read_documents(domain))
    return to_blocks(training, tokenizer), spread(to_blocks(held_out, tokenizer), HELD_OUT_BLOCKS)


def mean_loss(model: Any, blocks: torch.Tensor) -> float:
    """Return the mean next-token loss in nats."""
    model.eval()
    with torch.inference_mode():
        losses = [model(input_ids=part, labels=part).loss.item() for part in torch.split(blocks, 4)]
    return float(sum(losses) / len(losses))


def batches(blocks: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches of one block for ever, in an order given by the seed."""
    shuffler = random.Random(seed)
    while True:
        for index in shuffler.sample(range(len(blocks)), len(blocks)):
            yield blocks[index : index + 1]


def learning_rate_factor(step: int, steps: int) -> float:
    """Rise linearly over the first steps, then fall linearly to zero."""
    return min((step + 1) / WARMUP_STEPS, (steps - step) / max(1, steps - WARMUP_STEPS))


def train(model: Any, blocks: torch.Tensor, seed: int, steps: int, lr: float) -> None:
    """Train the adapter of a PEFT model in place."""
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr)
    for step, batch in zip(range(steps), batches(blocks, seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * learning_rate_factor(step, steps)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 25 == 0:
            print(f"  step {step + 1}/{steps}: loss {loss.item():.3f}", flush=True)
    # What gets measured next must be what the fp16 file will hold.
    with torch.no_grad():
        for parameter in trainable:
            parameter.copy_(parameter.half())


def save_adapter(model: Any, folder: Path) -> None:
    """Write the two files that PEFT reads: fp16 tensors and their configuration."""
    tensors = {
        name: tensor.detach().half().contiguous()
        for name, tensor in peft.get_peft_model_state_dict(
            model, save_embedding_layers=False
        ).items()
    }
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"not finite in fp16: {broken[0]}")
    config = model.peft_config["default"]
    config.base_model_name_or_path = HUB_NAME
    config.target_modules = list(TARGETS)  # PEFT holds a set, whose order changes between runs
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def adapter_name(domain: str, seed: int) -> str:
    """Return the adapter's folder name."""
    return f"{domain}-seed{seed}"


def new_adapter(base: Any, seed: int) -> Any:
    """Put a fresh adapter on the model, initialised from the seed."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    with quiet_peft():
        return peft.get_peft_model(base, config)


def read_record(path: Path) -> dict[str, Any]:
    """Return the record of earlier runs, or an empty one."""
    if path.is_file():
        return dict(json.loads(path.read_text("utf-8")))
    return {"adapters": {}}


def missing_adapters(out: Path, record: dict[str, Any], force: bool) -> list[tuple[str, int]]:
    """List the (domain, seed) pairs still to be trained."""

    def is_made(name: str) -> bool:
        return name in record["adapters"] and (out / name / "adapter_model.safetensors").is_file()

    pairs = [(domain, seed) for domain in DOMAINS for seed in SEEDS]
    return [pair for pair in pairs if force or not is_made(adapter_name(*pair))]


def versions() -> dict[str, str]:
    """Return the versions that the result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def train_missing(out: Path, record: dict[str, Any], steps: int, lr: float, force: bool) -> None:
    """Train what is missing, writing the record after each adapter."""
    wanted = missing_adapters(out, record, force)
    if not wanted:
        return
    tokenizer = load_tokenizer()
    base = load_model()
    blocks = {domain: load_domain(domain, tokenizer) for domain in DOMAINS}
    base_loss = {domain: mean_loss(base, blocks[domain][1]) for domain in DOMAINS}
    for domain, seed in wanted:
        name = adapter_name(domain, seed)
        print(f"{name}: {len(blocks[domain][0])} training blocks", flush=True)
        start = time.perf_counter()
        model = new_adapter(base, seed)
        train(model, blocks[domain][0], seed, steps, lr)
        seconds = time.perf_counter() - start
        loss = {other: mean_loss(model, blocks[other][1]) for other in DOMAINS}
        save_adapter(model, out / name)
        base = model.unload()
        record["adapters"][name] = {
            "domain": domain,
            "seed": seed,
            "steps": steps,
            "tokens_per_step": BLOCK_TOKENS,
            "lr": lr,
            "rank": RANK,
            "alpha": ALPHA,
            "target_modules": list(TARGETS),
            "held_out_loss_base": {key: round(value, 4) for key, value in base_loss.items()},
            "held_out_loss_adapted": {key: round(value, 4) for key, value in loss.items()},
            "train_seconds": round(seconds, 1),
            "versions": versions(),
        }
        (out / "training.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def table(record: dict[str, Any]) -> str:
    """Return the losses as a Markdown table."""
    lines = [
        "| adapter | " + " | ".join(f"{d}: base | {d}: adapted" for d in DOMAINS) + " | seconds |",
        "|---|" + "---:|" * (2 * len(DOMAINS) + 1),
    ]
    for name, entry in sorted(record["adapters"].items()):
        before, after = entry["held_out_loss_base"], entry["held_out_loss_adapted"]
        losses = " | ".join(f"{before[d]:.3f} | {after[d]:.3f}" for d in DOMAINS)
        lines.append(f"| {name} | {losses} | {entry['train_seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the adapters")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: 200)")
    parser.add_argument(
        "--lr", type=float, default=2e-3, help="peak learning rate (default: 0.002)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--force", action="store_true", help="train again what is already there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    record = read_record(options.out / "training.json")
    train_missing(options.out, record, options.steps, options.lr, options.force)
    print(f"Mean held-out loss in nats per token:\n\n{table(record)}")


if __name__ == "__main__":
    main()
