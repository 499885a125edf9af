"""LoRAX main a7394ba (2026-05-28) and TGI db931fc (2026-01-08), which took over its loader.

LoRAX pins peft 0.4.0 (`server/pyproject.toml`), whose LoraConfig knows no use_rslora and drops
unknown keys; TGI locks peft 0.14 or 0.15. Both pad where their SGMV kernels are installed, as in
their images; TGI takes the padding from a kernel package that was not read and is taken to be
LoRAX's. LoRAX keeps the config it has changed: an adapter that is dropped and loaded again is
scaled by the padded rank in its first module type too (read, not run).
"""

from __future__ import annotations

import re

from adapterops.serving.model import Engine, Evidence, Row, Severity

# Module types in the order of LoRAX's Llama; what other models call theirs is sorted in.
_ORDER = """
    q_proj k_proj v_proj query_key_value qkv_proj Wqkv c_attn o_proj out_proj dense gate_proj
    up_proj gate_up_proj down_proj fc1 fc2 dense_h_to_4h dense_4h_to_h w1 w2 c_fc c_proj lm_head
"""
_TGI_ORDER = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj qkv_proj c_proj c_fc"

LORAX = Engine(
    name="lorax",
    title="LoRAX",
    version="main a7394ba",
    dated="2026-05-28",
    read="2026-11-22",
    weights=("*.safetensors",),
    padding=(8, 16),
    fastest_rank=128,
    uniform_rank=True,
    prefix=True,
    scaling="padded",
    reads_rslora=False,
    rounds_scale=True,
    names=re.compile(r"base_model\.model\..+\.lora_[AB]\.weight"),
    named="base_model.model.<module>.lora_A.weight",
    modules=frozenset(_ORDER.split()),
    order=tuple(_ORDER.split()),
    every_layer=True,
    vocabulary_layers=frozenset({"lm-head"}),
    memory="adapters",
)

TGI = Engine(
    name="tgi",
    title="TGI",
    version="3.3.6-dev0 db931fc",
    dated="2026-01-08",
    read="2026-11-22",
    weights=("*.safetensors",),
    padding=(8, 16),
    fastest_rank=128,
    uniform_rank=True,
    prefix=True,
    scaling="padded",
    rounds_scale=True,
    names=re.compile(
        r"base_model\.model\.model\.layers\.\d+\.(self_attn|mlp)\.\w+\.lora_[AB]\.weight"
    ),
    named="base_model.model.model.layers.<n>.(self_attn|mlp).<module>.lora_A.weight",
    modules=frozenset(_TGI_ORDER.split()),
    order=tuple(_TGI_ORDER.split()),
    every_layer=True,
    memory="adapters",
)

_ROOTS = {"lorax": "lorax_server", "tgi": "text_generation_server"}
_SOURCES = {
    "lorax": {
        "load": "adapters/lora.py: LoraWeights.load",
        "names": "adapters/lora.py: map_weights_for_model",
        "config": "adapters/lora.py: LoraConfig.load",
        "files": "utils/sources/local.py: weight_files",
        "stack": "adapters/lora.py: LoraWeights.__init__",
        "fast": "adapters/lora.py: BatchLoraWeights.can_vectorize",
    },
    "tgi": {
        "load": "adapters/lora.py: prepare_weights",
        "names": "adapters/lora.py: map_weights_for_model",
        "config": "adapters/lora.py: LoraConfig.load",
        "files": "utils/hub.py: _weight_files_from_dir",
        "stack": "adapters/lora.py: LoraWeights.__init__",
        "fast": "adapters/lora.py: BatchLoraWeights.can_vectorize",
    },
}
_OUT = "leaves them out without a word"
_UNREAD = "never reads it: "

_SHARED: tuple[tuple[str, Severity, str, str, Evidence], ...] = (
    ("dialect", "reject", "opens PEFT directories only", "config", "read"),
    ("config-missing", "reject", "opens it first", "config", "read"),
    ("weights-file", "reject", "opens safetensors only", "files", "read"),
    ("adalora", "misread", _OUT + ": the base model answers", "names", "read"),
    ("merged-linear", "misread", "takes them for plain factors", "load", "read"),
    ("deltas", "misread", _OUT, "names", "read"),
    ("dora", "misread", "leaves the magnitudes out without a word", "names", "read"),
    ("lora-bias", "misread", _OUT, "names", "read"),
    ("bias-tensors", "misread", _OUT, "names", "read"),
    (
        "init-moved",
        "misread",
        _UNREAD + "the factors are added to a base they were not trained beside",
        "config",
        "read",
    ),
    ("alora", "misread", _UNREAD + "the factors apply to every token", "config", "read"),
    (
        "layer-replication",
        "misread",
        _UNREAD + "factors go to the layer of the same number",
        "config",
        "read",
    ),
    (
        "bd-lora",
        "misread",
        _UNREAD + "block-diagonal factors are taken for whole",
        "config",
        "read",
    ),
    ("qa-lora", "misread", _UNREAD + "grouped factors are taken for whole", "config", "read"),
    ("heads", "misread", _OUT + ": the base's own head answers", "names", "read"),
    ("saved-embeddings", "misread", _OUT, "names", "read"),
    ("token-rows", "misread", _OUT, "names", "read"),
    ("embedding-copy", "misread", _OUT, "names", "read"),
    ("names", "misread", _OUT, "names", "read"),
    ("embedding", "misread", _OUT, "names", "read"),
    ("module", "misread", _OUT, "names", "read"),
    ("target-parameters", "misread", _OUT, "names", "read"),
    ("experts", "misread", _OUT + ", and no model has experts there", "names", "read"),
    (
        "missing-layers",
        "misread",
        "leaves out a kind of module in all layers if one layer lacks it",
        "load",
        "run",
    ),
    (
        "mixed-type",
        "reject",
        "stacks the padded factors of all layers, which must have one shape",
        "stack",
        "run",
    ),
    (
        "rank-slow",
        "note",
        "has kernels up to rank 128 per GPU and loops over adapters above",
        "fast",
        "read",
    ),
    (
        "scale-padding",
        "misread",
        "sets the config's r to the padded rank of the module type just loaded, so that later "
        "types divide alpha by it",
        "load",
        "run",
    ),
    (
        "scale-patterns",
        "misread",
        "computes one alpha / r and reads neither rank_pattern nor alpha_pattern",
        "load",
        "run",
    ),
    (
        "scale-rounding",
        "note",
        "multiplies it into B after the cast to the model's dtype: one more rounding, up to 0.2 % "
        "of a value in bfloat16, 0.05 % in float16",
        "load",
        "read",
    ),
)


def _row(
    engine: Engine,
    rule: str,
    severity: Severity,
    does: str,
    where: str,
    evidence: Evidence = "read",
) -> Row:
    source = f"{_ROOTS[engine.name]}/{_SOURCES[engine.name][where]}"
    return Row(engine.name, engine.version, rule, severity, does, source, evidence)


LORAX_ROWS = (
    *(_row(LORAX, *shared) for shared in _SHARED),
    _row(LORAX, "kind", "misread", _OUT + ": the base model answers", "names"),
    _row(
        LORAX,
        "lm-head",
        "note",
        "serves it for Llama, Mistral, Qwen2 and others, not for Gemma, Mixtral or Phi-3",
        "names",
    ),
    _row(
        LORAX,
        "scale-rslora",
        "misread",
        "reads the config with peft 0.4.0, which knows no use_rslora, and computes alpha / r",
        "config",
        "run",
    ),
)
TGI_ROWS = (
    *(_row(TGI, *shared) for shared in _SHARED),
    _row(TGI, "kind", "reject", "finds no lora_alpha in such a config", "config"),
    _row(TGI, "lm-head", "misread", _OUT, "names"),
)
