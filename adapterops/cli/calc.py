"""adapterops calc"""

from __future__ import annotations

import re
from typing import Any

import click

from adapterops.cli import talk
from adapterops.cli.options import adapter_options, parse_alphas, rank_options, run_options
from adapterops.errors import UsageError

# What begins with a minus and is no option: -0.5*a, -(a - b), -a + b.
_NEGATIVE = re.compile(r"-\s*([-\s\d.(]|[A-Za-z]\w*\s*([-+*(]|/\s*\d))")


class _Command(click.Command):
    """Takes an expression that begins with a minus for what it is."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = [param for param in self.params if isinstance(param, click.Option)]
        known = {name for option in options for name in option.opts}
        valued = {name for option in options if not option.is_flag for name in option.opts}
        for place, text in enumerate(args):
            if text == "--":
                break
            is_value = place > 0 and args[place - 1] in valued
            is_name = any(each.startswith(f"{text[1:]}=") for each in args) and text not in known
            if not is_value and (is_name or _is_expression(text, known)):
                args = [*args[:place], f" {text}", *args[place + 1 :]]
        return super().parse_args(ctx, args)


def _is_expression(text: str, known: set[str]) -> bool:
    if text.startswith("--") or not _NEGATIVE.match(text):
        return False
    return text[:2] not in known or bool(set(text[2:]) & set(" *("))


@click.command("calc", cls=_Command)
@click.argument("expression", metavar="EXPRESSION")
@click.argument("adapters", nargs=-1, required=True, metavar="NAME=PATH...")
@click.option("-o", "--output", required=True, metavar="PATH", help="The result.")
@rank_options
@click.option(
    "--activations",
    multiple=True,
    metavar="FILE|NAME=FILE",
    help="Inputs of the modules, for methods that need them.",
)
@adapter_options
@run_options
def command(
    expression: str,
    adapters: tuple[str, ...],
    output: str,
    activations: tuple[str, ...],
    alpha: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    no_progress: bool,
    **options: Any,
) -> None:
    """Write the adapter that an expression of adapters stands for.

    \b
    adapterops calc "0.7*a + 0.3*b" a=code b=docs -o both
    adapterops calc "a - 0.5*project(a, b)" a=style b=subject -o apart
    adapterops calc "ties(a, b, density=0.2, space='knots')" a=code b=docs -o both -r 16

    Adapters are added, subtracted, multiplied and divided by numbers. Functions are the merge
    methods (adapterops methods), with parameters, weights, space, seed, calibrate and match_norm by
    name, and norm(x), the number ‖ΔW‖. The result is that of the same line of Python.
    """
    from adapterops.render.progress import reporter
    from adapterops.stream import keep_freed_memory
    from adapterops.verbs.calc import calc

    keep_freed_memory()
    given = split_assignments(adapters)
    with reporter(quiet or no_progress) as progress:
        report = calc(
            expression,
            given,
            out=output,
            activations=_activations(activations, given),
            alpha=parse_alphas(_by_path(alpha, given), list(given.values())),
            progress=progress,
            **options,
        )
    for warning in report.warnings:
        talk.warn(warning)
    if as_json:
        talk.result(talk.document(report.to_dict()), report.output)
    elif not quiet:
        from adapterops.render.tables import page

        talk.result(page(report, verbose=verbose, command=_with_rank), report.output)


def split_assignments(arguments: tuple[str, ...]) -> dict[str, str]:
    """Paths by name, of `a=path`. Raises UsageError for anything else, and a name given twice."""
    found: dict[str, str] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or not path:
            raise UsageError(
                f"{argument!r} is no NAME=PATH",
                hint="the expression is one argument, in quotes; after it come adapters by name",
            )
        if name in found:
            raise UsageError(f"{name} is given twice: {found[name]} and {path}")
        found[name] = path
    return found


def _by_path(alphas: tuple[str, ...], given: dict[str, str]) -> tuple[str, ...]:
    """`--alpha a=16` as `--alpha path=16`, where a is a name."""
    pairs = [text.rpartition("=") for text in alphas]
    return tuple(f"{given.get(name, name)}{equals}{value}" for name, equals, value in pairs)


def _activations(texts: tuple[str, ...], given: dict[str, str]) -> str | dict[str, str] | None:
    """One file for all adapters, or one for each by name."""
    pairs = [text.partition("=") for text in texts]
    if len(texts) == 1 and pairs[0][0] not in given:
        return texts[0]
    found: dict[str, str] = {}
    for text, (name, equals, path) in zip(texts, pairs, strict=True):
        if not equals or name in found:
            raise UsageError(
                f"--activations {text!r}: give one FILE for all adapters, or NAME=FILE for each"
            )
        found[name] = path
    return found or None


def _with_rank(rank: int) -> str:
    return talk.with_rank("calc", rank)
