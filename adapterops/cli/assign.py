"""adapterops assign"""

from __future__ import annotations

import sys
from typing import Any

import click

from adapterops.cli import talk
from adapterops.cli.options import run_options
from adapterops.errors import FormatError


@click.command("assign")
@click.argument("plan", metavar="PLAN")
@click.argument("new", nargs=-1, metavar="NEW...")
@click.option("-o", "--output", required=True, metavar="PLAN2", help="The plan to write.")
@click.option("--policy", metavar="FILE", help="Consent by tenant instead of the plan's.")
@click.option("--activations", metavar="FILE", help="Where they are that the plan's metric needs.")
@click.option("--allow-pickle", is_flag=True, help="Dangerous: read .bin/.pt files.")
@run_options
def command(
    plan: str,
    new: tuple[str, ...],
    output: str,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    no_progress: bool,
    **options: Any,
) -> None:
    """Find an adapter of a plan for new tenants, or for new versions of tenants' adapters.

    \b
    adapterops assign plan adapters/acme -o plan2
    adapterops assign plan acme=runs/acme-v2 north=runs/north -o plan2

    NEW is an adapter, whose name is the tenant's, or a folder of some, or tenant=PATH. Each is
    verified against the nearest adapters of the plan that its consent allows; who is within the
    bound of none is served by its own. Everybody else is served as before; PLAN is not changed.
    """
    from adapterops.render.fleet_assign import page
    from adapterops.render.progress import reporter
    from adapterops.stream import keep_freed_memory
    from adapterops.verbs.assign import assign

    keep_freed_memory(shared=True)
    with reporter(quiet or no_progress) as progress:
        report = assign(plan, new, out=output, progress=progress, **options)
    for warning in report.warnings:
        talk.warn(warning)
    if report.drift.get("hint"):
        talk.note(report.drift["hint"])
    if as_json:
        talk.result(talk.document(report.to_dict()), report.output)
    elif not quiet:
        talk.result(page(report, verbose=verbose), report.output)
    if report.failed:
        sys.exit(FormatError.exit_code)
