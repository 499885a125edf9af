"""adapterops unbake"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adapterops.cli import talk
from adapterops.cli.options import place_options

if TYPE_CHECKING:
    from adapterops.undoing.restoring import UnbakeReport


@click.command("unbake")
@click.argument("baked", metavar="BAKED")
@click.option("-o", "--output", required=True, metavar="PATH", help="The base to write.")
@place_options
def command(
    baked: str, output: str, as_json: bool, quiet: bool, no_progress: bool, **options: Any
) -> None:
    """Restore the base of a model that `bake --reversible` wrote, bit by bit.

    \b
    adapterops unbake merged/ -o base

    Neither the base nor the adapters are needed. Every file is checked by its sha256.
    """
    from adapterops.render.progress import reporter
    from adapterops.stream import keep_freed_memory
    from adapterops.verbs.unbake import unbake

    keep_freed_memory(shared=True)
    with reporter(quiet or no_progress) as progress:
        report = unbake(baked, out=output, progress=progress, **options)
    for warning in report.warnings:
        talk.warn(warning)
    if as_json:
        talk.result(talk.document(report.to_dict()), report.output)
    elif not quiet:
        talk.result(page(report), report.output)


def page(report: UnbakeReport) -> str:
    """What was restored, a line for each file."""
    from adapterops.render.text import megabytes, safe

    lines = [f"{safe(f.name)}  {megabytes(f.size)} MB  sha256 {f.sha256}" for f in report.files]
    return "\n".join([f"{safe(report.output)}  restored, {megabytes(report.size)} MB", *lines])
