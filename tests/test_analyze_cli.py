"""analyze on the command line, its picture, and real adapters."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterops as ao
from adapterops.errors import AdapterOpsError
from adapterops.render import plots
from adapterops.render.analyze import page
from adapterops.render.analyze_plot import analysis_figure
from tests.support import write_peft
from tests.trained import SHAPES, mapped, small_fleet, trained


def run(*arguments: Any, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    root = Path(ao.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "adapterops", *map(str, arguments)],
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
    write_peft(folder / "big one", mapped(trained(7, 60), lambda B, A: (20 * B, A)))
    return folder


def test_command(fleet: Path) -> None:
    done = run("analyze", "a", "b", "-w", "0.7,0.3", cwd=fleet)
    assert "one initialisation (seed), different training" in done.stdout
    assert "to begin with: adapterops merge a b -w 0.7,0.3" in done.stdout
    assert "rank needed" in done.stdout and "ties, knots" in done.stdout
    assert run("analyze", "a:0.7", "b:0.3", cwd=fleet).stdout == done.stdout
    assert run("analyze", "a", "b", "-q", cwd=fleet).stdout == ""
    verbose = run("analyze", "a", "b", "c", "-v", cwd=fleet).stdout
    assert all(name in verbose for name in SHAPES)
    (fleet / "list").write_text("a\nb\n")
    report = json.loads(run("analyze", "--from", "list", "--json", cwd=fleet).stdout)
    assert report["schema"] == "adapterops.analyze/1" and set(report["modules"]) == set(SHAPES)
    assert [one["name"] for one in report["inputs"]] == ["a", "b"]


def test_what_a_merge_asks_for_is_in_the_command(corpus: Path, tmp_path: Path) -> None:
    """Heads that differ, and pickles: real checkpoints, and what the command makes of them."""
    heads = [
        corpus / "paulohenriquecrs__RoBERTa_SEQ_CLS_LoRA_Portuguese" / f"checkpoint-{step}"
        for step in (500, 8610)
    ]
    image = corpus / "catundchat__stable-diffusion-v1.5-lora" / "pytorch_lora_weights"
    pickled = [image.with_suffix(".bin"), image.with_suffix(".safetensors")]
    for pair, words in ((heads, "--extras first"), (pickled, "--allow-pickle")):
        given = [*pair, "--samples", 10, "--json", *(["--allow-pickle"] * (pair is pickled))]
        found = json.loads(run("analyze", *given, cwd=tmp_path).stdout)["suggestion"]
        assert found["command"].endswith(words)
        assert any("heads, biases" in why for why in found["reasons"]) == (pair is heads)
        run(*shlex.split(found["command"])[1:], "-o", pair[0].stem, cwd=tmp_path)


def test_every_command_that_is_suggested_runs(fleet: Path) -> None:
    report = json.loads(run("analyze", "a", "big one", "--json", cwd=fleet).stdout)
    commands = [report["suggestion"]["command"], *(c for _, c in report["suggestion"]["others"])]
    assert len(commands) == 3 and any("'big one'" in command for command in commands)
    for number, command in enumerate(commands):
        name, *words = shlex.split(command)
        assert name == "adapterops"
        run(*words, "-o", f"out{number}", cwd=fleet)
        assert (fleet / f"out{number}" / "adapter_model.safetensors").is_file()


def test_command_errors(fleet: Path) -> None:
    assert "at least two adapters" in run("analyze", "a", cwd=fleet, code=2).stderr
    assert "no such file" in run("analyze", "a", "gone", cwd=fleet, code=6).stderr
    assert ".svg or .png" in run("analyze", "a", "b", "--plot", "m.pdf", cwd=fleet, code=2).stderr
    (fleet / "there.svg").write_text("mine")
    done = run("analyze", "a", "b", "--plot", "there.svg", cwd=fleet, code=2)
    assert "exists" in done.stderr and (fleet / "there.svg").read_text() == "mine"


@pytest.mark.parametrize("names", [["a", "b"], ["a", "part", "c"]], ids=["two", "three"])
def test_picture(fleet: Path, tmp_path: Path, names: list[str]) -> None:
    report = ao.analyze([fleet / name for name in names], samples=64)
    files = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for file in files:
        plots.save_figure(analysis_figure(report), file)
    text = files[0].read_text()
    assert files[0].read_bytes() == files[1].read_bytes()
    for title in ("cosine", "signs differ, %", "overlap of the B side", "overlap of the A side"):
        assert title in text
    first = report.modules["layers.0.q"]
    lowest = min(first.cosines)
    assert f">{lowest:.3g}<" in text.replace("\N{MINUS SIGN}", "-")
    assert ("no two adapters change" in text) is False
    plots.save_figure(analysis_figure(report), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_picture_of_modules_that_only_one_has(fleet: Path, tmp_path: Path) -> None:
    report = ao.analyze([fleet / "a", fleet / "part"], samples=64)
    plots.save_figure(analysis_figure(report), tmp_path / "x.svg")
    assert "no two adapters change" in (tmp_path / "x.svg").read_text()


def test_names_cannot_steer_a_terminal(tmp_path: Path) -> None:
    files = [write_peft(tmp_path / f"\x1b[31m{i}", trained(i, 50)) for i in range(2)]
    text = page(ao.analyze(files, samples=10), verbose=True)
    assert "\x1b" not in text and "\\x1b[31m0" in text


RUNS = {
    "AguLeon__LoRA_RoBERTa_AGNews": ("checkpoint-500", "checkpoint-1200"),
    "paulohenriquecrs__RoBERTa_SEQ_CLS_LoRA_Portuguese": ("checkpoint-500", "checkpoint-8610"),
    "wyek1n__MLX-CLI": ("0000100", "0000200"),
}


@pytest.mark.parametrize("name", RUNS)
def test_real_runs(corpus: Path, name: str) -> None:
    """One run at two times is known as such, or as a near duplicate."""
    files = [corpus / name / step for step in RUNS[name]]
    report = ao.analyze(files, samples=256)
    assert page(report)
    [pair] = report.pairs
    assert pair.relation in ("one-run", "duplicate", "scaled") and pair.start is not None
    assert pair.start > 0.9 and pair.rows is not None and pair.rows.overlap > 0.5
    assert report.suggestion.command and "-m" not in report.suggestion.command.split()
    assert all(not one.note for one in report.candidates)


def test_two_owners_on_one_base(corpus: Path) -> None:
    files = [corpus / name / "checkpoint-500" for name in list(RUNS)[:2]]
    report = ao.analyze(files, samples=256)
    [pair] = report.pairs
    assert pair.relation in ("orthogonal", "alike") and abs(pair.start or 0) < 0.05
    exact = ao.diff(files).pair
    assert exact is not None
    assert pair.cosine == pytest.approx(exact.cosine, abs=1e-12)
    assert [one.norm for one in report.inputs] == pytest.approx(exact.norms, rel=1e-12)
    for what, kept in (("columns", pair.columns), ("rows", pair.rows)):
        assert kept is not None and kept.overlap < 0.2, what
    assert pair.conflict is not None and 0.4 < pair.conflict.count < 0.55


def test_image_adapters(corpus: Path) -> None:
    files = sorted((corpus / "catundchat__stable-diffusion-v1.5-lora").glob("*.safetensors"))
    report = ao.analyze([files[0], files[0]], samples=256)
    [pair] = report.pairs
    assert pair.relation == "duplicate" and "the same ΔW up to rounding" in pair.text
    assert pair.distance is not None and pair.distance < 1e-13
    assert pair.conflict is not None and pair.conflict.count == 0.0
    assert np.allclose(report.candidates[0].retention, 1.0)


def test_every_adapter_of_the_corpus_is_looked_at_or_refused(corpus: Path) -> None:
    manifest = json.loads((corpus / "manifest.json").read_text())
    folders = {entry["file"].partition("/")[0]: entry["file"] for entry in manifest}
    looked = 0
    for name in folders.values():
        file = corpus / name
        try:
            adapter = ao.open_adapter(file, allow_pickle=True)
        except AdapterOpsError:
            continue
        report = ao.analyze([adapter, 0.5 * adapter], samples=16)
        json.dumps(report.to_dict(), allow_nan=False)
        assert report.pairs[0].relation in ("scaled", "zero"), name
        assert re.search(r"‖ΔW‖", page(report))
        looked += 1
    assert looked >= 4
