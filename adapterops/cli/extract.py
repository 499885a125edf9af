"""adapterops extract"""

from __future__ import annotations

from typing import Any

import click

from adapterops.cli.each import Given, show_one
from adapterops.cli.options import (
    file_options,
    form_option,
    max_rank_option,
    run_options,
    target_options,
)


@click.command("extract")
@click.argument("base", metavar="BASE")
@click.argument("tuned", metavar="TUNED")
@click.option("-o", "--output", required=True, metavar="PATH", help="The adapter to write.")
@click.option("-r", "--rank", type=int, metavar="N", help="Rank of the adapter.")
@target_options
@max_rank_option(128)
@click.option(
    "--vectors",
    default="save",
    show_default=True,
    type=click.Choice(["save", "drop", "error"]),
    help="Norms and biases that differ: carry their values, leave them out, refuse.",
)
@click.option(
    "--embeddings",
    default="lora",
    show_default=True,
    type=click.Choice(["lora", "save", "drop"]),
    help="Embeddings and heads that differ: as factors, as they are, left out.",
)
@form_option
@file_options
@run_options
def command(
    base: str,
    tuned: str,
    output: str,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    no_progress: bool,
    **options: Any,
) -> None:
    """Write the difference between two checkpoints as an adapter.

    \b
    adapterops extract model/ tuned/ -o adapter --max-error 0.1
    adapterops extract model.safetensors tuned.safetensors -o adapter --rank 32

    Checkpoints are read tensor by tensor, sharded or not. The report says how far the adapter is
    from the exact difference, measured on the bytes written.
    """
    from adapterops.render.progress import reporter
    from adapterops.stream import keep_freed_memory
    from adapterops.verbs.extract import extract

    keep_freed_memory()
    with reporter(quiet or no_progress) as progress:
        report = extract(base, tuned, out=output, progress=progress, **options)
    given = Given((), None, output, (), as_json, quiet, verbose, no_progress)
    show_one("extract", report, given)
