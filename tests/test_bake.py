"""bake as a library: every tensor of the result against an oracle, the report against numpy.

The oracle of `exact` is rational arithmetic, elsewhere a dense sum in float64 rounded once.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import adapterops as ao
from adapterops import casts
from adapterops.baking import measuring, run, writing
from adapterops.baking import model as baking_model
from adapterops.basemodel import open_model
from adapterops.errors import (
    BudgetError,
    ChangedError,
    FileError,
    IncompatibleError,
    NumericsError,
    OutputExistsError,
    UnsupportedError,
    UsageError,
)
from adapterops.files import resumable
from adapterops.rounding.grid import neighbours
from adapterops.verbs.bake import bake
from adapterops.verbs.unbake import unbake
from tests import bake_models, changes, checkpoints, ldm_checkpoints
from tests import test_bake_names as names
from tests import test_bake_values as values
from tests.bake_models import CONFIG, LAYOUTS, differing, expected, factors, stored, weights
from tests.support import dense, pairs, weighted, write_kohya, write_peft

TYPES = ("F16", "BF16", "F32")
ROUNDS = ("exact", "nearest", "stochastic", "compensated")
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def model(folder: Path, dtype: str = "BF16", layout: str = "folder", **options: Any) -> Path:
    return bake_models.model(folder, weights(), dtype, layout, **options)


def adapter(folder: Path, seed: int = 1, size: float = 0.02, **options: Any) -> Path:
    return write_peft(folder, factors(seed, size), **options)


def single(folder: Path, W: np.ndarray, dtype: str = "BF16", name: str = Q) -> Path:
    """A base of one matrix."""
    return bake_models.model(folder, {f"{name}.weight": W}, dtype)


def baked(folder: Path, name: str = Q) -> np.ndarray:
    """The values of one matrix of a result."""
    return stored(folder)[f"{name}.weight"].values


def files(path: Path) -> list[Path]:
    """The files of weights of a base or result, by name."""
    folder = path if path.is_dir() else path.parent
    return (
        [path]
        if path.suffix == ".safetensors" and path.is_file()
        else sorted(folder.rglob("*.safetensors"))
    )


def nothing_but(folder: Path, *names: str) -> None:
    """A folder holds these alone: nothing hidden, nothing half-written."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


class TestEveryTensor:
    """Bytes of all tensors: those changed against the oracle, the others against the base."""

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", TYPES)
    def test_of_every_layout(self, layout: str, dtype: str, tmp_path: Path) -> None:
        base = model(tmp_path / "m", dtype, layout)
        report = bake(base, adapter(tmp_path / "a", alpha=5.6), out=tmp_path / "o.safetensors")
        wanted = expected(base, dense(factors(1), 1.4))
        out = tmp_path / "o.safetensors"
        assert differing(stored(out), wanted) == []
        assert out.is_dir() == (layout != "file")
        assert report.modules == 6 and len(report.tensors) == 6
        assert report.size == sum(f.stat().st_size for f in files(out))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_headers_of_the_same_layout_are_the_base_s(self, layout: str, tmp_path: Path) -> None:
        base = model(tmp_path / "m", "F16", layout)
        bake(base, adapter(tmp_path / "a"), out=tmp_path / "o")
        ours, theirs = files(tmp_path / "o"), files(base)
        if layout == "file":
            ours = [tmp_path / "o.safetensors"]
        assert len(ours) == len(theirs) == (1 if layout in ("file", "folder") else 3)
        for mine, other in zip(ours, theirs, strict=True):
            assert bake_models.head(mine) == bake_models.head(other)
            assert layout == "file" or mine.name == other.name

    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize("scales", [(1.0,), (0.7, -1.4)], ids=["one", "two"])
    def test_rational_arithmetic(
        self, dtype: str, scales: tuple[float, ...], tmp_path: Path
    ) -> None:
        """Of small integers half of the sums are ties; 0.7 is a fraction of 2⁻⁵³."""
        g = np.random.default_rng(3)
        W = g.integers(1 << 7, 1 << 8, (70, 60)) * 2.0**-12
        half = 2.0**-16 if dtype == "F16" else 2.0**-13
        W[:35] = 0.02 * g.standard_normal((35, 60))
        terms = []
        for k, scale in enumerate(scales):
            B = (g.integers(-3, 4, (70, 3)) * half).astype("f4")
            A = g.integers(-3, 4, (3, 60)).astype("f4")
            A[:, :20] = g.standard_normal((3, 20))
            write_peft(tmp_path / f"a{k}", {Q: (B, A)}, alpha=3 * scale)
            terms.append((3 * scale / 3, B, A))
        base = single(tmp_path / "m", W, dtype)
        paths = [tmp_path / f"a{k}" for k in range(len(scales))]
        counts = bake(base, paths, out=tmp_path / "o").counts
        stored_W = torch.from_numpy(baked(base)).to(changes.TORCH[dtype])
        wanted = changes.rounded(*changes.exact_sums(stored_W, terms), dtype)
        np.testing.assert_array_equal(baked(tmp_path / "o"), wanted)
        assert counts.single + counts.double + counts.exact == W.size and not counts.plain
        assert counts.exact > (100 if dtype != "F32" and scales == (1.0,) else -1)

    def test_a_float16_adapter_and_a_tiny_change(self, tmp_path: Path) -> None:
        found = {n: (B.astype("f2"), A.astype("f2")) for n, (B, A) in factors(1, 2e-4).items()}
        base = model(tmp_path / "m", "F16")
        bake(base, write_peft(tmp_path / "a", found), out=tmp_path / "o")
        assert differing(stored(tmp_path / "o"), expected(base, dense(found))) == []

    def test_zeros_keep_the_weight_s_sign(self, tmp_path: Path) -> None:
        W = np.array([[0.0, -0.0, 0.5, -0.5]])
        A = np.array([[0.0, 0.0, -0.5, 0.5]], "f4")
        for dtype in TYPES:
            base = single(tmp_path / dtype, W, dtype)
            one = write_peft(tmp_path / f"a{dtype}", {Q: (np.ones((1, 1), "f4"), A)})
            for mode in ("exact", "stochastic"):
                bake(base, one, out=tmp_path / "o", round=mode)
                signs = np.signbit(baked(tmp_path / "o"))
                assert signs.tolist() == [[False, True, False, True]], (dtype, mode)
                shutil.rmtree(tmp_path / "o")


class TestRounding:
    """--round and --dtype."""

    def test_nearest_is_one_rounding_of_float32_arithmetic(self, tmp_path: Path) -> None:
        """Off by at most float32's own error beyond half a unit of the last place."""
        for dtype in TYPES:
            base = model(tmp_path / dtype, dtype)
            bake(base, adapter(tmp_path / "a"), out=tmp_path / "o", round="nearest")
            found, wanted = stored(tmp_path / "o"), expected(base, dense(factors(1)))
            wrong = differing(found, wanted)
            assert {name.removesuffix(".weight") for name in wrong} <= factors(1).keys()
            for name in wrong:
                W = stored(base)[name].values
                T = W + dense(factors(1))[name.removesuffix(".weight")]
                other = found[name].values != wanted[name].values
                assert other.mean() < (0.5 if dtype == "F32" else 0.01)
                far = np.abs(found[name].values - T) - np.abs(wanted[name].values - T)
                assert far.max() < 8 * 2.0**-24 * 0.2
            shutil.rmtree(tmp_path / "o")

    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize("mode", ["stochastic", "compensated"])
    def test_both_neighbours_and_nothing_else(self, mode: str, dtype: str, tmp_path: Path) -> None:
        base = model(tmp_path / "m", dtype)
        bake(base, adapter(tmp_path / "a", size=3e-3), out=tmp_path / "o", round=mode)
        found, exact = stored(tmp_path / "o"), dense(factors(1, 3e-3))
        plain = expected(base, exact)
        wrong = differing(found, plain)
        assert {name.removesuffix(".weight") for name in wrong} <= exact.keys()
        moved = 0
        for name, delta in exact.items():
            T = torch.from_numpy(stored(base)[f"{name}.weight"].values + delta)
            low, high = (x.double().numpy() for x in neighbours(T, changes.TORCH[dtype]))
            values = found[f"{name}.weight"].values
            assert ((values == low) | (values == high)).all()
            moved += int((values != plain[f"{name}.weight"].values).sum())
        assert moved > 20

    def test_the_seed_chooses(self, tmp_path: Path) -> None:
        base, one = model(tmp_path / "m"), adapter(tmp_path / "a")
        for name, seed in (("o", 7), ("same", 7), ("other", 8)):
            bake(base, one, out=tmp_path / name, round="stochastic", seed=seed)
        assert differing(stored(tmp_path / "o"), stored(tmp_path / "same")) == []
        assert len(differing(stored(tmp_path / "o"), stored(tmp_path / "other"))) == 6

    def test_the_seed_of_other_modes_is_not_looked_at(self, tmp_path: Path) -> None:
        base, one = model(tmp_path / "m"), adapter(tmp_path / "a")
        bake(base, one, out=tmp_path / "o", seed=1)
        bake(base, one, out=tmp_path / "p", seed=2)
        assert bytes_of(tmp_path / "o") == bytes_of(tmp_path / "p", "p", "o")

    def test_stochastic_is_right_on_average(self, tmp_path: Path) -> None:
        base, one = single(tmp_path / "m", np.full((64, 48), 1.0)), tmp_path / "a"
        write_peft(one, {Q: (np.full((64, 1), 2.0**-10, "f4"), np.ones((1, 48), "f4"))})
        reports = [
            bake(base, one, out=tmp_path / f"o{k}", round="stochastic", seed=k) for k in range(8)
        ]
        gains = [report.total.gain for report in reports]
        assert abs(np.mean(gains) - 1) < 5 * np.sqrt(7 / 8 * 8 / (8 * 64 * 48))
        assert bake(base, one, out=tmp_path / "o").total.gain == 0

    @pytest.mark.parametrize("scoped", [True, False], ids=["context", "default"])
    @pytest.mark.parametrize("mode", ROUNDS)
    def test_the_users_default_device_does_not_matter(
        self, mode: str, scoped: bool, tmp_path: Path
    ) -> None:
        base, one = model(tmp_path / "m"), adapter(tmp_path / "a")
        options: dict[str, Any] = {"round": mode, "jobs": 2}
        bake(base, one, out=tmp_path / "plain", **options)
        try:
            with torch.device("meta") if scoped else contextlib.nullcontext():
                if not scoped:
                    torch.set_default_device("meta")
                bake(base, one, out=tmp_path / "o", reversible=True, **options)
                unbake(tmp_path / "o", out=tmp_path / "back")
                assert torch.empty(1).is_meta
        finally:
            torch.set_default_device(None)
        assert stored(tmp_path / "o") == stored(tmp_path / "plain")
        assert stored(tmp_path / "back") == stored(base)

    def test_compensated_keeps_what_nearest_loses(self, tmp_path: Path) -> None:
        """In a matrix of (out, in), and in an embedding, where inputs run along rows."""
        rng = np.random.default_rng(1)
        tensors = {f"{UP}.weight": 0.02 * rng.standard_normal((96, 256))}
        tensors["model.embed_tokens.weight"] = 0.02 * rng.standard_normal((256, 96))
        base = bake_models.model(tmp_path / "m", tensors)
        B, A = pairs(2, {UP: (96, 256)}, 4)[UP]
        E = {"lora_embedding_A": A, "lora_embedding_B": 1e-4 * B}
        extra = {f"base_model.model.model.embed_tokens.{n}": v for n, v in E.items()}
        one = write_peft(
            tmp_path / "a",
            {UP: (1e-4 * B, A)},
            extras={name: value.astype("f4") for name, value in extra.items()},
            target_modules=["up_proj", "embed_tokens"],
        )
        reports = {mode: bake(base, one, out=tmp_path / mode, round=mode) for mode in ROUNDS}
        for name in (f"{UP}.weight", "model.embed_tokens.weight"):
            errors = {mode: r.tensors[name].subspace_error for mode, r in reports.items()}
            assert errors["compensated"] < 0.3 * errors["exact"], name
        assert reports["compensated"].total.gain == pytest.approx(1, abs=0.02)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("own", TYPES)
    def test_all_floats_in_another_type(self, own: str, dtype: str, tmp_path: Path) -> None:
        base = model(tmp_path / "m", own, "shards")
        report = bake(base, adapter(tmp_path / "a"), out=tmp_path / "o", dtype=dtype)
        wanted = expected(base, dense(factors(1)), casts.DTYPE_NAMES[dtype])
        assert differing(stored(tmp_path / "o"), wanted) == []
        config = json.loads((tmp_path / "o" / "config.json").read_text())
        assert config["torch_dtype"] == dtype and report.dtype == dtype
        assert {item.dtype for item in report.tensors.values()} == {dtype}

    @pytest.mark.parametrize("mode", ROUNDS)
    def test_any_mode_in_another_type(self, mode: str, tmp_path: Path) -> None:
        base, one = model(tmp_path / "m", "F32"), adapter(tmp_path / "a")
        bake(base, one, out=tmp_path / "o", dtype="fp16", round=mode)
        found, wanted = stored(tmp_path / "o"), expected(base, dense(factors(1)), "F16")
        for name, tensor in found.items():
            if name.removesuffix(".weight") not in factors(1):
                assert tensor == wanted[name]
            else:
                gap = np.abs(tensor.values - wanted[name].values)
                assert (gap <= np.spacing(np.abs(wanted[name].values).astype("f2"))).all()

    def test_a_float64_base(self, tmp_path: Path) -> None:
        """What nothing changes may be of any type; adding to it is refused by name."""
        tensors = {f"{Q}.weight": np.zeros((24, 24), np.float32), "model.scales": np.full(5, 0.1)}
        base = bake_models.model(tmp_path / "m", tensors, "F64")
        one = write_peft(tmp_path / "a", {Q: factors(1)[Q]})
        for dtype, kind in (("keep", "F64"), ("float16", "F16")):
            bake(base, one, out=tmp_path / kind, dtype=dtype)
            wanted = expected(base, dense({Q: factors(1)[Q]}), None if kind == "F64" else kind)
            assert differing(stored(tmp_path / kind), wanted) == []
        wide = single(tmp_path / "w", np.ones((24, 24)), "F64")
        with pytest.raises(UnsupportedError, match="is of type F64"):
            bake(wide, one, out=tmp_path / "o")


def bytes_of(folder: Path, *renamed: str) -> dict[str, bytes]:
    """Every file of a result by its path; the sidecar says the output's name, which may differ."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if renamed and path.name == "adapterops.json":
                data = data.replace(*(f'"output": "{name}"'.encode() for name in renamed))
            found[path.relative_to(folder).as_posix()] = data
    return found


class TestSums:
    """Several adapters, weights, modules."""

    def test_several_are_summed_and_rounded_once(self, tmp_path: Path) -> None:
        found = [factors(seed, 3e-3) for seed in (1, 2, 3)]
        paths = [write_peft(tmp_path / f"a{k}", f, alpha=6.0) for k, f in enumerate(found)]
        factor, base = (0.7, -0.45, 1.3), model(tmp_path / "m")
        bake(base, paths, factor, out=tmp_path / "o")
        total = weighted(*((w, dense(f, 1.5)) for w, f in zip(factor, found, strict=True)))
        wanted = expected(base, total)
        assert differing(stored(tmp_path / "o"), wanted) == []
        last = base
        for k, (path, weight) in enumerate(zip(paths, factor, strict=True)):
            bake(last, path, [weight], out=tmp_path / f"step{k}")
            last = tmp_path / f"step{k}"
        assert len(differing(stored(last), wanted)) == 6

    def test_adapters_of_some_modules_each(self, tmp_path: Path) -> None:
        one, other = factors(1), factors(2)
        kept = {name: one[name] for name in list(one)[:2]}
        rest = {name: other[name] for name in list(other)[1:4]}
        paths = [write_peft(tmp_path / "a", kept), write_peft(tmp_path / "b", rest)]
        base = model(tmp_path / "m", "F16")
        report = bake(base, paths, [0.5, 2.0], out=tmp_path / "o")
        wanted = expected(base, weighted((0.5, dense(kept)), (2.0, dense(rest))))
        assert differing(stored(tmp_path / "o"), wanted) == []
        assert report.modules == 4
        assert report.tensors[f"{list(one)[1]}.weight"].modules == (list(one)[1],)

    def test_an_adapter_of_weight_zero_need_not_fit(self, tmp_path: Path) -> None:
        base, one = model(tmp_path / "m"), adapter(tmp_path / "a")
        other = write_peft(tmp_path / "b", pairs(1, {"elsewhere.q_proj": (9, 9)}, 2))
        bake(base, [other, one], [0, 1], out=tmp_path / "o")
        assert differing(stored(tmp_path / "o"), expected(base, dense(factors(1)))) == []
        with pytest.raises(NumericsError, match="every weight is zero"):
            bake(base, [one, one], [0.0, -0.0], out=tmp_path / "p")
        nothing_but(tmp_path, "a", "b", "m", "o")

    def test_adapters_that_are_open_already(self, tmp_path: Path) -> None:
        base = model(tmp_path / "m")
        adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)
        mix = 0.7 * ao.open_adapter(tmp_path / "a") - 0.2 * ao.open_adapter(tmp_path / "b")
        report = bake(base, [mix, tmp_path / "a"], [0.5, 1], out=tmp_path / "o")
        paths = [str(tmp_path / name) for name in "aba"]
        terms = list(zip(paths, (0.5 * 0.7, -0.5 * 0.2, 1.0), strict=True))
        assert report.adapters == tuple(terms)
        total = weighted(*((w, dense(factors(1 if p.endswith("a") else 2))) for p, w in terms))
        assert differing(stored(tmp_path / "o"), expected(base, total)) == []

    def test_modules_by_a_pattern(self, tmp_path: Path) -> None:
        base = model(tmp_path / "m")
        report = bake(base, adapter(tmp_path / "a"), out=tmp_path / "o", modules=r".*\.1\..*proj")
        deltas = {n: d for n, d in dense(factors(1)).items() if ".1." in n}
        assert differing(stored(tmp_path / "o"), expected(base, deltas)) == []
        assert (report.modules, report.left_out) == (3, 3)

    def test_alpha_of_files_without_a_scale(self, tmp_path: Path) -> None:
        base, one = model(tmp_path / "m"), write_kohya(tmp_path / "k.safetensors", factors(1))
        one = write_peft(tmp_path / "a", factors(1))
        config = json.loads((one / "adapter_config.json").read_text())
        del config["lora_alpha"], config["r"]
        (one / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(IncompatibleError, match="--alpha"):
            bake(base, one, out=tmp_path / "o")
        bake(base, one, out=tmp_path / "o", alpha=6.0)
        assert differing(stored(tmp_path / "o"), expected(base, dense(factors(1), 1.5))) == []


class TestSameBytes:
    """What must not matter does not."""

    ROWS, COLUMNS = 600, 136

    @pytest.fixture
    def larger(self, tmp_path: Path) -> tuple[Path, Path]:
        sizes = {"rows": self.ROWS, "columns": self.COLUMNS, "layers": 1}
        base = bake_models.model(tmp_path / "m", weights(**sizes), "BF16", "shards")
        return base, write_peft(tmp_path / "a", factors(1, 2e-3, 8, **sizes), alpha=11.2)

    @pytest.mark.parametrize("mode", ROUNDS)
    def test_threads_and_memory(
        self, mode: str, larger: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
    ) -> None:
        """The report is the same too: blocks do not depend on either."""
        monkeypatch.setattr(writing, "make", partial(run.make, size=20_000))
        kept = None
        for number, (jobs, memory) in enumerate(
            ((1, "1GB"), (2, "1GB"), (2, "20MB"), (3, "40MB"), (1, 1))
        ):
            bake(*larger, out=tmp_path / f"o{number}", round=mode, jobs=jobs, memory=memory)
            found = bytes_of(tmp_path / f"o{number}", f"o{number}", "o")
            kept = kept or found
            assert found == kept, (jobs, memory)

    @pytest.mark.parametrize("mode", ["exact", "stochastic", "compensated"])
    @pytest.mark.parametrize("dtype", ["keep", "float32"])
    def test_blocks(
        self, mode: str, dtype: str, larger: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
    ) -> None:
        kept, shares = None, []
        cuts = ((8 << 20, 1 << 18), (9_000, 3_000), (70_000, 5_000))
        for number, (size, tile) in enumerate(cuts):
            monkeypatch.setattr(writing, "make", partial(run.make, size=size))
            monkeypatch.setattr(measuring, "_TILE", tile)
            report = bake(*larger, out=tmp_path / f"o{number}", round=mode, dtype=dtype)
            found = stored(tmp_path / f"o{number}")
            kept = kept or found
            assert differing(found, kept) == []
            shares.append([report.total.gain, report.total.subspace_error, report.total.changed])
        np.testing.assert_allclose(shares[1:], [shares[0]] * 2, rtol=1e-5)

    @pytest.mark.parametrize("mode", ROUNDS)
    def test_shards(self, mode: str, tmp_path: Path) -> None:
        found = []
        one = adapter(tmp_path / "a")
        for layout in LAYOUTS:
            base = model(tmp_path / layout, "F16", layout)
            bake(base, one, out=tmp_path / f"o{layout}.safetensors", round=mode)
            found.append(stored(tmp_path / f"o{layout}.safetensors"))
        assert all(differing(each, found[0]) == [] for each in found[1:])

    @pytest.mark.parametrize("mode", ["exact", "stochastic"])
    def test_the_gauge_of_the_adapter(self, mode: str, tmp_path: Path) -> None:
        """Columns in another order, and multiplied by powers of two, are the same real numbers."""
        base, found = model(tmp_path / "m"), factors(1, 3e-3)
        scales = np.array([2.0**-12, 2.0**9, -1.0, 2.0], "f4")
        order = [2, 0, 3, 1]
        other = {
            n: (np.ascontiguousarray((B * scales)[:, order]), (A / scales[:, None])[order])
            for n, (B, A) in found.items()
        }
        for name, each in (("one", found), ("other", other)):
            path = write_peft(tmp_path / f"a{name}", each, alpha=5.6)
            bake(base, path, out=tmp_path / name, round=mode, seed=3)
        assert differing(stored(tmp_path / "one"), stored(tmp_path / "other")) == []

    @pytest.mark.parametrize("power", [-600, 600])
    def test_a_gauge_at_the_ends_of_float64(self, power: int, tmp_path: Path) -> None:
        base, found = model(tmp_path / "m"), factors(1, 3e-3)
        other = {
            name: (np.ldexp(B, power, dtype="f8"), np.ldexp(A, -power, dtype="f8"))
            for name, (B, A) in found.items()
        }
        bake(base, write_peft(tmp_path / "a", other), out=tmp_path / "o")
        assert differing(stored(tmp_path / "o"), expected(base, dense(found))) == []

    def test_the_order_of_adapters(self, tmp_path: Path) -> None:
        base = model(tmp_path / "m")
        paths = [adapter(tmp_path / f"a{k}", k, 3e-3) for k in range(3)]
        bake(base, paths, [0.7, -0.3, 1.1], out=tmp_path / "o")
        bake(base, paths[::-1], [1.1, -0.3, 0.7], out=tmp_path / "p")
        assert differing(stored(tmp_path / "o"), stored(tmp_path / "p")) == []

    def test_a_clone_that_is_patched(self, tmp_path: Path, monkeypatch: Any) -> None:
        """Where the file system shares blocks; here a plain copy stands in for the clone."""
        base, one = model(tmp_path / "m", layout="shards"), adapter(tmp_path / "a")

        def cloned(source: Any, path: Path) -> bool:
            shutil.copy(source.path, path)
            return True

        bake(base, one, out=tmp_path / "o")
        monkeypatch.setattr(writing, "_cloned", cloned)
        bake(base, one, out=tmp_path / "p")
        assert bytes_of(tmp_path / "p", "p", "o") == bytes_of(tmp_path / "o")


def ulp(x: np.ndarray, dtype: str) -> np.ndarray:
    mantissa, least, _ = changes.FORMS[dtype]
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 1e-300))), least)
    return 2.0 ** (exponent - mantissa)


def truth(
    W: np.ndarray, T: np.ndarray, D: np.ndarray, A: np.ndarray, dtype: str
) -> dict[str, float]:
    """The figures of one tensor in float64: W before, T after, A what the adapters read."""
    E = T - W - D
    Q = np.linalg.qr(A.T)[0]
    norm = np.linalg.norm(D)
    ulps = (np.abs(E) / ulp(np.maximum(np.abs(W), np.abs(T)), dtype))[::64]
    return {
        "norm": norm,
        "gain": float(((T - W) * D).sum() / norm**2),
        "subspace_error": np.linalg.norm(E @ Q) / norm,
        "error": np.linalg.norm(E) / norm,
        "swallowed": float((T == W).mean()),
        "changed": float((T != W).mean()),
        "bias": float(E.mean()),
        "bias_z": float(E.sum() / np.linalg.norm(E)),
        "ulp_mean": float(ulps.mean()),
        "ulp_max": float(ulps.max()),
    }


class TestReport:
    @pytest.mark.parametrize("mode", ROUNDS)
    @pytest.mark.parametrize(
        ("own", "dtype"),
        [(t, "keep") for t in TYPES] + [("F32", "bfloat16"), ("F16", "bfloat16"), ("F32", "fp16")],
    )
    def test_figures_are_those_of_numpy(
        self, own: str, dtype: str, mode: str, tmp_path: Path
    ) -> None:
        rng = np.random.default_rng(6)
        W = 0.02 * rng.standard_normal((130, 70))
        base = single(tmp_path / "m", W, own)
        found = {n: pairs(k, {Q: (130, 70)}, 4)[Q] for k, n in enumerate("ab")}
        D = np.zeros_like(W)
        for name, weight in (("a", 0.02), ("b", -0.01)):
            write_peft(tmp_path / name, {Q: found[name]})
            D += weight * (found[name][0].astype(float) @ found[name][1])
        report = bake(
            base,
            [tmp_path / "a", tmp_path / "b"],
            [0.02, -0.01],
            out=tmp_path / "o",
            round=mode,
            dtype=dtype,
        )
        written = stored(tmp_path / "o")[f"{Q}.weight"]
        A = np.concatenate([found[name][1] for name in "ab"]).astype(float)
        wanted = truth(baked(base), written.values, D, A, written.dtype)
        item = report.tensors[f"{Q}.weight"]
        for name, value in wanted.items():
            size = {"bias": wanted["error"] * wanted["norm"] / W.size, "bias_z": 1.0}.get(name, 0)
            assert getattr(item, name) == pytest.approx(value, rel=6e-4, abs=1e-3 * size), name
        total = report.total
        assert total.elements == item.elements == W.size
        for name in ("norm", "gain", "subspace_error", "error", "swallowed", "changed", "bias_z"):
            assert getattr(total, name) == getattr(item, name)
        assert item.counts == report.counts
        assert sum((item.counts.single, item.counts.double, item.counts.exact)) == W.size
        assert item.modules == (Q,) and item.dtype == casts.format_name(written.dtype)

    def test_totals_are_weighted_by_energy(self, tmp_path: Path) -> None:
        base = model(tmp_path / "m")
        found = factors(1, 2e-3)
        for k, name in enumerate(found):
            found[name] = (found[name][0] * np.float32(4.0**-k), found[name][1])
        report = bake(base, write_peft(tmp_path / "a", found), out=tmp_path / "o")
        items = report.tensors.values()
        energy = sum(item.norm**2 for item in items)
        for name, power in (("gain", 1), ("subspace_error", 2), ("error", 2)):
            mean = sum(getattr(item, name) ** power * item.norm**2 for item in items) / energy
            assert getattr(report.total, name) == pytest.approx(mean ** (1 / power), rel=1e-9)
        assert report.total.norm == pytest.approx(energy**0.5, rel=1e-12)
        assert report.total.elements == sum(item.elements for item in items)
        worst = [item.subspace_error for item in items]
        assert worst == sorted(worst, reverse=True) and worst[0] > 2 * worst[-1]

    def test_new_subnormals(self, tmp_path: Path) -> None:
        least = 2.0**-14
        W = np.array([[least, -least, least / 2, 0.0, 0.0, 2 * least]])
        D = np.array([[-least / 4, least / 4, least / 8, least / 4, 0.0, -least / 2]], "f4")
        one = write_peft(tmp_path / "a", {Q: (np.ones((1, 1), "f4"), D)})
        report = bake(single(tmp_path / "m", W, "F16"), one, out=tmp_path / "o")
        assert report.tensors[f"{Q}.weight"].subnormal == report.total.subnormal == 3

    def test_tensors_that_nothing_changes_are_not_counted(self, tmp_path: Path) -> None:
        """Factors that are zero, and adapters that cancel: there D is zero."""
        found = factors(1)
        names = list(found)
        found[names[0]] = (0 * found[names[0]][0], found[names[0]][1])
        one = write_peft(tmp_path / "a", found)
        other = write_peft(tmp_path / "b", {n: found[n] for n in names[1:3]})
        base = model(tmp_path / "m")
        report = bake(base, [one, other], [1.0, -1.0], out=tmp_path / "o")
        assert set(report.unchanged) == {f"{name}.weight" for name in names[:3]}
        assert report.tensors.keys() == {f"{name}.weight" for name in names[3:]}
        assert report.total.elements == sum(item.elements for item in report.tensors.values())
        deltas = {name: delta for name, delta in dense(found).items() if name in names[3:]}
        assert differing(stored(tmp_path / "o"), expected(base, deltas)) == []

    def test_rows_and_columns_that_nothing_reads_are_not_counted(self, tmp_path: Path) -> None:
        W = np.full((40, 30), 1.0)
        B, A = pairs(1, {Q: (40, 30)}, 2)[Q]
        B[:10], A[:, :5] = 0, 0
        one = write_peft(tmp_path / "a", {Q: (B * np.float32(1e-6), A)})
        report = bake(single(tmp_path / "m", W), one, out=tmp_path / "o")
        assert report.total.elements == 30 * 25
        assert (report.total.swallowed, report.total.changed, report.total.gain) == (1, 0, 0)

    @pytest.mark.parametrize("mode", ROUNDS)
    @pytest.mark.parametrize("how", ["zero", "rank 0", "cancelling"])
    def test_no_change_at_all(self, how: str, mode: str, tmp_path: Path) -> None:
        base, found = model(tmp_path / "m"), factors(1)
        given, factor = {n: (0 * B, A) for n, (B, A) in found.items()}, [1.0]
        if how == "rank 0":
            given = {n: (B[:, :0], A[:0]) for n, (B, A) in found.items()}
        one = [write_peft(tmp_path / "a", found if how == "cancelling" else given, alpha=1.0)]
        if how == "cancelling":
            one, factor = one * 2, [1.0, -1.0]
        options: dict[str, Any] = {"round": mode, "max_drift": 0.0, "strict": True}
        report = bake(base, one, factor, out=tmp_path / "o", **options)
        assert differing(stored(tmp_path / "o"), stored(base)) == []
        assert report.total is None and report.predicted is None and report.tensors == {}
        assert len(report.unchanged) == 6 and report.warnings == ()
        json.dumps(report.to_dict(), allow_nan=False)
        assert bake(base, one, factor, out=tmp_path / "p", round=mode, dry_run=True).warnings == ()

    @pytest.mark.parametrize("factor", [1e-24, 1e28])
    def test_changes_of_any_size_have_figures(self, factor: float, tmp_path: Path) -> None:
        """Their squares leave the range of float32."""
        base = single(tmp_path / "m", np.zeros((40, 30)))
        found = {Q: pairs(1, {Q: (40, 30)}, 2)[Q]}
        one = write_peft(tmp_path / "a", found)
        report = bake(base, one, [factor], out=tmp_path / "o")
        norm = np.linalg.norm(dense(found)[Q]) * factor
        assert report.total.norm == pytest.approx(norm, rel=1e-5)
        assert report.total.gain == pytest.approx(1, abs=1e-3)
        assert 1e-4 < report.total.error < 3e-3
        wanted = expected(base, dense(found, factor))
        assert differing(stored(tmp_path / "o"), wanted) == []

    @pytest.mark.parametrize("mode", ROUNDS)
    def test_counts_add_up(self, mode: str, tmp_path: Path) -> None:
        base = model(tmp_path / "m", layout="shards")
        report = bake(base, adapter(tmp_path / "a"), out=tmp_path / "o", round=mode)
        items = report.tensors.values()
        for name in ("single", "double", "exact", "plain"):
            assert getattr(report.counts, name) == sum(getattr(i.counts, name) for i in items)
        for item in items:
            found = item.counts
            assert found.single + found.double + found.exact + found.plain == item.elements
            assert round((item.swallowed + item.changed) * item.elements) == item.elements

    def test_adapters_that_read_everything(self, tmp_path: Path) -> None:
        """Of a rank above that of the weight: all of the error is inside."""
        base, sizes = model(tmp_path / "m"), {Q: (24, 24)}
        one = write_peft(tmp_path / "a", pairs(1, sizes, 40))
        report = bake(base, one, [0.01], out=tmp_path / "o")
        assert report.total.subspace_error == report.total.error > 0
        found = dense(pairs(1, sizes, 40), 0.01)
        assert differing(stored(tmp_path / "o"), expected(base, found)) == []

    @pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
    def test_an_empty_tensor_with_an_adapter(self, shape: tuple[int, int], tmp_path: Path) -> None:
        base = single(tmp_path / "m", np.zeros(shape))
        rows, columns = shape
        pair = np.ones((rows, 2), "f4"), np.ones((2, columns), "f4")
        for mode in ROUNDS:
            one = write_peft(tmp_path / f"a{mode}", {Q: pair})
            report = bake(base, one, out=tmp_path / mode, round=mode)
            assert report.total is None and stored(tmp_path / mode) == stored(base)

    def test_it_is_json_and_names_every_file(self, tmp_path: Path) -> None:
        base = model(tmp_path / "m", layout="shards")
        (base / "tokenizer.json").write_text("{}")
        (base / "templates").mkdir()
        (base / "templates" / "chat.jinja").write_text("x")
        report = bake(base, adapter(tmp_path / "a"), out=tmp_path / "o", hash=True)
        document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert document["schema"] == "adapterops.bake/1"
        names = sorted(bytes_of(tmp_path / "o"))
        assert sorted(report.files) == names and "templates/chat.jinja" in names
        sidecar = json.loads((tmp_path / "o" / "adapterops.json").read_text())
        assert sidecar["files"] == names
        for key in ("total", "predicted", "tensors", "counts", "size", "copied", "modules"):
            assert sidecar[key] == document[key]
        for name, sha256 in sidecar["sha256"].items():
            assert hashlib.sha256((tmp_path / "o" / name).read_bytes()).hexdigest() == sha256
        assert len(sidecar["sha256"]) == 3
        assert str(tmp_path) not in (tmp_path / "o" / "adapterops.json").read_text()

    @pytest.mark.parametrize("dtype", ["keep", "float32"])
    def test_the_index_says_the_true_size(self, dtype: str, tmp_path: Path) -> None:
        base = model(tmp_path / "m", "F16", "shards")
        bake(base, adapter(tmp_path / "a"), out=tmp_path / "o", dtype=dtype)
        index = json.loads((tmp_path / "o" / checkpoints.INDEX).read_text())
        found = stored(tmp_path / "o")
        assert index["metadata"]["total_size"] == sum(len(t.raw) for t in found.values())
        assert index["weight_map"].keys() == found.keys()
        assert open_model(tmp_path / "o").tensors.keys() == found.keys()

    def test_how_much_is_copied(self, tmp_path: Path) -> None:
        base = model(tmp_path / "m")
        report = bake(base, adapter(tmp_path / "a"), out=tmp_path / "o")
        changed = sum(len(stored(base)[name].raw) for name in report.tensors)
        assert report.copied == report.size - changed

    def test_progress_ends_at_the_end(self, tmp_path: Path) -> None:
        said: list[tuple[str, int, int]] = []
        rows = {"rows": 2000, "columns": 400, "layers": 1}
        base = bake_models.model(tmp_path / "m", weights(**rows), "F32", "shards")
        one = write_peft(tmp_path / "a", factors(1, **rows))
        bake(base, one, out=tmp_path / "o", progress=lambda *args: said.append(args))
        done = [count for _, count, _ in said]
        assert done == sorted(done) and said[-1][1:] == (said[0][2], said[0][2])


class TestPrediction:
    @pytest.mark.parametrize("mode", ROUNDS)
    @pytest.mark.parametrize("size", [2e-5, 3e-4])
    def test_it_is_near_the_truth(self, size: float, mode: str, tmp_path: Path) -> None:
        """Of rows alike; on average over adapters, and within its margin for nearly all."""
        sizes = {"rows": 900, "columns": 64, "layers": 1}
        base, ratios = bake_models.model(tmp_path / "m", weights(**sizes)), []
        for seed in range(8):
            one = write_peft(tmp_path / f"a{seed}", factors(seed, size, **sizes))
            report = bake(base, one, out=tmp_path / f"o{seed}", round=mode)
            ratios.append(
                [
                    getattr(report.predicted, name) / getattr(report.total, name)
                    for name in ("subspace_error", "error", "norm", "swallowed", "elements")
                ]
            )
        # Of weights stored as (in, out) compensation needs all rows, which a sample has not.
        np.testing.assert_allclose(np.mean(ratios, axis=0), 1, atol=0.08)
        assert np.mean(np.abs(np.array(ratios)[:, 0] - 1) < 0.25) >= 7 / 8

    def test_few_rows_are_all_looked_at(self, tmp_path: Path) -> None:
        W = 0.02 * np.random.default_rng(1).standard_normal((8, 90))
        one = write_peft(tmp_path / "a", pairs(1, {Q: (8, 90)}, 2))
        report = bake(single(tmp_path / "m", W), one, [1e-3], out=tmp_path / "o")
        assert report.predicted == report.total

    def test_a_dry_run_writes_nothing_and_predicts_the_same(self, tmp_path: Path) -> None:
        base, one = model(tmp_path / "m"), adapter(tmp_path / "a", size=1e-4)
        report = bake(base, one, out=tmp_path / "o", dry_run=True)
        nothing_but(tmp_path, "a", "m")
        real = bake(base, one, out=tmp_path / "o")
        assert report.total is None and report.predicted == real.predicted
        assert (report.files, report.tensors, report.size) == ((), {}, real.size)
        assert report.warnings and report.modules == 6
        json.dumps(report.to_dict(), allow_nan=False)

    def test_too_much_drift_is_refused_before_anything_is_written(
        self, tmp_path: Path, monkeypatch: Any
    ) -> None:
        base, one = model(tmp_path / "m"), adapter(tmp_path / "a", size=1e-4)
        monkeypatch.setattr(writing, "make", lambda *_, **__: 1 / 0)
        with pytest.raises(BudgetError, match="sample of 1 % of the rows predicts") as caught:
            bake(base, one, out=tmp_path / "o", max_drift=0.02)
        assert caught.value.exit_code == 5 and "--round compensated" in str(caught.value)
        with pytest.raises(BudgetError, match="predicts"):
            bake(base, one, out=tmp_path / "o", max_drift=0.02, dry_run=True)
        nothing_but(tmp_path, "a", "m")

    @pytest.mark.parametrize("layout", ["folder", "file"])
    def test_too_much_drift_is_refused_at_the_end(self, layout: str, tmp_path: Path) -> None:
        base, one = model(tmp_path / "m", layout=layout), adapter(tmp_path / "a", size=1e-3)
        first = bake(base, one, out=tmp_path / "o.safetensors")
        found = first.total.subspace_error
        assert found < 1.25 * first.predicted.subspace_error
        limit = 0.99 * found
        with pytest.raises(BudgetError, match=r"it has a total error of") as caught:
            bake(base, one, out=tmp_path / "p.safetensors", max_drift=limit)
        assert caught.value.exit_code == 5
        names = ["a", "m", "o.safetensors"] + ["o.adapterops.json"] * (layout == "file")
        nothing_but(tmp_path, *sorted(names))
        bake(base, one, out=tmp_path / "p.safetensors", max_drift=1.01 * found)

    def test_compensated_down_the_rows_is_predicted(self, tmp_path: Path) -> None:
        """GPT-2 stores (in, out): feedback goes down the rows, the sample is of columns."""
        name, shape = "h.0.attn.c_attn", (96, 288)
        B, A = pairs(3, {name: shape[::-1]}, 4)[name]
        one = write_peft(tmp_path / "a", {name: (3e-3 * B, A)}, fan_in_fan_out=True)
        W = 0.02 * np.random.default_rng(4).standard_normal(shape)
        config = {"model_type": "gpt2", "n_head": 4, "n_embd": 96}
        base = bake_models.model(tmp_path / "m", {f"{name}.weight": W}, config=config)
        first = bake(base, one, out=tmp_path / "o", round="compensated")
        found = first.total.subspace_error
        assert first.predicted.subspace_error == pytest.approx(found, rel=0.2)
        second = bake(base, one, out=tmp_path / "p", round="compensated", max_drift=2 * found)
        assert stored(tmp_path / "p") == stored(tmp_path / "o")
        assert second.total == first.total

    def test_what_is_lost_is_said_with_what_to_do(self, tmp_path: Path) -> None:
        base, one = model(tmp_path / "m"), adapter(tmp_path / "a", size=1e-4)
        (said,) = bake(base, one, out=tmp_path / "o").warnings
        for word in ("bfloat16 loses", "--round compensated", "--dtype float32", "unmerged"):
            assert word in said
        assert bake(base, one, out=tmp_path / "p", dtype="float32").warnings == ()
        with pytest.raises(NumericsError, match="--strict: bfloat16 loses"):
            bake(base, one, out=tmp_path / "q", strict=True)
        nothing_but(tmp_path, "a", "m", "o", "p")
        good = bake(model(tmp_path / "n", "F16"), adapter(tmp_path / "b"), out=tmp_path / "q")
        assert good.warnings == ()


def bytes_below(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


class TestFiles:
    def test_a_file_beside_its_base(self, tmp_path: Path) -> None:
        """Nothing else appears there, and the base stays what it was."""
        base, one = model(tmp_path / "m", layout="file"), adapter(tmp_path / "a")
        before = bytes_below(base.parent)
        report = bake(base, one, out=base.with_name("baked"))
        assert report.output == str(base.with_name("baked.safetensors"))
        assert set(report.files) == {"baked.safetensors", "baked.adapterops.json"}
        after = bytes_below(base.parent)
        assert after.keys() == before.keys() | {*report.files}
        assert {name: after[name] for name in before} == before
        sidecar = json.loads(after["baked.adapterops.json"])
        assert sidecar["files"] == sorted(report.files)

    @pytest.mark.parametrize("layout", ["folder", "file"])
    def test_overwriting_what_was_baked(self, layout: str, tmp_path: Path) -> None:
        base, one = model(tmp_path / "m", layout=layout), adapter(tmp_path / "a")
        out = tmp_path / "o.safetensors"
        bake(base, one, out=out)
        with pytest.raises(OutputExistsError, match="exists already") as caught:
            bake(base, one, [0.5], out=out)
        assert caught.value.exit_code == 2
        bake(base, one, [0.5], out=out, overwrite=True)
        assert differing(stored(out), expected(base, dense(factors(1), 0.5))) == []
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []

    @pytest.mark.parametrize(
        ("layout", "out"),
        [
            ("folder", "m"),
            ("folder", "m/o"),
            ("shards", "m/deep/o"),
            ("index", "m"),
            ("index", "m/o"),
            ("file", "m/model.safetensors"),
            ("folder", "a"),
            ("folder", "a/o"),
        ],
    )
    def test_an_output_that_is_or_is_inside_an_input(
        self, layout: str, out: str, tmp_path: Path
    ) -> None:
        base, one = model(tmp_path / "m", layout=layout), adapter(tmp_path / "a")
        (tmp_path / "m" / "deep").mkdir()
        if layout == "index":  # with our sidecar the folder itself might be replaced
            names = [path.name for path in (tmp_path / "m").iterdir() if path.is_file()]
            sidecar = json.dumps({"schema": "adapterops.bake/1", "files": [*names, "deep"]})
            (tmp_path / "m" / "adapterops.json").write_text(sidecar)
        before = bytes_below(tmp_path)
        with pytest.raises(OutputExistsError) as caught:
            bake(base, one, out=tmp_path / out, overwrite=True)
        assert caught.value.exit_code == 2 and "the output is" in str(caught.value)
        assert bytes_below(tmp_path) == before

    def test_a_link_to_the_base_is_the_base(self, tmp_path: Path) -> None:
        base, one = model(tmp_path / "m"), adapter(tmp_path / "a")
        (tmp_path / "link").symlink_to(base)
        for out in ("link", "link/o"):
            with pytest.raises(OutputExistsError):
                bake(base, one, out=tmp_path / out, overwrite=True)
        bake(tmp_path / "link", one, out=tmp_path / "o")
        assert differing(stored(tmp_path / "o"), expected(base, dense(factors(1)))) == []

    def test_hard_links_instead_of_copies(self, tmp_path: Path) -> None:
        base, found = model(tmp_path / "m", layout="shards"), factors(1)
        name = next(iter(found))
        one = write_peft(tmp_path / "a", {name: found[name]})
        before = bytes_below(base)
        bake(base, one, out=tmp_path / "o", link=True)
        same = [f.name for f in files(base) if os.path.samefile(f, tmp_path / "o" / f.name)]
        assert len(same) == 2 and bytes_below(base) == before
        deltas = {name: dense(found)[name]}
        assert differing(stored(tmp_path / "o"), expected(base, deltas)) == []
        bake(base, one, [0.5], out=tmp_path / "o", link=True, overwrite=True)
        assert bytes_below(base) == before
        bake(base, adapter(tmp_path / "b"), out=tmp_path / "o", overwrite=True)
        assert bytes_below(base) == before
        assert not any(os.path.samefile(f, tmp_path / "o" / f.name) for f in files(base))

    def test_links_of_a_hub_cache_are_followed(self, tmp_path: Path) -> None:
        """A hard link is one to the file, no copy of a link."""
        base, one = model(tmp_path / "m", layout="hub"), adapter(tmp_path / "a")
        report = bake(base, one, out=tmp_path / "o", link=True, modules=Q.replace(".", r"\."))
        assert not any(path.is_symlink() for path in (tmp_path / "o").rglob("*"))
        sidecar = json.loads((tmp_path / "o" / "adapterops.json").read_text())
        assert sidecar["provenance"]["options"]["base"]["name"] == "tiny/base"
        names = [item["name"] for item in sidecar["base_files"]]
        assert names == [f.name for f in files(base)] and set(names) < set(report.files)

    def test_another_file_system(self, tmp_path: Path) -> None:
        """tmpfs has no O_DIRECT, shares no blocks and links to no other disk."""
        base, one = model(tmp_path / "m", layout="shards"), adapter(tmp_path / "a")
        options: dict[str, Any] = {"link": True, "modules": Q}
        bake(base, one, out=tmp_path / "o", **options)
        if not Path("/dev/shm").is_dir():
            return
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            bake(base, one, out=f"{folder}/o", **options)
            assert bytes_of(Path(folder) / "o") == bytes_of(tmp_path / "o")
            assert [path.name for path in Path(folder).iterdir()] == ["o"]

    def test_names_of_every_kind(self, tmp_path: Path, monkeypatch: Any) -> None:
        """Relative, with a slash at the end, a dot, and bytes that are no UTF-8."""
        base = model(tmp_path / "m", layout="shards")
        adapter(tmp_path / "a")
        wanted = expected(base, dense(factors(1)))
        monkeypatch.chdir(base)
        bake(".", "../a/", out="../o/")
        assert differing(stored(tmp_path / "o"), wanted) == []
        monkeypatch.chdir(tmp_path)
        odd = "mö del \udcff x"
        base.rename(odd)
        bake(odd, "a", out="\udcffö")
        assert differing(stored(tmp_path / "\udcffö"), wanted) == []
        assert len(bake("\udcffö", "a", out="p").history) == 1

    def test_an_empty_folder_is_filled(self, tmp_path: Path) -> None:
        base, one = model(tmp_path / "m"), adapter(tmp_path / "a")
        (tmp_path / "o").mkdir(mode=0o700)
        bake(base, one, out=tmp_path / "o")
        assert differing(stored(tmp_path / "o"), expected(base, dense(factors(1)))) == []
        assert (tmp_path / "o").stat().st_mode & 0o777 == 0o700

    def test_no_file_stays_open(self, tmp_path: Path) -> None:
        base, one = model(tmp_path / "m", layout="shards"), adapter(tmp_path / "a")
        bake(base, one, out=tmp_path / "o")
        names = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
        assert [name for name in names if name.startswith(str(tmp_path / "o"))] == []

    @pytest.mark.parametrize("mode", [0o022, 0o077])
    def test_modes_follow_the_umask(self, mode: int, tmp_path: Path) -> None:
        base, one = model(tmp_path / "m", layout="shards"), adapter(tmp_path / "a")
        before = os.umask(mode)
        try:
            bake(base, one, out=tmp_path / "o")
        finally:
            os.umask(before)
        for path in (tmp_path / "o").rglob("*"):
            assert path.stat().st_mode & 0o777 == 0o666 & ~mode


class TestHistory:
    """A base that was baked itself."""

    @pytest.mark.parametrize("layout", ["folder", "shards", "file"])
    def test_it_is_told(self, layout: str, tmp_path: Path) -> None:
        last, names = model(tmp_path / "m", layout=layout), []
        for k in range(3):
            one = adapter(tmp_path / f"adapter-{k}", k, 2e-3)
            out = tmp_path / f"o{k}.safetensors"
            report = bake(last, one, [0.5 + k], out=out)
            assert [item["inputs"][0]["name"] for item in report.history] == names
            assert [item["inputs"][0]["weight"] for item in report.history] == [0.5, 1.5, 2.5][:k]
            sidecar = out / "adapterops.json"
            sidecar = sidecar if out.is_dir() else tmp_path / f"o{k}.adapterops.json"
            document = json.loads(sidecar.read_text())
            assert [item["inputs"][0]["name"] for item in document["history"]] == names
            names, last = [*names, f"adapter-{k}"], out

    @pytest.mark.parametrize("named", ["model.safetensors", "link"])
    def test_by_another_name(self, named: str, tmp_path: Path) -> None:
        base, one = model(tmp_path / "m"), adapter(tmp_path / "a")
        bake(base, one, out=tmp_path / "o")
        (tmp_path / "link").symlink_to(tmp_path / "o")
        path = tmp_path / "o" / named if named != "link" else tmp_path / named
        assert len(bake(path, one, out=tmp_path / "p.safetensors").history) == 1

    def test_a_sidecar_of_other_weights_is_not_believed(self, tmp_path: Path) -> None:
        base, one = model(tmp_path / "m"), adapter(tmp_path / "a")
        bake(base, one, out=tmp_path / "o")
        shutil.copy(base / "model.safetensors", tmp_path / "o")
        assert bake(tmp_path / "o", one, out=tmp_path / "p").history == ()

    @pytest.mark.parametrize(
        "text",
        ["", "[1", "[]", '{"schema": "adapterops.bake/1"}', "[" * 9999],
        ids=["empty", "cut", "list", "bare", "deep"],
    )
    def test_a_damaged_sidecar_is_none(self, text: str, tmp_path: Path) -> None:
        base, one = model(tmp_path / "m"), adapter(tmp_path / "a")
        (base / "adapterops.json").write_text(text)
        assert bake(base, one, out=tmp_path / "o").history == ()
        assert json.loads((tmp_path / "o" / "adapterops.json").read_text())["history"] == []


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def replaced(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.with_name("new").write_bytes(data)
    path.with_name("new").rename(path)


class TestInputsThatChange:
    """Between planning and writing, and while a file is written."""

    @pytest.mark.parametrize("how", [touch, append, truncate, replaced, Path.unlink])
    @pytest.mark.parametrize("which", ["changed", "untouched", "the adapter"])
    def test_it_is_refused(self, which: str, how: Callable[[Path], None], tmp_path: Path) -> None:
        base = model(tmp_path / "m", layout="shards")
        names = [name for name in factors(1) if ".0." in name or which != "untouched"]
        one = write_peft(tmp_path / "a", {name: factors(1)[name] for name in names})
        victim = files(one)[0] if which == "the adapter" else files(base)[1]
        if which == "untouched":
            victim = files(base)[-1]
        done: list[int] = []

        def hook(*_: Any) -> None:
            if not done:
                how(victim)
            done.append(1)

        with pytest.raises(FileError) as caught:
            bake(base, one, out=tmp_path / "o", progress=hook)
        assert caught.value.exit_code == 6 and victim.name in str(caught.value)
        assert isinstance(caught.value, ChangedError) or how is Path.unlink
        kept = how is Path.unlink  # it may be there again later
        nothing_but(tmp_path, *[".o.adapterops-partial"] * kept, "a", "m")

    def test_a_file_that_changes_while_it_is_written(
        self, tmp_path: Path, monkeypatch: Any
    ) -> None:
        base, one = model(tmp_path / "m", layout="file"), adapter(tmp_path / "a")
        real = run.make

        def slow(*args: Any, **options: Any) -> Any:
            for number, made in enumerate(real(*args, **options)):
                if number == 2:
                    append(base)
                yield made

        monkeypatch.setattr(writing, "make", slow)
        with pytest.raises(ChangedError, match=r"model\.safetensors: changed while being read"):
            bake(base, one, out=tmp_path / "o")
        nothing_but(tmp_path, "a", "m")


class TestNumbers:
    """What is not finite, and the ends of float16."""

    @pytest.mark.parametrize("mode", ROUNDS)
    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
    def test_a_base_that_is_damaged(
        self, value: float, dtype: str, mode: str, tmp_path: Path
    ) -> None:
        """No row of the sample shows it."""
        W = 0.02 * np.random.default_rng(1).standard_normal((900, 10))
        W[13, 4] = value
        base = single(tmp_path / "m", W, dtype)
        one = write_peft(tmp_path / "a", pairs(1, {Q: (900, 10)}, 2))
        with pytest.raises(NumericsError, match=rf"1 values of '{Q}.weight' are NaN or inf") as e:
            bake(base, one, out=tmp_path / "o", round=mode)
        assert e.value.exit_code == 5 and e.value.path == str(base / "model.safetensors")
        nothing_but(tmp_path, "a", "m")

    @pytest.mark.parametrize("dtype", ["keep", "float32", "float16"])
    def test_what_nothing_changes_is_not_judged(self, dtype: str, tmp_path: Path) -> None:
        tensors = {f"{Q}.weight": np.ones((4, 4)), "other": np.array([[np.nan, np.inf, -0.0, 1]])}
        base = bake_models.model(tmp_path / "m", tensors)
        one = write_peft(tmp_path / "a", pairs(1, {Q: (4, 4)}, 2))
        bake(base, one, out=tmp_path / "o", dtype=dtype)
        values = stored(tmp_path / "o")["other"].values
        np.testing.assert_array_equal(values, tensors["other"])
        assert np.signbit(values[0, 2])

    @pytest.mark.parametrize("mode", ROUNDS)
    @pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
    def test_an_adapter_that_diverged(self, value: float, mode: str, tmp_path: Path) -> None:
        found = factors(1)
        found[UP][0][5, 1] = value
        base, one = model(tmp_path / "m"), write_peft(tmp_path / "a", found)
        with pytest.raises(NumericsError, match=r"1 of 160 values of .*lora_B") as caught:
            bake(base, one, out=tmp_path / "o", round=mode)
        assert caught.value.module == UP and "leave this adapter out" in str(caught.value)
        nothing_but(tmp_path, "a", "m")
        rest = rf"(?!{UP}).*"
        bake(base, one, out=tmp_path / "o", round=mode, modules=rest)

    @pytest.mark.parametrize("mode", ROUNDS)
    @pytest.mark.parametrize(
        ("change", "fits"), [(15.9921875, True), (16.0, False), (-131023.9, True), (-131024, False)]
    )
    def test_the_ends_of_float16(
        self, change: float, fits: bool, mode: str, tmp_path: Path
    ) -> None:
        """65519.99 rounds to 65504, 65520 to infinity."""
        W = np.full((40, 8), 1.0)
        W[17, 3] = 65504
        B, A = np.zeros((40, 1)), np.zeros((1, 8))
        B[17], A[0, 3] = 1, change
        found = {Q: (B.astype("f4"), A.astype("f4"))}
        base, one = single(tmp_path / "m", W, "F16"), write_peft(tmp_path / "a", found)
        if fits:
            bake(base, one, out=tmp_path / "o", round=mode)
            assert baked(tmp_path / "o")[17, 3] == np.sign(change) * 65504
            return
        with pytest.raises(NumericsError, match=r"beyond float16") as caught:
            bake(base, one, out=tmp_path / "o", round=mode)
        assert Q in str(caught.value) and "--dtype float32" in str(caught.value)
        nothing_but(tmp_path, "a", "m")

    def test_another_type_that_cannot_hold_the_rest(self, tmp_path: Path) -> None:
        tensors = {f"{Q}.weight": np.ones((4, 4)), "model.big": np.array([1.0, 65519.9, 7e4])}
        base = bake_models.model(tmp_path / "m", tensors, "F32")
        one = write_peft(tmp_path / "a", pairs(1, {Q: (4, 4)}, 2))
        with pytest.raises(NumericsError, match=r"1 values of 'model.big' are beyond float16"):
            bake(base, one, out=tmp_path / "o", dtype="fp16")
        nothing_but(tmp_path, "a", "m")

    @pytest.mark.parametrize("factor", [1e31, 1e-31, np.inf, np.nan])
    def test_coefficients_that_cannot_be_computed_with(self, factor: float, tmp_path: Path) -> None:
        base, one = model(tmp_path / "m"), adapter(tmp_path / "a")
        with pytest.raises(UsageError):
            bake(base, one, [factor], out=tmp_path / "o")
        nothing_but(tmp_path, "a", "m")


class TestKinds:
    """What is no plain LoRA of a linear layer."""

    @pytest.mark.parametrize("mode", ROUNDS)
    @pytest.mark.parametrize("dtype", TYPES)
    def test_dora(self, dtype: str, mode: str, tmp_path: Path) -> None:
        """float64 and one rounding: W′ = m·(W + sBA) / ‖W + sBA‖ by rows; no exactness claimed."""
        base, found = model(tmp_path / "m", dtype, "shards"), factors(1)
        magnitudes, extras, deltas = {}, {}, {}
        for name, delta in dense(found, 1.4).items():
            W = stored(base)[f"{name}.weight"].values
            m = np.linalg.norm(W, axis=1) * (1 + 0.1 * np.sin(np.arange(len(W))))
            magnitudes[name] = m.astype("f4").astype(float)
            extras[f"base_model.model.{name}.lora_magnitude_vector"] = m.astype("f4")
            total = W + delta
            scale = magnitudes[name] / np.linalg.norm(total, axis=1)
            deltas[name] = scale[:, None] * total - W
        one = write_peft(tmp_path / "a", found, alpha=5.6, extras=extras, use_dora=True)
        report = bake(base, one, out=tmp_path / "o", round=mode)
        wanted, got = expected(base, deltas), stored(tmp_path / "o")
        for name, tensor in got.items():
            if name.removesuffix(".weight") not in deltas:
                assert tensor == wanted[name]
                continue
            other = tensor.values != wanted[name].values
            T = stored(base)[name].values + deltas[name.removesuffix(".weight")]
            step = ulp(T, tensor.dtype)
            most = 1 if mode == "stochastic" else 0.5001
            assert (np.abs(tensor.values - T) <= most * step).all()
            assert mode == "stochastic" or other.mean() < (0.01 if dtype == "F32" else 1e-3)
        assert report.counts.single == report.counts.exact == 0 and report.counts.plain

    def test_dora_beside_lora(self, tmp_path: Path) -> None:
        """Changes add up; each is that of the adapter alone."""
        base, found = model(tmp_path / "m", "F32"), {Q: factors(1)[Q]}
        W = stored(base)[f"{Q}.weight"].values
        m = np.linalg.norm(W, axis=1).astype("f4")
        extras = {f"base_model.model.{Q}.lora_magnitude_vector": m}
        paths = [
            write_peft(tmp_path / "d", found, extras=extras, use_dora=True),
            write_peft(tmp_path / "a", found),
        ]
        bake(base, paths, [0.5, 2.0], out=tmp_path / "o")
        T = W + dense(found)[Q]
        delta = 0.5 * (m[:, None] * T / np.linalg.norm(T, axis=1)[:, None] - W)
        gap = baked(tmp_path / "o") - (W + delta + 2 * dense(found)[Q])
        assert np.abs(gap).max() < 2.0**-24 * 0.2

    @pytest.mark.parametrize("dtype", TYPES)
    def test_pissa(self, dtype: str, tmp_path: Path) -> None:
        """D = sBA − the part that the initialisation took out of the base (arXiv 2404.02948)."""
        base, found = model(tmp_path / "m", dtype), {Q: factors(1)[Q]}
        one = write_peft(tmp_path / "a", found, init_lora_weights="pissa")
        bake(base, one, out=tmp_path / "o")
        W = stored(base)[f"{Q}.weight"].values
        U, s, V = np.linalg.svd(W)
        delta = dense(found)[Q] - (U[:, :4] * s[:4]) @ V[:4]
        step = ulp(W + delta, dtype)
        gap = np.abs(baked(tmp_path / "o") - (W + delta))
        assert (gap <= 0.5001 * step + 1e-8).all()

    def test_a_residual(self, tmp_path: Path) -> None:
        """The base as another initialisation left it: D = sBA + W_residual − W."""
        base, found = model(tmp_path / "m", "F32"), factors(1)
        left = bake_models.model(tmp_path / "r", weights(seed=9), "F32")
        one = write_peft(tmp_path / "a", found, init_lora_weights="corda")
        with pytest.raises(UnsupportedError, match="--residual"):
            bake(base, one, out=tmp_path / "o")
        bake(base, one, out=tmp_path / "o", residual=left)
        for name, delta in dense(found).items():
            wanted = stored(left)[f"{name}.weight"].values + delta
            assert np.abs(baked(tmp_path / "o", name) - wanted).max() < 2.0**-25 * 0.2
        sidecar = json.loads((tmp_path / "o" / "adapterops.json").read_text())
        left = bake_models.model(tmp_path / "s", weights(seed=8), "F32")
        bake(base, one, out=tmp_path / "p", residual=left)
        other = json.loads((tmp_path / "p" / "adapterops.json").read_text())
        assert sidecar["provenance"] != other["provenance"]

    def test_fused_projections(self, tmp_path: Path) -> None:
        """Rows of q, k and v in one weight: bands of different adapters, one of none."""
        block = "model.layers.0.self_attn"
        W = 0.02 * np.random.default_rng(3).standard_normal((64, 24))
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
        config = {**CONFIG, **heads, "hidden_size": 24, "model_type": "phi3"}
        tensors = {f"{block}.qkv_proj.weight": W}
        base = bake_models.model(tmp_path / "m", tensors, config=config)
        q = pairs(0, {f"{block}.q_proj": (32, 24)}, 3)
        v = pairs(1, {f"{block}.v_proj": (16, 24)}, 3)
        paths = [write_peft(tmp_path / "q", q), write_peft(tmp_path / "v", v)]
        total = np.zeros_like(W)
        total[:32] = 0.01 * dense(q)[f"{block}.q_proj"]
        total[48:] = 0.02 * dense(v)[f"{block}.v_proj"]
        wanted = expected(base, {f"{block}.qkv_proj": total})
        for mode in ROUNDS:
            report = bake(base, paths, [0.01, 0.02], out=tmp_path / mode, round=mode)
            found = stored(tmp_path / mode)
            assert mode not in ("exact", "nearest") or differing(found, wanted) == []
            assert report.total.elements == 48 * 24
            T, before = found[f"{block}.qkv_proj.weight"].values, baked(base, f"{block}.qkv_proj")
            assert (T[32:48] == before[32:48]).all()
            inside = 0.0
            for rows, factor in ((slice(0, 32), q), (slice(48, 64), v)):
                A = next(iter(factor.values()))[1].astype(float)
                E = (T - before - total)[rows]
                inside += np.linalg.norm(E @ np.linalg.qr(A.T)[0]) ** 2
            assert report.total.subspace_error == pytest.approx(
                inside**0.5 / np.linalg.norm(total), rel=1e-4
            )

    @pytest.mark.parametrize("layout", ["conv1d", "embedding"])
    def test_weights_stored_as_in_and_out(self, layout: str, tmp_path: Path) -> None:
        rng = np.random.default_rng(5)
        if layout == "conv1d":
            name, shape = "h.0.attn.c_attn", (48, 144)
            B, A = pairs(1, {name: shape[::-1]}, 4)[name]
            one = write_peft(tmp_path / "a", {name: (B, A)}, fan_in_fan_out=True)
            config = {"model_type": "gpt2", "n_head": 4, "n_embd": 48}
        else:
            name, shape = "model.embed_tokens", (200, 24)
            B, A = pairs(1, {name: shape[::-1]}, 4)[name]
            stem = f"base_model.model.{name}.lora_embedding_"
            rest = {f"{stem}A": A, f"{stem}B": B}
            one = write_peft(tmp_path / "a", {Q: factors(1)[Q]}, extras=rest)
            config = {**CONFIG, "vocab_size": 200}
        tensors = {f"{name}.weight": 0.02 * rng.standard_normal(shape)}
        if layout == "embedding":
            tensors |= {f"{Q}.weight": np.zeros((24, 24)), "lm_head.weight": np.zeros(shape)}
        base = bake_models.model(tmp_path / "m", tensors, config=config)
        delta = 0.01 * (B.astype(float) @ A).T
        deltas = {name: delta}
        if layout == "embedding":
            deltas[Q] = 0.01 * dense(factors(1))[Q]
        report = bake(base, one, [0.01], out=tmp_path / "o")
        assert differing(stored(tmp_path / "o"), expected(base, deltas)) == []
        E = baked(tmp_path / "o", name) - baked(base, name) - delta
        inside = np.linalg.norm(np.linalg.qr(A.T.astype(float))[0].T @ E) / np.linalg.norm(delta)
        item = report.tensors[f"{name}.weight"]
        assert item.subspace_error == pytest.approx(inside, rel=1e-4)
        assert item.error > 2 * inside

    def test_convolutions_and_biases(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(2)
        stem = "blocks.0.conv"
        tensors = {f"{stem}.weight": 0.02 * rng.standard_normal((12, 6, 3, 3))}
        tensors[f"{stem}.bias"] = rng.standard_normal(12)
        base = bake_models.model(tmp_path / "m", tensors, "F16", "file", config=None)
        up, down = rng.standard_normal((12, 2, 1, 1)), 0.01 * rng.standard_normal((2, 6, 3, 3))
        kohya = {"lora_unet_blocks_0_conv": (up.astype("f4"), down.astype("f4"))}
        one = write_kohya(tmp_path / "k.safetensors", kohya, alpha=1.0)
        shift = rng.standard_normal(12).astype("f4")
        save_file({**load_file(one), "lora_unet_blocks_0_conv.diff_b": shift}, one)
        bake(base, one, [0.7], out=tmp_path / "o")
        delta = 0.7 * 0.5 * dense(kohya)["lora_unet_blocks_0_conv"]
        wanted = expected(base, {stem: delta, f"{stem}.bias": 0.7 * shift.astype(float)})
        assert differing(stored(tmp_path / "o.safetensors"), wanted) == []


class TestWholeModels:
    """Models of transformers with adapters of PEFT: reloaded, they do what the adapter did."""

    @pytest.mark.parametrize(
        "case",
        [
            *("embedding", "head", "both-differently", "both-tied", "saved-head", "saved-both"),
            *("tokens", "tokens-of-the-head", "tokens-grown", "grown", "shrunk"),
            *("grown-embedding", "untied-grown-both", "biases", "gpt2-head", "gpt2-tokens"),
        ],
    )
    def test_values_and_tied_weights(self, case: str, tmp_path: Path) -> None:
        kind, tied, stays, options = values.LIVE[case]
        bias = {"attention_bias": True} if case == "biases" else {}
        given = {**bias, **({} if kind == "gpt2" else {"tie_word_embeddings": tied})}
        made = values.tiny(kind, tmp_path / "base", **given)
        live = values.adapter(made, tmp_path / "adapter", **options)
        report = bake(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out")
        result = values.reloaded(tmp_path / "out", kind)
        assert np.abs(values.logits(result) - live).max() <= 1e-5 * np.abs(live).max()
        assert values.are_one(result) == stays and result.config.tie_word_embeddings == stays
        names = stored(tmp_path / "out")
        assert set(report.added) == names.keys() - stored(tmp_path / "base").keys()
        assert set(report.values) <= names.keys()
        assert report.size == (tmp_path / "out" / "model.safetensors").stat().st_size

    def test_a_tied_base_of_shards(self, tmp_path: Path) -> None:
        """The head goes where the embedding is, and into the index."""
        made = values.tiny("llama", tmp_path / "base", tie_word_embeddings=True)
        live = values.adapter(made, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
        made = values.tiny("llama", tmp_path / "base", tie_word_embeddings=True)
        made.save_pretrained(tmp_path / "shards", max_shard_size="3KB")
        count = len(files(tmp_path / "shards"))
        assert count > 2
        bake(tmp_path / "shards", tmp_path / "adapter", out=tmp_path / "out")
        index = json.loads((tmp_path / "out" / checkpoints.INDEX).read_text())
        where = index["weight_map"]
        assert where["lm_head.weight"] == where["model.embed_tokens.weight"]
        assert index["metadata"]["total_size"] == sum(
            len(tensor.raw) for tensor in stored(tmp_path / "out").values()
        )
        result = values.reloaded(tmp_path / "out", "llama")
        assert np.abs(values.logits(result) - live).max() <= 1e-5 * np.abs(live).max()

    @pytest.mark.parametrize(
        ("cls", "config", "sizes", "targets"),
        [case.values for case in names.MODELS if case.id in ("llama", "phi3", "neox", "gpt2")],
        ids=["llama", "phi3", "neox", "gpt2"],
    )
    @pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
    def test_as_PEFT_merges(
        self, cls: str, config: str, sizes: dict[str, Any], targets: Any, dora: bool, tmp_path: Path
    ) -> None:
        if cls == "GPT2LMHeadModel":
            targets = [name for name in targets if name != "wpe"] if dora else targets
        made = names.made(cls, config, sizes)
        names.trained(made, tmp_path, target_modules=targets, use_dora=dora)
        bake(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out")
        found, merged = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "merged"))
        assert found.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
        for name, value in found.items():
            assert np.abs(value - merged[name]).max(initial=0) < 1e-6, name
            assert value.dtype == np.float32

    @pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
    def test_experts(self, kind: str, tmp_path: Path) -> None:
        sizes = {**names.SIZES, **names.EXPERTS, **names.APART}
        targets = {"target_modules": ["o_proj"], "target_parameters": names.PARAMETERS}
        made = names.made(f"{kind}ForCausalLM", f"{kind}Config", sizes)
        names.trained(made, tmp_path, **targets)
        bake(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out")
        found, merged = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "merged"))
        assert found.keys() == merged.keys()
        assert max(np.abs(found[n] - merged[n]).max() for n in found) < 1e-6

    def test_logits_of_the_adapter_on_the_fly(self, tmp_path: Path) -> None:
        """In float32 to rounding; in bfloat16 as near as PEFT's own merge or nearer."""
        import transformers
        from peft import PeftModel

        made = names.made("LlamaForCausalLM", "LlamaConfig", {**names.SIZES, **names.APART})
        names.trained(made, tmp_path, target_modules="all-linear")
        ids = torch.arange(12)[None] * 5 % 32

        def live(dtype: torch.dtype) -> np.ndarray:
            plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
            adapted = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
            with torch.no_grad():
                result: np.ndarray = adapted.eval()(ids).logits.double().numpy()
            return result

        def of(folder: Path) -> np.ndarray:
            model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype="auto")
            with torch.no_grad():
                result: np.ndarray = model.eval()(ids).logits.double().numpy()
            return result

        with names.quiet():
            bake(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out")
            wanted = live(torch.float32)
            assert np.abs(of(tmp_path / "out") - wanted).max() < 1e-5 * np.abs(wanted).max()
            half = tmp_path / "half"
            bake(tmp_path / "base", tmp_path / "adapter", out=half, dtype="bfloat16")
            gap = np.abs(of(half) - wanted).max()
            assert 1e-4 < gap / np.abs(wanted).max() < 0.1


class TestImageModels:
    def test_stable_diffusion_in_one_file(self, tmp_path: Path) -> None:
        """kohya's stems of U-Net and text encoder, inverted from LDM's names."""
        rng = np.random.default_rng(1)
        shapes = ldm_checkpoints.sd1(ldm_checkpoints.TINY, 16, 2)
        tensors = {name: 0.02 * rng.standard_normal(shape) for name, shape in shapes.items()}
        base = bake_models.model(tmp_path / "m", tensors, "F16", "file", config=None)
        unet = "model.diffusion_model."
        text = "cond_stage_model.transformer.text_model.encoder.layers.1"
        places = {
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (
                f"{unet}input_blocks.1.1.transformer_blocks.0.attn2.to_k"
            ),
            "lora_unet_down_blocks_0_attentions_0_proj_in": f"{unet}input_blocks.1.1.proj_in",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2": (
                f"{unet}middle_block.1.transformer_blocks.0.ff.net.2"
            ),
            "lora_unet_down_blocks_0_resnets_0_conv1": f"{unet}input_blocks.1.0.in_layers.2",
            "lora_te_text_model_encoder_layers_1_mlp_fc1": f"{text}.mlp.fc1",
        }
        parts, deltas = {}, {}
        for seed, (stem, name) in enumerate(places.items()):
            shape = shapes[f"{name}.weight"]
            B, A = pairs(seed, {stem: (shape[0], int(np.prod(shape[1:])))}, 2)[stem]
            deltas[name] = 0.8 * 0.5 * dense({name: (B, A)})[name]
            if len(shape) == 4:
                B, A = B.reshape(*B.shape, 1, 1), A.reshape(2, *shape[1:])
            parts[stem] = (B, A)
        one = write_kohya(tmp_path / "k.safetensors", parts, alpha=1.0)
        report = bake(base, one, [0.8], out=tmp_path / "o")
        out = tmp_path / "o.safetensors"
        assert differing(stored(out), expected(base, deltas)) == []
        assert report.modules == 5 and bake_models.head(out) == bake_models.head(base)
        with pytest.raises(IncompatibleError, match="lora_unet_elsewhere"):
            odd = {**parts, "lora_unet_elsewhere_to_q": next(iter(parts.values()))}
            bake(base, write_kohya(tmp_path / "l.safetensors", odd, alpha=1.0), out=tmp_path / "p")

    def test_a_pipeline(self, tmp_path: Path) -> None:
        """U-Net and text encoder, one file and shards; what neither has travels."""
        rng = np.random.default_rng(1)
        base, out = tmp_path / "m", tmp_path / "o"
        block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
        text = "text_model.encoder.layers.0.self_attn"
        unet = {f"{block}.{n}.weight": rng.standard_normal((16, 16)) for n in ("to_q", "to_k")}
        encoder = {f"{text}.{n}.weight": rng.standard_normal((8, 8)) for n in ("q_proj", "k_proj")}
        vae = {"decoder.conv_in.weight": rng.standard_normal((4, 4, 3, 3))}
        config = {"_class_name": "UNet2DConditionModel"}
        bake_models.model(base / "unet", unet, "F16", "file", config)
        file = base / "unet" / "model.safetensors"
        file.rename(file.with_name("diffusion_pytorch_model.safetensors"))
        config = {"model_type": "clip_text_model"}
        bake_models.model(base / "text_encoder", encoder, "BF16", "shards", config, shards=2)
        bake_models.model(base / "vae", vae, "F32", "file", {"_class_name": "AutoencoderKL"})
        (base / "scheduler").mkdir()
        (base / "scheduler" / "scheduler_config.json").write_text("{}")
        (base / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        sizes = {f"unet.{block}.to_q": (16, 16), f"text_encoder.{text}.q_proj": (8, 8)}
        found = pairs(1, sizes, 2)
        (tmp_path / "a").mkdir()
        tensors = {f"{name}.lora_B.weight": B for name, (B, _) in found.items()}
        tensors |= {f"{name}.lora_A.weight": A for name, (_, A) in found.items()}
        save_file(tensors, tmp_path / "a" / "pytorch_lora_weights.safetensors")
        report = bake(base, tmp_path / "a", [0.5], out=out)
        assert differing(stored(out), expected(base, dense(found, 0.5))) == []
        assert report.tensors.keys() == {f"{name}.weight" for name in found}
        index = json.loads((out / "text_encoder" / checkpoints.INDEX).read_text())
        assert index["weight_map"].keys() == encoder.keys()
        assert index["metadata"]["total_size"] == 2 * 2 * 64
        here = bytes_below(out)
        del here["adapterops.json"]
        assert here.keys() == bytes_below(base).keys() == {*report.files} - {"adapterops.json"}
        for name in ("model_index.json", "vae/config.json", "vae/model.safetensors"):
            assert here[name] == bytes_below(base)[name]
        last = bake(out, tmp_path / "a", [-0.5], out=tmp_path / "p")
        assert len(last.history) == 1


class TestGoingOn:
    """A run that ended early, and the same call again."""

    @pytest.fixture
    def given(self, tmp_path: Path) -> tuple[Path, Path]:
        base = bake_models.model(tmp_path / "m", weights(), "BF16", "shards", shards=4)
        return base, adapter(tmp_path / "a")

    @staticmethod
    def interrupt(monkeypatch: Any, after: int, error: type[BaseException] | BaseException) -> None:
        """Raise `error` in place of the next file, when `after` are written."""
        real, count = writing.write_shard, [0]

        def stopping(*args: Any, **options: Any) -> Any:
            if count[0] == after:
                raise error
            count[0] += 1
            return real(*args, **options)

        monkeypatch.setattr(baking_model, "write_shard", stopping)

    @pytest.mark.parametrize("after", [0, 1, 3])
    def test_ctrl_c(
        self, after: int, given: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
    ) -> None:
        bake(*given, out=tmp_path / "whole")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
            self.interrupt(patch, after, KeyboardInterrupt)
            bake(*given, out=tmp_path / "o")
        nothing_but(tmp_path, *[".o.adapterops-partial"] * (after > 0), "a", "m", "whole")
        if after:
            assert f"{after} of 4 files of weights are kept" in str(caught.value)
            assert "the same command" in str(caught.value)
        report = bake(*given, out=tmp_path / "o")
        assert report.resumed == after
        nothing_but(tmp_path, "a", "m", "o", "whole")
        assert bytes_of(tmp_path / "o", "o", "whole") == bytes_of(tmp_path / "whole")

    @pytest.mark.parametrize("kind", ["folder", "file"])
    def test_ctrl_c_in_the_middle_of_a_file(
        self, kind: str, tmp_path: Path, monkeypatch: Any
    ) -> None:
        base, one = model(tmp_path / "m", layout=kind), adapter(tmp_path / "a")
        real = run.make

        def stopping(*args: Any, **options: Any) -> Any:
            for number, made in enumerate(real(*args, **options)):
                if number == 3:
                    raise KeyboardInterrupt
                yield made

        monkeypatch.setattr(writing, "make", stopping)
        with pytest.raises(KeyboardInterrupt):
            bake(base, one, out=tmp_path / "o")
        nothing_but(tmp_path, "a", "m")

    @pytest.mark.parametrize(
        "change",
        [
            *("weights", "round", "dtype", "modules", "alpha in the config", "adapter", "base"),
            *("time of the base", "config of the base", "seed"),
        ],
    )
    def test_another_plan_begins_anew(
        self, change: str, given: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
    ) -> None:
        base, one = given
        options: dict[str, Any] = {"round": "stochastic"} if change == "seed" else {}
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            self.interrupt(patch, 2, KeyboardInterrupt)
            bake(base, one, out=tmp_path / "o", **options)
        if change == "weights":
            options["weights"] = [0.5]
        elif change in ("round", "dtype", "modules", "seed"):
            other = {"round": "nearest", "dtype": "float16", "modules": ".*q_proj", "seed": 5}
            options[change] = other[change]
        elif change == "alpha in the config":
            config = json.loads((one / "adapter_config.json").read_text())
            (one / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 7}))
        elif change == "adapter":
            write_peft(one, factors(2))
        elif change == "config of the base":
            config = json.loads((base / "config.json").read_text())
            (base / "config.json").write_text(json.dumps({**config, "num_attention_heads": 3}))
        else:
            data = bytearray(files(base)[0].read_bytes())
            data[-40] ^= change == "base"
            files(base)[0].write_bytes(data)
        report = bake(base, one, out=tmp_path / "o", **options)
        assert report.resumed == 0
        bake(base, one, out=tmp_path / "p", **options)
        assert bytes_of(tmp_path / "o", "o", "p") == bytes_of(tmp_path / "p")
        nothing_but(tmp_path, "a", "m", "o", "p")

    def test_another_residual_begins_anew(self, tmp_path: Path, monkeypatch: Any) -> None:
        base = bake_models.model(tmp_path / "m", weights(), "F32", "shards")
        one = write_peft(tmp_path / "a", factors(1), init_lora_weights="corda")
        for name, seed in (("r", 8), ("s", 9)):
            bake_models.model(tmp_path / name, weights(seed), "F32", "shards")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            self.interrupt(patch, 2, KeyboardInterrupt)
            bake(base, one, out=tmp_path / "o", residual=tmp_path / "r")
        report = bake(base, one, out=tmp_path / "o", residual=tmp_path / "s")
        assert report.resumed == 0
        bake(base, one, out=tmp_path / "p", residual=tmp_path / "s")
        assert differing(stored(tmp_path / "o"), stored(tmp_path / "p")) == []

    def test_a_reversible_run_goes_on_and_is_undone(
        self, given: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
    ) -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
            self.interrupt(patch, 2, KeyboardInterrupt)
            bake(*given, out=tmp_path / "o", reversible=True)
        assert "2 of 4 files of weights are kept" in str(caught.value)
        report = bake(*given, out=tmp_path / "o", reversible=True)
        assert report.resumed == 2 and set(report.undo) < set(report.files)
        bake(*given, out=tmp_path / "p", reversible=True)
        assert bytes_of(tmp_path / "o", "o", "p") == bytes_of(tmp_path / "p")
        unbake(tmp_path / "o", out=tmp_path / "again")
        assert bytes_below(tmp_path / "again") == bytes_below(given[0])

    def test_what_does_not_decide_bytes_does_not_matter(
        self, given: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
    ) -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            self.interrupt(patch, 2, KeyboardInterrupt)
            bake(*given, out=tmp_path / "o", jobs=1, seed=3)
        options: dict[str, Any] = {"jobs": 2, "memory": "50MB", "link": True, "max_drift": 0.5}
        report = bake(*given, out=tmp_path / "o", **options, seed=4)
        assert report.resumed == 2

    def test_a_finished_file_that_was_damaged_is_written_again(
        self, given: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
    ) -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            self.interrupt(patch, 2, KeyboardInterrupt)
            bake(*given, out=tmp_path / "o")
        append(files(tmp_path / ".o.adapterops-partial")[0])
        assert bake(*given, out=tmp_path / "o").resumed == 1
        assert differing(stored(tmp_path / "o"), expected(given[0], dense(factors(1)))) == []

    def test_too_little_room_is_said_first(
        self, given: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
    ) -> None:
        real, size = os.statvfs, sum(f.stat().st_size for f in files(given[0]))

        def full(path: Any) -> Any:
            found = real(path)
            values = {n: getattr(found, n) for n in ("f_blocks", "f_frsize")}
            return type("Status", (), {**values, "f_bavail": (size - 1) // found.f_frsize})()

        monkeypatch.setattr(os, "statvfs", full)
        with pytest.raises(FileError, match=rf"the output needs {size} bytes, the disk has") as e:
            bake(*given, out=tmp_path / "o")
        assert e.value.exit_code == 6
        nothing_but(tmp_path, "a", "m")

    @pytest.mark.parametrize("kind", ["shards", "file"])
    def test_a_disk_that_fills_up_in_the_middle(
        self, kind: str, tmp_path: Path, monkeypatch: Any
    ) -> None:
        base, one = model(tmp_path / "m", layout=kind), adapter(tmp_path / "a")
        before = bytes_below(tmp_path)
        real, left = os.pwrite, [15_000]

        def filling(descriptor: int, data: Any, offset: int) -> int:
            left[0] -= len(data)
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(descriptor, data, offset)

        with monkeypatch.context() as patch, pytest.raises(FileError, match="disk is full") as e:
            patch.setattr(os, "pwrite", filling)
            bake(base, one, out=tmp_path / "o")
        assert e.value.exit_code == 6
        after = bytes_below(tmp_path)
        assert {name: after[name] for name in before} == before
        if kind == "file":
            assert after.keys() == before.keys()
        else:
            assert "1 finished file is kept, the same command continues" in str(e.value)
        report = bake(base, one, out=tmp_path / "o")
        assert report.resumed == (kind == "shards")
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    @pytest.mark.parametrize("at", ["config.json", "adapterops.json", checkpoints.INDEX])
    def test_a_disk_that_fills_up_at_the_end(
        self, at: str, given: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
    ) -> None:
        real = resumable.write_file

        def filling(path: Path, chunks: Any) -> None:
            if path.name == at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(path, chunks)

        with monkeypatch.context() as patch, pytest.raises(FileError, match="4 finished files"):
            patch.setattr(resumable, "write_file", filling)
            bake(*given, out=tmp_path / "o", dtype="float16")
        nothing_but(tmp_path, ".o.adapterops-partial", "a", "m")
        report = bake(*given, out=tmp_path / "o", dtype="float16")
        assert report.resumed == 4
        bake(*given, out=tmp_path / "p", dtype="float16")
        assert bytes_of(tmp_path / "o", "o", "p") == bytes_of(tmp_path / "p")

    def test_an_output_that_appears_meanwhile(
        self, given: tuple[Path, Path], tmp_path: Path
    ) -> None:
        def hook(*_: Any) -> None:
            (tmp_path / "o").mkdir(exist_ok=True)
            (tmp_path / "o" / "mine").write_text("x")

        with pytest.raises(OutputExistsError):
            bake(*given, out=tmp_path / "o", progress=hook)
        assert bytes_of(tmp_path / "o") == {"mine": b"x"}


class TestMisuse:
    """What no command line can say: values of other types, each refused by the option's name."""

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"seed": 3.5}, "--seed"),
            ({"seed": True}, "--seed"),
            ({"max_drift": "1"}, "--max-drift"),
            ({"jobs": "2"}, "-j"),
            ({"alpha": "x"}, "alpha"),
            ({"modules": 3}, "--modules"),
            ({"weights": 0.5}, "weights"),
            ({"weights": ["0.5"]}, "weight"),
            ({"weights": [True]}, "weight"),
            ({"weights": [1j]}, "weight"),
        ],
        ids=str,
    )
    def test_other_types(self, options: dict[str, Any], named: str, tmp_path: Path) -> None:
        base, one = model(tmp_path / "base"), adapter(tmp_path / "a")
        with pytest.raises(UsageError, match=named):
            bake(base, one, out=tmp_path / "out", **options)
        nothing_but(tmp_path, "a", "base")

    def test_numbers_of_numpy(self, tmp_path: Path) -> None:
        base, one = model(tmp_path / "base"), adapter(tmp_path / "a")
        report = bake(
            base,
            one,
            np.array([0.5]),
            out=tmp_path / "out",
            round="stochastic",
            seed=np.int64(3),
            max_drift=np.float32(9),
        )
        assert report.to_dict()["adapters"][0][1] == 0.5

    def test_an_output_around_an_input(self, tmp_path: Path) -> None:
        """--overwrite must not remove what is read: an adapter, or the residual, inside it."""
        base, one = model(tmp_path / "base"), adapter(tmp_path / "a")
        bake(base, one, out=tmp_path / "out")
        inside = tmp_path / "out" / "adapter.safetensors"
        shutil.copy(tmp_path / "a" / "adapter_model.safetensors", inside)
        for given in (
            {"adapters": inside, "alpha": 1.0},
            {"residual": tmp_path / "out" / "model.safetensors"},
        ):
            arguments = {"adapters": one, "overwrite": True, **given}
            with pytest.raises(OutputExistsError, match=r"(contains|is) the input"):
                bake(base, out=tmp_path / "out", **arguments)
        assert inside.is_file()
