"""What became of many adapters: one document for all, from the certificates of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterops.certificate import PlanReport, Report, fields_of, plain
from adapterops.errors import AdapterOpsError
from adapterops.files.output import SIDECAR
from adapterops.layout import sidecar_name

_SUMS = ("size_before", "size", "parameters_before", "parameters")


@dataclass(frozen=True, slots=True)
class Result:
    """One adapter that is done: in this run, or `skipped`, for an earlier one had finished it.

    `certificate` is the document of its Report (or PlanReport), without single modules unless they
    were asked for; of what an earlier run wrote, as its sidecar has it.
    """

    path: str
    skipped: bool
    certificate: Mapping[str, Any]

    def number(self, name: str) -> float | None:
        """A figure of the certificate, None where it has none."""
        value = self.certificate.get(name)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        return value if good else None

    def listed(self, name: str) -> list[Any]:
        """A list of the certificate, empty where it has none."""
        value = self.certificate.get(name)
        return value if isinstance(value, list) else []

    def to_dict(self) -> dict[str, Any]:
        """The entry in the document of all."""
        return {"path": self.path, "skipped": self.skipped, **self.certificate}


@dataclass(frozen=True, slots=True)
class ManyReport:
    """What became of many adapters, in the order in which they were found; `output` is the
    directory with all the outputs."""

    verb: str
    output: str
    results: tuple[Result, ...]
    failed: tuple[AdapterOpsError, ...]

    @property
    def schema(self) -> str:
        """The kind and version of the document."""
        return f"adapterops.{self.verb}-many/1"

    @property
    def exit_code(self) -> int:
        """The worst of all adapters, 0 if none failed."""
        return max((error.exit_code for error in self.failed), default=0)

    @property
    def worst(self) -> Result | None:
        """The adapter with the largest relative error."""
        known = [result for result in self.results if result.number("error") is not None]
        return max(known, key=lambda result: result.number("error") or 0.0, default=None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What deserves attention, each once: the first adapter that it is said of, and how many
        more there are."""
        said: dict[str, list[str]] = {}
        for result in self.results:
            for text in result.listed("warnings"):
                said.setdefault(str(text).removeprefix(f"{result.path}: "), []).append(result.path)
        return tuple(
            f"{paths[0]}: {text}" + (f" (and {len(paths) - 1} more)" if paths[1:] else "")
            for text, paths in said.items()
        )

    def summary(self) -> dict[str, Any]:
        """Counts, bytes of the weights files, numbers in factors, the largest error and whose it
        is. Sums are None where no certificate has the figure."""
        skipped = sum(result.skipped for result in self.results)
        figures = {name: [result.number(name) for result in self.results] for name in _SUMS}
        known = {name: [x for x in each if x is not None] for name, each in figures.items()}
        return {
            "adapters": len(self.results) + len(self.failed),
            "done": len(self.results) - skipped,
            "skipped": skipped,
            "failed": len(self.failed),
            **{name: sum(each) if each else None for name, each in known.items()},
            "worst_error": self.worst and self.worst.number("error"),
            "worst": self.worst and self.worst.path,
        }

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return {
            "schema": self.schema,
            "output": self.output,
            "items": [result.to_dict() for result in self.results],
            "errors": [error.to_dict() for error in self.failed],
            "summary": self.summary(),
        }


def document(report: Report | PlanReport, output: str, *, modules: bool) -> dict[str, Any]:
    """A report as plain data; single modules only if asked for. `output` is where it is, or would
    be."""
    found = fields_of(report)
    if not modules:
        for name in ("modules", "ranks"):
            found.pop(name, None)
    return {"schema": report.schema, **plain(found), "output": output}


def recorded_document(output: str, *, modules: bool) -> dict[str, Any]:
    """What the sidecar of a finished output says; where it has gone, only where the output is."""
    path = Path(output)
    sidecar = path / SIDECAR if path.is_dir() else path.with_name(sidecar_name(path))
    try:
        found = json.loads(sidecar.read_bytes())
    except (OSError, ValueError):
        found = {}
    found = found if isinstance(found, dict) else {}
    left = {"provenance", "files"} | (set() if modules else {"modules"})
    return {**{name: value for name, value in found.items() if name not in left}, "output": output}
