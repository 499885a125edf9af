"""adapterops drift, alias verify"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from adapterops.cli import talk
from adapterops.cli.options import base_options, parse_alphas, place_options
from adapterops.cli.weights import split_weights
from adapterops.errors import UsageError


@click.command("drift")
@click.argument("base", metavar="BASE")
@click.argument("models", nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]... BAKED")
@click.option("-w", "--weights", metavar="W,W,…", help="One weight per adapter; 1 each if absent.")
@click.option("--max-drift", type=float, metavar="X", help="Fail above this error inside.")
@click.option("--activations", metavar="FILE", help="Inputs of modules, for the error of outputs.")
@click.option("--logits", metavar="MODEL", help="Config and tokenizer, to compare predictions.")
@click.option("--intruders", is_flag=True, help="Count intruder dimensions (decomposes weights).")
@click.option("--mitigate", metavar="PATH", help="Write the adapter, its intruders scaled down.")
@click.option(
    "--strength", type=float, default=0.75, show_default=True, help="What is left of intruders."
)
@click.option("--chain", is_flag=True, help="Simulate baking one after the other; BAKED optional.")
@click.option(
    "--round",
    default="exact",
    show_default=True,
    type=click.Choice(["exact", "nearest", "stochastic", "compensated"]),
    help="How the simulated chain is rounded.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of a stochastic chain.")
@base_options
@click.option("--strict", is_flag=True, help="Turn warnings into failures.")
@click.option("-v", "--verbose", is_flag=True, help="One line per tensor.")
@place_options
def command(
    base: str,
    models: tuple[str, ...],
    weights: str | None,
    alpha: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    no_progress: bool,
    **options: Any,
) -> None:
    """Judge a merged model, whichever tool made it, and say what the merge lost.

    \b
    adapterops drift model/ adapter merged/
    adapterops drift model/ style:0.8 person:0.6 merged/ --json
    adapterops drift model/ a b c --chain --intruders

    Two verdicts. Implementation: are these adapters in it, at these weights, and is everything else
    as it was? Representation: how much of them did the type of the weights keep? The exit code is 5
    where the implementation is wrong, or the error inside is above --max-drift.
    """
    from adapterops.options import parse_weights
    from adapterops.render.drift import page
    from adapterops.render.progress import reporter
    from adapterops.stream import keep_freed_memory
    from adapterops.verbs.drift import drift

    keep_freed_memory(shared=True)
    adapters, baked = _apart(models, options["chain"] or options["mitigate"] is not None)
    paths, given = split_weights(adapters, weights is not None)
    with reporter(quiet or no_progress) as progress:
        report = drift(
            base,
            paths,
            baked,
            parse_weights(weights) if weights is not None else given,
            alpha=parse_alphas(alpha, paths),
            progress=progress,
            **options,
        )
    for warning in report.warnings:
        talk.warn(warning)
    if as_json:
        talk.result(talk.document(report.to_dict()), report.baked)
    elif not quiet:
        talk.result(page(report, verbose=verbose), report.baked)
    sys.exit(report.exit_code)


def _apart(models: tuple[str, ...], may_lack: bool) -> tuple[tuple[str, ...], str | None]:
    """The adapters, and the merged model: the last one, unless that is an adapter too."""
    if may_lack and _is_adapter(models[-1]):
        return models, None
    if len(models) < 2:
        raise UsageError(
            f"{models[-1]!r} is one path: adapters come first, the merged model last",
            hint="adapterops drift BASE ADAPTER... BAKED",
        )
    return models[:-1], models[-1]


def _is_adapter(path: str) -> bool:
    """Whether a path, perhaps with a weight, is an adapter and no model."""
    from adapterops.errors import AdapterOpsError
    from adapterops.formats import read_adapter
    from adapterops.options import split_weight

    name, weight = split_weight(path)
    if weight is not None or os.path.isfile(os.path.join(name, "adapter_config.json")):
        return True
    if os.path.isdir(name) and os.path.isfile(os.path.join(name, "config.json")):
        return False
    try:
        return bool(read_adapter(name).sites)
    except AdapterOpsError:
        return False
