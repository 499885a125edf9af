"""The average that would serve a group: which weights, what to expect of it, and writing it."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from adapterops.certificate import Report
from adapterops.fleet.representing import minimax
from adapterops.fleet.representing.coordinates import coordinates
from adapterops.fleet.representing.inputs import columns, commonest_dtype
from adapterops.fleet.types import Array, Record
from adapterops.formats import AdapterFile
from adapterops.prepare import Options
from adapterops.ranks import Ranks
from adapterops.save import save
from adapterops.stream import Compute

Choice = Literal["medoid", "mean", "minimax"]

_ALIKE = 1.01  # a mean whose largest error is within 1 % of the smallest is preferred to it


@dataclass(frozen=True, slots=True)
class Draft:
    """An average before it is written: what each member is multiplied by, what to expect.

    `expected` is the largest error before storage, None where it was not computed.
    """

    kind: Choice
    shares: Mapping[str, float]
    expected: float | None = None
    bound: float | None = None
    note: str = ""


def draft_average(
    held: Sequence[Record],
    files: Sequence[AdapterFile],
    rank: int,
    kinds: Collection[Choice],
    on: Compute,
) -> Draft:
    """The average to write of `held`, whose adapters are `files`, at this rank.

    Where both are among `kinds`, the minimax, unless the mean is as good. Above `minimax.LARGEST`
    columns it is the mean, whatever is asked for, and nothing is known of it beforehand. Raises
    what reading factors raises.
    """
    traffic = np.array([record.tenant.traffic for record in held])
    if not traffic.any():
        traffic = np.ones(len(held))
    norms = np.array([record.norm for record in held])
    plain = traffic * (norms.min() / norms) ** 2
    plain = _rounded(plain / plain.sum())
    wide = columns(files)
    if wide > minimax.LARGEST:
        note = (
            f"its members' ranks add up to {wide}: only up to {minimax.LARGEST} is the best "
            "average sought"
        )
        return Draft("mean", _named(held, plain), note=note)
    group = minimax.members(coordinates(files, on))
    expected = math.sqrt(float(minimax.evaluate(group, plain, rank)[0].max()))
    found = minimax.minimax(group, rank, starts=[plain])
    mean = Draft("mean", _named(held, plain), expected, found.bound)
    if "minimax" not in kinds or ("mean" in kinds and expected <= _ALIKE * found.error):
        return mean
    shares = _rounded(found.coefficients)
    expected = math.sqrt(float(minimax.evaluate(group, shares, rank)[0].max()))
    return Draft("minimax", _named(held, shares), expected, found.bound)


def _rounded(shares: Array) -> Array:
    """Six digits, which go into the file's provenance: measured floats do not."""
    return np.array([float(f"{share:.6g}") if share > 1e-6 else 0.0 for share in shares])


def _named(held: Sequence[Record], shares: Array) -> dict[str, float]:
    pairs = zip(held, shares.tolist(), strict=True)
    return {record.tenant.name: share for record, share in pairs if share}


def write_average(
    held: Sequence[Record],
    files: Sequence[AdapterFile],
    draft: Draft,
    rank: int,
    out: str | os.PathLike[str],
    dtype: str,
    on: Compute,
) -> Report:
    """Write a draft and return its certificate; `dtype` keep: what most of the files are in.

    Raises what `save` raises; nothing is left then.
    """
    chosen = [
        (file, draft.shares[record.tenant.name])
        for record, file in zip(held, files, strict=True)
        if record.tenant.name in draft.shares
    ]
    inputs = [file for file, _ in chosen]
    stored = commonest_dtype(inputs) if dtype == "keep" else dtype
    options = Options(
        os.fspath(out), Ranks(rank=rank), recorded={"representative": draft.kind}, dtype=stored
    )
    report = save(inputs, [share for _, share in chosen], options, on)
    assert isinstance(report, Report)
    return report
