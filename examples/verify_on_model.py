"""Check a merged LoRA adapter on the model itself.

The merged adapter is loaded with PEFT. The reference is the base model with the weighted sum of
the input adapters added densely to its weights. Both answer the same prompts, and their logits
are compared.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smollm2 import load_model, load_tokenizer, quiet_peft  # first: it says what to install

# isort: split

import torch
from peft import PeftModel
from safetensors.torch import load_file

PROMPTS = (
    "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    'The "while" statement is used for repeated execution as long as an expression is true:',
    "The Moon goes around the Earth about once a month, and the tides follow it because",
    "To bake bread you need flour, water, salt and yeast. First,",
    "Question: which number is larger, seventeen or twenty-one?\nAnswer:",
)
FACTOR_NAME = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")

Deltas = dict[str, torch.Tensor]


def read_config(folder: Path) -> dict[str, Any]:
    """Read an adapter's configuration, refusing kinds whose change is not alpha/r times B A."""
    config = dict(json.loads((folder / "adapter_config.json").read_text("utf-8")))
    for option in ("use_dora", "fan_in_fan_out"):
        if config.get(option):
            raise ValueError(f"{folder}: {option} is not supported here")
    return config


def scale(config: dict[str, Any], module: str, rank: int) -> float:
    """Return alpha/r for one module, as PEFT would."""
    alpha = float(config["lora_alpha"])
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = float(value)
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def read_deltas(folder: Path) -> Deltas:
    """Return the adapter's change of every module in float64."""
    config = read_config(folder)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        match = FACTOR_NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{folder}: unexpected tensor {name}")
        factors.setdefault(match[1], {})[match[2]] = tensor.double()
    return {
        module: scale(config, module, pair["A"].shape[0]) * (pair["B"] @ pair["A"])
        for module, pair in factors.items()
    }


def weighted_sum(inputs: Sequence[Path], weights: Sequence[float]) -> Deltas:
    """Return the exact weighted sum of the adapters' changes."""
    if len(inputs) != len(weights):
        raise ValueError(f"{len(inputs)} inputs but {len(weights)} weights")
    total: Deltas = {}
    for folder, weight in zip(inputs, weights, strict=True):
        for module, delta in read_deltas(folder).items():
            total[module] = total[module] + weight * delta if module in total else weight * delta
    return total


def squared_norm(deltas: Deltas) -> float:
    """Return the squared Frobenius norm over all modules."""
    return sum(float(delta.square().sum()) for delta in deltas.values())


def relative_error(deltas: Deltas, exact: Deltas) -> float:
    """Return the relative Frobenius error over all modules; a missing module counts as zero."""
    zero = torch.zeros(())
    difference = {
        module: deltas.get(module, zero) - exact.get(module, zero)
        for module in deltas.keys() | exact.keys()
    }
    return math.sqrt(squared_norm(difference) / squared_norm(exact))


def logits_of(model: Any, tokenizer: Any) -> torch.Tensor:
    """Return the logits at every position of every prompt, one row per position."""
    rows = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            rows.append(model(**tokenizer(prompt, return_tensors="pt")).logits[0])
    return torch.cat(rows).double()


def add_densely(model: Any, deltas: Deltas) -> None:
    """Add the changes to the model's own weights."""
    with torch.no_grad():
        for module, delta in deltas.items():
            weight = model.get_submodule(module).weight
            weight.add_(delta.to(weight.dtype))


def compare_logits(got: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Return how far two sets of logits are apart."""
    log_got, log_expected = got.log_softmax(-1), expected.log_softmax(-1)
    divergence = (log_expected.exp() * (log_expected - log_got)).sum(-1)
    return {
        "max_logit_difference": float((got - expected).abs().max() / expected.abs().max()),
        "mean_kl": float(divergence.mean()),
        "top1_agreement": float((got.argmax(-1) == expected.argmax(-1)).double().mean()),
    }


def compare(
    model_dir: Path | str, inputs: Sequence[Path | str], weights: Sequence[float]
) -> dict[str, Any]:
    """Compare a merged adapter, as PEFT loads it, with the exact weighted sum of its inputs."""
    exact = weighted_sum([Path(folder) for folder in inputs], weights)
    tokenizer = load_tokenizer()
    base = load_model(torch.float32)
    logits_base = logits_of(base, tokenizer)

    with quiet_peft():
        merged = PeftModel.from_pretrained(base, str(model_dir)).eval()
    logits_merged = logits_of(merged, tokenizer)

    base = merged.unload()
    add_densely(base, exact)
    logits_exact = logits_of(base, tokenizer)

    return {
        **compare_logits(logits_merged, logits_exact),
        "delta_relative_error": relative_error(read_deltas(Path(model_dir)), exact),
        # How far the sum moves the base model: without this, a close match could mean nothing.
        "base_to_exact": compare_logits(logits_base, logits_exact),
        "positions": len(logits_exact),
        "prompts": len(PROMPTS),
        "modules": len(exact),
    }


def report(result: dict[str, Any]) -> str:
    """Return the comparison as lines of text."""
    base = result["base_to_exact"]
    rows = (
        ("max|logit difference| / max|logit|", "max_logit_difference"),
        ("mean KL in nats", "mean_kl"),
        ("top-1 agreement", "top1_agreement"),
    )
    lines = [f"{result['prompts']} prompts, {result['positions']} positions, against the exact sum"]
    lines.append(f"{'':36}{'merged':>12}{'base alone':>12}")
    lines += [f"{label:36}{result[key]:>12.3g}{base[key]:>12.3g}" for label, key in rows]
    lines.append(f"{'relative error of the delta':36}{result['delta_relative_error']:>12.3g}")
    return "\n".join(lines)


def parse_weights(text: str) -> list[float]:
    """Read numbers separated by commas."""
    return [float(part) for part in text.split(",")]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("merged", type=Path, metavar="MERGED_DIR", help="the merged adapter")
    parser.add_argument("--inputs", type=Path, nargs="+", required=True, metavar="DIR")
    parser.add_argument("--weights", type=parse_weights, required=True, metavar="W,W,...")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    if len(options.inputs) != len(options.weights):
        parser.error(f"{len(options.inputs)} inputs but {len(options.weights)} weights")
    result = compare(options.merged, options.inputs, options.weights)
    print(json.dumps(result, indent=2) if options.json else report(result))


if __name__ == "__main__":
    main()
