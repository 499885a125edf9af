"""Engine-legal outputs: what is added, what is refused, and what each engine then serves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterops import casts
from adapterops.basemodel import config as baseconfig
from adapterops.errors import AdapterOpsError, BudgetError, IncompatibleError, UsageError
from adapterops.formats import open_adapter_file, peft, peft_config, read_adapter
from adapterops.serving import ENGINES, judge
from adapterops.serving.legal import LegalForm, check, legal_form
from adapterops.serving.written import as_written
from tests.support import distance, load_file, save_file
from tests.test_serving import CASES, PREFIX, SHAPES, llama

Q, K, V, OUT = (f"self_attn.{x}_proj" for x in "qkvo")
GATE, UP, DOWN = (f"mlp.{x}_proj" for x in ("gate", "up", "down"))
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 99,
    "num_hidden_layers": 4,
}
BASE = baseconfig.shapes(LLAMA, "config.json")


def loha(folder: Path) -> Path:
    """q and v of two layers as Hadamard products of two pairs of rank 3."""
    rng = np.random.default_rng(3)
    tensors = {
        f"{PREFIX}model.layers.{layer}.{name}.hada_{w}_{side}": rng.standard_normal(shape)
        for layer in (0, 1)
        for name in (Q, V)
        for w in ("w1", "w2")
        for side, shape in (("a", (SHAPES[name][0], 3)), ("b", (3, 32)))
    }
    folder.mkdir(parents=True)
    path = folder / "adapter_model.safetensors"
    save_file({name: x.astype(np.float16) for name, x in tensors.items()}, path)
    config = {"peft_type": "LOHA", "r": 3, "alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def deltas(folder: Path) -> dict[str, np.ndarray]:
    """ΔW of every module, as PEFT reads the file."""
    file = open_adapter_file(folder)
    result = {}
    for stem, site in file.sites.items():
        B, A = site.factors()
        result[stem] = site.scale * (B @ A)
    return result


def form_of(folder: Path, engine: str, **options: Any) -> LegalForm:
    file = open_adapter_file(folder)
    modules = {stem: (site.shape, site.layer) for stem, site in file.sites.items()}
    return legal_form(engine, modules, file.dtype, **options)


def written(source: Path, out: Path, engine: str, **options: Any) -> LegalForm:
    """`source` in the legal form, by dense singular values."""
    file = open_adapter_file(source)
    form = form_of(source, engine, **options)
    rank = form.rank_for(file.rank)
    assert rank is not None
    whole = deltas(source) | {stem: np.zeros(shape) for stem, shape in form.fill.items()}
    tensors: dict[str, Any] = {}
    for stem, delta in whole.items():
        u, s, v = np.linalg.svd(delta, full_matrices=False)
        B, A = np.zeros((len(delta), rank)), np.zeros((rank, delta.shape[1]))
        k = min(rank, len(s))
        B[:, :k], A[:k] = u[:, :k] * np.sqrt(s[:k]), np.sqrt(s[:k, None]) * v[:k]
        for side, x in (("A", A), ("B", B)):
            tensors[peft.names(stem, "linear")[side]] = x
    sizes = dict.fromkeys(whole, (rank, float(rank)))
    config = peft_config.write_config(
        file.config, None, sizes, targets=sorted(whole), keep_extras=False, bias=False
    )
    described = {name: (form.dtype, x.shape) for name, x in tensors.items()}
    check(as_written(described, config), engine)
    out.mkdir()
    write_tensors(out / "adapter_model.safetensors", tensors, form.dtype)
    (out / "adapter_config.json").write_text(json.dumps(config))
    return form


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], dtype: str) -> None:
    """numpy has no bfloat16, so its codes are written as they are."""
    stored = {name: casts.store(x, dtype) for name, x in tensors.items()}
    header, data = {}, b""
    for name, x in stored.items():
        start, data = len(data), data + x.tobytes()
        header[name] = {"dtype": dtype, "shape": x.shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@dataclass(frozen=True)
class Served:
    """An adapter and the modules of zeros that each engine wants beside it (all others none).

    `sglang` are modules of layer 0 and 1, `layered` whole names for LoRAX, TGI and the profile.
    """

    name: str
    made: Mapping[str, Any]
    sglang: tuple[str, ...] = ()
    layered: tuple[str, ...] = ()
    base: bool = False
    other: Mapping[str, Any] = field(default_factory=dict)


def rank_of(module: str) -> int:
    return 3 if "q_proj" in module else 5


SPREAD = (
    Served("q and v", {"leaves": [Q, V]}, (K,)),
    Served("q and k", {"leaves": [Q, K]}, (V,)),
    Served("q without v", {"leaves": [Q]}, (V, K), base=True),
    Served("gate only", {"leaves": [GATE]}, (UP,)),
    Served("up and o", {"leaves": [OUT, UP]}, (GATE,)),
    Served("all", {"leaves": SHAPES}),
    Served(
        "mixed ranks",
        {"rank": rank_of, "rank_pattern": {"q_proj": 3}, "lora_alpha": 10},
    ),
    Served("rsLoRA", {"rank": 9, "use_rslora": True}),
    Served("alpha_pattern", {"rank": 4, "alpha_pattern": {"q_proj": 8, "down_proj": 1}}),
    Served(
        "a layer missing",
        {"layers": 3, "without": ("model.layers.1.mlp.up_proj", "model.layers.2.self_attn.q_proj")},
        layered=("model.layers.1.mlp.up_proj", "model.layers.2.self_attn.q_proj"),
        other={"sglang": ("model.layers.1.mlp.up_proj", "model.layers.2.self_attn.q_proj")},
    ),
    Served(
        "later layers only",
        {"layers": 3, "leaves": [DOWN], "without": ("model.layers.0.mlp.down_proj",)},
        layered=("model.layers.0.mlp.down_proj",),
    ),
    Served("float32", {"leaves": [Q, V], "dtype": np.float32}, (K,)),
    Served("LoHa", {}, (K,)),
)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", SPREAD, ids=lambda case: case.name)
def test_nothing_is_rejected_or_misread(tmp_path, case, engine):
    source = loha(tmp_path / "a") if case.name == "LoHa" else llama(tmp_path / "a", **case.made)
    base = {n: s for n, s in BASE.items() if "layers.0" in n or "layers.1" in n}
    form = written(source, tmp_path / "b", engine, base=base if case.base else None)
    file = read_adapter(tmp_path / "b")
    assert [o for o in judge(file, engine) if o.severity != "note"] == []
    own = deltas(source)
    assert set(form.fill) == zeros_of(case, engine)
    assert not any(file.sites[stem].factors()[0].any() for stem in form.fill)
    there = own | {stem: np.zeros(shape) for stem, shape in form.fill.items()}
    layers = 3 if "layers" in case.made else 2
    for reader in {
        "vllm": [by_config],
        "trtllm": [by_config],
        "sglang": [sglang],
        "lorax": [lorax],
        "tgi": [lorax],
        "portable": [by_config, sglang, lorax],
    }[engine]:
        assert distance(reader(tmp_path / "b", layers), there) < 0.01


def zeros_of(case: Served, engine: str) -> set[str]:
    if engine in ("vllm", "trtllm"):
        return set()
    if engine in case.other:
        return set(case.other[engine])
    grouped = {f"model.layers.{i}.{name}" for i in (0, 1) for name in case.sglang}
    return {
        "sglang": grouped,
        "portable": grouped | set(case.layered),
    }.get(engine, set(case.layered))


def pairs_of(folder: Path) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    found: dict[str, list[np.ndarray]] = {}
    for name, x in load_file(folder / "adapter_model.safetensors").items():
        stem, _, side = name.removesuffix(".weight").rpartition(".lora_")
        found.setdefault(stem.removeprefix(PREFIX), [x, x])["AB".index(side)] = x
    return config, found


def by_config(folder: Path, layers: int) -> dict[str, np.ndarray]:
    """One alpha over each tensor's rank, as vLLM and TensorRT-LLM without patterns."""
    config, found = pairs_of(folder)
    return {stem: config["lora_alpha"] / len(A) * (B @ A) for stem, (A, B) in found.items()}


def sglang(folder: Path, layers: int) -> dict[str, np.ndarray]:
    """One alpha / r; q is fused with v and gate with up (`lora/lora.py`, by its rules)."""
    config, found = pairs_of(folder)
    for stem in found:
        if stem.endswith("q_proj"):
            assert stem.replace("q_proj", "v_proj") in found
        if stem.endswith("up_proj"):
            assert stem.replace("up_proj", "gate_proj") in found
    assert {len(A) for A, _ in found.values()} == {config["r"]}
    scale = config["lora_alpha"] / config["r"]
    return {stem: scale * (B @ A) for stem, (A, B) in found.items()}


def lorax(folder: Path, layers: int) -> dict[str, np.ndarray]:
    """Types one after the other; r becomes the padded rank, types with gaps are left out."""
    config, found = pairs_of(folder)
    r, served = config["r"], {}
    for kind in [stem.partition("layers.0.")[2] for stem in found if "layers.0." in stem]:
        stems = [f"model.layers.{layer}.{kind}" for layer in range(layers)]
        if not all(stem in found for stem in stems):
            continue
        assert len({len(found[stem][0]) for stem in stems}) == 1
        for stem in stems:
            A, B = found[stem]
            served[stem] = config["lora_alpha"] / r * (B @ A)
        rank = len(found[stems[0]][0])
        r = 8 if rank <= 8 else -(-rank // 16) * 16
    return served


@pytest.mark.parametrize(
    "reader,made",
    [
        (sglang, {"rank": 4, "use_rslora": True}),
        (lorax, {"rank": 4, "lora_alpha": 4}),
        (lorax, {"rank": 24, "lora_alpha": 24}),
        (by_config, {"alpha_pattern": {"q_proj": 8}}),
    ],
    ids=["sglang rslora", "lorax 4", "lorax 24", "patterns"],
)
def test_the_readers_above_are_not_blind(tmp_path, reader, made):
    source = llama(tmp_path / "a", **made)
    assert distance(reader(source, 2), deltas(source)) > 0.1


@pytest.mark.parametrize("engine", ["lorax", "tgi", "portable"])
def test_all_layers_of_the_base_are_filled(tmp_path, engine):
    source = llama(tmp_path / "a", leaves=[DOWN], layers=2)
    form = form_of(source, engine, base=BASE)
    assert form.fill == {f"model.layers.{i}.mlp.down_proj": (32, 48) for i in (2, 3)}
    assert "added as zeros" in form.notes[0] and len(form.notes) == 1
    unknown = form_of(source, engine)
    assert unknown.fill == {} and "2 of model.layers" in unknown.notes[0]
    assert "--base" in unknown.notes[0] and "leaves out a kind of module" in unknown.notes[0]


def test_layers_that_the_base_has_without_such_a_module_stay_without(tmp_path):
    source = llama(tmp_path / "a", leaves=[DOWN], layers=2)
    base = {n: s for n, s in BASE.items() if n != "model.layers.3.mlp.down_proj"}
    assert set(form_of(source, "lorax", base=base).fill) == {"model.layers.2.mlp.down_proj"}


@pytest.mark.parametrize("head", ["layers", "language_model.model.layers", "other.blocks"])
def test_a_base_may_call_its_layers_otherwise(tmp_path, head):
    source = llama(tmp_path / "a", leaves=[Q], layers=2)
    base = {name.replace("model.layers", head): shape for name, shape in BASE.items()}
    form = form_of(source, "sglang", base=base)
    assert form.fill["model.layers.0.self_attn.v_proj"] == (16, 32)


def test_the_base_decides_where_layers_differ(tmp_path):
    """Layers of several widths: the shape of the others would be a guess."""
    base = dict(BASE)
    base["model.layers.1.mlp.up_proj"] = base["model.layers.1.mlp.gate_proj"] = (64, 32)
    source = llama(tmp_path / "a", leaves=[GATE, UP], without=("model.layers.1.mlp.up_proj",))
    assert form_of(source, "lorax").fill["model.layers.1.mlp.up_proj"] == (48, 32)
    wide = {"model.layers.0.mlp.gate_proj": ((48, 32), "linear")}
    wide |= {"model.layers.1.mlp.gate_proj": ((64, 32), "linear")}
    form = legal_form("portable", wide, "F16", base=base)
    assert form.fill["model.layers.1.mlp.up_proj"] == (64, 32)
    assert legal_form("portable", wide, "F16").fill["model.layers.1.mlp.up_proj"] == (64, 32)


def test_a_shape_that_differs_between_layers_is_no_guide():
    sizes = {0: (48, 32), 1: (64, 32)}
    modules = {f"model.layers.{i}.mlp.down_proj": (s, "linear") for i, s in sizes.items()}
    modules["model.layers.2.mlp.gate_proj"] = ((48, 32), "linear")
    with pytest.raises(IncompatibleError, match=r"layers\.2\.mlp\.down_proj.*--base"):
        legal_form("lorax", modules, "F16")


def test_a_base_that_keeps_its_weights_transposed():
    gpt2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 3, "vocab_size": 9}
    base = baseconfig.shapes(gpt2, "config.json")
    modules = {f"transformer.h.{i}.attn.c_attn": ((24, 8), "linear") for i in (0, 1)}
    form = legal_form("lorax", modules, "F16", base=base)
    assert form.fill == {"transformer.h.2.attn.c_attn": (24, 8)}


def test_a_shape_that_nothing_tells(tmp_path):
    source = llama(tmp_path / "a", leaves=[Q])
    for engine in ("sglang", "portable"):
        with pytest.raises(IncompatibleError) as caught:
            form_of(source, engine)
        text = str(caught.value)
        assert text.startswith("module model.layers.0.self_attn.v_proj: is not in the adapter")
        assert "SGLang 0.5.23 needs q and v together" in text and "--base" in text
    for engine in ("vllm", "trtllm", "lorax", "tgi"):
        assert form_of(source, engine).fill == {}
    kept = form_of(source, "sglang", base={**BASE, "model.layers.0.self_attn.q_proj": None})
    assert len(kept.fill) == 4


def test_a_base_with_other_modules_is_refused(tmp_path):
    source = llama(tmp_path / "a", leaves=[Q], layers=6)
    with pytest.raises(IncompatibleError, match=r"no stack of layers.*'model\.layers'.*--base"):
        form_of(source, "portable", base=BASE)
    twice = {**BASE, **{f"tower.{name}": shape for name, shape in BASE.items()}}
    twice |= {f"vision.{name}": shape for name, shape in BASE.items()}
    odd = {"text.layers.0.self_attn.q_proj": ((32, 32), "linear")}
    with pytest.raises(IncompatibleError, match="more than one stack"):
        legal_form("sglang", odd, "F16", base=twice)


def test_stacks_are_filled_each_by_itself():
    modules = {f"vision.layers.{i}.mlp.down_proj": ((8, 8), "linear") for i in (0, 3)}
    modules |= {f"model.layers.{i}.mlp.down_proj": ((6, 6), "linear") for i in (0, 1)}
    form = legal_form("lorax", modules, "BF16")
    assert form.fill == {f"vision.layers.{i}.mlp.down_proj": (8, 8) for i in (1, 2)}
    assert "4 of vision.layers, 2 of model.layers" in form.notes[1]


def test_only_ordinary_modules_that_are_served_count():
    """Vocabulary, convolutions, experts and unknown modules bring nothing with them."""
    modules = {
        "model.embed_tokens": ((8, 99), "embedding"),
        "lm_head": ((99, 8), "linear"),
        "model.layers.3.self_attn.q_proj": ((8, 8), "conv"),
        "model.layers.3.mlp.experts[1]": ((8, 8), "linear"),
        "model.layers.3.mlp.experts.1.gate_proj": ((8, 8), "linear"),
        "model.layers.3.mlp.router": ((8, 8), "linear"),
    }
    for engine in ("sglang", "lorax", "tgi"):
        form = legal_form(engine, modules, "F16")
        assert form.fill == {} and form.notes == ()


RANKS = {
    "vllm": {1: 1, 24: 24, 512: 512, 513: None},
    "sglang": {5: 5, 700: 700},
    "lorax": {5: 8, 16: 16, 24: 32},
    "trtllm": {5: 5},
    "portable": {5: 8, 24: 32, 128: 128, 129: None},
}


@pytest.mark.parametrize("engine", RANKS)
def test_ranks(engine):
    form = LegalForm(ENGINES[engine], {}, "F16", ())
    assert {needed: form.rank_for(needed) for needed in RANKS[engine]} == RANKS[engine]


def test_a_rank_that_is_too_large_names_what_is_possible():
    vllm = LegalForm(ENGINES["vllm"], {}, "F16", ())
    error = vllm.beyond(600, asked=True)
    assert isinstance(error, UsageError)
    assert str(error) == (
        "rank 600 is more than vLLM 0.33.0 serves; the largest is --rank 512 (--max-lora-rank 512)"
    )
    error = LegalForm(ENGINES["portable"], {}, "F16", ()).beyond(200)
    assert isinstance(error, BudgetError)
    assert "--rank 128 (of 8, 16, 32, 64, 128)" in str(error)


@pytest.mark.parametrize("engine", ENGINES)
def test_number_formats(engine):
    modules = {"model.layers.0.self_attn.o_proj": ((8, 8), "linear")}
    for dtype in ("F16", "BF16"):
        form = legal_form(engine, modules, dtype)
        assert form.dtype == dtype and not any("float" in note for note in form.notes)
    kept = legal_form(engine, modules, "F32")
    chosen = legal_form(engine, modules, "F32", keep=False)
    assert chosen.dtype == "F32"
    assert "when they are loaded" in chosen.notes[-1] and "--dtype bfloat16" in chosen.notes[-1]
    if engine == "portable":
        assert kept.dtype == "BF16" and "float32 is stored as bfloat16" in kept.notes[-1]
    else:
        assert kept == chosen


def header_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (ref.dtype, ref.shape) for name, ref in read_adapter(folder).tensors.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)
def test_an_output_is_judged_as_the_file_would_be(tmp_path, case):
    made = case.write(tmp_path / "a", **case.trips)
    file = read_adapter(made, allow_pickle=True)
    described = {name: (ref.dtype, ref.shape) for name, ref in file.tensors.items()}
    named = {"weights_file": Path(file.weights_file).name, "side_files": file.side_files}
    config_file = file.config_file and Path(file.config_file).name
    try:
        draft = as_written(described, file.config, config_file=config_file, **named)
    except AdapterOpsError as error:
        assert error.message in [problem.message for problem in file.problems]
        return
    for engine in ENGINES:
        assert judge(draft, engine) == judge(file, engine)


REFUSED = {
    "embedding": (
        {
            "extra": {
                f"{PREFIX}model.embed_tokens.lora_embedding_A": (16, 99),
                f"{PREFIX}model.embed_tokens.lora_embedding_B": (32, 16),
            },
            "target_modules": ["embed_tokens", *(name.partition(".")[2] for name in SHAPES)],
        },
        dict.fromkeys(("lorax", "tgi", "trtllm", "portable"), "embedding"),
        ("model.embed_tokens: factors over 99 tokens", "--modules", "bake"),
    ),
    "lm_head": (
        {"leaves": {**SHAPES, "/lm_head": (99, 32)}},
        {"tgi": "lm-head", "trtllm": "lm-head", "portable": "lm-head"},
        ("lm_head", "--modules", "bake"),
    ),
    "a module that is not served": (
        {"leaves": {**SHAPES, "mlp.router": (4, 32)}},
        {"sglang": "module", "lorax": "module", "tgi": "module", "trtllm": "module"},
        ("mlp.router", "--modules"),
    ),
    "a head": (
        {"extra": {f"{PREFIX}score.weight": (3, 32)}, "modules_to_save": ["score"]},
        {"sglang": "heads", "lorax": "heads", "tgi": "heads", "trtllm": "heads"},
        ("score.weight", "--extras drop", "bake"),
    ),
    "lora_bias": (
        {"extra": {f"{PREFIX}model.layers.0.{Q}.lora_B.bias": (32,)}, "lora_bias": True},
        dict.fromkeys(ENGINES, "lora-bias"),
        ("lora_B has a bias", "bake"),
    ),
    "experts": (
        {"leaves": {**SHAPES, "mlp.experts.0.w1": (8, 32)}},
        {"lorax": "experts", "tgi": "experts"},
        ("experts", "PEFT"),
    ),
    "an expression for the targets": (
        {"target_modules": ".*_proj"},
        {"sglang": "target-modules", "portable": "target-modules"},
        (".*_proj",),
    ),
}


@pytest.mark.parametrize("made,engines,words", REFUSED.values(), ids=REFUSED)
def test_what_an_engine_cannot_serve_is_refused_by_name(tmp_path, made, engines, words):
    folder = llama(tmp_path / "a", **made)
    config = json.loads((folder / "adapter_config.json").read_text())
    draft = as_written(header_of(folder), config)
    for engine in engines:
        with pytest.raises(IncompatibleError) as caught:
            check(draft, engine)
        text = str(caught.value)
        assert text.startswith(f"--engine {engine}: ") and all(word in text for word in words), text
        assert engines[engine] in {o.rule for o in judge(draft, engine)}
    if "vllm" not in engines:
        check(draft, "vllm")


def test_one_file_is_no_output_for_an_engine(tmp_path):
    header = header_of(llama(tmp_path / "a"))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    draft = as_written(header, config, weights_file="x.safetensors", config_file=None)
    for engine in ENGINES:
        with pytest.raises(IncompatibleError, match=r"'x\.safetensors'|no config beside"):
            check(draft, engine)


def test_notes_name_the_flag_and_the_gpus(tmp_path):
    made = llama(tmp_path / "a", leaves=dict.fromkeys(SHAPES, (96, 96)), rank=32, lora_alpha=32)
    config = json.loads((made / "adapter_config.json").read_text())
    draft = as_written(header_of(made), config)
    assert "start it with --max-lora-rank 32" in check(draft, "vllm")[0]
    assert check(draft, "sglang") == check(draft, "trtllm") == ()
    (note,) = check(draft, "lorax")
    assert "on 8 GPUs" in note and "--rank 64" in note


def test_an_unknown_engine():
    with pytest.raises(UsageError, match="'ollama': expected one of vllm"):
        legal_form("ollama", {}, "F16")
