"""Tiny torch models, adapters that PEFT saves on them, and what PEFT reads back from a file."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_NOISE = (
    "fan_in_fan_out is set to",  # PEFT's own correction of a flag that it set itself
    ".*LoRA tensor\\(s\\) have invalid shape.*bias",  # it takes lora_bias for a broken factor
    "Could not find a config file",  # the base of a tiny model is no folder on the hub
    "Setting `save_embedding_layers`",  # it copies an adapted embedding's base weight along
    "`is_gradient_checkpointing` is deprecated",  # PEFT asks transformers for it
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """PEFT's warnings that say nothing about the file; all others are errors."""
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        yield


def base(kind: str = "tiny") -> Any:
    """A model with fixed random weights."""
    import torch

    torch.manual_seed(1)
    if kind == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                vocab_size=32,
                tie_word_embeddings=False,
            )
        ).eval()
    if kind == "classifier":
        from transformers import RobertaConfig, RobertaForSequenceClassification

        return RobertaForSequenceClassification(
            RobertaConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                vocab_size=32,
                max_position_embeddings=16,
            )
        ).eval()
    return _tiny().eval()


def _tiny() -> Any:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    class Tiny(nn.Module):
        """One of each layer that PEFT adapts; `forward` takes token ids (n,)."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(32, 12)
            self.linear = nn.Linear(12, 12)
            self.square = Conv1D(12, 12)
            self.wide = Conv1D(24, 12)
            self.conv1 = nn.Conv1d(24, 16, 3, padding=1)
            self.conv2 = nn.Conv2d(4, 16, (3, 2), padding=1)
            self.point = nn.Conv2d(16, 16, 1)
            self.conv3 = nn.Conv3d(4, 6, 2)
            self.mha = nn.MultiheadAttention(16, 2, batch_first=True)
            self.head = nn.Linear(16, 12)

        def forward(self, ids: Any) -> list[Any]:
            x = self.wide(self.square(self.linear(self.embed(ids))))
            y = self.conv1(x.T[None])
            z = self.point(self.conv2(y.reshape(1, 4, 4, -1)))
            volume = self.conv3(z[:, :, :, :4].reshape(1, 4, 4, -1, 4))
            rows = y.mT
            return [x, z, volume, self.mha(rows, rows, rows)[0], self.head(rows)]

    return Tiny()


def trained(
    folder: Path, seed: int, model: str = "tiny", dtype: str = "float32", **config: Any
) -> Path:
    """An adapter as PEFT saves it, every LoRA weight random and none zero.

    Heads, biases and token rows that are trained too get random values.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    with quiet():
        adapted = get_peft_model(base(model), LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, value in adapted.named_parameters():
                if value.requires_grad:
                    size = 0.3 if "lora_" in name else 1.0
                    value.copy_(size * torch.randn(value.shape, generator=generator))
        adapted.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def reloaded(folder: Path, model: str = "tiny") -> Any:
    """The base with the adapter at `folder` as PEFT reads it, in float64; warnings are errors."""
    from peft import PeftModel

    with quiet():
        return PeftModel.from_pretrained(base(model), str(folder)).double().eval()


def layers(adapted: Any, adapter: str = "default") -> dict[str, Any]:
    """The adapted layers by module path."""
    from peft.tuners.lora import LoraLayer

    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module
        for name, module in adapted.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.scaling
    }


def deltas(adapted: Any, adapter: str = "default") -> dict[str, np.ndarray]:
    """PEFT's own ΔW of each layer in the base weight's layout, `.bias` for lora_bias."""
    result = {}
    for name, layer in layers(adapted, adapter).items():
        result[name] = layer.get_delta_weight(adapter).detach().numpy()
        bias = getattr(layer.lora_B[adapter], "bias", None) if adapter in layer.lora_B else None
        if bias is not None:
            result[f"{name}.bias"] = layer.scaling[adapter] * bias.detach().numpy()
    return result


def outputs(adapted: Any, model: str = "tiny") -> np.ndarray:
    """What the model computes for a fixed input, flat."""
    import torch

    ids = torch.arange(12) * 5 % 32
    with torch.no_grad():
        result = adapted(ids[None]).logits if model == "llama" else adapted(ids)
    parts = [result] if model == "llama" else result
    return np.concatenate([part.numpy().ravel() for part in parts])


def shifted(model: str, changes: Mapping[str, np.ndarray]) -> Any:
    """The base model in float64 with `changes` added to its weights."""
    import torch

    plain = base(model).double()
    with torch.no_grad():
        for name, change in changes.items():
            path = name if name.endswith(".bias") else f"{name}.weight"
            plain.get_parameter(path).add_(torch.from_numpy(np.asarray(change)))
    return plain
