"""adapterops diff"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from adapterops.cli.options import input_options, parse_alphas


@click.command("diff")
@click.argument("adapters", nargs=-1, metavar="A B [C...]")
@click.option("-o", "--output", metavar="PICTURE", help="Draw the matrices: x.svg or x.png.")
@click.option("--overwrite", is_flag=True, help="Replace a picture that exists.")
@click.option("--modules", metavar="REGEX", help="Only modules whose whole path matches.")
@input_options
def command(
    adapters: tuple[str, ...],
    from_file: str | None,
    output: str | None,
    overwrite: bool,
    alpha: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    no_progress: bool,
    **options: Any,
) -> None:
    """Say how far adapters are apart, and of two of them what they are to each other.

    \b
    adapterops diff a.safetensors b.safetensors
    adapterops diff run/checkpoint-500 run/checkpoint-1000 -v
    adapterops diff fleet/ -o matrix.svg

    Two adapters: a verdict (identical, the same in another gauge, one scaled, one run at two times,
    a shared start, unrelated …) with its evidence, then modules, heads and angles. More: the
    matrices of relative distance and cosine. The exit code is 0 however much they differ.
    """
    from adapterops.batch.search import find
    from adapterops.render.diff import comparison
    from adapterops.render.progress import reporter
    from adapterops.stream import keep_freed_memory
    from adapterops.verbs.diff import diff

    if output is not None:
        from adapterops.render import plots

        plots.check_picture(output, overwrite=overwrite)
    keep_freed_memory()
    paths = [item.path for path in adapters for item in find([path], note=_note)]
    if from_file is not None:
        paths += [item.path for item in find([], from_file, note=_note)]
    with reporter(quiet or no_progress) as progress:
        report = diff(paths, alpha=parse_alphas(alpha, paths), progress=progress, **options)
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
    if output is not None:
        figure = plots.matrix_figure(report)
        plots.save_figure(figure, output, overwrite=overwrite)
    if as_json:
        document = report.to_dict()
        _print(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False))
    elif not quiet:
        _print(comparison(report, verbose=verbose))


def _note(text: str) -> None:
    click.echo(f"note: {text}", err=True)


def _print(text: str) -> None:
    try:
        click.echo(text)
    except BrokenPipeError:  # whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
