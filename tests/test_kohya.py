"""kohya files: scales from wherever they are kept, LoCon convolutions, metadata, what UIs hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import adapterops as ao
from adapterops.errors import FormatError, IncompatibleError
from tests.dialects import KOHYA, Kohya
from tests.support import dense, distance, pairs, read_kohya, weighted, write_kohya

LINEAR = KOHYA[0]


def write(case: Kohya, file: Path, which: int, **metadata: str) -> dict[str, np.ndarray]:
    """One of the two files of a case, and its ΔW in float64."""
    import torch
    from safetensors.torch import save_file

    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(which)
    rank, alpha = case.ranks[which], case.alpha[which]
    tensors, wanted = {}, {}
    for stem, ((out, *_), (channels, *kernel)) in case.sites.items():
        up = torch.randn(out, rank, *(1 for _ in kernel), generator=generator).to(dtype)
        down = (0.1 * torch.randn(rank, channels, *kernel, generator=generator)).to(dtype)
        tensors[f"{stem}.lora_up.weight"], tensors[f"{stem}.lora_down.weight"] = up, down
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.full(case.alpha_shape, alpha, dtype=dtype)
        product = up.double().flatten(1) @ down.double().flatten(1)
        wanted[stem] = case.scales[which] * product.numpy()
    save_file(tensors, file, {**case.metadata, **metadata})
    return wanted


def merge(case: Kohya, folder: Path, weights: list[float], **options: Any) -> Any:
    """The merged file, its certificate and the exact sum."""
    files = [folder / "a.safetensors", folder / "b.safetensors"]
    terms = [(weight, write(case, files[i], i)) for i, weight in enumerate(weights)]
    report = ao.merge(files, weights, out=folder / "m.safetensors", **options)
    return folder / "m.safetensors", report, weighted(*((w, d) for w, d in terms if w))


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "numpy") as opened:
        return opened.metadata()


@pytest.mark.parametrize("case", KOHYA, ids=lambda case: case.kind)
@pytest.mark.parametrize("weights", ([0.7, 0.3], [-1.5, 0.4]), ids=str)
def test_the_sum_is_exact(case: Kohya, weights: list[float], tmp_path: Path) -> None:
    out, report, wanted = merge(case, tmp_path, weights, dtype="float32")
    assert report.error < 1e-7
    assert distance(read_kohya(out), wanted) < 1e-6


@pytest.mark.parametrize("case", KOHYA, ids=lambda case: case.kind)
def test_a_zero_weight_leaves_the_other_untouched(case: Kohya, tmp_path: Path) -> None:
    out, report, wanted = merge(case, tmp_path, [1.0, 0.0])
    assert report.error == 0.0
    found = {name: factors.dense() for name, factors in ao.open_adapter(out).items()}
    assert distance(found, wanted) < 1e-15
    assert (tmp_path / "a.safetensors").stat().st_size <= out.stat().st_size


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_type_is_kept_and_its_error_certified(dtype: str, tmp_path: Path) -> None:
    case = next(case for case in KOHYA if case.dtype == dtype)
    out, report, wanted = merge(case, tmp_path, [0.7, 0.3])
    assert report.dtype == dtype
    found = {name: factors.dense() for name, factors in ao.open_adapter(out).items()}
    assert distance(found, wanted) == pytest.approx(report.error, rel=1e-6)
    assert 1e-5 < report.error < 1e-2


@pytest.mark.parametrize(
    "case", [case for case in KOHYA if case.reader == "diffusers"], ids=lambda case: case.kind
)
def test_diffusers_reads_it_back(case: Kohya, tmp_path: Path) -> None:
    images = pytest.importorskip("tests.image_models")
    out, _, wanted = merge(case, tmp_path, [0.7, 0.3])
    component = "text_encoder" if "lora_te_" in next(iter(case.sites)) else "unet"
    found = images.deltas(out, component)
    prefix = "lora_unet_" if component == "unet" else "lora_te_text_model_"
    flat = {f"{prefix}{name.replace('.', '_')}": delta for name, delta in found.items()}
    assert distance(flat, wanted) < 1e-6


def test_unet_and_text_encoder_of_one_file(tmp_path: Path) -> None:
    """Through diffusers' pure conversion: names, and alpha = rank for every module."""
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    from safetensors.torch import load_file

    unet, text = (case for case in KOHYA if case.reader == "diffusers")
    case = Kohya("both", {**unet.sites, **text.sites})
    out, report, _ = merge(case, tmp_path, [0.7, 0.3])
    state, alphas = utils._convert_non_diffusers_lora_to_diffusers(load_file(out))
    assert len(state) == 2 * len(case.sites) and len(alphas) == len(case.sites)
    assert set(alphas.values()) == {float(report.rank)}
    assert {name.partition(".")[0] for name in state} == {"unet", "text_encoder"}


@pytest.mark.parametrize("part", ["UNet", "text encoder"])
def test_diffusers_names_and_back(part: str, tmp_path: Path) -> None:
    """--to diffusers is read by diffusers as the kohya file is, and --to kohya undoes it."""
    images = pytest.importorskip("tests.image_models")
    case = next(case for case in KOHYA if case.kind.startswith(f"SD 1.x {part}"))
    component = "text_encoder" if part == "text encoder" else "unet"
    there, _, wanted = merge(case, tmp_path, [0.7, 0.3], to="diffusers")
    out = tmp_path / "back.safetensors"
    ao.merge([there], [1.0], out=out, to="kohya")
    assert distance(read_kohya(out), wanted) < 1e-6
    a, b = (images.deltas(file, component) for file in (there, out))
    assert distance(a, b) < 1e-6 and len(a) == len(case.sites)


class TestScale:
    @pytest.mark.parametrize(
        ("metadata", "kernel", "scale"),
        [
            ({}, (), 1.0),
            ({"ss_network_dim": "4", "ss_network_alpha": "2"}, (), 0.5),
            ({"ss_network_dim": "4", "ss_network_alpha": "2"}, (1, 1), 0.5),
            ({"ss_network_dim": "4", "ss_network_alpha": "2"}, (3, 3), 1.0),
            ({"ss_network_dim": "8", "ss_network_alpha": "2"}, (), 1.0),
            ({"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}, (), 1.0),
            (
                {
                    "ss_network_dim": "4",
                    "ss_network_alpha": "2",
                    "ss_network_args": '{"block_dims": "4,8"}',
                },
                (),
                1.0,
            ),
        ],
        ids=str,
    )
    def test_without_alpha(
        self, metadata: dict[str, str], kernel: tuple[int, ...], scale: float, tmp_path: Path
    ) -> None:
        sites = {"lora_unet_x": ((12,), (8, *kernel))}
        case = Kohya("", sites, (4, 4), (None, None), scales=(scale, scale))
        wanted = write(case, tmp_path / "a.safetensors", 0, **metadata)
        adapter = ao.open_adapter(tmp_path / "a.safetensors")
        assert distance({k: v.dense() for k, v in adapter.items()}, wanted) < 1e-15
        [site] = adapter.terms[0][1].sites.values()
        assert site.scale_from.startswith("assumed") == (scale == 1.0)

    def test_alpha_and_metadata_that_disagree(self, tmp_path: Path) -> None:
        header = {"ss_network_dim": "4", "ss_network_alpha": "8"}
        write(LINEAR, tmp_path / "a.safetensors", 0, **header)
        with pytest.raises(IncompatibleError, match=r"two scales disagree: 0\.5 .* 2 by ss_net"):
            ao.open_adapter(tmp_path / "a.safetensors")

    def test_a_rounded_alpha_is_no_disagreement(self, tmp_path: Path) -> None:
        case = Kohya("", LINEAR.sites, (4, 4), (0.3, 0.3), dtype="float16")
        header = {"ss_network_dim": "4", "ss_network_alpha": "0.3"}
        write(case, tmp_path / "a.safetensors", 0, **header)
        assert ao.open_adapter(tmp_path / "a.safetensors")

    @pytest.mark.parametrize(
        ("alpha", "shape", "says"),
        [(np.nan, (), "is nan"), (np.inf, (1,), "is inf"), (2.0, (2,), r"shape \[2\]")],
    )
    def test_an_alpha_that_is_no_number(
        self, alpha: float, shape: tuple[int, ...], says: str, tmp_path: Path
    ) -> None:
        case = Kohya("", LINEAR.sites, alpha=(alpha, alpha), alpha_shape=shape)
        write(case, tmp_path / "a.safetensors", 0)
        with pytest.raises(FormatError, match=says):
            ao.open_adapter(tmp_path / "a.safetensors")

    def test_alpha_0_is_what_the_user_says(self, tmp_path: Path) -> None:
        case = Kohya("", LINEAR.sites, alpha=(0.0, 0.0), scales=(1.0, 1.0))
        file = tmp_path / "a.safetensors"
        wanted = write(case, file, 0)
        ao.merge([file], out=tmp_path / "m.safetensors", alpha={str(file): 4.0})
        assert distance(read_kohya(tmp_path / "m.safetensors"), wanted) < 1e-6


HEADER = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_network_module": "networks.lora",
    "ss_network_dim": "4",
    "ss_network_alpha": "2.0",
    "ss_network_args": '{"conv_dim": "4", "conv_alpha": "2", "preset": "full"}',
    "ss_tag_frequency": '{"a": {"ä b": 3}}',
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "modelspec.hash_sha256": "0x1234",
    "sshs_model_hash": "stale",
    "sshs_legacy_hash": "stale",
    "unrelated": "x",
}


class TestMetadata:
    def merged(self, folder: Path, case: Kohya = LINEAR, **second: str) -> tuple[Path, Any]:
        files = [folder / "a.safetensors", folder / "b.safetensors"]
        write(case, files[0], 0, **HEADER)
        write(case, files[1], 1, **second)
        return folder / "m.safetensors", ao.merge(files, [0.7, 0.3], out=folder / "m.safetensors")

    def test_training_metadata_of_the_first_input_is_kept(self, tmp_path: Path) -> None:
        out, report = self.merged(tmp_path)
        found = metadata_of(out)
        for key in ("ss_base_model_version", "ss_tag_frequency", "modelspec.architecture"):
            assert found[key] == HEADER[key]
        assert found["ss_network_dim"] == str(report.rank) == "7"
        assert found["ss_network_alpha"] == "7.0"
        arguments = json.loads(found["ss_network_args"])
        assert arguments == {"conv_dim": "7", "conv_alpha": "7", "preset": "full"}
        assert "modelspec.hash_sha256" not in found and "unrelated" not in found
        assert not report.warnings

    def test_inputs_of_different_bases_are_reported(self, tmp_path: Path) -> None:
        _, report = self.merged(
            tmp_path,
            ss_base_model_version="sd_v1",
            ss_network_module="networks.lora",
            **{"modelspec.architecture": "stable-diffusion-v1/lora"},
        )
        [warning] = report.warnings
        assert "differ in ss_base_model_version, modelspec.architecture" in warning

    @pytest.mark.parametrize("size", [16, 1000], ids=["under 1 MiB", "over 1 MiB"])
    @pytest.mark.parametrize("weights", ([0.7, 0.3], [1.0, 0.0]), ids=str)
    def test_hashes_are_those_of_sd_scripts(
        self, size: int, weights: list[float], tmp_path: Path
    ) -> None:
        """`train_util.precalculate_safetensors_hashes`, on a file with only its ss_* metadata."""
        from safetensors.torch import load_file, save

        case = Kohya("", {f"lora_unet_{i}": ((size,), (size,)) for i in range(40)})
        out, _ = self.merged(tmp_path, case)
        if 0.0 in weights:
            out = tmp_path / "copy.safetensors"
            ao.merge([tmp_path / "a.safetensors"], out=out)
        header = metadata_of(out)
        training = {key: value for key, value in header.items() if key.startswith("ss_")}
        blob = save(load_file(out), training)
        assert (len(blob) > 0x110000) == (size == 1000)
        body = blob[8 + int.from_bytes(blob[:8], "little") :]
        assert header["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
        legacy = hashlib.sha256(blob[0x100000:0x110000]).hexdigest()[:8]
        assert header["sshs_legacy_hash"] == legacy


def test_linear_and_point_convolution_are_one_module(tmp_path: Path) -> None:
    """Some tools store a 1 x 1 convolution as a matrix."""
    flat = pairs(1, {"lora_unet_proj_in": (12, 8)}, 2)
    [(stem, (B, A))] = pairs(2, {"lora_unet_proj_in": (12, 8)}, 2).items()
    deep = {stem: (B[..., None, None], A[..., None, None])}
    files = [
        write_kohya(tmp_path / "a.safetensors", flat, alpha=2),
        write_kohya(tmp_path / "b.safetensors", deep, alpha=2),
    ]
    ao.merge(files, [0.7, 0.3], out=tmp_path / "m.safetensors")
    wanted = weighted((0.7, dense(flat)), (0.3, dense(deep)))
    assert distance(read_kohya(tmp_path / "m.safetensors"), wanted) < 1e-6
