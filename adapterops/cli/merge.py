"""adapterops merge"""

from __future__ import annotations

from typing import Any

import click

from adapterops.cli import talk
from adapterops.cli.combining import method_options, parse_parameters
from adapterops.cli.options import (
    adapter_options,
    parse_alphas,
    rank_options,
    run_options,
)
from adapterops.cli.weights import split_weights

DEFAULT_OUTPUT = "merged"


@click.command("merge")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")
@click.option("-w", "--weights", metavar="W,W,…", help="One weight per adapter, e.g. 0.7,0.3.")
@click.option("-o", "--output", metavar="PATH", help="Default: merged/ or merged.safetensors here.")
@method_options
@click.option("--seed", type=int, default=0, show_default=True, help="Of methods that draw.")
@rank_options
@click.option("--normalize", is_flag=True, help="Divide -w by its sum; not --module-weights.")
@adapter_options
@run_options
def command(
    adapters: tuple[str, ...],
    weights: str | None,
    output: str | None,
    alpha: tuple[str, ...],
    parameters: tuple[str, ...],
    activations: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    no_progress: bool,
    **options: Any,
) -> None:
    """Write the weighted sum Σ wᵢ·ΔWᵢ of adapters, exactly unless a rank is asked for.

    With --method what another merge method makes of them.

    \b
    adapterops merge a.safetensors b.safetensors --weights 0.7,0.3
    adapterops merge code docs -w 0.5,0.5 --rank 16 -o both
    adapterops merge code:1 docs:-0.5 --max-error 0.05 -o difference
    adapterops merge code docs -w 1,1 -m ties --param density=0.3 --space knots -o both

    The report says what was lost, measured on the bytes written: truncation (rank), storage
    (number format) and both, relative to the exact sum.
    """
    from adapterops.options import parse_weights
    from adapterops.render.progress import reporter
    from adapterops.stream import keep_freed_memory
    from adapterops.verbs.merge import merge

    keep_freed_memory()
    paths, given = split_weights(adapters, weights is not None)
    chosen = parse_weights(weights) if weights is not None else given
    out = DEFAULT_OUTPUT if output is None else output
    with reporter(quiet or no_progress) as progress:
        report = merge(
            paths,
            chosen,
            out=out,
            alpha=parse_alphas(alpha, paths),
            parameters=parse_parameters(parameters),
            activations=activations or None,
            progress=progress,
            **options,
        )
    for warning in report.warnings:
        talk.warn(warning)
    if as_json:
        talk.result(talk.document(report.to_dict()), report.output)
    elif not quiet:
        from adapterops.render.tables import page

        talk.result(page(report, verbose=verbose, command=_command), report.output)


def _command(rank: int) -> str:
    return talk.with_rank("merge", rank)
