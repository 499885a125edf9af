"""What the README and examples/ show is run: commands succeed and print what is printed there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
CONSOLE = [body for kind, body in BLOCKS if kind == "console"]
PYTHON = [body for kind, body in BLOCKS if kind == "python"]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The example adapters, and the program on PATH."""
    shutil.copytree(ROOT / "examples" / "adapters", tmp_path, dirs_exist_ok=True)
    shutil.copytree(ROOT / "examples" / "fleet" / "adapters", tmp_path / "tenants")
    program = tmp_path / "bin" / "adapterops"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m adapterops "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def similar(shown: str, printed: str) -> bool:
    """The same words, numbers within 2 % (another machine's BLAS rounds otherwise)."""
    a, b = shown.split(), printed.split()
    if [NUMBER.sub("#", word) for word in a] != [NUMBER.sub("#", word) for word in b]:
        return False
    pairs = zip(NUMBER.findall(" ".join(a)), NUMBER.findall(" ".join(b)), strict=True)
    return all(abs(float(x) - float(y)) <= 0.02 * abs(float(x)) + 1e-12 for x, y in pairs)


@pytest.mark.parametrize("block", CONSOLE, ids=range(len(CONSOLE)))
def test_console_blocks(place, block, request):
    if " smollm2 " in block:
        (place / "smollm2").symlink_to(request.getfixturevalue("smollm2"))
        if not (place / "baked").exists() and "-o baked" not in block:
            bake = [sys.executable, "-m", "adapterops", "bake", "smollm2", "code-seed0"]
            subprocess.run([*bake, "-o", "baked", "-q"], check=True, capture_output=True)
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        line, _, shown = part.partition("\n")
        while line.endswith("\\"):
            more, _, shown = shown.partition("\n")
            line = line[:-1] + more
        expected = re.search(r"# exit (\d+)$", line)
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert done.returncode == (int(expected[1]) if expected else 0), done.stderr
        if shown.strip():
            assert similar(shown, done.stdout + done.stderr), done.stdout + done.stderr


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks(place, block):
    subprocess.run([sys.executable, "-c", block], check=True, capture_output=True, text=True)


def test_there_is_something_to_run():
    assert len(CONSOLE) >= 2 and PYTHON


def test_demo(place):
    done = subprocess.run(
        [str(ROOT / "examples" / "demo.sh")], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("of the exact sum") == 3


def test_results_in_the_readme_are_the_committed_ones():
    """The speed table is what benchmarks/ renders from its results file."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from harness import latest_table
    finally:
        sys.path.pop(0)
    assert latest_table(ROOT / "benchmarks" / "results") in TEXT


def test_task_losses_in_the_readme_are_the_committed_ones():
    """Every loss that benchmarks/task_loss.py measured last, to the digits shown."""
    newest = max((ROOT / "benchmarks" / "results" / "task_loss").glob("*.json"))
    rows = json.loads(newest.read_text())["rows"]
    losses = [v for row in rows for name, v in row["figures"].items() if name.startswith("loss")]
    assert len(losses) == 12
    for loss in losses:
        assert f"{loss:.4f}" in TEXT


def test_losses_of_merges_in_the_readme_are_the_committed_ones():
    """Every mean that benchmarks/method_loss.py measured last, in the order of its rows."""
    newest = max((ROOT / "benchmarks" / "results" / "method_loss").glob("*.json"))
    means: dict[str, list[float]] = {}
    for row in json.loads(newest.read_text())["rows"]:
        way = row["name"].partition(", ")[2]
        means.setdefault(way, []).append(row["figures"]["loss mean"])
    table = TEXT[TEXT.index("<!-- method loss -->") :].partition("\n\n")[0].splitlines()[3:]
    assert len(table) == len(means) == 12
    for line, losses in zip(table, means.values(), strict=True):
        shown = line.strip("|").split("|")[1:6]
        wanted = [*losses, sum(losses) / len(losses)]
        assert [cell.strip() for cell in shown] == [f"{loss:.3f}" for loss in wanted]


def test_divergences_of_baked_models_in_the_readme_are_the_committed_ones():
    """KL in 1e-5 nats, as benchmarks/bake_quality.py measured them last."""
    newest = max((ROOT / "benchmarks" / "results" / "bake_quality").glob("*.json"))
    rows = {row["name"]: row["figures"] for row in json.loads(newest.read_text())["rows"]}
    table = TEXT[TEXT.index("<!-- bake quality -->") :].partition("\n\n")[0].splitlines()[3:]
    assert len(table) == 6
    for line in table:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        mix = cells[0].replace("×", "x")
        shown = [float(cell.replace(",", "")) for cell in cells[2:6]]
        measured = [
            1e5 * rows[f"bake quality: bfloat16, {mix}, {how}"]["KL"]
            for how in ("base", "exact", "compensated", "PEFT")
        ]
        assert shown == pytest.approx(measured, rel=0.06)
