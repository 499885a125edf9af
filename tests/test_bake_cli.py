"""bake as a command: what it prints, what it refuses and with which code, and kills at any time."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterops.errors import OutputExistsError, UsageError
from adapterops.verbs.bake import bake
from tests import bake_models, checkpoints
from tests.bake_models import CONFIG, differing, expected, factors, stored, weights
from tests.inspecting import call
from tests.support import dense, pairs, weighted, write_peft

Q = "model.layers.0.self_attn.q_proj"
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a base `m` of three shards, and adapters `a` and `b`."""
    bake_models.model(tmp_path / "m", weights(), "BF16", "shards")
    for seed, name in enumerate("ab"):
        write_peft(tmp_path / name, factors(seed, 5e-3))
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def told(stdout: str, start: str) -> str:
    """The one line that starts so."""
    [line] = [line for line in stdout.splitlines() if line.startswith(start)]
    return line


class TestOutput:
    def test_the_report(self, here: Path) -> None:
        done = call("bake", "m", "a", "-o", "o", cwd=here)
        assert re.match(r"o  bfloat16, 0\.02\d* MB, 6 tensors changed by 6 modules, ", done.stdout)
        written = told(done.stdout, "written").split()
        assert 0.9 < float(written[1]) < 1.1
        assert "correctly rounded: " in done.stdout and done.stderr == ""
        assert len(re.findall(r"^model\.layers", done.stdout, re.MULTILINE)) == 5
        wanted = expected(here / "m", dense(factors(0, 5e-3)))
        assert differing(stored(here / "o"), wanted) == []

    def test_verbose_names_every_tensor(self, here: Path) -> None:
        done = call("bake", "m", "a", "-o", "o", "-v", cwd=here)
        assert all(f"{name}.weight" in done.stdout for name in factors(0))

    def test_quiet(self, here: Path) -> None:
        done = call("bake", "m", "a", "-o", "o", "-q", cwd=here)
        assert done.stdout == done.stderr == "" and (here / "o").is_dir()

    def test_json_is_one_document(self, here: Path) -> None:
        done = call("bake", "m", "a:0.5", "b:-1", "-o", "o", "--json", cwd=here)
        document = json.loads(done.stdout)
        sidecar = json.loads((here / "o" / "adapterops.json").read_text())
        assert document["schema"] == sidecar["schema"] == "adapterops.bake/1"
        assert document["adapters"] == [["a", 0.5], ["b", -1.0]]
        assert document["total"] == sidecar["total"] and document["tensors"] == sidecar["tensors"]

    @pytest.mark.parametrize(
        ("given", "weight"),
        [
            ("a b", (1, 1)),
            ("a:0.7 b:-0.2", (0.7, -0.2)),
            ("a b -w 0.7,-0.2", (0.7, -0.2)),
            ("a:1e-1 b:2", (0.1, 2)),
        ],
    )
    def test_weights(self, given: str, weight: tuple[float, float], here: Path) -> None:
        call("bake", "m", *given.split(), "-o", "o", cwd=here)
        terms = ((w, dense(factors(k, 5e-3))) for k, w in enumerate(weight))
        assert differing(stored(here / "o"), expected(here / "m", weighted(*terms))) == []

    def test_a_dry_run(self, here: Path) -> None:
        done = call("bake", "m", "a", "-o", "o", "--dry-run", cwd=here)
        assert told(done.stdout, "o would be").endswith("(nothing written)")
        assert told(done.stdout, "predicted") and names(here) == ["a", "b", "m"]

    def test_what_is_lost_is_warned_of_on_stderr(self, here: Path) -> None:
        done = call("bake", "m", "a:1e-3", "-o", "o", cwd=here)
        assert "warning: bfloat16 loses" in done.stderr and "--round compensated" in done.stderr
        assert "loses" not in done.stdout
        done = call("bake", "m", "a:1e-3", "-o", "p", "--strict", cwd=here, code=5)
        assert "--strict" in done.stderr and names(here) == ["a", "b", "m", "o"]
        document = json.loads(call("bake", "m", "a:1e-3", "-o", "p", "--json", cwd=here).stdout)
        assert len(document["warnings"]) == 1

    @pytest.mark.parametrize(
        ("given", "options"),
        [
            ("--round nearest", {"round": "nearest"}),
            ("--round stochastic --seed 4", {"round": "stochastic", "seed": 4}),
            ("--dtype fp16", {"dtype": "float16"}),
            ("--modules .*q_proj", {"modules": ".*q_proj"}),
        ],
    )
    def test_options_reach_the_library(
        self, given: str, options: dict[str, Any], here: Path
    ) -> None:
        call("bake", "m", "a", "-o", "o", *given.split(), cwd=here)
        bake(here / "m", here / "a", out=here / "p", **options)
        assert differing(stored(here / "o"), stored(here / "p")) == []

    def test_help(self, here: Path) -> None:
        done = call("bake", "--help", cwd=here)
        for word in ("--round", "--max-drift", "--link", "--reversible", "compensated"):
            assert word in done.stdout

    def test_a_file_makes_a_file(self, here: Path) -> None:
        base = bake_models.model(here / "f", weights(), "F16", "file")
        done = call("bake", base, "a", "-o", "x", cwd=here)
        assert names(here) == ["a", "b", "f", "m", "x.adapterops.json", "x.safetensors"]
        assert done.stdout.startswith("x.safetensors  float16")
        wanted = expected(base, dense(factors(0, 5e-3)))
        assert differing(stored(here / "x.safetensors"), wanted) == []

    def test_twice(self, here: Path) -> None:
        call("bake", "m", "a", "-o", "o", cwd=here)
        done = call("bake", "o", "b", "-o", "p", cwd=here)
        assert "the base was baked 1 time before" in done.stdout

    def test_a_name_that_is_a_number_is_no_weight(self, here: Path) -> None:
        (here / "a").rename(here / "a:2")
        call("bake", "m", "a:2", "-o", "o", cwd=here)
        wanted = expected(here / "m", dense(factors(0, 5e-3)))
        assert differing(stored(here / "o"), wanted) == []


def quantise(method: str) -> Callable[[Path], None]:
    def change(here: Path) -> None:
        (here / "m" / "config.json").write_text(
            json.dumps({**CONFIG, "quantization_config": {"quant_method": method}})
        )

    return change


def base_of(tensors: dict[str, Any]) -> Callable[[Path], None]:
    """Another base `m` of these tensors (uint8) beside a weight."""

    def change(here: Path) -> None:
        for file in (here / "m").iterdir():
            file.unlink()
        whole = {f"{Q}.weight": np.zeros((24, 24)), **tensors}
        (here / "m" / "model.safetensors").write_bytes(bake_models.pack(whole, "F16"))

    return change


def fp8(here: Path) -> None:
    base_of({})(here)
    header = {f"{Q}.weight": {"dtype": "F8_E4M3", "shape": [24, 24], "data_offsets": [0, 576]}}
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(576)
    (here / "m" / "model.safetensors").write_bytes(data)
    write_peft(here / "a", {Q: factors(0)[Q]})


def shard(here: Path, number: int = 2) -> Path:
    return here / "m" / checkpoints.SHARD.format(number, 3)


def index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """The base's index with its map of weights changed."""

    def changed(here: Path) -> None:
        file = here / "m" / checkpoints.INDEX
        document = json.loads(file.read_text())
        change(document["weight_map"])
        file.write_text(json.dumps(document))

    return changed


def rename(here: Path, old: str, new: str) -> None:
    (here / old).rename(here / new)


def damaged(here: Path) -> None:
    data = bytearray(shard(here).read_bytes())
    data[:8] = (1 << 40).to_bytes(8, "little")
    shard(here).write_bytes(data)


def another(here: Path) -> None:
    names = (f"model.layers.{k}.mlp.gate_proj" for k in range(9))
    write_peft(here / "a", pairs(1, dict.fromkeys(names, (40, 24)), 2))


def wider(here: Path) -> None:
    write_peft(here / "a", pairs(1, {Q: (24, 32)}, 2))


def nan(here: Path) -> None:
    found = factors(0)
    found[Q][0][3, 1] = np.nan
    write_peft(here / "a", found)


def nothing(here: Path) -> None:
    """Leaves all as it is."""


FIRST = checkpoints.SHARD.format(1, 3)
# name: what is changed first, arguments, exit code, what is said
REFUSED: dict[str, tuple[Callable[[Path], Any], str, int, str]] = {
    "bitsandbytes": (quantise("bitsandbytes"), "m a -o o", 4, "quantised by bitsandbytes"),
    "gptq": (quantise("gptq"), "m a -o o", 4, r"quantised by gptq.*dequantise it first"),
    "bitsandbytes by names": (
        base_of({f"{Q}.weight.absmax": np.zeros(9, np.uint8)}),
        "m a -o o",
        4,
        "quantised by bitsandbytes",
    ),
    "gptq by names": (base_of({"x.qweight": np.zeros(9, np.uint8)}), "m a -o o", 4, "GPTQ or AWQ"),
    "fp8": (fp8, "m a -o o", 4, r"F8_E4M3"),
    "scaled fp8": (
        base_of({"x.weight_scale_inv": np.zeros(2, np.uint8)}),
        "m a -o o",
        4,
        "scaled fp8",
    ),
    "gguf": (lambda here: rename(here, "m", "m.gguf"), "m.gguf a -o o", 4, "GGUF"),
    "another model's adapter": (
        another,
        "m a -o o",
        4,
        r"9 of 9 modules are not in m: .*gate_proj.* and \d+ more.*base model that the adapter",
    ),
    "another shape": (wider, "m a -o o", 4, r"24 x 32.*24 x 24"),
    "no base": (nothing, "nowhere a -o o", 6, "nowhere: no such file"),
    "no adapter": (nothing, "m nowhere -o o", 6, "nowhere: no such file"),
    "a missing shard": (lambda h: shard(h).unlink(), "m a -o o", 3, r"00002-of-00003.*is missing"),
    "a truncated shard": (
        lambda h: os.truncate(shard(h), shard(h).stat().st_size - 9),
        "m a -o o",
        3,
        r"00002-of-00003.*truncated",
    ),
    "a damaged shard": (damaged, "m a -o o", 3, "00002-of-00003"),
    "an empty shard": (lambda h: os.truncate(shard(h), 0), "m a -o o", 3, "00002-of-00003"),
    "a shard by itself": (nothing, f"m/{FIRST} a -o o", 3, "one of|index|shard"),
    "an index that leads out": (
        index(lambda m: m.update({f"{Q}.weight": "../x.safetensors"})),
        "m a -o o",
        3,
        r"\.\./x",
    ),
    "an absolute index": (
        index(lambda m: m.update({f"{Q}.weight": "/etc/passwd"})),
        "m a -o o",
        3,
        "/etc/passwd",
    ),
    "an index of what is not there": (
        index(lambda m: m.update({"model.more.weight": FIRST})),
        "m a -o o",
        3,
        "model.more.weight",
    ),
    "NaN": (nan, "m a -o o", 5, "NaN or infinite"),
    "drift": (nothing, "m a:1e-3 -o o --max-drift 0.01", 5, "--max-drift 0.01: a sample"),
    "all weights zero": (nothing, "m a:0 b:0 -o o", 5, "every weight is zero"),
    "no output": (nothing, "m a", 2, "--output"),
    "no adapters": (nothing, "m -o o", 2, "ADAPTER"),
    "the output exists": (lambda h: (h / "o").write_text("x"), "m a -o o", 2, "is a file already"),
    "the output is the base": (nothing, "m a -o m --overwrite", 2, "is the input m"),
    "the output is in the base": (nothing, "m a -o m/x", 2, "is inside the input m"),
    "the output is the adapter": (nothing, "m a -o a --overwrite", 2, "is the input a"),
    "another's folder": (
        lambda h: (h / "o").mkdir() or (h / "o" / "x").write_text(""),
        "m a -o o --overwrite",
        2,
        "was not written by adapterops",
    ),
    "no parent": (nothing, "m a -o no/where/o", 6, "does not exist"),
    "a mode": (nothing, "m a -o o --round up", 2, "--round"),
    "a type": (nothing, "m a -o o --dtype int8", 2, r"--dtype 'int8': expected keep, float32"),
    "a limit": (nothing, "m a -o o --max-drift -1", 2, "--max-drift"),
    "a limit that is none": (nothing, "m a -o o --max-drift nan", 2, "--max-drift"),
    "a seed": (nothing, "m a -o o --seed -1", 2, "--seed -1"),
    "weights in two forms": (nothing, "m a:1 b -w 1,1 -o o", 2, "use one form"),
    "a weight too few": (nothing, "m a:1 b -o o", 2, "b has none"),
    "weights too few": (nothing, "m a b -w 1 -o o", 2, "1 weights for 2 adapters"),
    "modules that match nothing": (nothing, "m a -o o --modules q_proj", 2, "as a whole"),
    "a pattern that is none": (nothing, "m a -o o --modules (", 2, "no regular expression"),
    "threads": (nothing, "m a -o o -j 0", 2, "-j 0"),
    "an adapter for a base": (nothing, "a a -o o", 3, "adapter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, here: Path) -> None:
    """The code, what is said, and nothing more on disk than before."""
    change, given, code, pattern = REFUSED[case]
    change(here)
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()}
    done = call("bake", *given.split(), cwd=here, code=code)
    assert done.stdout == "" and re.search(pattern, done.stderr, re.DOTALL), done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()}
    assert [name for name in names(here) if name.startswith(".")] == []


# The command line with every write delayed, so that a signal meets it at work.
SLOW = """
import os, time
for name in ("pwrite", "fsync"):
    def slow(*arguments, real=getattr(os, name)):
        time.sleep(0.004)
        return real(*arguments)
    setattr(os, name, slow)
from adapterops.cli import main
main()
"""


def start(folder: Path, *options: str, program: str | None = None, out: str = "o") -> Any:
    """The command that bakes `a` and `b` into `m`, started."""
    run = ["-c", program] if program else ["-m", "adapterops"]
    command = [sys.executable, *run, "bake", "m", "a:0.5", "b:1", "-o", out, *options]
    return subprocess.Popen(
        [*command, "--json", "--no-progress"],
        cwd=folder,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: Any, code: int = 0) -> str:
    """What a command said, after checking its exit code."""
    said: str = process.communicate(timeout=120)[1]
    assert process.returncode == code, said
    return said


def again(folder: Path, **options: Any) -> int:
    """The same run in this process; how many files were finished before."""
    out = folder / options.pop("out", "o")
    return bake(folder / "m", [folder / "a", folder / "b"], [0.5, 1], out=out, **options).resumed


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a result."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {
        name: path.read_bytes().replace(f'"output": "{folder.name}"'.encode(), b"")
        for name, path in found.items()
    }


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base `m` of six shards, adapters `a` and `b`, and the result `whole`."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"rows": 256, "columns": 192, "layers": 5}
    bake_models.model(folder / "m", weights(0, **sizes), "BF16", "shards", shards=6)
    for seed, name in enumerate("ab"):
        write_peft(folder / name, factors(seed, 3e-3, 8, **sizes))
    again(folder, out="whole")
    return folder


@pytest.fixture
def beside(large: Path, tmp_path: Path) -> Path:
    """A folder with links to base and adapters."""
    for name in ("m", "a", "b"):
        (tmp_path / name).symlink_to(large / name)
    return tmp_path


def kill_at_random(folder: Path, generator: random.Random, sign: int, most: float) -> float:
    """Start the command and end it after a while; how long that was."""
    process = start(folder, program=SLOW)
    pause = generator.uniform(1.0, most)
    try:
        process.wait(pause)
    except subprocess.TimeoutExpired:
        process.send_signal(sign)
    process.communicate(timeout=60)
    return pause


def check_nothing_is_half_written(folder: Path, whole: dict[str, bytes]) -> int:
    """Nothing under the final name unless complete; how many files are finished beside it."""
    if (folder / "o").exists():
        assert content(folder / "o") == whole
        return 6
    journal = folder / ".o.adapterops-partial" / "journal.jsonl"
    if not journal.is_file():
        return 0
    return max(0, journal.read_bytes().count(b"\n") - 1)


def campaign(large: Path, folder: Path, seed: int, sign: int, kills: int) -> int:
    """Kill runs one after the other until one ends; how many files were not done twice in all."""
    generator, whole, saved = random.Random(seed), content(large / "whole"), 0
    for _ in range(kills):
        kill_at_random(folder, generator, sign, 2.5)
        done = check_nothing_is_half_written(folder, whole)
        if (folder / "o").exists():
            break
        saved = max(saved, done)
    if not (folder / "o").exists():
        done = check_nothing_is_half_written(folder, whole)
        assert again(folder) == done
    assert content(folder / "o") == whole
    assert [name for name in names(folder) if name.startswith(".")] == []
    return saved


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_it_goes_on(seed: int, large: Path, beside: Path) -> None:
    campaign(large, beside, seed, signal.SIGKILL, 3)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 32))
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_long_campaign_of_kills(seed: int, sign: int, large: Path, beside: Path) -> None:
    campaign(large, beside, seed, sign, 8)


def _wait_for(condition: Callable[[], bool], process: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)


def _journalled(folder: Path, count: int) -> Callable[[], bool]:
    journal = folder / ".o.adapterops-partial" / "journal.jsonl"
    return lambda: journal.is_file() and journal.read_bytes().count(b"\n") >= 1 + count


@pytest.mark.parametrize("finished", [1, 4])
def test_killed_after_some_files_only_the_others_are_done(
    finished: int, large: Path, beside: Path
) -> None:
    process = start(beside, program=SLOW)
    _wait_for(_journalled(beside, finished), process)
    process.kill()
    process.communicate()
    assert not (beside / "o").exists()
    done = check_nothing_is_half_written(beside, content(large / "whole"))
    assert done >= finished
    assert again(beside) == done
    assert content(beside / "o") == content(large / "whole")
    assert names(beside) == ["a", "b", "m", "o"]


def test_an_interruption_of_the_commit_says_that_the_output_is_complete(
    large: Path, beside: Path
) -> None:
    place = """
from adapterops.files import resumable
done = resumable.completed
def completed(final):
    os.kill(os.getpid(), 15)
    done(final)
resumable.completed = completed
"""
    process = start(
        beside, program=SLOW.replace("from adapterops.cli", place + "from adapterops.cli")
    )
    said = finish(process, 130)
    assert f"interrupted, but {beside / 'o'} had been written before" in said
    assert content(beside / "o") == content(large / "whole")


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interruption_says_how_to_go_on(sign: int, large: Path, beside: Path) -> None:
    process = start(beside, program=SLOW.replace("0.004", "0.02"))
    _wait_for(_journalled(beside, 2), process)
    process.send_signal(sign)
    said = finish(process, 130)
    found = re.search(r"(\d) of 6 files of weights are kept.*the same command", said)
    assert found and int(found[1]) >= 1, said
    assert again(beside) == int(found[1])
    assert content(beside / "o") == content(large / "whole")


def test_two_processes_on_one_output(large: Path, beside: Path) -> None:
    first = start(beside, program=SLOW)
    _wait_for(_journalled(beside, 1), first)
    first.send_signal(signal.SIGSTOP)
    with pytest.raises(UsageError, match="another process is writing this output"):
        again(beside)
    first.send_signal(signal.SIGCONT)
    finish(first)
    assert content(beside / "o") == content(large / "whole")
    with pytest.raises(OutputExistsError, match="exists already"):
        again(beside)


def test_another_plan_after_a_kill(large: Path, beside: Path) -> None:
    process = start(beside, program=SLOW)
    _wait_for(_journalled(beside, 2), process)
    process.kill()
    process.communicate()
    assert again(beside, round="nearest") == 0
    assert again(beside, round="nearest", out="p") == 0
    assert content(beside / "o") == content(beside / "p")


def sparse(folder: Path, layers: int, width: int, shards: int = 4) -> int:
    """A model of F16 zeros in files that are holes; its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": "float16"}))
    where, total = {}, 0
    for number in range(shards):
        header, at = {}, 0
        file = checkpoints.SHARD.format(number + 1, shards)
        for layer in range(number, layers, shards):
            for leaf in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.gate_proj"):
                name = f"model.layers.{layer}.{leaf}.weight"
                end = at + 2 * width * width
                entry = {"dtype": "F16", "shape": [width, width], "data_offsets": [at, end]}
                header[name], where[name], at = entry, file, end
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(8 + len(text) + at)
        total += at
    (folder / checkpoints.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return total


# The command, and the largest resident set that it had, in kB, on stderr.
MEASURED = """
import resource, sys
from adapterops.cli import main
try:
    main()
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


@pytest.mark.long
@pytest.mark.parametrize("mode", ["exact", "nearest", "compensated", "stochastic"])
def test_memory_does_not_grow_with_the_model(mode: str, tmp_path: Path) -> None:
    """8 GB of weights, a quarter of them changed, and less than 1 GB in memory."""
    total = sparse(tmp_path / "m", layers=61, width=4096)
    assert total > 8e9
    shapes = {f"model.layers.{k}.self_attn.q_proj": (4096, 4096) for k in range(61)}
    write_peft(tmp_path / "a", pairs(1, shapes, 16))
    command = ["bake", "m", "a", "-o", "o", "--round", mode, "--no-progress", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command],
        cwd=tmp_path,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stderr.split()[-1]) * 1024
    assert peak < 1e9, f"{peak / 1e6:.0f} MB"
    assert json.loads(done.stdout)["total"]["gain"] == pytest.approx(1, abs=1e-3)
