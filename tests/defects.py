"""Adapters with one defect each, planted in a healthy one, and near misses that are healthy.

`DEFECTS` lists what `check` must find: exactly the code named, with the findings that follow from
it (`also`). `NEAR` lists what comes close to a defect and must not be taken for it.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests import hostile

PREFIX = "base_model.model."
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.v_proj": (32, 64),
    "mlp.down_proj": (64, 128),
}
_DTYPES = {
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "uint16": "BF16",
    "int64": "I64",
    "uint8": "F8_E4M3",
}
CONFIG = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "meta-llama/Llama-3.2-1B",
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_rslora": False,
}


def bfloat16(x: np.ndarray) -> np.ndarray:
    """The codes of values rounded towards zero to bfloat16."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write_file(file: Path, tensors: Mapping[str, np.ndarray], metadata: Any = None) -> Path:
    """A safetensors file of these arrays; uint16 stands for bfloat16, uint8 for float8."""
    document: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, x in tensors.items():
        dtype = _DTYPES[x.dtype.name]
        document[name] = hostile.entry(list(x.shape), [position, position + x.nbytes], dtype)
        position += x.nbytes
    header = json.dumps(document).encode()
    header += b" " * (-len(header) % 8)
    file.write_bytes(hostile.framed(header, b"".join(x.tobytes() for x in tensors.values())))
    return file


@dataclass
class Draft:
    """An adapter before it is written."""

    tensors: dict[str, np.ndarray]
    config: dict[str, Any] | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path, name: str = "adapter_model.safetensors") -> Path:
        """A folder with weights and config; a file where there is no config."""
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / name, self.tensors, self.metadata)
        if self.config is not None:
            (folder / "adapter_config.json").write_text(json.dumps(self.config))
        return folder

    def rename(self, old: str, new: str) -> None:
        """Replace a piece of every tensor's name."""
        self.tensors = {name.replace(old, new): x for name, x in self.tensors.items()}

    def map(self, change: Callable[[np.ndarray], np.ndarray], part: str = "") -> None:
        """Change every tensor whose name holds `part`."""
        for name, x in self.tensors.items():
            if part in name:
                self.tensors[name] = change(x)

    def drop(self, part: str) -> None:
        """Leave out every tensor whose name holds `part`."""
        self.tensors = {name: x for name, x in self.tensors.items() if part not in name}


def at(layer: int, module: str = "self_attn.v_proj", side: str = "B") -> str:
    """The name of a factor of the healthy adapter."""
    return f"{PREFIX}model.layers.{layer}.{module}.lora_{side}.weight"


def llama(
    seed: int = 1, *, layers: int = 8, rank: int = 4, dtype: Any = np.float16, **config: Any
) -> Draft:
    """A healthy PEFT adapter of a small Llama, of trained size: A as initialised, B small."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(layers):
        for module, (out, width) in SHAPES.items():
            A = rng.uniform(-1.0, 1.0, (rank, width)) / width**0.5
            B = 0.02 * rng.standard_normal((out, rank))
            for side, x in (("A", A), ("B", B)):
                stored = bfloat16(x) if dtype == "bfloat16" else x.astype(dtype)
                tensors[at(layer, module, side)] = stored
    return Draft(tensors, {**CONFIG, "r": rank, "lora_alpha": 2 * rank, **config})


def kohya(seed: int = 1, *, alpha: float | None = 4.0, text: bool = True) -> Draft:
    """A healthy kohya adapter: attention of a U-Net, and of its text encoder."""
    rng = np.random.default_rng(seed)
    stems = [
        f"lora_unet_{part}_attentions_{n}_transformer_blocks_0_attn{k}_to_{leaf}"
        for part, count in (("down_blocks_1", 2), ("down_blocks_2", 2), ("up_blocks_1", 3))
        for n in range(count)
        for k in (1, 2)
        for leaf in ("q", "k", "v", "out_0")
    ]
    stems += [
        f"lora_te_text_model_encoder_layers_{layer}_self_attn_{leaf}"
        for layer in range(6 if text else 0)
        for leaf in ("q_proj", "k_proj", "v_proj", "out_proj")
    ]
    tensors = {}
    for stem in stems:
        tensors[f"{stem}.lora_down.weight"] = rng.standard_normal((4, 32)).astype(np.float16)
        up = 0.01 * rng.standard_normal((32, 4))
        tensors[f"{stem}.lora_up.weight"] = up.astype(np.float16)
        if alpha is not None:
            tensors[f"{stem}.alpha"] = np.array(alpha, np.float16)
    return Draft(tensors, None, {"ss_network_module": "networks.lora"})


def mlx(seed: int = 1, **parameters: Any) -> Draft:
    """A healthy MLX adapter: A is (in, r), B (r, out)."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(8):
        for leaf in ("q_proj", "v_proj"):
            stem = f"model.layers.{layer}.self_attn.{leaf}"
            tensors[f"{stem}.lora_a"] = rng.standard_normal((64, 4)).astype(np.float32)
            tensors[f"{stem}.lora_b"] = (0.01 * rng.standard_normal((4, 64))).astype(np.float32)
    given = {"rank": 4, "scale": 2.0, "dropout": 0.0, **parameters}
    config = {"fine_tune_type": "lora", "model": "mlx-community/tiny", "num_layers": 8}
    return Draft(tensors, {**config, "lora_parameters": given})


def gpt2(**config: Any) -> Draft:
    """A healthy adapter of a small GPT-2, whose weights are (in, out); c_proj is square."""
    rng = np.random.default_rng(3)
    tensors = {}
    shapes = {"attn.c_attn": (144, 48), "attn.c_proj": (48, 48), "mlp.c_fc": (192, 48)}
    for layer in range(4):
        for module, (out, width) in shapes.items():
            stem = f"{PREFIX}transformer.h.{layer}.{module}"
            tensors[f"{stem}.lora_A.weight"] = rng.standard_normal((4, width)).astype(np.float32)
            up = 0.01 * rng.standard_normal((out, 4))
            tensors[f"{stem}.lora_B.weight"] = up.astype(np.float32)
    named = {"base_model_name_or_path": "openai-community/gpt2", "fan_in_fan_out": True}
    targets = ["c_attn", "c_proj", "c_fc"]
    return Draft(tensors, {**CONFIG, **named, "target_modules": targets, **config})


@dataclass(frozen=True)
class Case:
    """An adapter or several, what is asked of `check`, and the codes it must answer with."""

    code: str
    title: str
    build: Callable[[Path], Any]
    also: frozenset[str] = frozenset()
    options: Mapping[str, Any] = field(default_factory=dict)


DEFECTS: list[Case] = []
NEAR: list[Case] = []
Build = Callable[[Path], Any]


def _into(table: list[Case], code: str, also: str, options: dict[str, Any]) -> Any:
    def add(build: Build) -> Build:
        title = build.__name__.strip("_").replace("_", " ")
        table.append(Case(code, title, build, frozenset(also.split()), options))
        return build

    return add


def plants(code: str, *, also: str = "", **options: Any) -> Any:
    """Registers a builder of a defect; `options` are passed to `check`."""
    return _into(DEFECTS, code, also, options)


def near(code: str, *, also: str = "", **options: Any) -> Any:
    """Registers a builder of something healthy that resembles the defect `code`."""
    return _into(NEAR, code, also, options)


# Files and their structure.


@plants("unreadable")
def a_path_that_does_not_exist(folder: Path) -> Path:
    return folder / "nothing"


@plants("truncated")
def an_empty_file(folder: Path) -> Path:
    file = folder / "empty.safetensors"
    file.write_bytes(b"")
    return file


@plants("truncated")
def a_file_cut_in_its_tensors(folder: Path) -> Path:
    llama().write(folder / "a")
    file = folder / "a" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return folder / "a"


@plants("malformed")
def a_header_that_is_no_json(folder: Path) -> Path:
    file = folder / "x.safetensors"
    file.write_bytes(hostile.framed(b'{"a": }', b"data"))
    return file


@plants("unsafe")
def a_name_that_climbs(folder: Path) -> Path:
    return write_file(folder / "x.safetensors", {"../../etc/x": np.zeros(4, np.float32)})


@plants("unsafe")
def bytes_after_the_last_tensor(folder: Path) -> Path:
    file = kohya().write(folder, "x.safetensors") / "x.safetensors"
    file.write_bytes(file.read_bytes() + b"hidden")
    return file


@plants("lfs-pointer")
def a_pointer_in_place_of_the_file(folder: Path) -> Path:
    llama().write(folder / "a")
    text = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3698480\n"
    (folder / "a" / "adapter_model.safetensors").write_bytes(text)
    return folder / "a"


@plants("pickle")
def a_pickle_without_permission(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "x.bin", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    return folder / "x.bin"


@plants("pickle")
def a_pickle_named_safetensors(folder: Path) -> Path:
    (folder / "x.safetensors").write_bytes(b"PK\x03\x04" + bytes(60))
    return folder / "x.safetensors"


@plants("pickle", allow_pickle=True)
def an_archive_of_before_zip(folder: Path) -> Path:
    (folder / "x.bin").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(40))
    return folder / "x.bin"


@plants("not-an-adapter")
def a_base_model(folder: Path) -> Path:
    return write_file(folder / "x.safetensors", {"model.norm.weight": np.ones(8, np.float32)})


@plants("several-files")
def a_folder_of_two(folder: Path) -> Path:
    draft = llama()
    draft.write(folder / "a", "one.safetensors")
    draft.write(folder / "a", "two.safetensors")
    return folder / "a"


@plants("half-pair")
def a_module_without_its_A(folder: Path) -> Path:
    draft = llama()
    del draft.tensors[at(3, side="A")]
    return draft.write(folder / "a")


@plants("factor-shapes")
def ranks_of_A_and_B_that_disagree(folder: Path) -> Path:
    draft = llama()
    draft.tensors[at(3)] = draft.tensors[at(3)][:, :3].copy()
    return draft.write(folder / "a")


@plants("factor-shapes")
def a_bias_of_another_length(folder: Path) -> Path:
    draft = llama(lora_bias=True)
    for name in list(draft.tensors):
        if "lora_B" in name:
            rows = len(draft.tensors[name])
            draft.tensors[name.replace(".weight", ".bias")] = np.ones(rows, np.float16)
    draft.tensors[at(0).replace(".weight", ".bias")] = np.ones(5, np.float16)
    return draft.write(folder / "a")


@plants("unknown-tensor")
def a_suffix_of_no_known_kind(folder: Path) -> Path:
    draft = llama()
    draft.tensors[at(0).replace("lora_B.weight", "lora_gate")] = np.ones(3, np.float16)
    return draft.write(folder / "a")


@plants("unknown-tensor")
def a_tensor_below_a_kohya_module(folder: Path) -> Path:
    draft = kohya()
    stem = next(iter(draft.tensors)).removesuffix(".lora_down.weight")
    draft.tensors[f"{stem}.gate"] = np.ones(3, np.float16)
    draft.write(folder, "x.safetensors")
    return folder / "x.safetensors"


@plants("several-adapters")
def two_adapters_in_one_file(folder: Path) -> Path:
    draft = llama(layers=4)
    other = llama(2, layers=4)
    for name, x in other.tensors.items():
        draft.tensors[name.replace(".weight", ".second.weight").replace("_proj", "_projx")] = x
    draft.config["target_modules"] = [f"{n}_proj{x}" for n in ("q", "v", "down") for x in ("", "x")]
    return draft.write(folder / "a")


@plants("named-twice")
def a_factor_in_two_spellings(folder: Path) -> Path:
    draft = llama()
    name = at(0)
    draft.tensors[name.removesuffix(".weight")] = draft.tensors[name]
    return draft.write(folder / "a")


@plants("orphan-alpha")
def an_alpha_without_factors(folder: Path) -> Path:
    draft = kohya()
    draft.tensors["lora_unet_mid_block_attentions_0_proj_in.alpha"] = np.array(4.0, np.float16)
    draft.write(folder, "x.safetensors")
    return folder / "x.safetensors"


@plants("factors-and-diff")
def a_module_with_a_full_delta_too(folder: Path) -> Path:
    draft = kohya()
    stem = next(iter(draft.tensors)).removesuffix(".lora_down.weight")
    draft.tensors[f"{stem}.diff"] = np.ones((32, 32), np.float16)
    draft.write(folder, "x.safetensors")
    return folder / "x.safetensors"


@plants("experts")
def experts_of_unknown_rank(folder: Path) -> Path:
    rng = np.random.default_rng(1)
    stem = f"{PREFIX}model.layers.0.mlp.experts"
    tensors = {
        f"{stem}.lora_A.weight": rng.standard_normal((12, 64)).astype(np.float32),
        f"{stem}.lora_B.weight": rng.standard_normal((64, 12)).astype(np.float32),
    }
    config = {**CONFIG, "r": 5, "target_modules": None}
    config["target_parameters"] = ["mlp.experts.gate_up_proj"]
    return Draft(tensors, config).write(folder / "a")


@plants("not-a-delta")
def DoRA_that_is_complete(folder: Path) -> Path:
    draft = llama(use_dora=True)
    for name in list(draft.tensors):
        if "lora_B" in name:
            key = name.replace("lora_B.weight", "lora_magnitude_vector")
            draft.tensors[key] = np.full(len(draft.tensors[name]), 1.5, np.float16)
    return draft.write(folder / "a")


@plants("not-a-delta")
def OFT(folder: Path) -> Path:
    rng = np.random.default_rng(1)
    names = (f"lora_unet_down_blocks_{n}_to_q.oft_blocks" for n in range(3))
    tensors = {name: rng.standard_normal((4, 8, 8)).astype(np.float32) for name in names}
    return write_file(folder / "x.safetensors", tensors)


@plants("not-a-delta")
def PiSSA(folder: Path) -> Path:
    return llama(init_lora_weights="pissa").write(folder / "a")


@plants("factor-type")
def factors_in_integers(folder: Path) -> Path:
    draft = llama()
    draft.map(lambda x: (100 * x).astype(np.int64))
    return draft.write(folder / "a")


@plants("mixed-dialects")
def PEFT_and_kohya_names(folder: Path) -> Path:
    draft = llama()
    draft.tensors.update(kohya(alpha=None, text=False).tensors)
    return draft.write(folder / "a")


@plants("mixed-formats")
def factors_in_two_number_formats(folder: Path) -> Path:
    draft = llama()
    draft.map(lambda x: x.astype(np.float32), "layers.2.")
    return draft.write(folder / "a")


@plants("doubled-prefix")
def lora_unet_unet(folder: Path) -> Path:
    draft = kohya(text=False)
    draft.rename("lora_unet_", "lora_unet_unet_")
    draft.write(folder, "x.safetensors")
    return folder / "x.safetensors"


@near("doubled-prefix")
def a_module_called_after_its_prefix(folder: Path) -> Path:
    draft = kohya(text=False)
    draft.rename("lora_unet_down_blocks_1_", "lora_unet_unetlike_blocks_1_")
    draft.write(folder, "x.safetensors")
    return folder / "x.safetensors"


@plants("missing-modules")
def a_layer_without_v_proj(folder: Path) -> Path:
    draft = llama(layers=32, rank=1)
    draft.drop("layers.7.self_attn.v_proj")
    return draft.write(folder / "a")


@plants("missing-modules")
def a_layer_without_any_module(folder: Path) -> Path:
    draft = llama(layers=16, rank=1)
    draft.drop("layers.7.")
    return draft.write(folder / "a")


@near("missing-modules")
def attention_in_every_fourth_layer(folder: Path) -> Path:
    draft = llama(layers=16, rank=1)
    for layer in range(16):
        if layer % 4 != 3:
            draft.drop(f"layers.{layer}.self_attn")
    return draft.write(folder / "a")


@near("missing-modules")
def layers_that_were_chosen(folder: Path) -> Path:
    chosen = [layer for layer in range(16) if layer != 7]
    draft = llama(layers=16, rank=1, layers_to_transform=chosen)
    draft.drop("layers.7.")
    return draft.write(folder / "a")


@near("missing-modules")
def a_first_layer_that_is_dense(folder: Path) -> Path:
    draft = llama(layers=16, rank=1)
    draft.drop("layers.0.mlp")
    return draft.write(folder / "a")


@near("missing-modules")
def attention_of_an_SGM_unet(folder: Path) -> Path:
    rng = np.random.default_rng(1)
    tensors = {}
    for block in (4, 5, 7, 8):
        for leaf in ("proj_in", "transformer_blocks_0_attn1_to_q"):
            stem = f"lora_unet_input_blocks_{block}_1_{leaf}"
            tensors[f"{stem}.lora_down.weight"] = rng.standard_normal((4, 32)).astype(np.float16)
            up = 0.01 * rng.standard_normal((32, 4))
            tensors[f"{stem}.lora_up.weight"] = up.astype(np.float16)
            tensors[f"{stem}.alpha"] = np.array(4.0, np.float16)
    return write_file(folder / "x.safetensors", tensors)


@plants("stray-tensor")
def a_tensor_that_lost_its_module(folder: Path) -> Path:
    draft = kohya()
    draft.tensors["weight"] = np.ones((4, 4), np.float16)
    draft.write(folder, "x.safetensors")
    return folder / "x.safetensors"


@near("stray-tensor")
def an_embedding_bundled_with_the_lora(folder: Path) -> Path:
    draft = kohya()
    draft.tensors["bundle_emb.token.string_to_param.*"] = np.ones((1, 32), np.float16)
    draft.write(folder, "x.safetensors")
    return folder / "x.safetensors"


# Scale.


@plants("no-scale")
def factors_without_a_config(folder: Path) -> Path:
    draft = llama()
    draft.config = None
    draft.write(folder, "x.safetensors")
    return folder / "x.safetensors"


@plants("config-missing", alpha=8)
def a_scale_given_by_hand(folder: Path) -> Path:
    return factors_without_a_config(folder)


@plants("scales-disagree")
def an_alpha_tensor_beside_another_config(folder: Path) -> Path:
    draft = llama()
    draft.tensors[f"{PREFIX}model.layers.0.mlp.down_proj.alpha"] = np.array(3.0, np.float32)
    return draft.write(folder / "a")


@plants("alpha-zero")
def alpha_0(folder: Path) -> Path:
    draft = kohya()
    draft.map(lambda x: np.array(0.0, np.float16), ".alpha")
    draft.write(folder, "x.safetensors")
    return folder / "x.safetensors"


@plants("rank-config")
def a_config_of_another_rank(folder: Path) -> Path:
    return _with(llama(), folder, r=8)


def _with(draft: Draft, folder: Path, **config: Any) -> Path:
    assert draft.config is not None
    draft.config.update(config)
    return draft.write(folder / "a")


@plants("scale-extreme", also="diverged")
def an_alpha_of_4096(folder: Path) -> Path:
    return _with(llama(), folder, lora_alpha=4096)


@plants("scale-extreme")
def an_alpha_of_almost_nothing(folder: Path) -> Path:
    return _with(llama(), folder, lora_alpha=0.001)


@near("scale-extreme")
def kohyas_alpha_of_1_at_rank_128(folder: Path) -> Path:
    rng = np.random.default_rng(1)
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = {
        f"{stem}.lora_down.weight": rng.standard_normal((128, 320)).astype(np.float16),
        f"{stem}.lora_up.weight": (0.01 * rng.standard_normal((320, 128))).astype(np.float16),
        f"{stem}.alpha": np.array(1.0, np.float16),
    }
    return write_file(folder / "x.safetensors", tensors)


@plants("scale-assumed")
def kohya_without_alphas(folder: Path) -> Path:
    kohya(alpha=None).write(folder, "x.safetensors")
    return folder / "x.safetensors"


@plants("rslora")
def rank_stabilised(folder: Path) -> Path:
    return llama(use_rslora=True).write(folder / "a")


@plants("mlx-alpha")
def MLX_with_an_alpha_beside_scale(folder: Path) -> Path:
    return mlx(scale=10.0, alpha=16).write(folder / "a", "adapters.safetensors")


@near("mlx-alpha")
def MLX_with_an_alpha_that_says_the_same(folder: Path) -> Path:
    return mlx(scale=4.0, alpha=16).write(folder / "a", "adapters.safetensors")


# Numbers.


def _hit(draft: Draft, value: float, name: str | None = None) -> Draft:
    x = draft.tensors[name or at(2)].copy()
    x.flat[7] = value
    draft.tensors[name or at(2)] = x
    return draft


@plants("non-finite")
def one_NaN_in_float16(folder: Path) -> Path:
    return _hit(llama(), np.nan).write(folder / "a")


@plants("non-finite")
def one_infinity_in_float32(folder: Path) -> Path:
    return _hit(llama(dtype=np.float32), -np.inf).write(folder / "a")


@plants("non-finite")
def one_NaN_in_bfloat16(folder: Path) -> Path:
    draft = llama(dtype="bfloat16")
    draft.tensors[at(2)].flat[7] = 0x7FC1
    return draft.write(folder / "a")


@plants("non-finite")
def a_NaN_in_a_head(folder: Path) -> Path:
    draft = llama(modules_to_save=["score"], task_type="SEQ_CLS")
    draft.tensors[f"{PREFIX}score.weight"] = np.ones((3, 64), np.float32)
    return _hit(draft, np.nan, f"{PREFIX}score.weight").write(folder / "a")


@plants("non-finite")
def an_alpha_that_is_NaN(folder: Path) -> Path:
    draft = kohya()
    name = next(name for name in draft.tensors if name.endswith(".alpha"))
    draft.tensors[name] = np.array(np.nan, np.float16)
    draft.write(folder, "x.safetensors")
    return folder / "x.safetensors"


@near("non-finite", also="diverged")
def the_largest_float16(folder: Path) -> Path:
    return _hit(llama(), 65504.0, at(2, side="A")).write(folder / "a")


@plants("beyond-float16", also="diverged")
def a_value_that_float16_cannot_hold(folder: Path) -> Path:
    return _hit(llama(dtype=np.float32), 65520.0, at(2, side="A")).write(folder / "a")


@plants("beyond-float16", also="diverged")
def a_bfloat16_that_float16_cannot_hold(folder: Path) -> Path:
    draft = llama(dtype="bfloat16")
    draft.tensors[at(2, side="A")].flat[7] = 0x4780  # 65,536
    return draft.write(folder / "a")


@near("beyond-float16", also="diverged")
def a_float32_that_rounds_to_the_largest_float16(folder: Path) -> Path:
    return _hit(llama(dtype=np.float32), 65519.0, at(2, side="A")).write(folder / "a")


@near("beyond-float16", also="diverged")
def a_bfloat16_just_below(folder: Path) -> Path:
    draft = llama(dtype="bfloat16")
    draft.tensors[at(2, side="A")].flat[7] = 0x477F  # 65,280
    return draft.write(folder / "a")


@plants("subnormal")
def every_B_below_the_normal_range(folder: Path) -> Path:
    draft = llama()
    draft.map(lambda x: (x * np.float16(0.0005)).astype(np.float16), "lora_B")
    return draft.write(folder / "a")


@near("subnormal")
def some_values_below_the_normal_range(folder: Path) -> Path:
    draft = llama()
    small = draft.tensors[at(2)].copy()
    small.flat[: small.size // 3] = np.float16(3e-5)
    draft.tensors[at(2)] = small
    return draft.write(folder / "a")


@near("subnormal")
def small_values_of_bfloat16(folder: Path) -> Path:
    draft = llama(dtype=np.float32)
    draft.map(lambda x: x * np.float32(1e-6), "lora_B")
    draft.map(bfloat16)
    return draft.write(folder / "a")


@plants("zero-adapter")
def an_adapter_saved_before_the_first_step(folder: Path) -> Path:
    draft = llama()
    draft.map(np.zeros_like, "lora_B")
    return draft.write(folder / "a")


@plants("zero-part")
def a_text_encoder_that_was_not_trained(folder: Path) -> Path:
    draft = kohya()
    for name, x in draft.tensors.items():
        if name.startswith("lora_te_") and "lora_up" in name:
            draft.tensors[name] = np.zeros_like(x)
    draft.write(folder, "x.safetensors")
    return folder / "x.safetensors"


@plants("dead-modules")
def two_modules_whose_A_is_zero(folder: Path) -> Path:
    draft = llama()
    for layer in (1, 2):
        name = at(layer, side="A")
        draft.tensors[name] = np.zeros_like(draft.tensors[name])
    return draft.write(folder / "a")


@near("dead-modules")
def a_module_with_one_value_left(folder: Path) -> Path:
    draft = llama()
    draft.tensors[at(2)] = np.zeros_like(draft.tensors[at(2)])
    return _hit(draft, 0.01).write(folder / "a")


@plants("diverged")
def a_training_that_blew_up(folder: Path) -> Path:
    draft = llama(dtype=np.float32)
    draft.map(lambda x: x * np.float32(500), "lora_B")
    return draft.write(folder / "a")


@near("diverged")
def a_strong_adapter(folder: Path) -> Path:
    draft = llama(dtype=np.float32)
    draft.map(lambda x: x * np.float32(8), "lora_B")
    return draft.write(folder / "a")


@plants("outlier-modules")
def one_module_far_beyond_the_others(folder: Path) -> Path:
    draft = llama(dtype=np.float32)
    draft.map(lambda x: x * np.float32(0.1), "lora_B")
    draft.map(lambda x: x * np.float32(300), "layers.2.self_attn.v_proj.lora_B")
    return draft.write(folder / "a")


@near("outlier-modules")
def one_module_ten_times_beyond_the_others(folder: Path) -> Path:
    draft = llama(dtype=np.float32)
    draft.map(lambda x: x * np.float32(10), "layers.2.self_attn.v_proj.lora_B")
    return draft.write(folder / "a")


@plants("constant")
def a_factor_filled_by_a_script(folder: Path) -> Path:
    draft = llama()
    draft.map(lambda x: np.full_like(x, 0.01), "layers.2.self_attn.v_proj.lora_B")
    return draft.write(folder / "a")


@plants("equal-columns")
def a_rank_that_was_doubled_by_copying(folder: Path) -> Path:
    draft = llama(rank=8)
    name = at(2)
    x = draft.tensors[name].copy()
    x[:, 4:] = x[:, :4]
    draft.tensors[name] = x
    return draft.write(folder / "a")


@plants("equal-columns")
def one_row_of_A_twice(folder: Path) -> Path:
    draft = llama()
    name = at(2, side="A")
    x = draft.tensors[name].copy()
    x[3] = x[0]
    draft.tensors[name] = x
    return draft.write(folder / "a")


@near("equal-columns")
def a_rank_that_was_padded_with_zeros(folder: Path) -> Path:
    draft = llama(rank=8)
    for name, x in draft.tensors.items():
        x = x.copy()
        x[(slice(None), slice(4, None)) if "lora_B" in name else slice(4, None)] = 0
        draft.tensors[name] = x
    return draft.write(folder / "a")


@near("equal-columns")
def columns_that_differ_in_one_value(folder: Path) -> Path:
    draft = llama()
    name = at(2, side="A")
    x = draft.tensors[name].copy()
    x[3] = x[0]
    x[3, 5] += np.float16(0.01)
    draft.tensors[name] = x
    return draft.write(folder / "a")


@plants("equal-modules")
def a_module_copied_over_another(folder: Path) -> Path:
    draft = llama()
    for side in "AB":
        draft.tensors[at(5, side=side)] = draft.tensors[at(4, side=side)]
    return draft.write(folder / "a")


@near("equal-modules")
def fused_projections_with_one_A(folder: Path) -> Path:
    draft = llama()
    for layer in range(8):
        draft.tensors[at(layer, "self_attn.q_proj", "A")] = draft.tensors[at(layer, side="A")]
    return draft.write(folder / "a")
