"""adapterops deploy"""

from __future__ import annotations

from typing import Any

import click

from adapterops.cli import talk
from adapterops.cli.options import run_options


@click.command("deploy")
@click.argument("plan", metavar="PLAN")
@click.option(
    "--engine",
    required=True,
    metavar="NAME",
    help="vllm, sglang, lorax, tgi or trtllm; portable: what all of them serve.",
)
@click.option(
    "--served-base", required=True, metavar="NAME", help="The base as the engine is given it."
)
@click.option("-o", "--output", required=True, metavar="DIR", help="The deployment to write.")
@click.option("--previous", metavar="DIR", help="The deployment that runs now.")
@click.option("--fleet", metavar="FLEET", help="The plan's index, where it was moved to.")
@click.option("--base", metavar="PATH", help="The base model: headers, or config.json.")
@click.option("--activations", metavar="FILE", help="Inputs by module, of an activation plan.")
@click.option(
    "--max-error",
    type=float,
    metavar="X",
    help="Largest error of any tenant, instead of the plan's bound.",
)
@click.option("--max-rank", type=int, metavar="N", help="Cut adapters of larger ranks to this one.")
@click.option(
    "--dtype",
    default="keep",
    show_default=True,
    metavar="TYPE",
    help="keep (each its own), float32, bfloat16 or float16.",
)
@click.option(
    "--max-loras",
    type=int,
    default=32,
    show_default=True,
    metavar="N",
    help="Adapters in one batch: slots in GPU memory.",
)
@click.option(
    "--cpu-memory",
    default="16GB",
    show_default=True,
    metavar="SIZE",
    help="Memory of the host for the engine's cache of adapters.",
)
@click.option("--link", is_flag=True, help="Hard-link originals that need no change.")
@click.option(
    "--allow-pickle",
    is_flag=True,
    help="Dangerous: read .bin/.pt files (weights_only, never code).",
)
@run_options
def command(
    plan: str,
    output: str,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    no_progress: bool,
    **options: Any,
) -> None:
    """Write the adapters of a plan as an engine serves them, with routes and flags.

    \b
    adapterops deploy plan --engine vllm --served-base meta-llama/Llama-3.1-8B -o run1
    adapterops deploy plan2 --engine vllm --served-base … -o run2 --previous run1

    \b
    DIR/<name>/     an adapter, named by its content: other content has another name
    DIR/routes.json tenant -> model, with a random cache_salt where tenants share an adapter
    DIR/litellm.yaml the same for a LiteLLM proxy; the engine is at $API_BASE, its key $API_KEY

    Every tenant's error is computed again on the bytes written. The plan's index must be there: it
    knows who was off-boarded since. Originals are not touched; rollback is the previous DIR.
    """
    from adapterops.render.progress import reporter
    from adapterops.verbs.deploy import deploy

    with reporter(quiet or no_progress) as progress:
        report = deploy(plan, out=output, progress=progress, **options)
    for warning in report.warnings:
        talk.warn(warning)
    if as_json:
        talk.result(talk.document(report.to_dict()), report.output)
    elif not quiet:
        from adapterops.render.fleet_deploy import page

        talk.result(page(report, verbose=verbose), report.output)
