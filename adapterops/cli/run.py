"""adapterops run"""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Callable
from typing import Any

import click

from adapterops.cli import talk
from adapterops.errors import FormatError

# Where the page of each verb is: what its own command prints.
_PAGES = {
    "merge": ("adapterops.render.tables", "page"),
    "calc": ("adapterops.render.tables", "page"),
    "compress": ("adapterops.render.compress", "page"),
    "extract": ("adapterops.render.compress", "page"),
    "convert": ("adapterops.render.compress", "page"),
    "diff": ("adapterops.render.diff", "comparison"),
    "analyze": ("adapterops.render.analyze", "page"),
    "check": ("adapterops.render.check", "text"),
    "inspect": ("adapterops.render.inspect", "page"),
    "bake": ("adapterops.render.bake", "page"),
    "drift": ("adapterops.render.drift", "page"),
    "unbake": ("adapterops.cli.unbake", "page"),
    "index": ("adapterops.render.fleet_index", "text"),
    "cluster": ("adapterops.render.fleet_cluster", "page"),
    "assign": ("adapterops.render.fleet_assign", "page"),
    "deploy": ("adapterops.render.fleet_deploy", "page"),
    "report": ("adapterops.render.fleet_report", "page"),
}
_WITH_RANKS = ("merge", "calc", "compress", "extract", "convert")  # whose pages suggest ranks


@click.command("run")
@click.argument("recipe", metavar="RECIPE.yaml|OUT")
@click.option("-o", "--output", metavar="PATH", help="Where to write, in place of the recipe's.")
@click.option("--inputs", metavar="DIR", help="Where to find what OUT was made from [here].")
@click.option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
@click.option("--memory", metavar="SIZE", help="Bytes in flight, e.g. 2GB.")
@click.option("-j", "--jobs", type=int, metavar="N", help="Workers: threads, or processes.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--dry-run", is_flag=True, help="Print the plan, write nothing.")
@click.option("--strict", is_flag=True, help="Turn warnings into errors.")
@click.option(
    "--allow-pickle",
    is_flag=True,
    help="Dangerous: read adapters in .bin/.pt files (weights_only, never code).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but warnings and errors.")
@click.option("-v", "--verbose", is_flag=True, help="One line per module.")
@click.option("--no-progress", is_flag=True, help="No progress on stderr.")
def command(
    recipe: str,
    output: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    no_progress: bool,
    **options: Any,
) -> None:
    """Do what a recipe says; or make an output of adapterops again from its inputs.

    \b
    adapterops run mix.yaml
    adapterops run mix.yaml -o other --dry-run
    adapterops run merged/ --inputs adapters/ -o again

    \b
    verb: compress            merge_method: ties
    adapter: code             models:
    rank: 8                     - {model: code, parameters: {weight: 0.7}}
    out: small                  - {model: docs, parameters: {weight: 0.3}}
                              parameters: {density: 0.2}
                              space: knots
                              out: merged

    Keys are the verb's parameters in Python, or mergekit's; paths are relative to the recipe. What
    OUT was made from is found below --inputs by its hashes, and its tensors come out the same.
    """
    from adapterops.recipe.calls import done
    from adapterops.render.progress import reporter
    from adapterops.stream import keep_freed_memory
    from adapterops.verbs.run import is_output, prepared

    keep_freed_memory(shared=True)
    given = {name: None if value is False else value for name, value in options.items()}
    with reporter(quiet or no_progress) as progress:
        call = prepared(recipe, out=output, progress=progress, **given)
        report = done(call, progress)
    for warning in getattr(report, "warnings", ()):
        talk.warn(warning)
    if call.verb.name == "assign" and report.drift.get("hint"):
        talk.note(report.drift["hint"])
    where = str(getattr(report, "output", None) or recipe)
    if as_json:
        talk.result(talk.document(_document(report, verbose)), where)
    elif not quiet:
        again = f"adapterops compress --rank {{}} {shlex.quote(where)} -o OTHER"
        advice = (again if is_output(recipe) else "rank: {}").format
        talk.result(_page(call.verb.name, report, verbose, advice), where)
    sys.exit(_exit_code(call.verb.name, report))


def _page(verb: str, report: Any, verbose: bool, advice: Callable[[int], str]) -> str:
    """What the verb's own command prints; `advice` says how to have another rank."""
    from adapterops.verbs.results import ManyReport

    if isinstance(report, ManyReport):
        from adapterops.render.compress import table

        return table(report)
    module, name = _PAGES[verb]
    page: Callable[..., str] = getattr(importlib.import_module(module), name)
    if verb == "unbake":
        return page(report)
    if verb in _WITH_RANKS:
        return page(report, verbose=verbose, command=advice)
    return page(report, verbose=verbose)


def _document(report: Any, verbose: bool) -> dict[str, Any]:
    """What the verb's own command prints with --json."""
    from adapterops.inspection.report import Inspection, summary

    if not isinstance(report, Inspection):
        found: dict[str, Any] = report.to_dict()
        return found
    adapters = [report.to_dict(modules=verbose)]
    return {
        "schema": Inspection.schema,
        "adapters": adapters,
        "errors": [],
        "summary": summary([report]),
    }


def _exit_code(verb: str, report: Any) -> int:
    """What the verb's own command exits with."""
    if verb == "assign" and report.failed:
        return FormatError.exit_code
    return int(getattr(report, "exit_code", 0))
