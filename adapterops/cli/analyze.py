"""adapterops analyze"""

from __future__ import annotations

from typing import Any

import click

from adapterops.cli import talk
from adapterops.cli.options import input_options, parse_alphas
from adapterops.cli.weights import split_weights


@click.command("analyze")
@click.argument("adapters", nargs=-1, metavar="ADAPTER[:WEIGHT]...")
@click.option("-w", "--weights", metavar="W,W,…", help="Those planned; default: equal, sum 1.")
@click.option("--plot", metavar="PICTURE", help="Draw the modules: x.svg or x.png.")
@click.option("--overwrite", is_flag=True, help="Replace a picture that exists.")
@click.option("--modules", metavar="REGEX", help="Only modules whose whole path matches.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the entries sampled.")
@click.option(
    "--samples",
    type=int,
    default=4096,
    show_default=True,
    metavar="N",
    help="Entries of each module in which signs are compared.",
)
@input_options
def command(
    adapters: tuple[str, ...],
    weights: str | None,
    plot: str | None,
    overwrite: bool,
    from_file: str | None,
    alpha: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    no_progress: bool,
    **options: Any,
) -> None:
    """Say what a merge of adapters would have to deal with, before it is made.

    \b
    adapterops analyze a.safetensors b.safetensors
    adapterops analyze code docs -w 0.7,0.3 --plot modules.svg
    adapterops analyze code:1 docs:-0.5 math:1 --json

    Norms and real shares, cosines, overlap of the spaces that the adapters read and write,
    conflicting signs, common seeds and lineage, the error of each rank, what merge methods would
    keep of each adapter, and a command to begin with. Nothing is written, no dense ΔW is formed.
    """
    from adapterops.batch.search import find
    from adapterops.options import parse_weights
    from adapterops.render.progress import reporter
    from adapterops.stream import keep_freed_memory
    from adapterops.verbs.analyze import analyze

    if plot is not None:
        from adapterops.render import plots

        plots.check_picture(plot, overwrite=overwrite)
    keep_freed_memory()
    arguments = list(adapters)
    if from_file is not None:
        arguments += [item.path for item in find([], from_file, note=talk.note)]
    paths, given = split_weights(arguments, weights is not None)
    chosen = parse_weights(weights) if weights is not None else given
    with reporter(quiet or no_progress) as progress:
        report = analyze(
            paths, chosen, alpha=parse_alphas(alpha, paths), progress=progress, **options
        )
    for warning in report.warnings:
        talk.warn(warning)
    if plot is not None:
        from adapterops.render.analyze_plot import analysis_figure

        plots.save_figure(analysis_figure(report), plot, overwrite=overwrite)
    if as_json:
        talk.result(talk.document(report.to_dict()), plot or "stdout")
    elif not quiet:
        from adapterops.render.analyze import page

        talk.result(page(report, verbose=verbose), plot or "stdout")
