"""adapterops inspect"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from adapterops.cli.options import input_options, parse_alphas
from adapterops.errors import AdapterOpsError, UsageError
from adapterops.render.text import printable

if TYPE_CHECKING:
    from adapterops.batch.search import Item
    from adapterops.inspection.report import Inspection
    from adapterops.verbs.inspect import Options

PICTURES = (".svg", ".png")


@click.command("inspect")
@click.argument("paths", nargs=-1, metavar="PATH...")
@click.option("--spectrum", is_flag=True, help="Read the tensors: singular values, energy by rank.")
@click.option(
    "-o",
    "--output",
    metavar="PICTURE|DIR",
    help="With --spectrum: draw x.svg or x.png, or one SVG per adapter below a directory.",
)
@click.option("--overwrite", is_flag=True, help="Replace pictures that exist.")
@click.option("--base", metavar="PATH", help="The base model, or its config.json: headers only.")
@click.option("--modules", metavar="REGEX", help="Only modules whose whole path matches.")
@input_options
def command(
    paths: tuple[str, ...],
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
    """Say what adapters are: dialect, kind, base, ranks, scale, modules, sizes, what is odd.

    \b
    adapterops inspect adapter
    adapterops inspect fleet/ --json
    adapterops inspect adapter --spectrum -o adapter.svg

    Only headers are read, unless --spectrum is given. A folder that is no adapter is searched for
    some; of many adapters each gets a line. What could not be merged, and why, is part of the
    answer: the exit code is 0 if everything could be read.
    """
    from adapterops.batch import run_many
    from adapterops.batch.search import find
    from adapterops.render.progress import reporter
    from adapterops.verbs.inspect import inspect_item, prepare

    if output is not None and not options["spectrum"]:
        raise UsageError("-o draws the spectrum, which is only read with --spectrum")
    items = find(paths, from_file, exclude=_directory(output), note=_note)
    checked = prepare(
        alpha=parse_alphas(alpha, [item.path for item in items]) if alpha else None,
        brief=len(items) > 1 and not verbose and not as_json,
        **options,
    )
    pictures = {} if output is None else dict(zip(items, _pictures(items, output), strict=True))
    look = partial(_drawn, pictures, overwrite) if pictures else inspect_item
    found: list[Inspection] = []
    entries: list[str] = []

    def gather(item: Item, result: tuple[Inspection, str]) -> None:
        found.append(result[0])
        entries.append(result[1])

    with reporter(quiet or no_progress) as progress:
        outcome = run_many(
            items,
            partial(_entry, look, checked, as_json, verbose),
            gather,
            partial(_report, as_json),
            what="inspecting",
            jobs=options["jobs"],
            processes=not checked.spectrum,
            strict=checked.strict,
            progress=progress,
        )
    if as_json:
        _print(_document(entries, found, [error for _, error in outcome.failed]))
    elif not quiet and found:
        from adapterops.render.inspect import page, table

        one = len(items) == 1
        _print(page(found[0], verbose=verbose) if one else table(found, len(outcome.failed)))
    sys.exit(outcome.exit_code)


def _entry(
    look: Callable[[Options, Item], Inspection],
    options: Options,
    as_json: bool,
    verbose: bool,
    item: Item,
) -> tuple[Inspection, str]:
    """An adapter's inspection; for JSON its entry too, made where the work is spread out."""
    found = look(options, item)
    if not as_json:
        return found, ""
    entry = found.to_dict(modules=verbose)
    text = json.dumps(entry, ensure_ascii=False, allow_nan=False)
    return replace(found, modules={}, families=(), spectrum=None), text


def _document(entries: list[str], found: list[Inspection], errors: list[AdapterOpsError]) -> str:
    """The one document that `--json` prints: an adapter a line."""
    from adapterops.inspection.report import Inspection, summary

    failed = json.dumps([error.to_dict() for error in errors], ensure_ascii=False)
    counts = json.dumps(summary(found), ensure_ascii=False)
    return (
        f'{{"schema": {json.dumps(Inspection.schema)},\n "adapters": [\n'
        + ",\n".join(entries)
        + f'],\n "errors": {failed},\n "summary": {counts}}}'
    )


def _directory(output: str | None) -> str | None:
    """The folder that pictures go to, None where the output is a picture itself."""
    return None if output is None or output.lower().endswith(PICTURES) else output


def _pictures(items: list[Item], output: str) -> list[str]:
    """Where each adapter's picture goes; that pictures can be drawn there is checked first."""
    from adapterops.batch import mirror
    from adapterops.render.plots import check_picture

    folder = _directory(output)
    if folder is None:
        if len(items) > 1:
            raise UsageError(
                f"-o {output}: one picture for {len(items)} adapters",
                hint="name a directory; each adapter's picture goes below it",
            )
        check_picture(output, overwrite=True)
        return [output]
    planned = mirror(items, folder, ".svg")
    os.makedirs(folder, exist_ok=True)
    check_picture(os.path.join(folder, "picture.svg"), overwrite=True)
    return planned


def _drawn(pictures: dict[Item, str], overwrite: bool, options: Options, item: Item) -> Inspection:
    """The adapter's inspection; its picture is drawn unless it is there already.

    Of many adapters, those that were drawn are not read again: a rerun goes on where it stopped.
    """
    from adapterops.batch import skip_done
    from adapterops.render.plots import save_figure
    from adapterops.render.spectrum_plot import spectrum_figure
    from adapterops.verbs.inspect import inspect_item, provenance_of

    picture = pictures[item]
    made = provenance_of(item, options)
    done = skip_done(picture, made, overwrite=overwrite)
    reads = not done or len(pictures) == 1
    found = inspect_item(replace(options, spectrum=reads, brief=False), item)
    if found.spectrum is not None and not done:
        os.makedirs(os.path.dirname(picture) or ".", exist_ok=True)
        figure = spectrum_figure(found)
        save_figure(figure, picture, description=made.to_json(), overwrite=overwrite)
    return replace(found, output=picture if found.spectrum or done else None, skipped=done)


def _note(text: str) -> None:
    click.echo(f"note: {printable(text)}", err=True)


def _report(as_json: bool, item: Item, error: AdapterOpsError) -> None:
    """One line on stderr for an adapter that could not be read."""
    if as_json:
        click.echo(json.dumps({"error": error.to_dict()}, ensure_ascii=False), err=True)
    else:
        click.echo(f"error: {printable(str(error))}", err=True)


def _print(text: str) -> None:
    try:
        click.echo(text)
    except BrokenPipeError:  # whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
