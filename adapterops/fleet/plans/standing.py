"""What another plan takes over from one: its consent, which must still hold, and its files."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import numpy as np

from adapterops.errors import FileError, FormatError, IncompatibleError
from adapterops.files.clone import duplicate
from adapterops.files.output import Staging
from adapterops.files.publish import sync_directory, sync_file
from adapterops.fleet.consent.policy import Consent
from adapterops.fleet.plans.plan import Plan, Representative

_AGAIN = "plan again: cluster FLEET --previous PLAN -o PLAN2"
_ROUNDING = 1e-12  # of a bound that was met when the plan was made


def check_consent(plan: Plan, consent: Consent, limit: float) -> None:
    """Raise IncompatibleError where a plan serves somebody by what he does not consent to."""
    names = sorted({*plan.served, *(x for rep in plan.representatives.values() for x in rep.holds)})
    index = {name: place for place, name in enumerate(names)}
    permissions = consent.permissions(names)
    bounds = permissions.bounds(max(limit, 1.0))
    for rep in plan.representatives.values():
        members = np.array([index[name] for name in rep.members], np.int64)
        for server in rep.holds:
            refused = members[~permissions.allowed(index[server], members)]
            if len(refused):
                raise IncompatibleError(
                    f"{rep.id} holds weights of {server!r}, by which {names[refused[0]]!r} must "
                    "not be served by this policy",
                    hint=_AGAIN,
                )
    for name, item in plan.served.items():
        if item.error > bounds[index[name]] * (1 + _ROUNDING):
            raise IncompatibleError(
                f"{name!r} is served by {item.by} with an error of {item.error:.3g}, which this "
                "policy does not allow it",
                hint=_AGAIN,
            )


def carry(plan: Path, representatives: list[Representative], staging: Staging) -> list[str]:
    """Give the files of representatives that a plan wrote another name in a new plan.

    They are linked where the file system can, else copied; the new plan stands alone. The result
    names them, relative to it. Raises FormatError for a path that leads out of the plan, FileError
    for one that is not there.
    """
    names, folders = [], set[Path]()
    for rep in representatives:
        relative = PurePosixPath(rep.path)
        if relative.is_absolute() or ".." in relative.parts or not relative.parts:
            raise FormatError(f"the path {rep.path!r} of {rep.id} leads out of it", path=plan)
        source = plan / relative
        if not source.exists():
            raise FileError(f"the representative {rep.id} is gone", path=source)
        files = [source]
        if source.is_dir():
            files = sorted(Path(top, x) for top, _, found in os.walk(source) for x in found)
        for file in files:
            name = str(file.relative_to(plan))
            target = staging.path(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            _named(file, target)
            names.append(name)
            folders |= {staging.root / part for part in PurePosixPath(name).parents}
    for name in names:  # after all links were made: a journal then commits them at once
        sync_file(staging.path(name))
    for folder in sorted(folders, reverse=True):
        sync_directory(folder)
    return names


def _named(source: Path, target: Path) -> None:
    """A second name for a file, not durable yet, or a copy that is."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        duplicate(source, target)
