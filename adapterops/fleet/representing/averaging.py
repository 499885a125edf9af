"""Averages for the groups of a partition, written side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from adapterops.errors import AdapterOpsError
from adapterops.fleet.grouping.groups import Value, fits
from adapterops.fleet.representing.representative import Chosen
from adapterops.fleet.signing.signature import signature
from adapterops.fleet.types import Record, Signature
from adapterops.fleet.verifying.exact import Error
from adapterops.formats.names import DIRECTORIES
from adapterops.stream import Compute, Job, alone, run

Make = Callable[..., Chosen]
FILE = "adapter.safetensors"  # of a dialect that is no directory
NAME = "representative"  # as its sidecar says, whatever number it was made under


@dataclass(frozen=True, slots=True)
class Asked:
    """A group that an average may serve better than the original of `center`.

    `allowed` are the tenants that may be averaged in, `limits` the largest error that each member
    may have, `errors` those by the original, empty where they are not known.
    """

    center: Record
    records: Sequence[Record]
    allowed: Sequence[str]
    limits: Mapping[str, float]
    errors: Mapping[str, Error]


@dataclass(frozen=True, slots=True)
class Average:
    """What was chosen for a group: `signature` of the file in `folder`, None for an original."""

    chosen: Chosen
    folder: Path
    signature: Signature | None = None


def averages(
    asked: Sequence[Asked], inside: Path, *, seed: int, make: Make, value: Value, on: Compute
) -> Generator[Average, None, None]:
    """The choice for each group, in order; each average is written to a folder `inside`.

    `make` is `representative.choose` with the options that all have in common. Raises what it does,
    but for a member's file: where that cannot be read, its error is the only one of the original.
    Other machines that `on` spreads over must see `inside` by its name.
    """
    if not asked:
        return
    if on.spread is not None:
        work = partial(_far, inside, seed, make, value, on.share)
        with closing(on.spread(work, enumerate(asked))) as found:
            yield from found
        return
    wide = min(on.threads, len(asked))
    share = replace(on, threads=max(1, on.threads // wide), memory=on.memory // wide)
    jobs = []
    for n, each in enumerate(asked):
        args = (each, inside / str(n) / NAME, seed, make, value, share)
        jobs.append(Job(each.center.tenant.name, _average, args, 0))
    with closing(run(jobs, replace(on, threads=wide))) as results:
        yield from results


def _far(
    inside: Path,
    seed: int,
    make: Make,
    value: Value,
    share: int | None,
    item: tuple[int, Asked],
) -> Average:
    """`_average` in another process, in a folder of this attempt alone: it may not be the first."""
    n, asked = item
    folder = Path(tempfile.mkdtemp(prefix=f"{n}-", dir=inside)) / NAME
    return _average(asked, folder, seed, make, value, alone(share))


def _average(
    asked: Asked, folder: Path, seed: int, make: Make, value: Value, on: Compute
) -> Average:
    is_folder = asked.center.dialect in DIRECTORIES
    folder.parent.mkdir(exist_ok=True)
    if not is_folder:
        folder.mkdir()
    try:
        made = make(
            asked.center,
            asked.records,
            out=folder if is_folder else folder / FILE,
            on=on,
            allowed=asked.allowed,
            max_error=min(asked.limits.values()),
            errors=asked.errors,
        )
    except AdapterOpsError as said:
        bad = [r for r in asked.records if f"{said.path}/".startswith(f"{r.tenant.location}/")]
        if not bad:
            raise
        return Average(_unmade(asked.center, bad[0], said), folder)
    if not made.path:
        return Average(made, folder)
    for name, error in made.errors.items():
        if not isinstance(error, Error) or not fits(error, asked.limits[name], value):
            figure = f"{value(error):.3g}" if isinstance(error, Error) else error.message
            reason = f"an original: for one of them the {made.kind} is above its bound: {figure}"
            return Average(replace(made, path="", kind="medoid", reason=reason), folder)
    return Average(made, folder, signature(made.path, seed))


def _unmade(center: Record, bad: Record, error: AdapterOpsError) -> Chosen:
    """The original of `center`, where a member's file cannot be read any more."""
    return Chosen(
        kind="medoid",
        center=center.tenant.name,
        path="",
        errors={bad.tenant.name: error},
        holds=(center.tenant.name,),
        rank=center.rank,
        size=center.size,
        dtype=center.dtype,
        reason=f"an original: no average could be made: {error.message}",
    )
