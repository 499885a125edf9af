"""What `check` found, as text: a block per adapter, the worst first, and a line of totals."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from adapterops.checking.findings import RULES, SEVERITIES, Finding
from adapterops.checking.report import Checked, CheckReport
from adapterops.render.text import count, printable

_ADAPTERS = 40  # blocks shown without -v
_FINDINGS = 12  # and findings of each
_WIDTH = 110  # where text is wrapped off a terminal
_COLOURS = {"error": "31", "warning": "33", "note": "36", "path": "1"}
_INDENT = 2


def text(report: CheckReport, *, verbose: bool = False) -> str:
    """The whole report. Notes of adapters that are clean otherwise are shown for a single adapter,
    or where `verbose`, which leaves nothing out."""
    page = _Page(report, verbose)
    return "\n".join([*page.adapters(), *page.between(), *page.totals()])


def rules() -> str:
    """The table of codes: severity, whether it speaks of a file or a set, what it means."""
    width = max(map(len, RULES))
    lines = [
        f"{rule.code.ljust(width)}  {rule.severity:<7}  {rule.scope:<4}  {rule.meaning}"
        for rule in RULES.values()
    ]
    return "\n".join([f"{'code'.ljust(width)}  {'severity'}  of  meaning", *lines])


class _Page:
    """How one report is laid out: what is shown, colours and width of the terminal."""

    def __init__(self, report: CheckReport, verbose: bool) -> None:
        self._report = report
        self._verbose = verbose
        self._all = verbose or len(report.adapters) == 1
        self._terminal = sys.stdout.isatty()
        self._width = shutil.get_terminal_size().columns if self._terminal else _WIDTH
        self._codes = max((len(f.code) for f in report.findings), default=0)

    def adapters(self) -> Iterator[str]:
        """A block for every adapter with something to say, the worst first."""
        shown = [a for a in self._report.adapters if self._kept(a.findings)]
        shown.sort(key=lambda a: _gravity(a.findings))
        most = len(shown) if self._verbose else _ADAPTERS
        for adapter in shown[:most]:
            yield self._styled("path", printable(adapter.path)) + f"  {_about(adapter)}"
            yield from self._findings(self._kept(adapter.findings))
        if shown[most:]:
            yield f"and {count(len(shown) - most, 'adapter')} more with findings (-v)"

    def between(self) -> Iterator[str]:
        """What was found between adapters, each named."""
        found = self._kept(self._report.between)
        if found:
            yield self._styled("path", "between adapters, or them and others")
            yield from self._findings(found, paths=True)

    def totals(self) -> Iterator[str]:
        """Counts of adapters and findings, and for many adapters the codes that were found."""
        report = self._report
        counts = report.counts
        if len(report.adapters) == 1 and not report.findings:
            yield f"{printable(report.adapters[0].path)}: clean  {_about(report.adapters[0])}"
            return
        worst = Counter(adapter.worst for adapter in report.adapters)
        parts = [f"{worst['error']} with errors"] if worst["error"] else []
        parts += [f"{worst['warning']} with warnings"] if worst["warning"] else []
        parts += [f"{report.clean} clean"] if report.clean else []
        found = ", ".join(count(counts[s], s) for s in SEVERITIES if counts[s])
        hidden = "" if self._all or not counts["note"] else " (notes with -v)"
        yield f"{count(len(report.adapters), 'adapter')}: {', '.join(parts)}; " + (
            f"{found}{hidden}" if found else "nothing found"
        )
        if len(report.adapters) > 1:
            codes = Counter(f.code for f in self._kept(report.findings))
            order = [rule for severity in SEVERITIES for rule in RULES if _is(rule, severity)]
            if codes:
                yield ", ".join(f"{code} {codes[code]}" for code in order if code in codes)

    def _kept(self, findings: Iterable[Finding]) -> list[Finding]:
        return [f for f in findings if self._all or f.severity != "note"]

    def _findings(self, found: Sequence[Finding], *, paths: bool = False) -> Iterator[str]:
        most = len(found) if self._verbose else _FINDINGS
        for finding in found[:most]:
            yield from self._finding(finding, paths)
        if found[most:]:
            yield f"{' ' * _INDENT}and {len(found) - most} more (-v)"

    def _finding(self, finding: Finding, with_path: bool) -> Iterator[str]:
        where = [finding.path] if with_path and finding.path else []
        where += [f"module {finding.module}"] if finding.module else []
        message = ": ".join([*map(printable, where), printable(finding.message)])
        if finding.rule:
            message += f" [{finding.rule}]"
        head = f"{finding.severity:<7}  {finding.code.ljust(self._codes)}  "
        indent = " " * (_INDENT + len(head))
        lines = self._wrapped(message, indent)
        if finding.hint:
            lines += self._wrapped(f"→ {printable(finding.hint)}", indent)
        yield f"{' ' * _INDENT}{self._styled(finding.severity, head)}{lines[0].lstrip()}"
        yield from lines[1:]

    def _wrapped(self, message: str, indent: str) -> list[str]:
        width = max(self._width, len(indent) + 40)
        return textwrap.wrap(
            message,
            width,
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )

    def _styled(self, style: str, words: str) -> str:
        return f"\x1b[{_COLOURS[style]}m{words}\x1b[0m" if self._terminal else words


def _is(code: str, severity: str) -> bool:
    return RULES[code].severity == severity


def _gravity(findings: Sequence[Finding]) -> tuple[int, ...]:
    """A key that sorts adapters with more and worse findings first."""
    counts = Counter(finding.severity for finding in findings)
    return tuple(-counts[severity] for severity in SEVERITIES)


def _about(adapter: Checked) -> str:
    if adapter.dialect is None:
        return ""
    modules = count(adapter.modules, "module")
    return f"({adapter.dialect}, {modules}, {adapter.size / 1e6:.3g} MB)"
