"""compress, convert and extract as commands: what they print, refuse and leave behind."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from adapterops.render.compress import page
from adapterops.verbs.compress import compress
from tests.inspecting import SHAPES, call, peft
from tests.support import dense, distance, load_file, pairs, read_peft, write_kohya, write_peft


@pytest.fixture
def one(tmp_path) -> Path:
    peft(tmp_path / "a", 4)
    return tmp_path


def told(stdout: str, start: str) -> str:
    """The one line that starts so."""
    [line] = [line for line in stdout.splitlines() if line.startswith(start)]
    return line


class TestOne:
    def test_before_and_after(self, one):
        done = call("compress", "a", "-o", "small", "--rank", "2", cwd=one)
        assert told(done.stdout, "small").split() == ["small", "8", "modules"]
        before, after = told(done.stdout, "before").split(), told(done.stdout, "after").split()
        assert before[1:4] == ["peft", "4", "704"] and after[1:4] == ["peft", "2", "352"]
        assert before[-1] == after[-1] == "float32"
        assert " of the adapter (rank " in told(done.stdout, "error ")
        assert len([line for line in done.stdout.splitlines() if "self_attn" in line]) == 5
        assert done.stderr == ""
        assert json.loads((one / "small" / "adapter_config.json").read_text())["r"] == 2

    def test_verbose_names_every_module(self, one):
        done = call("compress", "a", "-o", "small", "--rank", "2", "-v", cwd=one)
        assert all(name in done.stdout for name in SHAPES)

    def test_quiet(self, one):
        done = call("compress", "a", "-o", "small", "--rank", "2", "-q", cwd=one)
        assert done.stdout == done.stderr == ""

    def test_json_is_one_document(self, one):
        done = call("compress", "a", "-o", "small", "--rank", "2", "--json", cwd=one)
        document = json.loads(done.stdout)
        sidecar = json.loads((one / "small" / "adapterops.json").read_text())
        assert document["schema"] == sidecar["schema"] == "adapterops.compress/1"
        assert document["error"] == sidecar["error"] and set(document["modules"]) == set(SHAPES)
        assert (document["parameters_before"], document["parameters"]) == (704, 352)
        assert document["spectra"] == {} and document["inputs"][0]["dtype"] == "float32"

    def test_spectra_on_request(self, one):
        done = call("compress", "a", "-o", "small", "--rank", "2", "--json", "--spectra", cwd=one)
        spectra = json.loads(done.stdout)["spectra"]
        assert spectra.keys() == SHAPES.keys()
        assert all(len(values) == 4 and min(values) > 0 for values in spectra.values())

    def test_dry_run(self, one):
        done = call("compress", "a", "-o", "small", "--max-error", "0.3", "--dry-run", cwd=one)
        assert "small would be peft, rank " in done.stdout and not (one / "small").exists()
        done = call("compress", "a", "-o", "small", "--rank", "2", "--dry-run", "--json", cwd=one)
        document = json.loads(done.stdout)
        assert document["schema"] == "adapterops.compress-plan/1"
        assert set(document["ranks"].values()) == {2}

    @pytest.mark.parametrize(
        "options",
        ["--max-error 0.001", "--energy=0.9999 --ragged", "--sv_fro 0.9999 --max-rank 4 -q"],
    )
    def test_the_hint_is_a_command_that_runs(self, one, monkeypatch, options):
        given = ["compress", "a", "-o", "small", *shlex.split(options)]
        call(*given, cwd=one)
        given = [word for word in given if word != "-q"]
        done = call(*given, "--overwrite", cwd=one)
        line = next(line for line in done.stdout.splitlines() if line.startswith("  rank 1 "))
        command = shlex.split(line[line.index("adapterops compress") :])
        assert command == shlex.split("adapterops compress --rank 1 --overwrite a -o small")
        call(*command[1:], cwd=one)
        assert json.loads((one / "small" / "adapter_config.json").read_text())["r"] == 1

    @pytest.mark.parametrize("name", ["sv-ratio", "sv-fro", "sv-cumulative"])
    def test_sd_scripts_spelling(self, tmp_path, name):
        write_kohya(tmp_path / "k.safetensors", pairs(1, {"lora_unet_q": (16, 12)}, 6), alpha=6)
        value = "2" if name == "sv-ratio" else "0.8"
        for spelling in (name, name.replace("-", "_")):
            out = f"{spelling}.safetensors"
            call("compress", "k.safetensors", "-o", out, f"--{spelling}", value, cwd=tmp_path)
        one, two = (
            load_file(tmp_path / f"{x}.safetensors") for x in (name, name.replace("-", "_"))
        )
        assert one.keys() == two.keys() and all((one[key] == two[key]).all() for key in one)
        rank = one["lora_unet_q.lora_down.weight"].shape[0]
        assert 1 <= rank < 6

    def test_a_picture(self, one):
        call("compress", "a", "-o", "small", "--rank", "2", "--plot", "x.svg", cwd=one)
        assert (one / "x.svg").read_bytes().startswith(b"<?xml")
        done = call("compress", "a", "-o", "b", "--rank", "2", "--plot", "x.svg", cwd=one, code=2)
        assert "x.svg: exists" in done.stderr and not (one / "b").exists()
        call("compress", "a", "-o", "b", "--rank", "2", "--plot", "x.svg", "--overwrite", cwd=one)

    def test_global_ranks_and_modules_at_none(self, tmp_path):
        factors = pairs(1, SHAPES, 4)
        weak = next(iter(factors))
        factors[weak] = (factors[weak][0] * 1e-4, factors[weak][1])
        write_peft(tmp_path / "a", factors)
        done = call(
            "compress", "a", "-o", "b", "--ratio", "0.5", "--allocate", "global", cwd=tmp_path
        )
        assert "no choice of ranks with as many parameters has a smaller error" in done.stdout
        assert told(done.stdout, "at rank 0") == f"at rank 0, left out: 1 module, {weak}"
        assert told(done.stdout, "b ").split() == ["b", "7", "modules"]
        assert "–" in told(done.stdout, "after")
        done = call(
            "compress",
            "a",
            "-o",
            "c",
            "--ratio=0.5",
            "--allocate=global",
            "--dry-run",
            cwd=tmp_path,
        )
        assert weak in told(done.stdout, "at rank 0") and told(done.stdout, "ranks by module: ")

    def test_metric_and_gap_in_words(self, one):
        report = compress(one / "a", out=one / "small", rank=2)
        modules = {name: replace(m, metric_error=0.25) for name, m in report.modules.items()}
        other = replace(
            report,
            metric="activation",
            metric_error=0.123,
            gap=0.0004,
            modules=modules,
            dropped=tuple(f"m{i}" for i in range(6)),
        )
        text = page(other, verbose=False, command=str)
        assert "error 12.3 % on the inputs that the activations describe" in text
        assert "0.04 %" in told(text, "no choice of ranks")
        assert told(text, "at rank 0").endswith("6 modules, m0, m1, m2, m3 and 2 more")
        assert " 25 %" in next(line for line in text.splitlines() if "self_attn" in line)

    def test_names_that_would_steer_a_terminal(self, tmp_path):
        evil = "evil\x1b]0;owned\x07[bold]"
        peft(tmp_path / evil, 4)
        peft(tmp_path / "two" / evil, 4)
        for arguments in ([evil, "-o", "x\x1b[31m"], ["two", "-o", "y"], ["two", "-o", "y"]):
            done = call("compress", *arguments, "--rank", "2", cwd=tmp_path)
            for stream in (done.stdout, done.stderr):
                assert "\x1b" not in stream and "\x07" not in stream
        assert "[bold]" in done.stdout

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["a"], "'-o'"),
            (["-o", "b"], "no input"),
            (["a", "-o", "b"], "nothing to do"),
            (["a", "-o", "a", "--rank", "2", "--overwrite"], "is or contains the input"),
            (["a", "-o", "b", "--rank", "2", "--ratio", "0.5"], "both choose the rank"),
            (["a", "-o", "b", "--rank", "few"], "whole number"),
            (["a", "-o", "b", "--allocate", "global", "--ragged"], "give --rank"),
            (["a", "-o", "b", "--form", "qr", "--rank", "2"], "--form"),
            (["a", "-o", "b", "--rank", "2", "--plot", "x.jpg"], "x.jpg"),
            (["a", "-o", "b", "--rank", "2", "--plot", "x.svg", "--dry-run"], "--dry-run"),
            (["a", "b", "-o", "c", "--rank", "2", "--plot", "x.svg"], "--plot draws one"),
            (["a", "-o", "b", "--rank", "2", "--alpha", "c=4"], "0 inputs are called"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_usage_errors(self, one, arguments, says):
        done = call("compress", *arguments, cwd=one, code=2)
        assert says in done.stderr and done.stdout == ""
        assert sorted(path.name for path in one.iterdir()) == ["a"]

    def test_json_errors(self, one):
        done = call("compress", "gone", "-o", "b", "--rank", "2", "--json", cwd=one, code=6)
        assert done.stdout == "" and json.loads(done.stderr)["error"]["path"] == "gone"


class TestMany:
    @pytest.fixture
    def fleet(self, tmp_path) -> Path:
        for seed, name in enumerate(("a", "b")):
            peft(tmp_path / "fleet" / name, 4, seed)
        return tmp_path

    def test_lines_and_a_total(self, fleet):
        done = call("compress", "fleet", "-o", "out", "--rank", "2", cwd=fleet)
        lines = done.stdout.splitlines()
        assert [line.split()[0] for line in lines[:3]] == ["adapter", "fleet/a", "fleet/b"]
        assert lines[-1].startswith("2 adapters, ") and done.stderr == ""
        again = call("compress", "fleet", "-o", "out", "--rank", "2", cwd=fleet)
        assert again.stdout.splitlines()[-1].endswith("2 done before")
        other = call("compress", "fleet", "-o", "out", "--rank", "1", cwd=fleet, code=2)
        assert other.stdout == "2 adapters, 2 failed\n" and other.stderr.count("error: out/") == 2

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["fleet/a"], ["adapter_config.json"]),
            (["fleet/a", "fleet/b"], ["a", "b"]),
            (["--from", "list"], ["a"]),
            (["only"], ["x"]),
        ],
        ids=["one", "two", "a list of one", "a folder with one"],
    )
    def test_what_the_output_is(self, fleet, arguments, expected):
        """The result itself for one adapter, a mirror for whatever may be several."""
        (fleet / "list").write_text("fleet/a\n")
        peft(fleet / "only" / "x", 4)
        call("compress", *arguments, "-o", "out", "--rank", "2", cwd=fleet)
        found = sorted(path.name for path in (fleet / "out").iterdir())
        assert found == expected or set(expected) < set(found) - {"a", "b", "x"}

    def test_json(self, fleet):
        (fleet / "fleet" / "c.safetensors").write_bytes(b"x")
        done = call("compress", "fleet", "-o", "out", "--rank", "2", "--json", cwd=fleet, code=3)
        document = json.loads(done.stdout)
        assert document["schema"] == "adapterops.compress-many/1"
        assert [item["path"] for item in document["items"]] == ["fleet/a", "fleet/b"]
        assert "modules" not in document["items"][0]
        assert [json.loads(line)["error"] for line in done.stderr.splitlines()] == document[
            "errors"
        ]
        done = call(
            "compress", "fleet", "-o", "out", "--rank", "2", "--json", "-v", cwd=fleet, code=3
        )
        assert set(json.loads(done.stdout)["items"][0]["modules"]) == set(SHAPES)

    def test_quiet_and_dry_run(self, fleet):
        done = call("compress", "fleet", "-o", "out", "--rank", "2", "--dry-run", cwd=fleet)
        assert "nothing written" in done.stdout and not (fleet / "out").exists()
        done = call("compress", "fleet", "-o", "out", "--rank", "2", "-q", cwd=fleet)
        assert done.stdout == done.stderr == ""

    def test_warnings_and_notes(self, fleet):
        for name in "ab":
            (fleet / "fleet" / name / "adapter_model.bin").write_bytes(b"")
        (fleet / "again").symlink_to(fleet / "fleet" / "a")
        done = call("compress", "fleet", "again", "-o", "out", "--rank", "2", cwd=fleet)
        assert "note: again: the same as fleet/a, counted once" in done.stderr
        warnings = [x for x in done.stderr.splitlines() if x.startswith("warning: fleet/a")]
        assert len(warnings) == 1 and "adapter_model.bin" in warnings[0]

    def test_alphas_by_name(self, fleet):
        for name in "ab":
            (fleet / "fleet" / name / "adapter_config.json").unlink()
        call("compress", "fleet", "-o", "out", "--rank", "4", "--alpha", "b=8", cwd=fleet, code=4)
        exact = dense(pairs(1, SHAPES, 4), 2.0)
        assert distance(read_peft(fleet / "out" / "b"), exact) < 1e-6
        assert not (fleet / "out" / "a").exists()


class TestConvert:
    def test_scale_and_dialect(self, tmp_path):
        peft(tmp_path / "a", 4, alpha=8)
        done = call("convert", "a", "-o", "b", "--to", "mlx", cwd=tmp_path)
        assert told(done.stdout, "before").split()[1:3] == ["peft", "4"]
        assert told(done.stdout, "after").split()[1:3] == ["mlx", "4"]
        assert told(done.stdout, "error ").startswith("error 0 % of the adapter")
        call("convert", "b", "-o", "c", "--to", "peft", "--scaling", "rslora", cwd=tmp_path)
        config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
        assert config["use_rslora"] and config["lora_alpha"] == pytest.approx(2.0 * 4**0.5)
        assert json.loads((tmp_path / "c" / "adapterops.json").read_text())["verb"] == "convert"

    def test_many(self, tmp_path):
        for seed in range(2):
            peft(tmp_path / "fleet" / f"{seed}", 4, seed)
        done = call("convert", "fleet", "-o", "out", "--to", "mlx", "--json", cwd=tmp_path)
        document = json.loads(done.stdout)
        assert document["schema"] == "adapterops.convert-many/1"
        assert [item["dialect"] for item in document["items"]] == ["mlx", "mlx"]
        done = call("convert", "fleet", "-o", "out", "--to", "mlx", cwd=tmp_path)
        assert done.stdout.splitlines()[-1].endswith("2 done before")

    def test_residual_without_base(self, one):
        done = call("convert", "a", "-o", "b", "--residual", "x", cwd=one, code=2)
        assert "--base" in done.stderr and not (one / "b").exists()


class TestExtract:
    @pytest.fixture
    def models(self, tmp_path) -> Path:
        """Two checkpoints that differ by rank 3 in their matrices, and in a norm."""
        change = dense(pairs(1, dict.fromkeys(SHAPES, (24, 20)), 3))
        rng = np.random.default_rng(2)
        base = {f"{name}.weight": rng.standard_normal(d.shape) for name, d in change.items()}
        tuned = {f"{name}.weight": base[f"{name}.weight"] + 0.01 * d for name, d in change.items()}
        for name, tensors, norm in (("base", base, 1.0), ("tuned", tuned, 1.5)):
            tensors["model.layers.0.input_layernorm.weight"] = np.full(20, norm)
            (tmp_path / name).mkdir()
            save_file(
                {key: value.astype(np.float32) for key, value in tensors.items()},
                tmp_path / name / "model.safetensors",
                metadata={"format": "pt"},
            )
        return tmp_path

    def test_what_it_prints_and_writes(self, models):
        done = call("extract", "base", "tuned", "-o", "out", "--max-error", "0.01", cwd=models)
        assert told(done.stdout, "out ").split()[1:4] == ["peft,", "rank", "3,"]
        assert " of the difference (rank " in told(done.stdout, "error ")
        assert "before" not in done.stdout
        base, tuned = (load_file(models / x / "model.safetensors") for x in ("base", "tuned"))
        exact = {
            name.removesuffix(".weight"): tuned[name].astype(np.float64) - base[name]
            for name in base
            if "norm" not in name
        }
        assert distance(read_peft(models / "out"), exact) < 0.01

    def test_hint_json_and_dry_run(self, models):
        given = ["extract", "base", "tuned", "-o", "out", "--energy", "0.9999"]
        dry = call(*given, "--dry-run", "--json", cwd=models)
        assert json.loads(dry.stdout)["schema"] == "adapterops.extract-plan/1"
        assert not (models / "out").exists()
        done = call(*given, "-v", cwd=models)
        assert all(name in done.stdout for name in SHAPES)
        line = next(line for line in done.stdout.splitlines() if line.startswith("  rank 1 "))
        command = shlex.split(line[line.index("adapterops extract") :])
        done = call(*command[1:], "--json", cwd=models)
        assert json.loads(done.stdout)["rank"] == 1

    @pytest.mark.parametrize(
        ("arguments", "says", "code"),
        [
            (["base", "-o", "out"], "TUNED", 2),
            (["base", "tuned"], "'-o'", 2),
            (["base", "tuned", "-o", "out", "--rank", "same"], "integer", 2),
            (["base", "tuned", "-o", "out", "--vectors", "lora"], "--vectors", 2),
            (["base", "gone", "-o", "out", "--rank", "2"], "gone", 6),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_refused(self, models, arguments, says, code):
        done = call("extract", *arguments, cwd=models, code=code)
        assert says in done.stderr and not (models / "out").exists()
