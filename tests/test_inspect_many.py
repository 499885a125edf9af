"""`inspect` as a command: its JSON, thousands of adapters in one run, pictures, what it loads."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import adapterops
from adapterops import Inspection, inspect
from tests.hostile import CASES
from tests.inspecting import SHAPES, call, peft
from tests.support import pairs, write_kohya


def spoil(file: Path, change: Any) -> None:
    """Rewrite a safetensors header: `change` gets the JSON document."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    document = json.loads(data[8 : 8 + size])
    change(document)
    raw = json.dumps(document).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + size :])


ENTRY = {
    "path",
    "weights_file",
    "config_file",
    "dialect",
    "dialects",
    "kinds",
    "layer_types",
    "base",
    "module_count",
    "ranks",
    "dims",
    "scales",
    "dtypes",
    "size",
    "parameters",
    "kind_parameters",
    "adapted",
    "base_parameters",
    "extras",
    "deltas",
    "unread",
    "side_files",
    "provenance",
    "notes",
    "problems",
    "families",
    "spectrum",
    "output",
    "skipped",
}


class TestJson:
    """Fields may be added, never changed: the document is an interface."""

    def test_one_document_for_one(self, tmp_path):
        peft(tmp_path / "a", alpha=4)
        document = json.loads(call("inspect", "a", "--json", cwd=tmp_path).stdout)
        assert document.keys() == {"schema", "adapters", "errors", "summary"}
        assert document["schema"] == Inspection.schema == "adapterops.inspect/1"
        [entry] = document["adapters"]
        assert entry.keys() == ENTRY and entry["spectrum"] is None
        assert entry == json.loads(json.dumps(inspect(tmp_path / "a").to_dict(modules=False))) | {
            "path": "a"
        }
        assert entry["families"][0].keys() == {
            "name",
            "modules",
            "where",
            "missing",
            "kinds",
            "shapes",
            "ranks",
            "dims",
            "scales",
            "parameters",
        }
        assert entry["scales"] == [
            {
                "scale": 2.0,
                "alpha": 4.0,
                "origin": "lora_alpha in adapter_config.json",
                "modules": 8,
            }
        ]
        assert document["summary"] == {
            "adapters": 1,
            "unmergeable": 0,
            "noted": 0,
            "bytes": entry["size"],
            "parameters": entry["parameters"],
            "dialects": {"peft": 1},
            "kinds": {"lora": 1},
            "ranks": {"2": 1},
            "bases": {"tiny/base": 1},
        }

    def test_verbose_adds_single_modules(self, tmp_path):
        peft(tmp_path / "a")
        done = call("inspect", "a", "--json", "-v", "--spectrum", cwd=tmp_path)
        [entry] = json.loads(done.stdout)["adapters"]
        assert entry.keys() == ENTRY | {"modules"} and entry["modules"].keys() == SHAPES.keys()
        spectrum = entry["spectrum"]
        assert spectrum.keys() == {
            "norm",
            "columns",
            "rank",
            "curve",
            "kept",
            "enough",
            "conclusion",
            "modules",
        }
        for module in spectrum["modules"].values():
            assert module.keys() == {
                "values",
                "norm",
                "floor",
                "rank",
                "columns",
                "stable_rank",
                "enough",
            }
        done = call("inspect", "a", "--json", "--spectrum", cwd=tmp_path)
        [entry] = json.loads(done.stdout)["adapters"]
        assert entry.keys() == ENTRY and "modules" not in entry["spectrum"]

    def test_errors_are_in_the_document_and_on_stderr(self, tmp_path):
        peft(tmp_path / "a")
        (tmp_path / "b.safetensors").write_bytes(b"x")
        done = call("inspect", "a", "b.safetensors", "gone", "--json", cwd=tmp_path, code=6)
        document = json.loads(done.stdout)
        assert [entry["path"] for entry in document["adapters"]] == ["a"]
        assert [error["path"] for error in document["errors"]] == ["b.safetensors", "gone"]
        told = [json.loads(line)["error"] for line in done.stderr.splitlines()]
        assert told == document["errors"] and [error["code"] for error in told] == [3, 6]

    def test_nothing_in_it_is_nan(self, tmp_path):
        (peft(tmp_path / "a") / "adapter_config.json").unlink()
        text = call("inspect", "a", "--json", "-v", cwd=tmp_path).stdout
        assert "NaN" not in text and json.loads(text)["adapters"][0]["scales"][0]["scale"] is None


class TestMany:
    def test_a_line_each_and_a_summary(self, tmp_path):
        peft(tmp_path / "x" / "a")
        write_kohya(tmp_path / "x" / "b.safetensors", pairs(1, {"lora_unet_q": (8, 6)}, 3), alpha=6)
        (peft(tmp_path / "x" / "c") / "adapter_config.json").unlink()
        done = call("inspect", "x", cwd=tmp_path)
        lines = done.stdout.splitlines()
        assert [line.split()[0] for line in lines[1:4]] == ["x/a", "x/b.safetensors", "x/c"]
        assert lines[1].split()[1:6] == ["peft", "lora", "2", "1", "8"]
        assert "merge would refuse this: " in lines[3] and "no scale" in lines[3]
        assert "3 adapters" in done.stdout and "1 could not be merged" in done.stdout
        assert "dialects: peft (2), kohya (1)" in done.stdout

    def test_two_thousand_with_one_broken_and_one_hostile(self, tmp_path):
        file = peft(tmp_path / "seed") / "adapter_model.safetensors"
        data, config = file.read_bytes(), (tmp_path / "seed" / "adapter_config.json").read_bytes()
        for index in range(2000):
            folder = tmp_path / "fleet" / f"{index // 100:02d}" / f"{index:04d}"
            folder.mkdir(parents=True)
            (folder / "adapter_model.safetensors").write_bytes(data)
            (folder / "adapter_config.json").write_bytes(config)
        broken = tmp_path / "fleet" / "03" / "0333" / "adapter_model.safetensors"
        broken.write_bytes(data[:-1])
        hostile = tmp_path / "fleet" / "17" / "1717" / "adapter_model.safetensors"
        spoil(hostile, lambda document: document.update({"../../x": document.popitem()[1]}))
        done = call("inspect", "fleet", "-j", "2", cwd=tmp_path, code=3)
        assert [line.split(": ")[1] for line in done.stderr.splitlines()] == [
            "fleet/03/0333/adapter_model.safetensors",
            "fleet/17/1717/adapter_model.safetensors",
        ]
        assert "truncated" in done.stderr and "looks like a file path" in done.stderr
        lines = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("fleet/")]
        assert lines == sorted(lines) and len(lines) == 1998
        assert "1,998 adapters" in done.stdout and "2 could not be read" in done.stdout
        one = call(
            "inspect",
            "fleet/00",
            "fleet/01",
            "fleet/02",
            "fleet/03",
            "--json",
            "-j",
            "1",
            cwd=tmp_path,
            code=3,
        )
        two = call(
            "inspect",
            "fleet/00",
            "fleet/01",
            "fleet/02",
            "fleet/03",
            "--json",
            "-j",
            "2",
            cwd=tmp_path,
            code=3,
        )
        assert one == two and len(json.loads(one.stdout)["adapters"]) == 399
        stopped = call("inspect", "fleet", "--strict", cwd=tmp_path, code=3)
        assert stopped.stdout == "" and "0333" in stopped.stderr and "1717" not in stopped.stderr

    def test_the_worst_exit_code_wins(self, tmp_path):
        peft(tmp_path / "a")
        (tmp_path / "b.safetensors").write_bytes(b"x")
        for paths, code in (
            (["a"], 0),
            (["a", "b.safetensors"], 3),
            (["b.safetensors", "z", "a"], 6),
        ):
            call("inspect", *paths, cwd=tmp_path, code=code)

    @pytest.mark.parametrize("case", CASES)
    def test_hostile_headers_end_in_their_error(self, tmp_path, case, monkeypatch):
        data, kind, _ = CASES[case]
        (tmp_path / "x.safetensors").write_bytes(data)
        with pytest.raises(kind):
            inspect(tmp_path / "x.safetensors")

    def test_a_list_and_notes(self, tmp_path):
        peft(tmp_path / "a")
        (tmp_path / "b").symlink_to(tmp_path / "a")
        (tmp_path / "list").write_text("a\nb\n")
        done = call("inspect", "--from", "list", cwd=tmp_path)
        assert done.stderr == "note: b: the same as a, counted once\n"
        assert done.stdout.startswith("a  peft, lora, rank 2, 8 modules")

    def test_names_that_would_steer_a_terminal(self, tmp_path):
        evil = "evil\x1b]0;owned\x07\x9b31m"
        peft(tmp_path / evil, base_model_name_or_path=evil)
        peft(tmp_path / "b", base_model_name_or_path=evil + "[bold]")
        (tmp_path / "c\x1b.safetensors").write_bytes(b"x")
        for arguments, code in (([evil], 0), (["b", "-v"], 0), (["."], 3)):
            done = call("inspect", *arguments, cwd=tmp_path, code=code)
            for stream in (done.stdout, done.stderr):
                assert "\x1b" not in stream and "\x9b" not in stream and "\x07" not in stream
        assert "[bold]" in call("inspect", "b", cwd=tmp_path).stdout

    def test_alpha_for_one_of_several(self, tmp_path):
        for name in "ab":
            (peft(tmp_path / "x" / name) / "adapter_config.json").unlink()
        done = call("inspect", "x", "--alpha", "b=8", "--json", cwd=tmp_path)
        a, b = json.loads(done.stdout)["adapters"]
        assert a["problems"] and b["scales"][0]["scale"] == 4.0 and not b["problems"]
        done = call("inspect", "x", "--alpha", "4", "--json", cwd=tmp_path)
        assert [e["scales"][0]["scale"] for e in json.loads(done.stdout)["adapters"]] == [2.0, 2.0]

    def test_quiet(self, tmp_path):
        peft(tmp_path / "a")
        done = call("inspect", "a", "-q", cwd=tmp_path)
        assert done.stdout == done.stderr == ""

    @pytest.mark.parametrize(
        ("options", "number"),
        [
            ([], signal.SIGINT),
            (["--json"], signal.SIGTERM),
            (["--spectrum", "-o", "out"], signal.SIGINT),
        ],
        ids=str,
    )
    def test_interrupted(self, tmp_path, options, number):
        data = peft(tmp_path / "seed", 8).joinpath("adapter_model.safetensors").read_bytes()
        (tmp_path / "fleet").mkdir()
        for index in range(3000):
            (tmp_path / "fleet" / f"{index}.safetensors").write_bytes(data)
        process = subprocess.Popen(
            [sys.executable, "-m", "adapterops", "inspect", "fleet", "--alpha", "1", *options],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(adapterops.__file__).parent.parent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        limit = time.monotonic() + 30
        while not (any(tmp_path.glob("out/*.svg")) if "-o" in options else workers.read_text()):
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        out, said = process.communicate(timeout=20)
        assert process.returncode == 130 and out == "", said
        told = said.strip().splitlines()
        assert len(told) == 1 and told[0].startswith(("error: ", '{"error": '))
        assert "no unfinished output" in said
        assert not list(tmp_path.glob("out/.*"))


class TestPictures:
    @pytest.fixture
    def fleet(self, tmp_path):
        for name in ("a", "b/c"):
            peft(tmp_path / "fleet" / name, 3)
        shapes = {f"lora_unet_down_{i}_attn_{j}_q": (8, 6) for i in range(2) for j in range(2)}
        write_kohya(tmp_path / "fleet" / "b" / "k.safetensors", pairs(1, shapes, 2), alpha=2)
        return tmp_path

    def test_mirrored_and_resumed(self, fleet):
        call("inspect", "fleet", "--spectrum", "-o", "out", cwd=fleet)
        files = sorted(path.relative_to(fleet / "out") for path in (fleet / "out").rglob("*.*"))
        assert [str(file) for file in files] == ["a.svg", "b/c.svg", "b/k.svg"]
        before = {file: (fleet / "out" / file).read_bytes() for file in files}
        stamps = {file: (fleet / "out" / file).stat().st_mtime_ns for file in files}
        (fleet / "out" / "a.svg").unlink()
        again = call("inspect", "fleet", "--spectrum", "-o", "out", cwd=fleet)
        assert again.stdout.count("drawn before") == 2
        for file in files:
            assert (fleet / "out" / file).read_bytes() == before[file]
            unchanged = (fleet / "out" / file).stat().st_mtime_ns == stamps[file]
            assert unchanged == (str(file) != "a.svg")

    def test_a_picture_of_something_else_is_reported(self, fleet):
        call("inspect", "fleet", "--spectrum", "-o", "out", "-q", cwd=fleet)
        peft(fleet / "fleet" / "a", 2, seed=9)
        done = call("inspect", "fleet", "--spectrum", "-o", "out", cwd=fleet, code=2)
        assert "out/a.svg: exists" in done.stderr and done.stdout.count("drawn before") == 2
        call("inspect", "fleet", "--spectrum", "-o", "out", "--modules", ".*", cwd=fleet, code=2)
        call("inspect", "fleet", "--spectrum", "-o", "out", "--overwrite", cwd=fleet)
        call("inspect", "fleet", "--spectrum", "-o", "out", cwd=fleet)

    @pytest.mark.parametrize("ending", ["svg", "png", "SVG"])
    def test_one_picture(self, fleet, ending):
        picture = fleet / f"x.{ending}"
        first = call("inspect", "fleet/a", "--spectrum", "-o", picture.name, cwd=fleet)
        assert f"drawn: {picture.name}" in first.stdout
        data = picture.read_bytes()
        assert data.startswith(b"<?xml" if ending.lower() == "svg" else b"\x89PNG")
        again = call("inspect", "fleet/a", "--spectrum", "-o", picture.name, cwd=fleet)
        assert again.stdout == first.stdout.replace(picture.name, f"{picture.name} (before)")
        picture.unlink()
        call("inspect", "fleet/a", "--spectrum", "-o", picture.name, cwd=fleet)
        assert picture.read_bytes() == data  # neither days nor random ids
        assert str(fleet).encode() not in data

    def test_usage(self, fleet):
        for arguments, says in (
            (["fleet/a", "-o", "x.svg"], "--spectrum"),
            (["fleet", "--spectrum", "-o", "x.svg"], "one picture for 3 adapters"),
            (["fleet/a", "fleet/b/c", "fleet", "--spectrum", "-o", "out"], ""),
            (["--spectrum"], "no input"),
            (["fleet/a", "--base"], "requires an argument"),
        ):
            done = call("inspect", *arguments, cwd=fleet, code=2 if says else 0)
            assert says in done.stderr
        other = peft(fleet / "other" / "a")
        clash = call("inspect", "fleet", other, "--spectrum", "-o", "p", cwd=fleet, code=2)
        assert "would both be written to p/a.svg" in clash.stderr and not (fleet / "p").exists()

    def test_without_matplotlib(self, fleet, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        done = call("inspect", "fleet", "--spectrum", "-o", "out", cwd=fleet, code=2)
        assert "adapterops[report]" in done.stderr and done.stderr.count("error") == 1


class TestLightness:
    @pytest.mark.parametrize("options", [[], ["--spectrum"], ["--json", "-v"]], ids=str)
    def test_torch_is_never_imported(self, tmp_path, options):
        peft(tmp_path / "x" / "a")
        peft(tmp_path / "x" / "b")
        code = (
            f"import sys; sys.argv = ['adapterops', 'inspect', 'x', *{options}]\n"
            "from adapterops.cli import main\n"
            "try: main()\n"
            "except SystemExit: pass\n"
            "heavy = {'torch', 'scipy', 'matplotlib', 'rich', 'transformers'}\n"
            "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(adapterops.__file__).parent.parent)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr.splitlines()[-1] == "[]" and "x/a" in done.stdout

    def test_no_tensor_is_read_without_being_asked(self, tmp_path, monkeypatch):
        from adapterops.formats import Ref

        peft(tmp_path / "a")
        monkeypatch.setattr(Ref, "raw", None)
        assert inspect(tmp_path / "a").module_count == 8

    def test_descriptors_are_given_back(self, tmp_path):
        peft(tmp_path / "a")
        before = len(os.listdir("/proc/self/fd"))
        for options in ({}, {"spectrum": True}, {"strict": True}):
            inspect(tmp_path / "a", **options)
        assert len(os.listdir("/proc/self/fd")) == before
