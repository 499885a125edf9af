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
    from adapterops.certificate import ModuleReport, PlanReport, Report
    from adapterops.checking.findings import Finding
    from adapterops.checking.report import CheckReport
    from adapterops.difference.report import DiffReport
    from adapterops.errors import AdapterOpsError
    from adapterops.factors import Factors
    from adapterops.inspection.report import Inspection
    from adapterops.verbs.check import check
    from adapterops.verbs.compress import compress
    from adapterops.verbs.convert import convert
    from adapterops.verbs.diff import diff
    from adapterops.verbs.extract import extract
    from adapterops.verbs.inspect import inspect
    from adapterops.verbs.merge import merge

_PUBLIC = {
    "Adapter": "adapterops.adapter",
    "AdapterOpsError": "adapterops.errors",
    "CheckReport": "adapterops.checking.report",
    "DiffReport": "adapterops.difference.report",
    "Factors": "adapterops.factors",
    "Finding": "adapterops.checking.findings",
    "Inspection": "adapterops.inspection.report",
    "ModuleReport": "adapterops.certificate",
    "PlanReport": "adapterops.certificate",
    "Report": "adapterops.certificate",
    "check": "adapterops.verbs.check",
    "compress": "adapterops.verbs.compress",
    "convert": "adapterops.verbs.convert",
    "diff": "adapterops.verbs.diff",
    "extract": "adapterops.verbs.extract",
    "inspect": "adapterops.verbs.inspect",
    "merge": "adapterops.verbs.merge",
    "open_adapter": "adapterops.adapter",
}

__all__ = [
    "Adapter",
    "AdapterOpsError",
    "CheckReport",
    "DiffReport",
    "Factors",
    "Finding",
    "Inspection",
    "ModuleReport",
    "PlanReport",
    "Report",
    "__version__",
    "check",
    "compress",
    "convert",
    "diff",
    "extract",
    "inspect",
    "merge",
    "open_adapter",
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
