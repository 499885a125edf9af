"""report: a plan summed up, for a terminal, a file or a page."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from adapterops.basemodel.shapes import load
from adapterops.errors import AdapterOpsError, UsageError
from adapterops.files.output import SIDECAR
from adapterops.fleet.plans.offboarded import index_of
from adapterops.fleet.plans.plandiff import diff
from adapterops.fleet.plans.planfile import plan_folder, read_plan
from adapterops.fleet.summary.served import FleetReport, summary
from adapterops.options import is_whole
from adapterops.serving.objections import engine_named

_Path = str | os.PathLike[str]


def report(
    plan: _Path,
    *,
    fleet: _Path | None = None,
    previous: _Path | None = None,
    engine: str = "vllm",
    max_loras: int = 32,
    base: _Path | None = None,
) -> FleetReport:
    """Sum a plan up: what serves whom, every tenant's error, memory, and what was not grouped.

    Nothing is computed again: errors are those that `cluster` and `assign` verified, similarities
    those of the sketches in the index.

    Args:
        plan: a PLAN directory.
        fleet: the index, where it is not where the plan says.
        previous: an earlier PLAN to compare with, instead of the one that the plan was made from.
        engine: vllm, sglang, lorax, tgi, trtllm or portable: whose memory is computed.
        max_loras: adapters in one batch, which GPU memory is reserved for.
        base: the base model, a checkpoint or config.json, for the shapes of modules that the
            engine reserves memory for and no adapter has.

    Raises:
        AdapterOpsError: one of the tree in `adapterops.errors`.
    """
    serving = engine_named(engine)
    if not is_whole(max_loras) or max_loras < 1:
        raise UsageError(f"--max-loras {max_loras!r}: expected a whole number of at least 1")
    found = read_plan(plan)
    index, warnings = None, []
    try:
        index = index_of(found, None if fleet is None else os.fspath(fleet))
    except AdapterOpsError as error:
        if fleet is not None:
            raise
        warnings.append(f"no similarities, no GPU bytes: {error}")
    shapes = None if base is None else load(os.fspath(base)).shapes
    changes = _recorded(plan) if previous is None else diff(read_plan(previous), found).to_dict()
    return summary(
        found,
        os.fspath(plan_folder(plan)),
        index,
        serving,
        slots=int(max_loras),
        base=shapes,
        changes=changes,
        warnings=warnings,
    )


def _recorded(plan: _Path) -> Mapping[str, Any] | None:
    """What the plan's own report says that it changed, None where it was made from no other."""
    try:
        document = json.loads((plan_folder(plan) / SIDECAR).read_bytes())
    except (OSError, ValueError):
        return None
    changes = document.get("changes") if isinstance(document, dict) else None
    known = isinstance(changes, dict) and changes.get("schema") == "adapterops.plandiff/1"
    return changes if known else None
