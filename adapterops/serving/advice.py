"""What to do about a finding, whatever the engine."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_OUT_OR_BAKE = "leave them out with --extras drop, or bake them into the base"
_ONE_RANK = "write it anew at one rank: merge --rank same"
_FOLD = "merge --rank same writes it anew with alpha = rank, the scale folded into the factors"
_CONVERT_INIT = "convert --base makes an ordinary LoRA of it"

WAYS_OUT: Mapping[str, str] = MappingProxyType(
    {
        "dialect": "write it anew with merge --to peft, if its modules have names there",
        "config-missing": "put it there, or write the adapter anew with merge into a directory",
        "config-key": "add it, or write the adapter anew with merge",
        "weights-file": "write it anew with merge into a directory",
        "kind": "write it anew as a plain LoRA with merge",
        "adalora": "write it anew as a plain LoRA with merge",
        "merged-linear": "write it anew as a plain LoRA with merge",
        "deltas": "bake it into the base",
        "dora": "convert --base makes a LoRA of it, at the rank or the error asked for",
        "lora-bias": "bake it into the base, or serve it with PEFT",
        "bias-config": _OUT_OR_BAKE,
        "bias-tensors": _OUT_OR_BAKE,
        "init": _CONVERT_INIT,
        "init-moved": _CONVERT_INIT,
        "alora": "serve it with PEFT, which knows aLoRA",
        "layer-replication": "bake it into the replicated model and serve that",
        "bd-lora": "serve it with PEFT, which knows BD-LoRA",
        "qa-lora": "serve it with PEFT, which knows QALoRA",
        "modules-to-save": _OUT_OR_BAKE,
        "heads": _OUT_OR_BAKE,
        "saved-embeddings": _OUT_OR_BAKE,
        "token-rows": _OUT_OR_BAKE,
        "embedding-copy": _OUT_OR_BAKE,
        "added-tokens": "remove the file if the base has these tokens; bake the adapter if not",
        "names": "write it anew with merge --to peft",
        "embedding": "leave it out with --modules, or bake it into the base",
        "lm-head": "leave it out with --modules, or bake it into the base",
        "untargeted": "add it to target_modules",
        "vocabulary": "leave it out with --modules, or bake it into the base",
        "conv": "bake it into the base",
        "module": "leave it out with --modules, or bake it into the base",
        "target-parameters": "bake it into the base if the model's experts are not served",
        "experts": "compare one answer with PEFT's before serving it",
        "target-modules": "list the modules' names there",
        "siblings": "compress --engine adds the missing module with zero factors",
        "missing-layers": "compress --engine adds the missing ones with zero factors",
        "rank-limit": "raise the limit, or lower the rank: merge --rank",
        "rank-cap": "lower the rank: merge --rank",
        "mixed-ranks": _ONE_RANK,
        "mixed-type": _ONE_RANK,
        "rank-slow": "lower the rank if it is too slow: merge --rank",
        "fp8-rank": "store it in bfloat16: merge --dtype bfloat16",
        "scale-rslora": _FOLD,
        "scale-patterns": _FOLD,
        "scale-padding": "write it anew at a rank that is not padded: merge --rank",
        "scale-rounding": _FOLD,
        "rank-portable": "write it anew at one of them: merge --rank",
        "dtype": "store it in one of them: merge --dtype bfloat16",
    }
)
