"""Two adapters: every module, the totals, the extras, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from adapterops.adapter import Adapter
from adapterops.casts import format_name
from adapterops.certificate import ratio, total
from adapterops.difference import dense, kernels
from adapterops.difference.report import (
    DeltaDifference,
    Extras,
    ModuleDifference,
    PairDifference,
    Spread,
)
from adapterops.difference.task import Task
from adapterops.difference.verdict import Whole, judge, residual_at
from adapterops.files.source import LocalFile, Source, read_bytes
from adapterops.formats import peft
from adapterops.formats.model import Ref
from adapterops.geometry import cosine_of
from adapterops.stream import Job

_AT_ONCE = 4 << 20


def compare_pair(task: Task) -> tuple[PairDifference, Whole]:
    """All that sets two adapters apart, and the totals that it rests on."""
    sides = {module.stem: task.parts(module) for module in task.plan.modules}
    jobs = [
        Job(
            batch[0].stem,
            kernels.module_differences,
            (batch, [sides[module.stem] for module in batch]),
            kernels.peak(batch),
        )
        for batch in task.batches()
    ]
    stems = [module.stem for batch in task.batches() for module in batch]
    found = [one for batch in task.run(jobs) for one in batch]
    modules = dict(zip(stems, found, strict=True))
    full = task.deltas()
    dense_jobs = [Job(one.name, dense.dense_difference, (one,), dense.peak(one)) for one in full]
    deltas = dict(zip([one.name for one in full], task.run(dense_jobs), strict=True))
    extras = _extras(task.adapters)
    whole = _whole(task.adapters, modules, deltas)
    return PairDifference(
        verdict=judge(whole, modules, deltas, extras),
        norms=whole.norms,
        distance=whole.distance,
        relative=ratio(whole.distance, whole.norms[0]),
        cosine=whole.cosine,
        ratio=whole.ratio,
        residual=whole.residual,
        floor=whole.floor,
        noise=whole.noise,
        spread=_spread(modules),
        modules=modules,
        only_a=tuple(stem for stem, (_, second) in sides.items() if not second),
        only_b=tuple(stem for stem, (first, _) in sides.items() if not first),
        deltas=deltas,
        extras=extras,
    ), whole


def _whole(
    adapters: Sequence[Adapter],
    modules: Mapping[str, ModuleDifference],
    deltas: Mapping[str, DeltaDifference],
) -> Whole:
    parts: list[ModuleDifference | DeltaDifference] = [*modules.values(), *deltas.values()]
    norm_a, norm_b = (total([x.norms[side] for x in parts]) for side in (0, 1))
    noise_a, noise_b = (total([x.noise[side] for x in parts]) for side in (0, 1))
    zero_a, zero_b = (all(x.zero[side] for x in parts) for side in (0, 1))
    product = math.fsum(x.cosine * x.norms[0] * x.norms[1] for x in parts)
    factor = None if zero_a else product / norm_a / norm_a
    equal = all(m.factors == "equal" for m in modules.values())
    same = equal and not any(d.distance for d in deltas.values()) and _same_bytes(adapters)
    return Whole(
        norms=(norm_a, norm_b),
        distance=total([x.distance for x in parts]),
        cosine=0.0 if zero_a or zero_b else cosine_of(product, norm_a, norm_b),
        ratio=factor,
        residual=total([residual_at(x, factor or 0.0) for x in parts]),
        noise=(noise_a, noise_b),
        floor=total([x.floor for x in parts]),
        zero=(zero_a, zero_b),
        identical=same,
        dtypes=(_dtype(adapters[0]), _dtype(adapters[1])),
    )


def _dtype(adapter: Adapter) -> str:
    return " and ".join(sorted({format_name(file.dtype) for _, file in adapter.terms}))


def _spread(modules: Mapping[str, ModuleDifference]) -> dict[str, Spread]:
    """Over the modules that both adapters have and that are zero in neither."""
    both = [m for m in modules.values() if m.factors != "alone" and not any(m.zero)]
    figures = {
        "relative": [m.relative for m in both if m.relative is not None],
        "cosine": [m.cosine for m in both],
        "columns": [m.columns.degrees[-1] for m in both],
        "rows": [m.rows.degrees[-1] for m in both],
    }
    return {
        name: Spread(min(values), math.fsum(values) / len(values), max(values))
        for name, values in figures.items()
        if values
    }


def _same_bytes(adapters: Sequence[Adapter]) -> bool:
    """Whether both are one file each, of the same bytes."""
    if any(len(adapter.terms) > 1 for adapter in adapters):
        return False
    first, second = (LocalFile(adapter.terms[0][1].weights_file) for adapter in adapters)
    try:
        return first.size() == second.size() and _equal((first, 0), (second, 0), first.size())
    finally:
        first.close()
        second.close()


def _equal(first: tuple[Source, int], second: tuple[Source, int], size: int) -> bool:
    """Whether so many bytes from two places in files are the same, a stretch at a time."""
    for start in range(0, size, _AT_ONCE):
        length = min(_AT_ONCE, size - start)
        one, other = (read_bytes(file, at + start, length) for file, at in (first, second))
        if one != other:
            return False
    return True


def _extras(adapters: Sequence[Adapter]) -> Extras:
    """The extras of two files, by name; a sum of files has none of its own."""
    if any(len(adapter.terms) > 1 for adapter in adapters):
        return Extras()
    first, second = (
        {peft.extra_name(name, ()): ref for name, ref in adapter.terms[0][1].extras.items()}
        for adapter in adapters
    )
    both = sorted(first.keys() & second.keys())
    equal = [name for name in both if _same_tensor(first[name], second[name])]
    return Extras(
        equal=tuple(equal),
        differ=tuple(sorted(set(both) - set(equal))),
        only_a=tuple(sorted(first.keys() - second.keys())),
        only_b=tuple(sorted(second.keys() - first.keys())),
    )


def _same_tensor(first: Ref, second: Ref) -> bool:
    """Whether two tensors are equal in type, shape and every bit."""
    alike = (first.dtype, first.shape) == (second.dtype, second.shape)
    places = (first.source, first.offset), (second.source, second.offset)
    return alike and _equal(*places, first.nbytes)
