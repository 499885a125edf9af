"""adapterops check"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from adapterops.cli.options import input_options, parse_alphas


def _list(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Print the table of codes and stop."""
    if not value or ctx.resilient_parsing:
        return
    if "--json" in sys.argv:
        from adapterops.checking.report import rules_document

        _print(json.dumps(rules_document(), indent=1, ensure_ascii=False))
    else:
        from adapterops.render.check import rules

        _print(rules())
    ctx.exit()


@click.command("check")
@click.argument("paths", nargs=-1, metavar="PATH...")
@click.option(
    "--engine",
    multiple=True,
    metavar="NAME",
    help="What vllm, sglang, lorax, tgi or trtllm would refuse or misread; portable: all of them.",
)
@click.option(
    "--base", metavar="PATH", help="Compare with the base model: headers, or config.json."
)
@click.option("--recompute", is_flag=True, help="Make adapters again from their provenance.")
@click.option("--inputs", metavar="DIR", help="Where --recompute finds inputs, by hash [here].")
@click.option(
    "--list",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_list,
    help="Show all codes.",
)
@input_options
def command(
    paths: tuple[str, ...],
    from_file: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    no_progress: bool,
    alpha: tuple[str, ...],
    **options: Any,
) -> None:
    """Say what is wrong with adapters: files, scale, numbers, config, engines, base, duplicates.

    \b
    adapterops check adapter
    adapterops check fleet/ --engine vllm --json
    adapterops check merged --base model/ --recompute --inputs adapters/

    Every tensor is read once. A folder that is no adapter is searched for some. Exit codes: 0 clean
    or warnings (--strict: they count as errors), 3 errors in a file, 4 between files, the highest
    of all; 6 for what could not be read.
    """
    from adapterops.batch.search import find
    from adapterops.render.check import text
    from adapterops.render.progress import reporter
    from adapterops.stream import keep_freed_memory
    from adapterops.verbs.check import check_items

    keep_freed_memory()
    items = find(paths, from_file, note=_note)
    alphas = parse_alphas(alpha, [item.path for item in items]) if alpha else None
    with reporter(quiet or no_progress) as progress:
        report = check_items(items, alpha=alphas, progress=progress, **options)
    if as_json:
        _print(json.dumps(report.to_dict(), indent=1, ensure_ascii=False, allow_nan=False))
    elif not quiet or report.counts["error"] or report.counts["warning"]:
        _print(text(report, verbose=verbose))
    sys.exit(report.exit_code)


def _note(message: str) -> None:
    click.echo(f"note: {message}", err=True)


def _print(message: str) -> None:
    try:
        click.echo(message)
    except BrokenPipeError:  # whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
