"""MoE `target_parameters`: one pair of factors per expert, in PEFT's asymmetric layout.

A stacks experts (A_e = A[e·r : (e+1)·r]); B interleaves them (B_e = B[:, e::E]). The oracle is the
`get_delta_weight` of PEFT's reloaded ParamWrapper, expert by expert, on tiny modules and on
transformers' own mixture-of-experts models.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterops as ao
from adapterops.errors import IncompatibleError, UsageError
from adapterops.formats import open_adapter_file
from tests.kinds import gap, read, write
from tests.support import distance, load_file, weighted

pytest.importorskip("peft")
PREFIX = "base_model.model."
EXACT = 1e-13
_NOISE = (
    "The following (rank|alpha)_pattern keys did not match",  # they match a parameter, not a module
    "`is_gradient_checkpointing` is deprecated",  # PEFT asks transformers for it
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        yield


def tiny(*, experts: int = 3, transposed: bool = False) -> Any:
    """Experts with two parameters (E, out, in), or (E, in, out) if `transposed`, and a linear."""
    import torch
    from torch import nn

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            up, down = (experts, 10, 8), (experts, 8, 10)
            self.up = nn.Parameter(torch.randn(down if transposed else up))
            self.down = nn.Parameter(torch.randn(up if transposed else down))
            if transposed:
                self.is_transposed = True

        def forward(self, x: Any) -> Any:
            return x

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Experts()
            self.q_proj = nn.Linear(8, 8)

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])

        def forward(self, x: Any) -> Any:
            return x

    torch.manual_seed(1)
    return Tiny().eval()


def qwen3() -> Any:
    """transformers' Qwen3-MoE with fused `gate_up_proj` and `down_proj`."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(1)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=16,
            intermediate_size=24,
            moe_intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=32,
            num_experts=4,
            num_experts_per_tok=2,
        )
    ).eval()


def mixtral() -> Any:
    """transformers' Mixtral."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(1)
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=16,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=32,
            num_local_experts=4,
        )
    ).eval()


def saved(model: Callable[[], Any], folder: Path, seed: int = 0, **config: Any) -> Path:
    """An adapter as PEFT saves it, every factor random."""
    import torch
    from peft import LoraConfig, get_peft_model

    with quiet():
        adapted = get_peft_model(model(), LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in adapted.parameters():
                if value.requires_grad:
                    value.copy_(0.3 * torch.randn(value.shape, generator=generator))
        adapted.save_pretrained(folder)
    return folder


def reloaded(model: Callable[[], Any], folder: Path) -> Any:
    from peft import PeftModel

    with quiet():
        return PeftModel.from_pretrained(model(), str(folder)).double().eval()


def deltas(model: Callable[[], Any], folder: Path) -> dict[str, np.ndarray]:
    """ΔW of each module and each expert as PEFT reloads them, the way our stems call them.

    B·A as stored: where the parameter is (E, in, out), PEFT's delta is the transpose of it.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    result = {}
    for name, layer in reloaded(model, folder).named_modules():
        path = name.removeprefix(PREFIX)
        if isinstance(layer, ParamWrapper):
            change = layer.get_delta_weight("default").detach().numpy()
            assert change.shape[0] == layer.num_experts
            for expert, value in enumerate(change):
                stored = value if layer._did_swap_in_out_features else value.T
                result[f"{path}[{expert}]"] = stored
        elif isinstance(layer, LoraLayer):
            result[path] = layer.get_delta_weight("default").detach().numpy()
    return result


def formula(folder: Path, rank: int, scale: float) -> dict[str, np.ndarray]:
    """B_e·A_e of each expert by the layout in this file's docstring."""
    tensors = load_file(folder / "adapter_model.safetensors")
    result = {}
    for name, A in tensors.items():
        stem, side, _ = name.removeprefix(PREFIX).rpartition(".lora_A.weight")
        if side and ".experts" in stem:
            B = tensors[name.replace("lora_A", "lora_B")].astype(np.float64)
            experts = len(A) // rank
            for e in range(experts):
                part = A[e * rank : (e + 1) * rank].astype(np.float64)
                result[f"{stem}[{e}]"] = scale * B[:, e::experts] @ part
    return result


ONE = {"target_modules": [], "target_parameters": ["experts.up"]}
TWO = {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]}
MIXED = {"target_modules": ["q_proj"], "target_parameters": ["experts.up", "experts.down"]}
REAL = {
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "one parameter": (tiny, ONE),
    "two parameters": (tiny, TWO),
    "two parameters and a linear layer": (tiny, MIXED),
    "(E, in, out)": (lambda: tiny(transposed=True), TWO),
    "twelve experts": (lambda: tiny(experts=12), TWO),  # [10] sorts before [2]
    "rsLoRA": (tiny, {**TWO, "use_rslora": True}),
    "Qwen3-MoE": (qwen3, REAL),
    "Mixtral": (mixtral, REAL),
}
by_case = pytest.mark.parametrize("case", CASES)


@by_case
def test_the_formula_is_peft_s(case: str, tmp_path: Path) -> None:
    """The oracle of the next tests; none of our code is involved."""
    model, config = CASES[case]
    folder = saved(model, tmp_path, r=4, lora_alpha=6, **config)
    theirs = {name: value for name, value in deltas(model, folder).items() if "[" in name}
    scale = 3.0 if config.get("use_rslora") else 1.5
    assert distance(formula(folder, 4, scale), theirs) < EXACT
    contiguous = formula_contiguous(folder, 4, scale)  # B cut like A: another adapter
    assert distance(contiguous, theirs) > 0.5


def formula_contiguous(folder: Path, rank: int, scale: float) -> dict[str, np.ndarray]:
    """The layout one would guess, and that is wrong."""
    tensors = load_file(folder / "adapter_model.safetensors")
    result = {}
    for stem in {name.rpartition("[")[0] for name in formula(folder, rank, scale)}:
        A = tensors[f"{PREFIX}{stem}.lora_A.weight"].astype(np.float64)
        B = tensors[f"{PREFIX}{stem}.lora_B.weight"].astype(np.float64)
        for e in range(len(A) // rank):
            cut = slice(e * rank, (e + 1) * rank)
            result[f"{stem}[{e}]"] = scale * B[:, cut] @ A[cut]
    return result


@by_case
@pytest.mark.parametrize("rank", [1, 2])
def test_every_expert_is_read_exactly(case: str, rank: int, tmp_path: Path) -> None:
    model, config = CASES[case]
    folder = saved(model, tmp_path, r=rank, lora_alpha=3, **config)
    wanted = deltas(model, folder)
    assert distance(read(folder), wanted) < EXACT
    sites = open_adapter_file(folder).sites
    assert sites.keys() == wanted.keys()
    for stem, site in sites.items():
        assert (site.kind, site.rank, site.dim) == ("lora", rank, rank)
        assert site.shape == wanted[stem].shape
        assert site.scale == pytest.approx(3 / rank**0.5 if "use_rslora" in config else 3 / rank)


@by_case
@pytest.mark.parametrize("weights", [(0.7, 0.3), (-1.5, 0.4)], ids=str)
def test_peft_reads_back_the_exact_sum(
    case: str, weights: tuple[float, float], tmp_path: Path
) -> None:
    """PEFT's own weighted merge refuses target_parameters; ours is per expert."""
    model, config = CASES[case]
    a = saved(model, tmp_path / "a", 1, r=2, lora_alpha=3, **config)
    b = saved(model, tmp_path / "b", 2, r=1, lora_alpha=5, **config)
    report = ao.merge([a, b], weights, out=tmp_path / "m", dtype="float32")
    assert report.error < 1e-6
    terms = zip(weights, (deltas(model, folder) for folder in (a, b)), strict=True)
    wanted = weighted(*terms)
    assert distance(read(tmp_path / "m"), wanted) < 1e-6
    assert distance(deltas(model, tmp_path / "m"), wanted) < 1e-6
    merged = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    assert sorted(merged["target_parameters"]) == sorted(config["target_parameters"])


@pytest.mark.parametrize("case", ["two parameters", "Qwen3-MoE"])
def test_a_rank_is_the_rank_of_each_expert(case: str, tmp_path: Path) -> None:
    model, config = CASES[case]
    folders = [saved(model, tmp_path / str(s), s, r=2, lora_alpha=3, **config) for s in (1, 2)]
    ao.merge(folders, [0.7, 0.3], out=tmp_path / "m", dtype="float32", rank=2)
    wanted = weighted(*zip((0.7, 0.3), (deltas(model, f) for f in folders), strict=True))
    for name, value in deltas(model, tmp_path / "m").items():
        u, s, v = np.linalg.svd(wanted[name], full_matrices=False)
        assert gap(value, (u[:, :2] * s[:2]) @ v[:2]) < 1e-5
    # The same weights file means the same adapter to us as to PEFT.
    assert distance(read(tmp_path / "m"), deltas(model, tmp_path / "m")) < EXACT


@pytest.mark.parametrize("case", ["two parameters and a linear layer", "Mixtral"])
def test_one_adapter_alone_is_copied(case: str, tmp_path: Path) -> None:
    model, config = CASES[case]
    folder = saved(model, tmp_path / "a", r=2, lora_alpha=3, **config)
    ao.merge([folder], out=tmp_path / "m")
    assert distance(deltas(model, tmp_path / "m"), deltas(model, folder)) < 1e-6


def test_patterns_of_the_output_name_the_parameter(tmp_path: Path) -> None:
    """PEFT matches them against owner.parameter: attention of rank 4, experts of rank 2."""
    names = REAL["target_parameters"]
    config = {
        **REAL,
        "target_modules": [f"{x}_proj" for x in "qkvo"],  # most modules, so experts are the others
        "rank_pattern": dict.fromkeys(names, 2),
        "alpha_pattern": dict.fromkeys(names, 5),
    }
    folder = saved(qwen3, tmp_path / "a", r=4, lora_alpha=6, **config)
    for weight in (1.0, 0.5):  # a copy, and a sum at one rank
        out = tmp_path / f"m{weight}"
        ao.merge([folder], [weight], out=out)
        wanted = weighted((weight, deltas(qwen3, folder)))
        assert distance(read(out), wanted) < 1e-6
        assert distance(deltas(qwen3, out), wanted) < 1e-6
    written = json.loads((tmp_path / "m1.0" / "adapter_config.json").read_text())
    keys = {"^" + re.escape(f"model.layers.{n}.{name}") for n in range(2) for name in names}
    assert written["rank_pattern"] == dict.fromkeys(keys, 2)
    assert written["alpha_pattern"] == dict.fromkeys(keys, 5)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_experts_that_were_not_chosen_are_zero(weight: float, tmp_path: Path) -> None:
    """They share a tensor with the one that was: copying it would bring them along."""
    folder = saved(tiny, tmp_path / "a", r=2, lora_alpha=3, **TWO)
    ao.merge([folder], [weight], out=tmp_path / "m", modules=r".*\[1\]")
    wanted = {
        name: weight * value if name.endswith("[1]") else 0 * value
        for name, value in deltas(tiny, folder).items()
    }
    assert distance(deltas(tiny, tmp_path / "m"), wanted) < 1e-6
    assert distance(read(tmp_path / "m"), wanted) < 1e-6


def test_outputs_of_the_model_are_those_of_the_sum(tmp_path: Path) -> None:
    """Through the router and the experts of a real model."""
    import torch

    model, config = CASES["Qwen3-MoE"]
    folders = [saved(model, tmp_path / str(s), s, r=2, lora_alpha=3, **config) for s in (1, 2)]
    ao.merge(folders, [0.7, 0.3], out=tmp_path / "m", dtype="float32")
    wanted = weighted(*zip((0.7, 0.3), (deltas(model, f) for f in folders), strict=True))
    plain = model()  # grouped matrix products know no float64
    names = {"": "down_proj", ".base_layer": "gate_up_proj"}
    with torch.no_grad():
        for stem, value in wanted.items():
            change = torch.from_numpy(value).float()
            if "[" not in stem:
                plain.get_parameter(f"{stem}.weight").add_(change)
                continue
            path, _, expert = stem.removesuffix("]").partition("[")
            owner, _, nested = path.partition(".base_layer")
            name = names[".base_layer" if path.endswith(".base_layer") else nested]
            plain.get_parameter(f"{owner}.{name}")[int(expert)].add_(change)
        ids = torch.arange(12)[None] * 5 % 32
        found = reloaded(model, tmp_path / "m").float()(ids).logits.numpy()
        exact = plain(ids).logits.numpy()
        untouched = model()(ids).logits.numpy()
    assert np.abs(found - exact).max() < 1e-3 * np.abs(untouched - exact).max()


class TestAmbiguity:
    """What the file and its config leave open is refused, never guessed."""

    def test_patterns_for_single_parameters(self, tmp_path: Path) -> None:
        """Keys do not name the parameter: which of two nested ones a pattern means is not saved."""
        folder = saved(
            tiny,
            tmp_path,
            r=2,
            lora_alpha=3,
            rank_pattern={"experts.up": 4},
            alpha_pattern={"experts.down": 7},
            **TWO,
        )
        wanted = deltas(tiny, folder)
        assert {value.shape for value in wanted.values()} == {(10, 8), (8, 10)}
        try:
            found = read(folder)
        except IncompatibleError as error:
            assert str(folder) in str(error)
        else:
            assert distance(found, wanted) < EXACT

    @pytest.mark.parametrize("parameter", ["experts.up", "experts.down"])
    def test_an_alpha_for_one_of_two_parameters(self, parameter: str, tmp_path: Path) -> None:
        """Which of the nested pairs is the one that the pattern means is not in the file."""
        patterns = {"alpha_pattern": {parameter: 7}}
        folder = saved(tiny, tmp_path / "a", r=2, lora_alpha=3, **patterns, **TWO)
        with pytest.raises(IncompatibleError, match=r"ambiguous.*\b7 for "):
            ao.open_adapter(folder)
        alike = saved(tiny, tmp_path / "b", r=2, lora_alpha=5, **TWO)  # the same factors
        ao.merge([folder], [0.5], out=tmp_path / "m", alpha={folder: 5.0})
        wanted = weighted((0.5, deltas(tiny, alike)))
        assert distance(deltas(tiny, tmp_path / "m"), wanted) < 1e-6

    def test_one_of_two_parameters_alone(self, tmp_path: Path) -> None:
        """PEFT tells them apart by their number: what is left would be taken for the other."""
        folder = saved(tiny, tmp_path / "a", r=2, lora_alpha=3, **TWO)
        both = r"layers\.0\.experts\b.*layers\.0\.experts\.base_layer\b"
        with pytest.raises(UsageError, match=f"--modules.*{both}"):
            ao.merge([folder], out=tmp_path / "m", modules=r".*\.experts\[\d\]")
        assert not (tmp_path / "m").exists()
        ao.merge([folder], out=tmp_path / "m", modules=r"layers\.0\..*\[\d\]")

    def test_without_a_config_the_number_of_experts_is_unknown(self, tmp_path: Path) -> None:
        folder = saved(tiny, tmp_path, r=2, lora_alpha=3, **TWO)
        (folder / "adapter_config.json").unlink()
        for options in ({}, {"alpha": 3.0}):
            with pytest.raises(IncompatibleError, match=r"(?i)target_parameters|MoE|config"):
                ao.open_adapter(folder, **options)

    def test_a_rank_that_does_not_divide_the_rows(self, tmp_path: Path) -> None:
        folder = saved(tiny, tmp_path, r=2, lora_alpha=3, **ONE)
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "r": 4}))
        with pytest.raises(IncompatibleError, match="experts"):
            ao.open_adapter(folder)

    def test_numbers_of_experts_that_differ(self, tmp_path: Path) -> None:
        """Six rows are three experts of rank 2 or two of rank 3: two models."""
        folders = []
        for name, rank in (("a", 2), ("b", 3)):
            folder = tmp_path / name
            folder.mkdir()
            stem = f"{PREFIX}layers.0.experts"
            rng = np.random.default_rng(rank)
            arrays = {
                "lora_A.weight": rng.standard_normal((6, 8)).astype(np.float32),
                "lora_B.weight": rng.standard_normal((10, 6)).astype(np.float32),
            }
            write(folder / "adapter_model.safetensors", {stem: arrays})
            config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2, **ONE}
            (folder / "adapter_config.json").write_text(json.dumps(config))
            folders.append(folder)
        assert [len(ao.open_adapter(folder)) for folder in folders] == [3, 2]
        with pytest.raises(IncompatibleError, match="experts"):
            ao.merge(folders, [1, 1], out=tmp_path / "m")

    def test_a_module_targeted_whole_beside_experts(self, tmp_path: Path) -> None:
        """`target_parameters` in the config does not turn plain modules into experts."""
        folder = saved(tiny, tmp_path, r=2, lora_alpha=3, **MIXED)
        found = read(folder)
        assert "layers.0.q_proj" in found and not any("q_proj[" in stem for stem in found)

    def test_parameters_of_two_dimensions_are_plain(self, tmp_path: Path) -> None:
        """A 2-D parameter is one matrix, whatever we call its module."""
        import torch
        from torch import nn

        class Flat(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Module()
                self.inner.table = nn.Parameter(torch.randn(10, 8))

            def forward(self, x: Any) -> Any:
                return x

        config = {"target_modules": [], "target_parameters": ["inner.table"]}
        folder = saved(Flat, tmp_path, r=2, lora_alpha=3, **config)
        [layer] = [
            module
            for module in reloaded(Flat, folder).modules()
            if type(module).__name__ == "ParamWrapper"
        ]
        wanted = layer.get_delta_weight("default").detach().numpy()
        [found] = read(folder).values()
        assert gap(found, wanted) < EXACT


def rows() -> list[tuple[str, str, str]]:
    """(dialect, title, kind) of each case here, for the table of what is supported."""
    return [("peft", f"target_parameters, {case}", "lora") for case in CASES]
