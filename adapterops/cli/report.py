"""adapterops report"""

from __future__ import annotations

from typing import Any

import click

from adapterops.cli import talk


@click.command("report")
@click.argument("plan", metavar="PLAN")
@click.option(
    "-o", "--output", metavar="FILE", help="Also write it: .html (one page), .md or .json."
)
@click.option("--fleet", metavar="FLEET", help="The index, where the plan does not find it.")
@click.option("--previous", metavar="PLAN", help="Compare with this plan.")
@click.option(
    "--engine",
    default="vllm",
    show_default=True,
    metavar="ENGINE",
    help="Whose GPU memory: vllm, sglang, lorax, tgi, trtllm, portable.",
)
@click.option(
    "--max-loras",
    type=int,
    default=32,
    show_default=True,
    metavar="N",
    help="Adapters in one batch, which GPU memory is reserved for.",
)
@click.option("--base", metavar="MODEL", help="Base model or config.json, for missing modules.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("-v", "--verbose", is_flag=True, help="Every tenant and every adapter.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but warnings and errors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(
    plan: str,
    output: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Sum a plan up: who is served by what, at which error and memory, and what was not grouped.

    \b
    adapterops report plan
    adapterops report plan -o fleet.html
    adapterops report plan2 --previous plan -o changes.md

    The page is complete in itself and loads nothing; it needs no network and no other file.
    """
    from adapterops.render import fleet_report
    from adapterops.verbs.report import report

    if output is not None:
        fleet_report.check_file(output, overwrite=overwrite)
    found = report(plan, **options)
    for warning in found.warnings:
        talk.warn(warning)
    if output is not None:
        fleet_report.save(found, output, overwrite=overwrite)
    if as_json:
        talk.result(talk.document(found.to_dict()), output or plan)
    elif not quiet:
        talk.result(fleet_report.page(found, verbose=verbose), output or plan)
