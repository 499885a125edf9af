"""diff on the command line, and its pictures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import adapterops as ao
from adapterops.difference.report import DiffReport
from adapterops.errors import OutputExistsError
from adapterops.files.pictures import description
from adapterops.render import plots
from tests.support import pairs, write_peft
from tests.trained import BASE, SHAPES, STEM, compare, mapped, small_fleet


def run(*arguments: Any, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    root = Path(ao.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "adapterops", "diff", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fleet")
    small_fleet(folder)
    return folder


def test_command(fleet: Path) -> None:
    done = run("a", "twin", cwd=fleet)
    assert "the same adapter in another gauge" in done.stdout and "rounding allows" in done.stdout
    done = run("a", "b", "-v", cwd=fleet)
    assert "shared initialisation, different training" in done.stdout
    assert all(name in done.stdout for name in SHAPES)
    done = run("a", "part", cwd=fleet)
    assert "only in A (zero in the other): 2 modules, layers.2.q, layers.2.v" in done.stdout
    assert run("a", "b", "-q", cwd=fleet).stdout == ""
    report = json.loads(run("a", "b", "--json", cwd=fleet).stdout)
    assert report["schema"] == "adapterops.diff/1" == DiffReport.schema
    assert report["pair"]["verdict"]["kind"] == "shared-start"
    assert set(report["pair"]["modules"]) == set(SHAPES)
    found = run(".", "--json", cwd=fleet)  # a folder of adapters
    assert [item["name"] for item in json.loads(found.stdout)["inputs"]] == sorted(
        ["a", "b", "c", "part", "twin"]
    )
    (fleet / "list").write_text("a\nb\n")
    assert run("c", "--from", "list", cwd=fleet).stdout.count("peft") == 3


def test_figures_below_their_floor_are_bounds(fleet: Path) -> None:
    table = run("a", "b", "twin", cwd=fleet).stdout
    rows = [line for line in table.splitlines() if re.match(r"^[13] .*%", line)]
    assert all("< " in row for row in rows), table
    exact = compare(fleet / "a", fleet / "twin")
    assert 0.0 < exact.distance <= exact.floor


def test_command_errors(fleet: Path) -> None:
    assert "at least two adapters" in run("a", cwd=fleet, code=2).stderr
    assert "no such file" in run("a", "gone", cwd=fleet, code=6).stderr
    assert "pictures are .svg or .png" in run("a", "b", "-o", "m.pdf", cwd=fleet, code=2).stderr
    (fleet / "there.svg").write_text("mine")
    assert "exists" in run("a", "b", "-o", "there.svg", cwd=fleet, code=2).stderr
    assert (fleet / "there.svg").read_text() == "mine"


def test_pictures_are_deterministic(fleet: Path) -> None:
    files = [fleet / name for name in ("a", "b", "c", "twin", "part")]
    run(*files, "-o", "m.svg", "-q", cwd=fleet)
    run(*files, "-o", "m.svg", "-q", "--overwrite", cwd=fleet)
    report = ao.diff(files)
    plots.save_figure(plots.matrix_figure(report), fleet / "again.svg")
    assert (fleet / "again.svg").read_bytes() == (fleet / "m.svg").read_bytes()
    text = (fleet / "m.svg").read_text()
    assert "cosine" in text and "twin" in text and "<dc:date>" not in text
    pictures = [fleet / f"{n}.png" for n in "12"]
    for path in pictures:
        plots.save_figure(plots.matrix_figure(report), path)
    assert pictures[0].read_bytes() == pictures[1].read_bytes() != b""
    with pytest.raises(OutputExistsError):
        plots.save_figure(plots.matrix_figure(report), fleet / "m.svg")
    plots.save_figure(plots.matrix_figure(report), fleet / "said.svg", description="from <here>")
    assert description(fleet / "said.svg") == "from <here>"


def test_pictures_of_odd_names_many_and_zero_adapters(tmp_path: Path) -> None:
    zero = mapped(BASE, lambda B, A: (0 * B, A))
    names = ["$x_1$", "アダプタ", "n" * 60, *(f"n{i}" for i in range(15))]
    files = [
        write_peft(tmp_path / name, zero if i == 1 else pairs(i, {STEM: (40, 48)}, 2))
        for i, name in enumerate(names)
    ]
    for chosen in (files, files[:3]):
        out = tmp_path / f"{len(chosen)}.svg"
        plots.save_figure(plots.matrix_figure(ao.diff(chosen)), out)
        assert ("$x_1$" in out.read_text() and "–" in out.read_text()) or len(chosen) > 16


def test_without_matplotlib_the_way_out_is_named(fleet: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.argv = ['x', 'diff', 'a', 'b', '-o',"
        " 'p.svg']\nfrom adapterops.cli import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=fleet, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "pip install 'adapterops[report]'" in done.stderr
    assert done.stdout == "" and not (fleet / "p.svg").exists()


def test_nothing_heavy_is_imported(fleet: Path) -> None:
    code = (
        "import sys, adapterops; adapterops.diff(['a', 'b']); adapterops.diff(['a', 'b', 'c']);"
        "print(sorted({'torch', 'scipy', 'matplotlib', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=fleet, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
