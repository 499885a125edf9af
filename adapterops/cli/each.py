"""What compress and convert share: one adapter and its certificate, or many and a line for each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterops.cli import talk
from adapterops.cli.options import parse_alphas
from adapterops.errors import AdapterOpsError, UsageError

if TYPE_CHECKING:
    from adapterops.certificate import Report


@dataclass(frozen=True, slots=True)
class Given:
    """The arguments and options of a command that are no options of its verb."""

    paths: tuple[str, ...]
    from_file: str | None
    output: str
    alpha: tuple[str, ...]
    as_json: bool
    quiet: bool
    verbose: bool
    no_progress: bool
    plot: str | None = None


def run(verb: Callable[..., Any], given: Given, options: dict[str, Any]) -> None:
    """Run a verb over what was given, print what came of it, and exit with the worst code."""
    from adapterops.batch import is_one
    from adapterops.stream import keep_freed_memory

    keep_freed_memory()
    if len(given.paths) == 1 and given.from_file is None and is_one(given.paths[0]):
        _run_one(verb, given, options)
    else:
        _run_many(verb, given, options)


def show_one(verb: str, report: Any, given: Given) -> None:
    """Warnings and the certificate of one adapter."""
    for warning in report.warnings:
        talk.warn(warning)
    if given.as_json:
        talk.result(talk.document(report.to_dict()), report.output)
    elif not given.quiet:
        from adapterops.render.compress import page

        text = page(report, verbose=given.verbose, command=lambda rank: talk.with_rank(verb, rank))
        talk.result(text, report.output)


def _run_one(verb: Callable[..., Any], given: Given, options: dict[str, Any]) -> None:
    from adapterops.render.progress import reporter

    path = given.paths[0]
    if given.plot is not None:
        from adapterops.render.plots import check_picture

        if options["dry_run"]:
            raise UsageError("--plot draws a result, and --dry-run makes none")
        check_picture(given.plot, overwrite=options["overwrite"])
        options["spectra"] = True
    with reporter(given.quiet or given.no_progress) as progress:
        report = verb(
            path,
            out=given.output,
            alpha=parse_alphas(given.alpha, [path]),
            progress=progress,
            **options,
        )
    if given.plot is not None:
        _draw(report, path, given.plot, options["overwrite"])
    show_one(verb.__name__, report, given)


def _draw(report: Report, path: str, picture: str, overwrite: bool) -> None:
    from adapterops.provenance import base_name
    from adapterops.render.compression_plot import compression_figure
    from adapterops.render.curves import of_report
    from adapterops.render.plots import save_figure

    title = f"{base_name(path)} → {base_name(report.output)}"
    save_figure(compression_figure(of_report(report, title)), picture, overwrite=overwrite)


def _run_many(verb: Callable[..., Any], given: Given, options: dict[str, Any]) -> None:
    from adapterops.render.progress import reporter
    from adapterops.verbs.many import find_inputs, many

    if given.plot is not None:
        raise UsageError("--plot draws one adapter", hint="run once for each that matters")

    def failed(item: Any, error: AdapterOpsError) -> None:
        talk.failure(error, given.as_json)

    items = find_inputs(given.paths, given.output, given.from_file, note=talk.note)
    with reporter(given.quiet or given.no_progress) as progress:
        report = many(
            verb,
            items,
            out=given.output,
            modules_too=given.verbose and given.as_json,
            on_error=failed,
            alpha=parse_alphas(given.alpha, [item.path for item in items]),
            progress=progress,
            **options,
        )
    for warning in report.warnings:
        talk.warn(warning)
    if given.as_json:
        talk.result(talk.document(report.to_dict()), report.output)
    elif not given.quiet:
        from adapterops.render.compress import table

        talk.result(table(report), report.output)
    sys.exit(report.exit_code)
