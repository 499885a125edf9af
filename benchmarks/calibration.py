"""What an error ε of the weights costs in held-out loss, on the trained fleet of examples/fleet.

`python benchmarks/calibration.py [--blocks 32] [--cases N] [--plot-only]`. Groups of tenants (one
run and what continues it, two seeds of one domain, all of a domain, two domains) are served by
their medoid, by means and by minimax adapters of several ranks, and by mixtures that lean to one
side; single adapters are cut to lower ranks. Each is written as a file, loaded by PEFT and read on
the held-out text of each member's domain, beside the member's own adapter and the base model.

ε = ‖C − D‖ / ‖D‖ is taken from the files, in float64. *Lost* is the share of a tenant's own gain
that serving it so costs: (loss − own) / (base − own), 0 as good as its own adapter, 1 as the base.
Losses are nats per token, of the same tokens throughout; ± is one standard error of a difference,
over pieces of 512 tokens. They are kept in benchmarks/results/calibration/smollm2.json as they are
found, so a run goes on where one stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import harness
from calibration_plot import curve, draw, joint, tables

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FLEET = EXAMPLES / "fleet"
sys.path[:0] = [str(FLEET), str(EXAMPLES)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from adapterops.fleet.minimax import members, minimax  # noqa: E402
from peft import PeftModel  # noqa: E402
from smollm2 import load_model, load_tokenizer, quiet_peft  # noqa: E402
from texts import DOMAINS  # noqa: E402
from train_adapters import spread  # noqa: E402
from train_fleet import load_domain, runs  # noqa: E402

import adapterops as ao  # noqa: E402
from adapterops import geometry  # noqa: E402

RESULT = harness.RESULTS / "calibration" / "smollm2.json"
PLOT = FLEET / "calibration.png"
SCHEMA = "adapterops.calibration/1"
LEAN = (0.1, 0.25)  # of the first: the second sees the other end


@dataclass(frozen=True)
class Case:
    """A group of tenants and the adapter made for it.

    `kind` is medoid, mean, minimax, mixture or cut; `lean` is the first member's weight in a
    mixture, `rank` the most that the result may have (None: whatever it has).
    """

    relation: str
    kind: str
    group: tuple[str, ...]
    rank: int | None = None
    lean: float | None = None

    @property
    def name(self) -> str:
        rank = "" if self.rank is None else f", rank {self.rank}"
        lean = "" if self.lean is None else f" {self.lean:g}"
        return f"{self.kind}{lean} of {' + '.join(self.group)}{rank}"


def cases() -> Iterator[Case]:
    """Everything that is measured, small errors first within a domain."""
    for domain in DOMAINS:
        a, more, fork, b = (f"{domain}-{kind}" for kind in ("a", "a-more", "a-fork", "b"))
        for rank in (3, 2, 1):
            yield Case("own, cut", "cut", (a,), rank)
        for group in ((a, more), (a, fork), (a, more, fork)):
            yield from _kinds("continued", group, (8,))
        yield from _kinds("same domain, other seed", (a, b), (4, 8))
        for lean in LEAN:
            yield Case("same domain, other seed", "mixture", (a, b), 8, lean)
        yield from _kinds("whole domain", (a, more, fork, b), (8, 16))
    for one, two in pairwise([*DOMAINS, next(iter(DOMAINS))]):
        yield from _kinds("other domain", (f"{one}-a", f"{two}-a"), (8,))
        for lean in LEAN:
            yield Case("other domain", "mixture", (f"{one}-a", f"{two}-a"), 8, lean)


def _kinds(relation: str, group: tuple[str, ...], ranks: Sequence[int]) -> Iterator[Case]:
    yield Case(relation, "medoid", group)
    for kind in ("mean", "minimax"):
        for rank in ranks:
            yield Case(relation, kind, group, rank)


def domain_of(tenant: str) -> str:
    return tenant.partition("-")[0]


class Weights:
    """The fleet's adapters in float64 and what their files are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.deltas = {run.tenant: dict(ao.open_adapter(folder / run.tenant)) for run in runs()}
        self.norms = {name: _norm(delta) for name, delta in self.deltas.items()}

    def error(self, place: Path, tenant: str) -> float:
        """‖C − D‖ / ‖D‖ of the adapter at `place`."""
        wanted, found = self.deltas[tenant], ao.open_adapter(place)
        return math.hypot(*((found[s] - wanted[s]).norm() for s in wanted)) / self.norms[tenant]

    def cosine(self, one: str, two: str) -> float:
        first, second = self.deltas[one], self.deltas[two]
        product = sum(first[stem].inner(second[stem]) for stem in first)
        return product / self.norms[one] / self.norms[two]

    def outputs(self, one: str, two: str) -> float:
        """⟨DDᵀ, D′D′ᵀ⟩ = Σ‖DᵀD′‖² over the norms of the two."""

        def product(x: str, y: str) -> float:
            return sum(_crossed(self.deltas[x][s], self.deltas[y][s]) for s in self.deltas[x])

        return product(one, two) / math.sqrt(product(one, one) * product(two, two))

    def coefficients(self, case: Case) -> list[float]:
        """Weights of the group's members; their weighted sum, cut to the rank, is what serves."""
        group = case.group
        if case.lean is not None:
            return [case.lean, 1 - case.lean]
        if case.kind == "minimax":
            stacks = [
                geometry.in_common_bases(
                    np.hstack([self.deltas[name][stem].B for name in group]),
                    np.vstack([self.deltas[name][stem].A for name in group]),
                    [self.deltas[name][stem].rank for name in group],
                )
                for stem in self.deltas[group[0]]
            ]
            return [float(x) for x in minimax(members(stacks), case.rank).coefficients]
        shares = [self.norms[name] ** -2 for name in group]
        return [share / sum(shares) for share in shares]

    def made(self, case: Case, work: Path) -> Path:
        """The adapter that serves the group."""
        if case.kind == "medoid":
            return min(
                (self.folder / name for name in case.group),
                key=lambda place: max(self.error(place, name) for name in case.group),
            )
        used = [
            (self.folder / name, u)
            for name, u in zip(case.group, self.coefficients(case), strict=True)
            if u > 0
        ]
        paths, weights = zip(*used, strict=True)
        ao.merge(list(paths), list(weights), out=work, rank=case.rank, overwrite=True)
        return work


def _norm(delta: dict[str, ao.Factors]) -> float:
    return math.hypot(*(factors.norm() for factors in delta.values()))


def _crossed(X: ao.Factors, Y: ao.Factors) -> float:
    """‖XᵀY‖² = ⟨(B₁ᵀB₂)A₂A₂ᵀ, A₁A₁ᵀ(B₁ᵀB₂)⟩."""
    across = X.B.T @ Y.B
    return float(((across @ (Y.A @ Y.A.T)) * ((X.A @ X.A.T) @ across)).sum())


class Losses:
    """Held-out losses, measured once each and kept in the results file."""

    def __init__(self, record: dict[str, Any], blocks: int) -> None:
        self.known: dict[str, list[float]] = record.setdefault("losses", {})
        self.record, self.blocks = record, blocks
        self.base: Any = None
        self.texts: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, place: Path | None, domain: str) -> np.ndarray[Any, Any]:
        """Losses of the base with the adapter at `place`, or without any, piece by piece."""
        key = f"{name} on {domain}"
        if key not in self.known:
            if self.base is None:
                self.base, self.tokenizer = load_model(), load_tokenizer()
            if domain not in self.texts:
                held_out = load_domain(domain, self.tokenizer).held_out
                self.texts[domain] = spread(held_out, self.blocks)
            found = _pieces(self.base, place, self.texts[domain])
            self.known[key] = [round(loss, 6) for loss in found]
            save(self.record)
            print(f"{key}: {statistics.fmean(found):.4f}", file=sys.stderr, flush=True)
        return np.array(self.known[key])


def _pieces(base: Any, place: Path | None, text: torch.Tensor) -> list[float]:
    """Mean loss of every four blocks."""
    with quiet_peft(), torch.inference_mode():
        model = PeftModel.from_pretrained(base, str(place)) if place else base
        try:
            model.eval()
            return [model(input_ids=part, labels=part).loss.item() for part in torch.split(text, 4)]
        finally:
            if place:
                model.unload()


def difference(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> list[float]:
    """Mean of first − second and its standard error."""
    apart = first - second
    return [float(apart.mean()), float(apart.std(ddof=1) / len(apart) ** 0.5)]


def points_of(case: Case, weights: Weights, losses: Losses, work: Path) -> list[dict[str, Any]]:
    """One point for each member that is not served by its own file."""
    place = weights.made(case, work)
    name = place.name if case.kind == "medoid" else case.name
    found = []
    for tenant in case.group:
        if name == tenant:
            continue
        domain = domain_of(tenant)
        base = losses("base", None, domain)
        own = losses(tenant, weights.folder / tenant, domain)
        loss = losses(name, place, domain)
        more, noise = difference(loss, own)
        found.append(
            {
                "relation": case.relation,
                "kind": case.kind,
                "rank": case.rank,
                "group": list(case.group),
                "tenant": tenant,
                "error": round(weights.error(place, tenant), 6),
                "loss": round(float(loss.mean()), 6),
                "own": round(float(own.mean()), 6),
                "base": round(float(base.mean()), 6),
                "more": round(more, 6),
                "±": round(noise, 6),
                "lost": round(more / float((base - own).mean()), 6),
            }
        )
    return found


def relation_of(one: str, two: str) -> str:
    """How two tenants of the fleet are related."""
    if domain_of(one) != domain_of(two):
        return "other domain, same seed" if "-b" not in one + two else "other domain, other seed"
    return "same domain, other seed" if "-b" in one + two else "continued"


def similarities(weights: Weights) -> list[dict[str, Any]]:
    """Both cosines of every pair."""
    return [
        {
            "pair": [one, two],
            "relation": relation_of(one, two),
            "delta": round(weights.cosine(one, two), 5),
            "outputs": round(weights.outputs(one, two), 5),
        }
        for one, two in combinations(weights.deltas, 2)
    ]


def save(record: dict[str, Any]) -> None:
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")


def measure(blocks: int, count: int | None) -> dict[str, Any]:
    """All points; losses of an earlier run on as many blocks are taken over."""
    record: dict[str, Any] = json.loads(RESULT.read_text("utf-8")) if RESULT.exists() else {}
    if record.get("blocks") != blocks:
        record = {"schema": SCHEMA, "blocks": blocks}
    weights, losses = Weights(FLEET / "adapters"), Losses(record, blocks)
    record["machine"] = harness.machine()
    record["similarities"] = similarities(weights)
    with tempfile.TemporaryDirectory() as work:
        points = [
            point
            for case in list(cases())[:count]
            for point in points_of(case, weights, losses, Path(work) / "served")
        ]
    record |= {"points": points, "curve": curve(points), "joint": joint(points)}
    save(record)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=32, help="held-out blocks of 128 tokens")
    parser.add_argument("--cases", type=int, help="only so many, to try it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot-only", action="store_true", help="draw what was measured")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.plot_only:
        record = json.loads(RESULT.read_text("utf-8"))
    else:
        record = measure(options.blocks, options.cases)
    draw(record, PLOT)
    print(tables(record))


if __name__ == "__main__":
    main()
