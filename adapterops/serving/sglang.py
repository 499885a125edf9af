"""SGLang 0.5.23, the wheel of 2026-10-30."""

from __future__ import annotations

import re
from types import MappingProxyType

from adapterops.serving.model import Engine, Evidence, Row, Severity

_MODULES = """
    q_proj k_proj v_proj qkv_proj o_proj out_proj gate_proj up_proj gate_up_proj down_proj
    in_proj in_proj_q in_proj_k in_proj_v in_proj_z in_proj_qkvz x_proj q_a_proj q_b_proj
    kv_a_proj_with_mqa kv_b_proj fused_qkv_a_proj_with_mqa wq_b wk weights_proj wq_du wk_dv
    wv_dv wr_du qkvr wo_ud fc1_latent_proj fc2_latent_proj
"""

ENGINE = Engine(
    name="sglang",
    title="SGLang",
    version="0.5.23",
    dated="2026-10-30",
    read="2026-11-22",
    weights=("*.safetensors", "*.bin", "*.pt"),
    required=("peft_type", "r", "lora_alpha", "target_modules"),
    rank_flag="--max-lora-rank",
    uniform_rank=True,
    scaling="global",
    reads_rslora=False,
    names=re.compile(r".*layers\.\d+\..+"),
    named="….layers.<n>.<module>.lora_A.weight",
    modules=frozenset(_MODULES.split()),
    siblings=MappingProxyType(
        {
            "q_proj": ("v_proj",),
            "k_proj": ("q_proj", "v_proj"),
            "v_proj": ("q_proj",),
            "up_proj": ("gate_proj",),
        }
    ),
    vocabulary_layers=frozenset({"embedding", "lm-head"}),
    fill=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    memory="slots",
)

_ADAPTER = "lora/lora.py: LoRAAdapter"
_WEIGHTS = "lora/lora.py: _process_weight"
_VALIDATE = "lora/lora_manager.py: validate_new_adapter"
_CONFIG = "lora/lora_config.py: LoRAConfig"
_BUFFER = "lora/mem_pool.py: load_lora_weight_to_buffer"
_TARGETS = "lora/utils.py: get_normalized_target_modules"
_OTHER_BASE = "never reads it: the factors are added to a base they were not trained beside"
_ASSERTS = "fails an assertion on their shape when the adapter is first used"


def _row(rule: str, severity: Severity, does: str, source: str, evidence: Evidence = "read") -> Row:
    return Row(ENGINE.name, ENGINE.version, rule, severity, does, f"sglang/srt/{source}", evidence)


ROWS = (
    _row("dialect", "reject", "opens PEFT directories only", _CONFIG),
    _row("config-missing", "reject", "opens it first", _CONFIG),
    _row("config-key", "reject", "stops without it", _CONFIG),
    _row(
        "weights-file",
        "reject",
        "opens files that end in .safetensors, .bin or .pt",
        "model_loader/loader.py: _prepare_weights",
    ),
    _row("kind", "reject", "asserts that peft_type is LORA", _ADAPTER),
    _row("adalora", "reject", "asserts that peft_type is LORA", _ADAPTER),
    _row("merged-linear", "reject", _ASSERTS, _BUFFER),
    _row("deltas", "reject", "takes them for B factors, or stops at their names", _BUFFER),
    _row("dora", "reject", "stops at use_dora", _VALIDATE),
    _row("lora-bias", "reject", _ASSERTS, _BUFFER),
    _row("bias-tensors", "reject", "takes them for B factors, or stops at their names", _BUFFER),
    _row("init-moved", "misread", _OTHER_BASE, _CONFIG),
    _row("alora", "misread", "never reads it: the factors apply to every token", _CONFIG),
    _row(
        "layer-replication",
        "misread",
        "never reads it: factors go to the layer of the same number, and it stops where there is "
        "none",
        _CONFIG,
    ),
    _row("bd-lora", "reject", _ASSERTS, _BUFFER),
    _row("qa-lora", "reject", _ASSERTS, _BUFFER),
    _row("heads", "misread", "leaves them out: the base's own head answers", _WEIGHTS, "run"),
    _row(
        "saved-embeddings",
        "misread",
        "leaves them out: the base's own rows are used",
        _WEIGHTS,
        "run",
    ),
    _row("token-rows", "misread", "leaves them out: the base's own rows are used", _WEIGHTS),
    _row("embedding-copy", "misread", "leaves them out: the base's own rows are used", _WEIGHTS),
    _row(
        "added-tokens",
        "note",
        "stops if one of its ids is not below the base's vocabulary size",
        _VALIDATE,
    ),
    _row("names", "misread", "leaves out tensors without a layer number", _WEIGHTS, "run"),
    _row("untargeted", "misread", "leaves it out unless target_modules lists it", _WEIGHTS, "run"),
    _row(
        "module",
        "reject",
        "has no buffer for it, unless the model's class adds one",
        "lora/utils.py: get_default_hidden_dim",
    ),
    _row(
        "target-parameters",
        "reject",
        "finds no target in such names when the adapter is first used",
        _BUFFER,
        "run",
    ),
    _row(
        "target-modules",
        "reject",
        "takes a list of names, all or all-linear",
        _TARGETS,
        "run",
    ),
    _row(
        "siblings",
        "reject",
        "needs q and v together, and gate with up: KeyError on load, or ValueError when the "
        "adapter is first used",
        "lora/lora.py: normalize_qkv_proj, normalize_gate_up_proj",
        "run",
    ),
    _row("rank-limit", "reject", "stops", "lora/mem_pool.py: can_support"),
    _row(
        "mixed-ranks",
        "reject",
        "expects the config's r of every tensor and fails an assertion when the adapter is first "
        "used; rank_pattern is never read",
        _BUFFER,
    ),
    _row(
        "scale-rslora",
        "misread",
        "computes lora_alpha / r and never reads use_rslora (issue 40835, open on 2026-09-23)",
        _ADAPTER,
        "run",
    ),
    _row(
        "scale-patterns",
        "misread",
        "computes one lora_alpha / r and never reads alpha_pattern",
        _ADAPTER,
        "run",
    ),
)
