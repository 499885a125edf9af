"""The command line as a user meets it: messages, streams, exit codes."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import adapterops
from tests.support import dense, distance, pairs, read_kohya, read_peft, weighted, write_kohya
from tests.support import write_peft as write

SHAPES = {"m.0.q_proj": (20, 24), "m.1.q_proj": (20, 24)}


def run(*arguments: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The installed program, as a process."""
    done = subprocess.run(
        [sys.executable, "-m", "adapterops", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(adapterops.__file__).parent.parent)},
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def two(tmp_path):
    write(tmp_path / "a", pairs(1, SHAPES, 4), alpha=8)
    write(tmp_path / "b", pairs(2, SHAPES, 4))
    return tmp_path


def test_the_missions_command(tmp_path):
    shapes = {"lora_unet_mid_block_to_q": (16, 20)}
    files = {name: pairs(seed, shapes, 4) for seed, name in enumerate("ab")}
    for name, factors in files.items():
        write_kohya(tmp_path / f"{name}.safetensors", factors, alpha=4)
    done = run("merge", "a.safetensors", "b.safetensors", "--weights", "0.7,0.3", cwd=tmp_path)
    assert "merged.safetensors" in done.stdout and "retained" in done.stdout
    exact = weighted((0.7, dense(files["a"])), (0.3, dense(files["b"])))
    assert distance(read_kohya(tmp_path / "merged.safetensors"), exact) < 1e-6


def test_peft_pair_without_output_writes_a_directory(two):
    done = run("merge", "a", "b", "-w", "0.5,0.5", cwd=two)
    assert (two / "merged" / "adapter_config.json").is_file() and "merged" in done.stdout
    again = run("merge", "a", "b", "-w", "0.5,0.5", cwd=two, code=2)
    assert "exists already" in again.stderr and "--overwrite" in again.stderr
    run("merge", "a", "b", "-w", "0.5,0.5", "--overwrite", cwd=two)


def test_weights_behind_colons(two):
    run("merge", "a:0.7", "b:-0.3", "-o", "m", "--dtype", "fp32", cwd=two)
    exact = weighted((0.7, dense(pairs(1, SHAPES, 4), 2.0)), (-0.3, dense(pairs(2, SHAPES, 4))))
    assert distance(read_peft(two / "m"), exact) < 1e-6


def test_a_path_that_looks_weighted_but_exists_is_a_path(tmp_path):
    write(tmp_path / "a:0.5", pairs(1, SHAPES, 4))
    run("merge", "a:0.5", "-o", "m", cwd=tmp_path)
    assert distance(read_peft(tmp_path / "m"), dense(pairs(1, SHAPES, 4))) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "--weights", "0.7", "0.3"], "separated by commas"),
        (["a", "b"], "2 adapters need 2 weights"),
        (["a", "b", "-w", "1"], "1 weights for 2 adapters"),
        (["a", "b", "-w", "1,x"], "separated by commas"),
        (["a:1", "b", "-o", "m"], "has none"),
        (["a:1", "b:1", "-w", "1,1"], "use one form"),
        (["a", "b", "-w", "1,1", "--rank", "many"], "whole number"),
        (["a", "b", "-w", "1,1", "--rank", "4", "--energy", "0.9"], "both choose the rank"),
        (["a", "b", "-w", "1,1", "--alpha", "zero"], "expected a number"),
        (["a", "b", "-w", "1,1", "--alpha", "c=4"], "0 inputs are called"),
        (["a", "b", "-w", "1,1", "--device", "cuda"], "CUDA"),
        (["a", "b", "-w", "1,1", "-o", "a", "--overwrite"], "is or contains the input"),
        (["a", "b", "-w", "1,1", "--nonsense"], "No such option"),
        ([], "Missing argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_usage_errors_exit_2(two, arguments, message):
    if "cuda" in arguments and _has_cuda():
        pytest.skip("this machine has CUDA")
    done = run("merge", *arguments, cwd=two, code=2)
    assert message in done.stderr and done.stdout == ""
    assert not (two / "merged").exists()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def test_missing_input_exits_6(two):
    done = run("merge", "a", "c", "-w", "1,1", cwd=two, code=6)
    assert "c: no such file or directory" in done.stderr


def test_json_is_one_document_and_errors_are_json_too(two):
    done = run("merge", "a", "b", "-w", "1,1", "--json", cwd=two)
    report = json.loads(done.stdout)
    assert report["schema"] == "adapterops.merge/1" and set(report["modules"]) == set(SHAPES)
    sidecar = json.loads((two / "merged" / "adapterops.json").read_text())
    assert sidecar["error"] == report["error"] and sidecar["provenance"]["verb"] == "merge"
    failed = run("merge", "a", "gone", "-w", "1,1", "--json", cwd=two, code=6)
    error = json.loads(failed.stderr.splitlines()[-1])["error"]
    assert failed.stdout == "" and error["code"] == 6 and error["path"] == "gone"
    failed = run("merge", "--json", "--nonsense", cwd=two, code=2)
    assert json.loads(failed.stderr.splitlines()[-1])["error"]["code"] == 2


def test_quiet_verbose_and_dry_run(two):
    assert run("merge", "a", "b", "-w", "1,1", "-q", cwd=two).stdout == ""
    verbose = run("merge", "a", "b", "-w", "1,1", "-v", "-o", "v", "--rank", "2", cwd=two).stdout
    assert all(name in verbose for name in SHAPES)
    write_kohya(two / "k.safetensors", pairs(1, {"lora_unet_q": (16, 20)}, 2), alpha=2)
    dry = run("merge", "k.safetensors", "-o", "k2", "--dry-run", cwd=two).stdout
    assert "k2.safetensors would be" in dry
    dry = run("merge", "a", "b", "-w", "1,1", "--dry-run", "-o", "d", cwd=two).stdout
    assert "would be" in dry and not (two / "d").exists()
    document = json.loads(
        run("merge", "a", "b", "-w", "1,1", "--dry-run", "--json", "-o", "d", cwd=two).stdout
    )
    assert document["schema"] == "adapterops.merge-plan/1" and document["rank"] == 8
    real = run("merge", "a", "b", "-w", "1,1", "--json", "-o", "d", cwd=two)
    assert json.loads(real.stdout)["size"] == document["size"]


@pytest.mark.parametrize("options", [[], ["--max-error=0.01"], ["--energy", "1", "--overwrite"]])
def test_the_hint_is_a_command_that_runs(two, options):
    done = run("merge", "a", "b", "-w", "1,1", "-o", "out dir", *options, cwd=two)
    line = next(x for x in done.stdout.splitlines() if x.strip().startswith("rank 4"))
    command_line = line[line.index("adapterops merge") :]
    assert command_line.startswith("adapterops merge --rank 4")
    subprocess.run(
        command_line.replace("adapterops", f"{sys.executable} -m adapterops", 1),
        shell=True,
        check=True,
        cwd=two,
        capture_output=True,
    )
    config = json.loads((two / "out dir" / "adapter_config.json").read_text())
    assert config["r"] == 4


def test_a_merge_on_the_cpu_never_imports_torch_or_scipy(two):
    code = (
        "import sys, adapterops; adapterops.merge(['a', 'b'], [1, 1], out='m', rank=2);"
        "print(sorted({'torch', 'scipy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=two, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_help_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['adapterops', '--help']\n"
        "from adapterops.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'scipy', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "merge" in done.stdout and "Exit codes" in done.stdout
    assert done.stderr.strip().splitlines()[-1] == "[]"


def test_a_report_that_cannot_be_printed_does_not_unmake_the_result(two):
    program = f"{sys.executable} -m adapterops merge a b -w 1,1 --overwrite"
    env = {**os.environ, "PYTHONPATH": str(Path(adapterops.__file__).parent.parent)}
    for shell, code, said in (
        (f"set -o pipefail; {program} | true", 0, ""),
        (f"PYTHONIOENCODING=ascii {program} > seen", 0, ""),
        (f"{program} > /dev/full", 6, "the result is complete"),
    ):
        done = subprocess.run(
            ["bash", "-c", shell], cwd=two, env=env, capture_output=True, text=True
        )
        assert done.returncode == code and said in done.stderr, (shell, done.stderr)
        assert (two / "merged" / "adapterops.json").is_file()


def test_names_that_are_not_text(two):
    name = os.fsdecode(b"ad\xff")
    (two / "a").rename(two / name)
    run("merge", name, "b", "-w", "1,1", "-o", "m", cwd=two)
    json.loads((two / "m" / "adapterops.json").read_text())


def test_unknown_command_suggests(tmp_path):
    assert "did you mean merge?" in run("merg", cwd=tmp_path, code=2).stderr


def test_alpha_for_a_bare_peft_file(tmp_path):
    factors = pairs(1, SHAPES, 4)
    write(tmp_path / "a", factors)
    (tmp_path / "a" / "adapter_config.json").unlink()
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "bare.safetensors")
    refused = run("merge", "bare.safetensors", "-o", "m", cwd=tmp_path, code=4)
    assert "no scale" in refused.stderr and "--alpha" in refused.stderr
    run("merge", "bare.safetensors", "-o", "m", "--alpha", "8", cwd=tmp_path)
    assert distance(read_peft(tmp_path / "m"), dense(factors, 2.0)) < 1e-7
    run("merge", "bare.safetensors", "-o", "n", "--alpha", "bare.safetensors=2", cwd=tmp_path)
    assert distance(read_peft(tmp_path / "n"), dense(factors, 0.5)) < 1e-7


def test_extras_policies(tmp_path):
    head = {"base_model.model.score.weight": np.ones((2, 3), np.float32)}
    other = {"base_model.model.score.weight": np.full((2, 3), 3.0, np.float32)}
    write(tmp_path / "a", pairs(1, SHAPES, 4), extras=head, modules_to_save=["score"])
    write(tmp_path / "b", pairs(2, SHAPES, 4), extras=other, modules_to_save=["score"])
    refused = run("merge", "a", "b", "-w", "1,3", "-o", "m", cwd=tmp_path, code=4)
    assert "score.weight" in refused.stderr and "--extras first" in refused.stderr
    from tests.support import load_file

    for policy, value in (("first", 1.0), ("average", 2.5), ("drop", None)):
        run("merge", "a", "b", "-w", "1,3", "-o", policy, "--extras", policy, cwd=tmp_path)
        tensors = load_file(tmp_path / policy / "adapter_model.safetensors")
        config = json.loads((tmp_path / policy / "adapter_config.json").read_text())
        written = tensors.get("base_model.model.score.weight")
        if value is None:
            assert written is None and config["modules_to_save"] is None
        else:
            assert np.all(written == value) and config["modules_to_save"] == ["score"]


def test_side_files_travel_if_they_agree(two):
    for name in "ab":
        (two / name / "tokenizer.json").write_text("{}")
        (two / name / "added_tokens.json").write_text(name)
    done = run("merge", "a", "b", "-w", "1,1", "-o", "m", cwd=two)
    assert (two / "m" / "tokenizer.json").read_text() == "{}"
    assert not (two / "m" / "added_tokens.json").exists()
    assert "added_tokens.json differs" in done.stderr


def test_nothing_that_travels_names_a_path(two):
    """Hints, warnings of bases that differ and stale twins name paths, but only to the user."""
    config = json.loads((two / "b" / "adapter_config.json").read_text())
    config.update(base_model_name_or_path="other/base", fan_in_fan_out=True)
    (two / "b" / "adapter_config.json").write_text(json.dumps(config))
    (two / "a" / "adapter_model.bin").write_bytes(b"")
    done = run("merge", two / "a", two / "b", "-w", "1,1", "-o", two / "m", cwd=two)
    assert done.stderr.count(str(two)) >= 3 and "rank 4" in done.stdout
    for path in (two / "m").iterdir():
        assert str(two) not in path.read_text(errors="replace")


def test_provenance_has_hashes_and_no_paths(two):
    import hashlib

    run("merge", two / "a", "b", "-w", "0.25,1", "-o", "m", "--rank", "2", cwd=two)
    data = (two / "m" / "adapter_model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    made = json.loads(header["__metadata__"]["adapterops"])
    file = two / "a" / "adapter_model.safetensors"
    assert made["inputs"][0] == {
        "name": "a",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "weight": 0.25,
        "config_sha256": hashlib.sha256(
            (two / "a" / "adapter_config.json").read_bytes()
        ).hexdigest(),
    }
    assert made["options"]["rank"] == 2 and made["version"] == adapterops.__version__
    for path in (two / "m").iterdir():
        assert str(two) not in path.read_text(errors="replace")


SHOWN = {"as_json", "quiet", "verbose", "no_progress"}
# Of batches and pictures, which the library has functions of their own for.
MANY = {"from_file", "output", "overwrite"}
LIST = {"adapters", "from_file"}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("merge", set()),
        ("calc", set()),
        ("compress", {*LIST, "plot"}),
        ("convert", LIST),
        ("extract", set()),
        ("inspect", {"paths", *MANY}),
        ("diff", MANY),
        ("analyze", {"from_file", "plot", "overwrite"}),
        ("check", {"list"}),
        ("index", set()),
        ("cluster", set()),
        ("deploy", set()),
        ("assign", set()),
        ("report", {"output", "overwrite"}),
    ],
    ids=[
        "merge",
        "calc",
        "compress",
        "convert",
        "extract",
        "inspect",
        "diff",
        "analyze",
        "check",
        "index",
        "cluster",
        "deploy",
        "assign",
        "report",
    ],
)
def test_options_are_the_functions_parameters(name, own):
    """Command line and library offer the same options under the same names, with one default."""
    command = importlib.import_module(f"adapterops.cli.{name}").command
    function = getattr(importlib.import_module(f"adapterops.verbs.{name}"), name)
    options = {p.name for p in command.params} - SHOWN - own
    parameters = dict(inspect.signature(function).parameters)
    for inner in ("progress", "path", "adapter"):
        parameters.pop(inner, None)
    assert {"out" if o == "output" else o for o in options} == set(parameters)
    context = command.make_context(name, [], resilient_parsing=True)
    for option, value in context.params.items():
        if option in parameters and value not in (None, ()):
            assert value == parameters[option].default
