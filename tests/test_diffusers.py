"""diffusers reads what adapterops merged from LoRA files in its three spellings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import adapterops as ao
from adapterops.errors import FormatError, IncompatibleError
from tests.dialects import DIFFUSERS, Diffusers
from tests.support import dense, distance, pairs, weighted


@pytest.fixture(scope="session")
def images() -> Any:
    """Helpers around diffusers, imported once."""
    pytest.importorskip("diffusers")
    return pytest.importorskip("tests.image_models")


def names(case: Diffusers, module: str) -> tuple[str, str]:
    """The names of a module's B and A as trainers write them."""
    prefix = "" if case.bare else f"{case.component}."
    if case.spelling == "peft":
        return f"{prefix}{module}.lora_B.weight", f"{prefix}{module}.lora_A.weight"
    if case.spelling == "processor":
        block, _, leaf = module.removesuffix(".0").rpartition(".")
        stem = f"{prefix}{block}.processor.{leaf}_lora"
    else:
        stem = prefix + module + (".lora_linear_layer" if "text" in case.component else ".lora")
    return f"{stem}.up.weight", f"{stem}.down.weight"


def write(case: Diffusers, file: Path, seed: int, rank: int, alpha: float | None) -> Any:
    """A file of this case, and the ΔW that diffusers' conventions give it."""
    factors = pairs(seed, case.modules, rank)
    tensors = {}
    metadata = {"format": "pt"}
    for module, both in factors.items():
        tensors.update(zip(names(case, module), both, strict=True))
    scales = dict.fromkeys(factors, 1.0)
    if alpha is not None:
        leaves = sorted({module.removeprefix("text_model.") for module in factors})
        config = {"r": rank, "lora_alpha": alpha, "target_modules": leaves, **case.config}
        packed = {f"{case.component}.{key}": value for key, value in config.items()}
        metadata["lora_adapter_metadata"] = json.dumps(packed)
        root = rank**0.5 if case.config.get("use_rslora") else rank
        for module in factors:
            own = case.config.get("alpha_pattern", {}).get(module.rpartition(".")[2], alpha)
            scales[module] = own / root
    wanted = {module: scales[module] * delta for module, delta in dense(factors).items()}
    if case.config.get("lora_bias"):
        rng = np.random.default_rng(seed)
        for module, (B, _) in factors.items():
            bias = rng.standard_normal(len(B)).astype(np.float32)
            tensors[names(case, module)[0].replace("weight", "bias")] = bias
            wanted[f"{module}.bias"] = scales[module] * bias.astype(np.float64)
    save_file(tensors, file, metadata)
    return wanted


def as_loaded(wanted: dict[str, np.ndarray], host: dict[str, Any]) -> dict[str, np.ndarray]:
    """Module names as they are in the model: transformers 5 left `text_model.` out."""
    flat = not any(name.startswith("text_model.") for name in host)
    return {name.removeprefix("text_model.") if flat else name: d for name, d in wanted.items()}


@pytest.mark.parametrize("case", DIFFUSERS, ids=lambda case: f"{case.component}-{case.kind}")
@pytest.mark.parametrize("weights", ([0.7, 0.3], [1.0, -0.6], [1.0, 0.0]), ids=str)
def test_diffusers_reads_back_the_exact_sum(
    images: Any, case: Diffusers, weights: list[float], tmp_path: Path
) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    terms = [
        (weight, write(case, file, seed, rank, alpha))
        for weight, file, seed, rank, alpha in zip(
            weights, files, (1, 2), case.ranks, case.alpha, strict=True
        )
    ]
    out = tmp_path / "m" / "pytorch_lora_weights.safetensors"
    out.parent.mkdir()
    ao.merge(files, weights, out=out)
    bare = case.bare and 0.0 in weights  # a copy keeps its names
    found = images.deltas(out, case.component, bare=bare)
    assert distance(found, as_loaded(weighted(*terms), found)) < 1e-6


def only(kind: str, component: str = "unet") -> Diffusers:
    return next(case for case in DIFFUSERS if (case.kind, case.component) == (kind, component))


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "numpy") as opened:
        return opened.metadata()


def read(file: Path, **options: Any) -> dict[str, np.ndarray]:
    return {name: factors.dense() for name, factors in ao.open_adapter(file, **options).items()}


def test_spelling_of_the_first_input_is_kept(tmp_path: Path) -> None:
    for index, kind in enumerate(("attention processors", "lora.down / lora.up")):
        case = only(kind)
        files = [tmp_path / f"{index}{name}.safetensors" for name in "ab"]
        for seed, file in enumerate(files):
            write(case, file, seed, 2, None)
        out = tmp_path / f"{index}.safetensors"
        ao.merge(files, [0.7, 0.3], out=out)
        assert load_file(out).keys() == load_file(files[0]).keys()
        assert "lora_adapter_metadata" not in metadata_of(out)


def test_components_travel_together(images: Any, tmp_path: Path) -> None:
    """One input has a UNet in an old spelling, the other both in the new one: that is written."""
    parts = [only("attention processors")]
    other = [only("lora_adapter_metadata"), only("lora_adapter_metadata", "text_encoder")]
    files, terms = [], []
    for seed, (cases, alpha) in enumerate(((parts, None), (other, 6.0))):
        tensors: dict[str, np.ndarray] = {}
        header: dict[str, str] = {}
        wanted = {}
        for case in cases:
            part = tmp_path / "part.safetensors"
            wanted[case.component] = write(case, part, seed, 2 + seed, alpha)
            tensors |= load_file(part)
            header |= json.loads(metadata_of(part).get("lora_adapter_metadata", "{}"))
        files.append(tmp_path / f"{seed}.safetensors")
        save_file(tensors, files[-1], {"lora_adapter_metadata": json.dumps(header)})
        terms.append(wanted)
    out = tmp_path / "m" / "pytorch_lora_weights.safetensors"
    out.parent.mkdir()
    ao.merge(files, [0.7, 0.3], out=out)
    assert all(".lora_A." in name or ".lora_B." in name for name in load_file(out))
    for component in ("unet", "text_encoder"):
        found = images.deltas(out, component)
        wanted = weighted((0.7, terms[0].get(component, {})), (0.3, terms[1][component]))
        assert distance(found, as_loaded(wanted, found)) < 1e-6


def test_old_names_of_a_text_encoders_attention(images: Any, tmp_path: Path) -> None:
    block = "text_model.encoder.layers.0.self_attn"
    factors = pairs(1, {"q": (16, 16), "out": (16, 16)}, 2)
    tensors = {}
    for leaf, (B, A) in factors.items():
        tensors[f"text_encoder.{block}.to_{leaf}_lora.up.weight"] = B
        tensors[f"text_encoder.{block}.to_{leaf}_lora.down.weight"] = A
    source = tmp_path / "a.safetensors"
    save_file(tensors, source)
    ao.merge([source], [0.5], out=tmp_path / "m.safetensors")
    found = images.deltas(tmp_path / "m.safetensors", "text_encoder")
    wanted = {f"{block}.{leaf}_proj": d for leaf, d in dense(factors, 0.5).items()}
    assert distance(found, as_loaded(wanted, found)) < 1e-6


@pytest.mark.parametrize(
    ("header", "scale"),
    [
        ({}, 1.0),
        ({"lora_alpha": "8", "r": "4"}, 2.0),
        ({"unet.lora_alpha": "8", "unet.r": "4"}, 2.0),
        ({"alpha": "2", "rank": "4"}, 0.5),
        ({"alpha": "2"}, 0.5),
        ({"alpha": "2", "rank": "16"}, 1.0),  # says nothing about these tensors
        ({"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 6}'}, 1.5),
        ({"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 6}', "alpha": "6"}, 1.5),
        (
            {
                "lora_adapter_metadata": json.dumps(
                    {"unet.r": 8, "unet.lora_alpha": 8, "unet.rank_pattern": {"to_q": 4}}
                )
            },
            2.0,
        ),
        ({"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 6}'}, 1.0),
    ],
    ids=str,
)
def test_where_the_scale_is_found(header: dict[str, str], scale: float, tmp_path: Path) -> None:
    factors = pairs(1, {"down_blocks.0.attn1.to_q": (12, 10)}, 4)
    [(B, A)] = factors.values()
    stem = "unet.down_blocks.0.attn1.to_q"
    save_file(
        {f"{stem}.lora_B.weight": B, f"{stem}.lora_A.weight": A}, tmp_path / "a.safetensors", header
    )
    wanted = {f"unet.{name}": delta for name, delta in dense(factors, scale).items()}
    assert distance(read(tmp_path / "a.safetensors"), wanted) < 1e-15


@pytest.mark.parametrize(
    ("header", "error", "says"),
    [
        (
            {"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 6}', "alpha": "8"},
            IncompatibleError,
            "two scales disagree",
        ),
        (
            {"lora_adapter_metadata": '{"unet.r": 8, "unet.lora_alpha": 6}'},
            IncompatibleError,
            "r=8",
        ),
        ({"alpha": "much"}, FormatError, "no number"),
        ({"lora_adapter_metadata": "{"}, FormatError, "not valid JSON"),
    ],
    ids=str,
)
def test_headers_that_cannot_be_right(
    header: dict[str, str], error: type[Exception], says: str, tmp_path: Path
) -> None:
    write(only("lora_A / lora_B, no alpha"), tmp_path / "a.safetensors", 1, 4, None)
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "a.safetensors", header)
    with pytest.raises(error, match=says):
        ao.open_adapter(tmp_path / "a.safetensors")


def test_as_diffusers_itself_saves(images: Any, tmp_path: Path) -> None:
    """`save_lora_weights` with each component's whole LoraConfig in the header."""
    patterns = {"rank_pattern": {"to_k": 3}, "alpha_pattern": {"to_out.0": 5.0}}
    configs = (
        {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_k", "to_out.0"], **patterns},
        {"r": 2, "lora_alpha": 2, "target_modules": ["to_q", "proj_in"], "use_rslora": True},
    )
    files = [images.saved(tmp_path / str(i), i, config) for i, config in enumerate(configs)]
    out = tmp_path / "m" / "m.safetensors"
    out.parent.mkdir()
    ao.merge(files, [0.7, -0.3], out=out, dtype="float32")
    for component in ("unet", "text_encoder"):
        wanted = weighted(
            (0.7, images.deltas(files[0], component)), (-0.3, images.deltas(files[1], component))
        )
        assert distance(images.deltas(out, component), wanted) < 1e-6


def test_a_peft_wrapper_in_the_middle_is_no_part_of_the_name(tmp_path: Path) -> None:
    case = only("lora_A / lora_B, no alpha")
    wanted = write(case, tmp_path / "a.safetensors", 1, 2, None)
    wrapped = {
        name.replace("unet.", "unet.base_model.model."): value
        for name, value in load_file(tmp_path / "a.safetensors").items()
    }
    save_file(wrapped, tmp_path / "b.safetensors")
    ao.merge(
        [tmp_path / "b.safetensors", tmp_path / "a.safetensors"],
        [1.0, 0.5],
        out=tmp_path / "m.safetensors",
    )
    wanted = {f"unet.{name}": 1.5 * delta for name, delta in wanted.items()}
    assert distance(read(tmp_path / "m.safetensors"), wanted) < 1e-6


def test_mixed_ranks_become_one(images: Any, tmp_path: Path) -> None:
    """Released diffusers give a file of mixed ranks without alpha wrong scales; ours is uniform."""
    case = only("lora_A / lora_B, no alpha")
    tensors, wanted = {}, {}
    for rank, (module, shape) in enumerate(case.modules.items(), 2):
        factors = pairs(rank, {module: shape}, rank)
        tensors.update(zip(names(case, module), factors[module], strict=True))
        wanted |= dense(factors, 0.5)
    save_file(tensors, tmp_path / "a.safetensors")
    ao.merge([tmp_path / "a.safetensors"], [0.5], out=tmp_path / "m.safetensors")
    ranks = {v.shape[0] for k, v in load_file(tmp_path / "m.safetensors").items() if "_A." in k}
    assert len(ranks) == 1
    assert distance(images.deltas(tmp_path / "m.safetensors", "unet"), wanted) < 1e-6


def test_names_without_a_component_get_no_config(tmp_path: Path) -> None:
    """diffusers would find no part for its component in it and fall back on PEFT's r = 8."""
    tensors = {}
    for module, (B, A) in pairs(1, {"transformer_blocks.0.attn.to_q": (12, 10)}, 2).items():
        tensors |= {f"{module}.lora_B.weight": B, f"{module}.lora_A.weight": A}
    save_file(tensors, tmp_path / "a.safetensors")
    ao.merge([tmp_path / "a.safetensors"], [0.5], out=tmp_path / "m.safetensors")
    assert load_file(tmp_path / "m.safetensors").keys() == tensors.keys()
    assert "lora_adapter_metadata" not in metadata_of(tmp_path / "m.safetensors")


def test_the_two_files_of_the_corpus(images: Any, corpus: Path, tmp_path: Path) -> None:
    """Real attention processor files, one a pickle, into an SD 1.x UNet's 128 projections."""
    import torch

    folder = corpus / "catundchat__stable-diffusion-v1.5-lora"
    files = [folder / f"pytorch_lora_weights.{suffix}" for suffix in ("safetensors", "bin")]
    out = tmp_path / "m.safetensors"
    report = ao.merge(files, [0.7, 0.3], out=out, allow_pickle=True, dtype="float32")
    assert len(report.modules) == 128
    states = [load_file(files[0]), torch.load(files[1], "cpu", weights_only=True)]
    wanted: dict[str, np.ndarray] = {}
    for weight, state in zip((0.7, 0.3), states, strict=True):
        converted = images.as_peft({name: torch.as_tensor(value) for name, value in state.items()})
        wanted = weighted((1.0, wanted), (weight, converted))
    found = images.as_peft(
        {name: torch.from_numpy(value) for name, value in load_file(out).items()}
    )
    assert distance(found, wanted) < 1e-6


def test_a_models_own_save_stays_loadable_by_the_model(images: Any, tmp_path: Path) -> None:
    """`save_lora_adapter` writes bare keys and its config into the header; so must the merge."""
    import torch
    from peft import LoraConfig

    files = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        unet = images.model("unet")
        unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v"]))
        for name, value in unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.1)
        unet.save_lora_adapter(tmp_path / str(seed))
        files.append(tmp_path / str(seed) / "pytorch_lora_weights.safetensors")
    out = tmp_path / "m.safetensors"
    report = ao.merge(files, [0.7, 0.3], out=out, dtype="float32")
    assert report.dialect == "diffusers" and report.inputs[0].scale.startswith("1.5")
    exact: dict[str, np.ndarray] = {}
    for weight, file in zip((0.7, 0.3), files, strict=True):
        tensors = load_file(file)
        for name in (n for n in tensors if n.endswith(".lora_A.weight")):
            stem = name.removesuffix(".lora_A.weight")
            delta = tensors[f"{stem}.lora_B.weight"].astype(float) @ tensors[name].astype(float)
            exact[stem] = exact.get(stem, 0.0) + weight * 1.5 * delta
    assert distance(images.deltas(out, "unet", bare=True), exact) < 1e-6
