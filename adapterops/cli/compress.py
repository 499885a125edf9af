"""adapterops compress"""

from __future__ import annotations

from typing import Any

import click

from adapterops.cli.each import Given, run
from adapterops.cli.options import (
    adapter_options,
    allocation_options,
    form_option,
    from_option,
    rank_options,
    run_options,
    scaling_option,
)


@click.command("compress")
@click.argument("adapters", nargs=-1, metavar="ADAPTER...")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="PATH",
    help="The result; of several adapters or a directory of some, the directory that mirrors them.",
)
@rank_options
@allocation_options
@click.option(
    "--metric",
    default="frobenius",
    show_default=True,
    type=click.Choice(["frobenius", "relative", "activation"]),
    help="What error is measured in: ΔW; ΔW over ‖W‖ (--base); ΔW·x (--activations).",
)
@click.option("--base", metavar="PATH", help="The base model.")
@click.option(
    "--activations", metavar="FILE", help="Second moments or samples of the modules' inputs."
)
@form_option
@scaling_option("folded")
@click.option(
    "--engine",
    metavar="NAME",
    help="Write what vllm, sglang, lorax, tgi or trtllm serves; portable: all of them.",
)
@adapter_options
@click.option("--spectra", is_flag=True, help="Singular values of every module in the report.")
@click.option("--plot", metavar="PICTURE", help="Draw error by rank and size: x.svg or x.png.")
@from_option
@run_options
def command(
    adapters: tuple[str, ...],
    from_file: str | None,
    output: str,
    alpha: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    no_progress: bool,
    plot: str | None,
    **options: Any,
) -> None:
    """Write adapters at a lower rank, in another form, or as a serving engine takes them.

    \b
    adapterops compress adapter -o small --max-error 0.05
    adapterops compress fleet/ -o fleet8 --rank 8
    adapterops compress adapter -o small --ratio 0.5 --allocate global

    The cut is the best there is at its rank, and the report says what was lost, measured on the
    bytes written. Of many adapters, one that fails is reported and the rest goes on; a rerun skips
    what is finished.
    """
    from adapterops.verbs.compress import compress

    given = Given(adapters, from_file, output, alpha, as_json, quiet, verbose, no_progress, plot)
    run(compress, given, options)
