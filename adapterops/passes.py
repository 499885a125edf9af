"""Passes over a plan, as jobs: hashes, singular values, finished tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

from adapterops import kernels
from adapterops.certificate import Figures
from adapterops.dense import DensePiece, summed
from adapterops.dense import peak as dense_peak
from adapterops.kernels import Piece
from adapterops.linalg import Spectrum
from adapterops.plan import Module, Plan
from adapterops.provenance import file_sha256
from adapterops.stream import Compute, Job, run

Progress = Callable[[str, int, int], None]
_BATCH_BYTES = 256 << 20
_HASH_BYTES = 4 << 20


def spectra(plan: Plan, on: Compute, progress: Progress | None) -> list[Spectrum]:
    """Singular values of every module's exact sum."""
    jobs = _jobs(plan, kernels.spectra, (on.device,), 0, on)
    return list(_watched(run(jobs, on), plan, "singular values", progress))


def pieces(
    plan: Plan, rank: int, on: Compute, progress: Progress | None
) -> Generator[Piece, None, None]:
    """Every module's sum at one rank, stored and measured."""
    jobs = _jobs(plan, kernels.factors, (rank, plan.dtype, on.device), rank, on)
    return _watched(run(jobs, on), plan, "merging", progress)


def measures(
    plan: Plan, on: Compute, progress: Progress | None
) -> Generator[tuple[str, Figures], None, None]:
    """Every module's figures where its only factor pair is copied."""
    jobs = _jobs(plan, kernels.measures, (), 1, replace(on, device="cpu"))
    return _watched(run(jobs, on), plan, "copying", progress)


def dense(plan: Plan, on: Compute) -> Generator[DensePiece, None, None]:
    """Every full delta, summed and stored."""
    jobs = (
        Job(delta.name, summed, (delta, plan.dtype), dense_peak(delta)) for delta in plan.deltas
    )
    return run(jobs, on)


def sha256s(plan: Plan, on: Compute) -> list[str]:
    """The hash of every input's weights file."""
    files = [file.weights_file for file in plan.inputs]
    return list(run([Job(path, file_sha256, (path,), _HASH_BYTES) for path in files], on))


def _jobs(
    plan: Plan, kernel: Callable[..., list[Any]], args: tuple[Any, ...], rank: int, on: Compute
) -> Iterator[Job[list[Any]]]:
    """One job per module on the CPU, one per batch of equal modules on a device.

    Experts that share their tensors share a job, which reads these once. How modules are batched
    depends on their shapes alone, so the result does not depend on memory.
    """
    groups: dict[Any, list[Module]] = defaultdict(list)
    for position, module in enumerate(plan.modules):
        alike = (module.shape, tuple(part.site.rank for part in module.parts))
        if on.device == "cpu":
            groups[(module.tensors, *alike) if module.expert else position].append(module)
        else:
            groups[alike].append(module)
    for members in groups.values():
        count = max(1, _BATCH_BYTES // max(1, kernels.peak(members[:1], rank)))
        for start in range(0, len(members), count):
            batch = tuple(members[start : start + count])
            yield Job(batch[0].stem, kernel, (batch, *args), kernels.peak(batch, rank))


def _watched(
    results: Generator[list[Any], None, None], plan: Plan, what: str, progress: Progress | None
) -> Generator[Any, None, None]:
    done = 0
    with closing(results):
        for result in results:
            yield from result
            done += len(result)
            if progress:
                progress(what, done, len(plan.modules))
