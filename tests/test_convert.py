"""convert: names and places change, numbers do not.

Oracles: the tensors' bits as safetensors' own reader gives them; dense float64 of the file's own
scale; PEFT 0.21.2, diffusers' loaders and a model of mlx-lm's on what was written.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import adapterops as ao
from adapterops.errors import AdapterOpsError, IncompatibleError, UsageError
from adapterops.files.output import PROVENANCE_KEY
from tests import kinds
from tests.support import distance, load_file, read_peft, write_peft
from tests.test_mlx import Mlx, model

LLAMA = {
    "model.layers.0.self_attn.q_proj": (12, 16),
    "model.layers.0.self_attn.v_proj": (6, 16),
    "model.layers.1.self_attn.q_proj": (12, 16),
    "model.layers.1.mlp.down_proj": (16, 20),
}
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
UNET = {
    f"{ATTENTION}.to_q": (32, 32),
    f"{ATTENTION}.to_v": (32, 32),
    f"{ATTENTION}.to_out.0": (32, 32),
    "down_blocks.0.resnets.0.time_emb_proj": (32, 128),
}
CONVOLUTIONS = {
    "down_blocks.0.attentions.0.proj_in": (32, 32, 1, 1),
    "down_blocks.0.resnets.0.conv1": (32, 32, 3, 3),
    "conv_in": (32, 4, 3, 3),
}


# ---- writing and reading without adapterops ------------------------------------------------------


def factors(
    shapes: Mapping[str, tuple[int, ...]],
    ranks: Mapping[str, int] | int,
    dtype: Any = np.float32,
    seed: int = 1,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random B and A of each module; a shape with more than two extents is a convolution's."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, (out, *inside) in shapes.items():
        rank = ranks if isinstance(ranks, int) else ranks[name]
        ones = (1,) * (len(inside) - 1)
        B = (0.3 * rng.standard_normal((out, rank, *ones))).astype(dtype)
        result[name] = B, (0.3 * rng.standard_normal((rank, *inside))).astype(dtype)
    return result


def metadata_of(path: Path) -> dict[str, str]:
    """The header's metadata of the weights file at a path."""
    inside = [path / name for name in ("adapter_model.safetensors", "adapters.safetensors")]
    file = next((each for each in inside if each.is_file()), path)
    with safe_open(file, "numpy") as opened:
        return dict(opened.metadata())


def stored(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """B and A of each module as the file holds them; kohya's and diffusers' U-Net paths dotted."""
    if (path / "adapters.safetensors").is_file():
        marks, tensors = (".lora_b", ".lora_a"), load_file(path / "adapters.safetensors")
        tensors = {name: value.T for name, value in tensors.items()}
    elif path.is_dir():
        marks = (".lora_B.weight", ".lora_A.weight")
        tensors = load_file(path / "adapter_model.safetensors")
    else:
        tensors = load_file(path)
        up = any(name.endswith(".lora_up.weight") for name in tensors)
        marks = (
            (".lora_up.weight", ".lora_down.weight") if up else (".lora_B.weight", ".lora_A.weight")
        )
    flat = {f"lora_unet_{name.replace('.', '_')}": name for name in (*UNET, *CONVOLUTIONS)}
    result = {}
    for name, B in tensors.items():
        if name.endswith(marks[0]):
            stem = name.removesuffix(marks[0])
            plain = stem.removeprefix("base_model.model.").removeprefix("unet.")
            result[flat.get(plain, plain)] = B, tensors[stem + marks[1]]
    assert result
    return result


def assert_same_bits(path: Path, before: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """The factors themselves, beyond them nothing but columns of zeros."""
    after = stored(path)
    assert after.keys() == before.keys()
    for name, (B, A) in before.items():
        new_b, new_a = after[name]
        rank = len(A)
        assert new_b.dtype == B.dtype
        np.testing.assert_array_equal(new_b[:, :rank], B, err_msg=name)
        np.testing.assert_array_equal(new_a[:rank], A, err_msg=name)
        assert not new_b[:, rank:].any() and not new_a[rank:].any()


def peft_config_deltas(folder: Path) -> dict[str, np.ndarray]:
    """ΔW by PEFT's rule: anchored patterns, alpha / r or alpha / √r."""
    config = json.loads((folder / "adapter_config.json").read_text())
    result = {}
    for name, (B, A) in stored(folder).items():

        def of(pattern: str, default: float, name: str = name) -> float:
            for key, value in config[pattern].items():
                if re.match(rf"(.*\.)?({key})$", name):
                    return value
            return default

        rank, alpha = of("rank_pattern", config["r"]), of("alpha_pattern", config["lora_alpha"])
        assert rank == len(A), name
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        result[name] = scale * product(B, A)
    return result


def product(B: np.ndarray, A: np.ndarray) -> np.ndarray:
    return B.astype(float).reshape(len(B), -1) @ A.astype(float).reshape(len(A), -1)


def kohya_deltas(file: Path) -> dict[str, np.ndarray]:
    """ΔW by kohya's rule, alpha / r of each module, under U-Net paths."""
    tensors = load_file(file)
    result = {}
    for name, (B, A) in stored(file).items():
        alpha = float(tensors[f"lora_unet_{name.replace('.', '_')}.alpha"].reshape(-1)[0])
        result[name] = alpha / len(A) * product(B, A)
    return result


def scaled(
    given: Mapping[str, tuple[np.ndarray, np.ndarray]], scales: Mapping[str, float] | float
) -> dict[str, np.ndarray]:
    return {
        name: (scales if isinstance(scales, float) else scales[name]) * product(B, A)
        for name, (B, A) in given.items()
    }


# ---- PEFT and MLX --------------------------------------------------------------------------------

ONE_SCALE: dict[str, tuple[int, dict[str, Any], float]] = {
    "alpha is r": (4, {"alpha": 4}, 1.0),
    "alpha is 16, r 4": (4, {"alpha": 16}, 4.0),
    "alpha is 5, r 3": (3, {"alpha": 5}, 5 / 3),
    "alpha is 0.3, r 7": (7, {"alpha": 0.3}, 0.3 / 7),
    "rsLoRA, 16 and 4": (4, {"alpha": 16, "use_rslora": True}, 8.0),
    "rsLoRA, 8 and 5": (5, {"alpha": 8, "use_rslora": True}, 8 / math.sqrt(5)),
    "rsLoRA, 5 and 14": (14, {"alpha": 5, "use_rslora": True}, 5 / math.sqrt(14)),
}


class TestLanguageModels:
    @pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["float32", "float16"])
    @pytest.mark.parametrize("case", ONE_SCALE)
    def test_peft_to_mlx_keeps_every_bit(self, case: str, dtype: Any, tmp_path: Path) -> None:
        rank, config, scale = ONE_SCALE[case]
        before = factors(LLAMA, rank, dtype)
        write_peft(tmp_path / "a", before, **config)
        report = ao.convert(tmp_path / "a", out=tmp_path / "m", to="mlx")
        assert report.schema == "adapterops.convert/1" and report.dialect == "mlx"
        document = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
        assert document["lora_parameters"]["scale"] == scale
        assert_same_bits(tmp_path / "m", before)
        assert report.error == 0.0
        loaded = Mlx(tmp_path / "m", model(2)).deltas
        assert distance(loaded, scaled(before, scale)) < 1e-15

    @pytest.mark.parametrize("case", ONE_SCALE)
    def test_and_back(self, case: str, tmp_path: Path) -> None:
        rank, config, scale = ONE_SCALE[case]
        before = factors(LLAMA, rank)
        write_peft(tmp_path / "a", before, **config)
        ao.convert(tmp_path / "a", out=tmp_path / "m", to="mlx")
        report = ao.convert(tmp_path / "m", out=tmp_path / "p", to="peft")
        assert distance(peft_config_deltas(tmp_path / "p"), scaled(before, scale)) < 1e-15
        assert_same_bits(tmp_path / "p", before)
        assert report.error < 1e-15

    @pytest.mark.parametrize(
        ("ranks", "config", "scales"),
        [
            ({"v_proj": 2}, {"rank_pattern": {"v_proj": 2}}, {"v_proj": 2.0}),
            ({}, {"alpha_pattern": {"q_proj": 7}}, {"q_proj": 7 / 4}),
            (
                {"q_proj": 3, "v_proj": 6},
                {
                    "rank_pattern": {"q_proj": 3, "v_proj": 6},
                    "alpha_pattern": {"v_proj": 9, "q_proj": 0.1},
                },
                {"q_proj": 0.1 / 3, "v_proj": 1.5},
            ),
            (
                {"v_proj": 2},
                {"rank_pattern": {"v_proj": 2}, "use_rslora": True},
                {"": 2.0, "v_proj": 4 / math.sqrt(2)},
            ),
        ],
        ids=["ranks", "alphas", "both", "rsLoRA and ranks"],
    )
    def test_scales_that_one_number_cannot_say(
        self,
        ranks: dict[str, int],
        config: dict[str, Any],
        scales: dict[str, float],
        tmp_path: Path,
    ) -> None:
        """MLX has one rank and one scale: folded, and the same ΔW by mlx-lm's rule."""
        of = {name: name.rpartition(".")[2] for name in LLAMA}
        before = factors(LLAMA, {name: ranks.get(of[name], 4) for name in LLAMA})
        write_peft(tmp_path / "a", before, **{"r": 4, "alpha": 4, **config})
        wanted = scaled(before, {n: scales.get(of[n], scales.get("", 1.0)) for n in LLAMA})
        assert distance(peft_config_deltas_of_source(tmp_path / "a"), wanted) < 1e-15
        report = ao.convert(tmp_path / "a", out=tmp_path / "m", to="mlx")
        loaded = Mlx(tmp_path / "m", model(2)).deltas
        assert distance(loaded, wanted) == pytest.approx(report.error, rel=1e-3, abs=1e-12)
        assert report.error < 1e-7
        assert report.rank == max(ranks.get(of[name], 4) for name in LLAMA)
        ao.convert(tmp_path / "m", out=tmp_path / "p", to="peft")
        assert distance(peft_config_deltas(tmp_path / "p"), wanted) < 1e-7

    def test_modules_of_one_scale_and_several_ranks_keep_their_bits(self, tmp_path: Path) -> None:
        """alpha / r is 2 everywhere: MLX can say that, with columns of zeros."""
        ranks = dict(zip(LLAMA, (4, 2, 4, 3), strict=True))
        before = factors(LLAMA, ranks)
        config = {
            "rank_pattern": {"v_proj": 2, "down_proj": 3},
            "alpha_pattern": {"v_proj": 4, "down_proj": 6},
        }
        write_peft(tmp_path / "a", before, alpha=8, **config)
        ao.convert(tmp_path / "a", out=tmp_path / "m", to="mlx")
        assert_same_bits(tmp_path / "m", before)
        assert distance(Mlx(tmp_path / "m", model(2)).deltas, scaled(before, 2.0)) < 1e-15

    @pytest.mark.parametrize("to", ["mlx", "peft"])
    @pytest.mark.parametrize("columns", [2, 0], ids=["two live columns", "B is zero"])
    def test_columns_that_add_nothing_stay(self, columns: int, to: str, tmp_path: Path) -> None:
        """A fresh adapter's B is zero, and its A is what training starts from."""
        before = {}
        for name, (B, A) in factors(LLAMA, 4).items():
            B[:, columns:] = 0.0
            before[name] = B, A
        write_peft(tmp_path / "a", before, alpha=8)
        source = tmp_path / "a"
        if to == "peft":
            ao.convert(source, out=tmp_path / "m", to="mlx", rank=4)
            source = tmp_path / "m"
        ao.convert(source, out=tmp_path / "out", to=to)
        assert_same_bits(tmp_path / "out", before)

    @pytest.mark.parametrize(("alpha", "rank"), [(8, 4), (5, 3), (1, 5)], ids=str)
    def test_mlx_to_peft_keeps_every_bit(self, alpha: float, rank: int, tmp_path: Path) -> None:
        before = factors(LLAMA, rank)
        folder = tmp_path / "m"
        folder.mkdir()
        tensors = {f"{name}.lora_b": B.T.copy() for name, (B, _) in before.items()}
        tensors |= {f"{name}.lora_a": A.T.copy() for name, (_, A) in before.items()}
        save_file(tensors, folder / "adapters.safetensors")
        keys = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
        parameters = {"rank": rank, "scale": alpha / rank, "dropout": 0.0, "keys": keys}
        config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        ao.convert(folder, out=tmp_path / "p", to="peft")
        assert_same_bits(tmp_path / "p", before)
        written = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
        assert written["lora_alpha"] / written["r"] == alpha / rank

    @pytest.mark.parametrize("scaling", ["folded", "keep", "rslora"])
    def test_rslora_and_plain(self, scaling: str, tmp_path: Path) -> None:
        for source, config in (
            ("plain", {"alpha": 6}),
            ("stable", {"alpha": 6, "use_rslora": True}),
        ):
            before = factors(LLAMA, 4)
            write_peft(tmp_path / source, before, **config)
            wanted = scaled(before, 1.5 if source == "plain" else 3.0)
            out = tmp_path / f"{source} {scaling}"
            ao.convert(tmp_path / source, out=out, scaling=scaling)
            assert distance(peft_config_deltas(out), wanted) < 1e-7
            written = json.loads((out / "adapter_config.json").read_text())
            if scaling == "folded":
                assert (written["lora_alpha"], written["use_rslora"]) == (4, False)
            if scaling == "rslora":
                assert written["use_rslora"] is True
                assert_same_bits(out, before)
            if scaling == "keep":
                assert_same_bits(out, before)

    def test_patterns_survive_rslora(self, tmp_path: Path) -> None:
        """Ranks of their own under α/√r, the scale of each kept to the last bit but one."""
        ranks = dict(zip(LLAMA, (4, 2, 4, 3), strict=True))
        before = factors(LLAMA, ranks)
        write_peft(
            tmp_path / "a",
            before,
            alpha=5,
            rank_pattern={"v_proj": 2, "down_proj": 3},
            alpha_pattern={"down_proj": 0.7},
        )
        scales = {name: (0.7 if name.endswith("down_proj") else 5) / ranks[name] for name in LLAMA}
        ao.convert(tmp_path / "a", out=tmp_path / "p", scaling="rslora")
        assert distance(peft_config_deltas(tmp_path / "p"), scaled(before, scales)) < 1e-7


def peft_config_deltas_of_source(folder: Path) -> dict[str, np.ndarray]:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    empty = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    file.write_text(json.dumps({**empty, **config}))
    return peft_config_deltas(folder)


# ---- PEFT, kohya and diffusers -------------------------------------------------------------------


def write_unet(folder: Path, given: Mapping[str, Any], **config: Any) -> Path:
    """A PEFT adapter of a U-Net; targets are whole paths."""
    return write_peft(folder, given, target_modules=sorted(given), **config)


def unet_deltas(folder: Path) -> dict[str, np.ndarray]:
    """ΔW of each layer of a tiny U-Net as PEFT loads a directory, (out, channels · kernel)."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from peft.utils import load_peft_weights

    images = pytest.importorskip("tests.image_models")
    config = LoraConfig.from_pretrained(str(folder))
    host = inject_adapter_in_model(config, images.model("unet"))
    state = {k: torch.as_tensor(v) for k, v in load_peft_weights(str(folder), "cpu").items()}
    state = {name.removeprefix("base_model.model."): value for name, value in state.items()}
    done = set_peft_model_state_dict(host, state)
    assert not done.unexpected_keys
    result = {}
    for name, layer in host.double().named_modules():
        if isinstance(layer, LoraLayer):
            change = layer.get_delta_weight("default").detach().numpy()
            result[name] = change.reshape(len(change), -1)
    return result


@pytest.fixture(scope="session")
def images() -> Any:
    pytest.importorskip("diffusers")
    return pytest.importorskip("tests.image_models")


U_NETS: dict[str, dict[str, Any]] = {
    "alpha is r": {"ranks": 4, "alphas": 4.0},
    "alpha is 2, r 4": {"ranks": 4, "alphas": 2.0},
    "alpha is 1, r 3": {"ranks": 3, "alphas": 1.0},
    "ranks": {"ranks": (2, 4, 3, 4, 1, 5, 2), "alphas": 2.0},
    "alphas": {"ranks": 4, "alphas": (2.0, 1.0, 4.0, 8.0, 0.5, 4.0, 4.0)},
    "both": {"ranks": (2, 4, 3, 4, 1, 5, 2), "alphas": (2.0, 1.0, 4.5, 8.0, 0.1, 4.0, 7.0)},
}


def unet_case(case: str) -> tuple[dict[str, Any], dict[str, int], dict[str, float]]:
    """Factors, ranks and alphas of one case, by module."""
    names = [*UNET, *CONVOLUTIONS]
    ranks, alphas = U_NETS[case]["ranks"], U_NETS[case]["alphas"]
    ranks = dict(zip(names, ranks if isinstance(ranks, tuple) else [ranks] * 7, strict=True))
    alphas = dict(zip(names, alphas if isinstance(alphas, tuple) else [alphas] * 7, strict=True))
    return factors({**UNET, **CONVOLUTIONS}, ranks), ranks, alphas


def write_unet_case(folder: Path, case: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    given, ranks, alphas = unet_case(case)
    first = next(iter(given))
    write_unet(
        folder,
        given,
        r=ranks[first],
        alpha=alphas[first],
        rank_pattern={f"^{n}": r for n, r in ranks.items() if r != ranks[first]},
        alpha_pattern={f"^{n}": a for n, a in alphas.items() if a != alphas[first]},
    )
    return given, scaled(given, {name: alphas[name] / ranks[name] for name in given})


class TestImageModels:
    @pytest.mark.parametrize("case", U_NETS)
    def test_peft_to_kohya_keeps_every_bit(self, case: str, images: Any, tmp_path: Path) -> None:
        """Per-module alphas hold whatever PEFT's patterns say."""
        given, wanted = write_unet_case(tmp_path / "a", case)
        assert distance(unet_deltas(tmp_path / "a"), wanted) < 1e-7  # the oracle first
        report = ao.convert(tmp_path / "a", out=tmp_path / "k.safetensors", to="kohya")
        assert distance(kohya_deltas(tmp_path / "k.safetensors"), wanted) < 1e-7
        assert report.error < 1e-7
        if len({*unet_case(case)[2].values()} | {*unet_case(case)[1].values()}) == 1:
            found = images.deltas(tmp_path / "k.safetensors", "unet")
            assert distance(found, wanted) < 1e-6
        if isinstance(U_NETS[case]["ranks"], int):
            assert_same_bits(tmp_path / "k.safetensors", given)
            assert report.error < 1e-15

    @pytest.mark.parametrize("case", ["ranks", "both"])
    def test_ranks_of_their_own_keep_every_bit_in_kohya(self, case: str, tmp_path: Path) -> None:
        """kohya says rank and alpha of each module; padded, alpha would need more than float32."""
        given, wanted = write_unet_case(tmp_path / "a", case)
        report = ao.convert(tmp_path / "a", out=tmp_path / "k.safetensors", to="kohya")
        assert distance(kohya_deltas(tmp_path / "k.safetensors"), wanted) == pytest.approx(
            report.error, rel=1e-3, abs=1e-12
        )
        assert_same_bits(tmp_path / "k.safetensors", given)

    def test_diffusers_forgets_alphas_that_differ(self, images: Any, tmp_path: Path) -> None:
        """diffusers 0.42.1 looks for them under attention processors that are gone.

        sd-scripts and those that follow it multiply each module by its own alpha / r, which is
        what is written; from diffusers' own dialect diffusers reads the same adapter right.
        """
        _, wanted = write_unet_case(tmp_path / "a", "alphas")
        ao.convert(tmp_path / "a", out=tmp_path / "k.safetensors", to="kohya")
        with pytest.raises(RuntimeWarning, match="alpha_pattern keys did not match"):
            images.deltas(tmp_path / "k.safetensors", "unet")
        ao.convert(tmp_path / "k.safetensors", out=tmp_path / "d.safetensors", to="diffusers")
        assert distance(images.deltas(tmp_path / "d.safetensors", "unet"), wanted) < 1e-6
        folded = tmp_path / "f.safetensors"
        ao.convert(tmp_path / "a", out=folded, to="kohya", scaling="folded")
        assert distance(images.deltas(folded, "unet"), wanted) < 1e-6

    @pytest.mark.parametrize("case", U_NETS)
    def test_round_trip_through_kohya_and_diffusers(
        self, case: str, images: Any, tmp_path: Path
    ) -> None:
        given, wanted = write_unet_case(tmp_path / "a", case)
        ao.convert(tmp_path / "a", out=tmp_path / "k.safetensors", to="kohya")
        ao.convert(tmp_path / "k.safetensors", out=tmp_path / "d.safetensors", to="diffusers")
        assert distance(images.deltas(tmp_path / "d.safetensors", "unet"), wanted) < 1e-6
        ao.convert(tmp_path / "d.safetensors", out=tmp_path / "p", to="peft")
        assert distance(unet_deltas(tmp_path / "p"), wanted) < 1e-6
        assert set(stored(tmp_path / "p")) == set(given)

    def test_a_scale_that_is_a_power_of_two_folds_without_loss(
        self, images: Any, tmp_path: Path
    ) -> None:
        _, wanted = write_unet_case(tmp_path / "a", "alpha is 2, r 4")
        report = ao.convert(tmp_path / "a", out=tmp_path / "d.safetensors", to="diffusers")
        assert report.error == 0.0
        found = {name: product(B, A) for name, (B, A) in stored(tmp_path / "d.safetensors").items()}
        assert distance(found, wanted) == 0.0

    @pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["float32", "float16"])
    @pytest.mark.parametrize("case", U_NETS)
    def test_kohya_to_peft_keeps_every_bit(
        self, case: str, dtype: Any, images: Any, tmp_path: Path
    ) -> None:
        given, ranks, alphas = unet_case(case)
        given = {name: (B.astype(dtype), A.astype(dtype)) for name, (B, A) in given.items()}
        tensors = {}
        for name, (B, A) in given.items():
            flat = f"lora_unet_{name.replace('.', '_')}"
            tensors |= {f"{flat}.lora_up.weight": B, f"{flat}.lora_down.weight": A}
            tensors[f"{flat}.alpha"] = np.array(alphas[name], dtype)
        save_file(tensors, tmp_path / "k.safetensors")
        scales = {n: float(np.array(alphas[n], dtype)) / ranks[n] for n in given}
        report = ao.convert(tmp_path / "k.safetensors", out=tmp_path / "p", to="peft")
        assert distance(peft_config_deltas(tmp_path / "p"), scaled(given, scales)) < 1e-15
        assert distance(unet_deltas(tmp_path / "p"), scaled(given, scales)) < 1e-6
        assert_same_bits(tmp_path / "p", given)
        assert report.error < 1e-15

    def test_text_encoders_keep_their_numbers(self, tmp_path: Path) -> None:
        layer = "text_model.encoder.layers.{}.self_attn.q_proj"
        tensors = {}
        for part in ("text_encoder", "text_encoder_2"):
            for index in (0, 11):
                for side, value in zip("BA", factors({"x": (16, 16)}, 2)["x"], strict=True):
                    tensors[f"{part}.{layer.format(index)}.lora_{side}.weight"] = value
        save_file(tensors, tmp_path / "d.safetensors")
        ao.convert(tmp_path / "d.safetensors", out=tmp_path / "k.safetensors", to="kohya")
        names = {name.partition(".")[0] for name in load_file(tmp_path / "k.safetensors")}
        stem = layer.replace(".", "_")
        assert names == {f"lora_te{n}_{stem.format(i)}" for n in (1, 2) for i in (0, 11)}
        ao.convert(tmp_path / "k.safetensors", out=tmp_path / "e.safetensors", to="diffusers")
        assert load_file(tmp_path / "e.safetensors").keys() == tensors.keys()


# ---- other kinds become LoRA ---------------------------------------------------------------------

LINEAR, SPATIAL = f"{ATTENTION}.to_q", "down_blocks.0.resnets.0.conv1"


class TestKinds:
    @pytest.mark.parametrize(
        ("to", "kind"),
        [
            pytest.param(to, kind, id=f"{kind.title} to {to}")
            for to in ("kohya", "peft", "diffusers", None)
            for kind in (kinds.KINDS if to else kinds.KINDS[5:20:4])
        ],
    )
    def test_equals_the_einsum(self, kind: kinds.Kind, to: str | None, tmp_path: Path) -> None:
        """ΔW by the kind's own formula; the result is B·A with nothing else beside it."""
        dim, alpha = 2, 3.0
        arrays = kind.draw(1, dim)
        stem = SPATIAL if kind.kernel else LINEAR
        flat = f"lora_unet_{stem.replace('.', '_')}"
        kinds.write(tmp_path / "a.safetensors", {flat: arrays}, {flat: np.float32(alpha)})
        wanted = kind.scale(dim, alpha) * kinds.dense(arrays)
        out = tmp_path / ("p" if to == "peft" else "b.safetensors")
        options: dict[str, Any] = {}
        rank = kind.rank(dim)
        if kind.name != "lora" and rank * sum(wanted.shape) >= wanted.size:
            with pytest.raises(UsageError, match="--rank"):
                ao.convert(tmp_path / "a.safetensors", out=out, to=to)
            assert not out.exists()
            options["rank"] = min(rank, *wanted.shape)
        report = ao.convert(tmp_path / "a.safetensors", out=out, to=to, **options)
        if to == "peft":
            [found] = peft_config_deltas(out).values()
        elif to == "diffusers":
            [(B, A)] = stored(out).values()
            found = product(B, A)
        else:
            names = {name.partition(".")[2] for name in load_file(out)}
            assert names == {"lora_up.weight", "lora_down.weight", "alpha"}
            [found] = kinds.plain(out).values()
        assert kinds.gap(found, wanted) < 1e-6
        assert report.error == pytest.approx(kinds.gap(found, wanted), rel=1e-2, abs=1e-9)

    def test_adalora_and_lycoris_of_peft(self, tmp_path: Path) -> None:
        """Made by PEFT, converted, and loaded by PEFT as plain LoRA."""
        from tests import test_kinds_peft as made

        for title, rank in (("LoHa", None), ("LoHa, patterns", 20), ("LoKr, decompose_both", 20)):
            case = next(case for case in made.LYCORIS if case.title == title)
            folder = case.make(tmp_path / title, 1, target_modules=["linear", "tall"])
            out = tmp_path / f"{title} as LoRA"
            ao.convert(folder, out=out, rank=rank)
            config = json.loads((out / "adapter_config.json").read_text())
            assert config["peft_type"] == "LORA"
            assert distance(made.deltas(out), made.deltas(folder)) < 1e-6
        for pruned in (True, False):
            folder = tmp_path / f"adalora {pruned}"
            wanted = made.TestAdaLoRA.trained(folder, pruned=pruned)
            report = ao.convert(folder, out=tmp_path / f"{pruned} whole")
            assert any(
                "convolution" in warning for warning in report.warnings
            )  # its kernel is gone
            ao.convert(folder, out=tmp_path / f"{pruned}", modules="linear|tall|wide")
            found = made.deltas(tmp_path / f"{pruned}")
            wanted.pop("conv")
            assert distance({n: found.get(n, 0 * v) for n, v in wanted.items()}, wanted) < 1e-5

    def test_merged_linear(self, tmp_path: Path) -> None:
        from tests import test_kinds_peft as made

        for enabled in made.TestMergedLinear.SLOTS:
            folder = tmp_path / str(enabled)
            wanted = made.TestMergedLinear.make(folder, enabled)
            ao.convert(folder, out=tmp_path / f"{enabled} out")
            assert distance(read_peft(tmp_path / f"{enabled} out"), wanted) < 1e-6
            config = json.loads((tmp_path / f"{enabled} out" / "adapter_config.json").read_text())
            assert "enable_lora" not in config


# ---- what travels along, what is refused ---------------------------------------------------------

HEAD = {"base_model.model.score.weight": np.arange(12, dtype=np.float32).reshape(3, 4)}


class TestExtras:
    def test_heads_stay_in_peft_and_are_refused_elsewhere(self, tmp_path: Path) -> None:
        before = factors(LLAMA, 4)
        write_peft(tmp_path / "a", before, alpha=8, extras=HEAD, modules_to_save=["score"])
        report = ao.convert(tmp_path / "a", out=tmp_path / "p", scaling="rslora")
        assert report.extras == {"base_model.model.score.weight": "copied"}
        tensors = load_file(tmp_path / "p" / "adapter_model.safetensors")
        np.testing.assert_array_equal(tensors[next(iter(HEAD))], *HEAD.values())
        with pytest.raises(IncompatibleError, match="--extras drop") as caught:
            ao.convert(tmp_path / "a", out=tmp_path / "m", to="mlx")
        assert caught.value.exit_code == 4 and "score" in str(caught.value)
        assert not (tmp_path / "m").exists()
        report = ao.convert(tmp_path / "a", out=tmp_path / "m", to="mlx", extras="drop")
        assert report.extras == {"base_model.model.score.weight": "dropped"}
        assert_same_bits(tmp_path / "m", before)

    def test_of_a_u_net(self, tmp_path: Path) -> None:
        head = {"base_model.model.conv_norm_out.weight": np.ones(4, np.float32)}
        write_unet(tmp_path / "a", factors(UNET, 2), extras=head)
        for to in ("kohya", "diffusers"):
            with pytest.raises(IncompatibleError, match="conv_norm_out"):
                ao.convert(tmp_path / "a", out=tmp_path / "x.safetensors", to=to)
            ao.convert(tmp_path / "a", out=tmp_path / f"{to}.safetensors", to=to, extras="drop")
            assert not any("norm" in n for n in load_file(tmp_path / f"{to}.safetensors"))


def _kohya(*stems: str, shape: tuple[int, ...] = (8, 8)) -> dict[str, np.ndarray]:
    tensors = {}
    for stem in stems:
        B, A = factors({stem: shape}, 2)[stem]
        tensors |= {f"{stem}.lora_up.weight": B, f"{stem}.lora_down.weight": A}
    return tensors


SGM = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
SDXL = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
FUSED = "lora_unet_double_blocks_0_img_attn_qkv"
FINE = f"lora_unet_{ATTENTION.replace('.', '_')}_to_q"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
FILES: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "SGM names to diffusers": (_kohya(SGM), "diffusers"),
    "SGM names to peft": (_kohya(SGM), "peft"),
    "SDXL's context": (_kohya(SDXL, shape=(640, 2048)), "diffusers"),
    "fused names to diffusers": (_kohya(FUSED), "diffusers"),
    "fused names to peft": (_kohya(FUSED), "peft"),
    "two components into PEFT": (_kohya(FINE, TEXT), "peft"),
    "an unknown architecture": (_kohya("lora_unet__blocks_7_self_attn_q"), "diffusers"),
}


class TestRefusals:
    @pytest.mark.parametrize("case", FILES)
    def test_names_without_a_counterpart(self, case: str, tmp_path: Path) -> None:
        tensors, to = FILES[case]
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(IncompatibleError, match=rf"--to {to}") as caught:
            ao.convert(tmp_path / "a.safetensors", out=tmp_path / "x", to=to)
        assert caught.value.exit_code == 4
        assert "leave --to away" in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]

    def test_two_vocabularies_in_one_file(self, tmp_path: Path) -> None:
        save_file(_kohya(FINE, SGM), tmp_path / "a.safetensors")
        with pytest.raises(IncompatibleError, match="SGM's names") as caught:
            ao.convert(tmp_path / "a.safetensors", out=tmp_path / "x", to="diffusers")
        assert caught.value.exit_code == 4

    @pytest.mark.parametrize("source", ["diffusers", "peft"])
    def test_fused_projections_of_a_u_net(self, source: str, tmp_path: Path) -> None:
        """diffusers can fuse q, k and v; sd-scripts has no module of that name."""
        given = factors({f"{ATTENTION}.to_qkv": (96, 32)}, 2)
        if source == "peft":
            adapter = write_unet(tmp_path / "a", given)
        else:
            [(B, A)] = given.values()
            stem = f"unet.{ATTENTION}.to_qkv"
            adapter = tmp_path / "a.safetensors"
            save_file({f"{stem}.lora_B.weight": B, f"{stem}.lora_A.weight": A}, adapter)
        with pytest.raises(IncompatibleError, match="--to kohya") as caught:
            ao.convert(adapter, out=tmp_path / "x.safetensors", to="kohya")
        assert caught.value.exit_code == 4

    @pytest.mark.parametrize("source", ["kohya", "diffusers"])
    def test_an_image_model_is_none_of_mlx_lm_s(self, source: str, tmp_path: Path) -> None:
        tensors = _kohya(FINE)
        if source == "diffusers":
            B, A = tensors.values()
            stem = f"unet.{ATTENTION}.to_q"
            tensors = {f"{stem}.lora_B.weight": B, f"{stem}.lora_A.weight": A}
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(IncompatibleError, match="--to mlx") as caught:
            ao.convert(tmp_path / "a.safetensors", out=tmp_path / "x", to="mlx")
        assert caught.value.exit_code == 4

    def test_a_language_model_has_no_kohya_name(self, tmp_path: Path) -> None:
        write_peft(tmp_path / "a", factors(LLAMA, 2))
        for to in ("kohya", "diffusers"):
            with pytest.raises(IncompatibleError, match=r"model\.layers\.0") as caught:
                ao.convert(tmp_path / "a", out=tmp_path / "x.safetensors", to=to)
            assert caught.value.exit_code == 4

    @pytest.mark.parametrize("to", ["mlx", "kohya", "diffusers"])
    @pytest.mark.parametrize(
        "config",
        [
            {"target_modules": ["conv2"]},
            {"target_modules": ["linear"], "lora_bias": True},
            {"target_modules": ["embed"]},
        ],
        ids=["convolution", "bias", "embedding"],
    )
    def test_what_a_dialect_has_no_place_for(
        self, config: dict[str, Any], to: str, tmp_path: Path
    ) -> None:
        pytest.importorskip("peft")
        from tests import peft_models

        peft_models.trained(tmp_path / "a", 1, r=2, lora_alpha=3, **config)
        options = {"extras": "drop"} if config["target_modules"] == ["embed"] else {}
        if to == "mlx" and config["target_modules"] == ["embed"]:
            ao.convert(tmp_path / "a", out=tmp_path / "x", to=to, **options)
            [(name, B)] = [
                (n, v)
                for n, v in load_file(tmp_path / "x" / "adapters.safetensors").items()
                if n.endswith("lora_b")
            ]
            assert name == "embed.lora_b" and B.shape == (2, 12)
            return
        with pytest.raises(IncompatibleError, match=f"--to {to}") as caught:
            ao.convert(tmp_path / "a", out=tmp_path / "x", to=to, **options)
        assert caught.value.exit_code == 4
        assert not list(tmp_path.glob("x*"))

    def test_embeddings_of_a_text_encoder_to_kohya(self, tmp_path: Path) -> None:
        """The path itself has a flat name; kohya's files have no factors of an embedding."""
        stem = "base_model.model.text_model.embeddings.token_embedding"
        attention = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"
        tensors = {
            f"{stem}.lora_embedding_A": np.ones((2, 20), np.float32),
            f"{stem}.lora_embedding_B": np.ones((16, 2), np.float32),
            f"{attention}.lora_A.weight": np.ones((2, 16), np.float32),
            f"{attention}.lora_B.weight": np.ones((16, 2), np.float32),
        }
        folder = write_peft(tmp_path / "a", factors({"x.q_proj": (8, 8)}, 2))
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(IncompatibleError, match="embedding") as caught:
            ao.convert(folder, out=tmp_path / "x.safetensors", to="kohya")
        assert caught.value.exit_code == 4

    @pytest.mark.parametrize("to", ["kohya", "diffusers", "mlx"])
    def test_rslora_is_peft_s_alone(self, to: str, tmp_path: Path) -> None:
        shapes = LLAMA if to == "mlx" else UNET
        write_peft(tmp_path / "a", factors(shapes, 2))
        with pytest.raises(UsageError, match="rslora") as caught:
            ao.convert(tmp_path / "a", out=tmp_path / "x", to=to, scaling="rslora")
        assert caught.value.exit_code == 2

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"to": "gguf"}, "gguf"),
            ({"to": "xlabs"}, "xlabs"),
            ({"residual": "x"}, "--base"),
            ({"scaling": "both"}, "both"),
            ({"rank": 2, "energy": 0.5}, "--rank and --energy"),
        ],
        ids=str,
    )
    def test_options(self, options: dict[str, Any], says: str, tmp_path: Path) -> None:
        write_peft(tmp_path / "a", factors(LLAMA, 2))
        with pytest.raises(UsageError, match=says) as caught:
            ao.convert(tmp_path / "a", out=tmp_path / "x", **options)
        assert caught.value.exit_code == 2
        assert not (tmp_path / "x").exists()

    def test_a_sum_has_no_scale_to_keep(self, tmp_path: Path) -> None:
        for index in (1, 2):
            write_peft(tmp_path / str(index), factors(LLAMA, 2, seed=index), alpha=4)
        mixed = ao.open_adapter(tmp_path / "1") + ao.open_adapter(tmp_path / "2")
        with pytest.raises(UsageError, match="2 inputs"):
            ao.convert(mixed, out=tmp_path / "x", to="mlx")
        ao.convert(mixed, out=tmp_path / "m", to="mlx", scaling="folded")
        wanted = scaled(factors(LLAMA, 2, seed=1), 2.0)
        for name, value in scaled(factors(LLAMA, 2, seed=2), 2.0).items():
            wanted[name] = wanted[name] + value
        assert distance(Mlx(tmp_path / "m", model(2)).deltas, wanted) < 1e-7

    def test_a_weighted_adapter_keeps_its_scale(self, tmp_path: Path) -> None:
        before = factors(LLAMA, 2)
        write_peft(tmp_path / "1", before, alpha=4)
        ao.convert(-0.5 * ao.open_adapter(tmp_path / "1"), out=tmp_path / "m", to="mlx")
        assert distance(Mlx(tmp_path / "m", model(2)).deltas, scaled(before, -1.0)) < 1e-7


# ---- what is written beside the numbers ----------------------------------------------------------


class TestRecord:
    def test_provenance(self, tmp_path: Path) -> None:
        write_peft(tmp_path / "a", factors(LLAMA, 4), alpha=8)
        ao.convert(tmp_path / "a", out=tmp_path / "m", to="mlx", dtype="float16", rank=3)
        told = json.loads(metadata_of(tmp_path / "m")[PROVENANCE_KEY])
        assert told["verb"] == "convert"
        assert [origin["name"] for origin in told["inputs"]] == ["a"]
        assert told["options"] == {"to": "mlx", "dtype": "float16", "rank": 3, "scaling": "keep"}
        assert str(tmp_path) not in json.dumps(told)

    @pytest.mark.parametrize("to", ["mlx", "peft", "kohya", "diffusers"])
    @pytest.mark.parametrize("options", [{}, {"rank": 2}, {"energy": 0.9}], ids=str)
    def test_a_dry_run_predicts_and_writes_nothing(
        self, options: dict[str, Any], to: str, tmp_path: Path
    ) -> None:
        if to == "mlx":
            write_peft(tmp_path / "a", factors(LLAMA, 4), alpha=8)
        else:
            write_unet_case(tmp_path / "a", "both")
        out = tmp_path / ("x" if to in ("mlx", "peft") else "x.safetensors")
        options = {"to": to, "scaling": "folded", **options}
        plan = ao.convert(tmp_path / "a", out=out, dry_run=True, **options)
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        assert plan.verb == "convert"
        report = ao.convert(tmp_path / "a", out=out, **options)
        weights = {"mlx": out / "adapters.safetensors", "peft": out / "adapter_model.safetensors"}
        size = weights.get(to, out).stat().st_size
        assert plan.size == report.size == size
        assert plan.rank == report.rank
        assert plan.ranks == {name: module.rank for name, module in report.modules.items()}
        assert plan.dropped == report.dropped == ()

    def test_the_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from adapterops.cli import app

        write_peft(tmp_path / "a", factors(LLAMA, 4), alpha=8)
        source, out = str(tmp_path / "a"), str(tmp_path / "m")

        def code(*arguments: str) -> int:
            try:
                app.main(["convert", *arguments], standalone_mode=False)
            except AdapterOpsError as error:
                return error.exit_code
            return 0

        assert code(source, "-o", out, "--to", "mlx", "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert told["schema"] == "adapterops.convert/1" and told["dialect"] == "mlx"
        assert_same_bits(tmp_path / "m", factors(LLAMA, 4))
        assert code(source, "-o", out, "--to", "mlx") == 2  # it is there already
        assert code(source, "-o", f"{out}2", "--to", "kohya") == 4
        assert code(source, "-o", f"{out}2", "--to", "mlx", "--scaling", "rslora") == 2
        assert code(str(tmp_path / "none"), "-o", f"{out}2", "--to", "mlx") == 6
        assert not (tmp_path / "m2").exists()

    def test_the_same_bytes_again(self, tmp_path: Path) -> None:
        write_unet_case(tmp_path / "a", "both")
        for name in ("x", "y"):
            ao.convert(tmp_path / "a", out=tmp_path / f"{name}.safetensors", to="kohya")
        one, two = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("x", "y"))
        assert one == two


def test_one_adapter_at_a_time(tmp_path: Path) -> None:
    write_peft(tmp_path / "a", factors(LLAMA, 2))
    with pytest.raises(UsageError, match="one path or Adapter"):
        ao.convert([tmp_path / "a"], out=tmp_path / "x")
