"""TensorRT-LLM, PyTorch backend, main at 1630fc3 (2026).

1.3 in the making. Releases up to 1.0 stopped at modules they do not map; this one logs and skips.
"""

from __future__ import annotations

import re

from adapterops.serving.model import Engine, Evidence, Row, Severity

_MODULES = """
    q_proj k_proj v_proj qkv_proj o_proj gate_proj up_proj gate_up_proj down_proj w1 w2 w3
    gate in_proj out_proj fc1_latent_proj fc2_latent_proj
"""

ENGINE = Engine(
    name="trtllm",
    title="TensorRT-LLM",
    version="main 1630fc3",
    dated="2026",
    read="2026-11-22",
    weights=("adapter_model.safetensors", "adapter_model.bin"),
    required=("r", "lora_alpha"),
    default_rank=64,
    rank_flag="lora_config.max_lora_rank",
    uniform_rank=True,
    scaling="tensor",
    rounds_scale=True,
    names=re.compile(r".*\.\d+\.\w+\.(\w+|\w+\.\w+|\w+\.\d+\.\w+)\.lora_[AB]\.weight"),
    named="….<n>.<block>.<module>.lora_A.weight",
    modules=frozenset(_MODULES.split()),
    slot_dtypes=("BF16", "F16", "F8_E4M3"),
)

_LORA = "tensorrt_llm/_torch/peft/lora/"
_LOAD = _LORA + "manager.py: load_from_hf"
_KEYS = _LORA + "loaders.py: iterate_hf_lora"
_FILES = _LORA + "loaders.py: HfLoraLoader"
_GRAPH = _LORA + "cuda_graph_lora_params.py: update_weight_pointers"
_UNREAD = "never reads it: "
_SKIPPED = "skips it, with one line in the log"


def _row(rule: str, severity: Severity, does: str, source: str, evidence: Evidence = "read") -> Row:
    return Row(ENGINE.name, ENGINE.version, rule, severity, does, source, evidence)


ROWS = (
    _row("dialect", "reject", "opens PEFT directories only", _FILES),
    _row("config-missing", "reject", "opens it first", _FILES),
    _row("config-key", "reject", "stops without it", _LOAD),
    _row("weights-file", "reject", "opens no other name", _FILES),
    _row("kind", "reject", "stops at their names (KeyError)", _KEYS),
    _row("adalora", "reject", "stops at their names (KeyError)", _KEYS),
    _row("merged-linear", "misread", "takes them for plain factors", _LOAD),
    _row("deltas", "reject", "stops at their names (KeyError)", _KEYS),
    _row(
        "dora",
        "misread",
        "takes magnitudes that its normalize_weights.py has divided by the norm of W + ΔW, which "
        "PEFT's are not",
        "examples/dora/README.md",
    ),
    _row("lora-bias", "reject", "stops at their names (KeyError)", _KEYS),
    _row("bias-tensors", "reject", "stops at their names (KeyError)", _KEYS),
    _row(
        "init-moved",
        "misread",
        _UNREAD + "the factors are added to a base they were not trained beside",
        _LOAD,
    ),
    _row("alora", "misread", _UNREAD + "the factors apply to every token", _LOAD),
    _row(
        "layer-replication",
        "misread",
        _UNREAD + "factors go to the layer of the same number",
        _LOAD,
    ),
    _row("bd-lora", "misread", _UNREAD + "block-diagonal factors are taken for whole", _LOAD),
    _row("qa-lora", "misread", _UNREAD + "grouped factors are taken for whole", _LOAD),
    _row("heads", "reject", "stops at their names (KeyError)", _KEYS),
    _row(
        "saved-embeddings",
        "misread",
        "gives all requests an lm_head that comes with the one lora_dir, and none one that comes "
        "later",
        "tensorrt_llm/_torch/models/modeling_utils.py: DecoderModelForCausalLM",
    ),
    _row("token-rows", "misread", "leaves out all names with embed_tokens or lm_head", _KEYS),
    _row("embedding-copy", "misread", "leaves out all names with embed_tokens or lm_head", _KEYS),
    _row("names", "reject", "stops at any other name (KeyError)", _KEYS),
    _row("embedding", "misread", "leaves out all names with embed_tokens or lm_head", _KEYS),
    _row("lm-head", "misread", "leaves out all names with embed_tokens or lm_head", _KEYS),
    _row("module", "misread", _SKIPPED + " (releases up to 1.0 stop)", _KEYS),
    _row("target-parameters", "misread", _SKIPPED, _KEYS),
    _row(
        "experts",
        "note",
        "takes experts named w1, w2, w3 on the CUTLASS backend, and counts gate_proj, up_proj and "
        "down_proj of experts as those of a dense layer",
        _KEYS,
    ),
    _row("rank-limit", "reject", "fails an assertion", _GRAPH),
    _row("rank-default", "note", "fails an assertion without it", _GRAPH),
    _row(
        "mixed-ranks",
        "misread",
        "takes the first module's rank for all of the adapter where CUDA graphs run",
        _GRAPH,
    ),
    _row(
        "fp8-rank",
        "reject",
        "wants multiples of 16 for FP8 factors on SM90 and SM100",
        _LORA + "manager.py: _validate_fp8_lora_alignment",
    ),
    _row("scale-patterns", "misread", "reads r of each tensor, but one lora_alpha", _LOAD),
    _row(
        "scale-rounding",
        "note",
        "multiplies it into B after the cast to the model's dtype: one more rounding, up to 0.2 % "
        "of a value in bfloat16, 0.05 % in float16",
        _LOAD,
    ),
)
