"""Spellings met in the wild, several in one file included: read by grammar, merged by stem.

What a spelling means is fixed by diffusers' own conversion functions where it has one
(`diffusers.loaders.lora_conversion_utils`): they are run on the files made here, and again on what
the merge wrote. A test does not know our stems: modules are told apart by their ΔW.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterops as ao
from adapterops.errors import FormatError, IncompatibleError
from adapterops.formats import open_adapter_file
from tests.kinds import KINDS, dense, gap, matched, plain, read, write
from tests.support import load_file

EXACT = 1e-14
Shapes = Mapping[str, tuple[int, int]]
KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")
QWEN = ("lora_A.default.weight", "lora_B.default.weight")
BARE = ("lora_A", "lora_B")
SHORT = ("down.weight", "up.weight")


@dataclass(frozen=True)
class Wild:
    """A spelling: full module names with their ΔW shapes, the two suffixes, whether alphas follow.

    `reader` is diffusers' function that says what the names mean.
    """

    title: str
    modules: Shapes
    suffixes: tuple[str, str] = PEFT
    alpha: bool = False
    reader: str | None = None

    def draw(self, seed: int, rank: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Tensors by name, and ΔW by module: alpha = rank / 2 + seed where there is one."""
        rng = np.random.default_rng([seed, len(self.title)])
        tensors: dict[str, Any] = {}
        deltas = {}
        for name, (out, channels) in self.modules.items():
            up, down = rng.standard_normal((out, rank)), rng.standard_normal((rank, channels))
            up, down = up.astype(np.float32), down.astype(np.float32)
            tensors[f"{name}.{self.suffixes[0]}"], tensors[f"{name}.{self.suffixes[1]}"] = down, up
            scale = 1.0
            if self.alpha:
                alpha = np.float32(rank / 2 + seed)
                tensors[f"{name}.alpha"], scale = alpha, float(alpha) / rank
            deltas[name] = scale * up.astype(np.float64) @ down.astype(np.float64)
        return tensors, deltas


def under(prefix: str, shapes: Shapes, flat: bool = False) -> dict[str, tuple[int, int]]:
    """Modules below a prefix, their dots flattened to underscores if `flat`."""
    return {
        prefix + (name.replace(".", "_") if flat else name): shape for name, shape in shapes.items()
    }


BFL = {
    "double_blocks.0.img_attn.qkv": (36, 12),
    "double_blocks.0.txt_attn.proj": (12, 12),
    "double_blocks.0.img_mlp.0": (48, 12),
    "single_blocks.1.linear2": (12, 60),
}
FLUX = {
    "transformer_blocks.0.attn.to_q": (12, 12),
    "transformer_blocks.0.attn.add_k_proj": (12, 14),
    "transformer_blocks.1.attn.to_out.0": (12, 12),
}
WAN = {
    f"blocks.0.{name}": shape
    for name, shape in {
        **{f"self_attn.{x}": (16, 16) for x in "qkvo"},
        **{f"cross_attn.{x}": (16, 16) for x in "qkvo"},
        "ffn.0": (40, 16),
        "ffn.2": (16, 40),
    }.items()
}
QWEN_IMAGE = {
    "transformer_blocks.0.attn.to_q": (12, 12),
    "transformer_blocks.0.attn.add_k_proj": (12, 14),
    "transformer_blocks.0.img_mlp.net.0.proj": (48, 12),
}
Z_IMAGE = {"layers.0.attention.to_q": (12, 12), "layers.0.feed_forward.w1": (30, 12)}
CLIP = {
    "text_model.encoder.layers.0.self_attn.q_proj": (14, 14),
    "text_model.encoder.layers.0.mlp.fc1": (28, 14),
}
XLABS = {
    "double_blocks.0.processor.qkv_lora1": (36, 12),
    "double_blocks.0.processor.qkv_lora2": (36, 12),
    "double_blocks.0.processor.proj_lora1": (12, 12),
    "double_blocks.3.processor.proj_lora2": (12, 12),
    "single_blocks.1.processor.qkv_lora": (36, 12),
    "single_blocks.1.processor.proj_lora": (12, 12),
}

WILD = (
    Wild("XLabs", XLABS, SHORT, reader="_convert_xlabs_flux_lora_to_diffusers"),
    Wild(
        "XLabs below diffusion_model.",
        under("diffusion_model.", XLABS),
        SHORT,
        reader="_convert_xlabs_flux_lora_to_diffusers",
    ),
    Wild("BFL, lora_A", under("diffusion_model.", BFL)),
    Wild("BFL, lora_A and alpha", under("diffusion_model.", BFL), alpha=True),
    Wild(
        "ComfyUI, lora_down and alpha",
        under("diffusion_model.", BFL),
        KOHYA,
        True,
        "_convert_kohya_flux_lora_to_diffusers",
    ),
    Wild("ComfyUI, lora_down without alpha", under("diffusion_model.", BFL), KOHYA),
    Wild(
        "ComfyUI, text encoder",
        under("text_encoders.clip_l.transformer.", CLIP),
        KOHYA,
        True,
    ),
    Wild(
        "kohya, Flux",
        under("lora_unet_", BFL, flat=True),
        KOHYA,
        True,
        "_convert_kohya_flux_lora_to_diffusers",
    ),
    Wild(
        "OneTrainer, lora_transformer_ and lora_te1_",
        {**under("lora_transformer_", FLUX, flat=True), **under("lora_te1_", CLIP, flat=True)},
        KOHYA,
        True,
        "_convert_kohya_flux_lora_to_diffusers",
    ),
    Wild("lycoris_", under("lycoris_", FLUX, flat=True), KOHYA, True),
    Wild("Wan, Fun: lora_unet__", under("lora_unet__", WAN, flat=True), KOHYA, True),
    Wild(
        "Wan, musubi",
        under("lora_unet_", WAN, flat=True),
        KOHYA,
        True,
        "_convert_musubi_wan_lora_to_diffusers",
    ),
    Wild(
        "Wan, lora_A",
        under("diffusion_model.", WAN),
        reader="_convert_non_diffusers_wan_lora_to_diffusers",
    ),
    Wild(
        "Wan, lora_down and alpha",
        under("diffusion_model.", WAN),
        KOHYA,
        True,
        "_convert_non_diffusers_wan_lora_to_diffusers",
    ),
    Wild(
        "Qwen-Image, .default.",
        QWEN_IMAGE,
        QWEN,
        reader="_convert_non_diffusers_qwen_lora_to_diffusers",
    ),
    Wild(
        "Qwen-Image, bare",
        QWEN_IMAGE,
        reader="_convert_non_diffusers_qwen_lora_to_diffusers",
    ),
    Wild(
        "Qwen-Image, bare with alpha",
        QWEN_IMAGE,
        KOHYA,
        True,
        "_convert_non_diffusers_qwen_lora_to_diffusers",
    ),
    Wild(
        "Qwen-Image, lora_A and alpha",
        under("diffusion_model.", QWEN_IMAGE),
        PEFT,
        True,
        "_convert_non_diffusers_qwen_lora_to_diffusers",
    ),
    Wild(
        "Z-Image, lora_A",
        under("diffusion_model.", Z_IMAGE),
        reader="_convert_non_diffusers_z_image_lora_to_diffusers",
    ),
    Wild("Mochi, no .weight", FLUX, BARE),
)
by_case = pytest.mark.parametrize("case", WILD, ids=lambda case: case.title)

UNET_KOHYA = Wild("kohya U-Net", {"lora_unet_mid_block_q": (24, 20)}, KOHYA, True)
TEXT_DIFFUSERS = Wild(
    "diffusers text encoder",
    under("text_encoder.", CLIP),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
)
TEXT_KOHYA = Wild("kohya text encoder", under("lora_te_", CLIP, flat=True), KOHYA, True)
TEXT_PEFT = Wild("text encoder, lora_A", under("text_encoder.", CLIP))
UNET_PROCESSOR = Wild(
    "attention processors",
    {f"unet.down_blocks.0.attentions.0.attn1.processor.to_{x}_lora": (22, 22) for x in "qk"},
    SHORT,
)
MIXED: Mapping[str, tuple[Wild, ...]] = {
    "kohya U-Net, diffusers text encoder": (UNET_KOHYA, TEXT_DIFFUSERS),
    "attention processors, kohya text encoder": (UNET_PROCESSOR, TEXT_KOHYA),
    "XLabs, lora_A text encoder": (WILD[0], TEXT_PEFT),
    "BFL lora_A, kohya text encoder": (WILD[2], TEXT_KOHYA),
    "ComfyUI lora_down, lora_A text encoder": (WILD[4], TEXT_PEFT),
    "three at once": (WILD[0], UNET_KOHYA, TEXT_DIFFUSERS),
}
by_mix = pytest.mark.parametrize("mix", MIXED)


def make(file: Path, seed: int, rank: int, *spellings: Wild) -> tuple[Path, dict[str, np.ndarray]]:
    """A file in one or several spellings; ΔW by module."""
    tensors: dict[str, Any] = {}
    deltas: dict[str, np.ndarray] = {}
    for spelling in spellings:
        more, changes = spelling.draw(seed, rank)
        tensors |= more
        deltas |= changes
    return write(file, {}, **tensors), deltas


def assert_converted(file: Path, reader: str, wanted: Mapping[str, np.ndarray]) -> None:
    """diffusers' function finds exactly these ΔW in a file, each whole or as its q, k and v."""
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    from safetensors.torch import load_file as load_torch

    converted = getattr(utils, reader)(load_torch(file))
    found = [
        (B.double() @ converted[name.replace("lora_B", "lora_A")].double()).numpy()
        for name, B in converted.items()
        if name.endswith("lora_B.weight")
    ]
    used: set[int] = set()
    for name, value in wanted.items():
        for pieces in ([value], np.split(value, 3) if len(value) % 3 == 0 else []):
            near = [
                [i for i, x in enumerate(found) if x.shape == y.shape and gap(x, y) < 1e-5]
                for y in pieces
            ]
            if near and all(len(x) == 1 for x in near):
                used |= {i for [i] in near}
                break
        else:
            raise AssertionError(f"diffusers does not find {name}")
    assert used == set(range(len(found)))


class TestReading:
    @pytest.mark.parametrize(
        "case", [case for case in WILD if case.reader], ids=lambda case: case.title
    )
    def test_the_oracle_is_diffusers(self, case: Wild, tmp_path: Path) -> None:
        """The files made here mean what they should; none of our code is involved."""
        file, wanted = make(tmp_path / "a.safetensors", 1, 2, case)
        assert_converted(file, case.reader or "", wanted)

    @pytest.mark.parametrize(
        "case", [case for case in WILD if case.suffixes != BARE], ids=lambda case: case.title
    )
    def test_the_plain_rule_of_the_tests_says_the_same(self, case: Wild, tmp_path: Path) -> None:
        """`tests.kinds.plain`, which judges what is written; none of our code is involved."""
        file, wanted = make(tmp_path / "a.safetensors", 1, 2, case)
        matched(plain(file), wanted, EXACT)

    @by_case
    def test_every_module_is_read_exactly(self, case: Wild, tmp_path: Path) -> None:
        file, wanted = make(tmp_path / "a.safetensors", 1, 2, case)
        matched(read(file), wanted, EXACT)

    @by_mix
    def test_each_module_by_its_own_spelling(self, mix: str, tmp_path: Path) -> None:
        file, wanted = make(tmp_path / "a.safetensors", 1, 2, *MIXED[mix])
        matched(read(file), wanted, EXACT)

    def test_a_mixed_file_says_so(self, tmp_path: Path) -> None:
        for spellings in (MIXED["kohya U-Net, diffusers text encoder"], (UNET_KOHYA, TEXT_KOHYA)):
            file, _ = make(tmp_path / "a.safetensors", 1, 2, *spellings)
            opened = open_adapter_file(file)
            dialects = {site.dialect for site in opened.sites.values()}
            mixed = spellings[1] is TEXT_DIFFUSERS
            assert dialects == ({"kohya", "diffusers"} if mixed else {"kohya"})
            assert opened.dialect == ("mixed" if mixed else "kohya")

    def test_xlabs_says_so(self, tmp_path: Path) -> None:
        file, _ = make(tmp_path / "a.safetensors", 1, 2, WILD[0])
        assert open_adapter_file(file).dialect == "xlabs"

    @pytest.mark.parametrize(
        "prefix", ["diffusion_model.blocks.0.q", "lycoris_blocks_0_q", "transformer.blocks.0.q"]
    )
    @pytest.mark.parametrize("title", ["LoHa, linear", "LoKr, both factored", "LoKr, both full"])
    def test_lycoris_kinds_below_every_prefix(
        self, prefix: str, title: str, tmp_path: Path
    ) -> None:
        """ai-toolkit writes LoKr as `diffusion_model.…lokr_w1`, others as `lycoris_…`."""
        kind = next(kind for kind in KINDS if kind.title == title)
        arrays = kind.draw(1, 2)
        file = write(tmp_path / "a.safetensors", {prefix: arrays}, {prefix: np.float32(3)})
        [found] = read(file).values()
        assert gap(found, kind.scale(2, 3.0) * dense(arrays)) < EXACT


class TestMerging:
    @by_case
    @pytest.mark.parametrize("weights", [(0.7, 0.3), (-1.5, 0.4)], ids=str)
    def test_the_sum_is_exact(
        self, case: Wild, weights: tuple[float, float], tmp_path: Path
    ) -> None:
        self.check(tmp_path, weights, case)

    @by_mix
    def test_mixed_files(self, mix: str, tmp_path: Path) -> None:
        self.check(tmp_path, (0.7, -0.3), *MIXED[mix])

    @staticmethod
    def check(folder: Path, weights: tuple[float, float], *spellings: Wild) -> None:
        """By our reader, by the plain rule and by diffusers; under the names that went in."""
        a, first = make(folder / "a.safetensors", 1, 2, *spellings)
        b, second = make(folder / "b.safetensors", 2, 3, *spellings)
        out = folder / "m.safetensors"
        report = ao.merge([a, b], weights, out=out, dtype="float32")
        assert report.error < 1e-6
        wanted = {name: weights[0] * first[name] + weights[1] * second[name] for name in first}
        names = matched(read(a), first, EXACT)
        found = read(out)
        assert sorted(found) == sorted(names.values())
        for name, stem in names.items():
            assert gap(found[stem], wanted[name]) < 1e-6
        matched(plain(out), wanted, 1e-6)
        for spelling in spellings:
            if spelling.reader and len(spellings) == 1:
                assert_converted(out, spelling.reader, wanted)

    @by_case
    def test_names_are_kept(self, case: Wild, tmp_path: Path) -> None:
        """What loads the input finds the same modules in the output."""
        self.check_names(tmp_path, case)

    @by_mix
    def test_names_of_mixed_files_are_kept(self, mix: str, tmp_path: Path) -> None:
        self.check_names(tmp_path, *MIXED[mix])

    @staticmethod
    def check_names(folder: Path, *spellings: Wild) -> None:
        files = [make(folder / f"{s}.safetensors", s, 2, *spellings)[0] for s in (1, 2)]
        out = folder / "m.safetensors"
        ao.merge(files, [0.7, 0.3], out=out)

        def factors(file: Path) -> set[str]:
            names = {name.replace(".default.", ".") for name in load_file(file)}
            names = {re.sub(r"(lora_[AB])$", r"\1.weight", name) for name in names}
            return {name for name in names if not name.endswith(".alpha")}

        assert factors(out) == factors(files[0])

    @by_mix
    def test_with_a_file_that_holds_only_a_part(self, mix: str, tmp_path: Path) -> None:
        """A module that an input lacks counts as zero, whatever dialect it would be in."""
        a, first = make(tmp_path / "a.safetensors", 1, 2, *MIXED[mix])
        b, second = make(tmp_path / "b.safetensors", 2, 3, MIXED[mix][-1])
        wanted = {name: 0.7 * value - 0.3 * second.get(name, 0.0) for name, value in first.items()}
        for index, (files, weights) in enumerate((([a, b], [0.7, -0.3]), ([b, a], [-0.3, 0.7]))):
            out = tmp_path / f"m{index}.safetensors"
            ao.merge(files, weights, out=out, dtype="float32")
            matched(read(out), wanted, 1e-6)
            matched(plain(out), wanted, 1e-6)

    def test_a_single_mixed_file_is_copied(self, tmp_path: Path) -> None:
        a, wanted = make(tmp_path / "a.safetensors", 1, 2, *MIXED["three at once"])
        ao.merge([a], out=tmp_path / "m.safetensors")
        matched(plain(tmp_path / "m.safetensors"), wanted, 1e-6)


# One module under two names, one in each file; what the message must say of it.
TWO_NAMES: Mapping[str, tuple[str, tuple[str, str], str, tuple[str, str], str]] = {
    "kohya and diffusers": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        KOHYA,
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        PEFT,
        r"(?i)dialect|spell|names?\b",
    ),
    "kohya and ComfyUI": (
        "lora_unet_double_blocks_0_img_attn_qkv",
        KOHYA,
        "diffusion_model.double_blocks.0.img_attn.qkv",
        PEFT,
        r"(?i)dialect|spell|names?\b",
    ),
    "fused and split, Flux": (
        "lora_unet_double_blocks_0_img_attn_qkv",
        KOHYA,
        "transformer.transformer_blocks.0.attn.to_q",
        PEFT,
        r"(?i)fused|split|dialect|names?\b",
    ),
    "fused and split, Z-Image": (
        "diffusion_model.layers.0.attention.qkv",
        PEFT,
        "diffusion_model.layers.0.attention.to_q",
        PEFT,
        r"(?i)fused|split|names?\b",
    ),
    "fused and split, diffusers": (
        "transformer.transformer_blocks.0.attn.to_qkv",
        PEFT,
        "transformer.transformer_blocks.0.attn.to_q",
        PEFT,
        r"(?i)fused|split|names?\b",
    ),
    "SGM and diffusers blocks": (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        KOHYA,
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        KOHYA,
        r"(?i)SGM|input_blocks|names?\b",
    ),
    "two kohya prefixes, Wan": (
        "lora_unet__blocks_0_self_attn_q",
        KOHYA,
        "lora_unet_blocks_0_self_attn_q",
        KOHYA,
        r"(?i)dialect|spell|names?\b",
    ),
    "bare and below a component, Qwen": (
        "transformer_blocks.0.attn.to_q",
        PEFT,
        "transformer.transformer_blocks.0.attn.to_q",
        PEFT,
        r"(?i)dialect|spell|names?\b",
    ),
    "XLabs and BFL": (
        "double_blocks.0.processor.qkv_lora1",
        SHORT,
        "diffusion_model.double_blocks.0.img_attn.qkv",
        PEFT,
        r"(?i)dialect|spell|names?\b",
    ),
    "PEFT and kohya": (
        "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        PEFT,
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        KOHYA,
        r"(?i)dialect|spell|names?\b",
    ),
}


BARE = "bare and below a component, Qwen"


class TestOneModuleInTwoDialects:
    @staticmethod
    def make(folder: Path, case: str, shared: bool) -> list[Path]:
        """Two files, with a module of the same name in both if `shared`."""
        first, spelling_1, second, spelling_2, _ = TWO_NAMES[case]
        files = []
        for number, (name, suffixes) in enumerate(((first, spelling_1), (second, spelling_2))):
            shape = (36, 12) if "qkv" in name else (12, 12)
            parts = [Wild(f"{number}", {name: shape}, suffixes)]
            parts += [TEXT_KOHYA] if shared else []
            file, _ = make(folder / f"{number}.safetensors", number + 1, 2, *parts)
            files.append(file)
        return files

    def test_a_bare_file_goes_with_one_of_that_component_alone(self, tmp_path: Path) -> None:
        files = self.make(tmp_path, BARE, False)
        report = ao.merge(files, [0.7, 0.3], out=tmp_path / "m.safetensors")
        assert len(report.modules) == 1

    @pytest.mark.parametrize(
        ("case", "shared"),
        [(case, True) for case in TWO_NAMES]
        + [(case, False) for case in TWO_NAMES if case != BARE],
    )
    def test_is_refused_with_that_reason(self, case: str, shared: bool, tmp_path: Path) -> None:
        """A sum by stem would hold the module twice, and no loader applies both."""
        files = self.make(tmp_path, case, shared)
        alpha = {files[0]: 2.0} if "PEFT" in case else None
        with pytest.raises(IncompatibleError, match=TWO_NAMES[case][-1]) as caught:
            ao.merge(files, [0.7, 0.3], out=tmp_path / "m.safetensors", alpha=alpha)
        assert caught.value.exit_code == 4
        text = str(caught.value)
        for name in (TWO_NAMES[case][0], TWO_NAMES[case][2]):
            stem = name.removeprefix("base_model.model.")
            fragment = next(
                (x for x in ("input_blocks", "down_blocks", "qkv", "to_q") if x in stem), stem
            )
            assert fragment in text or stem in text, text
        assert not (tmp_path / "m.safetensors").exists()

    @pytest.mark.parametrize("suffix", ["diff", "diff_b"])
    def test_full_deltas_have_names_too(self, suffix: str, tmp_path: Path) -> None:
        """SGM's and diffusers' blocks of one U-Net, changed by nothing but full deltas there."""
        files = []
        for seed, block in enumerate(("input_blocks_3_0_op", "down_blocks_0_downsamplers_0_conv")):
            tensors, _ = TEXT_KOHYA.draw(seed, 2)
            tensors[f"lora_unet_{block}.{suffix}"] = np.ones(12, np.float32)
            files.append(write(tmp_path / f"{seed}.safetensors", {}, **tensors))
        with pytest.raises(IncompatibleError, match=r"SGM.*diffusers' names") as caught:
            ao.merge(files, [0.7, 0.3], out=tmp_path / "m.safetensors")
        assert caught.value.exit_code == 4
        assert "input_blocks_3" in str(caught.value) and "down_blocks_0" in str(caught.value)
        assert not (tmp_path / "m.safetensors").exists()

    def test_in_one_file_it_is_refused_too(self, tmp_path: Path) -> None:
        """The same module as `lora_unet_…` and as `unet.…`: loaders take one or the other."""
        first, spelling_1, second, spelling_2, _ = TWO_NAMES["kohya and diffusers"]
        spellings = [
            Wild("1", {first: (12, 12)}, spelling_1),
            Wild("2", {second: (12, 12)}, spelling_2),
        ]
        file, _ = make(tmp_path / "a.safetensors", 1, 2, *spellings)
        with pytest.raises(ao.AdapterOpsError) as caught:
            ao.merge([file, file], [0.5, 0.5], out=tmp_path / "m.safetensors")
        assert caught.value.exit_code in (3, 4)
        assert first in str(caught.value) or second in str(caught.value)

    @pytest.mark.parametrize("case", ["kohya and diffusers", "fused and split, Flux"])
    def test_each_alone_is_fine(self, case: str, tmp_path: Path) -> None:
        for file in self.make(tmp_path, case, True):
            ao.merge([file, file], [0.5, 0.5], out=tmp_path / f"m-{file.name}", rank=4)


def cloneofsimo(file: Path) -> dict[str, list[np.ndarray]]:
    """The lists that lora_diffusion's `parse_safeloras` makes of a file: [up0, down0, up1, …].

    It takes targets and ranks from the header and raises KeyError where they are missing.
    """
    from safetensors import safe_open

    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    result = {}
    for name in sorted({key.partition(":")[0] for key in tensors if ":" in key}):
        assert isinstance(json.loads(metadata[name]), list)
        keys = [key for key in tensors if key.startswith(f"{name}:")]
        weights: list[Any] = [None] * len(keys)
        for key in keys:
            _, index, side = key.split(":")
            rank = json.loads(metadata[f"{name}:{index}:rank"])
            value = tensors[key]
            assert rank == (value.shape[0] if side == "down" else value.shape[1])
            weights[2 * int(index) + (side == "down")] = value
        result[name] = weights
    return result


class TestCloneofsimo:
    SHAPES = ((12, 12), (96, 12), (20, 8), (12, 12))

    @classmethod
    def pairs(cls, seed: int, rank: int, dtype: Any = np.float16) -> list[np.ndarray]:
        """[up0, down0, up1, down1, …]"""
        rng = np.random.default_rng(seed)
        result = []
        for out, channels in cls.SHAPES:
            result += [rng.standard_normal((out, rank)), rng.standard_normal((rank, channels))]
        return [value.astype(dtype) for value in result]

    @staticmethod
    def products(weights: list[np.ndarray]) -> dict[str, np.ndarray]:
        """ΔW by index: scale 1."""
        exact = [value.astype(np.float64) for value in weights]
        return {str(i): exact[2 * i] @ exact[2 * i + 1] for i in range(len(exact) // 2)}

    @classmethod
    def safetensors(cls, file: Path, seed: int, rank: int, tokens: bool = False) -> Path:
        metadata = {"unet": '["CrossAttention", "GEGLU"]', "text_encoder": '["CLIPAttention"]'}
        tensors = {}
        for part, shift in (("unet", 0), ("text_encoder", 100)):
            weights = cls.pairs(seed + shift, rank)
            for index, value in enumerate(weights):
                side = "down" if index % 2 else "up"
                tensors[f"{part}:{index // 2}:{side}"] = value
                metadata[f"{part}:{index // 2}:rank"] = str(rank)
        if tokens:
            tensors["<s1>"] = np.full(8, seed, np.float32)
            metadata["<s1>"] = "<embed>"
        return write(file, {}, None, metadata, **tensors)

    @classmethod
    def wanted(cls, seed: int, rank: int) -> dict[str, np.ndarray]:
        return {
            f"{part}:{index}": value
            for part, shift in (("unet", 0), ("text_encoder", 100))
            for index, value in cls.products(cls.pairs(seed + shift, rank)).items()
        }

    def test_is_read_with_scale_one(self, tmp_path: Path) -> None:
        file = self.safetensors(tmp_path / "a.safetensors", 1, 2, tokens=True)
        wanted = self.wanted(1, 2)
        lists = cloneofsimo(file)  # the oracle's own reader, on what its writer wrote
        for part in ("unet", "text_encoder"):
            for index, value in self.products(lists[part]).items():
                assert gap(value, wanted[f"{part}:{index}"]) < EXACT
        matched(read(file), wanted, EXACT)
        opened = open_adapter_file(file)
        assert opened.dialect == "cloneofsimo"
        assert [*opened.extras] == ["<s1>"]
        assert {site.scale for site in opened.sites.values()} == {1.0}

    @pytest.mark.parametrize("weights", [(0.7, 0.3), (-1.5, 0.4)], ids=str)
    def test_its_own_loader_reads_the_merge(
        self, weights: tuple[float, float], tmp_path: Path
    ) -> None:
        files = [self.safetensors(tmp_path / f"{s}.safetensors", s, s) for s in (1, 2)]
        out = tmp_path / "m.safetensors"
        ao.merge(files, weights, out=out, dtype="float32")
        first, second = self.wanted(1, 1), self.wanted(2, 2)
        wanted = {name: weights[0] * first[name] + weights[1] * second[name] for name in first}
        matched(read(out), wanted, 1e-6)
        matched(plain(out), wanted, 1e-6)
        for part, lists in cloneofsimo(out).items():
            for index, value in self.products(lists).items():
                assert gap(value, wanted[f"{part}:{index}"]) < 1e-6

    def test_token_vectors_are_extras(self, tmp_path: Path) -> None:
        files = [self.safetensors(tmp_path / f"{s}.safetensors", s, 2, tokens=True) for s in (1, 2)]
        with pytest.raises(IncompatibleError, match="--extras"):
            ao.merge(files, [0.5, 0.5], out=tmp_path / "m.safetensors")
        ao.merge(files, [0.5, 0.5], out=tmp_path / "m.safetensors", extras="first")
        assert load_file(tmp_path / "m.safetensors")["<s1>"].tolist() == [1.0] * 8

    @staticmethod
    def pickled(file: Path, values: list[np.ndarray], *, parameters: bool = False) -> Path:
        import torch

        tensors = [torch.from_numpy(value) for value in values]
        torch.save([torch.nn.Parameter(x) for x in tensors] if parameters else tensors, file)
        return file

    @pytest.mark.parametrize("parameters", [False, True])
    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_a_pickled_list(self, parameters: bool, dtype: Any, tmp_path: Path) -> None:
        values = self.pairs(1, 2, dtype)
        file = self.pickled(tmp_path / "a.pt", values, parameters=parameters)
        with pytest.raises(FormatError, match="--allow-pickle"):
            ao.open_adapter(file)
        matched(read(file, allow_pickle=True), self.products(values), EXACT)

    def test_a_list_of_mixed_types(self, tmp_path: Path) -> None:
        values = self.pairs(1, 2, np.float32)
        values = [value.astype(np.float16) if i % 2 else value for i, value in enumerate(values)]
        file = self.pickled(tmp_path / "a.pt", values)
        matched(read(file, allow_pickle=True), self.products(values), EXACT)

    def test_pickled_lists_merge(self, tmp_path: Path) -> None:
        lists = [self.pairs(1, 2), self.pairs(2, 3)]
        files = [self.pickled(tmp_path / f"{i}.pt", values) for i, values in enumerate(lists)]
        out = tmp_path / "m.safetensors"
        ao.merge(files, [0.7, -0.3], out=out, dtype="float32", allow_pickle=True)
        first, second = map(self.products, lists)
        wanted = {name: 0.7 * first[name] - 0.3 * second[name] for name in first}
        matched(read(out), wanted, 1e-6)
        matched(plain(out), wanted, 1e-6)

    @pytest.mark.parametrize("change", ["odd", "down first", "ranks", "not a tensor", "empty"])
    def test_lists_that_are_something_else(self, change: str, tmp_path: Path) -> None:
        values: list[Any] = self.pairs(1, 2, np.float32)
        if change == "odd":
            values = values[:-1]
        elif change == "down first":  # (r, in) · (out, r) may multiply, and mean nothing
            values = [np.ones(shape, np.float32) for shape in ((2, 12), (12, 2)) * 2]
        elif change == "ranks":
            values[0] = np.ones((12, 3), np.float32)
        elif change == "empty":
            values = []
        import torch

        tensors: list[Any] = [torch.from_numpy(value) for value in values]
        if change == "not a tensor":
            tensors[1] = "down"
        torch.save(tensors, tmp_path / "a.pt")
        with pytest.raises(ao.AdapterOpsError) as caught:
            ao.open_adapter(tmp_path / "a.pt", allow_pickle=True)
        assert caught.value.exit_code in (3, 4)
        assert "a.pt" in str(caught.value)

    @pytest.mark.parametrize(
        "name", ["analog_svd_rank4.safetensors", "lora_disney_inpainting.safetensors"]
    )
    def test_the_corpus(self, name: str, corpus: Path, tmp_path: Path) -> None:
        """fp16 factors of rank 4 and 1, ranks in the header; the second carries two tokens."""
        file = corpus / "cloneofsimo__lora" / name
        entries = json.loads((corpus / "manifest.json").read_text())
        [entry] = [e for e in entries if e["file"].endswith(name)]
        lists = list(cloneofsimo(file).values())
        total = math.hypot(*(self.norm(*pair) for values in lists for pair in self.halves(values)))
        assert total == pytest.approx(entry["fro"], rel=1e-6)
        adapter = ao.open_adapter(file)
        assert len(adapter) == sum(map(len, lists)) // 2 == entry["n_mod"]
        norm = math.hypot(*(factors.norm() for factors in adapter.values()))
        assert norm == pytest.approx(total, rel=1e-9)
        [(_, opened)] = adapter.terms
        assert len(opened.extras) == entry["extra_keys"]

    def test_the_corpus_s_pickle(self, corpus: Path) -> None:
        """A list of 256 parameters saved from a GPU."""
        import torch

        file = corpus / "cloneofsimo__lora" / "lora_pop.pt"
        values = torch.load(file, map_location="cpu", weights_only=True)
        pairs = list(self.halves([value.detach().numpy() for value in values]))
        entries = json.loads((corpus / "manifest.json").read_text())
        [norm] = [e["fro"] for e in entries if e["file"].endswith("lora_pop.pt")]
        assert math.hypot(*(self.norm(*pair) for pair in pairs)) == pytest.approx(norm, rel=1e-6)
        adapter = ao.open_adapter(file, allow_pickle=True)
        assert len(adapter) == len(pairs) == 128
        stems = sorted(adapter, key=lambda stem: int(re.findall(r"\d+", stem)[-1]))
        for index in range(0, len(pairs), 9):  # in the list's order
            up, down = (value.astype(np.float64) for value in pairs[index])
            assert gap(adapter[stems[index]].dense(), up @ down) < EXACT

    @staticmethod
    def halves(values: list[Any]) -> Iterator[tuple[Any, Any]]:
        """(up, down) by index."""
        return zip(values[::2], values[1::2], strict=True)

    @staticmethod
    def norm(up: np.ndarray, down: np.ndarray) -> float:
        """‖up · down‖_F by the Gram matrices of the two."""
        one, two = up.astype(np.float64), down.astype(np.float64)
        return float(np.sum((one.T @ one) * (two @ two.T))) ** 0.5


def rows() -> list[tuple[str, str, str]]:
    """(dialect, title, kind) of each case here, for the table of what is supported."""
    return [
        *(("by grammar", case.title, "lora") for case in WILD),
        *(("mixed", mix, "lora") for mix in MIXED),
        ("cloneofsimo", "safetensors", "lora"),
        ("cloneofsimo", "pickled list", "lora"),
    ]
