"""adapterops index"""

from __future__ import annotations

from typing import Any

import click

from adapterops.cli import talk
from adapterops.cli.options import runner_option


@click.command("index")
@click.argument("source", nargs=-1, metavar="PATH|URI...")
@click.option("-o", "--output", required=True, metavar="FLEET", help="The index, new or not.")
@click.option("--manifest", metavar="FILE", help="CSV tenant,path[,traffic] instead of PATHs.")
@click.option(
    "--tenant-pattern",
    "pattern",
    metavar="PATTERN",
    help="Who is a tenant, by the path below PATH; * and {tenant} are one segment.",
)
@click.option("--shard", metavar="I/N", help="Only the I-th of N parts of the tenants.")
@click.option("--merge", is_flag=True, help="PATHs are indexes: add what they hold to FLEET.")
@click.option("--remove", multiple=True, metavar="TENANT", help="Off-board a tenant, for good.")
@click.option("--restore", multiple=True, metavar="TENANT", help="Take a removed one in again.")
@click.option("--seed", type=int, metavar="N", help="Of the sketches; 0 for a new index.")
@click.option("--strict", is_flag=True, help="Stop at the first adapter that is no good.")
@click.option(
    "--allow-pickle",
    is_flag=True,
    help="Dangerous: read .bin/.pt files (weights_only, never code).",
)
@click.option("--memory", metavar="SIZE", help="Bytes in flight, e.g. 2GB.")
@click.option("-j", "--jobs", type=int, metavar="N", help="Processes.")
@runner_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but warnings and errors.")
@click.option("-v", "--verbose", is_flag=True, help="Name every tenant of every group.")
@click.option("--no-progress", is_flag=True, help="No progress on stderr.")
def command(
    source: tuple[str, ...],
    output: str,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    no_progress: bool,
    **options: Any,
) -> None:
    """Look at each adapter of a fleet once, and keep what clustering needs to know of it.

    \b
    adapterops index adapters/ -o fleet
    adapterops index s3://bucket/adapters -o fleet --tenant-pattern '{tenant}/latest'
    adapterops index --manifest tenants.csv -o fleet --shard 2/8
    adapterops index --merge fleet-1 fleet-2 -o fleet
    adapterops index --remove TENANT -o fleet

    Run again, it reads what is new or changed, and goes on where an interruption stopped it. What
    cannot be read or compared is recorded with the reason.
    """
    from adapterops.render.progress import reporter
    from adapterops.stream import keep_freed_memory
    from adapterops.verbs.index import index

    keep_freed_memory()
    with reporter(quiet or no_progress) as progress:
        report = index(source, out=output, progress=progress, **options)
    for warning in report.warnings:
        talk.warn(warning)
    if as_json:
        talk.result(talk.document(report.to_dict()), report.output)
    elif not quiet:
        from adapterops.render.fleet_index import text

        talk.result(text(report, verbose=verbose), report.output)
