"""Imports point one way, and the public names are what is promised."""

from __future__ import annotations

import ast
from pathlib import Path

import adapterops

PACKAGE = Path(adapterops.__file__).parent

# A module may import from its own layer and from those before it.
LAYERS = [
    {"", "errors", "arrays", "suggestion"},
    {"files", "casts", "linalg", "factors", "geometry", "stream", "rounding", "rules"},
    {"formats", "certificate", "options"},
    {"ranks", "scaling", "metric", "moduleweights", "provenance", "extras", "serving", "composed"},
    {"frontier", "knapsack", "allocate"},
    {"plan", "basemodel", "activations", "batch", "inspection"},
    {"target", "rebased", "operators", "derived", "extraction", "weighting"},
    {"align", "dense", "sums", "krylov", "rangefinder", "storing", "origins", "kernels", "passes"},
    {"choosing", "derive", "descriptions", "layout", "certify", "card", "promises"},
    {"prepare"},
    {"writing"},
    {"companions"},
    {"save"},
    {"adapter"},
    {"changes"},
    {"inputs", "difference", "baking", "undoing", "originals"},
    {"judging", "combining"},
    {"expression"},
    {"fleet"},
    {"analysis", "recipe"},
    {"checking"},
    {"verbs"},
    {"render"},
    {"cli"},
]

# The same within fleet/, where a package may import from itself and from those before it.
FLEET = [
    {"", "types", "ray_run"},
    {"consent", "signing", "tenants", "verifying"},
    {"indexing", "plans"},
    {"deploy", "grouping", "relating"},
    {"replanning", "representing", "summary"},
    {"planning"},
]


def layer_of(module: str) -> tuple[int, int]:
    _, head, sub = [*module.split("."), "", ""][:3]
    outer = next(index for index, names in enumerate(LAYERS) if head in names)
    if head != "fleet":
        return outer, 0
    return outer, next(index for index, names in enumerate(FLEET) if sub in names)


def imports(path: Path) -> set[str]:
    """adapterops modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "adapterops":
                known = {a.name for a in node.names if (PACKAGE / f"{a.name}.py").exists()}
                found |= {f"adapterops.{name}" for name in known} or {"adapterops"}
            else:
                found.add(node.module)
    return {name for name in found if name.partition(".")[0] == "adapterops"}


def test_imports_point_one_way():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(p for p in parts if p != "__init__")
        if name in ("adapterops", "adapterops.__main__"):
            continue
        wrong += [
            f"{name} imports {other}" for other in imports(path) if layer_of(other) > layer_of(name)
        ]
    assert not wrong


def test_public_names():
    assert adapterops.__all__ == [
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
    for name in adapterops.__all__:
        assert getattr(adapterops, name) is not None
    assert callable(adapterops.merge)  # no submodule of that name shadows the function
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert not modules & set(adapterops.__all__)


def test_every_module_and_public_function_is_documented():
    missing = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        if path.read_text().strip() and not ast.get_docstring(tree) and path.name != "__main__.py":
            missing.append(str(path))
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
            if public and path.name != "errors.py" and not ast.get_docstring(node):
                missing.append(f"{path.name}:{node.name}")
    assert not missing
