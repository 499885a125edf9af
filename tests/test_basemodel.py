"""Base models: what a path names, hostile and incomplete checkpoints, orientation and ties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from adapterops.basemodel import open_model, same_bytes
from adapterops.errors import FileError, FormatError, UnsafeFileError, UnsupportedError
from adapterops.files import checkpoint
from tests import checkpoints
from tests.support import pairs, write_peft

PLAIN = checkpoints.weights()


def read(path: Path) -> dict[str, np.ndarray]:
    return {name: ref.read() for name, ref in open_model(path).tensors.items()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    rounded = {name: value.astype(np.float32) for name, value in other.items()}
    return one.keys() == other.keys() and all((one[k] == rounded[k]).all() for k in one)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_files_folders_and_indexes(shards: int, tmp_path: Path):
    folder = checkpoints.write(tmp_path / "m", PLAIN, shards=shards, config={"model_type": "llama"})
    inside = "model.safetensors" if shards == 1 else checkpoints.INDEX
    for path in (folder, folder / inside):
        model = open_model(path)
        assert same({name: ref.read() for name, ref in model.tensors.items()}, PLAIN)
        assert model.name == "m" and model.config == {"model_type": "llama"}
        assert len(model.files) == shards and not model.quantised


def test_more_shards_than_files_may_be_open(tmp_path: Path):
    from adapterops.files import source

    tensors = {f"x{i}.weight": np.full((2, 2), float(i)) for i in range(80)}
    folder = checkpoints.write(tmp_path / "m", tensors, shards=80)
    assert same(read(folder), tensors)
    assert len(source._POOL._open) <= source.POOL_SIZE


def test_identity_is_of_headers_and_sizes(tmp_path: Path):
    paths = [checkpoints.write(tmp_path / name, PLAIN) for name in "ab"]
    other = checkpoints.write(tmp_path / "c", {**PLAIN, "x.weight": np.ones((2, 2))})
    one, two, three = (open_model(path).identity for path in (*paths, other))
    assert one == two != three


def test_a_hub_cache(tmp_path: Path):
    blob = checkpoints.write(tmp_path / "blobs", PLAIN) / "model.safetensors"
    cache = tmp_path / "models--org--name" / "snapshots" / "abc"
    cache.mkdir(parents=True)
    (cache / "model.safetensors").symlink_to(blob)
    assert open_model(cache).name == "org/name" and same(read(cache), PLAIN)
    assert open_model(cache / "model.safetensors").name == "org/name"


def test_a_pipeline_has_its_components_in_front(tmp_path: Path):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "scheduler").mkdir()
    checkpoints.write(tmp_path / "unet", {"conv_in.weight": np.ones((4, 4, 3, 3))})
    config = {"model_type": "clip_text_model", "vocab_size": 7}
    checkpoints.write(tmp_path / "text_encoder", {"a.weight": np.ones((2, 2))}, config=config)
    model = open_model(tmp_path)
    assert set(model.tensors) == {"unet.conv_in.weight", "text_encoder.a.weight"}
    assert model.is_pipeline and model.config == {}
    assert model.configs == {"unet": {}, "text_encoder": config}
    assert model.part("unet.conv_in.weight") == "unet"


class TestHostile:
    @pytest.mark.parametrize(
        "name",
        [
            "../model.safetensors",
            "/etc/model.safetensors",
            "sub/model.safetensors",
            "a\\b.safetensors",
            "x\0.safetensors",
            ".hidden.safetensors",
            "model.bin",
            "",
        ],
    )
    def test_names_in_an_index(self, name: str, tmp_path: Path):
        folder = checkpoints.write(tmp_path / "m", PLAIN, shards=2)
        document = json.loads((folder / checkpoints.INDEX).read_text())
        document["weight_map"]["model.layers.0.norm.weight"] = name
        (folder / checkpoints.INDEX).write_text(json.dumps(document))
        (tmp_path / "model.safetensors").write_bytes(checkpoints.encode(PLAIN))
        for path in (folder, folder / checkpoints.INDEX):
            with pytest.raises(UnsafeFileError, match="no file of its own folder"):
                open_model(path)

    @pytest.mark.parametrize(
        "text",
        ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'],
    )
    def test_an_index_that_is_none(self, text: str, tmp_path: Path):
        folder = checkpoints.write(tmp_path / "m", PLAIN, shards=2)
        (folder / checkpoints.INDEX).write_text(text)
        with pytest.raises(FormatError, match="is no index of shards"):
            open_model(folder)

    def test_missing_and_truncated_shards(self, tmp_path: Path):
        folder = checkpoints.write(tmp_path / "m", PLAIN, shards=3)
        second = folder / checkpoints.SHARD.format(2, 3)
        data = second.read_bytes()
        second.write_bytes(data[:-5])
        with pytest.raises(FormatError, match="00002-of-00003"):
            open_model(folder)
        second.unlink()
        with pytest.raises(FormatError, match=r"2 of 3 shards: model-00002-of-00003\S* is missing"):
            open_model(folder)
        (folder / checkpoints.INDEX).unlink()
        with pytest.raises(FormatError, match="2 of 3 shards"):
            open_model(folder)

    def test_one_shard_is_no_model(self, tmp_path: Path):
        folder = checkpoints.write(tmp_path / "m", PLAIN, shards=2)
        with pytest.raises(FormatError, match=r"one of several shards.*folder"):
            open_model(folder / checkpoints.SHARD.format(1, 2))

    def test_a_tensor_that_the_index_has_elsewhere(self, tmp_path: Path):
        folder = checkpoints.write(tmp_path / "m", PLAIN, shards=2)
        document = json.loads((folder / checkpoints.INDEX).read_text())
        document["weight_map"]["gone.weight"] = checkpoints.SHARD.format(1, 2)
        (folder / checkpoints.INDEX).write_text(json.dumps(document))
        with pytest.raises(FormatError, match=r"'gone.weight' in model-00001\S*, no shard holds"):
            open_model(folder)

    def test_a_tensor_in_two_shards(self, tmp_path: Path):
        folder = checkpoints.write(tmp_path / "m", PLAIN, shards=2)
        second = folder / checkpoints.SHARD.format(2, 2)
        second.write_bytes((folder / checkpoints.SHARD.format(1, 2)).read_bytes())
        with pytest.raises(FormatError, match=r"is in .*00001-of-00002.* too"):
            open_model(folder)

    def test_what_is_no_model(self, tmp_path: Path):
        with pytest.raises(FileError, match="no such file"):
            open_model(tmp_path / "nowhere")
        (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
        with pytest.raises(FormatError, match=r"pytorch_model.bin, which is not read.*pretrained"):
            open_model(tmp_path)
        with pytest.raises(FormatError, match="pickle"):
            open_model(tmp_path / "pytorch_model.bin")

    def test_gguf(self, tmp_path: Path):
        with pytest.raises(UnsupportedError, match="GGUF"):
            open_model(tmp_path / "model.gguf")

    def test_a_config_with_a_key_twice(self, tmp_path: Path):
        folder = checkpoints.write(tmp_path / "m", PLAIN)
        (folder / "config.json").write_text('{"vocab_size": 1, "vocab_size": 2}')
        with pytest.raises(FormatError, match="twice"):
            open_model(folder)


class TestWeights:
    @pytest.mark.parametrize(
        ("kind", "wide", "expected"),
        [
            ("gpt2", False, True),
            ("gpt_bigcode", True, False),
            (None, True, True),
            (None, False, False),
        ],
        ids=["by config", "against the shapes", "by shapes", "linear by shapes"],
    )
    def test_conv1d(self, kind: Any, wide: bool, expected: bool, tmp_path: Path):
        shape = (4, 12) if wide else (12, 4)
        tensors = {
            "h.0.attn.c_attn.weight": np.ones(shape),
            "h.0.attn.c_attn.bias": np.ones(12),
            "h.0.attn.c_proj.weight": np.ones((4, 4)),
            "lm_head.weight": np.ones((9, 4)),
        }
        config = {"model_type": kind} if kind else None
        model = open_model(checkpoints.write(tmp_path / "m", tensors, config=config))
        found = {name for name in tensors if model.is_conv1d(name)}
        weights = {"h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight"}
        assert found == (weights if expected else set())

    @pytest.mark.parametrize(
        ("config", "head", "tied"),
        [
            ({"tie_word_embeddings": True}, "none", True),
            ({"tie_word_embeddings": False}, "none", False),
            ({"architectures": ["LlamaForCausalLM"]}, "none", True),
            ({"architectures": ["LlamaModel"]}, "none", False),
            ({}, "same", True),
            ({}, "other", False),
            ({"tie_word_embeddings": False}, "same", False),
        ],
        ids=str,
    )
    def test_tied(self, config: dict[str, Any], head: str, tied: bool, tmp_path: Path):
        tensors = {"model.embed_tokens.weight": np.arange(12.0).reshape(4, 3)}
        if head != "none":
            tensors["lm_head.weight"] = np.arange(12.0).reshape(4, 3) + (head == "other")
        model = open_model(checkpoints.write(tmp_path / "m", tensors, config=config))
        assert model.embedding == "model.embed_tokens.weight" and model.is_tied is tied

    def test_embeddings_by_name_and_by_size(self, tmp_path: Path):
        tensors = {
            "transformer.wte.weight": np.ones((9, 4)),
            "transformer.wpe.weight": np.ones((5, 4)),
            "odd.item_embedding.weight": np.ones((9, 4)),
            "time_embedding.weight": np.ones((4, 4)),
            "score.weight": np.ones((9, 4)),
            "lm_head.weight": np.ones((9, 4)),
        }
        config = {"vocab_size": 9}
        model = open_model(checkpoints.write(tmp_path / "m", tensors, config=config))
        found = {name for name in tensors if model.is_embedding(name)}
        wanted = {"transformer.wte.weight", "transformer.wpe.weight", "odd.item_embedding.weight"}
        assert found == wanted
        assert model.embedding == "transformer.wte.weight" and model.head == "lm_head.weight"

    @pytest.mark.parametrize(
        ("leaf", "embedding", "indirect", "tokens"),
        [
            ("embed_tokens", True, False, True),
            ("wpe", True, False, False),
            ("position_embeddings", True, False, False),
            ("relative_attention_bias", True, False, False),
            ("embed_positions", True, True, False),
            ("position_embedding", True, True, False),
            ("rel_embeddings", True, True, False),
            ("y_position_embeddings", True, True, False),
            ("token_type_embeddings_3", True, True, False),
            ("pos_embed", True, True, False),
            ("w", True, False, True),
            ("x_embedder", False, False, False),
            ("time_embed", False, False, False),
            ("query", False, False, False),
        ],
    )
    def test_kinds_of_embeddings(
        self, leaf: str, embedding: bool, indirect: bool, tokens: bool, tmp_path: Path
    ):
        name = f"body.{leaf}.weight"
        config = {"vocab_size": 9 if leaf in ("w", "query") else 4}
        folder = checkpoints.write(tmp_path / "m", {name: np.ones((9, 4))}, config=config)
        model = open_model(folder)
        found = model.is_embedding(name), model.is_indirect(name), model.is_tokens(name)
        assert found == (embedding, indirect, tokens)

    def test_equal_bytes_stop_at_the_first_difference(self, tmp_path: Path):
        one, other = np.zeros((64, 64)), np.zeros((64, 64))
        other[40, 3] = 1.0
        folder = checkpoints.write(tmp_path / "m", {"a.weight": one, "b.weight": other})
        tensors = open_model(folder).tensors
        a, b = tensors["a.weight"], tensors["b.weight"]
        assert same_bytes(a, a, block=1000) and not same_bytes(a, b, block=1000)


@pytest.mark.parametrize(
    "stray", ["model.fp16.safetensors", "adapter_model.safetensors", "training_state.safetensors"]
)
def test_the_index_says_which_files_are_the_model(stray: str, tmp_path: Path):
    folder = checkpoints.write(tmp_path / "m", PLAIN, shards=2)
    (folder / stray).write_bytes(checkpoints.encode({"x": np.ones(2)}))
    assert set(open_model(folder).tensors) == set(PLAIN)
    (folder / checkpoints.INDEX).unlink()
    with pytest.raises(FormatError, match="holds several models"):
        open_model(folder)


def test_a_whole_model_beside_shards_is_another(tmp_path: Path):
    """Loaders look for the one file first: neither is taken for what was meant."""
    folder = checkpoints.write(tmp_path / "m", PLAIN, shards=2)
    (folder / "model.safetensors").write_bytes(checkpoints.encode({"x": np.ones(2)}))
    with pytest.raises(FormatError, match="holds several models"):
        open_model(folder)


def test_an_index_alone(tmp_path: Path):
    folder = checkpoints.write(tmp_path / "m", PLAIN, shards=2)
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(FormatError, match=r"0 of 2 shards: model-00001\S* is missing"):
        open_model(folder)
    (folder / checkpoints.INDEX).write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(UnsafeFileError, match="no file of its own folder"):
        open_model(folder)


def test_the_files_of_mistral(tmp_path: Path):
    """The same weights in the maker's own format beside the shards are not read twice."""
    folder = checkpoints.write(tmp_path / "m", PLAIN, shards=2)
    (folder / "consolidated.safetensors").write_bytes(checkpoints.encode({"x": np.ones(2)}))
    assert set(open_model(folder).tensors) == set(PLAIN)
    assert [path.name for _, path in checkpoint.model_files(folder)] == [
        checkpoints.SHARD.format(i, 2) for i in (1, 2)
    ]


def test_an_adapter_is_no_model(tmp_path: Path):
    """Two adapters would otherwise be compared as if their factors were weights."""
    folder = write_peft(tmp_path / "a", pairs(1, {"model.layers.0.self_attn.q_proj": (8, 8)}, 2))
    for path in (folder, folder / "adapter_model.safetensors"):
        with pytest.raises(FormatError, match=r"is an adapter .*lora_.*diff compares adapters"):
            open_model(path)
    beside = {"model.q.base_layer.weight": (8, 8), "model.q.lora_A.speech.weight": (2, 8)}
    beside |= {"model.q.lora_B.speech.weight": (8, 2)}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in beside.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert len(open_model(tmp_path / "model.safetensors").tensors) == 3  # ships with its adapters
