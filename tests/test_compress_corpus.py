"""compress on real adapters: a stated error, kept on what PEFT and diffusers load.

Models have the shapes that the factors fix and random weights, or none where only factors are
looked at. What the report says is compared with the dense float64 ΔW of the loaded layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import adapterops as ao
from adapterops.certificate import Report
from tests.peft_models import quiet
from tests.support import load_file
from tests.test_corpus import FAMILIES
from tests.test_kinds_peft import merged_linear
from tests.test_mlx import Mlx, qwen

WEIGHTS = "adapter_model.safetensors"
EXAMPLES = Path(__file__).parent.parent / "examples" / "adapters"
Deltas = Mapping[str, Any]  # of Low, or of dense matrices
EXAMPLE_NAMES = ("code-seed0", "code-seed1", "docs-seed0", "docs-seed1")
OPTIONS: dict[str, dict[str, Any]] = {
    "uniform, error": {"max_error": 0.1},
    "uniform, rank": {"rank": 2},
    "global, ratio": {"ratio": 0.5, "allocate": "global"},
    "global, error": {"max_error": 0.1, "allocate": "global"},
    "ragged": {"max_error": 0.1, "ragged": True},
    "sv_fro, bfloat16": {"sv_fro": 0.99, "dtype": "bfloat16"},
}


@dataclass(frozen=True)
class Low:
    """B·A in float64, whose norm needs no dense matrix: ‖R_B·R_Aᵀ‖ of two QR decompositions."""

    B: np.ndarray
    A: np.ndarray

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, Low):
            return Low(np.hstack([self.B, -other.B]), np.vstack([self.A, other.A]))
        return self.B @ self.A - other

    def norm(self) -> float:
        upper_b, upper_a = (np.linalg.qr(side, mode="r") for side in (self.B, self.A.T))
        return float(np.linalg.norm(upper_b @ upper_a.T))


def norm(delta: Any) -> float:
    return delta.norm() if isinstance(delta, Low) else float(np.linalg.norm(delta))


def loaded_low(layer: Any) -> Low:
    """What a LoRA layer of PEFT adds: its scaling, B and A, as they are in the model."""
    [name] = layer.scaling
    B, A = (side[name].weight.detach().double().numpy() for side in (layer.lora_B, layer.lora_A))
    return Low(layer.scaling[name] * B.reshape(len(B), -1), A.reshape(len(A), -1))


def test_the_norm_of_a_product() -> None:
    rng = np.random.default_rng(1)
    one, two = (Low(rng.standard_normal((9, r)), rng.standard_normal((r, 7))) for r in (2, 3))
    dense = one.B @ one.A - two.B @ two.A
    assert norm(one - two) == pytest.approx(norm(dense), rel=1e-13)
    assert norm(one - two.B @ two.A) == pytest.approx(norm(dense), rel=1e-13)


by_options = pytest.mark.parametrize("options", OPTIONS)


def assert_reported(report: Report, before: Deltas, after: Deltas, stem: Any = str) -> float:
    """Errors of the whole and of every module are those measured; `stem` is the report's name."""
    assert {stem(name) for name in before} == report.modules.keys()
    assert after.keys() <= before.keys()
    sizes, losses = [], []
    for name, value in before.items():
        module = report.modules[stem(name)]
        size = norm(value)
        lost = norm(after[name] - value) if name in after else size
        assert (name in after) == (module.rank > 0)
        if size:
            assert module.error == pytest.approx(lost / size, rel=1e-5, abs=1e-8), name
        sizes.append(size)
        losses.append(lost)
    measured = math.hypot(*losses) / math.hypot(*sizes)
    assert report.error == pytest.approx(measured, rel=1e-5, abs=1e-9)
    return measured


def assert_targets_met(report: Report, measured: float, options: Mapping[str, Any]) -> None:
    """The bound or the budget that was asked for, by what was measured."""
    ranks = {module.rank for module in report.modules.values()} - {0}
    if "max_error" in options:
        assert measured <= options["max_error"]
    if "ratio" in options:
        assert report.parameters <= options["ratio"] * report.parameters_before
    if "allocate" in options:
        assert report.gap is not None and report.gap >= 0.0
    elif "ragged" not in options and "sv_fro" not in options:
        assert len(ranks) == 1


# ---- PEFT ----------------------------------------------------------------------------------------


def roberta(labels: int, inner: int) -> Any:
    """A RoBERTa of roberta-base's attention with few words and an MLP of any width."""
    import torch
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    return RobertaForSequenceClassification(
        RobertaConfig(
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            intermediate_size=inner,
            vocab_size=16,
            max_position_embeddings=16,
            num_labels=labels,
        )
    )


@cache
def bases() -> dict[str, Any]:
    """One model per family; PEFT takes its adapter off again after every test."""
    agnews, portuguese = FAMILIES
    return {agnews: roberta(4, 3072), portuguese: roberta(5, 8)}


def peft_state(base: Any, folder: Path) -> tuple[dict[str, Low], dict[str, Any]]:
    """ΔW of each layer as PEFT loads an adapter, and everything else that is in the model then."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    with quiet():
        loaded = PeftModel.from_pretrained(base, str(folder))
    deltas = {}
    for name, layer in loaded.named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.scaling:
            assert not getattr(layer, "fan_in_fan_out", False)
            deltas[name.removeprefix("base_model.model.")] = loaded_low(layer)
    rest = {
        name.replace(".base_layer", "").replace("base_model.model.", ""): value.clone()
        for name, value in loaded.state_dict().items()
        if "lora_" not in name
        and ("bias" in name or "classifier" in name)
        and "original_module" not in name  # the base's own, which unloading changes
    }
    loaded.unload()
    vars(base).pop("peft_config", None)
    return deltas, rest


def extras(folder: Path) -> dict[str, np.ndarray]:
    """What is no factor, biases of adapted layers by their plain name."""
    return {
        name.replace(".base_layer", ""): value
        for name, value in load_file(folder / WEIGHTS).items()
        if ".lora_" not in name
    }


CHECKPOINTS = [(family, step) for family, steps in FAMILIES.items() for step in steps]


@pytest.fixture(scope="module")
def originals() -> dict[Path, Any]:
    """What PEFT makes of each original, once."""
    return {}


class TestRoberta:
    @pytest.mark.parametrize("options", ["uniform, error", "global, ratio"])
    @pytest.mark.parametrize(
        ("family", "step"), CHECKPOINTS, ids=[f"{f[:8]}-{s}" for f, s in CHECKPOINTS]
    )
    def test_every_checkpoint(
        self,
        family: str,
        step: int,
        options: str,
        corpus: Path,
        originals: dict[Path, Any],
        tmp_path: Path,
    ) -> None:
        """Loaded by PEFT: ΔW as reported, and heads and biases as in the original."""
        pytest.importorskip("peft")
        source = corpus / family / f"checkpoint-{step}"
        report = ao.compress(source, out=tmp_path / "c", **OPTIONS[options])
        assert report.size == (tmp_path / "c" / WEIGHTS).stat().st_size < report.size_before
        if source not in originals:
            originals[source] = peft_state(bases()[family], source)
        before, rest = originals[source]
        after, kept = peft_state(bases()[family], tmp_path / "c")
        assert_targets_met(report, assert_reported(report, before, after), OPTIONS[options])
        one, two = extras(source), extras(tmp_path / "c")
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[name], two[name]) for name in one)
        assert rest.keys() == kept.keys()
        assert not [name for name, value in rest.items() if not value.equal(kept[name])]

    def test_biases_of_dropped_modules(
        self, corpus: Path, originals: dict[Path, Any], tmp_path: Path
    ) -> None:
        """`bias: all` trained those of the layers that a global allocation leaves out, too."""
        pytest.importorskip("peft")
        family = next(iter(FAMILIES))
        source = corpus / family / "checkpoint-500"
        report = ao.compress(source, out=tmp_path / "c", ratio=0.12, allocate="global")
        assert report.dropped
        if source not in originals:
            originals[source] = peft_state(bases()[family], source)
        before, rest = originals[source]
        after, kept = peft_state(bases()[family], tmp_path / "c")
        assert_reported(report, before, after)
        assert not [name for name, value in rest.items() if not value.equal(kept[name])]

    @by_options
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_option(
        self, family: str, options: str, corpus: Path, originals: dict[Path, Any], tmp_path: Path
    ) -> None:
        """On one of each; heads dropped, as adapters in production often are."""
        pytest.importorskip("peft")
        source = corpus / family / f"checkpoint-{FAMILIES[family][0]}"
        report = ao.compress(source, out=tmp_path / "c", extras="drop", **OPTIONS[options])
        if source not in originals:
            originals[source] = peft_state(bases()[family], source)
        after, _ = peft_state(bases()[family], tmp_path / "c")
        measured = assert_reported(report, originals[source][0], after)
        assert_targets_met(report, measured, OPTIONS[options])
        assert not extras(tmp_path / "c")


def llama_like(kind: str) -> Any:
    """SmolLM2-135M's or Qwen2.5-0.5B's attention, with narrow MLPs and few words."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"intermediate_size": 8, "vocab_size": 16}
    if kind == "smollm2":
        sizes |= {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9}
        return t.LlamaForCausalLM(t.LlamaConfig(num_key_value_heads=3, **sizes))
    sizes |= {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14}
    return t.Qwen2ForCausalLM(t.Qwen2Config(num_key_value_heads=2, **sizes))


llama = cache(llama_like)


class TestExamples:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            *((name, "uniform, error") for name in EXAMPLE_NAMES),
            *((name, "global, ratio") for name in EXAMPLE_NAMES),
            *(("code-seed0", each) for each in OPTIONS if each[:6] not in ("unifor", "global")),
        ],
    )
    def test_every_adapter(
        self, name: str, options: str, originals: dict[Path, Any], tmp_path: Path
    ) -> None:
        pytest.importorskip("peft")
        source = EXAMPLES / name
        report = ao.compress(source, out=tmp_path / "c", **OPTIONS[options])
        if source not in originals:
            originals[source] = peft_state(llama("smollm2"), source)
        after, _ = peft_state(llama("smollm2"), tmp_path / "c")
        measured = assert_reported(report, originals[source][0], after)
        assert_targets_met(report, measured, OPTIONS[options])

    def test_global_is_never_worse_than_uniform_at_its_size(self, tmp_path: Path) -> None:
        for index, source in enumerate(sorted(EXAMPLES.glob("*-seed?"))):
            one = ao.compress(source, out=tmp_path / f"u{index}", rank=3)
            two = ao.compress(source, out=tmp_path / f"g{index}", rank=3, allocate="global")
            assert two.parameters <= one.parameters and two.truncation <= one.truncation


# ---- diffusers -----------------------------------------------------------------------------------

ATTENTION = "catundchat__stable-diffusion-v1.5-lora/pytorch_lora_weights"


@cache
def unet() -> Any:
    """An SD 1.x U-Net whose weights nobody looks at, and which therefore take no memory."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        host = UNet2DConditionModel(cross_attention_dim=768)
    return host.to_empty(device="cpu")


def unet_deltas(file: Path) -> dict[str, Low]:
    """ΔW of each layer of an SD 1.x U-Net as diffusers loads a file."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
    from peft.tuners.lora import LoraLayer

    from tests.image_models import strict

    host = unet()
    with strict():
        state, alphas, metadata = Loader.lora_state_dict(
            str(file.parent), weight_name=file.name, return_lora_metadata=True
        )
        Loader.load_lora_into_unet(state, network_alphas=alphas, unet=host, metadata=metadata)
    result = {}
    for name, layer in host.named_modules():
        if isinstance(layer, LoraLayer):
            result[name] = loaded_low(layer)
    host.unload_lora()
    return result


def processors(path: Path) -> dict[str, Low]:
    """ΔW of an old attention processor file by its own names, scale 1."""
    import torch

    if path.suffix == ".bin":
        state = {k: v.numpy() for k, v in torch.load(path, "cpu", weights_only=True).items()}
    else:
        state = load_file(path)
    result = {}
    for name, up in state.items():
        if name.endswith("_lora.up.weight"):
            block, _, leaf = name.removesuffix("_lora.up.weight").rpartition(".processor.")
            module = f"{block}.{leaf}" + (".0" if leaf == "to_out" else "")
            down = state[name.replace(".up.", ".down.")].astype(float)
            result[module.removeprefix("unet.")] = Low(up.astype(float), down)
    return result


class TestDiffusers:
    @pytest.mark.parametrize(
        "options", ["uniform, error", "global, ratio", "sv_fro, bfloat16", "half"]
    )
    @pytest.mark.parametrize("suffix", ["safetensors", "bin"])
    def test_both_files(self, suffix: str, options: str, corpus: Path, tmp_path: Path) -> None:
        """Image adapters are full: an error of 0.1 takes all four directions."""
        pytest.importorskip("diffusers")
        source = corpus / f"{ATTENTION}.{suffix}"
        before = processors(source)
        assert len(before) == 128
        chosen = dict(OPTIONS.get(options, {"max_error": 0.5, "allocate": "global"}))
        out = tmp_path / "c.safetensors"
        report = ao.compress(source, out=out, allow_pickle=True, **chosen)
        assert report.size == out.stat().st_size
        after = unet_deltas(out)
        measured = assert_reported(report, before, after, lambda name: f"unet.{name}")
        assert_targets_met(report, measured, chosen)
        with safe_open(out, "numpy") as opened:
            told = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        ranks = {module.rank for module in report.modules.values()} - {0}
        assert (len(ranks) > 1) == bool(told.get("unet.rank_pattern"))


# ---- MLX, bloom, cloneofsimo ---------------------------------------------------------------------


class TestMlx:
    @pytest.mark.parametrize("options", ["uniform, error", "uniform, rank"])
    @pytest.mark.parametrize("step", ["0000100", "0000200"])
    def test_in_its_own_dialect(
        self, step: str, options: str, corpus: Path, tmp_path: Path
    ) -> None:
        source = corpus / "wyek1n__MLX-CLI" / step
        before = Mlx(source, qwen()).deltas
        report = ao.compress(source, out=tmp_path / "c", **OPTIONS[options])
        after = Mlx(tmp_path / "c", qwen()).deltas
        assert_targets_met(report, assert_reported(report, before, after), OPTIONS[options])

    @pytest.mark.parametrize("options", ["uniform, error", "global, ratio", "ragged"])
    def test_to_peft(self, options: str, corpus: Path, tmp_path: Path) -> None:
        """Loaded by PEFT into a Qwen2; `scale` 10 is in the factors, alpha is the rank."""
        pytest.importorskip("peft")
        source = corpus / "wyek1n__MLX-CLI" / "0000200"
        before = Mlx(source, qwen()).deltas
        report = ao.compress(source, out=tmp_path / "c", to="peft", **OPTIONS[options])
        after, _ = peft_state(llama("qwen2"), tmp_path / "c")
        assert_targets_met(report, assert_reported(report, before, after), OPTIONS[options])

    def test_convert_keeps_the_scale(self, corpus: Path, tmp_path: Path) -> None:
        pytest.importorskip("peft")
        source = corpus / "wyek1n__MLX-CLI" / "0000100"
        report = ao.convert(source, out=tmp_path / "p", to="peft")
        assert report.error == 0.0
        config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
        assert config["lora_alpha"] / config["r"] == 10.0
        after, _ = peft_state(llama("qwen2"), tmp_path / "p")
        assert_reported(report, Mlx(source, qwen()).deltas, after)


class TestBloom:
    @pytest.mark.parametrize("options", ["uniform, error", "global, ratio", "sv_fro, bfloat16"])
    def test_merged_linear_becomes_a_plain_lora(
        self, options: str, corpus: Path, tmp_path: Path
    ) -> None:
        """r = 8 over two of three slots: 16 columns, block by block, loaded by today's PEFT."""
        import torch

        pytest.importorskip("peft")
        from transformers import BloomConfig, BloomForCausalLM

        source = corpus / "wujindou__BLOOM-LORA"
        state = torch.load(source / "adapter_model.bin", "cpu", weights_only=True)
        before = {}
        for name, B in state.items():
            if name.endswith("lora_B.weight"):
                stem = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
                A = state[name.replace("lora_B", "lora_A")].float().numpy()
                before[stem] = merged_linear(A, B.float().numpy(), [True, False, True], 2.0)
        report = ao.compress(source, out=tmp_path / "c", allow_pickle=True, **OPTIONS[options])
        with torch.device("meta"):
            host = BloomForCausalLM(
                BloomConfig(hidden_size=1024, n_layer=24, n_head=16, vocab_size=16)
            )
        after, _ = peft_state(host.to_empty(device="cpu"), tmp_path / "c")
        assert_targets_met(report, assert_reported(report, before, after), OPTIONS[options])


class TestCloneofsimo:
    FILES = ("analog_svd_rank4.safetensors", "lora_disney_inpainting.safetensors", "lora_pop.pt")

    @staticmethod
    def tensors(file: Path) -> dict[str, np.ndarray]:
        if file.suffix == ".safetensors":
            return load_file(file)
        import torch

        listed = torch.load(file, "cpu", weights_only=True)
        names = [f"list:{n // 2}:{'down' if n % 2 else 'up'}" for n in range(len(listed))]
        return {name: value.detach().numpy() for name, value in zip(names, listed, strict=True)}

    @classmethod
    def deltas(cls, file: Path) -> dict[str, Low]:
        """up · down, scale 1."""
        tensors = cls.tensors(file)
        result = {}
        for name, up in tensors.items():
            stem, end, _ = name.partition(":up")
            if end:
                down = tensors[f"{stem}:down"].astype(float)
                flat = up.astype(float).reshape(len(up), -1)
                result[stem] = Low(flat, down.reshape(len(down), -1))
        return result

    @pytest.mark.parametrize("options", ["uniform, rank", "global, ratio", "sv_fro, bfloat16"])
    @pytest.mark.parametrize("name", FILES)
    def test_in_its_own_dialect(
        self, name: str, options: str, corpus: Path, tmp_path: Path
    ) -> None:
        source = corpus / "cloneofsimo__lora" / name
        before = self.deltas(source)
        chosen = OPTIONS[options]
        rank_one = name.startswith("lora_disney")
        if rank_one and options == "uniform, rank":
            chosen = {"rank": 1, "form": "svd"}
        if rank_one and "ratio" in chosen:
            chosen = {**chosen, "ratio": 0.7}
        out = tmp_path / "c.safetensors"
        report = ao.compress(source, out=out, allow_pickle=True, **chosen)
        after = self.deltas(out)
        assert_targets_met(report, assert_reported(report, before, after), chosen)
        with safe_open(out, "numpy") as opened:
            told = dict(opened.metadata())
        for stem, module in report.modules.items():
            assert told.get(f"{stem}:rank") == (str(module.rank) if module.rank else None)
        plain = [n for n in self.tensors(source) if not n.endswith((":up", ":down"))]
        assert sorted(plain) == sorted(
            n for n in load_file(out) if not n.endswith((":up", ":down"))
        )
        for each in plain:
            np.testing.assert_array_equal(load_file(out)[each], self.tensors(source)[each])
            assert told[each] == "<embed>"
