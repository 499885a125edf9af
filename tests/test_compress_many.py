"""compress and convert over many adapters: where outputs go, what a rerun skips, what one bad
adapter does, what is left when the run is cut off."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import adapterops
from adapterops.batch import Item
from adapterops.errors import (
    AdapterOpsError,
    FileError,
    FinishedError,
    FormatError,
    OutputExistsError,
    UsageError,
)
from adapterops.render.compress import table
from adapterops.verbs.compress import compress
from adapterops.verbs.convert import convert
from adapterops.verbs.many import many
from adapterops.verbs.results import ManyReport, Result
from tests.support import dense, distance, load_file, pairs, read_peft, write_kohya, write_peft

SHAPES = {f"model.layers.{i}.self_attn.q_proj": (12, 10) for i in range(2)}
KOHYA = {"lora_unet_down_blocks_0_q": (8, 6)}


def peft(folder: Path, seed: int = 1, rank: int = 4, **options) -> Path:
    return write_peft(folder, pairs(seed, SHAPES, rank), **options)


def kohya(file: Path, seed: int = 2) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return write_kohya(file, pairs(seed, KOHYA, 4), alpha=4)


@pytest.fixture
def fleet(tmp_path) -> Path:
    peft(tmp_path / "fleet" / "a", 1)
    peft(tmp_path / "fleet" / "deep" / "b", 2)
    kohya(tmp_path / "fleet" / "deep" / "k.safetensors", 3)
    return tmp_path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def stamps(folder: Path) -> dict[str, int]:
    """When each file below a folder was written."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def outputs(report: ManyReport, out: Path) -> list[str]:
    return [os.path.relpath(str(r.certificate["output"]), out) for r in report.results]


class TestOutputs:
    def test_mirrored_and_the_same_as_one_at_a_time(self, fleet):
        report = many(compress, [fleet / "fleet"], out=fleet / "out", rank=2)
        assert report.exit_code == 0
        assert outputs(report, fleet / "out") == ["a", "deep/b", "deep/k.safetensors"]
        for name in ("a", "deep/b", "deep/k.safetensors"):
            (fleet / "one" / name).parent.mkdir(parents=True, exist_ok=True)
            compress(fleet / "fleet" / name, out=fleet / "one" / name, rank=2)
        assert tree(fleet / "out") == tree(fleet / "one")

    def test_processes_write_the_same_bytes(self, tmp_path, monkeypatch):
        for index in range(26):
            peft(tmp_path / "fleet" / f"{index:02d}", index)
        monkeypatch.chdir(tmp_path)
        two = many(compress, ["fleet"], out="two", rank=2, jobs=2)
        assert len(two.results) == 26 and not any(result.skipped for result in two.results)
        again = many(compress, ["fleet"], out="two", rank=2, jobs=1)
        assert all(result.skipped for result in again.results)
        one = many(compress, ["fleet"], out="one", rank=2, jobs=1)
        assert tree(tmp_path / "one") == tree(tmp_path / "two")
        assert [r.number("error") for r in one.results] == [r.number("error") for r in two.results]

    @pytest.mark.parametrize(
        ("name", "to", "expected"),
        [
            ("a", None, "a"),
            ("a", "peft", "a"),
            ("a", "kohya", "a.safetensors"),
            ("v1.5", "diffusers", "v1.5.safetensors"),
            ("x.safetensors", None, "x.safetensors"),
            ("x.bin", None, "x.safetensors"),
            ("x.pt", "peft", "x"),
            ("x.safetensors", "mlx", "x"),
            ("x.SAFETENSORS", "kohya", "x.safetensors"),
            ("pipeline", None, "pipeline/pytorch_lora_weights.safetensors"),
            ("pipeline", "kohya", "pipeline.safetensors"),
        ],
    )
    def test_names(self, tmp_path, name, to, expected):
        if name == "pipeline":
            kohya(tmp_path / name / "pytorch_lora_weights.safetensors")
        elif "x." not in name:
            peft(tmp_path / name)
        item = Item(str(tmp_path / name), name, str(tmp_path))
        report = many(fake, [item], out=tmp_path / "out", to=to)
        assert outputs(report, tmp_path / "out") == [expected]

    def test_an_engine_means_folders(self, tmp_path):
        item = Item(str(tmp_path / "x.safetensors"), "x.safetensors", str(tmp_path))
        report = many(fake, [item], out=tmp_path / "out", engine="vllm")
        assert outputs(report, tmp_path / "out") == ["x"]

    def test_a_folder_of_a_pipeline(self, tmp_path):
        kohya(tmp_path / "fleet" / "p" / "pytorch_lora_weights.safetensors")
        report = many(compress, [tmp_path / "fleet"], out=tmp_path / "out", rank=2)
        assert outputs(report, tmp_path / "out") == ["p/pytorch_lora_weights.safetensors"]
        again = many(compress, [tmp_path / "fleet"], out=tmp_path / "out", rank=2)
        assert [result.skipped for result in again.results] == [True]
        # What was written is found as one adapter again.
        many(compress, [tmp_path / "out"], out=tmp_path / "third", rank=1)
        assert list(tree(tmp_path / "third")) == [
            "p/pytorch_lora_weights.adapterops.json",
            "p/pytorch_lora_weights.safetensors",
        ]

    def test_convert(self, fleet):
        report = many(convert, [fleet / "fleet"], out=fleet / "out", dtype="bfloat16")
        assert report.schema == "adapterops.convert-many/1"
        assert {result.certificate["schema"] for result in report.results} == {
            "adapterops.convert/1"
        }
        exact = dense(pairs(1, SHAPES, 4))
        assert 0 < distance(read_peft(fleet / "out" / "a"), exact) < 1e-2


CUT = ["--max-error", "0.5", "-j", "2"]


def fake(path: str, *, out: str, overwrite: bool, alpha: object = None, **options: object):
    """A verb that does nothing but say what it was asked for."""
    return adapterops.PlanReport(
        out, "kohya", "float32", 1, 100, {}, notes=(repr((path, alpha)),), verb="compress"
    )


class TestRefused:
    """What makes no sense for any of them is refused before anything is written."""

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"rank": 0}, "--rank 0"),
            ({"rank": 2, "energy": 0.5}, "both choose the rank"),
            ({"size": "big"}, "--size"),
            ({"rank": 2, "modules": "("}, "no regular expression"),
            ({"rank": 2, "min_rank": 4, "max_rank": 2}, "above --max-rank"),
            ({"rank": 2, "allocate": "best"}, "--allocate"),
            ({"rank": 2, "jobs": 0}, "-j 0"),
            ({"rank": 2, "device": "tpu"}, "tpu"),
            ({"rank": 2, "alpha": {"nobody": 2.0}}, "nobody"),
        ],
        ids=str,
    )
    def test_options(self, fleet, options, says):
        told: list[AdapterOpsError] = []
        with pytest.raises(UsageError, match=says):
            many(
                compress,
                [fleet / "fleet"],
                out=fleet / "out",
                on_error=lambda item, error: told.append(error),
                **options,
            )
        assert not told and not (fleet / "out").exists()

    def test_outputs_of_one_name(self, tmp_path):
        for folder in "xy":
            peft(tmp_path / folder / "a")
        with pytest.raises(UsageError, match="would both be written"):
            many(compress, [tmp_path / "x", tmp_path / "y"], out=tmp_path / "out", rank=2)
        peft(tmp_path / "z" / "k")
        kohya(tmp_path / "z" / "k.safetensors")
        with pytest.raises(UsageError, match="would both be written"):
            many(compress, [tmp_path / "z"], out=tmp_path / "out", rank=2, to="peft")

    @pytest.mark.parametrize("out", ["fleet", ".", "fleet/", "fleet/../fleet", "link"])
    def test_an_output_that_is_or_holds_an_input(self, fleet, monkeypatch, out):
        monkeypatch.chdir(fleet)
        (fleet / "link").symlink_to(fleet / "fleet")
        before = tree(fleet)
        for overwrite in (False, True):
            with pytest.raises(OutputExistsError, match="is or contains the input"):
                many(compress, ["fleet"], out=out, rank=2, overwrite=overwrite)
        assert tree(fleet) == before

    def test_an_output_below_the_inputs_is_no_input(self, fleet):
        for _ in range(2):
            report = many(compress, [fleet / "fleet"], out=fleet / "fleet" / "out", rank=2)
            assert len(report.results) == 3

    def test_an_output_that_is_a_file(self, fleet):
        (fleet / "out").write_bytes(b"mine")
        with pytest.raises(OutputExistsError, match="is a file"):
            many(compress, [fleet / "fleet"], out=fleet / "out", rank=2, overwrite=True)
        assert (fleet / "out").read_bytes() == b"mine"

    def test_nothing_there(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileError, match="no adapter in it"):
            many(compress, [tmp_path / "empty"], out=tmp_path / "out", rank=2)
        with pytest.raises(UsageError, match="no input"):
            many(compress, [], out=tmp_path / "out", rank=2)


class TestResume:
    def test_a_rerun_does_what_is_missing(self, fleet):
        first = many(compress, [fleet / "fleet"], out=fleet / "out", rank=2)
        before, when = tree(fleet / "out"), stamps(fleet / "out")
        (fleet / "out" / "deep" / "k.safetensors").unlink()
        again = many(compress, [fleet / "fleet"], out=fleet / "out", rank=2)
        assert [result.skipped for result in again.results] == [True, True, False]
        assert tree(fleet / "out") == before
        changed = {name for name, time in stamps(fleet / "out").items() if time != when[name]}
        assert changed == {"deep/k.safetensors", "deep/k.adapterops.json"}
        for old, new in zip(first.results, again.results, strict=True):
            silent = {"notes", "warnings"}  # a sidecar travels without them
            assert new.certificate.keys() | silent == old.certificate.keys()
            assert all(
                new.certificate[k] == old.certificate[k] for k in {*new.certificate} - silent
            )
        counts = again.summary()
        assert (counts["adapters"], counts["done"], counts["skipped"]) == (3, 1, 2)
        assert counts == {**first.summary(), "done": 1, "skipped": 2}

    def test_other_options_and_other_inputs_are_reported(self, fleet):
        many(compress, [fleet / "fleet"], out=fleet / "out", rank=2)
        before = tree(fleet / "out")
        other = many(compress, [fleet / "fleet"], out=fleet / "out", rank=3)
        assert [type(error) for error in other.failed] == [OutputExistsError] * 3
        assert "with other options" in str(other.failed[0]) and other.exit_code == 2
        peft(fleet / "fleet" / "a", 9)
        changed = many(compress, [fleet / "fleet"], out=fleet / "out", rank=2)
        assert [result.skipped for result in changed.results] == [True, True]
        assert [error.path for error in changed.failed] == [str(fleet / "out" / "a")]
        assert tree(fleet / "out") == before

    def test_overwrite_makes_only_what_changed(self, fleet):
        many(compress, [fleet / "fleet"], out=fleet / "out", rank=2)
        when = stamps(fleet / "out")
        peft(fleet / "fleet" / "a", 9)
        again = many(compress, [fleet / "fleet"], out=fleet / "out", rank=2, overwrite=True)
        assert [result.skipped for result in again.results] == [False, True, True]
        now = stamps(fleet / "out")
        assert {name for name in now if now[name] != when[name]} == {
            f"a/{name}"
            for name in ("README.md", "adapter_config.json", "adapter_model.safetensors")
        } | {"a/adapterops.json"}

    def test_another_version_is_other_work(self, fleet, monkeypatch):
        many(compress, [fleet / "fleet"], out=fleet / "out", rank=2)
        monkeypatch.setattr(adapterops, "__version__", "99")
        again = many(compress, [fleet / "fleet"], out=fleet / "out", rank=2)
        assert len(again.failed) == 3 and "by another version" in str(again.failed[0])

    def test_a_strangers_output_is_left_alone(self, fleet):
        (fleet / "out" / "a").mkdir(parents=True)
        (fleet / "out" / "a" / "notes.txt").write_text("mine")
        for overwrite in (False, True):
            report = many(
                compress, [fleet / "fleet"], out=fleet / "out", rank=2, overwrite=overwrite
            )
            assert len(report.results) == 2 and len(report.failed) == 1
            assert (fleet / "out" / "a" / "notes.txt").read_text() == "mine"
            assert len(list((fleet / "out" / "a").iterdir())) == 1

    @pytest.mark.parametrize("text", [None, "", "[]", '{"error": "none", "warnings": 3}'])
    def test_without_its_sidecar_an_output_is_finished_still(self, fleet, text):
        many(compress, [fleet / "fleet"], out=fleet / "out", rank=2)
        sidecar = fleet / "out" / "a" / "adapterops.json"
        sidecar.unlink()
        if text is not None:
            sidecar.write_text(text)
        again = many(compress, [fleet / "fleet"], out=fleet / "out", rank=2)
        assert [result.skipped for result in again.results] == [True, True, True]
        assert "done before" in table(again) and again.summary()["skipped"] == 3
        json.dumps(again.to_dict(), allow_nan=False)

    def test_an_mlx_folder_is_known_again(self, tmp_path):
        peft(tmp_path / "fleet" / "a")
        first = many(convert, [tmp_path / "fleet"], out=tmp_path / "out", to="mlx")
        assert not first.failed, first.failed
        again = many(convert, [tmp_path / "fleet"], out=tmp_path / "out", to="mlx")
        assert [result.skipped for result in again.results] == [True]

    def test_one_alone_says_that_it_is_finished(self, tmp_path):
        peft(tmp_path / "a")
        compress(tmp_path / "a", out=tmp_path / "out", rank=2)
        with pytest.raises(FinishedError, match="nothing to do"):
            compress(tmp_path / "a", out=tmp_path / "out", rank=2)
        with pytest.raises(OutputExistsError, match="other options") as caught:
            compress(tmp_path / "a", out=tmp_path / "out", rank=3)
        assert not isinstance(caught.value, FinishedError)
        compress(tmp_path / "a", out=tmp_path / "out", rank=2, overwrite=True)


class TestFailures:
    def test_one_bad_adapter_is_reported_and_the_rest_goes_on(self, fleet):
        (fleet / "fleet" / "b.safetensors").write_bytes(b"x")
        told: list[tuple[str, AdapterOpsError]] = []
        report = many(
            compress,
            [fleet / "fleet", fleet / "gone"],
            out=fleet / "out",
            rank=2,
            on_error=lambda item, error: told.append((item.path, error)),
        )
        assert len(report.results) == 3 and report.exit_code == 6
        assert [path for path, _ in told] == [
            str(fleet / "fleet" / "b.safetensors"),
            str(fleet / "gone"),
        ]
        assert [type(error) for error in report.failed] == [FormatError, FileError]
        document = report.to_dict()
        assert [error["code"] for error in document["errors"]] == [3, 6]
        assert document["summary"]["failed"] == 2 and document["summary"]["adapters"] == 5
        assert not (fleet / "out" / "b.safetensors").exists()

    def test_strict_stops_at_the_first(self, fleet):
        (fleet / "fleet" / "b.safetensors").write_bytes(b"x")
        with pytest.raises(FormatError):
            many(compress, [fleet / "fleet"], out=fleet / "out", rank=2, strict=True)
        assert sorted(path.name for path in (fleet / "out").iterdir()) == ["a"]

    def test_alphas_for_some(self, tmp_path):
        for name in "ab":
            (peft(tmp_path / "fleet" / name) / "adapter_config.json").unlink()
        fleet, a = tmp_path / "fleet", str(tmp_path / "fleet" / "a")
        report = many(compress, [fleet], out=tmp_path / "out", rank=4, alpha={a: 8.0})
        assert [result.path for result in report.results] == [a] and report.exit_code == 4
        exact = dense(pairs(1, SHAPES, 4), 2.0)
        assert distance(read_peft(tmp_path / "out" / "a"), exact) < 1e-6
        report = many(compress, [fleet], out=tmp_path / "two", rank=4, alpha=4.0)
        assert len(report.results) == 2

    def test_warnings_are_told_once(self):
        results = [
            Result(path, False, {"warnings": [f"{path}: odd", "plain"] if path != "c" else []})
            for path in "abc"
        ]
        report = ManyReport("compress", "out", tuple(results), ())
        assert report.warnings == ("a: odd (and 1 more)", "a: plain (and 1 more)")


class TestDryRun:
    def test_nothing_is_written(self, fleet):
        report = many(compress, [fleet / "fleet"], out=fleet / "out", rank=2, dry_run=True)
        assert sorted(path.name for path in fleet.iterdir()) == ["fleet"]
        assert outputs(report, fleet / "out") == ["a", "deep/b", "deep/k.safetensors"]
        assert {r.certificate["schema"] for r in report.results} == {"adapterops.compress-plan/1"}
        real = many(compress, [fleet / "fleet"], out=fleet / "out", rank=2)
        for planned, made in zip(report.results, real.results, strict=True):
            assert planned.number("size") == made.number("size")

    def test_what_is_there_already(self, fleet):
        many(compress, [fleet / "fleet" / "a"], out=fleet / "out", rank=2)
        before = tree(fleet / "out")
        report = many(compress, [fleet / "fleet"], out=fleet / "out", rank=2, dry_run=True)
        assert [result.skipped for result in report.results] == [True, False, False]
        other = many(compress, [fleet / "fleet"], out=fleet / "out", rank=3, dry_run=True)
        assert [error.path for error in other.failed] == [str(fleet / "out" / "a")]
        assert tree(fleet / "out") == before


class TestReport:
    def test_document(self, fleet):
        report = many(compress, [fleet / "fleet"], out=fleet / "out", rank=2)
        document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert document.keys() == {"schema", "output", "items", "errors", "summary"}
        assert document["schema"] == "adapterops.compress-many/1"
        one = document["items"][0]
        assert one["path"] == str(fleet / "fleet" / "a") and one["skipped"] is False
        assert one["schema"] == "adapterops.compress/1" and "modules" not in one
        assert one["rank"] == 2 and one["inputs"][0]["rank"] == 4
        summary = document["summary"]
        worst = max(document["items"], key=lambda item: item["error"])
        assert (summary["worst"], summary["worst_error"]) == (worst["path"], worst["error"])
        for name in ("size_before", "size", "parameters_before", "parameters"):
            assert summary[name] == sum(item[name] for item in document["items"])
        assert summary["parameters"] * 2 == summary["parameters_before"]

    def test_modules_on_request(self, fleet):
        for skipped in (False, True):
            report = many(
                compress, [fleet / "fleet" / "a"], out=fleet / "out", rank=2, modules_too=True
            )
            [result] = report.results
            assert result.skipped is skipped and set(result.certificate["modules"]) == set(SHAPES)

    def test_progress(self, fleet):
        seen: list[tuple[str, int, int]] = []
        many(
            compress,
            [fleet / "fleet"],
            out=fleet / "out",
            rank=2,
            progress=lambda *args: seen.append(args),
        )
        assert seen == [("compressing", n, 3) for n in (1, 2, 3)]

    def test_table(self, fleet):
        (fleet / "fleet" / "bad.safetensors").write_bytes(b"x")
        report = many(compress, [fleet / "fleet"], out=fleet / "out", rank=2)
        lines = table(report).splitlines()
        assert lines[0].split() == [
            "adapter",
            "dialect",
            "rank",
            "parameters",
            "MB",
            "error",
            "remark",
        ]
        assert lines[1].split()[:5] == [str(fleet / "fleet" / "a"), "peft", "4", "→", "2"]
        assert lines[-1].startswith("4 adapters, ") and lines[-1].endswith(", 1 failed")
        assert "largest error" in lines[-1]

    def test_table_of_nothing_but_failures(self):
        report = ManyReport("compress", "out", (), (FormatError("no"),))
        assert table(report) == "1 adapter, 1 failed"


class TestCutOff:
    """Whatever ends a run, what stands under a final name is complete, and a rerun goes on."""

    COUNT = 36

    @pytest.fixture
    def running(self, tmp_path):
        """A run over many adapters in two processes, some of them done."""
        shapes = dict.fromkeys(SHAPES, (256, 256))
        seed = write_peft(tmp_path / "seed", pairs(1, shapes, 64))
        for index in range(self.COUNT):
            shutil.copytree(seed, tmp_path / "fleet" / f"{index:03d}")
        process = subprocess.Popen(
            [sys.executable, "-m", "adapterops", "compress", "fleet", "-o", "out", *CUT],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(adapterops.__file__).parent.parent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        limit = time.monotonic() + 30
        while not any(tmp_path.glob("out/0*/adapter_model.safetensors")):
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.002)
        yield process
        process.kill()
        process.wait()

    def finish(self, folder: Path) -> None:
        """Every output that is there is complete; a rerun makes the others."""
        done = {path.name for path in (folder / "out").iterdir() if not path.name.startswith(".")}
        assert 0 < len(done) < self.COUNT
        names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "adapterops.json"}
        for name in done:
            assert {path.name for path in (folder / "out" / name).iterdir()} == names
        again = many(compress, [folder / "fleet"], out=folder / "out", max_error=0.5)
        assert not again.failed
        assert {Path(r.path).name for r in again.results if r.skipped} == done
        reference = load_file(folder / "out" / min(done) / "adapter_model.safetensors")
        for path in (folder / "out").glob("0*"):
            tensors = load_file(path / "adapter_model.safetensors")
            assert all((tensors[name] == reference[name]).all() for name in reference)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_interrupted(self, running, tmp_path, number):
        running.send_signal(number)
        out, said = running.communicate(timeout=20)
        assert running.returncode == 130 and out == "", said
        assert "no unfinished output" in said and len(said.strip().splitlines()) == 1
        assert not list((tmp_path / "out").glob(".*"))
        self.finish(tmp_path)

    def test_killed(self, running, tmp_path):
        workers = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        for pid in (running.pid, *map(int, workers)):
            os.kill(pid, signal.SIGKILL)
        running.communicate(timeout=20)
        self.finish(tmp_path)
