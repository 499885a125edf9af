"""adapterops cluster"""

from __future__ import annotations

from typing import Any

import click

from adapterops.cli import talk
from adapterops.cli.options import Rank, run_options, runner_option


@click.command("cluster")
@click.argument("fleet", metavar="FLEET")
@click.option("-o", "--output", required=True, metavar="PLAN", help="The plan to write.")
@click.option(
    "--max-error",
    type=float,
    metavar="X",
    help="Largest error of what serves a tenant, over its own ‖ΔW‖; 0.2 by default.",
)
@click.option("--max-adapters", type=int, metavar="K", help="As few errors as K adapters allow.")
@click.option(
    "--metric",
    default="frobenius",
    show_default=True,
    type=click.Choice(["frobenius", "activation"]),
    help="What error is measured in: ΔW, or ΔW·x (--activations).",
)
@click.option("--activations", metavar="FILE", help="Inputs of the model's modules.")
@click.option("--base-alias", metavar="FILE", help="Names of bases that are the same.")
@click.option(
    "--allow-sharing",
    default="none",
    show_default=True,
    type=click.Choice(["none", "group", "all"]),
    help="Who may share beyond duplicates: nobody, share groups of the policy, all.",
)
@click.option("--policy", metavar="FILE", help="Consent by tenant: CSV or JSON.")
@click.option(
    "--representative",
    default="best",
    show_default=True,
    type=click.Choice(["best", "medoid", "mean", "minimax"]),
    help="What may serve a group.",
)
@click.option(
    "-r", "--rank", type=Rank(), default="same", help="Rank of new adapters; same: the largest."
)
@click.option(
    "--dtype",
    default="keep",
    show_default=True,
    metavar="TYPE",
    help="keep (the members'), float32, bfloat16 or float16.",
)
@click.option("--previous", metavar="PLAN", help="Stay close to an earlier plan.")
@click.option(
    "--discovery",
    type=float,
    default=0.05,
    show_default=True,
    metavar="Q",
    help="False discovery rate of related tenants.",
)
@click.option("--allow-pickle", is_flag=True, help="Dangerous: read .bin/.pt files.")
@runner_option
@run_options
def command(
    fleet: str,
    output: str,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    no_progress: bool,
    **options: Any,
) -> None:
    """Plan which adapters of a fleet can serve several tenants; every error is verified.

    \b
    adapterops index adapters/ -o fleet
    adapterops cluster fleet -o plan --allow-sharing all --max-error 0.2
    adapterops cluster fleet -o plan2 --policy consent.csv --previous plan

    By default only duplicates (byte for byte, re-factored, or nearer than 0.001) share: averaging
    what tenants trained needs their consent, --allow-sharing or --policy.
    """
    from adapterops.render.fleet_cluster import page
    from adapterops.render.progress import reporter
    from adapterops.stream import keep_freed_memory
    from adapterops.verbs.cluster import cluster

    keep_freed_memory(shared=True)
    with reporter(quiet or no_progress) as progress:
        report = cluster(fleet, out=output, progress=progress, **options)
    for warning in report.warnings:
        talk.warn(warning)
    if as_json:
        talk.result(talk.document(report.to_dict()), report.output)
    elif not quiet:
        talk.result(page(report, verbose=verbose), report.output)
