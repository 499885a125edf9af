"""adapterops check as a command: what is printed, exit codes, JSON, the table of codes."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import adapterops as ao
from adapterops.checking.findings import RULES
from adapterops.cli.check import command
from tests.defects import at, kohya, llama
from tests.inspecting import call


def planted(folder: Path) -> Path:
    """A clean adapter, one with a warning and a note, one with an error."""
    llama(1).write(folder / "clean")
    noted = llama(2, fan_in_fan_out=True, merge_weights=True)
    noted.write(folder / "noted")
    wrong = llama(3)
    wrong.tensors[at(2)] = wrong.tensors[at(2)].copy()
    wrong.tensors[at(2)].flat[3] = np.nan
    wrong.write(folder / "wrong")
    return folder


def test_the_worst_comes_first_and_the_totals_last(tmp_path: Path) -> None:
    planted(tmp_path)
    done = call("check", ".", cwd=tmp_path, code=3)
    lines = done.stdout.splitlines()
    heads = [line for line in lines if line and not line.startswith(" ")]
    assert [head.split()[0] for head in heads[:2]] == ["wrong", "noted"]
    assert lines[-2] == (
        "3 adapters: 1 with errors, 1 with warnings, 1 clean; 1 error, 1 warning, 1 note "
        "(notes with -v)"
    )
    assert lines[-1] == "non-finite 1, fan-in-fan-out 1"
    assert "config-key" not in done.stdout and done.stderr == ""
    assert "config-key" in call("check", ".", "-v", cwd=tmp_path, code=3).stdout


def test_a_clean_adapter_gets_one_line(tmp_path: Path) -> None:
    planted(tmp_path)
    line = call("check", "clean", cwd=tmp_path).stdout
    assert line.startswith("clean: clean  (peft, 24 modules, ") and line.count("\n") == 1
    assert call("check", "clean", "-q", cwd=tmp_path).stdout == ""


def test_quiet_leaves_warnings_and_errors(tmp_path: Path) -> None:
    planted(tmp_path)
    assert "fan-in-fan-out" in call("check", "noted", "-q", cwd=tmp_path).stdout
    assert "non-finite" in call("check", "wrong", "-q", cwd=tmp_path, code=3).stdout


def test_exit_codes(tmp_path: Path) -> None:
    planted(tmp_path)
    call("check", "clean", "noted", cwd=tmp_path, code=0)
    call("check", "noted", "--strict", cwd=tmp_path, code=3)
    call("check", "clean", "--strict", cwd=tmp_path, code=0)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 8}))
    call("check", "wrong", "nothing", cwd=tmp_path, code=6)
    base = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "vocab_size": 9}
    base |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 8}
    (tmp_path / "config.json").write_text(json.dumps(base))
    call("check", "wrong", "--base", "config.json", cwd=tmp_path, code=4)
    call("check", "clean", "--engine", "vllm2", cwd=tmp_path, code=2)
    call("check", "clean", "--inputs", ".", cwd=tmp_path, code=2)
    call("check", cwd=tmp_path, code=2)
    call("check", "clean", "--alpha", "0", cwd=tmp_path, code=2)


def test_json_is_one_document(tmp_path: Path) -> None:
    planted(tmp_path)
    done = call("check", ".", "--json", cwd=tmp_path, code=3)
    document = json.loads(done.stdout)
    assert document["schema"] == "adapterops.check/1" and document["exit_code"] == 3
    assert document["summary"] | {"bytes": 0} == {
        "adapters": 3,
        "clean": 1,
        "bytes": 0,
        "errors": 1,
        "warnings": 1,
        "notes": 1,
        "codes": {"fan-in-fan-out": 1, "config-key": 1, "non-finite": 1},
    }
    by_name = {Path(entry["path"]).name: entry for entry in document["adapters"]}
    [finding] = by_name["wrong"]["findings"]
    assert finding["code"] == "non-finite" and finding["severity"] == "error"
    assert finding["scope"] == "file" and finding["path"] == "wrong"
    assert by_name["clean"]["worst"] is None and by_name["noted"]["worst"] == "warning"
    assert document == json.loads(json.dumps(ao_document(tmp_path, "."), default=str))


def ao_document(folder: Path, path: str) -> dict[str, Any]:
    """What the library says of the same, with the command's paths."""
    import os

    before = Path.cwd()
    os.chdir(folder)
    try:
        return ao.check(path).to_dict()
    finally:
        os.chdir(before)


def test_the_table_of_codes() -> None:
    shown = CliRunner().invoke(command, ["--list"])
    assert shown.exit_code == 0
    lines = shown.output.splitlines()
    assert len(lines) == len(RULES) + 1 and lines[1].split()[:3] == ["unreadable", "error", "file"]
    for rule in RULES.values():
        assert rule.meaning in shown.output and len(rule.meaning) < 72
        assert rule.severity in ("error", "warning", "note") and rule.scope in ("file", "set")


def test_the_table_of_codes_as_json(tmp_path: Path) -> None:
    document = json.loads(call("check", "--list", "--json", cwd=tmp_path).stdout)
    assert document["schema"] == "adapterops.check-rules/1"
    assert {row["code"] for row in document["rules"]} == set(RULES)


def test_paths_from_a_file_and_alphas_by_path(tmp_path: Path) -> None:
    for name in "ab":
        draft = llama(ord(name))
        draft.config = None
        draft.write(tmp_path, f"{name}.safetensors")
    (tmp_path / "list").write_text("a.safetensors\n# no\nb.safetensors\n")
    call("check", "--from", "list", cwd=tmp_path, code=3)
    call("check", "--from", "list", "--alpha", "8", cwd=tmp_path)
    done = call("check", "--from", "list", "--alpha", "a.safetensors=8", cwd=tmp_path, code=3)
    assert "1 with errors, 1 with warnings" in done.stdout


def test_names_that_would_steer_a_terminal(tmp_path: Path) -> None:
    llama(1, target_modules="\x1b[31m(").write(tmp_path / "a\x1b]0;x\x07")
    done = call("check", ".", cwd=tmp_path, code=3)
    assert "\x1b" not in done.stdout and "\\x1b" in done.stdout


def test_many_findings_are_cut_short(tmp_path: Path) -> None:
    for number in range(50):
        llama(number, layers=1, fan_in_fan_out=True).write(tmp_path / f"{number:02}")
    done = call("check", ".", cwd=tmp_path)
    assert "and 10 adapters more with findings (-v)" in done.stdout
    assert done.stdout.splitlines()[-1] == "fan-in-fan-out 50"
    assert "and 10 adapters" not in call("check", ".", "-v", cwd=tmp_path).stdout


def test_torch_is_not_needed_to_read_tensors(tmp_path: Path) -> None:
    kohya().write(tmp_path, "x.safetensors")
    code = (
        "import sys\nfrom adapterops.cli import main\n"
        "sys.argv = ['adapterops', 'check', 'x.safetensors', '--no-progress']\n"
        "try: main()\n"
        "except SystemExit as done: print(done.code, 'torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1] == "0 False" and "clean" in done.stdout


def test_pickles_are_compared_with_their_twin(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    draft = llama()
    for name, seed, code in (("same", 1, "twin-copy"), ("other", 2, "stale-twin")):
        draft.write(tmp_path / name)
        twin = {key: torch.from_numpy(x) for key, x in llama(seed).tensors.items()}
        torch.save(twin, tmp_path / name / "adapter_model.bin")
        [closed] = ao.check(tmp_path / name, jobs=1).findings
        assert closed.code == "stale-twin" and "may be another" in closed.message
        [opened] = ao.check(tmp_path / name, allow_pickle=True, jobs=1).findings
        assert opened.code == code
    with zipfile.ZipFile(tmp_path / "same" / "adapter_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", b"no pickle")
    [broken] = ao.check(tmp_path / "same", allow_pickle=True, jobs=1).findings
    assert broken.code == "stale-twin" and "cannot be read" in broken.message
