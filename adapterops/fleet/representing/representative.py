"""Which adapter serves a group: one of its own, or an average written for it.

`medoid` is the original in the middle, which needs no new file and was really trained. `mean` is
the rank-r part of the average with weights traffic/‖D‖², which minimises the mean squared relative
error over requests; `minimax` that with the weights for which the largest relative error is
smallest (`minimax`). An average is written by the one evaluator that writes merges, at the largest
rank among the members unless told otherwise, and what it costs each member is measured on the bytes
written. Beside a medoid it is taken where it lowers the largest error by a tenth and by a hundredth
of a member's change. Two equally far members gain a half and many at least 29 % (1 − 1/√2), so less
than a tenth is what rounding to rank r or an outlier left; and below a hundredth lie the number
formats.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from adapterops.activations import Activations
from adapterops.errors import AdapterOpsError, IncompatibleError, NumericsError
from adapterops.fleet.consent.policy import NEAR_EXACT
from adapterops.fleet.plans.plan import Kind
from adapterops.fleet.representing.average import Choice, draft_average, write_average
from adapterops.fleet.representing.inputs import by_content, opened
from adapterops.fleet.types import Record
from adapterops.fleet.verifying.exact import Error, Result, compare_many
from adapterops.layout import sidecar_name
from adapterops.stream import Compute

KINDS: tuple[Choice, ...] = ("medoid", "mean", "minimax")
_GAIN, _LEAST = 0.1, 0.01
_SHOWN = 1e-9  # below it rounding decides


@dataclass(frozen=True, slots=True)
class Chosen:
    """What serves a group.

    `path` is the file or directory written, "" where the original of `center` serves. `errors` are
    the members', by tenant, as measured on the bytes; a member that could not be read has its
    error instead. `holds` are the tenants whose weights are in it, `bound` a proven lower bound of
    the largest error of any adapter of `rank` over the members that may be averaged, where one was
    computed. `size` is bytes of the weights file.
    """

    kind: Kind
    center: str
    path: str
    errors: Mapping[str, Result]
    holds: tuple[str, ...]
    rank: int
    size: int
    dtype: str
    reason: str
    bound: float | None = None

    @property
    def largest(self) -> float:
        """The largest error of a member that could be measured, in the metric asked for."""
        return _largest(self.errors)


def choose(
    center: Record,
    members: Sequence[Record],
    *,
    out: str | os.PathLike[str],
    on: Compute,
    rank: int | Literal["same"] | None = None,
    kinds: Collection[Choice] = KINDS,
    allowed: Collection[str] | None = None,
    max_error: float | None = None,
    dtype: str = "keep",
    activations: Activations | None = None,
    allow_pickle: bool = False,
    errors: Mapping[str, Result] | None = None,
) -> Chosen:
    """The representative of `members`, of which `center` is the one whose original may serve all.

    `out` is where an average would be written, in the members' dialect; nothing is left there
    where the original serves. `rank` is that of an average: the members' largest where None or
    "same". `allowed` are the tenants that may be averaged in, all by default. Where `max_error` is
    given, an average that keeps it is worth a file however small the gain if the original does not.
    `dtype` "keep" is the commonest of the members'. `activations` make errors those of outputs.
    `errors` are the members' by the original of `center`, where they are known already.

    Without "medoid" among `kinds` an average is taken whatever it gains; where none can be made,
    the original serves all the same, and the reason says why. Raises what reading the center and
    what writing raises, UsageError where `out` exists.
    """
    on_bytes = _Measure(members, on, activations, allow_pickle)
    medoid = _original(center, members, errors or on_bytes.of(center.tenant.location))
    if len(members) == 1:
        return medoid
    if "medoid" in kinds:
        if medoid.largest <= NEAR_EXACT:
            largest = f"{max(medoid.largest, _SHOWN):.0e}"
            reason = f"an original: the others differ from it by at most {largest} of their change"
            return replace(medoid, reason=reason)
        if medoid.largest < _LEAST and (max_error is None or medoid.largest <= max_error):
            return replace(medoid, reason=f"an original: its largest error is {medoid.largest:.1g}")
        if set(kinds) == {"medoid"}:
            return replace(medoid, reason="one of the originals, as asked")
    held = _averaged(members, medoid.errors, allowed)
    if len(held) < 2:
        reason = f"an original: of {len(members)} members only {len(held)} may be averaged in"
        return replace(medoid, reason=reason)
    wanted = rank if isinstance(rank, int) else max(record.rank for record in members)
    try:
        with opened(held, allow_pickle=allow_pickle) as files:
            draft = draft_average(held, files, wanted, kinds, on)
            medoid = replace(medoid, bound=draft.bound)
            known = draft.expected if "medoid" in kinds and activations is None else None
            if known is not None and not _is_worth(known, medoid.largest, max_error):
                return replace(medoid, reason=_kept_for(medoid.largest, known))
            report = write_average(held, files, draft, wanted, out, dtype, on)
    except (NumericsError, IncompatibleError) as error:
        return replace(medoid, reason=f"an original: no average could be made: {error.message}")
    made = replace(
        medoid,
        kind=draft.kind,
        path=report.output,
        errors=on_bytes.of(report.output),
        holds=tuple(sorted(draft.shares)),
        rank=report.rank,
        size=report.size,
        dtype=report.dtype,
        bound=draft.bound,
    )
    if "medoid" in kinds and not _is_worth(made.largest, medoid.largest, max_error):
        _remove(report.output)
        return replace(medoid, reason=_kept_for(medoid.largest, made.largest))
    return replace(made, reason=_reason(made, medoid.largest, draft.note))


class _Measure:
    """Errors of all members by what serves them."""

    def __init__(
        self,
        members: Sequence[Record],
        on: Compute,
        activations: Activations | None,
        allow_pickle: bool,
    ) -> None:
        self._members = members
        self._on = on
        self._activations = activations
        self._allow_pickle = allow_pickle

    def of(self, path: str) -> dict[str, Result]:
        """The errors by tenant."""
        results = compare_many(
            path,
            [record.tenant.location for record in self._members],
            self._on,
            activations=self._activations,
            allow_pickle=self._allow_pickle,
        )
        names = [record.tenant.name for record in self._members]
        return dict(zip(names, results, strict=True))


def _original(center: Record, members: Sequence[Record], errors: Mapping[str, Result]) -> Chosen:
    own = errors[center.tenant.name]
    if isinstance(own, AdapterOpsError):
        raise own
    alone = len(members) == 1
    name = center.tenant.name
    itself = replace(
        own,
        error=0.0,
        missing=0.0,
        foreign=0.0,
        cosine=1.0,
        worst=(own.worst[0], 0.0),
        measured=None if own.measured is None else 0.0,
    )
    return Chosen(
        kind="original" if alone else "medoid",
        center=name,
        path="",
        errors={**errors, name: itself},
        holds=(name,),
        rank=center.rank,
        size=center.size,
        dtype=center.dtype,
        reason="nobody shares it" if alone else "",
    )


def _averaged(
    members: Sequence[Record], errors: Mapping[str, Result], allowed: Collection[str] | None
) -> list[Record]:
    """Those that may be in an average and have something to give, by what they hold."""
    return by_content(
        [
            record
            for record in members
            if (allowed is None or record.tenant.name in allowed)
            and isinstance(errors[record.tenant.name], Error)
            and record.norm > 0.0
        ]
    )


def _largest(errors: Mapping[str, Result]) -> float:
    found = [error for error in errors.values() if isinstance(error, Error)]
    return max(e.error if e.measured is None else e.measured for e in found)


def _remove(output: str) -> None:
    """Take away an average that is not used."""
    path = Path(output)
    if path.is_dir():
        shutil.rmtree(path)
        return
    path.unlink()
    path.with_name(sidecar_name(path)).unlink(missing_ok=True)


def _is_worth(error: float, original: float, max_error: float | None) -> bool:
    """Whether an average's largest error is enough below that of an original."""
    if max_error is not None and original > max_error:
        return error <= max_error
    return error <= (1 - _GAIN) * original and error <= original - _LEAST


def _kept_for(original: float, average: float) -> str:
    if average >= original:
        return f"an original: its largest error is {original:.3g}, that of an average {average:.3g}"
    return (
        f"an original: an average would lower the largest error from {original:.3g} to "
        f"{average:.3g} only, not worth a new file"
    )


def _reason(made: Chosen, original: float, note: str) -> str:
    how = {
        "mean": "the average by traffic",
        "minimax": "the average whose largest error is smallest",
    }[made.kind]
    bound = f" (no adapter of rank {made.rank} gets below {made.bound:.3g})" if made.bound else ""
    return (
        f"{how}, of {len(made.holds)} members: at most {made.largest:.3g} of a member's change is "
        f"off{bound}, against {original:.3g} with one original for all"
        + (f"; {note}" if note else "")
    )
