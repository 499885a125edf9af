"""adapterops bake"""

from __future__ import annotations

from typing import Any

import click

from adapterops.cli import talk
from adapterops.cli.combining import method_options, parse_parameters
from adapterops.cli.options import (
    base_options,
    parse_alphas,
    run_options,
)
from adapterops.cli.weights import split_weights


@click.command("bake")
@click.argument("base", metavar="BASE")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")
@click.option("-w", "--weights", metavar="W,W,…", help="One weight per adapter; 1 each if absent.")
@click.option("-o", "--output", required=True, metavar="PATH", help="The model to write.")
@method_options
@click.option(
    "--round",
    default="exact",
    show_default=True,
    type=click.Choice(["exact", "nearest", "stochastic", "compensated"]),
    help="How sums are rounded: see above.",
)
@click.option(
    "--dtype",
    default="keep",
    show_default=True,
    metavar="TYPE",
    help="keep (the base's), float32, bfloat16 or float16.",
)
@click.option(
    "--max-drift",
    type=float,
    metavar="X",
    help="Refuse a total error within what the adapters read above X.",
)
@click.option("--link", is_flag=True, help="Hard-link files that nothing changes.")
@click.option("--reversible", is_flag=True, help="Store what unbake needs to restore the base.")
@click.option("--hash", is_flag=True, help="Record the sha256 of all files of weights.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is random.")
@base_options
@run_options
def command(
    base: str,
    adapters: tuple[str, ...],
    weights: str | None,
    output: str,
    alpha: tuple[str, ...],
    parameters: tuple[str, ...],
    activations: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    no_progress: bool,
    **options: Any,
) -> None:
    """Write a base model with adapters added to its weights, each sum rounded once.

    \b
    adapterops bake model/ adapter -o merged
    adapterops bake model.safetensors style:0.8 person:0.6 -o both.safetensors
    adapterops bake model/ adapter -o merged --round compensated --reversible
    adapterops bake model/ code docs -m ties --param density=0.3 -o merged

    \b
    exact        correctly rounded, the same bytes on any machine
    nearest      rounded from float32 arithmetic
    compensated  of the two neighbours the one that keeps most of what the adapters do
    stochastic   at random, without bias

    The report says what the type of the weights lost of the change, measured on what was written.
    """
    from adapterops.options import parse_weights
    from adapterops.render.progress import reporter
    from adapterops.stream import keep_freed_memory
    from adapterops.verbs.bake import bake

    keep_freed_memory(shared=True)
    paths, given = split_weights(adapters, weights is not None)
    with reporter(quiet or no_progress) as progress:
        report = bake(
            base,
            paths,
            parse_weights(weights) if weights is not None else given,
            out=output,
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
        from adapterops.render.bake import page

        talk.result(page(report, verbose=verbose), report.output)
