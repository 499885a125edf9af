"""unbake as a library and a command: the base as it was, byte by byte, or an error and nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from adapterops.errors import (
    AdapterOpsError,
    FileError,
    FormatError,
    IncompatibleError,
    Interrupted,
    NumericsError,
    OutputExistsError,
    UnsafeFileError,
)
from adapterops.files.header import encode_header
from adapterops.files.source import LocalFile, read_header
from adapterops.undoing import restoring
from adapterops.verbs.bake import bake
from adapterops.verbs.unbake import unbake
from tests import bake_models
from tests import test_bake_names as names
from tests import test_bake_values as values
from tests.bake_models import LAYOUTS, factors, weights
from tests.inspecting import call
from tests.support import pairs, write_kohya, write_peft

ROUNDS = ("exact", "nearest", "stochastic", "compensated")
RECORD = "adapterops.undo"
SIDECAR = "adapterops.json"


def below(folder: Path) -> dict[str, bytes]:
    """Every file in a folder and in those below it, links followed."""
    found = {}
    for place, _, files in os.walk(folder, followlinks=True):
        for file in files:
            path = Path(place, file)
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def given(
    folder: Path, layout: str = "shards", dtype: str = "BF16", **options: Any
) -> tuple[Path, Path]:
    """A base with files beside its weights, and an adapter of it."""
    base = bake_models.model(folder / "m", weights(**options), dtype, layout)
    if layout not in ("file", "hub"):
        beside = base if base.is_dir() else base.parent
        (beside / "tokenizer.json").write_text('{"of": "a test"}')
        (beside / "templates").mkdir()
        (beside / "templates" / "chat.jinja").write_text("{{ x }}\r\n")
        (beside / "empty.txt").write_text("")
    return base, write_peft(folder / "a", factors(1, **options), alpha=5.6)


def there_and_back(base: Path, adapters: Any, tmp_path: Path, **options: Any) -> Path:
    """The base restored in another place, when base and adapters are gone and the bake moved."""
    bake(base, adapters, out=tmp_path / "o", reversible=True, **options)
    made = tmp_path / "o"
    source = base if base.is_dir() or base.suffix == ".safetensors" else base.parent
    kept = below(source) if source.is_dir() else {"": source.read_bytes()}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in [*tmp_path.iterdir()]:
        if path.name.startswith("o"):
            path.rename(elsewhere / path.name.replace("o", "moved", 1))
        elif path != elsewhere:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not made.exists()
    [moved] = (p for p in elsewhere.iterdir() if p.name in ("moved", "moved.safetensors"))
    report = unbake(moved, out=tmp_path / "again")
    again = tmp_path / "again"
    found = below(again) if again.is_dir() else {"": again.read_bytes()}
    assert found.keys() == kept.keys()
    assert [name for name in kept if kept[name] != found[name]] == []
    assert report.size == sum(map(len, found.values()))
    return moved


class TestBackAgain:
    @pytest.mark.parametrize(
        ("layout", "dtype"), [*zip(LAYOUTS, ["F16", "BF16", "F32", "F16", "BF16"], strict=True)]
    )
    def test_every_layout(self, layout: str, dtype: str, tmp_path: Path) -> None:
        base, one = given(tmp_path, layout, dtype)
        there_and_back(base, one, tmp_path)

    @pytest.mark.parametrize("mode", ROUNDS)
    @pytest.mark.parametrize("size", [1e-4, 0.5], ids=["small", "large"])
    def test_every_rounding(self, mode: str, size: float, tmp_path: Path) -> None:
        base, _ = given(tmp_path)
        one = write_peft(tmp_path / "b", factors(3, size))
        there_and_back(base, one, tmp_path, round=mode, seed=4)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    @pytest.mark.parametrize("own", ["F16", "BF16", "F32"])
    def test_other_types(self, own: str, dtype: str, tmp_path: Path) -> None:
        base, one = given(tmp_path, "shards", own)
        there_and_back(base, one, tmp_path, dtype=dtype)

    def test_several_with_weights(self, tmp_path: Path) -> None:
        base, one = given(tmp_path)
        two = write_peft(tmp_path / "b", factors(2))
        there_and_back(base, [one, two, one], tmp_path, weights=[0.7, -0.2, 0.1])

    def test_some_modules(self, tmp_path: Path) -> None:
        base, one = given(tmp_path)
        there_and_back(base, one, tmp_path, modules=r".*layers\.1.*q_proj")

    def test_linked_files(self, tmp_path: Path) -> None:
        base, one = given(tmp_path)
        there_and_back(base, one, tmp_path, modules=r".*layers\.1.*q_proj", link=True)

    def test_an_adapter_without_effect(self, tmp_path: Path) -> None:
        base, _ = given(tmp_path)
        none = {name: (0 * B, A) for name, (B, A) in factors(1).items()}
        there_and_back(base, write_peft(tmp_path / "b", none), tmp_path)

    def test_a_base_through_links(self, tmp_path: Path) -> None:
        base, one = given(tmp_path, "file")
        (tmp_path / "link.safetensors").symlink_to(base)
        bake(tmp_path / "link.safetensors", one, out=tmp_path / "o", reversible=True)
        unbake(tmp_path / "o.safetensors", out=tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == base.read_bytes()

    def test_numbers_that_round_oddly(self, tmp_path: Path) -> None:
        """Zeros of both signs, subnormals, NaN and infinities that no adapter changes."""
        tensors = weights()
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors[name][:4] = np.array([[0.0], [-0.0], [1e-40], [3e-8]])
        tensors["model.norm.weight"][:3] = [np.nan, -np.inf, -0.0]
        for dtype in ("F16", "BF16"):
            folder = tmp_path / dtype
            base = bake_models.model(folder / "m", tensors, dtype)
            found = {n: (B * (np.arange(len(B)) != 1)[:, None], A) for n, (B, A) in
                     factors(1).items()}  # fmt: skip
            there_and_back(base, write_peft(folder / "a", found), folder)

    def test_a_pipeline(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(1)
        base = tmp_path / "m"
        block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
        text = "text_model.encoder.layers.0.self_attn"
        unet = {f"{block}.{n}.weight": rng.standard_normal((16, 16)) for n in ("to_q", "to_k")}
        encoder = {f"{text}.{n}.weight": rng.standard_normal((8, 8)) for n in ("q_proj", "k_proj")}
        vae = {"decoder.conv_in.weight": rng.standard_normal((4, 4, 3, 3))}
        config = {"_class_name": "UNet2DConditionModel"}
        bake_models.model(base / "unet", unet, "F16", "file", config)
        file = base / "unet" / "model.safetensors"
        file.rename(file.with_name("diffusion_pytorch_model.safetensors"))
        config = {"model_type": "clip_text_model"}
        bake_models.model(base / "text_encoder", encoder, "BF16", "shards", config, shards=2)
        bake_models.model(base / "vae", vae, "F32", "file", {"_class_name": "AutoencoderKL"})
        (base / "scheduler").mkdir()
        (base / "scheduler" / "scheduler_config.json").write_text("{}")
        (base / "tokenizer").mkdir()
        (base / "tokenizer" / "vocab.json").write_text('{"a": 0}')
        (base / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        sizes = {f"unet.{block}.to_q": (16, 16), f"text_encoder.{text}.q_proj": (8, 8)}
        (tmp_path / "a").mkdir()
        parts = {}
        for name, (B, A) in pairs(1, sizes, 2).items():
            parts |= {f"{name}.lora_B.weight": B, f"{name}.lora_A.weight": A}
        save_file(parts, tmp_path / "a" / "pytorch_lora_weights.safetensors")
        there_and_back(base, tmp_path / "a", tmp_path, weights=[0.5])

    def test_convolutions_of_a_kohya_file(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(1)
        name = "model.diffusion_model.input_blocks.1.1.proj_in"
        base = bake_models.model(
            tmp_path / "m", {f"{name}.weight": rng.standard_normal((8, 6, 3, 3))}, "F16", "folder",
            None,
        )  # fmt: skip
        B, A = pairs(1, {name: (8, 54)}, 2)[name]
        stem = f"lora_unet_{name.removeprefix('model.diffusion_model.').replace('.', '_')}"
        parts = {stem: (B.reshape(8, 2, 1, 1), A.reshape(2, 6, 3, 3))}
        one = write_kohya(tmp_path / "k.safetensors", parts, alpha=1.0)
        there_and_back(base, one, tmp_path)


KINDS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "dora": ("LlamaForCausalLM", "LlamaConfig", {**names.SIZES, **names.APART},
             {"use_dora": True, "target_modules": ["q_proj", "up_proj"]}),
    "pissa": ("LlamaForCausalLM", "LlamaConfig", {**names.SIZES, **names.APART},
              {"init_lora_weights": "pissa", "target_modules": ["v_proj"]}),
    "turned": ("GPT2LMHeadModel", "GPT2Config", names.GPT2,
               {"target_modules": ["c_attn", "c_proj", "c_fc", "wpe"]}),
    "fused": ("Phi3ForCausalLM", "Phi3Config", {**names.SIZES, **names.APART},
              {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "experts": ("MixtralForCausalLM", "MixtralConfig", {**names.SIZES, **names.EXPERTS},
                {"target_modules": ["q_proj"], "target_parameters": names.PARAMETERS}),
    "lora-bias": ("BertForSequenceClassification", "BertConfig", names.FEW,
                  {"target_modules": ["query", "dense"], "lora_bias": True}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_trains(kind: str, dtype: str, tmp_path: Path) -> None:
    cls, config, sizes, options = KINDS[kind]
    names.trained(names.made(cls, config, sizes), tmp_path, **options)
    shutil.rmtree(tmp_path / "merged")
    there_and_back(tmp_path / "base", tmp_path / "adapter", tmp_path, dtype=dtype)


@pytest.mark.parametrize(
    "case",
    ["embedding", "head", "saved-both", "tokens", "tokens-of-each", "tokens-grown", "grown",
     "shrunk", "grown-embedding", "untied-grown-both", "biases", "gpt2-head"],
)  # fmt: skip
def test_values_and_ties(case: str, tmp_path: Path) -> None:
    kind, tied, _, options = values.LIVE[case]
    bias = {"attention_bias": True} if "biases" in case else {}
    with_tie = {"tie_word_embeddings": tied} if kind == "llama" else {}
    model = values.tiny(kind, tmp_path / "base", **with_tie, **bias)
    values.adapter(model, tmp_path / "adapter", **options)
    moved = there_and_back(tmp_path / "base", tmp_path / "adapter", tmp_path)
    if case in ("embedding", "head"):
        assert json.loads((moved / "config.json").read_text())["tie_word_embeddings"] is False


class TestTwice:
    def test_a_base_that_was_baked_before(self, tmp_path: Path) -> None:
        base, one = given(tmp_path)
        bake(base, one, out=tmp_path / "p", reversible=True)
        two = write_peft(tmp_path / "b", factors(2))
        bake(tmp_path / "p", two, out=tmp_path / "q", reversible=True)
        unbake(tmp_path / "q", out=tmp_path / "again")
        first, again = below(tmp_path / "p"), below(tmp_path / "again")
        assert again == {n: data for n, data in first.items() if not n.endswith(".undo")}
        unbake(tmp_path / "p", out=tmp_path / "base")
        assert below(tmp_path / "base") == below(base)

    def test_what_was_restored_is_baked_to_the_same_bytes(self, tmp_path: Path) -> None:
        base, one = given(tmp_path)
        bake(base, one, out=tmp_path / "p", reversible=True)
        unbake(tmp_path / "p", out=tmp_path / "again")
        bake(tmp_path / "again", one, out=tmp_path / "q")
        first, again = below(tmp_path / "p"), below(tmp_path / "q")
        assert {n: d for n, d in again.items() if n != SIDECAR} == {
            n: d for n, d in first.items() if n != SIDECAR and not n.endswith(".undo")
        }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base `m` of three shards, one of them untouched, and the bake `o` of it."""
    folder = tmp_path_factory.mktemp("made")
    base, one = given(folder, rows=300, columns=240)
    bake(base, one, out=folder / "o", reversible=True, modules=".*layers.*")
    return folder


@pytest.fixture
def baked(made: Path, tmp_path: Path) -> Path:
    """A copy of that bake, to be spoilt."""
    shutil.copytree(made / "o", tmp_path / "o")
    return tmp_path / "o"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A base `m` of one file, baked as `o.safetensors`."""
    base, one = given(tmp_path, "file")
    bake(base, one, out=tmp_path / "o", reversible=True)
    return tmp_path / "o.safetensors"


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("memory", [None, "64MB", "600MB"])
def test_threads_and_memory_do_not_matter(
    jobs: int, memory: str | None, made: Path, tmp_path: Path
) -> None:
    said: list[tuple[str, int, int]] = []
    unbake(
        made / "o", out=tmp_path / "again", jobs=jobs, memory=memory,
        progress=lambda *args: said.append(args),
    )  # fmt: skip
    assert below(tmp_path / "again") == below(made / "m")
    done = [count for _, count, _ in said]
    assert done == sorted(done) and said[-1][1] == said[-1][2]


def test_the_report(made: Path, tmp_path: Path) -> None:
    report = unbake(made / "o", out=tmp_path / "again")
    assert {file.name: file.size for file in report.files} == {
        name: len(data) for name, data in below(made / "m").items()
    }
    assert {file.how for file in report.files} == {"same", "undo", "kept"}
    assert (report.output, report.resumed) == (os.fspath(tmp_path / "again"), 0)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["schema"].endswith("unbake/1")


class TestInterrupted:
    @staticmethod
    def stop(patch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
        """Raise in place of the next piece of weights when `after` were made."""
        real, count = restoring.restored, [0]

        def stopping(*args: Any) -> Iterator[bytes]:
            for piece in real(*args):
                count[0] += 1
                if count[0] > after:
                    raise error
                yield piece

        patch.setattr(restoring, "restored", stopping)

    @staticmethod
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    @pytest.mark.parametrize("after", [0, 9, "all weights"])
    def test_the_same_call_goes_on(
        self, after: int | str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "again"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
            if isinstance(after, int):
                self.stop(patch, after, KeyboardInterrupt())
            else:
                patch.setattr(restoring, "write_file", self.stopped)
            unbake(made / "o", out=out)
        there = [path.name for path in tmp_path.iterdir()]
        assert there == ([".again.adapterops-partial"] if after else [])
        if after:
            assert isinstance(caught.value, Interrupted) and caught.value.exit_code == 130
            count = len(below(made / "m"))
            assert re.search(
                rf"[17] of {count} files are kept.*the same command", str(caught.value)
            )
        report = unbake(made / "o", out=out)
        assert report.resumed == {0: 0, 9: 1, "all weights": 7}[after]
        assert below(out) == below(made / "m")
        assert [path.name for path in tmp_path.iterdir()] == ["again"]

    def test_a_file_leaves_nothing(
        self, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = sorted(tmp_path.iterdir())
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            self.stop(patch, 3, KeyboardInterrupt())
            unbake(single, out=tmp_path / "again.safetensors")
        assert sorted(tmp_path.iterdir()) == before

    def test_a_full_disk_in_the_middle(
        self, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with monkeypatch.context() as patch, pytest.raises(FileError, match="full") as caught:
            self.stop(patch, 4, full)
            unbake(made / "o", out=tmp_path / "again")
        assert caught.value.exit_code == 6 and not (tmp_path / "again").exists()
        unbake(made / "o", out=tmp_path / "again")
        assert below(tmp_path / "again") == below(made / "m")

    @pytest.mark.parametrize("kind", ["folder", "file"])
    def test_a_disk_without_room(
        self, kind: str, made: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.statvfs

        def little(path: Any) -> os.statvfs_result:
            return os.statvfs_result([*real(path)[:3], 1, 1, *real(path)[5:]])

        before = sorted(tmp_path.iterdir())
        monkeypatch.setattr(os, "statvfs", little)
        with pytest.raises(FileError, match="the disk has") as caught:
            unbake(made / "o" if kind == "folder" else single, out=tmp_path / "again")
        assert caught.value.exit_code == 6 and sorted(tmp_path.iterdir()) == before


def flipped(path: Path, at: int = -40) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def shard(baked: Path, number: int = 1) -> Path:
    return baked / f"model-0000{number}-of-00003.safetensors"


def undo(path: Path) -> Path:
    return path.with_name(path.name + ".undo")


def relisted(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """The record with other files listed."""
    header = read_header(LocalFile(path))
    data = path.read_bytes()[header.data_start :]
    document = json.loads(header.metadata["adapterops"])
    change(document["files"])
    path.write_bytes(encode_header(header.tensors, {"adapterops": json.dumps(document)}) + data)


def renamed(name: str) -> Callable[[Path], None]:
    def rename(baked: Path) -> None:
        relisted(baked / RECORD, lambda files: files[-1].update(name=name))

    return rename


def swap(baked: Path) -> None:
    """Two shards have each other's undo files."""
    one, two = undo(shard(baked, 1)), undo(shard(baked, 2))
    one.rename(baked / "x")
    two.rename(one)
    (baked / "x").rename(two)


def of_another_bake(baked: Path) -> None:
    """An undo file that fits the baked file, of another source than the record's."""
    record = baked / RECORD
    relisted(record, lambda files: [f.update(sha256="0" * 64) for f in files if f["how"] == "undo"])


# name: what is done to the baked folder, the error, its exit code, what it says
SPOILT: dict[str, tuple[Callable[[Path], Any], type[AdapterOpsError], int, str]] = {
    "weights": (lambda o: flipped(shard(o)), IncompatibleError, 4, "changed since"),
    "header of weights": (lambda o: flipped(shard(o), 30), IncompatibleError, 4, "changed since"),
    "longer weights": (
        lambda o: os.truncate(shard(o), shard(o).stat().st_size + 1),
        IncompatibleError, 4, "bytes was baked"),
    "config": (lambda o: flipped(o / "config.json", 5), IncompatibleError, 4, "config.json.*sha"),
    "nested": (
        lambda o: flipped(o / "templates" / "chat.jinja", 1), IncompatibleError, 4, "chat.jinja"),
    "no weights": (lambda o: shard(o).unlink(), FileError, 6, "no such file"),
    "no config": (lambda o: (o / "config.json").unlink(), FileError, 6, "config.json"),
    "no undo file": (lambda o: undo(shard(o)).unlink(), FormatError, 3, "beside it"),
    "no record": (lambda o: (o / RECORD).unlink(), FormatError, 3, "--reversible"),
    "empty undo file": (lambda o: undo(shard(o)).write_bytes(b""), FormatError, 3, "undo"),
    "cut undo file": (
        lambda o: os.truncate(undo(shard(o)), 4000), FormatError, 3, "truncated|bytes"),
    "other undo files": (swap, IncompatibleError, 4, "another bake"),
    "other bake": (of_another_bake, FormatError, 3, "another bake"),
    "a model as undo file": (
        lambda o: shutil.copy(shard(o), undo(shard(o))), FormatError, 3, "no undo file"),
    "an undo file as record": (
        lambda o: shutil.copy(undo(shard(o)), o / RECORD), FormatError, 3, "no undo record"),
    "out by dots": (renamed("../x"), UnsafeFileError, 3, "outside"),
    "absolute": (renamed("/tmp/x"), UnsafeFileError, 3, "outside"),
    "in a file": (renamed("config.json/x"), FormatError, 3, "'config.json' twice"),
    "named twice": (renamed("config.json"), FormatError, 3, "twice"),
    "a long name": (renamed("x" * 300), FormatError, 3, "does not hold"),
    "a huge size": (
        lambda o: relisted(o / RECORD, lambda f: f[-1].update(size=1 << 40)),
        FormatError, 3, "bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_what_is_not_as_it_was_baked(case: str, baked: Path, tmp_path: Path) -> None:
    spoil, error, code, said = SPOILT[case]
    spoil(baked)
    with pytest.raises(error, match=said) as caught:
        unbake(baked, out=tmp_path / "again")
    assert caught.value.exit_code == code
    kept = [".again.adapterops-partial"] if case == "no config" else []  # which may come back
    assert sorted(path.name for path in tmp_path.iterdir()) == [*kept, "o"]


def test_every_damage_of_an_undo_file_is_found(single: Path, tmp_path: Path) -> None:
    """A byte anywhere: an error of code 3, 4 or 5, or no difference to what is restored."""
    file = undo(single)
    whole, base = file.read_bytes(), (tmp_path / "m" / "model.safetensors").read_bytes()
    rng = np.random.default_rng(0)
    wrong = 0
    for at in rng.choice(len(whole), 100, replace=False):
        data = bytearray(whole)
        data[at] ^= int(rng.integers(1, 256))
        file.write_bytes(data)
        out = tmp_path / f"again{at}"
        try:
            unbake(single, out=out)
        except (FormatError, IncompatibleError, NumericsError):
            wrong += 1
            assert not out.exists()
        else:
            assert out.read_bytes() == base
    assert wrong > 60


class TestFiles:
    def test_a_changed_byte(self, single: Path, tmp_path: Path) -> None:
        flipped(single)
        with pytest.raises(IncompatibleError, match="changed since") as caught:
            unbake(single, out=tmp_path / "again")
        assert caught.value.exit_code == 4 and not (tmp_path / "again").exists()

    def test_without_its_undo_file(self, single: Path, tmp_path: Path) -> None:
        undo(single).unlink()
        with pytest.raises(FormatError, match=r"no o\.safetensors\.undo beside it"):
            unbake(single, out=tmp_path / "again")

    def test_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileError) as caught:
            unbake(tmp_path / "none", out=tmp_path / "again")
        assert caught.value.exit_code == 6

    @pytest.mark.parametrize("of", ["o.safetensors", "o.safetensors.undo"])
    def test_the_output_is_an_input(self, of: str, single: Path, tmp_path: Path) -> None:
        before = below(tmp_path)
        with pytest.raises(OutputExistsError, match="input"):
            unbake(single, out=tmp_path / of, overwrite=True)
        assert below(tmp_path) == before

    def test_overwrite(self, single: Path, tmp_path: Path) -> None:
        (tmp_path / "again").write_text("x")
        with pytest.raises(OutputExistsError):
            unbake(single, out=tmp_path / "again")
        unbake(single, out=tmp_path / "again", overwrite=True)
        base = tmp_path / "m" / "model.safetensors"
        assert (tmp_path / "again").read_bytes() == base.read_bytes()

    def test_the_index_of_a_baked_folder(self, baked: Path, tmp_path: Path) -> None:
        """A folder is what was baked: the index alone is no file of weights."""
        index = baked / "model.safetensors.index.json"
        with pytest.raises(AdapterOpsError, match="folder"):
            unbake(index, out=tmp_path / "again")


class TestFolders:
    @pytest.mark.parametrize("name", ["o", "o/again", "o/templates/again"])
    def test_the_output_is_in_the_input(self, name: str, baked: Path, tmp_path: Path) -> None:
        before = below(tmp_path)
        with pytest.raises(OutputExistsError, match="the output is") as caught:
            unbake(baked, out=tmp_path / name, overwrite=True)
        assert caught.value.exit_code == 2 and below(tmp_path) == before

    def test_the_output_exists(self, baked: Path, tmp_path: Path) -> None:
        (tmp_path / "again").mkdir()
        (tmp_path / "again" / "x").write_text("x")
        for overwrite in (False, True):
            with pytest.raises(OutputExistsError):
                unbake(baked, out=tmp_path / "again", overwrite=overwrite)
        assert below(tmp_path / "again") == {"x": b"x"}

    def test_an_empty_folder_is_filled(self, baked: Path, made: Path, tmp_path: Path) -> None:
        (tmp_path / "again").mkdir()
        unbake(baked, out=tmp_path / "again")
        assert below(tmp_path / "again") == below(made / "m")

    def test_no_folder_to_write_in(self, baked: Path, tmp_path: Path) -> None:
        with pytest.raises(FileError) as caught:
            unbake(baked, out=tmp_path / "none" / "again")
        assert caught.value.exit_code == 6

    def test_not_reversible(self, made: Path, tmp_path: Path) -> None:
        bake(made / "m", made / "a", out=tmp_path / "o")
        with pytest.raises(FormatError, match="not baked with --reversible"):
            unbake(tmp_path / "o", out=tmp_path / "again")

    def test_files_added_later_are_left_alone(
        self, baked: Path, made: Path, tmp_path: Path
    ) -> None:
        (baked / "notes.txt").write_text("mine")
        unbake(baked, out=tmp_path / "again")
        assert below(tmp_path / "again") == below(made / "m")


# The command, interrupted when all weights are written.
STOPPED = """
from adapterops.cli import main
from adapterops.undoing import restoring

def stopped(*_):
    raise KeyboardInterrupt

restoring.write_file = stopped
main()
"""


class TestCommand:
    def test_what_it_says(self, baked: Path, made: Path, tmp_path: Path) -> None:
        done = call("unbake", "o", "-o", "again", cwd=tmp_path)
        assert done.stdout.startswith("again  restored, ") and done.stderr == ""
        assert "config.json" in done.stdout and done.stdout.count("sha256") == len(
            below(made / "m")
        )
        assert below(tmp_path / "again") == below(made / "m")

    def test_json(self, baked: Path, made: Path, tmp_path: Path) -> None:
        done = call("unbake", "o", "-o", "again", "--json", "-j", "1", "--memory", "64MB",
                    cwd=tmp_path)  # fmt: skip
        document = json.loads(done.stdout)
        assert document["schema"] == "adapterops.unbake/1" and document["output"] == "again"
        assert document["size"] == sum(map(len, below(made / "m").values()))

    def test_quiet(self, baked: Path, tmp_path: Path) -> None:
        done = call("unbake", "o", "-o", "again", "-q", cwd=tmp_path)
        assert done.stdout == done.stderr == ""

    def test_a_file(self, single: Path, tmp_path: Path) -> None:
        call("unbake", single.name, "-o", "again.safetensors", cwd=tmp_path)
        base = tmp_path / "m" / "model.safetensors"
        assert (tmp_path / "again.safetensors").read_bytes() == base.read_bytes()

    @pytest.mark.parametrize(
        ("spoil", "code"),
        [("weights", 4), ("no undo file", 3), ("no record", 3), ("no weights", 6)],
    )
    def test_codes(self, spoil: str, code: int, baked: Path, tmp_path: Path) -> None:
        SPOILT[spoil][0](baked)
        done = call("unbake", "o", "-o", "again", cwd=tmp_path, code=code)
        assert done.stdout == "" and done.stderr.startswith("error: ")
        assert not (tmp_path / "again").exists()

    def test_ctrl_c(self, made: Path, tmp_path: Path) -> None:
        given = [sys.executable, "-c", STOPPED, "unbake", made / "o", "-o", "again"]
        done = subprocess.run(given, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 130 and done.stdout == ""
        assert "7 of 8 files are kept; the same command goes on from there" in done.stderr
        call("unbake", made / "o", "-o", "again", cwd=tmp_path)
        assert below(tmp_path / "again") == below(made / "m")

    def test_usage(self, baked: Path, tmp_path: Path) -> None:
        call("unbake", "o", cwd=tmp_path, code=2)
        call("unbake", "o", "-o", "o", cwd=tmp_path, code=2)
        call("unbake", "none", "-o", "again", cwd=tmp_path, code=6)
        call("unbake", "o", "-o", "again", "-j", "0", cwd=tmp_path, code=2)
