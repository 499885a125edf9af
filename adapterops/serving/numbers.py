"""Findings about ranks, scales and number formats."""

from __future__ import annotations

import math
from collections.abc import Sequence

from adapterops.formats.model import AdapterFile, Site
from adapterops.serving.finding import Finding, Findings, few, grouped
from adapterops.serving.model import Engine
from adapterops.serving.scales import LORA_KINDS, configured_ranks, module_types, served


def ranks(
    file: AdapterFile, engine: Engine, max_lora_rank: int | None, tensor_parallel: int
) -> Findings:
    """The largest rank against the engine's limits."""
    sites = _lora(file)
    rank = max([site.rank for site in sites] + configured_ranks(file.config), default=0)
    largest = tuple(site.stem for site in sites if site.rank == rank)
    if not rank:
        return
    slot = engine.slot_rank(rank, tensor_parallel)
    limit = max_lora_rank or engine.default_rank
    if slot is None:
        yield Finding("rank-cap", f"rank {rank}, at most {engine.slots[-1]}", largest)
    elif max_lora_rank and rank > max_lora_rank:
        shown = f"rank {rank} is above {engine.rank_flag} {max_lora_rank}"
        yield Finding("rank-limit", shown, largest)
    elif limit and rank > limit:
        shown = f"rank {rank} is above {limit}, the default of {engine.rank_flag}"
        start = f"start it with {engine.rank_flag} {slot}, or lower the rank: merge --rank"
        yield Finding("rank-default", shown, largest, start)
    elif slot != rank:
        advice = f"rank {slot} costs no more memory"
        yield Finding("rank-slot", f"rank {rank} takes a slot of rank {slot}", largest, advice)
    per_gpu = engine.padded_rank(rank, tensor_parallel) // tensor_parallel
    if engine.fastest_rank and per_gpu > engine.fastest_rank:
        shown = f"rank {rank} is {per_gpu} per GPU, above {engine.fastest_rank}"
        yield Finding("rank-slow", shown, largest)
    odd = tuple(site.stem for site in sites if site.dtype.startswith("F8") and site.rank % 16)
    if odd:
        shown = f"{few(odd)}: FP8 factors of rank {file.sites[odd[0]].rank}, no multiple of 16"
        yield Finding("fp8-rank", shown, odd)


def _lora(file: AdapterFile) -> list[Site]:
    return [site for site in file.sites.values() if site.kind in LORA_KINDS]


def mixed_ranks(
    file: AdapterFile, taken: Sequence[Site], engine: Engine, tensor_parallel: int
) -> Findings:
    """Ranks that differ between modules, or between the layers of one kind of module."""
    found = grouped((site.rank, site.stem) for site in _lora(file))
    if len(found) > 1:
        low, high = min(found), max(found)
        shown = f"rank {low} in {few(found[low])}, rank {high} in {few(found[high])}"
        yield Finding("mixed-ranks", shown, found[low])
    for kind in module_types(taken, engine):
        padded = grouped((engine.padded_rank(s.rank, tensor_parallel), s.stem) for s in kind.sites)
        if len(padded) > 1:
            low, high = min(padded), max(padded)
            shown = f"rank {low} after padding in {few(padded[low])}, {high} in {few(padded[high])}"
            yield Finding("mixed-type", shown, padded[low])


def scales(
    file: AdapterFile, scaled: Sequence[Site], engine: Engine, tensor_parallel: int
) -> Findings:
    """Scales that come out differently, by how much, and those that cost a rounding."""
    known = [site for site in scaled if math.isfinite(site.scale)]
    wrong = [
        ((cause, site.scale, scale), site.stem)
        for site, scale, cause in served(file, known, engine, tensor_parallel)
        if not math.isclose(scale, site.scale, rel_tol=1e-5)
    ]
    for (cause, own, other), stems in grouped(wrong).items():
        if own and other:
            ratio = own / other
            weak = ratio > 1
            off = f"{ratio:.4g} times too weak" if weak else f"{1 / ratio:.4g} times too strong"
        else:
            off = "not at all" if own else "which should have no effect"
        shown = f"{few(stems)}: scale {own:.6g}, served with {other:.6g}, {off}"
        shown += f", on {tensor_parallel} GPUs" if tensor_parallel > 1 else ""
        legal = engine.legal_rank(max(site.rank for site in known), tensor_parallel)
        todo = f"write it anew with merge --rank {legal}" if cause == "padding" else ""
        yield Finding(f"scale-{cause}", shown, stems, todo)
    odd = [site for site in known if engine.rounds_scale and abs(math.frexp(site.scale)[0]) != 0.5]
    if odd:
        stems = tuple(site.stem for site in odd)
        shown = f"{few(stems)}: scale {odd[0].scale:.6g}, no power of two"
        yield Finding("scale-rounding", shown, stems)


def profile(file: AdapterFile, engine: Engine) -> Findings:
    """What keeps a file from the portable profile, beside what single engines mind."""
    found = sorted({site.rank for site in _lora(file)})
    if found and (len(found) > 1 or found[0] not in engine.ranks):
        yield Finding("rank-portable", f"rank {' and '.join(map(str, found))}")
    wide = sorted({site.dtype for site in file.sites.values()} - {*engine.slot_dtypes})
    if wide:
        yield Finding("dtype", f"its factors are {' and '.join(wide)}")
