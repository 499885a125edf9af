"""Passes over a plan, as jobs: hashes, singular values, finished tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from adapterops import kernels, rangefinder
from adapterops.certificate import Figures
from adapterops.dense import DensePiece, summed
from adapterops.dense import peak as dense_peak
from adapterops.linalg import Form, Spectrum
from adapterops.plan import Module, Plan
from adapterops.provenance import file_sha256
from adapterops.storing import Piece
from adapterops.stream import Compute, Job, run

Progress = Callable[[str, int, int], None]
_BATCH_BYTES = 256 << 20
_HASH_BYTES = 4 << 20


def spectra(plan: Plan, cap: int, on: Compute, progress: Progress | None) -> list[Spectrum]:
    """Singular values of every module's exact sum, in the plan's order; of dense changes at most
    `cap`."""
    jobs = _jobs(plan, kernels.spectra, (cap, on.device), cap, on)
    found = dict(_watched(run(jobs, on), plan, "singular values", progress))
    return [found[module.stem] for module in plan.modules]


def pieces(
    plan: Plan, form: Form, on: Compute, progress: Progress | None
) -> Generator[Piece, None, None]:
    """Every module's sum at its rank, stored and measured."""
    jobs = _jobs(plan, kernels.factors, (plan.dtype, form, on.device), None, on)
    return _watched(run(jobs, on), plan, "factors", progress)


def measures(
    plan: Plan, on: Compute, progress: Progress | None
) -> Generator[tuple[str, Figures], None, None]:
    """Every module's figures where its only factor pair is copied."""
    jobs = _jobs(plan, kernels.measures, (), None, replace(on, device="cpu"))
    return _watched(run(jobs, on), plan, "copying", progress)


def dense(plan: Plan, on: Compute) -> Generator[DensePiece, None, None]:
    """Every full delta, summed and stored."""
    jobs = (
        Job(delta.name, summed, (delta, plan.dtype), dense_peak(delta)) for delta in plan.deltas
    )
    return run(jobs, on)


def sha256s(files: Sequence[str], on: Compute) -> list[str]:
    """The hash of every file."""
    return list(run([Job(path, file_sha256, (path,), _HASH_BYTES) for path in files], on))


def _jobs(
    plan: Plan,
    kernel: Callable[..., list[Any]],
    args: tuple[Any, ...],
    cap: int | None,
    on: Compute,
) -> Iterator[Job[list[Any]]]:
    """One job per module on the CPU, one per batch of equal modules on a device.

    Experts that share their tensors share a job, which reads these once. How modules are batched
    depends on their shapes alone, so the result does not depend on memory.
    """
    groups: dict[Any, list[Module]] = defaultdict(list)
    for position, module in enumerate(plan.modules):
        widths = tuple(part.site.rank for part in module.parts)
        alike = (module.shape, widths, module.kept, rangefinder.is_dense(module))
        if on.device == "cpu":
            groups[(module.tensors, *alike) if module.expert else position].append(module)
        else:
            groups[(module.inputs, *alike)].append(module)
    for members in groups.values():
        count = max(1, _BATCH_BYTES // max(1, kernels.peak(members[:1], cap)))
        for start in range(0, len(members), count):
            batch = tuple(members[start : start + count])
            yield Job(batch[0].stem, kernel, (batch, *args), kernels.peak(batch, cap))


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
