"""vLLM 0.33.0, the wheel of 2026-11-01."""

from __future__ import annotations

import re

from adapterops.serving.model import Engine, Evidence, Row, Severity

ENGINE = Engine(
    name="vllm",
    title="vLLM",
    version="0.33.0",
    dated="2026-11-01",
    read="2026-11-22",
    weights=("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt"),
    required=("r", "lora_alpha", "target_modules"),
    slots=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    default_rank=16,
    rank_flag="--max-lora-rank",
    rounds_scale=True,
    inits=frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"}),
    names=re.compile(r".+\.lora_[AB]\.weight"),
    named="<module>.lora_A.weight",
    vocabulary_layers=frozenset({"embedding", "lm-head"}),
    heads=re.compile(r"(.+\.)?(score|classifier)\.(weight|bias)"),
    max_vocabulary=258_048,
    memory="slots",
)

_HELPER = "lora/peft_helper.py: "
_VALIDATE = _HELPER + "_validate_features"
_INIT = _HELPER + "_init_is_supported"
_LOAD = "lora/lora_model.py: from_local_checkpoint"
_PARSE = "lora/utils.py: parse_fine_tuned_lora_name"


def _row(rule: str, severity: Severity, does: str, source: str, evidence: Evidence = "read") -> Row:
    return Row(ENGINE.name, ENGINE.version, rule, severity, does, f"vllm/{source}", evidence)


ROWS = (
    _row("dialect", "reject", "opens PEFT directories only", _LOAD),
    _row("config-missing", "reject", "opens it first", _HELPER + "from_local_dir"),
    _row("config-key", "reject", "stops without it", _HELPER + "from_dict", "run"),
    _row("weights-file", "reject", "opens no other name", _LOAD),
    _row("kind", "reject", "stops at their names or shapes", _PARSE),
    _row("adalora", "reject", "stops at their names", _PARSE, "run"),
    _row("merged-linear", "reject", "cannot copy such a B into its slot", _LOAD),
    _row("deltas", "reject", "stops at their names", _PARSE),
    _row("dora", "reject", "stops at DoRA", _VALIDATE, "run"),
    _row("lora-bias", "reject", "stops at lora_bias", _VALIDATE, "run"),
    _row("bias-config", "reject", "takes none only", _HELPER + "validate_legal", "run"),
    _row(
        "init",
        "reject",
        "takes true, false, gaussian, eva, orthogonal, mica and lora_ga",
        _INIT,
        "run",
    ),
    _row(
        "init-moved",
        "misread",
        "takes it for a plain LoRA, as PEFT does, but its factors were trained beside a base that "
        "the initialisation had changed",
        _INIT,
        "run",
    ),
    _row("alora", "reject", "stops at it", _VALIDATE, "run"),
    _row("layer-replication", "reject", "stops at it", _VALIDATE, "run"),
    _row("bd-lora", "reject", "stops at it", _VALIDATE, "run"),
    _row("qa-lora", "reject", "stops at it", _VALIDATE, "run"),
    _row("modules-to-save", "reject", "takes classifier and score only", _VALIDATE, "run"),
    _row(
        "heads", "reject", "takes only score and classifier with a weight and bias", _PARSE, "run"
    ),
    _row("saved-embeddings", "reject", "stops at such names", _PARSE, "run"),
    _row("token-rows", "reject", "stops at such names", _PARSE, "run"),
    _row(
        "embedding-copy",
        "misread",
        "skips them: rows that were trained or added are lost",
        "lora/utils.py: is_base_embedding_weights",
    ),
    _row("names", "reject", "stops at any other name", _PARSE, "run"),
    _row("conv", "reject", "prepares linear and embedding layers only", _LOAD),
    _row(
        "vocabulary",
        "reject",
        "prepares lm_head for at most 258048 tokens",
        "lora/layers/logits_processor.py: create_lora_weights",
    ),
    _row(
        "target-parameters",
        "note",
        "takes fused experts only for models whose experts it holds as one 3-D weight, or with "
        "is_3d_lora_weight on the request",
        "lora/model_manager.py: _stack_moe_lora_weights",
    ),
    _row(
        "experts",
        "note",
        "needs gate, up and down of every expert, each projection at one rank",
        "lora/lora_weights.py: pack_moe",
    ),
    _row("rank-limit", "reject", "stops", _HELPER + "validate_legal", "run"),
    _row("rank-default", "note", "stops without the flag", _HELPER + "validate_legal", "run"),
    _row("rank-cap", "reject", "has no larger slot", "config/lora.py: MaxLoRARanks"),
    _row(
        "rank-slot",
        "note",
        "reserves memory for ranks 1, 8, 16, 32, 64, 128, 256, 320 and 512 only",
        "config/lora.py: MaxLoRARanks",
    ),
    _row(
        "scale-rounding",
        "note",
        "multiplies it into B after the cast to the model's dtype: one more rounding, up to 0.2 % "
        "of a value in bfloat16, 0.05 % in float16",
        "lora/lora_weights.py: optimize",
    ),
)
