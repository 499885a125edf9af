"""check --base: names, shapes and orientation against checkpoints that transformers and diffusers
write, and against configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterops as ao
from adapterops.basemodel import config as baseconfig
from adapterops.basemodel import names as basenames
from adapterops.checking import located
from adapterops.errors import FileError, FormatError, UnsupportedError
from tests.defects import PREFIX, Draft, at, gpt2, llama, write_file

LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "tie_word_embeddings": False,
}
SMALL = {**LLAMA, "num_hidden_layers": 2}
GPT2 = {"n_embd": 48, "n_layer": 4, "n_head": 4, "vocab_size": 60, "n_positions": 16}


def codes(report: ao.CheckReport) -> set[str]:
    return {finding.code for finding in report.findings}


def message(report: ao.CheckReport, code: str) -> str:
    [finding] = [finding for finding in report.findings if finding.code == code]
    return finding.message


def saved(kind: str, folder: Path, *, head: bool = True, **config: Any) -> Path:
    """A checkpoint of a tiny model, as transformers writes it."""
    transformers = pytest.importorskip("transformers")
    settings = transformers.AutoConfig.for_model(kind, **config)
    auto = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    options = {"max_shard_size": "100KB"} if "shards" in folder.name else {}
    auto.from_config(settings).save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("base") / "llama", **LLAMA)


def test_an_adapter_of_its_base(model: Path, tmp_path: Path) -> None:
    """The same from the weights, from the config alone, from a single file."""
    adapter = llama().write(tmp_path / "a")
    for path in (model, model / "config.json", model / "model.safetensors"):
        report = ao.check(adapter, base=path, jobs=1)
        assert codes(report) == {"base-coverage"} and report.exit_code == 0
        text = message(report, "base-coverage")
        assert "24 of the 56 weight matrices" in text
        assert "not gate_proj, up_proj, k_proj, o_proj" in text


def test_partial_coverage_is_named(model: Path, tmp_path: Path) -> None:
    draft = llama(layers=6)
    report = ao.check(draft.write(tmp_path / "a"), base=model, jobs=1)
    text = message(report, "base-coverage")
    assert "model.layers.*.self_attn.q_proj without 6–7" in text


def test_shards_and_a_missing_one(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "shards", **LLAMA)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    adapter = llama().write(tmp_path / "a")
    for path in (folder, folder / "model.safetensors.index.json"):
        assert codes(ao.check(adapter, base=path, jobs=1)) == {"base-coverage"}
    shards[1].unlink()
    with pytest.raises(FormatError, match=f"{len(shards) - 1} of {len(shards)} shards"):
        ao.check(adapter, base=folder, jobs=1)


def test_another_size_of_the_base(tmp_path: Path) -> None:
    wider = {**LLAMA, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **wider}))
    adapter = llama().write(tmp_path / "a")
    report = ao.check(adapter, base=tmp_path / "config.json", jobs=1)
    assert codes(report) == {"base-shape", "base-coverage"} and report.exit_code == 4
    text = message(report, "base-shape")
    assert "8 modules change a weight of 32 x 64, config.json has 64 x 64" in text
    [finding] = [finding for finding in report.findings if finding.code == "base-shape"]
    assert finding.module == "model.layers.0.self_attn.v_proj"


def test_a_shape_that_is_transposed_in_a_model_of_linear_layers(
    model: Path, tmp_path: Path
) -> None:
    draft = llama(1)
    for layer in range(8):
        a, b = at(layer, side="A"), at(layer, side="B")
        draft.tensors[a], draft.tensors[b] = draft.tensors[b].T.copy(), draft.tensors[a].T.copy()
    report = ao.check(draft.write(tmp_path / "a"), base=model, jobs=1)
    assert "base-shape" in codes(report)


def test_modules_that_the_base_has_not(model: Path, tmp_path: Path) -> None:
    draft = llama(layers=9)
    report = ao.check(draft.write(tmp_path / "a"), base=model, jobs=1)
    assert codes(report) == {"base-module", "base-coverage"} and report.exit_code == 4
    assert message(report, "base-module").startswith("3 of 27 modules are not in llama")


def test_a_projection_that_the_base_has_fused(tmp_path: Path) -> None:
    """bake places it, loaders that go by names do not: a warning, and shapes of parts."""
    shapes = {"model_type": "phi3", **LLAMA}
    (tmp_path / "config.json").write_text(json.dumps(shapes))
    report = ao.check(llama().write(tmp_path / "a"), base=tmp_path, jobs=1)
    assert codes(report) == {"base-fused", "base-coverage"} and report.exit_code == 0
    text = message(report, "base-fused")
    assert text.startswith("16 modules of ") and "model.layers.0.self_attn.qkv_proj" in text
    shapes["num_key_value_heads"] = 4
    (tmp_path / "config.json").write_text(json.dumps(shapes))
    wider = ao.check(tmp_path / "a", base=tmp_path, jobs=1)
    assert message(wider, "base-shape").startswith("8 modules change a weight of 32 x 64")


def test_an_adapter_of_another_architecture(model: Path, tmp_path: Path) -> None:
    report = ao.check(gpt2().write(tmp_path / "a"), base=model, jobs=1)
    assert codes(report) == {"base-names"} and report.exit_code == 4


@pytest.mark.parametrize("head", [True, False], ids=["with head", "without head"])
def test_gpt2_keeps_its_weights_transposed(head: bool, tmp_path: Path) -> None:
    """Hub checkpoints of the bare model lack `transformer.`; square c_proj is said aloud."""
    folder = saved("gpt2", tmp_path / "gpt2", head=head, **GPT2)
    names = ao.check(gpt2().write(tmp_path / "a"), base=folder, jobs=1)
    assert codes(names) == {"base-coverage", "base-square"}
    assert message(names, "base-square").startswith("4 square weights of gpt2")
    wrong = ao.check(gpt2(fan_in_fan_out=False).write(tmp_path / "b"), base=folder, jobs=1)
    assert codes(wrong) == {"base-coverage", "base-orientation", "fan-in-fan-out"}
    assert "(in, out) in gpt2, 4 of them square" in message(wrong, "base-orientation")


def test_linear_weights_and_a_flag_that_says_otherwise(model: Path, tmp_path: Path) -> None:
    report = ao.check(llama(fan_in_fan_out=True).write(tmp_path / "a"), base=model, jobs=1)
    assert codes(report) == {"base-coverage", "base-orientation", "fan-in-fan-out"}


def vocabulary(draft: Draft, words: int) -> Draft:
    rng = np.random.default_rng(1)
    stem = f"{PREFIX}model.embed_tokens.lora_embedding_"
    draft.tensors[f"{stem}A"] = rng.standard_normal((4, words)).astype(np.float16)
    draft.tensors[f"{stem}B"] = (0.01 * rng.standard_normal((64, 4))).astype(np.float16)
    draft.config["target_modules"].append("embed_tokens")
    return draft


def test_embeddings_lie_the_other_way_round(model: Path, tmp_path: Path) -> None:
    fits = vocabulary(llama(target_modules=["q_proj", "v_proj", "down_proj"]), 96)
    assert codes(ao.check(fits.write(tmp_path / "a"), base=model, jobs=1)) == {"base-coverage"}
    grown = vocabulary(llama(target_modules=["q_proj", "v_proj", "down_proj"]), 100)
    report = ao.check(grown.write(tmp_path / "b"), base=model, jobs=1)
    assert "64 x 100, llama has 96 x 64" in message(report, "base-shape")


def test_tied_embeddings_are_named(tmp_path: Path) -> None:
    """The head has no weight of its own in such a checkpoint."""
    folder = saved("llama", tmp_path / "tied", **{**LLAMA, "tie_word_embeddings": True})
    draft = llama(target_modules=["q_proj", "v_proj", "down_proj", "lm_head"])
    rng = np.random.default_rng(1)
    for side, shape in (("A", (4, 64)), ("B", (96, 4))):
        x = 0.01 * rng.standard_normal(shape)
        draft.tensors[f"{PREFIX}lm_head.lora_{side}.weight"] = x.astype(np.float16)
    adapter = draft.write(tmp_path / "a")
    for path in (folder, folder / "config.json", folder / "model.safetensors"):
        report = ao.check(adapter, base=path, jobs=1)
        assert codes(report) == {"base-tied", "base-coverage"}, path
        assert message(report, "base-tied").startswith("lm_head: embedding and head are one")
    untouched = ao.check(llama().write(tmp_path / "b"), base=folder, jobs=1)
    assert codes(untouched) == {"base-coverage"}


def test_quantised_weights_are_not_compared(tmp_path: Path) -> None:
    packed = {f"model.layers.{n}.self_attn.q_proj": (64, 64) for n in range(2)}
    tensors: dict[str, np.ndarray] = {}
    for path in packed:
        tensors[f"{path}.qweight"] = np.zeros((8, 64), np.int64)
        tensors[f"{path}.scales"] = np.ones((1, 64), np.float16)
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.v_proj.weight"] = np.zeros((32, 64), np.float16)
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        tensors[name] = np.zeros((64, 128), np.float16)
        tensors[f"{name}_scale_inv"] = np.ones((1, 1), np.float32)
    file = write_file(tmp_path / "quantised.safetensors", tensors)
    report = ao.check(llama(layers=2).write(tmp_path / "a"), base=file, jobs=1)
    assert codes(report) == {"base-packed"}
    assert message(report, "base-packed").startswith("2 weights of quantised.safetensors")


def experts(folder: Path, out: int, columns: int, *parameters: str) -> Path:
    """PEFT target_parameters of three experts of rank 4; one pair, whatever is listed."""
    rng = np.random.default_rng(1)
    stem = f"{PREFIX}model.layers.0.mlp.experts"
    tensors = {
        f"{stem}.lora_A.weight": rng.standard_normal((12, columns)).astype(np.float16),
        f"{stem}.lora_B.weight": (0.01 * rng.standard_normal((out, 12))).astype(np.float16),
    }
    named = [f"mlp.experts.{name}" for name in parameters]
    config = {**(llama().config or {}), "target_modules": [], "target_parameters": named}
    return Draft(tensors, config).write(folder)


@pytest.mark.parametrize("root", ["model", "model.language_model"])
def test_experts_lie_either_way(root: str, tmp_path: Path) -> None:
    adapter = experts(tmp_path / "a", 64, 32, "gate_up_proj")
    for shape, fits in (((3, 64, 32), True), ((3, 32, 64), True), ((4, 64, 32), False)):
        weights = {f"{root}.layers.0.mlp.experts.gate_up_proj": np.zeros(shape, np.float16)}
        report = ao.check(adapter, base=write_file(tmp_path / "b.safetensors", weights), jobs=1)
        assert codes(report) == (set() if fits else {"base-shape"}), report.findings
        if not fits:
            assert message(report, "base-shape").startswith("3 modules change")


def test_experts_that_MLX_stacks_and_the_base_numbers(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    stem = "model.layers.0.mlp.switch_mlp.up_proj"
    tensors = {
        f"{stem}.lora_a": rng.standard_normal((3, 4, 32)).astype(np.float16),
        f"{stem}.lora_b": (0.01 * rng.standard_normal((3, 64, 4))).astype(np.float16),
    }
    config = {"model": "tiny", "lora_parameters": {"rank": 4, "scale": 2.0}}
    adapter = Draft(tensors, config).write(tmp_path / "a", "adapters.safetensors")
    numbered = {
        f"model.layers.0.mlp.experts.{n}.up_proj.weight": np.zeros((64, 32), np.float16)
        for n in range(3)
    }
    stacked = {f"{stem}.weight": np.zeros((3, 64, 32), np.float16)}
    for weights in (numbered, stacked):
        base_file = write_file(tmp_path / "b.safetensors", weights)
        assert codes(ao.check(adapter, base=base_file, jobs=1)) == set()
    del numbered["model.layers.0.mlp.experts.2.up_proj.weight"]
    base_file = write_file(tmp_path / "b.safetensors", numbered)
    assert codes(ao.check(adapter, base=base_file, jobs=1)) == {"base-module"}


def test_kohya_stems_find_the_weights_of_a_pipeline(tmp_path: Path) -> None:
    """The checkpoint's names are flattened; dots that the stems lost are never guessed."""
    rng = np.random.default_rng(1)
    paths = {
        "unet": [
            f"down_blocks.1.attentions.{n}.transformer_blocks.0.attn{k}.{leaf}"
            for n in range(2)
            for k in (1, 2)
            for leaf in ("to_q", "to_k", "to_v", "to_out.0")
        ],
        "text_encoder": [
            f"text_model.encoder.layers.{n}.self_attn.{leaf}"
            for n in range(6)
            for leaf in ("q_proj", "k_proj", "v_proj", "out_proj")
        ],
    }
    tensors: dict[str, np.ndarray] = {}
    for part, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_")):
        weights = {f"{path}.weight": np.zeros((32, 32), np.float16) for path in paths[part]}
        (tmp_path / "pipeline" / part).mkdir(parents=True)
        write_file(tmp_path / "pipeline" / part / "model.safetensors", weights)
        for path in paths[part]:
            stem = prefix + path.replace(".", "_")
            down = rng.standard_normal((4, 32)).astype(np.float16)
            tensors[f"{stem}.lora_down.weight"] = down
            tensors[f"{stem}.lora_up.weight"] = (down.T * np.float16(0.01)).copy()
            tensors[f"{stem}.alpha"] = np.array(4.0, np.float16)
    adapter = write_file(tmp_path / "x.safetensors", tensors)
    assert codes(ao.check(adapter, base=tmp_path / "pipeline", jobs=1)) == set()
    only = ao.check(adapter, base=tmp_path / "pipeline" / "unet", jobs=1)
    assert codes(only) == {"base-module"}
    assert message(only, "base-module").startswith("24 of 40 modules")


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_an_adapter_of_a_real_unet(dialect: str, tmp_path: Path) -> None:
    """Attention, projections and convolutions of a model that diffusers made, by its own names."""
    pytest.importorskip("diffusers")
    from tests.image_models import model as image_model

    unet = image_model("unet")
    unet.save_pretrained(tmp_path / "unet")
    rng = np.random.default_rng(1)
    tensors: dict[str, np.ndarray] = {}
    for name, x in unet.named_parameters():
        path = name.removesuffix(".weight")
        if path == name or x.ndim not in (2, 4) or "time_emb" in name:
            continue
        stem = f"unet.{path}" if dialect == "diffusers" else "lora_unet_" + path.replace(".", "_")
        down, up = ("lora_A", "lora_B") if dialect == "diffusers" else ("lora_down", "lora_up")
        A = rng.standard_normal((2, *x.shape[1:]))
        B = 0.01 * rng.standard_normal((x.shape[0], 2, *(1 for _ in x.shape[2:])))
        tensors[f"{stem}.{down}.weight"] = A.astype(np.float32)
        tensors[f"{stem}.{up}.weight"] = B.astype(np.float32)
    adapter = write_file(tmp_path / "x.safetensors", tensors)
    report = ao.check(adapter, base=tmp_path / "unet", jobs=1)
    assert codes(report) == {"base-coverage", "scale-assumed"}
    assert message(report, "base-coverage").endswith("not time_emb_proj, linear_*")


def test_flat_names_that_two_paths_share_find_nothing() -> None:
    names = basenames.index(["a.b_c", "a_b.c", "d.e"])
    assert names.flat["a_b_c"] == ("a.b_c", "a_b.c")
    assert names.flat["d_e"] == ("d.e",)


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("transformer.h.{}.attn", "h.{}.attn"),
        ("encoder.layer.{}.output", "roberta.encoder.layer.{}.output"),
        ("model.language_model.layers.{}.mlp", "language_model.model.layers.{}.mlp"),
        ("unet.down_blocks.{}.conv", "down_blocks.{}.conv"),
    ],
)
def test_heads_of_names_that_differ(here: str, there: str) -> None:
    other = [f"vision_tower.encoder.layers.{n}.fc" for n in range(3)]
    names = basenames.index([there.format(n) for n in range(3)] + other)
    head, _ = basenames.split(here.format(0))
    tails = [basenames.split(here.format(n))[1] for n in range(3)]
    found = basenames._renamed(head, tails, names)
    assert found == basenames.split(there.format(0))[0]


def test_ambiguous_heads_are_not_guessed() -> None:
    names = basenames.index(["a.layers.0.q", "b.layers.0.q"])
    assert basenames._renamed(("c", "layers"), ["0.q"], names) is None


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "mistral": SMALL,
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 24},
    "gemma": {**SMALL, "head_dim": 24},
    "gemma2": {**SMALL, "head_dim": 24},
    "phi3": {**SMALL, "pad_token_id": 0},
    "gpt2": {**GPT2, "n_inner": 80},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50},
    "gpt_neox": {**SMALL, "intermediate_size": 100},
    "bert": {**SMALL, "max_position_embeddings": 16},
    "roberta": {**SMALL, "max_position_embeddings": 16},
    "xlm-roberta": {**SMALL, "max_position_embeddings": 16},
    "camembert": {**SMALL, "max_position_embeddings": 16},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_shapes_by_config_are_those_of_transformers(kind: str) -> None:
    """Every weight named is there in that shape, and no linear layer of the blocks is left out."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    settings = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    with torch.device("meta"):
        causal = kind not in ("bert", "roberta", "xlm-roberta", "camembert")
        auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
        built = auto.from_config(settings)
    weights = {
        name.removesuffix(".weight"): tuple(x.shape)
        for name, x in built.named_parameters(remove_duplicate=False)
        if name.endswith(".weight")
    }
    shapes = baseconfig.shapes(json.loads(settings.to_json_string()), "config.json")
    assert set(baseconfig._LAYOUTS) == set(CONFIGS)
    assert {name: weights.get(name) for name in shapes} == shapes
    blocks = {n for n, shape in weights.items() if len(shape) == 2 and any(c.isdigit() for c in n)}
    assert blocks <= shapes.keys()


def test_bases_that_cannot_be_read(tmp_path: Path) -> None:
    adapter = llama().write(tmp_path / "a")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(UnsupportedError, match="mamba"):
        ao.check(adapter, base=tmp_path / "config.json", jobs=1)
    for config in ({}, {"hidden_size": "64"}, {**LLAMA, "num_hidden_layers": 10**9}):
        text = json.dumps({"model_type": "llama", **config})
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(FormatError, match="in the config is"):
            ao.check(adapter, base=tmp_path / "config.json", jobs=1)
    with pytest.raises(FileError):
        ao.check(adapter, base=tmp_path / "nothing", jobs=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="neither weights"):
        ao.check(adapter, base=tmp_path / "empty", jobs=1)


def test_the_base_is_read_anew_for_every_call(tmp_path: Path) -> None:
    adapter = llama().write(tmp_path / "a")
    where = tmp_path / "config.json"
    for heads, expected in ((2, set()), (4, {"base-shape"})):
        config = {"model_type": "llama", **LLAMA, "num_key_value_heads": heads}
        where.write_text(json.dumps(config))
        assert codes(ao.check(adapter, base=where, jobs=1)) - {"base-coverage"} == expected
    assert located.load.cache_info().maxsize == 1
