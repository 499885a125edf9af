"""How each engine is started for a deployment: environment, command line, files.

Read in vLLM's `plugins/lora_resolvers/filesystem_resolver.py` and `entrypoints/openai/models/
serving.py: resolve_lora` (the base name that it compares is the model as it was given to `vllm
serve`), SGLang's `server_args.py`, the launchers of LoRAX and TGI, and TensorRT-LLM's LoRA page.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adapterops.errors import UsageError
from adapterops.fleet.deploy.report import Launch
from adapterops.serving.model import Engine

# TensorRT-LLM's names of modules (`lora_helper.py: get_default_trtllm_modules_to_hf_modules`).
_TRTLLM = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "o_proj": "attn_dense",
    "gate_proj": "mlp_h_to_4h",
    "up_proj": "mlp_gate",
    "down_proj": "mlp_4h_to_h",
    "gate_up_proj": "mlp_gate_up",
    "w1": "moe_h_to_4h",
    "w2": "moe_4h_to_h",
    "w3": "moe_gate",
    "gate": "moe_router",
}
_CONFIG = "trtllm.yaml"


@dataclass(frozen=True, slots=True)
class Fleet:
    """What flags depend on: base name, folder, adapters in load order, the largest rank, modules.

    `slots` adapters are in one batch, `cached` in the memory of the host; `targets` are the last
    parts of the names of all modules that some adapter changes.
    """

    base: str
    folder: str
    names: Sequence[str]
    rank: int
    targets: Sequence[str]
    slots: int
    cached: int


def launch(engine: Engine, fleet: Fleet) -> Launch:
    """How `engine` is started for the adapters of `fleet`; nothing for the portable profile.

    Raises UsageError for a folder that its command line cannot name.
    """
    return _ENGINES[engine.name](engine, fleet)


def _vllm(engine: Engine, fleet: Fleet) -> Launch:
    rank = engine.slot_rank(fleet.rank) or fleet.rank
    return Launch(
        {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_PLUGINS": "lora_filesystem_resolver",
            "VLLM_LORA_RESOLVER_CACHE_DIR": fleet.folder,
        },
        (
            *("vllm", "serve", fleet.base, "--enable-lora"),
            *("--max-lora-rank", str(rank), "--max-loras", str(fleet.slots)),
            *("--max-cpu-loras", str(fleet.cached), "--lora-target-modules", *fleet.targets),
        ),
        {},
        (
            f"vLLM finds an adapter only if its base_model_name_or_path is the model exactly as "
            f"`vllm serve` is given it, here {fleet.base!r}; --served-model-name does not count",
            "VLLM_PLUGINS lists all plugins that are loaded; add the names of others you use",
            "where VLLM_LORA_RESOLVER_CACHE_DIR is a link to this folder, turning the link serves "
            "the next deployment without a restart, unless its flags differ",
        ),
    )


def _sglang(engine: Engine, fleet: Fleet) -> Launch:
    loaded = fleet.names[: fleet.cached]
    paths = [f"{name}={os.path.join(fleet.folder, name)}" for name in loaded]
    rest = len(fleet.names) - len(loaded)
    notes = (f"{rest} more are loaded with POST /load_lora_adapter when they are needed",)
    return Launch(
        {},
        (
            *("python", "-m", "sglang.launch_server", "--model-path", fleet.base, "--enable-lora"),
            *("--max-lora-rank", str(fleet.rank), "--max-loras-per-batch", str(fleet.slots)),
            *("--max-loaded-loras", str(fleet.cached)),
            *("--lora-target-modules", *fleet.targets, "--lora-paths", *paths),
        ),
        {},
        notes if rest else (),
    )


def _lorax(engine: Engine, fleet: Fleet) -> Launch:
    first = [os.path.join(fleet.folder, name) for name in fleet.names[: fleet.slots]]
    preloaded = [word for path in first for word in ("--preloaded-adapter-ids", path)]
    return Launch(
        {},
        (
            *("lorax-launcher", "--model-id", fleet.base, "--adapter-source", "local"),
            *("--max-active-adapters", str(fleet.slots), *preloaded),
        ),
        {},
        (
            "LoRAX knows no cache_salt: leave --prefix-caching off where tenants share an adapter",
            "--adapter-memory-fraction (0.1 of the GPU) must hold the adapters that are active",
        ),
    )


def _tgi(engine: Engine, fleet: Fleet) -> Launch:
    if "," in fleet.folder:
        raise UsageError(
            f"the output {fleet.folder!r} has a comma, which separates paths in LORA_ADAPTERS",
            hint="choose another name",
        )
    paths = [f"{name}={os.path.join(fleet.folder, name)}" for name in fleet.names]
    return Launch(
        {"LORA_ADAPTERS": ",".join(paths)},
        ("text-generation-launcher", "--model-id", fleet.base),
        {},
        (
            "TGI loads all adapters at the start and takes no others",
            "TGI's launcher turns prefix caching off beside adapters; do not turn it on, for "
            "there is no cache_salt",
        ),
    )


def _trtllm(engine: Engine, fleet: Fleet) -> Launch:
    known = [_TRTLLM[name] for name in fleet.targets if name in _TRTLLM]
    unknown = [name for name in fleet.targets if name not in _TRTLLM]
    lines = [  # JSON's strings and lists are YAML's
        "lora_config:",
        f"  max_lora_rank: {fleet.rank}",
        f"  max_loras: {fleet.slots}",
        f"  max_cpu_loras: {fleet.cached}",
        f"  lora_target_modules: {json.dumps(known)}",
    ]
    notes = ["older releases call --config --extra_llm_api_options"]
    if unknown:
        notes.append(f"add what TensorRT-LLM calls {', '.join(unknown)} to lora_target_modules")
    return Launch(
        {},
        ("trtllm-serve", fleet.base, "--config", os.path.join(fleet.folder, _CONFIG)),
        {_CONFIG: "\n".join(lines) + "\n"},
        tuple(notes),
    )


def _portable(engine: Engine, fleet: Fleet) -> Launch:
    note = "all engines serve these files; deploy --engine NAME prints the flags of one of them"
    return Launch({}, (), {}, (note,))


_ENGINES: dict[str, Callable[[Engine, Fleet], Launch]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "lorax": _lorax,
    "tgi": _tgi,
    "trtllm": _trtllm,
    "portable": _portable,
}


def cached(sizes: Sequence[int], slots: int, memory: int) -> int:
    """How many adapters of these bytes, in load order, fit into `memory` of the host.

    At least `slots`, as engines demand.
    """
    count, taken = 0, 0
    for size in sizes:
        if taken + size > memory:
            break
        count, taken = count + 1, taken + size
    return max(count, slots)
