"""Full deltas (`.diff`, `.diff_b`, `.w_norm`, `.b_norm`): summed with the weights, never extras."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterops as ao
from adapterops.errors import IncompatibleError, NumericsError
from adapterops.formats import open_adapter_file
from tests.kinds import KINDS, Kind, dense, gap, plain, read, write
from tests.support import load_file

UNET = "lora_unet_down_blocks_0_"
SHAPES: Mapping[str, tuple[int, ...]] = {
    f"{UNET}proj.diff": (24, 30),
    f"{UNET}proj.diff_b": (24,),
    f"{UNET}conv.diff": (12, 6, 3, 3),
    f"{UNET}norm1.w_norm": (24,),
    f"{UNET}norm1.b_norm": (24,),
}
WAN: Mapping[str, tuple[int, ...]] = {
    "diffusion_model.blocks.0.norm3.diff": (16,),
    "diffusion_model.blocks.0.norm3.diff_b": (16,),
    "diffusion_model.blocks.0.self_attn.q.diff_b": (24,),
    "diffusion_model.patch_embedding.diff": (16, 4, 1, 2, 2),
}
CASES = {"beside LoCon: weights, biases, norms": SHAPES, "beside LoRA, Wan": WAN}
PAIR = f"{UNET}q"  # a plain pair that every file holds
WEIGHTS = [(0.7, 0.3), (-1.5, 0.4), (1.0, 0.0)]


def kind_of(title: str) -> Kind:
    return next(kind for kind in KINDS if kind.title == title)


LORA = kind_of("LoRA, linear")


def draw(seed: int, shapes: Mapping[str, tuple[int, ...]], dtype: Any = np.float32) -> Any:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def make(
    file: Path,
    seed: int,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    *,
    pair: str | None = PAIR,
    dtype: Any = np.float32,
) -> dict[str, np.ndarray]:
    """A file with these deltas and one plain pair; what they are."""
    deltas = draw(seed, shapes, dtype)
    modules = {pair: LORA.draw(seed, 2, dtype)} if pair else {}
    write(file, modules, **deltas)
    return deltas


def full(file: Path) -> dict[str, np.ndarray]:
    """The full deltas that a file holds."""
    ends = (".diff", ".diff_b", ".w_norm", ".b_norm")
    return {k: v.astype(np.float64) for k, v in load_file(file).items() if k.endswith(ends)}


def summed(weights: tuple[float, ...], *deltas: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Σ w·x; an input that lacks one counts as zero."""
    result: dict[str, np.ndarray] = {}
    for weight, values in zip(weights, deltas, strict=True):
        for name, value in values.items() if weight else ():
            result[name] = result.get(name, 0.0) + weight * value.astype(np.float64)
    return result


def assert_same(
    found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], tolerance: float = 1e-6
) -> None:
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        assert gap(found[name], value) < tolerance, name


class TestReading:
    @pytest.mark.parametrize("shapes", CASES.values(), ids=CASES)
    def test_are_neither_sites_nor_extras(
        self, shapes: Mapping[str, tuple[int, ...]], tmp_path: Path
    ) -> None:
        pair = PAIR if shapes is SHAPES else "diffusion_model.blocks.0.self_attn.q"
        wanted = make(tmp_path / "a.safetensors", 1, shapes, pair=pair)
        file = open_adapter_file(tmp_path / "a.safetensors")
        assert sorted(file.deltas) == sorted(wanted)
        assert not file.extras and len(file.sites) == 1
        for name, ref in file.deltas.items():
            assert ref.shape == wanted[name].shape
            assert np.array_equal(ref.read(), wanted[name].astype(np.float64))

    def test_a_file_of_nothing_else_is_an_adapter(self, tmp_path: Path) -> None:
        """LyCORIS' "full" algorithm trains nothing but these."""
        make(tmp_path / "a.safetensors", 1, pair=None)
        assert sorted(open_adapter_file(tmp_path / "a.safetensors").deltas) == sorted(SHAPES)

    def test_are_what_lycoris_saves(self, tmp_path: Path) -> None:
        """FullModule and NormModule: the saved tensor is what forward adds to weight and bias."""
        pytest.importorskip("lycoris")
        import torch
        from lycoris.modules.full import FullModule
        from lycoris.modules.norms import NormModule
        from torch import nn

        torch.manual_seed(0)
        tensors: dict[str, np.ndarray] = {}
        wanted: dict[str, np.ndarray] = {}
        for stem, base, kind in (
            (f"{UNET}proj", nn.Linear(30, 24), FullModule),
            (f"{UNET}norm1", nn.LayerNorm(24), NormModule),
        ):
            module = kind(stem, base, 1.0)
            with torch.no_grad():
                x = torch.randn(50, base.weight.shape[-1])
                before = base(x)
                module.apply_to()  # from here on `base` computes what the module says
                for value in module.eval().parameters():
                    value.add_(torch.randn(value.shape))
                change = (base(x) - before).numpy()
            state = module.custom_state_dict() or module.state_dict()
            assert sorted(state) in (["diff", "diff_b"], ["b_norm", "w_norm"])
            for name, value in state.items():
                tensors[f"{stem}.{name}"] = value.detach().float().numpy()
            saved = {k.rpartition(".")[2]: v for k, v in tensors.items() if k.startswith(stem)}
            if "diff" in saved:
                said = x.numpy() @ saved["diff"].T + saved["diff_b"]
            else:
                normal = nn.functional.layer_norm(x, (24,)).numpy()
                said = normal * saved["w_norm"] + saved["b_norm"]
            assert gap(said, change) < 1e-5
            wanted |= {k: v for k, v in tensors.items() if k.startswith(stem)}
        file = write(tmp_path / "a.safetensors", {}, **tensors)
        ao.merge([file], [-2.0], out=tmp_path / "m.safetensors", dtype="float32")
        assert_same(full(tmp_path / "m.safetensors"), summed((-2.0,), wanted))


class TestMerging:
    @pytest.mark.parametrize("weights", WEIGHTS, ids=str)
    @pytest.mark.parametrize("shapes", CASES.values(), ids=CASES)
    def test_the_sum_is_elementwise(
        self, shapes: Mapping[str, tuple[int, ...]], weights: tuple[float, float], tmp_path: Path
    ) -> None:
        files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
        pair = PAIR if shapes is SHAPES else "diffusion_model.blocks.0.self_attn.q"
        deltas = [make(file, seed, shapes, pair=pair) for seed, file in enumerate(files)]
        out = tmp_path / "m.safetensors"
        ao.merge(files, weights, out=out, dtype="float32", rank=4)
        assert_same(full(out), summed(weights, *deltas))
        lora = [LORA.draw(seed, 2) for seed in (0, 1)]
        wanted = weights[0] * dense(lora[0]) + weights[1] * dense(lora[1])
        [found] = plain(out).values()
        assert gap(found, wanted) < 1e-6

    @pytest.mark.parametrize("extras", ["error", "first", "average", "drop"])
    def test_never_under_extras(self, extras: str, tmp_path: Path) -> None:
        files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
        deltas = [make(file, seed) for seed, file in enumerate(files)]
        out = tmp_path / "m.safetensors"
        report = ao.merge(files, [0.7, 0.3], out=out, dtype="float32", extras=extras)
        assert_same(full(out), summed((0.7, 0.3), *deltas))
        assert not report.extras

    @pytest.mark.parametrize("swapped", [False, True])
    def test_what_an_input_lacks_counts_as_zero(self, swapped: bool, tmp_path: Path) -> None:
        files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
        some = dict(itertools.islice(SHAPES.items(), 2))
        deltas = [make(files[0], 0), make(files[1], 1, some)]
        weights = (0.7, -0.3)
        if swapped:
            files, deltas, weights = files[::-1], deltas[::-1], (-0.3, 0.7)
        out = tmp_path / "m.safetensors"
        ao.merge(files, weights, out=out, dtype="float32")
        assert_same(full(out), summed(weights, *deltas))

    def test_files_of_nothing_else(self, tmp_path: Path) -> None:
        files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
        deltas = [make(file, seed, pair=None) for seed, file in enumerate(files)]
        out = tmp_path / "m.safetensors"
        ao.merge(files, [0.7, 0.3], out=out, dtype="float32")
        assert_same(full(out), summed((0.7, 0.3), *deltas))
        assert sorted(load_file(out)) == sorted(SHAPES)

    def test_one_adapter_alone_is_unchanged(self, tmp_path: Path) -> None:
        deltas = make(tmp_path / "a.safetensors", 1, dtype=np.float16)
        out = tmp_path / "m.safetensors"
        report = ao.merge([tmp_path / "a.safetensors"], out=out)
        assert report.dtype == "float16"
        for name, value in deltas.items():
            assert np.array_equal(load_file(out)[name], value)

    def test_eight_bit_files_are_copied(self, tmp_path: Path) -> None:
        """Sums are not stored in float8, but nothing is summed here."""
        import torch
        from safetensors.torch import load_file as load_torch
        from safetensors.torch import save_file as save_torch

        pair = {f"{PAIR}.{suffix}": value for suffix, value in LORA.draw(1, 2).items()}
        arrays = draw(1, SHAPES) | pair
        stored = {k: torch.from_numpy(v).to(torch.float8_e4m3fn) for k, v in arrays.items()}
        file, out = tmp_path / "a.safetensors", tmp_path / "m.safetensors"
        save_torch(stored, file)
        report = ao.merge([file], out=out)
        assert (report.dtype, report.error) == ("F8_E4M3", 0.0)
        found = load_torch(out)
        assert found.keys() == stored.keys()
        for name, value in stored.items():
            assert found[name].dtype == torch.float8_e4m3fn
            assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8))

    def test_python_arithmetic_is_the_same(self, tmp_path: Path) -> None:
        files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
        deltas = [make(file, seed) for seed, file in enumerate(files)]
        a, b = map(ao.open_adapter, files)
        (0.7 * a - b / 4).save(tmp_path / "m.safetensors", dtype="float32")
        assert_same(full(tmp_path / "m.safetensors"), summed((0.7, -0.25), *deltas))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_are_stored_in_the_type_asked_for(self, dtype: str, tmp_path: Path) -> None:
        """Rounded once, from the exact sum."""
        import torch
        from safetensors.torch import load_file as load_torch

        files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
        deltas = [make(file, seed) for seed, file in enumerate(files)]
        out = tmp_path / "m.safetensors"
        ao.merge(files, [0.7, 0.3], out=out, dtype=dtype)
        found = load_torch(out)
        for name, value in summed((0.7, 0.3), *deltas).items():
            assert found[name].dtype == getattr(torch, dtype)
            half_step = torch.finfo(found[name].dtype).eps / 2
            assert np.all(
                np.abs(found[name].double().numpy() - value)
                <= half_step * np.abs(value) * (1 + 1e-12) + 2.0**-25
            )

    def test_truncation_does_not_touch_them(self, tmp_path: Path) -> None:
        files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
        deltas = [make(file, seed) for seed, file in enumerate(files)]
        out = tmp_path / "m.safetensors"
        ao.merge(files, [0.7, 0.3], out=out, dtype="float32", rank=1)
        assert_same(full(out), summed((0.7, 0.3), *deltas))

    def test_shapes_that_differ(self, tmp_path: Path) -> None:
        name = f"{UNET}norm1.w_norm"
        make(tmp_path / "a.safetensors", 0, {name: (24,)})
        make(tmp_path / "b.safetensors", 1, {name: (32,)})
        files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
        with pytest.raises(IncompatibleError, match="norm1") as caught:
            ao.merge(files, [1, 1], out=tmp_path / "m.safetensors")
        assert "24" in str(caught.value) and "32" in str(caught.value)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_what_is_not_finite(self, value: float, tmp_path: Path) -> None:
        name = f"{UNET}norm1.w_norm"
        tensors = {name: np.array([1, value, 2], np.float32)}
        write(tmp_path / "a.safetensors", {PAIR: LORA.draw(1, 2)}, **tensors)
        with pytest.raises(NumericsError, match="norm1"):
            ao.merge([tmp_path / "a.safetensors"], [2.0], out=tmp_path / "m.safetensors")
        assert not (tmp_path / "m.safetensors").exists()

    def test_what_overflows_the_type(self, tmp_path: Path) -> None:
        name = f"{UNET}norm1.w_norm"
        tensors = {name: np.array([1, 60000, 2], np.float16)}
        write(tmp_path / "a.safetensors", {PAIR: LORA.draw(1, 2, np.float16)}, **tensors)
        out = tmp_path / "m.safetensors"
        with pytest.raises(NumericsError, match="norm1"):
            ao.merge([tmp_path / "a.safetensors"], [2.0], out=out)
        ao.merge([tmp_path / "a.safetensors"], [2.0], out=out, dtype="float32")
        assert full(out)[name].tolist() == [2, 120000 - 120000 % 64, 4]  # 60000 is 59968 in half

    def test_another_dialect_has_no_names_for_them(self, tmp_path: Path) -> None:
        pair = f"{UNET}attentions_0_transformer_blocks_0_attn1_to_q"
        make(tmp_path / "a.safetensors", 0, pair=pair)
        with pytest.raises(IncompatibleError, match="--to diffusers"):
            ao.merge([tmp_path / "a.safetensors"], out=tmp_path / "m", to="diffusers")


DENSE_CASES = (
    "LoRA, linear",
    "LoCon, 3 x 3",
    "LoHa, linear",
    "LoKr, w2 factored",
    "LoHa, Tucker 3 x 3",
)


@pytest.mark.parametrize("title", DENSE_CASES)
class TestBesideLowRank:
    """LoRA in one input and `.diff` in another on one stem: the sum is dense, and so written."""

    @staticmethod
    def make(title: str, folder: Path) -> tuple[list[Path], list[np.ndarray], tuple[int, ...]]:
        """A file with factors and one with a full delta of one module; both hold another pair."""
        kind = kind_of(title)
        stem = f"{UNET}proj"
        arrays = kind.draw(1, 2)
        change = dense(arrays)
        shape = (24, 6, *kind.kernel) if kind.kernel else (24, 30)
        other = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
        a = write(folder / "a.safetensors", {stem: arrays, PAIR: LORA.draw(3, 2)})
        b = write(folder / "b.safetensors", {PAIR: LORA.draw(4, 2)}, **{f"{stem}.diff": other})
        return [a, b], [change.reshape(shape), other.astype(np.float64)], shape

    @pytest.mark.parametrize("swapped", [False, True])
    @pytest.mark.parametrize("rank", [None, 1])
    def test_the_output_holds_the_dense_sum(
        self, title: str, swapped: bool, rank: int | None, tmp_path: Path
    ) -> None:
        files, deltas, _ = self.make(title, tmp_path)
        weights = [0.7, -0.3]
        wanted = 0.7 * deltas[0] - 0.3 * deltas[1]
        if swapped:
            files, weights = files[::-1], weights[::-1]
        out = tmp_path / "m.safetensors"
        ao.merge(files, weights, out=out, dtype="float32", rank=rank)
        found = load_file(out)
        stem = f"{UNET}proj"
        assert [name for name in found if name.startswith(stem)] == [f"{stem}.diff"]
        assert gap(found[f"{stem}.diff"].astype(np.float64), wanted) < 1e-6
        assert list(plain(out)) == [PAIR]
        assert gap(read(out)[stem], wanted.reshape(len(wanted), -1)) < 1e-6
        assert sorted(read(out)) == sorted([PAIR, stem])

    def test_a_weight_of_zero_leaves_the_factors(self, title: str, tmp_path: Path) -> None:
        files, deltas, _ = self.make(title, tmp_path)
        out = tmp_path / "m.safetensors"
        ao.merge(files, [2.0, 0.0], out=out, dtype="float32")
        assert not full(out)
        found = plain(out)[f"{UNET}proj"]
        assert gap(found, 2 * deltas[0].reshape(24, -1)) < 1e-6

    def test_shapes_must_agree(self, title: str, tmp_path: Path) -> None:
        [a, _], _, shape = self.make(title, tmp_path)
        wrong = np.ones((*shape[:-1], shape[-1] + 1), np.float32)
        b = write(
            tmp_path / "c.safetensors",
            {PAIR: LORA.draw(4, 2)},
            **{f"{UNET}proj.diff": wrong},
        )
        with pytest.raises(IncompatibleError, match=f"{UNET}proj"):
            ao.merge([a, b], [1, 1], out=tmp_path / "m.safetensors")

    def test_both_in_one_file_are_refused(self, title: str, tmp_path: Path) -> None:
        """Loaders differ in whether they add the two."""
        stem = f"{UNET}proj"
        arrays = kind_of(title).draw(1, 2)
        tensors = {f"{stem}.diff": np.ones((24, 30), np.float32)}
        file = write(tmp_path / "a.safetensors", {stem: arrays}, **tensors)
        with pytest.raises(ao.AdapterOpsError, match=stem) as caught:
            ao.open_adapter(file)
        assert caught.value.exit_code in (3, 4) and "diff" in str(caught.value)


def test_a_bias_beside_factors_is_fine(tmp_path: Path) -> None:
    """Wan files carry `.diff_b` on modules that have a pair as well."""
    stem = "diffusion_model.blocks.0.self_attn.q"
    files, biases = [], []
    for seed in (0, 1):
        biases.append(draw(seed, {f"{stem}.diff_b": (24,)}))
        files.append(
            write(tmp_path / f"{seed}.safetensors", {stem: LORA.draw(seed, 2)}, **biases[-1])
        )
    out = tmp_path / "m.safetensors"
    ao.merge(files, [0.7, 0.3], out=out, dtype="float32")
    assert_same(full(out), summed((0.7, 0.3), *biases))
    [found] = read(out).values()
    assert gap(found, 0.7 * dense(LORA.draw(0, 2)) + 0.3 * dense(LORA.draw(1, 2))) < 1e-6


BARE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # without diffusers' `unet.`
BARE_PAIR = {"lora_A.weight": (2, 30), "lora_B.weight": (24, 2)}


def test_bare_names_with_both_in_one_file_are_refused(tmp_path: Path) -> None:
    """The module is called `unet.…` as soon as it is read, its full delta is not."""
    file = write(
        tmp_path / "a.safetensors",
        {BARE: draw(1, BARE_PAIR)},
        **draw(2, {f"{BARE}.diff": (24, 30)}),
    )
    with pytest.raises(ao.AdapterOpsError, match=rf"unet\.{BARE}.*{BARE}\.diff") as caught:
        ao.open_adapter(file)
    assert caught.value.exit_code in (3, 4)


@pytest.mark.parametrize("swapped", [False, True])
def test_bare_names_of_factors_and_of_a_full_delta_are_one_module(
    swapped: bool, tmp_path: Path
) -> None:
    other = "mid_block.attentions.0.proj"
    low, high = draw(1, BARE_PAIR), draw(2, {f"{BARE}.diff": (24, 30)})
    a = write(tmp_path / "a.safetensors", {BARE: low, other: draw(3, BARE_PAIR)})
    b = write(tmp_path / "b.safetensors", {other: draw(4, BARE_PAIR)}, **high)
    files, weights = ([b, a], [-0.3, 0.7]) if swapped else ([a, b], [0.7, -0.3])
    out = tmp_path / "m.safetensors"
    ao.merge(files, weights, out=out, dtype="float32")
    exact = {k: v.astype(np.float64) for k, v in (low | high).items()}
    wanted = 0.7 * exact["lora_B.weight"] @ exact["lora_A.weight"] - 0.3 * exact[f"{BARE}.diff"]
    assert [name for name in load_file(out) if "attn1" in name] == [f"{BARE}.diff"]
    assert gap(full(out)[f"{BARE}.diff"], wanted) < 1e-6


def test_a_bias_beside_bare_factors_is_fine(tmp_path: Path) -> None:
    bias = draw(2, {f"{BARE}.diff_b": (24,)})
    file = write(tmp_path / "a.safetensors", {BARE: draw(1, BARE_PAIR)}, **bias)
    ao.merge([file], [0.5], out=tmp_path / "m.safetensors", dtype="float32")
    assert (
        gap(
            full(tmp_path / "m.safetensors")[f"{BARE}.diff_b"],
            0.5 * bias[f"{BARE}.diff_b"].astype(float),
        )
        < 1e-6
    )
