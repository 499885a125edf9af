"""LoCon, CP/Tucker, LoHa and LoKr in kohya's files: read exactly, merged exactly, or named.

The oracle is one einsum a kind (tests/kinds.py), which is first held against lycoris-lora itself:
its functional API in float64, and the forward pass of its modules on the files they make. The
library's `get_diff_weight` applies alpha / r twice for LoHa and LoKr, and the functional LoKr takes
a wrong rank beside a Tucker core: neither is used, and a test shows both.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterops as ao
from adapterops.errors import (
    FormatError,
    IncompatibleError,
    NumericsError,
    UnsupportedError,
    UsageError,
)
from adapterops.formats import open_adapter_file, read_adapter
from tests.kinds import KINDS, OUT, Arrays, Kind, assert_dora, dense, gap, read, write
from tests.support import distance, read_kohya, weighted

STEM = "lora_unet_mid_block_q"
EXACT = 1e-14  # of a product of a few float64 numbers
by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.title)


def kind_of(title: str) -> Kind:
    """The case of this title."""
    return next(kind for kind in KINDS if kind.title == title)


def site(file: Path, stem: str = STEM) -> Any:
    """The one module of a file as its header describes it."""
    return open_adapter_file(file).sites[stem]


class TestTheOracle:
    """The einsums against the library that made these kinds; none of our code is involved."""

    @staticmethod
    def functional(kind: Kind, arrays: Arrays, dim: int, scale: float) -> np.ndarray:
        """ΔW by lycoris' functional API, from float64 tensors."""
        pytest.importorskip("lycoris")
        import torch
        from lycoris.functional import locon, loha, lokr

        def take(*suffixes: str) -> list[Any]:
            found = [arrays.get(suffix) for suffix in suffixes]
            return [value if value is None else torch.from_numpy(value) for value in found]

        if kind.name in ("lora", "tucker"):
            weights = take("lora_down.weight", "lora_up.weight", "lora_mid.weight")
            return locon.diff_weight(*weights, gamma=scale, backend="torch").numpy()
        if kind.name == "loha":
            names = ("w1_b", "w1_a", "w2_b", "w2_a", "t1", "t2")
            weights = take(*(f"hada_{name}" for name in names))
            gamma = torch.tensor(scale, dtype=torch.float64)
            return loha.diff_weight(*weights, gamma=gamma, backend="torch").numpy()
        names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
        weights = take(*(f"lokr_{name}" for name in names))
        # The library divides gamma by w2_a.shape[1]; beside a Tucker core that is no rank.
        wrong = "lokr_t2" in arrays and "lokr_w1_a" not in arrays
        divisor = arrays["lokr_w2_a"].shape[1] if wrong else dim
        return lokr.diff_weight(*weights, gamma=scale * divisor, backend="torch").numpy()

    @by_kind
    @pytest.mark.parametrize("dim", [1, 2, 3])
    def test_is_the_functional_api(self, kind: Kind, dim: int) -> None:
        arrays = kind.draw(1, dim, np.float64)
        scale = kind.scale(dim, 0.7)
        theirs = self.functional(kind, arrays, dim, scale)
        assert gap(theirs.reshape(len(theirs), -1), scale * dense(arrays)) < EXACT

    @by_kind
    @pytest.mark.parametrize("dim", [1, 2, 3])
    def test_ranks_bound_the_numerical_rank(self, kind: Kind, dim: int) -> None:
        whole = dense(kind.draw(1, dim, np.float64))
        assert np.linalg.matrix_rank(whole) == min(kind.rank(dim), *whole.shape)

    def test_the_functional_lokr_takes_a_wrong_rank_beside_a_core(self) -> None:
        kind = kind_of("LoKr, Tucker 3 x 2")
        arrays = kind.draw(1, 2, np.float64)
        right = self.functional(kind, arrays, 2, 0.35)
        import torch
        from lycoris.functional import lokr

        names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
        weights = [arrays.get(f"lokr_{name}") for name in names]
        tensors = [value if value is None else torch.from_numpy(value) for value in weights]
        naive = lokr.diff_weight(*tensors, gamma=0.7, backend="torch").numpy()
        assert gap(naive * (8 / 2), right) < EXACT  # w2_a is (2, 8): rank 2, not 8


MODULES: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    # class, layer, arguments beside lora_dim and alpha
    ("LoConModule", "linear", {}),
    ("LoConModule", "conv2", {}),
    ("LoConModule", "conv2", {"use_tucker": True}),
    ("LoConModule", "conv1", {"use_tucker": True}),
    ("LoConModule", "conv3", {"use_tucker": True}),
    ("LohaModule", "linear", {}),
    ("LohaModule", "linear", {"rs_lora": True}),
    ("LohaModule", "conv2", {}),
    ("LohaModule", "conv2", {"use_tucker": True}),
    ("LohaModule", "conv1", {"use_tucker": True}),
    ("LohaModule", "conv3", {"use_tucker": True}),
    ("LokrModule", "linear", {}),
    ("LokrModule", "linear", {"decompose_both": True, "lora_dim": 1}),
    ("LokrModule", "linear", {"factor": 4}),
    ("LokrModule", "linear", {"full_matrix": True}),
    ("LokrModule", "linear", {"rs_lora": True}),
    ("LokrModule", "conv2", {}),
    ("LokrModule", "conv2", {"use_tucker": True}),
    ("LokrModule", "conv2", {"use_tucker": True, "decompose_both": True, "lora_dim": 1}),
    ("LokrModule", "conv2", {"full_matrix": True}),
    ("LokrModule", "conv1", {"use_tucker": True}),
    ("LokrModule", "conv1", {"full_matrix": True}),
    ("LokrModule", "conv3", {"use_tucker": True}),
)


class TestFilesThatTheLibraryMakes:
    """Tensors from `custom_state_dict`, ΔW from what `forward` adds to its input."""

    @staticmethod
    def made(name: str, layer: str, seed: int = 0, **options: Any) -> tuple[Any, Any]:
        """A module of the library, all its weights random, and its base layer; float64."""
        modules = pytest.importorskip("lycoris.modules")
        import torch
        from torch import nn

        torch.manual_seed(seed)
        base = {
            "linear": lambda: nn.Linear(30, 24),
            "conv1": lambda: nn.Conv1d(12, 24, 5),
            "conv2": lambda: nn.Conv2d(12, 24, (3, 2)),
            "conv3": lambda: nn.Conv3d(12, 24, (3, 2, 2)),
        }[layer]()
        options = {"lora_dim": 2, "alpha": 3.0, **options}
        module = getattr(modules, name)(STEM, base, 1.0, **options)
        with torch.no_grad():
            for value in module.parameters():
                value.copy_(0.3 * torch.randn(value.shape))
        return module.double().eval(), base.double()  # float32 numbers in float64

    @staticmethod
    def delta(module: Any, base: Any) -> np.ndarray:
        """What `forward` adds: every basis input through the module, minus the base's output."""
        import torch

        channels, *kernel = base.weight.shape[1:]
        columns = channels * int(np.prod(kernel))
        inputs = torch.eye(columns, dtype=torch.float64)
        if kernel:
            inputs = inputs.reshape(columns, channels, *kernel)
        with torch.no_grad():
            change = module(inputs) - base(inputs)
        return change.reshape(columns, -1).T.numpy()

    @staticmethod
    def tensors(module: Any) -> dict[str, np.ndarray]:
        return {
            name: value.detach().float().numpy()
            for name, value in module.custom_state_dict().items()
        }

    @pytest.mark.parametrize(
        ("name", "layer", "options"), MODULES, ids=lambda value: str(value).replace(" ", "")
    )
    def test_are_read_exactly(
        self, name: str, layer: str, options: Mapping[str, Any], tmp_path: Path
    ) -> None:
        module, base = self.made(name, layer, **options)
        tensors, wanted = self.tensors(module), self.delta(module, base)
        # The library keeps a rescaled alpha (rs_lora) in float32.
        tolerance = 1e-7 if options.get("rs_lora") else 1e-13
        assert np.linalg.norm(wanted) > 0.1
        assert gap(self.ours(tensors), wanted) < tolerance
        file = write(tmp_path / "a.safetensors", {STEM: tensors})
        assert gap(read(file)[STEM], wanted) < tolerance

    @staticmethod
    def ours(tensors: Arrays) -> np.ndarray:
        """The einsum times alpha / r by the rule that `TestScale` tests."""
        b = [tensors[f"lokr_w{k}_b"] for k in (2, 1) if f"lokr_w{k}_b" in tensors]
        b += [tensors[name] for name in ("hada_w1_b", "lora_down.weight") if name in tensors]
        scale = float(tensors["alpha"]) / len(b[0]) if b else 1.0
        return scale * dense({name: x for name, x in tensors.items() if name != "alpha"})

    @pytest.mark.parametrize("name", ["LohaModule", "LokrModule"])
    def test_get_diff_weight_applies_the_scale_twice(self, name: str) -> None:
        """Why the library's own merge is no oracle: alpha / r = 3/2 comes in squared."""
        module, base = self.made(name, "linear")
        twice = module.get_diff_weight()[0].detach().numpy()
        assert gap(twice, 1.5 * self.delta(module, base)) < 1e-7

    @pytest.mark.parametrize("name", ["LoConModule", "LohaModule", "LokrModule"])
    def test_dora_is_recognised(self, name: str, tmp_path: Path) -> None:
        module, _ = self.made(name, "linear", weight_decompose=True)
        tensors = self.tensors(module)
        assert tensors["dora_scale"].shape == (OUT, 1)
        assert_dora(write(tmp_path / "a.safetensors", {STEM: tensors}), STEM, (OUT, 1))


class TestReading:
    @by_kind
    @pytest.mark.parametrize(
        ("dim", "dtype"), [(1, np.float32), (2, np.float32), (3, np.float16), (2, np.float64)]
    )
    def test_dense_is_the_formula(self, kind: Kind, dim: int, dtype: Any, tmp_path: Path) -> None:
        arrays = kind.draw(1, dim, dtype)
        file = write(tmp_path / "a.safetensors", {STEM: arrays}, {STEM: np.float32(0.75)})
        found = read(file)
        assert list(found) == [STEM]
        assert gap(found[STEM], kind.scale(dim, 0.75) * dense(arrays)) < EXACT

    @by_kind
    @pytest.mark.parametrize("dim", [1, 2])
    def test_the_header_alone_says_what_it_is(self, kind: Kind, dim: int, tmp_path: Path) -> None:
        arrays = kind.draw(1, dim)
        file = write(tmp_path / "a.safetensors", {STEM: arrays}, {STEM: np.float32(0.75)})
        found = site(file)
        assert (found.kind, found.layer, found.dialect) == (kind.name, kind.layer, "kohya")
        assert found.shape == dense(arrays).shape
        assert found.kernel == kind.kernel
        assert found.scale == kind.scale(dim, 0.75)
        if kind.scaled:
            assert found.dim == dim and found.alpha == 0.75
        B, A = found.factors()
        assert found.rank == B.shape[1] == A.shape[0] <= kind.rank(dim)
        assert found.rank >= np.linalg.matrix_rank(dense(arrays))
        assert gap(found.scale * (B @ A), found.scale * dense(arrays)) < EXACT

    @by_kind
    def test_several_modules_of_several_kinds_in_one_file(self, kind: Kind, tmp_path: Path) -> None:
        """Each module is parsed for itself: this kind beside a plain pair."""
        plain, alpha = kind_of("LoRA, linear"), np.float32(3)
        modules = {"lora_unet_b": kind.draw(1, 2), "lora_te_a": plain.draw(2, 4)}
        file = write(tmp_path / "a.safetensors", modules, dict.fromkeys(modules, alpha))
        wanted = {
            "lora_unet_b": kind.scale(2, 3.0) * dense(modules["lora_unet_b"]),
            "lora_te_a": 0.75 * dense(modules["lora_te_a"]),
        }
        assert distance(read(file), wanted) < EXACT

    def test_lokr_written_by_the_functional_api_keeps_the_kernel(self, tmp_path: Path) -> None:
        """Its `weight_gen` leaves w2_b of a convolution 4-D: read, or refused, never reordered."""
        rng = np.random.default_rng(1)
        arrays = {
            "lokr_w1": rng.standard_normal((3, 2)),
            "lokr_w2_a": rng.standard_normal((8, 2)),
            "lokr_w2_b": rng.standard_normal((2, 3, 3, 2)),
        }
        file = write(tmp_path / "a.safetensors", {STEM: arrays}, {STEM: np.float32(2)})
        two = np.einsum("or,ri...->oi...", arrays["lokr_w2_a"], arrays["lokr_w2_b"])
        wanted = np.einsum("ac,bdkl->abcdkl", arrays["lokr_w1"], two).reshape(24, -1)
        try:
            found = read(file)[STEM]
        except (FormatError, UnsupportedError) as error:
            assert "lokr_w2_b" in str(error) or "LoKr" in str(error)
        else:
            assert gap(found, wanted) < EXACT


class TestScale:
    """alpha / r with r = w2_b.shape[0], else w1_b.shape[0]; 1 where both factors are full."""

    @by_kind
    @pytest.mark.parametrize(
        "alpha",
        [np.float32(5), np.array([5], np.float32), np.array(5, np.float16), np.array(5, np.int64)],
        ids=["0-d", "[1]", "half", "int64"],
    )
    def test_alpha_in_every_form(self, kind: Kind, alpha: Any, tmp_path: Path) -> None:
        file = write(tmp_path / "a.safetensors", {STEM: kind.draw(1, 2)}, {STEM: alpha})
        assert site(file).scale == kind.scale(2, 5.0)

    @by_kind
    def test_no_alpha_means_one(self, kind: Kind, tmp_path: Path) -> None:
        arrays = kind.draw(1, 2)
        file = write(tmp_path / "a.safetensors", {STEM: arrays})
        found = site(file)
        assert found.scale == 1.0 and (found.scale_from or not kind.scaled)
        assert gap(read(file)[STEM], dense(arrays)) < EXACT

    @pytest.mark.parametrize(
        "title", ["CP/Tucker LoCon, 3 x 3", "LoHa, linear", "LoKr, w2 factored"]
    )
    def test_alpha_zero_is_ambiguous(self, title: str, tmp_path: Path) -> None:
        file = write(
            tmp_path / "a.safetensors", {STEM: kind_of(title).draw(1, 2)}, {STEM: np.float32(0)}
        )
        with pytest.raises(IncompatibleError, match=r"alpha is 0.*--alpha"):
            ao.open_adapter(file)

    def test_alpha_zero_where_no_rank_divides_it(self, tmp_path: Path) -> None:
        """A LoKr of two full factors ignores alpha, whatever it is."""
        kind = kind_of("LoKr, both full")
        arrays = kind.draw(1, 2)
        for alpha in (0.0, 1.0, 1e30):
            file = write(tmp_path / "a.safetensors", {STEM: arrays}, {STEM: np.float32(alpha)})
            assert gap(read(file)[STEM], dense(arrays)) < EXACT

    def test_lokr_of_two_ranks_takes_that_of_w2(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(1)
        shapes = {
            "lokr_w1_a": (3, 2),
            "lokr_w1_b": (2, 5),
            "lokr_w2_a": (8, 4),
            "lokr_w2_b": (4, 6),
        }
        arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        file = write(tmp_path / "a.safetensors", {STEM: arrays}, {STEM: np.float32(6)})
        found = site(file)
        assert (found.dim, found.scale) == (4, 1.5)
        assert gap(read(file)[STEM], 1.5 * dense(arrays)) < EXACT

    @pytest.mark.parametrize("title", ["LoHa, linear", "LoKr, w2 factored", "LoKr, both full"])
    def test_training_options_in_the_header_are_not_taken_twice(
        self, title: str, tmp_path: Path
    ) -> None:
        """ss_network_dim is the trained rank, not the number of columns of the expansion."""
        kind = kind_of(title)
        metadata = {
            "ss_network_dim": "2",
            "ss_network_alpha": "1.0",
            "ss_network_module": "lycoris.kohya",
        }
        arrays = kind.draw(1, 2)
        file = write(tmp_path / "a.safetensors", {STEM: arrays}, {STEM: np.float32(1)}, metadata)
        assert site(file).scale == kind.scale(2, 1.0)
        assert gap(read(file)[STEM], kind.scale(2, 1.0) * dense(arrays)) < EXACT


def two(
    folder: Path, first: Kind, second: Kind, dims: tuple[int, int] = (2, 1), dtype: Any = np.float32
) -> tuple[list[Path], list[np.ndarray]]:
    """Two files over one stem, and the ΔW of each; alphas 3 and 0.75."""
    files, deltas = [], []
    for seed, (kind, dim, alpha) in enumerate(zip((first, second), dims, (3.0, 0.75), strict=True)):
        arrays = kind.draw(seed, dim, dtype)
        files.append(
            write(folder / f"{seed}.safetensors", {STEM: arrays}, {STEM: np.float32(alpha)})
        )
        deltas.append(kind.scale(dim, alpha) * dense(arrays))
    return files, deltas


class TestMerging:
    @by_kind
    @pytest.mark.parametrize("weights", [(0.7, 0.3), (-1.5, 0.4)], ids=str)
    def test_two_of_a_kind(self, kind: Kind, weights: tuple[float, float], tmp_path: Path) -> None:
        files, deltas = two(tmp_path, kind, kind)
        wanted = weights[0] * deltas[0] + weights[1] * deltas[1]
        out = tmp_path / "m.safetensors"
        full = min(wanted.shape)  # lossless whatever the factors' columns add up to
        report = ao.merge(files, weights, out=out, dtype="float32", rank=full)
        assert report.error < 1e-6
        assert gap(read_kohya(out)[STEM], wanted) < 1e-6
        assert gap(read(out)[STEM], wanted) < 1e-6
        merged = site(out)
        assert merged.kind == "lora"
        if kind.kernel:
            assert merged.kernel == kind.kernel

    @by_kind
    def test_the_spelling_of_the_device(self, kind: Kind, tmp_path: Path) -> None:
        """The same arithmetic on torch tensors, which CUDA runs."""
        files, deltas = two(tmp_path, kind, kind)
        out = tmp_path / "m.safetensors"
        ao.merge(
            files, [0.7, 0.3], out=out, dtype="float32", device="torch", rank=min(deltas[0].shape)
        )
        assert gap(read_kohya(out)[STEM], 0.7 * deltas[0] + 0.3 * deltas[1]) < 1e-6

    @by_kind
    @pytest.mark.parametrize("weight", [1.0, 2.0])
    def test_without_a_rank_nothing_is_cut(self, kind: Kind, weight: float, tmp_path: Path) -> None:
        """At its own rank, or refused where that would be larger than ΔW itself (a full LoKr)."""
        arrays = kind.draw(1, 2)
        file = write(tmp_path / "a.safetensors", {STEM: arrays}, {STEM: np.float32(3)})
        out = tmp_path / "m.safetensors"
        wanted = weight * kind.scale(2, 3.0) * dense(arrays)
        try:
            report = ao.merge([file], [weight], out=out, dtype="float32")
        except UsageError as error:
            assert kind.rank(2) * sum(wanted.shape) >= wanted.size
            assert "--rank" in str(error) and not out.exists()
        else:
            assert report.rank <= kind.rank(2)
            assert gap(read(out)[STEM], wanted) < 1e-6
            assert gap(read_kohya(out)[STEM], wanted) < 1e-6

    @pytest.mark.parametrize(
        ("first", "second"),
        list(itertools.permutations(["LoRA, linear", "LoHa, linear", "LoKr, both factored"], 2)),
    )
    def test_of_different_kinds(self, first: str, second: str, tmp_path: Path) -> None:
        files, deltas = two(tmp_path, kind_of(first), kind_of(second))
        out = tmp_path / "m.safetensors"
        ao.merge(files, [0.7, -0.3], out=out, dtype="float32")
        assert gap(read_kohya(out)[STEM], 0.7 * deltas[0] - 0.3 * deltas[1]) < 1e-6

    @pytest.mark.parametrize(
        "first",
        ["LoCon, 3 x 3", "CP/Tucker LoCon, 3 x 3", "LoHa, Tucker 3 x 3", "LoHa, 3 x 3, flattened"],
    )
    @pytest.mark.parametrize("flat_first", [False, True])
    def test_a_flattened_kernel_takes_that_of_the_other_input(
        self, first: str, flat_first: bool, tmp_path: Path
    ) -> None:
        """A LoHa of a 3 x 3 convolution hides its kernel; its columns are in the same order."""
        files, deltas = two(tmp_path, kind_of(first), kind_of("LoHa, 3 x 3, flattened"))
        if flat_first:
            files, deltas = files[::-1], deltas[::-1]
        out = tmp_path / "m.safetensors"
        ao.merge(files, [0.7, -0.3], out=out, dtype="float32")
        assert gap(read_kohya(out)[STEM], 0.7 * deltas[0] - 0.3 * deltas[1]) < 1e-6
        if first != "LoHa, 3 x 3, flattened":
            assert site(out).kernel == (3, 3)

    def test_kernels_that_differ_are_refused(self, tmp_path: Path) -> None:
        """Same number of columns, other meaning: 6 channels of 3 x 2 and of 2 x 3."""
        rng = np.random.default_rng(0)
        files = []
        for name, kernel in (("a", (3, 2)), ("b", (2, 3))):
            arrays = {
                "lora_up.weight": rng.standard_normal((OUT, 2, 1, 1)),
                "lora_down.weight": rng.standard_normal((2, 6, 1, 1)),
                "lora_mid.weight": rng.standard_normal((2, 2, *kernel)),
            }
            files.append(write(tmp_path / f"{name}.safetensors", {STEM: arrays}))
        with pytest.raises(IncompatibleError, match=STEM):
            ao.merge(files, [1, 1], out=tmp_path / "m.safetensors")

    def test_a_flat_module_does_not_hide_that_others_differ(self, tmp_path: Path) -> None:
        """3 x 3 and 9 x 1 have 54 columns each, and so has the LoHa that fits both."""
        flat = {STEM: kind_of("LoHa, 3 x 3, flattened").draw(1, 2)}
        files = [write(tmp_path / "flat.safetensors", flat)]
        for name, kernel in (("square", (3, 3)), ("tall", (9, 1))):
            arrays = kind_of("LoCon, 3 x 3").draw(2, 2)
            arrays["lora_down.weight"] = arrays["lora_down.weight"].reshape(2, 6, *kernel)
            files.append(write(tmp_path / f"{name}.safetensors", {STEM: arrays}))
        for order in itertools.permutations(files):
            with pytest.raises(IncompatibleError, match=rf"{STEM}.*kernel=\[[39], [13]\]"):
                ao.merge(order, [1, 1, 1], out=tmp_path / "m.safetensors")

    def test_a_convolution_that_shows_no_kernel_is_reported(self, tmp_path: Path) -> None:
        """By its name it is one; loaders want a kernel where we can only write a matrix."""
        stem, other = "lora_unet_down_blocks_0_resnets_0_conv1", kind_of("LoCon, 3 x 3")
        arrays = kind_of("LoHa, 3 x 3, flattened").draw(1, 2)
        file = write(tmp_path / "a.safetensors", {stem: arrays, STEM: arrays})
        report = ao.merge([file], [0.5], out=tmp_path / "m.safetensors")
        [warning] = report.warnings
        assert stem in warning and "kernel" in warning and STEM not in warning
        shown = write(tmp_path / "b.safetensors", {stem: other.draw(2, 2)})
        report = ao.merge([file, shown], [0.5, 0.5], out=tmp_path / "n.safetensors")
        assert not report.warnings

    @by_kind
    def test_truncation_is_the_best_and_certified(self, kind: Kind, tmp_path: Path) -> None:
        files, deltas = two(tmp_path, kind, kind)
        wanted = 0.7 * deltas[0] + 0.3 * deltas[1]
        out = tmp_path / "m.safetensors"
        report = ao.merge(files, [0.7, 0.3], out=out, dtype="float32", rank=2)
        values = np.linalg.svd(wanted, compute_uv=False)
        best = float(np.linalg.norm(values[2:]) / np.linalg.norm(values))
        found = gap(read_kohya(out)[STEM], wanted)
        assert found == pytest.approx(best, rel=1e-5, abs=1e-6)
        assert report.error == pytest.approx(found, rel=1e-5, abs=1e-7)

    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_the_type_of_the_input_is_kept(self, dtype: Any, tmp_path: Path) -> None:
        files, _ = two(tmp_path, kind_of("LoHa, linear"), kind_of("LoKr, w2 factored"), dtype=dtype)
        report = ao.merge(files, [0.7, 0.3], out=tmp_path / "m.safetensors")
        assert report.dtype == np.dtype(dtype).name

    def test_arithmetic_is_lazy_and_exact(self, tmp_path: Path) -> None:
        files, deltas = two(tmp_path, kind_of("LoHa, linear"), kind_of("LoKr, both full"))
        a, b = map(ao.open_adapter, files)
        mix = 0.7 * a - b / 4
        assert gap(mix[STEM].dense(), 0.7 * deltas[0] - deltas[1] / 4) < EXACT
        assert mix[STEM].norm() == pytest.approx(
            float(np.linalg.norm(0.7 * deltas[0] - deltas[1] / 4)), rel=1e-12
        )


def bad_gauge(seed: int, rank: int, condition: float) -> tuple[np.ndarray, np.ndarray]:
    """G and its inverse, of this condition number."""
    rng = np.random.default_rng(seed)
    q, p = (np.linalg.qr(rng.standard_normal((rank, rank)))[0] for _ in range(2))
    values = np.geomspace(1.0, 1 / condition, rank) if rank > 1 else np.array([1 / condition])
    return (q * values) @ p.T, (p / values) @ q.T


GAUGES: Mapping[str, tuple[tuple[str, str], ...]] = {
    # title -> pairs (left, right) of suffixes between which an invertible matrix may be put
    "LoRA, linear": (("lora_up.weight", "lora_down.weight"),),
    "LoHa, linear": (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")),
    "LoHa, 3 x 3, flattened": (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")),
    "LoKr, w2 factored": (("lokr_w2_a", "lokr_w2_b"),),
    "LoKr, both factored": (("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b")),
    "CP/Tucker LoCon, 3 x 2": (("lora_up.weight", "lora_mid.weight"),),
    "LoHa, Tucker 3 x 2": (("hada_w1_a", "hada_t1"), ("hada_w2_a", "hada_t2")),
    "LoKr, Tucker 3 x 2": (("lokr_w2_a", "lokr_t2"),),
}


def regauged(arrays: Arrays, pairs: tuple[tuple[str, str], ...], seed: int) -> dict[str, Any]:
    """The same ΔW from other tensors: G and G⁻¹ of condition 1e6 between the pairs."""
    result = dict(arrays)
    for left, right in pairs:
        core = result[right]
        G, inverse = bad_gauge(seed, core.shape[0], 1e6)
        result[right] = np.einsum("pq,q...->p...", inverse, core)
        value = result[left]
        if left.startswith(("hada", "lokr")) and ("_t" in right):
            result[left] = np.einsum("po,pq->qo", value, G)  # stored (dim, out)
        else:
            result[left] = np.einsum("op...,pq->oq...", value, G)
    return result


@pytest.mark.parametrize("title", GAUGES)
class TestGauge:
    """(B, A) and (BG, G⁻¹A) are one adapter: stored in float64, G of condition 1e6."""

    def test_is_the_same_adapter(self, title: str) -> None:
        kind = kind_of(title)
        arrays = kind.draw(3, 3, np.float64)
        other = regauged(arrays, GAUGES[title], 7)
        assert any(np.abs(other[k] - arrays[k]).max() > 1e3 for k in arrays)
        assert gap(dense(other), dense(arrays)) < 1e-9

    @pytest.mark.parametrize("rank", [None, 2])
    @pytest.mark.parametrize("both", [False, True])
    def test_the_merge_does_not_depend_on_it(
        self, title: str, both: bool, rank: int | None, tmp_path: Path
    ) -> None:
        """G between one pair of factors, or one between each pair."""
        kind = kind_of(title)
        arrays = kind.draw(3, 3 if kind.rank(3) < 20 else 2, np.float64)
        other = regauged(arrays, GAUGES[title] if both else GAUGES[title][-1:], 7)
        partner = write(tmp_path / "b.safetensors", {STEM: kind.draw(4, 1)})
        results = []
        for name, tensors in (("a", arrays), ("g", other)):
            file = write(tmp_path / f"{name}.safetensors", {STEM: tensors})
            out = tmp_path / f"{name}-merged.safetensors"
            report = ao.merge([file, partner], [0.7, 0.3], out=out, rank=rank, dtype="float32")
            results.append((read_kohya(out)[STEM], report))
        (plain, first), (gauged, second) = results
        assert gap(gauged, plain) < 1e-6
        assert second.error == pytest.approx(first.error, rel=1e-5, abs=1e-6)
        if rank is None:
            whole = 0.7 * dense(arrays) + 0.3 * dense(kind.draw(4, 1))
            assert gap(gauged, whole) < 1e-6


# (row of the table, suffix -> shape, words of which one must be in the message)
REFUSED: tuple[tuple[str, Mapping[str, tuple[int, ...]], str], ...] = (
    ("OFT", {"oft_blocks": (4, 8, 8)}, "OFT"),
    ("OFT, kohya", {"oft_blocks": (4, 28)}, "OFT"),
    ("BOFT", {"oft_blocks": (2, 4, 8, 8), "rescale": (32, 1)}, "OFT"),
    ("PEFT OFT", {"oft_R.weight": (4, 28)}, "OFT"),
    ("PEFT BOFT", {"boft_R": (2, 4, 8, 8), "boft_s": (32, 1)}, "OFT"),
    (
        "GLoRA",
        {"a1.weight": (8, 4), "a2.weight": (4, 8), "b1.weight": (8, 4), "b2.weight": (4, 8)},
        "GLoRA",
    ),
    ("(IA)³, LyCORIS", {"weight": (8, 1), "on_input": ()}, "IA"),
    ("(IA)³, PEFT", {"ia3_l": (8, 1)}, "IA"),
    ("VeRA", {"vera_lambda_b": (8,), "vera_lambda_d": (4,)}, "VeRA"),
    ("RandLoRA", {"randlora_lambda": (4, 2), "randlora_gamma": (2, 8)}, "RandLoRA"),
    (
        "KaSA",
        {"lora_A.weight": (4, 8), "lora_B.weight": (8, 4), "lora_diag": (4,)},
        "KaSA",
    ),
    ("Control-LoRA", {"down": (4, 8), "up": (8, 4)}, "Control"),
    ("set_weight", {"set_weight": (8, 8)}, "set_weight"),
    (
        "reshape_weight",
        {"reshape_weight": (2,), "lora_down.weight": (4, 8), "lora_up.weight": (8, 4)},
        "reshape_weight",
    ),
    (
        "sparse bias",
        {
            "lora_down.weight": (4, 8),
            "lora_up.weight": (8, 4),
            "bias_indices": (2, 5),
            "bias_values": (5,),
            "bias_size": (2,),
        },
        "sparse|bias_indices",
    ),
)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a plain pair"])
@pytest.mark.parametrize(("kind", "shapes", "says"), REFUSED, ids=lambda value: str(value)[:20])
def test_refused_by_name(
    kind: str, shapes: Mapping[str, tuple[int, ...]], says: str, beside: bool, tmp_path: Path
) -> None:
    prefix = "base_model.model." if kind.startswith(("PEFT", "VeRA", "RandLoRA", "KaSA")) else ""
    prefix = prefix or ("" if kind == "Control-LoRA" else "lora_unet_")
    stem = f"{prefix}blocks.0.q" if prefix.startswith("base") or not prefix else f"{prefix}mid_q"
    modules: dict[str, Arrays] = {
        stem: {suffix: np.ones(shape, np.float32) for suffix, shape in shapes.items()}
    }
    if beside:
        pair = {"lora_A.weight": (2, 6), "lora_B.weight": (7, 2)}
        if prefix == "lora_unet_":
            pair = {"lora_down.weight": (2, 6), "lora_up.weight": (7, 2)}
        modules[f"{prefix}blocks.1.k"] = {
            s: np.ones(shape, np.float32) for s, shape in pair.items()
        }
    file = write(tmp_path / "a.safetensors", modules)
    if prefix.startswith("base"):
        (tmp_path / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2})
        )
    with pytest.raises(UnsupportedError, match=rf"(?i){says}") as caught:
        ao.open_adapter(file)
    assert caught.value.exit_code == 4
    assert str(file) in str(caught.value)


def test_every_alpha_without_factors_is_reported(tmp_path: Path) -> None:
    """But not that of a refused kind, which is there for another reason."""
    pair = {"lora_unet_q": kind_of("LoRA, linear").draw(1, 2)}
    names = ["lora_unet_a.alpha", "lora_unet_b.alpha"]
    orphans = dict.fromkeys(names, np.float32(2))
    file = write(tmp_path / "two.safetensors", pair, **orphans)
    found = [str(problem) for problem in read_adapter(file).problems]
    assert len(found) == 2 and all(name in text for name, text in zip(names, found, strict=True))
    refused = {"lora_unet_b.oft_blocks": np.ones((4, 8, 8), np.float32)}
    file = write(tmp_path / "one.safetensors", pair, **orphans, **refused)
    found = [str(problem) for problem in read_adapter(file).problems]
    assert len(found) == 2 and "OFT" in found[0] and names[0] in found[1]


class TestDoRA:
    """Recognised in every spelling; its ΔW needs the base, so sums refuse it by name."""

    def test_kohya(self, tmp_path: Path) -> None:
        arrays = kind_of("LoRA, linear").draw(1, 2) | {"dora_scale": np.ones((24, 1), np.float32)}
        assert_dora(write(tmp_path / "a.safetensors", {STEM: arrays}), STEM, (24, 1))

    def test_kohya_on_the_input_axis(self, tmp_path: Path) -> None:
        arrays = kind_of("LoHa, linear").draw(1, 2) | {"dora_scale": np.ones((1, 30), np.float32)}
        assert_dora(write(tmp_path / "a.safetensors", {STEM: arrays}), STEM, (1, 30))

    @pytest.mark.parametrize("suffix", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
    @pytest.mark.parametrize("said", [True, False])
    def test_peft(self, suffix: str, said: bool, tmp_path: Path) -> None:
        folder = tmp_path / "a"
        folder.mkdir()
        stem = "base_model.model.layers.0.q_proj"
        arrays = {
            "lora_A.weight": np.ones((2, 6), np.float32),
            "lora_B.weight": np.ones((8, 2), np.float32),
            suffix: np.ones(8, np.float32),
        }
        write(folder / "adapter_model.safetensors", {stem: arrays})
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": said}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        assert_dora(folder, "layers.0.q_proj", (8,))

    def test_one_module_of_many_is_enough(self, tmp_path: Path) -> None:
        kind = kind_of("LoRA, linear")
        modules = {f"lora_unet_{n}": kind.draw(n, 2) for n in range(3)}
        modules["lora_unet_1"]["dora_scale"] = np.ones((24, 1), np.float32)
        file = write(tmp_path / "a.safetensors", modules)
        kinds = [s.kind for _, s in sorted(read_adapter(file).sites.items())]
        assert kinds == ["lora", "dora", "lora"]
        with pytest.raises(UnsupportedError, match="DoRA"):
            ao.open_adapter(file)


@pytest.mark.parametrize("core", [False, True])
def test_grouped_convolutions_are_refused(core: bool, tmp_path: Path) -> None:
    """A has all in-channels' rank, B a group's share: no single low-rank delta."""
    arrays = {
        "lora_down.weight": np.ones((8, 4, 3, 3), np.float32),
        "lora_up.weight": np.ones((12, 2, 1, 1), np.float32),
    }
    if core:
        arrays["lora_down.weight"] = np.ones((8, 4, 1, 1), np.float32)
        arrays["lora_mid.weight"] = np.ones((8, 8, 3, 3), np.float32)
    file = write(tmp_path / "a.safetensors", {STEM: arrays}, {STEM: np.float32(8)})
    with pytest.raises((UnsupportedError, FormatError), match=STEM):
        ao.open_adapter(file)


# Tensors that do not go together: (what is wrong, title, suffix -> another shape or None: missing)
BROKEN = (
    ("w1_b is missing", "LoHa, linear", {"hada_w1_b": None}),
    ("w2_a is missing", "LoHa, linear", {"hada_w2_a": None}),
    ("halves of two shapes", "LoHa, linear", {"hada_w2_b": (2, 31)}),
    ("ranks that differ", "LoHa, linear", {"hada_w1_b": (3, 30)}),
    ("one core of two", "LoHa, Tucker 3 x 3", {"hada_t2": None}),
    ("cores of two kernels", "LoHa, Tucker 3 x 3", {"hada_t2": (2, 2, 3, 1)}),
    ("a core of another rank", "LoHa, Tucker 3 x 3", {"hada_t1": (3, 3, 3, 3)}),
    ("w1 is missing", "LoKr, w2 factored", {"lokr_w1": None}),
    ("w2_b is missing", "LoKr, w2 factored", {"lokr_w2_b": None}),
    ("w2 twice", "LoKr, w2 factored", {"lokr_w2": (8, 6)}),
    ("w1 twice", "LoKr, w1 factored", {"lokr_w1": (3, 5)}),
    ("a core without factors", "LoKr, both full", {"lokr_t2": (2, 2, 3, 3)}),
    ("a core of another rank", "LoKr, Tucker 3 x 2", {"lokr_t2": (3, 2, 3, 2)}),
    ("up is missing", "CP/Tucker LoCon, 3 x 3", {"lora_up.weight": None}),
    ("mid of another rank", "CP/Tucker LoCon, 3 x 3", {"lora_mid.weight": (3, 3, 3, 3)}),
    ("a core and a wide down", "CP/Tucker LoCon, 3 x 3", {"lora_down.weight": (2, 6, 3, 3)}),
    ("two kinds at once", "LoRA, linear", {"hada_w1_a": (24, 2), "hada_w1_b": (2, 30)}),
)


@pytest.mark.parametrize(("what", "title", "changes"), BROKEN, ids=lambda value: str(value)[:40])
def test_tensors_that_do_not_go_together(
    what: str, title: str, changes: Mapping[str, tuple[int, ...] | None], tmp_path: Path
) -> None:
    arrays = dict(kind_of(title).draw(1, 2))
    for suffix, shape in changes.items():
        if shape is None:
            del arrays[suffix]
        else:
            arrays[suffix] = np.ones(shape, np.float32)
    file = write(tmp_path / "a.safetensors", {STEM: arrays}, {STEM: np.float32(2)})
    with pytest.raises((FormatError, UnsupportedError), match=STEM):
        ao.open_adapter(file)


def test_nan_is_found_in_every_tensor(tmp_path: Path) -> None:
    for title in ("LoHa, Tucker 3 x 3", "LoKr, both full", "CP/Tucker LoCon, 3 x 3"):
        kind = kind_of(title)
        for suffix in kind.shapes(2):
            arrays = kind.draw(1, 2)
            arrays[suffix].reshape(-1)[1] = np.nan
            file = write(tmp_path / "a.safetensors", {STEM: arrays}, {STEM: np.float32(2)})
            with pytest.raises(NumericsError, match=STEM):
                ao.merge([file], [2.0], out=tmp_path / "m.safetensors", rank=OUT)


def test_two_files_of_all_kinds_at_once(tmp_path: Path) -> None:
    """Every kind on its own stem in one file, merged in one go."""
    files, sums = [], []
    for seed in (1, 2):
        modules, wanted = {}, {}
        for index, kind in enumerate(KINDS):
            stem = f"lora_unet_m_{index}"
            modules[stem] = kind.draw(seed, seed)
            wanted[stem] = kind.scale(seed, 3.0) * dense(modules[stem])
        alphas = dict.fromkeys(modules, np.float32(3))
        files.append(write(tmp_path / f"{seed}.safetensors", modules, alphas))
        sums.append(wanted)
        assert distance(read(files[-1]), wanted) < EXACT
    out = tmp_path / "m.safetensors"
    ao.merge(files, [0.7, -0.3], out=out, dtype="float32", rank=OUT)
    assert distance(read_kohya(out), weighted((0.7, sums[0]), (-0.3, sums[1]))) < 1e-6


def test_a_copy_of_a_loha_is_not_written_as_a_matrix(tmp_path: Path) -> None:
    """It is copied byte for byte."""
    arrays = kind_of("LoHa, 3 x 3, flattened").draw(1, 2)
    file = write(tmp_path / "a.safetensors", {"lora_unet_down_blocks_0_resnets_0_conv1": arrays})
    report = ao.merge([file], out=tmp_path / "m.safetensors")
    assert {module.route for module in report.modules.values()} == {"copy"}
    assert not report.warnings
