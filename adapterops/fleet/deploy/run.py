"""One deployment: checks, files, errors, routes, flags and memory; complete or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from adapterops.errors import IncompatibleError
from adapterops.files.output import SIDECAR, Staging, check_output, stage
from adapterops.fleet.deploy import figures, flags, ranks, routes, verify
from adapterops.fleet.deploy.forms import Terms
from adapterops.fleet.deploy.memory import PUBLISHED
from adapterops.fleet.deploy.planning import Known, Options, known_of
from adapterops.fleet.deploy.report import Deployed, DeployReport, Launch, TenantError
from adapterops.fleet.deploy.writing import Written, opened, write_all
from adapterops.fleet.plans.offboarded import some
from adapterops.provenance import base_name
from adapterops.stream import Compute

Progress = Callable[[str, int, int], None]


def deploy_plan(
    path: str, options: Options, on: Compute, progress: Progress | None
) -> DeployReport:
    """Write the deployment of the plan at `path`, or with `dry_run` say what it would be.

    Raises every error of `adapterops.errors`; nothing is written when it does.
    """
    known = known_of(path, options)
    with _target(options) as target:
        root = None if target is None else target.root
        done = write_all(
            known.plan,
            known.chosen,
            known.places,
            root,
            Terms(
                known.engine,
                options.served_base,
                options.base,
                options.max_rank,
                options.dtype,
                options.link,
            ),
            on,
            allow_pickle=options.allow_pickle,
            progress=progress,
        )
        report, found = _report(path, known, options, done, on)
        if target is not None:
            report = _finish(target, report, found, done)
    return report


@contextmanager
def _target(options: Options) -> Iterator[Staging | None]:
    if options.dry_run:
        check_output(options.out, directory=True, overwrite=options.overwrite)
        yield None
        return
    with stage(options.out, directory=True, overwrite=options.overwrite) as target:
        yield target


def _report(
    path: str, known: Known, options: Options, done: Written, on: Compute
) -> tuple[DeployReport, dict[str, routes.Route]]:
    plan, engine = known.plan, known.engine
    based = known.based
    left = {**done.left, **known.wrong, **plan.excluded}
    if not done.adapters and not based:
        reason = next(iter(left.values()), "the plan serves nobody")
        raise IncompatibleError(f"no adapter of the plan can be deployed: {reason}")
    errors, said = _errors(known, options, done, on)
    warnings = [*known.warnings, *said]
    limit = plan.max_error if options.max_error is None else options.max_error
    verify.check_limit(errors, plan.metric, limit, f"{engine.title} {engine.version}")
    adapters, folder = tuple(done.adapters), os.path.realpath(options.out)
    named = {tenant: item.name or item.id for item in adapters for tenant in item.members}
    served: dict[str, str | None] = {**named, **dict.fromkeys(based)}
    shared = frozenset({*done.sharing(), *based})
    found = routes.routes(engine.name, options.served_base, served, shared, folder, known.previous)
    mine = {name: item for name, item in plan.served.items() if name not in left}
    cost = figures.cost(mine, engine, known.index, known.shapes, options.max_loras, done)
    warnings += [cost.note] if cost.note else []
    if left:
        warnings.append(f"{len(left)} tenants are routed nowhere: {some(left)}")
    wild = [tenant for tenant in served if "*" in tenant]
    if wild:
        warnings.append(
            f"in {routes.ROUTER} a * in a name ({some(wild)}) answers for other names too; "
            "call these tenants otherwise"
        )
    if options.strict and warnings:
        raise IncompatibleError(f"--strict: {warnings[0]}")

    def tail(each: str) -> list[float]:
        place = os.fspath(done.folders[each]) if each in done.folders else known.places[each]
        with opened(place, options.allow_pickle) as file:
            return ranks.tail(file, on)

    report = DeployReport(
        output=options.out,
        plan=os.fspath(path),
        engine=engine.name,
        base=options.served_base,
        adapters=adapters,
        routes=dict(sorted(served.items())),
        tenants=dict(sorted(errors.items())),
        left=dict(sorted(left.items())),
        limit=limit,
        metric=plan.metric,
        salted=sum(route.salt is not None for route in found.values()),
        size=sum(item.size for item in adapters),
        memory=cost.gpu,
        proposals=ranks.propose(
            engine,
            adapters,
            cost.held,
            cost.shapes,
            options.max_loras,
            tail,
            {name: item.error for name, item in errors.items()},
            limit if plan.metric == "frobenius" else None,  # what is cut says nothing of outputs
        ),
        launch=_launch(known, options, adapters, cost.targets, folder),
        changes=_changes(known.previous, adapters),
        published=PUBLISHED,
        files=(),
        warnings=tuple(warnings),
        notes=(*done.said(), *_notes(options, found)),
    )
    return report, found


def _errors(
    known: Known, options: Options, done: Written, on: Compute
) -> tuple[dict[str, TenantError], list[str]]:
    """The error of every tenant that is served, and warnings; the plan's in a dry run."""
    based = verify.of_base(known.plan, known.based)
    if options.dry_run:
        return {**verify.planned(known.plan, done.adapters), **based}, []
    errors, warnings = verify.errors_of(
        known.plan,
        done.adapters,
        done.folders,
        {each: form.norm for each, form in done.forms.items()},
        verify.locations(known.plan, figures.homes(known.index)),
        known.activations,
        on,
        allow_pickle=options.allow_pickle,
    )
    return {**errors, **based}, warnings


def _launch(
    known: Known,
    options: Options,
    adapters: Sequence[Deployed],
    targets: Sequence[str],
    folder: str,
) -> Launch:
    slots = max(1, min(options.max_loras, len(adapters)))
    return flags.launch(
        known.engine,
        flags.Fleet(
            options.served_base,
            folder,
            [item.name or item.id for item in adapters],
            max((item.rank for item in adapters), default=1),
            targets,
            slots,
            flags.cached([item.size for item in adapters], slots, options.cpu_memory),
        ),
    )


def _changes(
    previous: Mapping[str, routes.Route], adapters: Sequence[Deployed]
) -> dict[str, tuple[str, ...]]:
    """Names that are new, kept and gone, beside an earlier deployment; a dry run knows none."""
    if not previous or not all(item.name for item in adapters):
        return {}
    old = {route.adapter for route in previous.values() if route.adapter}
    new = {item.name for item in adapters if item.name}
    return {
        "new": tuple(sorted(new - old)),
        "kept": tuple(sorted(new & old)),
        "gone": tuple(sorted(old - new)),
    }


def _notes(options: Options, found: Mapping[str, routes.Route]) -> list[str]:
    notes = []
    if any(route.salt for route in found.values()):
        notes.append(
            f"{routes.ROUTES} and {routes.ROUTER} hold the tenants' cache salts: random, so no two "
            "runs write the same, and secrets between tenants"
        )
    before = options.previous or "the folder of the previous deployment"
    notes.append(
        f"to roll back, point engine and router at {before} again; originals are as before"
    )
    return notes


def _finish(
    target: Staging, report: DeployReport, found: Mapping[str, routes.Route], done: Written
) -> DeployReport:
    """Routes, the router's config, the engine's files, the sidecar; the report names them all."""
    digest = hashlib.sha256("".join(sorted(done.digests.values())).encode()).hexdigest()
    target.write(
        routes.ROUTES,
        [routes.encode(report.engine, report.base, found, report.left, digest)],
    )
    target.write(routes.ROUTER, [routes.router(report.engine, found)])
    for name, text in report.launch.files.items():
        target.write(name, [text.encode()])
    paths = (path for path in target.root.rglob("*") if path.is_file())
    files = sorted(os.fspath(path.relative_to(target.root)) for path in paths)
    report = replace(report, files=(*files, SIDECAR))
    document = {**report.to_dict(), "output": base_name(report.output)}
    document["plan"] = base_name(report.plan)
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    target.write(SIDECAR, [text.encode("utf-8", "replace")])
    return report
