"""The files beside a base's weights: which travel, which are left, and what configs say then."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterops.baking.beside import Carried, carried, index_json, index_metadata
from adapterops.basemodel import open_model
from adapterops.changes.targets import Changes
from adapterops.errors import FileError, FormatError
from adapterops.formats import open_adapter_file
from tests import checkpoints, support

CONFIG = {"model_type": "llama", "vocab_size": 48, "torch_dtype": "float16", "rms_norm_eps": 1e-05}


def model(folder: Path, shards: int = 1, **config: Any) -> Path:
    return checkpoints.write(
        folder, checkpoints.weights(layers=1), config={**CONFIG, **config}, shards=shards
    )


def files(folder: Path, *given: str) -> None:
    for name in given:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"of {name}".encode())


def travelling(
    path: Path, *adapters: Path, changes: Changes | None = None, dtype: str | None = None
) -> tuple[dict[str, Carried], list[str]]:
    inputs = [open_adapter_file(folder) for folder in adapters]
    found, notes = carried(open_model(path), inputs, changes or Changes({}), dtype)
    assert len({file.name for file in found}) == len(found)
    return {file.name: file for file in found}, notes


TRAVELS = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "spiece.model"),
    *("special_tokens_map.json", "chat_template.jinja", "modeling_own.py", "LICENSE", "README.md"),
    *("preprocessor_config.json", "templates/tool.jinja", "USE_POLICY.md"),
)
STAYS = (
    *("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"),
    *("model.gguf", "consolidated.00.pth", "onnx/model.onnx"),
    *("onnx/config.json", "onnx/model.onnx_data", "original/consolidated.00.pth"),
    *("original/params.json", "original/deep/tokenizer.model", "checkpoint-5/model.safetensors"),
    *("checkpoint-5/config.json", "rust_model.ot", "training_args.bin", "pytorch_model.ckpt"),
    *("pytorch_model.bin.index.json", ".git/HEAD", ".cache/huggingface/x.lock", ".gitattributes"),
    *("adapterops.json", "model.adapterops.json", "adapterops.undo", "model.safetensors.undo"),
)


@pytest.mark.parametrize("by", ["file", "shards", "index"])
def test_what_travels(by: str, tmp_path: Path) -> None:
    base = model(tmp_path / "m", 1 if by == "file" else 2)
    variants = ("model.fp16.safetensors",) if by == "file" else ("consolidated.safetensors",)
    files(base, *TRAVELS, *STAYS, *variants)
    found, notes = travelling(base / checkpoints.INDEX if by == "index" else base)
    assert set(found) == {*TRAVELS, "config.json"}
    for name, file in found.items():
        assert (
            file.content is None
            and Path(file.source or "").read_bytes() == (base / name).read_bytes()
        )
    text = " ".join(notes)
    assert "pytorch_model" in text and "README.md is the base's" in text


def test_every_file_left_out_for_its_weights_is_named(tmp_path: Path) -> None:
    base = model(tmp_path / "m")
    files(base, "model.gguf", "tf_model.h5", "original/x.pth", "model.fp16.safetensors")
    _, (note,) = travelling(base)
    for name in ("model.gguf", "tf_model.h5", "original/", "model.fp16.safetensors"):
        assert name in note


def test_a_file_has_nothing_beside_it(tmp_path: Path) -> None:
    base = model(tmp_path / "m")
    files(base, "tokenizer.json")
    assert travelling(base / "model.safetensors") == ({}, [])


def test_layers_after_the_model_travel_with_their_weights(tmp_path: Path) -> None:
    base = model(tmp_path / "m")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (base / "modules.json").write_text(json.dumps(modules))
    kept = ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors")
    files(base, *kept, "3_Other/model.safetensors")
    found, _ = travelling(base)
    assert set(found) == {*kept, "config.json", "modules.json"}
    (base / "modules.json").write_text("[1, 2]")
    with pytest.raises(FormatError, match="no list of modules"):
        travelling(base)


def pipeline(folder: Path) -> Path:
    model(folder / "unet", model_type="unet")
    model(folder / "text_encoder", 2, model_type="clip")
    kept = ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json")
    files(folder, *kept, "safety_checker/pytorch_model.bin", "safety_checker/config.json")
    return folder


def test_a_pipeline_travels_with_parts_in_other_formats(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "p")
    files(base, "unet/diffusion_pytorch_model.bin", "unet/model.fp16.safetensors")
    found, notes = travelling(base)
    assert set(found) == {
        *("model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"),
        *("safety_checker/pytorch_model.bin", "safety_checker/config.json"),
        *("unet/config.json", "text_encoder/config.json"),
    }
    assert any("unet/diffusion_pytorch_model.bin" in n and "fp16" in n for n in notes)


def test_configs_change_only_where_they_must(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "p")
    changed = Changes({}, config={"text_encoder": {"vocab_size": 50}})
    found, _ = travelling(base, changes=changed)
    assert found["unet/config.json"].content is None
    assert json.loads(found["text_encoder/config.json"].content or b"")["vocab_size"] == 50


def config_of(tmp_path: Path, text: str, config: dict[str, Any], dtype: str | None = None) -> str:
    base = model(tmp_path / "m")
    (base / "config.json").write_text(text)
    found, _ = travelling(base, changes=Changes({}, config={"": config}), dtype=dtype)
    content = found["config.json"].content
    return text if content is None else content.decode()


def test_the_rest_of_a_config_is_as_transformers_wrote_it(tmp_path: Path) -> None:
    given = {
        "architectures": ["LlamaForCausalLM"],
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "text_config": {"model_type": "x", "vocab_size": 48},
        "torch_dtype": "float16",
        "vocab_size": 48,
    }
    text = json.dumps(given, indent=2) + "\n"
    changed = {"tie_word_embeddings": False, "text_config": {"vocab_size": 50}}
    result = config_of(tmp_path, text, changed)
    before, after = text.splitlines(), result.splitlines()
    assert [line for line in after if line not in before] == [
        '    "vocab_size": 50',
        '  "tie_word_embeddings": false,',
    ]
    assert list(json.loads(result)) == sorted([*given, "tie_word_embeddings"])
    assert result.endswith("}\n")


def test_a_config_in_an_order_of_its_own_keeps_it(tmp_path: Path) -> None:
    text = '{"vocab_size": 48, "model_type": "ö", "a": 1e-6}'
    result = config_of(tmp_path, text, {"vocab_size": 50, "tie_word_embeddings": False})
    assert list(json.loads(result)) == ["vocab_size", "model_type", "a", "tie_word_embeddings"]
    assert "ö" in result


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"torch_dtype": "float16"}, {"torch_dtype": "float32"}),
        ({"dtype": "float16"}, {"dtype": "float32"}),
        ({"model_type": "x"}, {"model_type": "x", "torch_dtype": "float32"}),
        ({"_class_name": "UNet"}, {"_class_name": "UNet"}),
        (
            {"dtype": "float16", "text_config": {"torch_dtype": "float16"}, "vision_config": {}},
            {"dtype": "float32", "text_config": {"torch_dtype": "float32"}, "vision_config": {}},
        ),
        ({"torch_dtype": "float32"}, {"torch_dtype": "float32"}),
    ],
    ids=["torch", "plain", "silent", "diffusers", "nested", "same"],
)
def test_configs_say_the_type_written(
    given: dict[str, Any], wanted: dict[str, Any], tmp_path: Path
) -> None:
    assert json.loads(config_of(tmp_path, json.dumps(given), {}, "F32")) == wanted


def tuned(folder: Path, **beside: str) -> Path:
    support.write_peft(folder, {"model.layers.0.a": (np.ones((48, 2)), np.ones((2, 40)))})
    for name, text in beside.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def test_tokenizers_of_adapters_that_agree_replace_the_base_s(tmp_path: Path) -> None:
    base = model(tmp_path / "m")
    files(base, "tokenizer.json", "merges.txt")
    one = tuned(tmp_path / "1", tokenizer="new", added_tokens="{}")
    two = tuned(tmp_path / "2", tokenizer="new", added_tokens="{}")
    none = tuned(tmp_path / "3")
    found, notes = travelling(base, none, one, two)
    assert found["tokenizer.json"].source == os.fspath(one / "tokenizer.json")
    assert set(found) == {"config.json", "tokenizer.json", "merges.txt", "added_tokens.json"}
    assert any("takes the place" in note and "tokenizer.json" in note for note in notes)
    other = tuned(tmp_path / "4", tokenizer="newer", added_tokens="{}")
    found, notes = travelling(base, one, other)
    assert found["tokenizer.json"].source == os.fspath(base / "tokenizer.json")
    assert any("differ" in note and "base's is kept" in note for note in notes)
    same = tuned(tmp_path / "5", tokenizer="of tokenizer.json")
    assert travelling(base, same)[1] == []


def test_links_are_followed_and_never_in_circles(tmp_path: Path) -> None:
    """A hub cache's files are links out of their folder."""
    base = model(tmp_path / "m")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "x").write_text("a tokenizer")
    (base / "tokenizer.json").symlink_to("../blobs/x")
    (base / "gone.txt").symlink_to("nowhere")
    (base / "again").symlink_to(".")
    (base / "sub").mkdir()
    (base / "sub" / "up").symlink_to("..")
    os.mkfifo(base / "pipe")
    found, _ = travelling(base)
    assert set(found) == {"config.json", "tokenizer.json"}
    assert Path(found["tokenizer.json"].source or "").read_text() == "a tokenizer"


def test_a_config_that_broke_meanwhile_is_an_error(tmp_path: Path) -> None:
    base = open_model(model(tmp_path / "m"))
    (tmp_path / "m" / "config.json").write_text("[")
    with pytest.raises(FormatError, match="not valid JSON"):
        carried(base, [], Changes({}, config={"": {"a": 1}}))


def test_an_index_says_the_true_size() -> None:
    found = json.loads(
        index_json(
            {"b": "2.safetensors", "a": "1.safetensors"},
            {"a": 10, "b": 1 << 40},
            {"total_size": 2, "total_parameters": 3, "own": "note"},
        )
    )
    assert found == {
        "metadata": {"own": "note", "total_size": (1 << 40) + 10},
        "weight_map": {"a": "1.safetensors", "b": "2.safetensors"},
    }
    again = json.loads(index_json({"a": "x"}, {"a": 1}, {"total_parameters": 3}, 7))
    assert again["metadata"] == {"total_parameters": 7, "total_size": 1}


def test_the_metadata_of_an_index(tmp_path: Path) -> None:
    file = tmp_path / checkpoints.INDEX
    for text, wanted in (
        ('{"metadata": {"total_size": 3}}', {"total_size": 3}),
        ('{"metadata": [3]}', {}),
        ("{}", {}),
        ("[", {}),
    ):
        file.write_text(text)
        assert index_metadata(file) == wanted
    with pytest.raises(FileError):
        index_metadata(tmp_path / "none")
