"""Texts of six domains that come with Python and with packages that the examples need anyway."""

from __future__ import annotations

import importlib
import inspect
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path

from train_adapters import Documents, read_documents

_FOLDERS = ("numpy", "numpy.linalg", "numpy.fft", "numpy.polynomial", "numpy.random", "numpy.ma")


def _site_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def headers() -> Documents:
    """C++ headers of PyTorch's tensor library (BSD-3-Clause)."""
    root = _site_packages() / "torch" / "include"
    found = [*(root / "c10").rglob("*.h"), *(root / "ATen" / "native").glob("*.h")]
    return {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in found}


def algebra() -> Documents:
    """Unit tests of SymPy's solvers, series, integrals and simplifications (BSD-3-Clause)."""
    root = _site_packages() / "sympy"
    parts = ("solvers", "series", "integrals", "simplify", "functions", "calculus", "core")
    found = [path for part in parts for path in (root / part).rglob("test_*.py")]
    return {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in found}


def arrays() -> Documents:
    """Docstrings of NumPy's public functions and classes (BSD-3-Clause)."""
    found: Documents = {}
    for folder in _FOLDERS:
        module = importlib.import_module(folder)
        for name in sorted(getattr(module, "__all__", ())):
            text = inspect.getdoc(getattr(module, name))
            if text and len(text) > 600 and text not in found.values():
                found[f"{folder}.{name}"] = text
    return found


def operators() -> Documents:
    """PyTorch's list of operators in YAML (BSD-3-Clause), cut where names' first letters change."""
    path = _site_packages() / "torchgen" / "packaged" / "ATen" / "native" / "native_functions.yaml"
    found: Documents = {}
    for entry in re.split(r"(?m)^(?=- func: )", path.read_text("utf-8"))[1:]:
        name = re.match(r"- func: (\w{1,3})", entry)
        if name:
            found[name[1]] = found.get(name[1], "") + entry
    return found


DOMAINS: dict[str, Callable[[], Documents]] = {
    "code": lambda: read_documents("code"),
    "docs": lambda: read_documents("docs"),
    "headers": headers,
    "algebra": algebra,
    "arrays": arrays,
    "operators": operators,
}
