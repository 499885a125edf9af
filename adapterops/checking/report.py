"""What `check` reports: the findings of each adapter, those between adapters, counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from adapterops.checking.findings import RULES, SEVERITIES, Finding, Severity


@dataclass(frozen=True, slots=True)
class Checked:
    """One adapter: where, what it is by its headers (None if unread), what was found."""

    path: str
    weights_file: str | None
    dialect: str | None
    modules: int
    size: int
    findings: tuple[Finding, ...]

    @property
    def worst(self) -> Severity | None:
        """The gravest severity of its findings, None where there are none."""
        found = {finding.severity for finding in self.findings}
        return next((severity for severity in SEVERITIES if severity in found), None)


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Adapters in the order given, and findings between them (or between them and others).

    `exit_code` is 0 where nothing but warnings and notes was found (with `strict`, notes only), 3
    for errors in a file, 4 for errors between files, 6 for a file that could not be read: the
    highest of all.
    """

    schema: ClassVar[str] = "adapterops.check/1"

    adapters: tuple[Checked, ...]
    between: tuple[Finding, ...] = ()
    strict: bool = False

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings: those of the adapters in their order, then those between them."""
        return tuple(f for item in self.adapters for f in item.findings) + self.between

    @property
    def counts(self) -> Mapping[Severity, int]:
        """Findings of each severity."""
        counts = Counter(finding.severity for finding in self.findings)
        return {severity: counts[severity] for severity in SEVERITIES}

    @property
    def clean(self) -> int:
        """Adapters with neither errors nor warnings of their own."""
        return sum(item.worst in (None, "note") for item in self.adapters)

    @property
    def exit_code(self) -> int:
        """What the command exits with."""
        counted = ("error", "warning") if self.strict else ("error",)
        return max((f.exit_code for f in self.findings if f.severity in counted), default=0)

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return {
            "schema": self.schema,
            "exit_code": self.exit_code,
            "strict": self.strict,
            "summary": {
                "adapters": len(self.adapters),
                "clean": self.clean,
                "bytes": sum(item.size for item in self.adapters),
                **{f"{severity}s": count for severity, count in self.counts.items()},
                "codes": dict(Counter(finding.code for finding in self.findings).most_common()),
            },
            "adapters": [
                {**asdict(item), "worst": item.worst, "findings": list(map(_plain, item.findings))}
                for item in self.adapters
            ],
            "between": list(map(_plain, self.between)),
        }


def _plain(finding: Finding) -> dict[str, Any]:
    return {**asdict(finding), "scope": RULES[finding.code].scope}


def rules_document() -> dict[str, Any]:
    """The table of codes, as `--list --json` prints it."""
    return {"schema": "adapterops.check-rules/1", "rules": [asdict(r) for r in RULES.values()]}
