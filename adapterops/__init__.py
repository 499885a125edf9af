"""Arithmetic on LoRA adapters: exact where exactness is possible, certified where it is not.

>>> import adapterops as ao
>>> report = ao.merge(["a", "b"], [0.7, 0.3], out="merged", rank=16)
>>> mix = 0.7 * ao.open_adapter("a") + 0.3 * ao.open_adapter("b")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from adapterops.adapter import Adapter, open_adapter
    from adapterops.analysis.report import AnalysisReport
    from adapterops.baking.report import BakeReport
    from adapterops.certificate import ModuleReport, PlanReport, Report
    from adapterops.checking.findings import Finding
    from adapterops.checking.report import CheckReport
    from adapterops.difference.report import DiffReport
    from adapterops.errors import AdapterOpsError
    from adapterops.factors import Factors
    from adapterops.fleet.deploy.report import DeployReport
    from adapterops.fleet.indexing.report import IndexReport
    from adapterops.fleet.plans.outcome import ClusterReport
    from adapterops.fleet.replanning.assigning import AssignReport
    from adapterops.fleet.summary.served import FleetReport
    from adapterops.inspection.report import Inspection
    from adapterops.judging.report import DriftReport
    from adapterops.undoing.restoring import UnbakeReport
    from adapterops.verbs.analyze import analyze
    from adapterops.verbs.assign import assign
    from adapterops.verbs.bake import bake
    from adapterops.verbs.calc import calc
    from adapterops.verbs.check import check
    from adapterops.verbs.cluster import cluster
    from adapterops.verbs.compress import compress
    from adapterops.verbs.convert import convert
    from adapterops.verbs.deploy import deploy
    from adapterops.verbs.diff import diff
    from adapterops.verbs.drift import drift
    from adapterops.verbs.extract import extract
    from adapterops.verbs.index import index
    from adapterops.verbs.inspect import inspect
    from adapterops.verbs.merge import merge
    from adapterops.verbs.methods import MethodInfo, methods
    from adapterops.verbs.report import report
    from adapterops.verbs.run import run
    from adapterops.verbs.unbake import unbake

_PUBLIC = {
    "Adapter": "adapterops.adapter",
    "AdapterOpsError": "adapterops.errors",
    "AnalysisReport": "adapterops.analysis.report",
    "AssignReport": "adapterops.fleet.replanning.assigning",
    "BakeReport": "adapterops.baking.report",
    "CheckReport": "adapterops.checking.report",
    "ClusterReport": "adapterops.fleet.plans.outcome",
    "DeployReport": "adapterops.fleet.deploy.report",
    "DiffReport": "adapterops.difference.report",
    "DriftReport": "adapterops.judging.report",
    "Factors": "adapterops.factors",
    "Finding": "adapterops.checking.findings",
    "FleetReport": "adapterops.fleet.summary.served",
    "IndexReport": "adapterops.fleet.indexing.report",
    "Inspection": "adapterops.inspection.report",
    "MethodInfo": "adapterops.verbs.methods",
    "ModuleReport": "adapterops.certificate",
    "PlanReport": "adapterops.certificate",
    "Report": "adapterops.certificate",
    "UnbakeReport": "adapterops.undoing.restoring",
    "analyze": "adapterops.verbs.analyze",
    "assign": "adapterops.verbs.assign",
    "bake": "adapterops.verbs.bake",
    "calc": "adapterops.verbs.calc",
    "check": "adapterops.verbs.check",
    "cluster": "adapterops.verbs.cluster",
    "combine": "adapterops.combining",
    "compress": "adapterops.verbs.compress",
    "convert": "adapterops.verbs.convert",
    "deploy": "adapterops.verbs.deploy",
    "diff": "adapterops.verbs.diff",
    "drift": "adapterops.verbs.drift",
    "extract": "adapterops.verbs.extract",
    "index": "adapterops.verbs.index",
    "inspect": "adapterops.verbs.inspect",
    "merge": "adapterops.verbs.merge",
    "methods": "adapterops.verbs.methods",
    "open_adapter": "adapterops.adapter",
    "report": "adapterops.verbs.report",
    "run": "adapterops.verbs.run",
    "unbake": "adapterops.verbs.unbake",
}

__all__ = [
    "Adapter",
    "AdapterOpsError",
    "AnalysisReport",
    "AssignReport",
    "BakeReport",
    "CheckReport",
    "ClusterReport",
    "DeployReport",
    "DiffReport",
    "DriftReport",
    "Factors",
    "Finding",
    "FleetReport",
    "IndexReport",
    "Inspection",
    "MethodInfo",
    "ModuleReport",
    "PlanReport",
    "Report",
    "UnbakeReport",
    "__version__",
    "analyze",
    "assign",
    "bake",
    "calc",
    "check",
    "cluster",
    "combine",
    "compress",
    "convert",
    "deploy",
    "diff",
    "drift",
    "extract",
    "index",
    "inspect",
    "merge",
    "methods",
    "open_adapter",
    "report",
    "run",
    "unbake",
]


def __getattr__(name: str) -> Any:
    """Public names are loaded when first used, so that importing the package costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'adapterops' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
