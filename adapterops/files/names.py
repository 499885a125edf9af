"""What the files of one adapter are called, wherever they lie."""

from __future__ import annotations

CONFIG = "adapter_config.json"
# In a directory the first of these that is there is read.
WEIGHTS = (
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.bin",
    "adapters.safetensors",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Files beside an adapter that belong to it: engines read added tokens from there.
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def config_names(weights: str) -> tuple[str, ...]:
    """Where the config of a single weights file may lie, relative to the file's own folder."""
    stem = weights.rpartition(".")[0] or weights
    return f"{stem}.json", f"{stem}/{CONFIG}", CONFIG
