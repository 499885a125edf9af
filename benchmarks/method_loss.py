"""Held-out loss of merges of two domains' adapters by several methods, on SmolLM2-135M.

`python benchmarks/method_loss.py [--quick] [--blocks 8]`. Four pairs of a code and a docs adapter
(examples/adapters and examples/fleet/adapters, different seeds) are merged at the methods' default
parameters; the weights given are those of both adapters. ΔW is added to the model's own weights in
float32, untruncated unless a rank is named, and the model is read on held-out text of each domain.

Losses are nats per token, of the same tokens throughout. *mean* is that of the two domains; *kept*
the mean share of an adapter's own improvement over the base that the merge has on its domain; *±*
is one standard error of the difference of *mean* to linear at 0.5, over blocks of 128 tokens; all
pairs are read on the same text, so that of their mean is taken to be no smaller.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import Row

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import torch  # noqa: E402
import train_adapters as training  # noqa: E402
from peft import PeftModel  # noqa: E402
from smollm2 import load_model, load_tokenizer, quiet_peft  # noqa: E402
from transformers.utils import logging  # noqa: E402

import adapterops as ao  # noqa: E402
from adapterops.combining import combine  # noqa: E402

RANK = 16
DOMAINS = training.DOMAINS
PAIRS = {
    "seed0": [EXAMPLES / "adapters" / f"{domain}-seed0" for domain in DOMAINS],
    "seed1": [EXAMPLES / "adapters" / f"{domain}-seed1" for domain in DOMAINS],
    "fleet a": [EXAMPLES / "fleet" / "adapters" / f"{domain}-a" for domain in DOMAINS],
    "fleet b": [EXAMPLES / "fleet" / "adapters" / f"{domain}-b" for domain in DOMAINS],
}
Deltas = dict[str, torch.Tensor]
Losses = dict[str, torch.Tensor]
Way = Callable[[Sequence[Path]], Deltas]


@dataclass(frozen=True)
class Found:
    """One way's losses by domain, (blocks,) each, and ‖ΔW‖ over the adapters' mean norm."""

    way: str
    losses: Losses
    size: float

    def loss(self, domain: str) -> float:
        return float(self.losses[domain].mean())

    @property
    def mean(self) -> float:
        return sum(map(self.loss, self.losses)) / len(self.losses)


def dense(adapter: ao.Adapter) -> Deltas:
    """ΔW of every module in float64."""
    return {module: torch.from_numpy(factors.dense()) for module, factors in adapter.items()}


def by(method: str, weight: float = 1.0, **options: Any) -> Way:
    """A method with one weight for both adapters."""
    return lambda pair: dense(combine(method, pair, [weight] * len(pair), **options))


def truncated(method: str, pair: Sequence[Path]) -> Deltas:
    """A method's result as it is written at a rank."""
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "out"
        ao.merge(pair, out=out, method=method, rank=RANK, dtype="float32")
        return dense(ao.open_adapter(out))


def by_peft(model: Any, weight: float, pair: Sequence[Path]) -> Deltas:
    """PEFT's own `linear`."""
    names = [path.name for path in pair]
    with quiet_peft():
        loaded = PeftModel.from_pretrained(model, str(pair[0]), adapter_name=names[0])
        try:
            loaded.load_adapter(str(pair[1]), adapter_name=names[1])
            loaded.add_weighted_adapter(
                names, [weight] * len(names), "merged", combination_type="linear"
            )
            return {
                module.removeprefix("base_model.model."): layer.get_delta_weight("merged").detach()
                for module, layer in loaded.named_modules()
                if "merged" in getattr(layer, "lora_A", {})
            }
        finally:
            loaded.unload()


def ways(model: Any) -> dict[str, Way]:
    """What is measured of each pair, the reference of *±* first."""
    return {
        "linear, 0.5": by("linear", 0.5),
        "linear, 1": by("linear"),
        "ties": by("ties"),
        f"ties, rank {RANK}": partial(truncated, "ties"),
        "KnOTS-TIES": by("ties", space="knots"),
        "tsv": by("tsv"),
        "iso_c": by("iso_c"),
        "PEFT linear, 0.5": partial(by_peft, model, 0.5),
        "PEFT linear, 1": partial(by_peft, model, 1.0),
    }


def norm(deltas: Deltas) -> float:
    return math.hypot(*(float(delta.double().norm()) for delta in deltas.values()))


class Reader:
    """The base model, its adapted weights and held-out blocks by domain."""

    def __init__(self, model: Any, texts: dict[str, torch.Tensor]) -> None:
        self.model, self.texts = model, texts
        self._kept: Deltas = {}

    def losses(self, deltas: Deltas) -> Losses:
        """Mean loss of every block with the changes added in float32."""
        for module, delta in deltas.items():
            weight = self.model.get_submodule(module).weight.data
            own = self._kept.setdefault(module, weight.clone())
            weight.copy_(own.double() + delta.double())
        found = {domain: torch.tensor(list(self._each(x))) for domain, x in self.texts.items()}
        for module in deltas:
            self.model.get_submodule(module).weight.data.copy_(self._kept[module])
        return found

    def _each(self, blocks: torch.Tensor) -> Iterator[float]:
        with torch.inference_mode():
            for part in torch.split(blocks, 4):
                logits = self.model(input_ids=part).logits[:, :-1].float()
                lost = torch.nn.functional.cross_entropy(
                    logits.transpose(1, 2), part[:, 1:], reduction="none"
                )
                yield from lost.double().mean(1).tolist()


def measure(reader: Reader, names: Sequence[str]) -> Iterator[tuple[str, list[Found]]]:
    """Of every pair: base, each adapter alone, every merge."""
    base = Found("base", reader.losses({}), 0.0)
    for name in names:
        pair = PAIRS[name]
        own = [dense(ao.open_adapter(path)) for path in pair]
        mean = sum(map(norm, own)) / len(own)
        found = [base]
        for domain, deltas in zip(DOMAINS, own, strict=True):
            found.append(Found(f"{domain} alone", reader.losses(deltas), norm(deltas) / mean))
        for way, make in ways(reader.model).items():
            start = time.perf_counter()
            deltas = make(pair)
            made = time.perf_counter() - start
            found.append(Found(way, reader.losses(deltas), norm(deltas) / mean))
            print(f"{name}, {way}: {found[-1].mean:.4f}, made in {made:.1f} s", file=sys.stderr)
        yield name, found


def rows(pair: str, found: Sequence[Found], tokens: int) -> Iterator[Row]:
    """One row for each way of a pair."""
    known = {one.way: one for one in found}
    reference = known[next(iter(ways(None)))]
    base = known["base"]
    for one in found:
        gains = [
            (base.loss(domain) - one.loss(domain))
            / (base.loss(domain) - known[f"{domain} alone"].loss(domain))
            for domain in DOMAINS
        ]
        apart = torch.cat([one.losses[domain] - reference.losses[domain] for domain in DOMAINS])
        figures = {f"loss {domain}": one.loss(domain) for domain in DOMAINS}
        yield Row(
            f"method loss: {pair}, {one.way}",
            f"{' and '.join(path.name for path in PAIRS[pair])}, on {tokens} held-out tokens each",
            figures={
                **figures,
                "loss mean": one.mean,
                "kept": sum(gains) / len(gains),
                "± to linear 0.5": float(apart.std() / math.sqrt(len(apart))),
                "norm": one.size,
            },
        )


def table(found: Sequence[Row]) -> str:
    """The rows as Markdown, pairs beside each other, and a sentence on what they show."""
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for row in found:
        pair, _, way = row.name.removeprefix("method loss: ").partition(", ")
        figures.setdefault(way, {})[pair] = {k: float(v) for k, v in row.figures.items()}
    pairs = list(next(iter(figures.values())))
    heads = " | ".join(f"{pair}: {' | '.join(DOMAINS)} | mean" for pair in pairs)
    lines = [
        f"| | {heads} | mean of all | kept | ± | norm |",
        "|---|" + "---:|" * (3 * len(pairs) + 4),
    ]

    def mean(way: str, name: str) -> float:
        return sum(each[name] for each in figures[way].values()) / len(pairs)

    names = (*(f"loss {domain}" for domain in DOMAINS), "loss mean")
    for way, each in figures.items():
        cells = [f"{each[pair][name]:.3f}" for pair in pairs for name in names]
        cells += [f"{mean(way, 'loss mean'):.3f}", f"{mean(way, 'kept'):.0%}"]
        cells += [f"{mean(way, '± to linear 0.5'):.3f}", f"{mean(way, 'norm'):.2f}"]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _sentence(figures, pairs, mean)])


def _sentence(
    figures: dict[str, dict[str, dict[str, float]]],
    pairs: Sequence[str],
    mean: Callable[[str, str], float],
) -> str:
    merges = list(ways(None))
    lowest = [min(merges, key=lambda way: figures[way][pair]["loss mean"]) for pair in pairs]
    counts = ", ".join(
        f"{way} on {lowest.count(way)}" for way in sorted(set(lowest), key=merges.index)
    )
    order = sorted(merges, key=lambda way: mean(way, "loss mean"))
    return (
        f"Lowest mean loss of the merges, of {len(pairs)} pairs: {counts}. Over all pairs they lie "
        f"between {mean(order[0], 'loss mean'):.3f} ({order[0]}) and "
        f"{mean(order[-1], 'loss mean'):.3f} ({order[-1]}), the base at "
        f"{mean('base', 'loss mean'):.3f}; nothing was tuned."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one pair, 2 blocks")
    parser.add_argument("--blocks", type=int, default=8, help="held-out blocks of each domain")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--date", help="date in the results file's name; default today")
    # Not among the timings, of which the README shows the newest file.
    parser.add_argument("--results", type=Path, default=harness.RESULTS / "method_loss")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    count = 2 if options.quick else options.blocks
    tokenizer = load_tokenizer()
    texts = {
        domain: training.spread(training.load_domain(domain, tokenizer)[1], count)
        for domain in DOMAINS
    }
    tokens = next(iter(texts.values())).numel()
    reader = Reader(load_model(), texts)
    found: list[Row] = []
    for name, of_pair in measure(reader, list(PAIRS)[: 1 if options.quick else None]):
        found += rows(name, of_pair, tokens)
    prefix = "quick-" if options.quick else ""
    harness.save(found, options.results, day=options.date, prefix=prefix)
    print(table(found))


if __name__ == "__main__":
    main()
