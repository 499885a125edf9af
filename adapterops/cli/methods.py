"""adapterops methods"""

from __future__ import annotations

import os
import sys

import click

from adapterops.cli.talk import document


@click.command("methods")
@click.argument("name", required=False, metavar="[NAME]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(name: str | None, as_json: bool) -> None:
    """List the merge methods, or say all of one: parameters, reference, what it promises.

    \b
    adapterops methods
    adapterops methods ties
    adapterops methods --json
    """
    from adapterops.verbs.methods import MethodInfo, methods

    found = methods(name)
    if as_json:
        listed = [one.to_dict() for one in found]
        _print(document({"schema": MethodInfo.schema, "methods": listed}))
        return
    from adapterops.render.methods import page, table

    _print(table(found) if name is None else page(found[0]))


def _print(text: str) -> None:
    try:
        click.echo(text)
    except BrokenPipeError:  # whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
