"""GPU bytes of a fleet before and after, by the engine's own allocation formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapterops.errors import IncompatibleError
from adapterops.fleet.deploy.report import GpuBytes
from adapterops.serving.model import Engine, gpu_bytes
from adapterops.serving.objections import ENGINES
from adapterops.serving.scales import leaf
from adapterops.serving.zeros import BaseShapes, zero_modules

Shapes = Mapping[str, tuple[int, int]]  # module -> (out, in)

# Figures others have measured; none of them is a promise about this fleet (fleet.md, §3).
PUBLISHED: tuple[Mapping[str, str], ...] = (
    {
        "claim": "10 requests/s offered on an A100-80, ranks 8 to 64 mixed: 7.49 requests/s served "
        "with 5 adapters, 6.69 with 1000; first token after 2.7 s and 10.5 s",
        "source": "S-LoRA, raw logs of its repository",
    },
    {
        "claim": "the same at rank 8 throughout: 8.05 and 7.64 requests/s; 0.60 s and 1.90 s; one "
        "rank for all helps more than fewer adapters",
        "source": "S-LoRA, raw logs of its repository",
    },
    {
        "claim": "placing adapters by rank: up to 2 times the throughput, at most a ninth of the "
        "time to the first token",
        "source": "LoRAServe, arXiv 2511.22880 (abstract)",
    },
)


@dataclass(frozen=True, slots=True)
class Held:
    """An adapter in memory: its rank, and Σ(out + in) of its modules; in order of traffic."""

    rank: int
    width: int


def prepared(shapes: Shapes, base: BaseShapes | None) -> tuple[dict[str, tuple[int, int]], str]:
    """The modules that slots are reserved for where an engine prepares the kinds in `shapes`.

    A kind is prepared in every layer, q, k and v together, gate and up together. `base` are the
    base's own shapes by module path; without it layers are counted by what adapters name. The
    second value says where shapes could not be told.
    """
    if base is not None:
        kinds = {leaf(stem) for stem in shapes}
        fused = [group for group in ENGINES["portable"].fill if kinds & set(group)]
        kinds = kinds.union(*fused)
        found = {p: s for p, s in base.items() if leaf(p) in kinds and s and len(s) == 2}
        if found:
            return {path: (shape[0], shape[1]) for path, shape in found.items()}, ""
    try:
        zeros = zero_modules(shapes, ENGINES["portable"], None)
    except IncompatibleError as error:
        missing = f"{error.module} is reserved too, and its shape does not follow from the others"
        return dict(shapes), f"GPU bytes are too low: {missing}; --base gives it"
    return {**shapes, **{stem: zero.shape for stem, zero in zeros.items()}}, ""


def width(shapes: Shapes) -> int:
    """Σ(out + in): numbers per rank."""
    return sum(out + columns for out, columns in shapes.values())


def gpu(
    engine: Engine,
    before: Sequence[Held],
    after: Sequence[Held],
    shapes: Shapes,
    slots: int,
) -> GpuBytes:
    """Memory before and after with at most `slots` adapters on the GPU.

    `shapes` are the modules that slots are reserved for.
    """
    return GpuBytes(
        engine.memory,
        _FORMULAS[engine.memory],
        needed(engine, before, shapes, slots),
        needed(engine, after, shapes, slots),
        max((item.rank for item in before), default=0),
        max((item.rank for item in after), default=0),
        len(before),
        len(after),
    )


_FORMULAS = {
    "slots": "2 bytes · slots · slot rank · Σ(out + in) over all modules that are prepared",
    "adapters": "2 bytes · Σ rank · Σ(out + in) over the adapters on the GPU",
    "unknown": "",
}


def needed(engine: Engine, held: Sequence[Held], shapes: Shapes, slots: int) -> int | None:
    """Bytes on one GPU: of slots of the largest rank, or of the first `slots` adapters."""
    if not held:
        return 0 if engine.memory != "unknown" else None
    if engine.memory == "slots":
        rank = max(item.rank for item in held)
        return gpu_bytes(engine, shapes.values(), adapters=min(slots, len(held)), rank=rank)
    total = 0
    for item in held[:slots]:
        one = gpu_bytes(engine, [(item.width, 0)], adapters=1, rank=item.rank)
        if one is None:
            return None
        total += one
    return total
