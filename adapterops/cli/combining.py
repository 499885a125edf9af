"""Options of what is made of adapters, where it is not their weighted sum."""

from __future__ import annotations

import click

from adapterops.cli.options import Command, all_of
from adapterops.errors import UsageError


def method_options(command: Command) -> Command:
    """What is made of the adapters, where it is not their weighted sum."""
    return all_of(
        command,
        click.option(
            "-m",
            "--method",
            default="linear",
            show_default=True,
            metavar="NAME",
            help="What is made of the adapters; adapterops methods lists them.",
        ),
        click.option(
            "--param", "parameters", multiple=True, metavar="NAME=VALUE", help="Of the method."
        ),
        click.option(
            "--space",
            default="dense",
            show_default=True,
            type=click.Choice(["dense", "core", "knots"]),
            help="Where entries are compared, of methods that do.",
        ),
        click.option(
            "--calibrate",
            type=click.Choice(["pico", "svc"]),
            help="Damp what adapters share, before or after the method.",
        ),
        click.option(
            "--match-norm",
            type=click.Choice(["mean", "max", "sum"]),
            help="Scale the result to the adapters' norms.",
        ),
        click.option(
            "--activations",
            multiple=True,
            metavar="FILE",
            help="Inputs of the modules, of regmean: one for all, or one for each adapter.",
        ),
        click.option(
            "--module-weights",
            multiple=True,
            metavar="SPEC",
            help="'layers 0-7: 1,0', 're:REGEX: 0.9,0.1', 'attn: 0.7,0.3', 'blocks[NAME]=1,0,…'.",
        ),
    )


def parse_parameters(values: tuple[str, ...]) -> dict[str, str]:
    """`--param density=0.2` as a mapping. Raises UsageError for what is none, or comes twice."""
    found: dict[str, str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--param {text!r}: expected NAME=VALUE")
        if name.strip() in found:
            raise UsageError(f"--param {name.strip()} is given twice")
        found[name.strip()] = value.strip()
    return found
