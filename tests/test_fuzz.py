"""Random names, shapes, types and configs: nothing is dropped, nothing ends in a traceback.

A file is either read, with every tensor accounted for, or refused by an error of ours. `make long`
searches at random; here the same cases are drawn every time.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adapterops as ao
from adapterops.errors import AdapterOpsError
from adapterops.formats import AdapterFile, read_adapter

PREFIXES = [
    "base_model.model.",
    "lora_unet_",
    "lora_unet__",
    "lora_te1_",
    "lora_transformer_",
    "lycoris_",
    "unet.",
    "transformer.",
    "diffusion_model.",
    "text_encoder.",
    "unet.base_model.model.",
    "",
]
PATHS = [
    "layers.0.q_proj",
    "layers.1.mlp.experts",
    "layers.1.mlp.experts.base_layer",
    "down_blocks_0_attn_to_q",
    "double_blocks.0.processor.qkv_lora1",
    "transformer_blocks.0.attn.to_q",
    "embed_tokens",
    "unet:3",
    "list:0",
    "mha.base_layer.out_proj",
    "classifier",
]
SUFFIXES = [
    *(f".lora_{side}.weight" for side in "AB"),
    *(f".lora_{side}.default.weight" for side in "AB"),
    *(f".lora_{side}" for side in "ABEab"),
    *(f".lora_embedding_{side}" for side in "AB"),
    *(f".lora_{side}.weight" for side in ("down", "mid", "up")),
    *(f".lora.{side}.weight" for side in ("down", "up")),
    *(f"_lora.{side}.weight" for side in ("down", "up")),
    *(f":{side}" for side in ("down", "up")),
    *(f".{side}.weight" for side in ("down", "up")),
    *(f".hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f".lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    *(".alpha", ".m", ".dora_scale", ".lora_magnitude_vector", ".lora_B.bias", ".bias"),
    *(".diff", ".diff_b", ".w_norm", ".b_norm", ".weight", ".oft_blocks", ".lora_X.weight"),
]
GROUPS = [
    [".lora_A.weight", ".lora_B.weight"],
    [".lora_A", ".lora_B", ".lora_E"],
    [".lora_down.weight", ".lora_up.weight", ".alpha"],
    [".lora_down.weight", ".lora_mid.weight", ".lora_up.weight"],
    [".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b"],
    [".lokr_w1", ".lokr_w2_a", ".lokr_w2_b"],
    [".lora_a", ".lora_b"],
    [":up", ":down"],
]
names = st.builds("".join, st.tuples(*map(st.sampled_from, (PREFIXES, PATHS, SUFFIXES))))
grouped = st.builds(
    lambda prefix, path, group: [prefix + path + suffix for suffix in group],
    *map(st.sampled_from, (PREFIXES, PATHS, GROUPS)),
)
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 6]), max_size=4).map(tuple)
square = st.sampled_from([(2, 2), (4, 4), (2, 2, 1, 1), (2, 2, 3, 3), ()])
dtypes = st.sampled_from(["float32", "float32", "float16", "int8", "int64", "bool"])
values: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 20),
    st.sampled_from([0.5, 1e300, float("nan"), "", "pissa", "gaussian", "q_proj", ".*", "(a+)+"]),
    st.lists(st.one_of(st.booleans(), st.sampled_from(["q_proj", "mlp.experts.w", 3])), max_size=3),
    st.dictionaries(
        st.sampled_from(["q_proj", ".*", "(", "scale", "rank", "alpha"]),
        st.one_of(st.integers(-1, 9), st.just("x"), st.lists(st.booleans(), max_size=3)),
        max_size=2,
    ),
)
KEYS = [
    *("peft_type", "r", "init_r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern"),
    *("use_rslora", "use_dora", "bias", "modules_to_save", "target_modules", "target_parameters"),
    *("enable_lora", "init_lora_weights", "fan_in_fan_out", "lora_parameters", "num_layers"),
    *("base_model_name_or_path", "model", "trainable_token_indices", "unet.r", "unet.lora_alpha"),
]
configs = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {"peft_type": st.sampled_from(["LORA", "LOHA", "LOKR", "ADALORA"]), "r": st.just(2)},
        optional={"lora_alpha": st.just(4), "alpha": st.just(4), "init_r": st.just(2)},
    ),
    st.just({"lora_parameters": {"rank": 2, "scale": 3.0}}),
    st.dictionaries(st.sampled_from(KEYS), values, max_size=6),
)


@st.composite
def adapters(draw: Any) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """Tensors by name, and a config or none."""
    found: dict[str, np.ndarray] = {}
    for group in draw(st.lists(grouped, max_size=3)):
        shape = draw(square)
        for name in group:
            found[name] = np.ones(draw(st.one_of(st.just(shape), shapes)), draw(dtypes))
    for name in draw(st.lists(names, max_size=4)):
        found[name] = np.ones(draw(shapes), draw(dtypes))
    return found, draw(configs)


def write(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] | None) -> Path:
    from safetensors.numpy import save_file

    save_file(tensors, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def accounted(file: AdapterFile) -> set[str]:
    """The tensors that reading put somewhere."""
    parts = {ref.name for site in file.sites.values() for ref in site.parts.values()}
    return parts | set(file.extras) | set(file.deltas)


def check(drawn: tuple[dict[str, np.ndarray], dict[str, Any] | None]) -> None:
    tensors, config = drawn
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder), tensors, config)
        try:
            file = read_adapter(source)
        except AdapterOpsError:
            return
        lost = set(tensors) - accounted(file)
        assert not lost or file.problems
        out = Path(folder) / "out.safetensors"
        try:
            report = ao.merge([source], [1.5], out=out, dtype="float32", rank="same")
        except AdapterOpsError:
            assert not out.exists()
            return
        assert not file.problems and not lost
        again = read_adapter(out)
        assert not again.problems
        assert set(report.modules) == set(again.sites) | set(again.deltas)


@given(adapters())
@settings(max_examples=400, deadline=None)
def test_read_or_refused(drawn: Any) -> None:
    check(drawn)


@pytest.mark.long
@given(adapters())
@settings(max_examples=20_000, deadline=None, derandomize=False)
def test_read_or_refused_at_length(drawn: Any) -> None:
    check(drawn)
