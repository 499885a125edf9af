"""What baking changes: every module of an adapter at its place in the base, by PEFT's own merge.

The oracle is `merge_and_unload` in float64, saved again by transformers: every tensor that it
changes must be a target of the same value, and no other.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapterops.basemodel import BaseModel, open_model
from adapterops.changes.mapping import changes
from adapterops.errors import (
    IncompatibleError,
    NumericsError,
    UnsupportedError,
    UsageError,
)
from adapterops.formats import read_adapter
from adapterops.rebased.rebase import rebase
from tests import baking, peft_models
from tests.support import pairs, write_kohya, write_peft

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "num_local_experts": 3,
    "num_experts": 3,
    "moe_intermediate_size": 20,
    "num_experts_per_tok": 1,
}
GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 24, "n_positions": 16, "vocab_size": 32}
APART = {"tie_word_embeddings": False}
FEW = {key: SIZES[key] for key in SIZES if key not in ("num_key_value_heads", "head_dim")}
ALL = "all-linear"
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with peft_models.quiet(), warnings.catch_warnings():
        for message in (".*tie_word_embeddings", "Model with `tie", ".*did not match"):
            warnings.filterwarnings("ignore", message=message)
        yield


def made(cls: str, config: str, sizes: Mapping[str, Any]) -> Any:
    """A tiny model of transformers with fixed random weights."""
    import transformers

    torch.manual_seed(1)
    return getattr(transformers, cls)(getattr(transformers, config)(**sizes)).eval()


def randomise(adapted: Any, seed: int = 3) -> None:
    """Every LoRA weight random and none zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if value.requires_grad and "lora_" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))


def state(model: Any) -> dict[str, np.ndarray]:
    """A model's weights by name."""
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def saved(
    folder: Path, weights: Mapping[str, Any], config: Mapping[str, Any] | None = None
) -> BaseModel:
    """A base model on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(value) for name, value in weights.items()}
    save_file(arrays, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return open_model(folder)


def values_of(base: BaseModel) -> dict[str, np.ndarray]:
    return {name: ref.read() for name, ref in base.tensors.items()}


def based(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None = None
) -> BaseModel:
    """A base of zeros: what is added to it is all there is."""
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    return saved(folder / "base", zeros, config)


def adapter(folder: Path, shapes: Mapping[str, Any], **options: Any) -> dict[str, np.ndarray]:
    """A PEFT adapter of random factors; ΔW by module."""
    factors = pairs(7, shapes, 2)
    write_peft(folder / "adapter", factors, **options)
    return {name: B.astype(float) @ A for name, (B, A) in factors.items()}


def changed(folder: Path, base: BaseModel, **options: Any) -> dict[str, np.ndarray]:
    """The targets of baking the adapter in `folder`."""
    return baking.baked(changes(base, [read_adapter(folder / "adapter")], [1.0], **options))


def trained(model: Any, folder: Path, **config: Any) -> Any:
    """The base, an adapter of it and PEFT's merge in folders; the merged model."""
    from peft import LoraConfig, get_peft_model

    model.save_pretrained(folder / "base")
    with quiet():
        adapted = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 5, **config}))
        randomise(adapted)
        adapted.save_pretrained(folder / "adapter")
        merged = adapted.double().merge_and_unload()
        merged.save_pretrained(folder / "merged")
    return merged


def opened(folder: Path, weight: float = 1.0, **options: Any) -> dict[str, np.ndarray]:
    """The targets of baking `adapter` into `base`."""
    base = open_model(folder / "base")
    found = changes(base, [rebase(read_adapter(folder / "adapter"), base)], [weight], **options)
    return baking.baked(found)


def assert_as_peft(folder: Path, tolerance: float = 1e-6, **renamed: str) -> None:
    """Targets are what PEFT's merge changes, and of its values."""
    base, merged = (load_file(folder / n / "model.safetensors") for n in ("base", "merged"))
    changed = {name for name in base if np.abs(base[name] - merged[name]).max(initial=0) > 1e-6}
    found = opened(folder)
    assert set(found) == changed
    assert baking.gap(found, merged) < tolerance


MODELS = [
    pytest.param("LlamaForCausalLM", "LlamaConfig", {**SIZES, **APART}, ALL, id="llama"),
    pytest.param("Phi3ForCausalLM", "Phi3Config", {**SIZES, **APART}, ALL, id="phi3"),
    pytest.param("GPTNeoXForCausalLM", "GPTNeoXConfig", {**FEW, **APART}, ALL, id="neox"),
    pytest.param("BloomForCausalLM", "BloomConfig", FEW, ALL, id="bloom"),
    pytest.param("BertForSequenceClassification", "BertConfig", FEW, ALL, id="bert"),
    pytest.param(
        "MixtralForCausalLM", "MixtralConfig", {**SIZES, **EXPERTS}, ["q_proj"], id="mixtral"
    ),
    pytest.param(
        "GPT2LMHeadModel", "GPT2Config", GPT2, ["c_attn", "c_proj", "c_fc", "wpe"], id="gpt2"
    ),
    pytest.param(
        "LlamaForCausalLM",
        "LlamaConfig",
        {**SIZES, **APART},
        ["embed_tokens", "lm_head", "up_proj"],
        id="embedding and head",
    ),
]


@pytest.mark.parametrize(("cls", "config", "sizes", "targets"), MODELS)
def test_as_PEFT_merges(
    cls: str, config: str, sizes: dict[str, Any], targets: Any, tmp_path: Path
) -> None:
    trained(made(cls, config, sizes), tmp_path, target_modules=targets)
    assert_as_peft(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"use_dora": True, "target_modules": ALL}, id="DoRA"),
        pytest.param({"init_lora_weights": "pissa", "target_modules": ["v_proj"]}, id="PiSSA"),
        pytest.param({"use_rslora": True, "alpha_pattern": {"k_proj": 9}}, id="rsLoRA"),
    ],
)
def test_what_is_relative_to_the_base(config: dict[str, Any], tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj", "k_proj"], **config}
    trained(made("LlamaForCausalLM", "LlamaConfig", {**SIZES, **APART}), tmp_path, **options)
    assert_as_peft(tmp_path, 2e-6)


def test_lora_bias(tmp_path: Path) -> None:
    model = made("BertForSequenceClassification", "BertConfig", FEW)
    trained(model, tmp_path, target_modules=["query", "dense"], lora_bias=True)
    assert_as_peft(tmp_path)
    assert "bert.encoder.layer.0.attention.self.query.bias" in opened(tmp_path)


def test_lora_bias_without_a_bias_is_refused_by_name(tmp_path: Path) -> None:
    base = based(tmp_path, {"model.layers.0.q_proj.weight": (6, 4)})
    bias = {"base_model.model.model.layers.0.q_proj.lora_B.bias": np.ones(6, np.float32)}
    shapes = {"model.layers.0.q_proj": (6, 4)}
    adapter(tmp_path, shapes, extras=bias, lora_bias=True)
    with pytest.raises(UnsupportedError, match=r"no 'model\.layers\.0\.q_proj\.bias'"):
        changed(tmp_path, base)


class TestLayers:
    """One of each layer of torch that PEFT adapts, and the kinds that it saves."""

    @pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
    @pytest.mark.parametrize(
        "targets",
        [
            pytest.param(["conv1", "conv2", "point", "conv3", "embed"], id="conv and embedding"),
            pytest.param(["square", "wide"], id="Conv1D"),
            pytest.param(["linear", "head"], id="linear"),
        ],
    )
    def test_as_PEFT_merges(self, targets: list[str], use_dora: bool, tmp_path: Path) -> None:
        """Of square weights the others' orientation tells."""
        config = {"r": 2, "lora_alpha": 3, "use_dora": use_dora, "target_modules": targets}
        folder = peft_models.trained(tmp_path / "a", 5, **config)
        base = saved(tmp_path / "base", state(peft_models.base()))
        merged = state(peft_models.reloaded(folder).merge_and_unload())
        found = changes(base, [rebase(read_adapter(folder), base)], [1.0])
        assert found.modules == len(targets)
        values = baking.baked(found)
        assert set(values) == {f"{name}.weight" for name in targets}
        assert baking.gap(values, merged) < 1e-12

    def test_MultiheadAttention(self, tmp_path: Path) -> None:
        """PEFT's own merge adds out_proj's change twice, which is said."""
        folder = peft_models.trained(tmp_path / "a", 5, r=2, target_modules=["mha"])
        base = saved(tmp_path / "base", state(peft_models.base()))
        merged = state(peft_models.reloaded(folder).merge_and_unload())
        found = changes(base, [read_adapter(folder)], [1.0])
        assert [note for note in found.notes if "adds it twice" in note]
        values, before = baking.baked(found), values_of(base)
        once = values.pop("mha.out_proj.weight") - before["mha.out_proj.weight"]
        twice = merged["mha.out_proj.weight"] - before["mha.out_proj.weight"]
        np.testing.assert_allclose(2 * once, twice, atol=1e-12)
        assert set(values) == {"mha.in_proj_weight"} and baking.gap(values, merged) < 1e-12

    @pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig", "AdaLoraConfig"])
    def test_kinds(self, kind: str, tmp_path: Path) -> None:
        import peft

        layers = ["head"] if kind == "AdaLoraConfig" else ["head", "conv2"]
        options: dict[str, Any] = {"target_modules": layers}
        options |= {"total_step": 10} if kind == "AdaLoraConfig" else {"init_weights": False}
        model = peft_models.base()
        before = state(model)
        with peft_models.quiet():
            adapted = peft.get_peft_model(model, getattr(peft, kind)(**options))
            randomise(adapted)
            adapted.save_pretrained(tmp_path / "a")
            merged = state(adapted.double().merge_and_unload())
        base = saved(tmp_path / "base", before)
        values = baking.baked(changes(base, [read_adapter(tmp_path / "a")], [1.0]))
        assert set(values) == {f"{name}.weight" for name in layers}
        assert baking.gap(values, merged) < 1e-6

    def test_square_weights_by_the_config(self, tmp_path: Path) -> None:
        trained(made("GPT2LMHeadModel", "GPT2Config", GPT2), tmp_path, target_modules=["c_proj"])
        base = open_model(tmp_path / "base")
        found = changes(base, [read_adapter(tmp_path / "adapter")], [1.0])
        (note,) = (note for note in found.notes if "square" in note)
        assert "2 square weights" in note and "as gpt2's config says" in note
        assert {t.inputs for t in found.targets.values()} == {"rows"}


class TestExperts:
    """ParamWrapper's fused experts on checkpoints that number them, stack them or turn them."""

    @pytest.mark.parametrize(
        ("cls", "config", "targets"),
        [
            pytest.param("MixtralForCausalLM", "MixtralConfig", PARAMETERS, id="mixtral"),
            pytest.param("Qwen3MoeForCausalLM", "Qwen3MoeConfig", PARAMETERS, id="qwen3_moe"),
            pytest.param("GptOssForCausalLM", "GptOssConfig", PARAMETERS, id="gpt_oss"),
            pytest.param("Llama4ForCausalLM", "Llama4TextConfig", PARAMETERS, id="llama4"),
            pytest.param("GraniteMoeForCausalLM", "GraniteMoeConfig", PARAMETERS, id="granite"),
        ],
    )
    def test_as_PEFT_merges(
        self, cls: str, config: str, targets: list[str], tmp_path: Path
    ) -> None:
        inner = {"Llama4TextConfig": "feed_forward", "GraniteMoeConfig": "block_sparse_moe"}
        names = [name.replace("mlp", inner.get(config, "mlp")) for name in targets]
        sizes = {**SIZES, **EXPERTS, "intermediate_size_mlp": 36}
        sizes = sizes if config == "Llama4TextConfig" else {**sizes, "tie_word_embeddings": False}
        options = {"target_modules": ["o_proj"], "target_parameters": names}
        trained(made(cls, config, sizes), tmp_path, **options)
        assert_as_peft(tmp_path)

    @pytest.mark.parametrize("version", ["0.21.2", "0.18.0", None])
    def test_square_experts_by_provenance(self, version: str | None, tmp_path: Path) -> None:
        """PEFT before 0.19 took a parameter's first axis for inputs."""
        sizes = {**SIZES, **EXPERTS, **APART, "moe_intermediate_size": 24}
        options = {"target_modules": ["o_proj"], "target_parameters": PARAMETERS[1:]}
        trained(made("Qwen3MoeForCausalLM", "Qwen3MoeConfig", sizes), tmp_path, **options)
        path = tmp_path / "adapter" / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "peft_version": version}))
        if version is None:
            with pytest.raises(IncompatibleError, match=r"is square, and nothing says.*peft_ver"):
                opened(tmp_path)
            return
        found, merged = opened(tmp_path), load_file(tmp_path / "merged" / "model.safetensors")
        assert (baking.gap(found, merged) < 1e-6) == (version == "0.21.2")
        before = load_file(tmp_path / "base" / "model.safetensors")
        name = "model.layers.0.mlp.experts.1.down_proj.weight"
        change, other = found[name] - before[name], merged[name] - before[name]
        np.testing.assert_allclose(change if version == "0.21.2" else change.T, other, atol=1e-7)

    @pytest.mark.parametrize("kind", ["gpt_oss", "llama4", "qwen3_5_moe", "mlx"])
    def test_numbered_modules_on_a_stack(self, kind: str, tmp_path: Path) -> None:
        """Gate and up above one another, beside one another, in turn, and apart."""
        block, E, inner, H = "model.layers.0.mlp", 3, 5, 4
        names = {name: f"{block}.experts.1.{name}_proj" for name in ("gate", "up", "down")}
        shapes = {names["gate"]: (inner, H), names["up"]: (inner, H), names["down"]: (H, inner)}
        parts = adapter(tmp_path, shapes)
        in_out = kind in ("gpt_oss", "llama4")
        gate, up, down = (parts[name] for name in shapes)
        stacks = {"gate_up_proj": (E, 2 * inner, H), "down_proj": (E, H, inner)}
        pair = np.concatenate([gate, up])
        if kind == "gpt_oss":
            pair = np.stack([gate, up], 1).reshape(2 * inner, H)
        expected = {f"{block}.experts.gate_up_proj": pair, f"{block}.experts.down_proj": down}
        if kind == "mlx":
            stacks = {f"{n}_proj.weight": shapes[names[n]] for n in names}
            stacks = {n: (E, *shape) for n, shape in stacks.items()}
            expected = {f"{block}.switch_mlp.{n}_proj.weight": parts[names[n]] for n in names}
        owner = "switch_mlp" if kind == "mlx" else "experts"
        sizes = {
            f"{block}.{owner}.{n}": (E, shape[2], shape[1]) if in_out else shape
            for n, shape in stacks.items()
        }
        base = based(tmp_path, sizes, {"model_type": kind})
        found = changed(tmp_path, base)
        assert set(found) == set(expected)
        for name, part in expected.items():
            whole = np.zeros((E, *part.shape))
            whole[1] = part
            np.testing.assert_allclose(found[name], whole.mT if in_out else whole, atol=1e-7)

    def test_another_number_of_experts(self, tmp_path: Path) -> None:
        sizes = {**SIZES, **EXPERTS, **APART}
        options = {"target_modules": ["o_proj"], "target_parameters": PARAMETERS}
        trained(made("Qwen3MoeForCausalLM", "Qwen3MoeConfig", sizes), tmp_path, **options)
        more = {**sizes, "num_experts": 4, "num_local_experts": 4}
        made("Qwen3MoeForCausalLM", "Qwen3MoeConfig", more).save_pretrained(tmp_path / "base")
        with pytest.raises(IncompatibleError, match="are both of the same model"):
            opened(tmp_path)


BLOCK = "model.layers.0.self_attn"
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 3, "hidden_size": 8}
FALCON = {"model_type": "falcon", "num_attention_heads": 4, "hidden_size": 12}


class TestFused:
    """q, k and v on fused weights and the other way, by rows built here head by head."""

    @staticmethod
    def rows(order: str, heads: int, keys: int, width: int) -> list[tuple[str, int]]:
        """(role, row of it) of every row of a fused weight."""
        q = [("q_proj", n) for n in range(heads * width)]
        k = [("k_proj", n) for n in range(keys * width)]
        v = [("v_proj", n) for n in range(keys * width)]
        if order == "whole":
            return q + k + v
        groups, each = keys, heads // keys * width
        return [
            row
            for g in range(groups)
            for part, size in ((q, each), (k, width), (v, width))
            for row in part[g * size : (g + 1) * size]
        ]

    @pytest.mark.parametrize(
        ("leaf", "config", "order", "keys"),
        [
            pytest.param("qkv_proj", {"model_type": "phi3"}, "whole", 2, id="phi3"),
            pytest.param("Wqkv", {"model_type": "mpt"}, "whole", 2, id="mpt"),
            pytest.param("c_attn", {"model_type": "qwen"}, "whole", 2, id="qwen"),
            pytest.param("query_key_value", {"model_type": "bloom"}, "head", 4, id="bloom"),
            pytest.param("query_key_value", {"model_type": "gpt_neox"}, "head", 4, id="neox"),
            pytest.param(
                "query_key_value", {**FALCON, "multi_query": True}, "whole", 1, id="falcon 7b"
            ),
            pytest.param(
                "query_key_value", {**FALCON, "multi_query": False}, "head", 4, id="falcon rw"
            ),
            pytest.param(
                "query_key_value",
                {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
                "head",
                2,
                id="falcon 40b",
            ),
            pytest.param("wqkv", {"model_type": "internlm2"}, "head", 2, id="internlm2"),
        ],
    )
    def test_split_on_fused(
        self, leaf: str, config: dict[str, Any], order: str, keys: int, tmp_path: Path
    ) -> None:
        heads, width = 4, 3
        shapes = {
            f"{BLOCK}.q_proj": (heads * width, 8),
            f"{BLOCK}.k_proj": (keys * width, 8),
            f"{BLOCK}.v_proj": (keys * width, 8),
        }
        parts = adapter(tmp_path, shapes)
        given = {**HEADS, "num_key_value_heads": keys, **config}
        name = f"{BLOCK}.{leaf}.weight"
        base = based(tmp_path, {name: ((heads + 2 * keys) * width, 8)}, given)
        expected = [parts[f"{BLOCK}.{r}"][n] for r, n in self.rows(order, heads, keys, width)]
        found = changed(tmp_path, base)
        np.testing.assert_allclose(found[name], expected, atol=1e-7)

    def test_Conv1D(self, tmp_path: Path) -> None:
        """GPT-2 keeps them beside one another, (in, 3 · out)."""
        block = "transformer.h.0.attn"
        shapes = {f"{block}.{leaf}": (12, 12) for leaf in ("q_proj", "k_proj", "v_proj")}
        parts = adapter(tmp_path, shapes)
        config = {"model_type": "gpt2", "n_head": 2, "n_embd": 12}
        base = based(tmp_path, {f"{block}.c_attn.weight": (12, 36)}, config)
        expected = np.concatenate(list(parts.values())).T
        found = changed(tmp_path, base)[f"{block}.c_attn.weight"]
        np.testing.assert_allclose(found, expected, atol=1e-7)

    def test_MultiheadAttention(self, tmp_path: Path) -> None:
        parts = adapter(tmp_path, {f"{BLOCK}.{name}_proj": (8, 8) for name in "qkv"})
        base = based(tmp_path, {f"{BLOCK}.in_proj_weight": (24, 8)})
        found = changed(tmp_path, base)[f"{BLOCK}.in_proj_weight"]
        np.testing.assert_allclose(found, np.concatenate(list(parts.values())), atol=1e-7)

    def test_biases(self, tmp_path: Path) -> None:
        """What lora_bias adds lies as the rows do."""
        rows = self.rows("head", 4, 4, 3)
        bias = {
            f"base_model.model.{BLOCK}.{name}.lora_B.bias": np.arange(12, dtype=np.float32) + at
            for name, at in (("q_proj", 100), ("v_proj", 200))
        }
        shapes = {f"{BLOCK}.q_proj": (12, 8), f"{BLOCK}.v_proj": (12, 8)}
        adapter(tmp_path, shapes, extras=bias, lora_bias=True)
        name = f"{BLOCK}.query_key_value"
        sizes = {f"{name}.weight": (36, 8), f"{name}.bias": (36,)}
        config = {**HEADS, "num_key_value_heads": 4, "model_type": "gpt_neox"}
        found = changed(tmp_path, based(tmp_path, sizes, config))[f"{name}.bias"]
        starts = {"q_proj": 100, "v_proj": 200}
        expected = [starts[role] + n if role in starts else 0 for role, n in rows]
        np.testing.assert_array_equal(found, expected)

    def test_one_of_three(self, tmp_path: Path) -> None:
        parts = adapter(tmp_path, {f"{BLOCK}.v_proj": (6, 8)})
        name = f"{BLOCK}.qkv_proj.weight"
        base = based(tmp_path, {name: (24, 8)}, {"model_type": "phi3", **HEADS})
        found = changed(tmp_path, base)[name]
        assert not found[:18].any()
        np.testing.assert_allclose(found[18:], parts[f"{BLOCK}.v_proj"], atol=1e-7)

    def test_fused_on_split(self, tmp_path: Path) -> None:
        shapes = {f"{BLOCK}.qkv_proj": (24, 8), "model.layers.0.mlp.gate_up_proj": (20, 8)}
        qkv, pair = adapter(tmp_path, shapes).values()
        names = {
            f"{BLOCK}.q_proj": qkv[:12],
            f"{BLOCK}.k_proj": qkv[12:18],
            f"{BLOCK}.v_proj": qkv[18:],
            "model.layers.0.mlp.gate_proj": pair[:10],
            "model.layers.0.mlp.up_proj": pair[10:],
        }
        base = based(tmp_path, {f"{name}.weight": part.shape for name, part in names.items()})
        found = changed(tmp_path, base)
        assert found.keys() == {f"{name}.weight" for name in names}
        for name, part in names.items():
            np.testing.assert_allclose(found[f"{name}.weight"], part, atol=1e-7)

    def test_gate_and_up(self, tmp_path: Path) -> None:
        block = "model.layers.0.mlp"
        gate, up = adapter(
            tmp_path, {f"{block}.gate_proj": (10, 8), f"{block}.up_proj": (10, 8)}
        ).values()
        base = based(tmp_path, {f"{block}.gate_up_proj.weight": (20, 8)})
        found = changed(tmp_path, base)[f"{block}.gate_up_proj.weight"]
        np.testing.assert_allclose(found, np.concatenate([gate, up]), atol=1e-7)

    @pytest.mark.parametrize(
        ("leaf", "config", "error"),
        [
            pytest.param("qkv_proj", {}, r"no config says how many heads", id="no config"),
            pytest.param("query_key_value", HEADS, r"in what order.*is not known", id="no kind"),
            pytest.param(
                "qkv_proj", {**HEADS, "head_dim": 4}, r"make 32 rows, .* has 24", id="another"
            ),
            pytest.param(
                "qkv_proj", {**HEADS, "model_type": "codegen"}, r"codegen fuses q, k", id="codegen"
            ),
        ],
    )
    def test_unknown_rows_are_refused(
        self, leaf: str, config: dict[str, Any], error: str, tmp_path: Path
    ) -> None:
        adapter(tmp_path, {f"{BLOCK}.q_proj": (12, 8)})
        base = based(tmp_path, {f"{BLOCK}.{leaf}.weight": (24, 8)}, config)
        with pytest.raises(IncompatibleError, match=error):
            changed(tmp_path, base)

    def test_a_fused_name_of_several_orders_is_refused(self, tmp_path: Path) -> None:
        adapter(tmp_path, {f"{BLOCK}.query_key_value": (24, 8)})
        names = ("q_proj", "k_proj", "v_proj")
        base = based(tmp_path, {f"{BLOCK}.{name}.weight": (8, 8) for name in names})
        with pytest.raises(UnsupportedError, match="fused in several orders"):
            changed(tmp_path, base)


class TestPrefixes:
    """One renaming for all modules below a head."""

    @pytest.mark.parametrize(
        ("here", "there"),
        [
            pytest.param("model.layers", "layers", id="without model"),
            pytest.param("layers", "model.layers", id="with model"),
            pytest.param("transformer.h", "h", id="without transformer"),
            pytest.param("encoder.layer", "bert.encoder.layer", id="with bert"),
            pytest.param("backbone.layers", "model.layers", id="backbone"),
            pytest.param(
                "model.language_model.layers", "language_model.model.layers", id="transformers 5"
            ),
            pytest.param("language_model.model.layers", "model.language_model.layers", id="before"),
            pytest.param("model.layers", "model.language_model.layers", id="of the text model"),
            pytest.param(
                "vision_tower.vision_model.encoder.layers",
                "vision_model.encoder.layers",
                id="of a vision model",
            ),
        ],
    )
    def test_of_the_wild(self, here: str, there: str, tmp_path: Path) -> None:
        parts = adapter(tmp_path, {f"{here}.{n}.q_proj": (6, 4) for n in range(3)})
        other = "vision_tower.blocks.layers"  # of other shapes, with some of the names
        shapes = {f"{there}.{n}.q_proj.weight": (6, 4) for n in range(3)}
        shapes |= {f"{other}.{n}.q_proj.weight": (6, 5) for n in range(3)}
        found = changed(tmp_path, based(tmp_path, shapes))
        expected = {f"{there}.{n}.q_proj.weight": parts[f"{here}.{n}.q_proj"] for n in range(3)}
        assert baking.gap(found, expected) < 1e-7 and len(found) == 3

    def test_several_heads(self, tmp_path: Path) -> None:
        """Text, vision and what has no number change each as a whole."""
        renamed = {
            "model.language_model.layers.0.q_proj": "language_model.model.layers.0.q_proj",
            "model.vision_tower.layers.0.q_proj": "vision_tower.layers.0.q_proj",
            "model.multi_modal_projector.linear_1": "multi_modal_projector.linear_1",
            "lm_head": "language_model.lm_head",
        }
        parts = adapter(tmp_path, dict.fromkeys(renamed, (6, 4)))
        base = based(tmp_path, {f"{name}.weight": (6, 4) for name in renamed.values()})
        found = changed(tmp_path, base)
        expected = {f"{there}.weight": parts[here] for here, there in renamed.items()}
        assert baking.gap(found, expected) < 1e-7 and len(found) == 4

    def test_heads_follow_the_others(self, tmp_path: Path) -> None:
        """A bias that travels along is named as the modules beside it."""
        bias = {"base_model.model.model.norm.bias": np.ones(4, np.float32)}
        adapter(tmp_path, {"model.layers.0.q_proj": (6, 4)}, extras=bias)
        shapes = {"language_model.model.layers.0.q_proj.weight": (6, 4)}
        base = based(tmp_path, {**shapes, "language_model.model.norm.bias": (4,)})
        found = changes(base, [read_adapter(tmp_path / "adapter")], [1.0])
        assert list(found.values) == ["language_model.model.norm.bias"]

    def test_two_that_fit_are_an_error(self, tmp_path: Path) -> None:
        adapter(tmp_path, {"encoder.layers.0.q_proj": (6, 4)})
        names = [f"{tower}.encoder.layers.0.q_proj.weight" for tower in ("text", "vision")]
        with pytest.raises(IncompatibleError, match=r"'text.*' or 'vision.*both hold them all"):
            changed(tmp_path, based(tmp_path, dict.fromkeys(names, (6, 4))))

    def test_shapes_choose(self, tmp_path: Path) -> None:
        adapter(tmp_path, {"encoder.layers.0.q_proj": (6, 4)})
        shapes = {f"text.encoder.layers.{n}.q_proj.weight": (6, 4) for n in range(2)}
        shapes |= {"vision.encoder.layers.0.q_proj.weight": (6, 5)}
        found = changed(tmp_path, based(tmp_path, shapes))
        assert list(found) == ["text.encoder.layers.0.q_proj.weight"]

    def test_leftovers_are_listed(self, tmp_path: Path) -> None:
        """Nothing is looked for elsewhere, one by one."""
        names = [f"model.layers.{n}.q_proj" for n in range(6)]
        adapter(tmp_path, dict.fromkeys(names, (6, 4)))
        shapes = {"model.layers.0.q_proj.weight": (6, 4)}
        shapes |= {f"model.vision.layers.{n}.q_proj.weight": (6, 4) for n in range(1, 6)}
        with pytest.raises(
            IncompatibleError, match=r"5 of 6 modules are not in .*layers\.3\.q_proj' and 2 more"
        ):
            changed(tmp_path, based(tmp_path, shapes))

    @pytest.mark.parametrize(
        ("here", "there"),
        [
            ("vision_tower.layers", "model.layers"),
            ("model.vision_tower.layers", "model.layers"),
            ("vision_model.encoder.layers", "encoder.layers"),
            ("text_model.encoder.layers", "vision_model.encoder.layers"),
            ("model.encoder.layers", "model.layers"),
            ("model.encoder.layers", "model.decoder.layers"),
            ("mtp.layers", "model.layers"),
            ("mtp.layers", "layers"),
            ("model.layers", "model.mtp.layers"),
            ("audio_tower.layers", "language_model.model.layers"),
            ("draft_model.layers", "model.layers"),
            ("medusa_head.layers", "layers"),
            ("one.layers", "other.layers"),
        ],
    )
    def test_another_part_is_not_the_same(self, here: str, there: str, tmp_path: Path) -> None:
        adapter(tmp_path, {f"{here}.{n}.q_proj": (6, 4) for n in range(2)})
        base = based(tmp_path, {f"{there}.{n}.q_proj.weight": (6, 4) for n in range(2)})
        with pytest.raises(IncompatibleError, match="2 of 2 modules are not in"):
            changed(tmp_path, base)

    def test_two_heads_do_not_become_one(self, tmp_path: Path) -> None:
        """Which of the two is meant does not show, even where both may be."""
        adapter(tmp_path, {"llm.layers.0.q_proj": (6, 4), "backbone.layers.1.q_proj": (6, 4)})
        shapes = {f"model.layers.{n}.q_proj.weight": (6, 4) for n in range(2)}
        with pytest.raises(IncompatibleError, match="2 of 2 modules are not in"):
            changed(tmp_path, based(tmp_path, shapes))

    def test_a_part_that_the_base_lacks_beside_one_that_it_has(self, tmp_path: Path) -> None:
        heads = {"vision_tower": "k_proj", "language_model": "q_proj"}
        adapter(tmp_path, {f"model.{h}.layers.0.{leaf}": (6, 4) for h, leaf in heads.items()})
        names = [f"model.layers.0.{leaf}.weight" for leaf in heads.values()]
        with pytest.raises(IncompatibleError, match=r"1 of 2 modules.*vision_tower.*k_proj"):
            changed(tmp_path, based(tmp_path, dict.fromkeys(names, (6, 4))))

    def test_modules_beside_layers_may_lose_their_heads(self, tmp_path: Path) -> None:
        """Without numbers heads tell nothing: only equal names would be one weight."""
        adapter(tmp_path, {"model.embed": (6, 4), "lm_head": (8, 4), "model.layers.0.q": (6, 4)})
        shapes = {"embed.weight": (6, 4), "lm_head.weight": (8, 4), "layers.0.q.weight": (6, 4)}
        assert changed(tmp_path, based(tmp_path, shapes)).keys() == shapes.keys()

    def test_a_decoder_alone_is_the_model(self, tmp_path: Path) -> None:
        adapter(tmp_path, {"model.decoder.layers.0.q_proj": (6, 4)})
        name = "model.layers.0.q_proj.weight"
        assert list(changed(tmp_path, based(tmp_path, {name: (6, 4)}))) == [name]

    def test_the_model_and_not_what_drafts_for_it(self, tmp_path: Path) -> None:
        adapter(tmp_path, {"layers.0.q_proj": (6, 4)})
        names = [f"{root}.layers.0.q_proj.weight" for root in ("mtp", "model")]
        found = changed(tmp_path, based(tmp_path, dict.fromkeys(names, (6, 4))))
        assert list(found) == names[1:]

    @pytest.mark.parametrize(
        ("here", "there", "said"),
        [
            ("model.layers", "layers", ""),
            ("layers", "model.layers", ""),
            ("transformer.h", "h", "'transformer.h' as 'h'"),
            ("layers", "vision_tower.layers", "'layers' as 'vision_tower.layers'"),
        ],
    )
    def test_other_names_are_said(self, here: str, there: str, said: str, tmp_path: Path) -> None:
        adapter(tmp_path, {f"{here}.0.q_proj": (6, 4)})
        base = based(tmp_path, {f"{there}.0.q_proj.weight": (6, 4)})
        notes = changes(base, [read_adapter(tmp_path / "adapter")], [1.0]).notes
        assert [said in note for note in notes] == ([True] if said else [])

    @pytest.mark.parametrize(
        ("leaf", "turned"),
        [("self_attn.q_proj", False), ("attn.c_proj", True), ("attn.own", True)],
    )
    def test_fan_in_fan_out_of_a_square_weight(
        self, leaf: str, turned: bool, tmp_path: Path
    ) -> None:
        """PEFT resets it for Linear layers; without a config their names tell them."""
        stem = f"h.0.{leaf}"
        parts = adapter(tmp_path, {stem: (6, 6)}, fan_in_fan_out=True)
        base = based(tmp_path, {f"{stem}.weight": (6, 6)})
        found = changes(base, [read_adapter(tmp_path / "adapter")], [1.0])
        change = parts[stem].T if turned else parts[stem]
        assert baking.gap(baking.baked(found), {f"{stem}.weight": change}) < 1e-7
        (note,) = found.notes
        assert ("taken as (in, out)" in note) == turned and ("PEFT resets it" in note) != turned

    def test_parts_of_a_pipeline_stay_apart(self, tmp_path: Path) -> None:
        """text_encoder_2 would hold it all."""
        stem = "text_encoder.text_model.encoder.layers.0.q_proj"
        factors = pairs(1, {stem: (6, 4)}, 2)[stem]
        tensors = {f"{stem}.lora_B.weight": factors[0], f"{stem}.lora_A.weight": factors[1]}
        (tmp_path / "adapter").mkdir()
        save_file(tensors, tmp_path / "adapter" / "pytorch_lora_weights.safetensors")
        base = pipeline(tmp_path, {"text_encoder_2": "encoder.layers.0.q_proj", "unet": "conv_in"})
        with pytest.raises(IncompatibleError, match="1 of 1 modules are not in"):
            changed(tmp_path, base)
        base = pipeline(tmp_path, {"text_encoder": "encoder.layers.0.q_proj"})
        assert list(changed(tmp_path, base)) == ["text_encoder.encoder.layers.0.q_proj.weight"]


def pipeline(folder: Path, parts: Mapping[str, str]) -> BaseModel:
    """A diffusers folder with one weight (6, 4) in each part."""
    root = folder / "base"
    root.mkdir(exist_ok=True)
    (root / "model_index.json").write_text("{}")
    for part, name in parts.items():
        denoiser = part in ("unet", "transformer")
        file = "diffusion_pytorch_model" if denoiser else "model"
        (root / part).mkdir(exist_ok=True)
        zeros = {f"{name}.weight": np.zeros((6, 4), np.float32)}
        save_file(zeros, root / part / f"{file}.safetensors")
    return open_model(root)


class TestTied:
    @pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
    def test_one_of_the_two(self, target: str, tmp_path: Path) -> None:
        """The result, with both, computes what PEFT computes unmerged."""
        import transformers
        from peft import PeftModel

        sizes = {**SIZES, "tie_word_embeddings": True}
        model = made("LlamaForCausalLM", "LlamaConfig", sizes)
        with quiet():
            trained(model, tmp_path, target_modules=[target, "q_proj"])
            base = open_model(tmp_path / "base")
            found = changes(base, [read_adapter(tmp_path / "adapter")], [1.0])
            plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
            adapted = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).double()
            ids = torch.arange(10)[None] * 3 % 32
            with torch.no_grad():
                expected = adapted(ids).logits.numpy()
        apart = made("LlamaForCausalLM", "LlamaConfig", {**SIZES, **APART}).double()
        tensors = {**values_of(base), **baking.baked(found)}
        tensors |= {name: ref.read() for name, ref in found.copies.items()}
        apart.load_state_dict({name: torch.from_numpy(v) for name, v in tensors.items()})
        with torch.no_grad():
            np.testing.assert_allclose(apart(ids).logits.numpy(), expected, atol=1e-6)
        assert found.config[""]["tie_word_embeddings"] is False

    def test_a_head_of_another_name(self, tmp_path: Path) -> None:
        """transformers 5 calls embed_out of GPT-NeoX lm_head."""
        parts = adapter(tmp_path, {"lm_head": (32, 4)})
        shapes = {"gpt_neox.embed_in.weight": (32, 4), "embed_out.weight": (32, 4)}
        config = {"model_type": "gpt_neox", "tie_word_embeddings": False}
        found = changed(tmp_path, based(tmp_path, shapes, config))
        assert baking.gap(found, {"embed_out.weight": parts["lm_head"]}) < 1e-7 and len(found) == 1


class TestOtherDialects:
    def test_full_deltas(self, tmp_path: Path) -> None:
        """Weights, biases and norms; one adapter's beside another's factors of a 1 x 1."""
        rng = np.random.default_rng(2)
        sizes = {
            "conv.diff": (6, 4, 3, 3),
            "conv.diff_b": (6,),
            "norm.w_norm": (6,),
            "norm.b_norm": (6,),
            "point.diff": (6, 4, 1, 1),
        }
        full = {n: rng.standard_normal(s).astype(np.float32) for n, s in sizes.items()}
        stem = "lora_unet_blocks_0_"
        B, A = pairs(1, {"q": (6, 4)}, 2)["q"]
        one = write_kohya(tmp_path / "one.safetensors", {f"{stem}point": (B, A)}, alpha=2.0)
        other = tmp_path / "other.safetensors"
        factors = {f"{stem}q.lora_up.weight": B, f"{stem}q.lora_down.weight": A}
        save_file({**{f"{stem}{n}": value for n, value in full.items()}, **factors}, other)
        names = {"conv.weight": "conv.diff", "conv.bias": "conv.diff_b"}
        names |= {"norm.weight": "norm.w_norm", "norm.bias": "norm.b_norm"}
        names |= {"point.weight": "point.diff"}
        shapes = {f"blocks.0.{own}": sizes[name] for own, name in names.items()}
        base = based(tmp_path, {**shapes, "blocks.0.q.weight": (6, 4)})
        found = changes(base, [read_adapter(one), read_adapter(other)], [2.0, 0.5])
        expected = {f"blocks.0.{own}": 0.5 * full[name] for own, name in names.items()}
        expected["blocks.0.point.weight"] += 2 * (B @ A).reshape(6, 4, 1, 1)
        expected["blocks.0.q.weight"] = 0.5 * (B @ A)
        assert baking.gap(baking.baked(found), expected) < 1e-6
        assert found.targets.keys() == expected.keys() and found.modules == 4
        conv = found.targets["blocks.0.conv.weight"]
        whole = baking.dense_change(conv)
        np.testing.assert_array_equal(conv.dense[0].change().rows(2, 5) * 0.5, whole[2:5])

    def test_a_delta_of_another_shape(self, tmp_path: Path) -> None:
        file = tmp_path / "a.safetensors"
        B, A = pairs(1, {"q": (6, 4)}, 2)["q"]
        tensors = {"lora_unet_q.lora_up.weight": B, "lora_unet_q.lora_down.weight": A}
        save_file({**tensors, "lora_unet_norm.w_norm": np.ones(5, np.float32)}, file)
        base = based(tmp_path, {"q.weight": (6, 4), "norm.weight": (6,)})
        with pytest.raises(IncompatibleError, match=r"norm.w_norm: .* of 5, .* has 6 as 'norm.w"):
            changes(base, [read_adapter(file)], [1.0])

    def test_a_delta_with_NaN_is_refused_as_it_is_read(self, tmp_path: Path) -> None:
        file = tmp_path / "a.safetensors"
        B, A = pairs(1, {"q": (6, 4)}, 2)["q"]
        tensors = {"lora_unet_q.lora_up.weight": B, "lora_unet_q.lora_down.weight": A}
        save_file({**tensors, "lora_unet_norm.w_norm": np.full(6, np.nan, np.float32)}, file)
        base = based(tmp_path, {"q.weight": (6, 4), "norm.weight": (6,)})
        found = changes(base, [read_adapter(file)], [1.0])
        with pytest.raises(NumericsError, match="NaN or infinite: 6 of 6"):
            baking.baked(found)

    def test_kohya_stems_of_two_text_encoders(self, tmp_path: Path) -> None:
        """A level that transformers 5 left out, and no te2 in the first encoder's place."""
        stem = "lora_te{}_text_model_encoder_layers_0_q_proj"
        parts = pairs(1, {stem.format(1): (6, 4), stem.format(2): (6, 4)}, 2)
        file = write_kohya(tmp_path / "a.safetensors", parts, alpha=2.0)
        inner = "encoder.layers.0.q_proj"
        base = pipeline(tmp_path, {"text_encoder": inner})
        with pytest.raises(IncompatibleError, match=r"1 of 2 modules.*lora_te2"):
            changes(base, [read_adapter(file)], [1.0])
        base = pipeline(tmp_path, {"text_encoder": inner, "text_encoder_2": inner})
        found = baking.baked(changes(base, [read_adapter(file)], [1.0]))
        expected = {
            f"{part}.{inner}.weight": np.matmul(*parts[stem.format(n)])
            for n, part in ((1, "text_encoder"), (2, "text_encoder_2"))
        }
        assert baking.gap(found, expected) < 1e-6 and len(found) == 2

    @pytest.mark.parametrize(
        ("prefix", "number"),
        [
            ("cond_stage_model.transformer.text_model", 2),
            ("text_encoder", 2),
            ("text_encoder", 3),
            ("text_encoder_2", 1),
            ("text_model", 2),
            ("conditioner.embedders.0.transformer.text_model", 2),
            ("conditioner.embedders.1.model", 1),
        ],
    )
    def test_another_text_encoder_is_not_there(
        self, prefix: str, number: int, tmp_path: Path
    ) -> None:
        stem = f"lora_te{number}_text_model_encoder_layers_0_q_proj"
        file = write_kohya(tmp_path / "a.safetensors", pairs(1, {stem: (6, 4)}, 2), alpha=2.0)
        base = based(tmp_path, {f"{prefix}.encoder.layers.0.q_proj.weight": (6, 4)})
        with pytest.raises(IncompatibleError, match="1 of 1 modules are not in"):
            changes(base, [read_adapter(file)], [1.0])

    def test_mlx_stacks_on_numbered_experts(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(4)
        block = "model.layers.0.mlp"
        A = rng.standard_normal((3, 2, 4)).astype(np.float32)
        B = rng.standard_normal((3, 6, 2)).astype(np.float32)
        tensors = {f"{block}.switch_mlp.gate_proj.lora_{s}": v for s, v in (("a", A), ("b", B))}
        (tmp_path / "adapter").mkdir()
        save_file(tensors, tmp_path / "adapter" / "adapters.safetensors")
        config = {"fine_tune_type": "lora", "lora_parameters": {"scale": 2.0, "rank": 2}}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        names = [f"{block}.experts.{e}.gate_proj.weight" for e in range(3)]
        found = changed(tmp_path, based(tmp_path, dict.fromkeys(names, (6, 4))))
        assert baking.gap(found, dict(zip(names, 2 * (B @ A), strict=True))) < 1e-6


class TestInputs:
    def test_weights_and_scales(self, tmp_path: Path) -> None:
        """c = fl64(weight · scale) of every input; one of weight 0 need not even fit."""
        shapes = {"model.layers.0.q_proj": (6, 4)}
        one, other = (pairs(seed, shapes, 2) for seed in (1, 2))
        write_peft(tmp_path / "one", one, alpha=3.0)
        write_peft(tmp_path / "other", other, alpha=0.1)
        write_peft(tmp_path / "third", pairs(3, {"elsewhere.q_proj": (9, 9)}, 2))
        base = based(tmp_path, {"model.layers.0.q_proj.weight": (6, 4)})
        files = [read_adapter(tmp_path / name) for name in ("one", "other", "third")]
        found = changes(base, files, [0.7, -0.3, 0.0])
        (target,) = found.targets.values()
        assert [(t.input, t.coefficient) for t in target.terms] == [
            (0, 0.7 * 1.5),
            (1, -0.3 * 0.05),
        ]
        assert found.modules == 1 and target.inputs == "columns"

    def test_modules(self, tmp_path: Path) -> None:
        shapes = {f"model.layers.{n}.{m}_proj": (6, 4) for n in range(2) for m in "qkv"}
        adapter(tmp_path, shapes)
        base = based(tmp_path, {f"{name}.weight": (6, 4) for name in list(shapes)[:4]})
        found = changes(base, [read_adapter(tmp_path / "adapter")], [1.0], modules=r".*\.0\..*")
        assert len(found.targets) == found.modules == found.left_out == 3
        with pytest.raises(UsageError, match="matches none of the 6 modules as a whole"):
            changed(tmp_path, base, modules="q_proj")

    def test_another_shape(self, tmp_path: Path) -> None:
        adapter(tmp_path, {"model.layers.0.q_proj": (6, 4)})
        base = based(tmp_path, {"model.layers.0.q_proj.weight": (6, 5)})
        with pytest.raises(
            IncompatibleError,
            match=r"q_proj: .* of 6 x 4, .* has 6 x 5 as .*; are both of the same model\?",
        ):
            changed(tmp_path, base)

    @pytest.mark.parametrize(
        ("factors", "shape"),
        [
            pytest.param(
                {"lora_A.weight": (2, 4, 1, 9), "lora_B.weight": (6, 2, 1, 1)},
                (6, 4, 3, 3),
                id="kernel",
            ),
            pytest.param(
                {"lora_embedding_A": (2, 36), "lora_embedding_B": (6, 2)}, (6, 36), id="embedding"
            ),
        ],
    )
    def test_the_same_numbers_in_another_shape(
        self, factors: dict[str, Any], shape: tuple[int, ...], tmp_path: Path
    ) -> None:
        """(out, in) counts do not tell a kernel from another, or (V, d) from (d, V)."""
        stem = "base_model.model.layers.0.conv"
        tensors = {f"{stem}.{name}": np.ones(size, np.float32) for name, size in factors.items()}
        (tmp_path / "adapter").mkdir()
        save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        base = based(tmp_path, {"layers.0.conv.weight": shape})
        with pytest.raises(IncompatibleError, match="are both of the same model"):
            changed(tmp_path, base)

    def test_one_weight_by_two_names(self, tmp_path: Path) -> None:
        adapter(tmp_path, {"model.layers.0.q_proj": (6, 4), "layers.0.q_proj": (6, 4)})
        base = based(tmp_path, {"model.layers.0.q_proj.weight": (6, 4)})
        with pytest.raises(IncompatibleError, match="and so is"):
            changed(tmp_path, base)

    def test_zero_weights(self, tmp_path: Path) -> None:
        adapter(tmp_path, {"model.layers.0.q_proj": (6, 4)})
        base = based(tmp_path, {"model.layers.0.q_proj.weight": (6, 4)})
        with pytest.raises(NumericsError, match="every weight is zero"):
            changes(base, [read_adapter(tmp_path / "adapter")], [0.0])

    @pytest.mark.parametrize(
        ("dtype", "config", "error"),
        [
            pytest.param("F8_E4M3", {}, r"q_proj.weight' is of type F8_E4M3", id="fp8"),
            pytest.param("F64", {}, r"q_proj.weight' is of type F64", id="float64"),
            pytest.param(
                "F32",
                {"quantization_config": {"quant_method": "gptq"}},
                "is quantised by gptq",
                id="quantised",
            ),
        ],
    )
    def test_types_that_are_refused(
        self, dtype: str, config: dict[str, Any], error: str, tmp_path: Path
    ) -> None:
        adapter(tmp_path, {"model.layers.0.q_proj": (6, 4)})
        name, size = "model.layers.0.q_proj.weight", {"F8_E4M3": 24, "F64": 192, "F32": 96}[dtype]
        header = {name: {"dtype": dtype, "shape": [6, 4], "data_offsets": [0, size]}}
        text = json.dumps(header).encode()
        (tmp_path / "base").mkdir()
        whole = len(text).to_bytes(8, "little") + text + bytes(size)
        (tmp_path / "base" / "model.safetensors").write_bytes(whole)
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedError, match=error) as caught:
            changed(tmp_path, open_model(tmp_path / "base"))
        assert caught.value.exit_code == 4
