"""What `drift` reports: the verdicts on a merge, tensor by tensor and in all."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from adapterops.baking.report import Total, figures_of, total_of
from adapterops.casts import format_name
from adapterops.certificate import plain
from adapterops.judging.chain import ChainReport
from adapterops.judging.forward import ForwardReport
from adapterops.judging.intruders import Intruders
from adapterops.judging.ladder import RUNGS
from adapterops.judging.logits import LogitsReport
from adapterops.judging.trend import BINS, detectable
from adapterops.judging.untargeted import Copied, Finding, Matched
from adapterops.judging.verdict import (
    GUESSED,
    Cause,
    Implementation,
    Judged,
    Representation,
)

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class TensorVerdict:
    """One tensor that the adapters change; figures as `baking.figures.Drift` defines them.

    `dtype` is the type of the values, as users write it, `stored` that of the file. `rung` is the
    lowest of the ladder that explains it and `model` that in words; None and "" where none does.
    `unexplained` are the shares of elements that rungs 0 to 5 leave. `slope` is what a scale error
    would show as, `z` the same in standard errors, `detectable` the smallest scale error that would
    have shown, None where none up to 16 times would. `expected` is how many elements a right merge
    moves. `cause` says what happened, where the implementation failed.
    """

    shape: tuple[int, ...]
    dtype: str
    stored: str
    implementation: Implementation
    representation: Representation
    rung: int | None
    model: str
    unexplained: tuple[float, ...]
    slope: float
    z: float
    detectable: float | None
    norm: float
    gain: float | None
    subspace_error: float | None
    error: float | None
    swallowed: float
    changed: float
    expected: int
    subnormal: int
    ulp_max: float
    bias_z: float
    cause: Cause | None = None


@dataclass(frozen=True, slots=True)
class DriftReport:
    """Whether a merge is right, and what its number format kept of the adapters.

    `implementation` is the verdict on the tool: failed where a tensor, the rest of the model or its
    config is wrong; undetermined where a right merge moves nothing at all. `representation` is that
    on the format. `rung` is the highest that any tensor needed, `model` that in words.
    `detectable` is the smallest scale error of the whole adapter that would have shown. `tensors`
    are ordered: failed first, then by subspace error, worst first; those whose change is 0 are
    `unchanged`. `findings` are what is wrong, or worth knowing, about everything else; `identical`
    and `converted` count its tensors that are right. `summary` says what happened in a few
    sentences. `max_drift` is the bound asked for on the total subspace error, `strict` makes a
    warning count as a failure in the exit code.
    """

    schema: ClassVar[str] = "adapterops.drift/1"

    base: str
    adapters: tuple[tuple[str, float], ...]
    baked: str
    implementation: Implementation
    representation: Representation
    rung: int | None
    model: str
    detectable: float | None
    total: Total | None
    tensors: Mapping[str, TensorVerdict]
    summary: tuple[str, ...]
    findings: tuple[Finding, ...] = ()
    unchanged: tuple[str, ...] = ()
    identical: int = 0
    converted: Mapping[str, int] = field(default_factory=dict)
    values: tuple[str, ...] = ()
    renamed: int = 0
    max_drift: float | None = None
    strict: bool = False
    forward: ForwardReport | None = None
    logits: LogitsReport | None = None
    intruders: Mapping[str, Intruders] | None = None
    chain: ChainReport | None = None
    mitigated: str | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def over_budget(self) -> bool:
        """Whether the total subspace error is above the bound asked for."""
        found = self.total.subspace_error if self.total else None
        return self.max_drift is not None and found is not None and found > self.max_drift

    @property
    def exit_code(self) -> int:
        """0 where the tool did right; 5 where not, above the bound, or if strict with a warning."""
        warned = self.strict and bool(self.warnings)
        return 5 if self.implementation == "failed" or self.over_budget or warned else 0

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        found = plain(replace(self, forward=None, logits=None, intruders=None, chain=None))
        for name in ("forward", "logits", "chain"):
            part = getattr(self, name)
            found[name] = None if part is None else part.to_dict()
        if self.intruders is not None:
            found["intruders"] = {n: each.to_dict() for n, each in self.intruders.items()}
        return {"schema": self.schema, "exit_code": self.exit_code, **found}


def report(
    base: str,
    adapters: Sequence[tuple[str, float]],
    baked: str,
    matched: Matched,
    judged: Sequence[Judged],
    copied: Sequence[Copied],
    findings: Sequence[Finding] = (),
    *,
    max_drift: float | None = None,
    warnings: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> DriftReport:
    """The whole verdict.

    `judged` are all of `matched.targets`, with their causes, `copied` all of its copies; `findings`
    are those of values and configs, `matched`'s own are added.
    """
    every = [*matched.findings, *(c.finding for c in copied if c.finding), *findings]
    wrong = [t for t in judged if t.implementation == "failed"]
    moving = [t for t in judged if t.drift.delta or t.implementation == "failed"]
    unchanged = [t.name for t in judged if not t.drift.delta and t.implementation != "failed"]
    order = sorted(
        moving,
        key=lambda t: (t.implementation != "failed", -(t.drift.subspace_error or 0.0), t.name),
    )
    verdict: Implementation = "ok"
    if wrong or any(finding.fails for finding in every):
        verdict = "failed"
    elif moving and all(t.implementation == "undetermined" for t in moving):
        verdict = "undetermined"
    rungs = [t.rung for t in moving if t.implementation == "ok" and t.rung is not None]
    highest = max(rungs, default=None)
    guessed = any(t.route.guessed for t in moving if t.implementation == "ok")
    total = total_of([t.drift for t in judged])
    changes = sum((np.asarray(t.changes) for t in moving if t.changes is not None), np.zeros(BINS))
    smallest = detectable(changes)
    kept: Representation = "ok"
    if any(t.representation == "lossy" for t in moving):
        kept = "lossy"
    return DriftReport(
        base=base,
        adapters=tuple(adapters),
        baked=baked,
        implementation=verdict,
        representation=kept,
        rung=highest,
        model="" if highest is None else GUESSED if guessed else RUNGS[highest],
        detectable=smallest,
        total=total,
        tensors={t.name: _tensor(t) for t in order},
        summary=(*_said(moving, wrong), *_others(every)),
        findings=tuple(every),
        unchanged=tuple(unchanged),
        identical=sum(not (c.finding or c.converted) for c in copied),
        converted=dict(Counter(c.converted for c in copied if c.converted)),
        values=tuple(matched.values),
        renamed=matched.renamed,
        max_drift=max_drift,
        warnings=(*_advice(moving, kept, smallest), *warnings),
        notes=tuple(notes),
    )


def _tensor(t: Judged) -> TensorVerdict:
    return TensorVerdict(
        shape=t.shape,
        dtype=format_name(t.grid),
        stored=format_name(t.dtype),
        implementation=t.implementation,
        representation=t.representation,
        rung=t.rung,
        model=t.model,
        unexplained=tuple(count / max(t.elements, 1) for count in t.unexplained[:6]),
        slope=t.slope,
        z=t.z,
        detectable=t.detectable,
        expected=t.expected,
        ulp_max=t.drift.ulp_max,
        cause=t.cause,
        **figures_of(t.drift),
    )


def _said(moving: Sequence[Judged], wrong: Sequence[Judged]) -> list[str]:
    """What happened to the tensors that failed, equal causes together, the most frequent first."""
    groups: dict[tuple[str, str], list[Judged]] = defaultdict(list)
    for t in wrong:
        kind = t.cause.kind if t.cause else "unexplained"
        same = "" if t.cause is None or t.cause.factor is None else f"{t.cause.factor:.4g}"
        groups[kind, same].append(t)
    lines = []
    for group in sorted(groups.values(), key=len, reverse=True):
        texts = Counter(t.cause.text if t.cause else "no rounding explains it" for t in group)
        text = texts.most_common(1)[0][0]
        if len(group) == len(moving):
            lines.append(f"all {len(moving)} tensors: {text}")
        else:
            named = ", ".join(t.name for t in group[:_SHOWN])
            more = f" and {len(group) - _SHOWN} more" if len(group) > _SHOWN else ""
            lines.append(f"{len(group)} of {len(moving)} tensors ({named}{more}): {text}")
    return lines


def _others(findings: Sequence[Finding]) -> list[str]:
    wrong = [f"{finding.name} {finding.text}" for finding in findings if finding.fails]
    more = len(wrong) - _SHOWN
    return wrong[:_SHOWN] + ([f"and {more} more like these"] if more > 0 else [])


def _advice(moving: Sequence[Judged], kept: Representation, smallest: float | None) -> list[str]:
    """What the format lost and what to do about it; what cannot be told."""
    said = []
    right = [t for t in moving if t.implementation != "failed"]
    silent = [t for t in moving if t.implementation == "undetermined"]
    if silent:
        said.append(
            f"{len(silent)} of {len(moving)} tensors hold the base's values, and would if merged "
            f"right: {format_name(silent[0].grid)} swallows all of their change"
        )
    lossy = [t for t in right if t.representation == "lossy"]
    total = total_of([t.drift for t in lossy])
    if kept == "lossy" and lossy and total and total.subspace_error is not None:
        names = " and ".join(sorted({format_name(t.grid) for t in lossy}))
        said.append(
            f"{len(lossy)} of {len(moving)} tensors lost {total.subspace_error:.1%} of the change "
            f"to {names} (gain {total.gain:.3f}): merge into float32, serve the adapter unmerged, "
            "or use `bake --round compensated`"
        )
    if moving and len(right) == len(moving) and smallest is None:
        said.append("no scale error up to 16 times changes 10,000 codes: the scale is not checked")
    elif moving and len(right) == len(moving) and smallest is not None and smallest > 1e-3:
        said.append(f"a scale error below {smallest:.2g} would not show in these numbers")
    return said
