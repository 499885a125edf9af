"""adapterops convert"""

from __future__ import annotations

from typing import Any

import click

from adapterops.cli.each import Given, run
from adapterops.cli.options import (
    adapter_options,
    form_option,
    from_option,
    max_rank_option,
    rank_options,
    run_options,
    scaling_option,
)


@click.command("convert")
@click.argument("adapters", nargs=-1, metavar="ADAPTER...")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="PATH",
    help="The result; of several adapters or a directory of some, the directory that mirrors them.",
)
@scaling_option("keep")
@click.option("--base", metavar="PATH", help="The model that the adapter was trained on.")
@click.option(
    "--residual", metavar="PATH", help="That model as the adapter's initialisation left it."
)
@rank_options
@max_rank_option()
@form_option
@adapter_options
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
    **options: Any,
) -> None:
    """Write adapters as plain LoRA in another dialect, or with another scale.

    \b
    adapterops convert adapter -o adapter.safetensors --to kohya
    adapterops convert fleet/ -o plain --to peft
    adapterops convert dora -o lora --base model/ --rank 32

    LoHa, LoKr, AdaLoRA and Tucker become LoRA exactly; with --base so do PiSSA and OLoRA, and DoRA
    becomes the best LoRA of the rank or error asked for.
    """
    from adapterops.verbs.convert import convert

    given = Given(adapters, from_file, output, alpha, as_json, quiet, verbose, no_progress)
    run(convert, given, options)
