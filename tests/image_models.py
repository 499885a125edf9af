"""Tiny diffusers models, and the ΔW that diffusers reads into them from a LoRA file."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def model(component: str) -> Any:
    """A tiny UNet (SD 1.x), Flux transformer or CLIP text encoder with random weights."""
    import torch

    torch.manual_seed(0)
    if component == "unet":
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=8,
        )
    if component == "transformer":
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
        )
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=20,
            max_position_embeddings=8,
        )
    )


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Turn what diffusers and transformers log as warnings (keys they drop) into errors."""
    records: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    handler = Keep(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert not records, records


def deltas(file: Path, component: str, *, bare: bool = False) -> dict[str, np.ndarray]:
    """ΔW of each layer of one component as diffusers loads `file`, out x (in · kernel).

    `.bias` for a bias shift. What diffusers ignores is an error. `bare`: the file's names leave the
    component out.
    """
    from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin
    from peft.tuners.lora import LoraLayer

    mixin = FluxLoraLoaderMixin if component == "transformer" else StableDiffusionLoraLoaderMixin
    host = model(component)
    with strict():
        state, alphas, metadata = mixin.lora_state_dict(
            str(file.parent), weight_name=file.name, return_lora_metadata=True, **_flux(mixin)
        )
        options = {"network_alphas": alphas, "metadata": metadata}
        if bare:
            host.load_lora_adapter(state, prefix=None)
        elif component == "unet":
            mixin.load_lora_into_unet(state, unet=host, **options)
        elif component == "transformer":
            mixin.load_lora_into_transformer(state, transformer=host, **options)
        else:
            mixin.load_lora_into_text_encoder(state, text_encoder=host, prefix=component, **options)
    result = {}
    for name, layer in host.double().named_modules():
        if isinstance(layer, LoraLayer):
            [adapter] = layer.scaling
            change = layer.get_delta_weight(adapter).detach().numpy()
            result[name] = change.reshape(len(change), -1)
            if layer.lora_B[adapter].bias is not None:
                shift = layer.scaling[adapter] * layer.lora_B[adapter].bias
                result[f"{name}.bias"] = shift.detach().numpy()
    return result


def _flux(mixin: Any) -> dict[str, bool]:
    return {"return_alphas": True} if "Flux" in mixin.__name__ else {}


def as_peft(state: dict[str, Any]) -> dict[str, np.ndarray]:
    """ΔW of each UNet module of a state dict by diffusers' own renaming (no alpha: scale 1)."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    bare = {name.removeprefix("unet."): value for name, value in state.items()}
    converted = convert_unet_state_dict_to_peft(bare)
    return {
        name.removesuffix(".lora_B.weight"): (
            B.double() @ converted[name.replace("lora_B", "lora_A")].double()
        ).numpy()
        for name, B in converted.items()
        if name.endswith(".lora_B.weight")
    }


def saved(folder: Path, seed: int, config: dict[str, Any]) -> Path:
    """A UNet and text encoder LoRA as diffusers saves it, all weights random."""
    import torch
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    generator = torch.Generator().manual_seed(seed)
    layers, metadata = {}, {}
    text = {"target_modules": ["q_proj"], "rank_pattern": {}, "alpha_pattern": {}}
    for component, changed in (("unet", {}), ("text_encoder", text)):
        options = LoraConfig(**{**config, **changed})
        host = inject_adapter_in_model(options, model(component))
        with torch.no_grad():
            for name, value in host.named_parameters():
                if "lora_" in name:
                    value.copy_(torch.randn(value.shape, generator=generator))
        prefix = "text_model." if component == "text_encoder" else ""
        state = get_peft_model_state_dict(host)
        named = {name if name.startswith(prefix) else prefix + name: v for name, v in state.items()}
        layers[f"{component}_lora_layers"] = named
        metadata[f"{component}_lora_adapter_metadata"] = options.to_dict()
    StableDiffusionLoraLoaderMixin.save_lora_weights(str(folder), **layers, **metadata)
    return folder / "pytorch_lora_weights.safetensors"
