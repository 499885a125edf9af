"""diffusers LoRAs of one transformer: one that names the component beside one that does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import adapterops as ao
from adapterops.errors import IncompatibleError, UnsupportedError
from tests.support import distance, weighted

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

FILE = "pytorch_lora_weights.safetensors"
KINDS = ("flux", "wan")


def model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "flux":
        return diffusers.FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
        )
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )


def pipeline(kind: str) -> Any:
    return diffusers.FluxPipeline if kind == "flux" else diffusers.WanPipeline


def changes(host: Any) -> dict[str, np.ndarray]:
    """ΔW of each layer of a model with one adapter, in float64."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, layer in host.double().named_modules():
        if isinstance(layer, LoraLayer):
            [adapter] = layer.scaling
            found[name] = layer.get_delta_weight(adapter).detach().numpy()
    return found


def trained(kind: str, folder: Path, seed: int, *, bare: bool) -> tuple[Path, Mapping[str, Any]]:
    """A LoRA that the model saves, or its pipeline, and its ΔW; alpha is twice the rank."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    host = model(kind)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k"])
    host.add_adapter(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in host.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    if bare:
        host.save_lora_adapter(folder)
    else:
        pipeline(kind).save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(host),
            transformer_lora_adapter_metadata=config.to_dict(),
        )
    return folder / FILE, changes(host)


def loaded(kind: str, file: Path, *, bare: bool) -> Mapping[str, np.ndarray]:
    """ΔW as diffusers loads a file: by the model where names are bare, else by the pipeline."""
    host = model(kind)
    if bare:
        host.load_lora_adapter(str(file.parent), weight_name=file.name, prefix=None)
        return changes(host)
    state = pipeline(kind).lora_state_dict(
        str(file.parent), weight_name=file.name, return_lora_metadata=True
    )
    alphas = {"network_alphas": None} if kind == "flux" else {}
    pipeline(kind).load_lora_into_transformer(
        state[0], transformer=host, metadata=state[-1], **alphas
    )
    return changes(host)


@pytest.mark.parametrize("bare", (False, True), ids=("pipeline's first", "model's first"))
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_written_as_the_first_input_and_loads_so(
    kind: str, bare: bool, tmp_path: Path
) -> None:
    one, first = trained(kind, tmp_path / "a", 1, bare=bare)
    two, second = trained(kind, tmp_path / "b", 2, bare=not bare)
    out = tmp_path / "m.safetensors"
    report = ao.merge([one, two], [0.7, 0.3], out=out, rank=4)
    assert len(report.modules) == len(first)
    assert all(name.startswith("transformer.") is not bare for name in load_file(out))
    wanted = weighted((0.7, first), (0.3, second))
    assert distance(loaded(kind, out, bare=bare), wanted) < 1e-6
    found = ao.check(out, inputs=tmp_path, recompute=True)
    assert "recompute-equal" in {item.code for item in found.findings}


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_saved_both_ways_is_no_distance_apart(kind: str, tmp_path: Path) -> None:
    one, _ = trained(kind, tmp_path / "a", 1, bare=False)
    two, _ = trained(kind, tmp_path / "b", 1, bare=True)
    report = ao.diff([one, two])
    assert report.distance[0][1] == 0 and report.pair.only_a == report.pair.only_b == ()


def test_sums_and_expressions_take_both(tmp_path: Path) -> None:
    one, first = trained("wan", tmp_path / "a", 1, bare=False)
    two, second = trained("wan", tmp_path / "b", 2, bare=True)
    a, b = ao.open_adapter(one), ao.open_adapter(two)
    assert set(a + b) == set(a) and len((a + b - b).terms) == 2
    name = next(iter(first))
    wanted = first[name] + second[name]
    np.testing.assert_allclose((a + b)[f"transformer.{name}"].dense(), wanted, rtol=1e-6)
    combined = ao.combine("ties", [a, b], parameters={"density": 1.0}) - b
    for given in ({"a": one, "b": two}, {"b": two, "a": one}):
        out = tmp_path / "m.safetensors"
        report = ao.calc("ties(a, b, density=1.0) - b", given, out=out, rank=24, overwrite=True)
        assert len(report.inputs) == 2
        made = ao.open_adapter(out)
        wanted = combined[f"transformer.{name}"].dense()
        np.testing.assert_allclose(made[f"transformer.{name}"].dense(), wanted, atol=1e-5)


def plain(file: Path, stems: list[str], seed: int = 1, **more: np.ndarray) -> Path:
    """A LoRA of 6 x 5 modules."""
    rng = np.random.default_rng(seed)
    tensors = {
        f"{stem}.lora_{role}.weight": rng.standard_normal(shape).astype(np.float32)
        for stem in stems
        for role, shape in (("A", (1, 5)), ("B", (6, 1)))
    }
    save_file({**tensors, **more}, file)
    return file


def test_bare_files_that_share_modules_go_together(tmp_path: Path) -> None:
    """The third has nothing in common with the first by name, but with the second."""
    files = [
        plain(tmp_path / "a.safetensors", ["transformer.blocks.0.q", "text_encoder.layers.0.q"]),
        plain(tmp_path / "b.safetensors", ["blocks.0.q", "blocks.1.q"]),
        plain(tmp_path / "c.safetensors", ["blocks.1.q"]),
    ]
    report = ao.merge(files, [1.0] * 3, out=tmp_path / "m.safetensors", rank=2)
    assert sorted(report.modules) == [
        "text_encoder.layers.0.q",
        "transformer.blocks.0.q",
        "transformer.blocks.1.q",
    ]


@pytest.mark.parametrize(
    ("named", "bare"),
    (
        pytest.param(
            ["transformer.blocks.0.q", "transformer_2.blocks.0.q"], ["blocks.0.q"], id="two experts"
        ),
        pytest.param(
            ["transformer.blocks.0.q", "transformer_2.blocks.1.q"], ["blocks.0.q"], id="a twin"
        ),
        pytest.param(
            ["text_encoder.layers.0.q", "text_encoder_2.layers.0.q"],
            ["layers.0.q"],
            id="two text encoders",
        ),
        pytest.param(
            ["transformer.blocks.0.q", "text_encoder.layers.0.q"],
            ["blocks.0.q", "layers.0.q"],
            id="a transformer and a text encoder",
        ),
        pytest.param(
            ["transformer.blocks.0.q", "blocks.1.q"],
            ["blocks.0.q", "blocks.1.q"],
            id="both ways in one file",
        ),
    ),
)
def test_where_several_components_may_be_meant_none_is_guessed(
    named: list[str], bare: list[str], tmp_path: Path
) -> None:
    files = [
        plain(tmp_path / "a.safetensors", named),
        plain(tmp_path / "b.safetensors", bare),
    ]
    for order in (files, files[::-1]):
        with pytest.raises(UnsupportedError, match="names no component") as caught:
            ao.merge(order, [1.0, 1.0], out=tmp_path / "m.safetensors")
        assert caught.value.path == str(files[1])
        assert "save_lora_weights" in str(caught.value)


def test_a_bare_file_with_more_than_factors_is_refused(tmp_path: Path) -> None:
    norm = np.ones(5, np.float32)
    files = [
        plain(tmp_path / "a.safetensors", ["transformer.blocks.0.q"]),
        plain(tmp_path / "b.safetensors", ["blocks.0.q"], **{"blocks.0.norm.weight": norm}),
    ]
    with pytest.raises(UnsupportedError, match=r"carries 'blocks\.0\.norm\.weight'"):
        ao.merge(files, [1.0, 1.0], out=tmp_path / "m.safetensors")


def test_files_of_different_models_still_have_nothing_in_common(tmp_path: Path) -> None:
    files = [
        plain(tmp_path / "a.safetensors", ["transformer.blocks.0.q"]),
        plain(tmp_path / "b.safetensors", ["layers.0.q"]),
    ]
    with pytest.raises(IncompatibleError, match="no module in common"):
        ao.merge(files, [1.0, 1.0], out=tmp_path / "m.safetensors")


@pytest.mark.parametrize("method", ("linear", "ties", "dare"))
def test_methods_take_both(method: str, tmp_path: Path) -> None:
    files = [
        plain(tmp_path / "a.safetensors", ["transformer.blocks.0.q"], 1),
        plain(tmp_path / "b.safetensors", ["blocks.0.q"], 2),
    ]
    ao.merge(
        files,
        [1.0, 1.0],
        out=tmp_path / "m.safetensors",
        method=method,
        module_weights=["re:.*: 1,1"],
        rank=2,
    )
    assert len(load_file(tmp_path / "m.safetensors")) == 2
