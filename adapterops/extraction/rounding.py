"""Whether two checkpoints differ by more than the rounding of the format they are stored in."""

from __future__ import annotations

from collections.abc import Sequence

from adapterops.casts import format_name
from adapterops.certificate import Report, total
from adapterops.extraction.pairing import Pair

_NEAR = 2.0
_SHOWN = 3


def notes(report: Report, dtype: str) -> list[str]:
    """What to say where ‖tuned − base‖ is near √(Σ ulp²/12), what rounding alone would make it.

    That noise is of full rank: no LoRA holds it, and what it costs is not what training did.
    """
    noise = {stem: module.noise or 0.0 for stem, module in report.modules.items()}
    whole = total(list(noise.values()))
    near = [
        stem for stem, module in report.modules.items() if 0 < module.norm < _NEAR * noise[stem]
    ]
    result = []
    if whole and report.norm < _NEAR * whole:
        result.append(
            f"the difference is {report.norm / whole:.2g} times what rounding to "
            f"{format_name(dtype)} alone makes: much of it is noise, of full rank, which no rank "
            "reaches"
        )
    elif near:
        shown = ", ".join(near[:_SHOWN]) + (", …" if len(near) > _SHOWN else "")
        result.append(
            f"{len(near)} modules differ by less than {_NEAR:g} times what rounding to "
            f"{format_name(dtype)} alone makes ({shown})"
        )
    return result


def coarsest(pairs: Sequence[Pair]) -> str:
    """The storage type that most of the numbers went through, the coarser one of each pair."""
    order = ("F8_E5M2", "F8_E4M3", "BF16", "F16", "F32", "F64")
    counts: dict[str, int] = {}
    for pair in pairs:
        one = min(pair.base.dtype, pair.tuned.dtype, key=order.index)
        counts[one] = counts.get(one, 0) + pair.tuned.nbytes
    return max(counts, key=lambda name: (counts[name], name), default="F32")
