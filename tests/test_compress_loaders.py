"""compress, judged by what loads its results: PEFT, diffusers, and kohya's rule of alpha / r.

Every module of a result must be the singular value decomposition of the input's ΔW cut at the rank
that the report names, to within storage; and the error in the report must be the one measured on
what the loader applies, in dense float64.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import adapterops as ao
from adapterops.certificate import Report
from adapterops.errors import AdapterOpsError, UsageError
from tests.dialects import DIFFUSERS, Diffusers
from tests.support import distance, load_file

pytest.importorskip("peft")
Deltas = Mapping[str, np.ndarray]
WEIGHTS = "adapter_model.safetensors"
STORAGE = {"float32": 2e-7, "float16": 2e-3, "bfloat16": 1.5e-2}


def rewritten(file: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """A safetensors file with its float32 tensors changed in place."""
    with safe_open(file, "numpy") as opened:
        metadata = dict(opened.metadata() or {})
    tensors = {name: np.ascontiguousarray(change(name, v)) for name, v in load_file(file).items()}
    save_file(tensors, file, metadata)


def graded(file: Path, experts: int = 1) -> None:
    """Columns of B that fall at a rate of the module's own, so that modules want several ranks."""
    ups = (".lora_B.weight", ".lora_embedding_B", "_lora.up.weight", ".up.weight")
    names = sorted(name for name in load_file(file) if name.endswith((*ups, ".lora_up.weight")))

    def change(name: str, value: np.ndarray) -> np.ndarray:
        if name not in names:
            return value
        fall = (0.85, 0.6, 0.35)[names.index(name) % 3]
        count = experts if value.shape[1] % experts == 0 and "experts" in name else 1
        falling = np.repeat(fall ** np.arange(value.shape[1] // count), count)
        columns = falling.reshape(1, -1, *(1,) * (value.ndim - 2))
        return (value * columns).astype(value.dtype)

    rewritten(file, change)


def matrix(value: np.ndarray) -> np.ndarray:
    return value.reshape(len(value), -1) if value.ndim > 1 else value


def best(value: np.ndarray, rank: int) -> np.ndarray:
    """The nearest matrix of this rank (Eckart & Young)."""
    U, S, V = np.linalg.svd(matrix(value), full_matrices=False)
    return ((U[:, :rank] * S[:rank]) @ V[:rank]).reshape(value.shape)


def assert_kept(
    report: Report,
    before: Deltas,
    after: Deltas,
    *,
    stem: Callable[[str], str] = lambda name: name,
    dtype: str = "float32",
) -> None:
    """What was loaded is the best there is at the ranks reported; the errors are those measured.

    `stem` is the report's name of a module of the model.
    """
    assert {stem(name) for name in before if not name.endswith(".bias")} == report.modules.keys()
    lost: list[float] = []
    for name, value in before.items():
        found = after.get(name, np.zeros_like(value))
        assert found.shape == value.shape
        if name.endswith(".bias"):
            continue
        module = report.modules[stem(name)]
        size = float(np.linalg.norm(value))
        wanted = best(value, module.rank)
        assert np.linalg.norm(found - wanted) <= 4 * STORAGE[dtype] * size, name
        own = float(np.linalg.norm(found - value))
        lost.append(own)
        assert (name in after) == bool(module.rank)
        assert (stem(name) in report.dropped) == (not module.rank)
        assert module.error == pytest.approx(own / size, rel=1e-5, abs=1e-9), name
    whole = math.hypot(*(np.linalg.norm(v) for n, v in before.items() if not n.endswith(".bias")))
    assert report.error == pytest.approx(math.hypot(*lost) / whole, rel=1e-5, abs=1e-9)


def assert_counted(report: Report, file: Path) -> None:
    """Size to the byte, parameters to the number."""
    assert report.size == file.stat().st_size
    marks = (".lora", "_lora.")
    numbers = sum(
        value.size
        for name, value in load_file(file).items()
        if any(mark in name for mark in marks) and not name.endswith(("bias", "alpha"))
    )
    assert report.parameters == numbers


# ---- PEFT ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def models() -> Any:
    return pytest.importorskip("tests.peft_models")


EVERYTHING = ["linear", "wide", "square", "embed", "conv1", "conv2", "point", "conv3", "head"]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "every layer": ("tiny", {"r": 6, "lora_alpha": 9, "target_modules": EVERYTHING}),
    "rsLoRA and patterns": (
        "llama",
        {
            "r": 6,
            "lora_alpha": 5,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"],
            "rank_pattern": {"v_proj": 4},
            "alpha_pattern": {"down_proj": 11},
        },
    ),
    "a saved head": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 7,
            "target_modules": ["q_proj", "up_proj"],
            "modules_to_save": ["lm_head"],
        },
    ),
    "lora_bias": (
        "tiny",
        {
            "r": 4,
            "lora_alpha": 6,
            "lora_bias": True,
            "target_modules": ["linear", "conv1", "conv2", "head"],
        },
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "uniform": {"rank": 2},
    "raised": {"rank": 13},
    "raised, rslora": {"rank": 9, "scaling": "rslora"},
    "ragged": {"energy": 0.9, "ragged": True},
    "ragged, rank": {"rank": 3, "ragged": True},
    "ragged, rslora": {"energy": 0.9, "ragged": True, "scaling": "rslora"},
    "ragged, keep": {"max_error": 0.4, "ragged": True, "scaling": "keep"},
    "ragged, orthonormal-a": {"energy": 0.9, "ragged": True, "form": "orthonormal-a"},
    "ragged, orthonormal-b, rslora": {
        "energy": 0.9,
        "ragged": True,
        "form": "orthonormal-b",
        "scaling": "rslora",
    },
    "svd, keep": {"rank": 3, "form": "svd", "scaling": "keep"},
    "sv_fro": {"sv_fro": 0.9, "max_rank": 4},
    "sv_ratio": {"sv_ratio": 4.0},
    "global, ratio": {"ratio": 0.45, "allocate": "global"},
    "global, error": {"max_error": 0.35, "allocate": "global", "scaling": "keep"},
    "global, svd, rslora": {
        "ratio": 0.45,
        "allocate": "global",
        "form": "svd",
        "scaling": "rslora",
    },
    "ragged, float16": {"energy": 0.9, "ragged": True, "dtype": "float16"},
    "ragged, bfloat16, rslora": {
        "energy": 0.9,
        "ragged": True,
        "dtype": "bfloat16",
        "scaling": "rslora",
    },
    "raised, bfloat16": {"rank": 8, "dtype": "bfloat16", "form": "orthonormal-b"},
}


@pytest.fixture(scope="module")
def sources(models: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each adapter as PEFT saves it, with falling columns, and ΔW as PEFT reloads it."""
    found = {}
    for name, (model, config) in ADAPTERS.items():
        folder = models.trained(tmp_path_factory.mktemp("peft") / "a", 1, model, **config)
        graded(folder / WEIGHTS)
        found[name] = folder, models.deltas(models.reloaded(folder, model))
    return found


class TestPeft:
    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("adapter", ADAPTERS)
    def test_reloaded(
        self, adapter: str, options: str, models: Any, sources: Any, tmp_path: Path
    ) -> None:
        folder, before = sources[adapter]
        model, chosen = ADAPTERS[adapter][0], dict(OPTIONS[options])
        if adapter == "lora_bias" and "global" in options:
            chosen["min_rank"] = 1
        report = ao.compress(folder, out=tmp_path / "c", **chosen)
        assert isinstance(report, Report)
        loaded = models.reloaded(tmp_path / "c", model)
        after = models.deltas(loaded)
        dtype = chosen.get("dtype", "float32")
        assert_kept(report, before, after, dtype=dtype)
        assert_counted(report, tmp_path / "c" / WEIGHTS)
        ranks = {name: module.rank for name, module in report.modules.items()}
        for name, layer in models.layers(loaded).items():
            assert layer.r["default"] == ranks[name]
        if ("ragged" in chosen and "rank" not in chosen) or "allocate" in chosen:
            assert len(set(ranks.values())) > 1
        for name in before:
            if name.endswith(".bias"):
                np.testing.assert_allclose(after[name], before[name], rtol=0.01, atol=1e-9)
        applied = models.outputs(models.shifted(model, after).eval(), model)
        if "modules_to_save" not in ADAPTERS[adapter][1]:
            result = models.outputs(loaded, model)
            assert np.linalg.norm(result - applied) <= 1e-9 * np.linalg.norm(applied)

    def test_global_drops_and_the_logits_are_those_of_what_is_left(
        self, models: Any, sources: Any, tmp_path: Path
    ) -> None:
        folder, before = sources["every layer"]
        report = ao.compress(folder, out=tmp_path / "c", ratio=0.1, allocate="global")
        assert report.dropped
        kept = {
            name: best(value, report.modules[name].rank)
            for name, value in before.items()
            if report.modules[name].rank
        }
        found = models.outputs(models.reloaded(tmp_path / "c"))
        wanted = models.outputs(models.shifted("tiny", kept))
        assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)
        config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
        targets = config["target_modules"]
        assert not set(report.dropped) & set(targets if isinstance(targets, list) else [])

    def test_a_saved_head_survives(self, models: Any, sources: Any, tmp_path: Path) -> None:
        folder, _ = sources["a saved head"]
        ao.compress(folder, out=tmp_path / "c", ratio=0.4, allocate="global")
        heads = []
        for each in (folder, tmp_path / "c"):
            loaded = models.reloaded(each, "llama")
            heads.append(loaded.base_model.model.lm_head.modules_to_save["default"].weight)
        assert (heads[0] == heads[1]).all()
        assert heads[0].std() > 0.5  # what was trained, not what the base has

    def test_rslora_factors_are_smaller_by_the_scale(
        self, models: Any, sources: Any, tmp_path: Path
    ) -> None:
        folder, _ = sources["every layer"]
        ao.compress(folder, out=tmp_path / "c", rank=4, scaling="rslora")
        for layer in models.layers(models.reloaded(tmp_path / "c")).values():
            assert layer.scaling["default"] == pytest.approx(1.5, rel=1e-12)
            assert layer.use_rslora["default"] if isinstance(layer.use_rslora, dict) else True

    @pytest.mark.parametrize("form", ["orthonormal-a", "orthonormal-b", "svd"])
    def test_forms_as_peft_holds_them(
        self, form: str, models: Any, sources: Any, tmp_path: Path
    ) -> None:
        folder, _ = sources["every layer"]
        ao.compress(folder, out=tmp_path / "c", energy=0.9, ragged=True, form=form)
        seen = 0
        for layer in models.layers(models.reloaded(tmp_path / "c")).values():
            if "default" not in layer.lora_A:
                continue
            A = matrix(layer.lora_A["default"].weight.detach().numpy())
            B = matrix(layer.lora_B["default"].weight.detach().numpy())
            one, two = A @ A.T, B.T @ B
            sigma = np.linalg.svd(B @ A, compute_uv=False)[: len(A)]
            wanted = {
                "orthonormal-a": (np.ones(len(A)), sigma**2),
                "orthonormal-b": (sigma**2, np.ones(len(A))),
                "svd": (sigma, sigma),
            }[form]
            np.testing.assert_allclose(one, np.diag(wanted[0]), atol=1e-5 * wanted[0].max())
            np.testing.assert_allclose(two, np.diag(wanted[1]), atol=1e-5 * wanted[1].max())
            seen += 1
        assert seen >= 6


class TestBiases:
    """A module may end at rank 0; what it does to biases must not go without a word."""

    @pytest.mark.parametrize(
        "options",
        [{"ragged": True}, {"rank": 4, "ragged": True}, {"ratio": 0.5, "allocate": "global"}],
        ids=["ragged", "ragged, rank", "global"],
    )
    def test_a_bias_shift_beside_a_module_of_zeros(
        self, options: dict[str, Any], models: Any, tmp_path: Path
    ) -> None:
        """lora_bias: ΔW of `linear` is zero, its shift is not; the report speaks of no loss."""
        config = {"r": 4, "lora_alpha": 6, "lora_bias": True}
        folder = models.trained(tmp_path / "a", 1, target_modules=["linear", "head"], **config)
        rewritten(folder / WEIGHTS, lambda name, v: 0 * v if "linear.lora_B.weight" in name else v)
        before = models.deltas(models.reloaded(folder))
        assert np.linalg.norm(before["linear.bias"]) > 0.1
        report = ao.compress(folder, out=tmp_path / "c", **options)
        after = models.deltas(models.reloaded(tmp_path / "c"))
        lost = np.linalg.norm(after.get("linear.bias", 0.0) - before["linear.bias"])
        assert lost < 1e-6 or any("bias" in each for each in (*report.warnings, *report.notes))

    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    def test_trained_biases_of_dropped_modules_are_found(
        self, bias: str, models: Any, tmp_path: Path
    ) -> None:
        """PEFT looks for a bias below `base_layer` only where it adapts the layer."""
        folder = models.trained(
            tmp_path / "a", 1, r=4, lora_alpha=6, target_modules=["linear", "head"], bias=bias
        )
        rewritten(folder / WEIGHTS, lambda name, v: 1e-6 * v if "linear.lora_B" in name else v)
        report = ao.compress(folder, out=tmp_path / "c", ratio=0.5, allocate="global")
        assert "linear" in report.dropped and "head" not in report.dropped
        found = []
        for each in (folder, tmp_path / "c"):
            named = models.reloaded(each).named_parameters()
            found += [
                {
                    name.replace(".base_layer", ""): value.detach().numpy()
                    for name, value in named
                    if name.endswith(".bias")
                }
            ]
        assert found[0].keys() == found[1].keys()
        wrong = [name for name in found[0] if not np.array_equal(found[0][name], found[1][name])]
        assert not wrong

    def test_a_resized_embedding_that_is_no_longer_adapted(
        self, models: Any, tmp_path: Path
    ) -> None:
        """PEFT saves an adapted embedding's base weight, for training may have added tokens."""
        folder = models.trained(
            tmp_path / "a", 1, "llama", r=4, lora_alpha=6, target_modules=["embed_tokens", "q_proj"]
        )
        saved = "base_model.model.model.embed_tokens.base_layer.weight"

        def change(name: str, value: np.ndarray) -> np.ndarray:
            if name == saved:
                return value + 1.0
            return 1e-6 * value if name.endswith("embedding_B") else value

        rewritten(folder / WEIGHTS, change)
        report = ao.compress(folder, out=tmp_path / "c", ratio=0.4, allocate="global")
        assert report.dropped == ("model.embed_tokens",)
        assert list(report.extras.values()) == ["copied"]
        weights = []
        for each in (folder, tmp_path / "c"):
            layer = models.reloaded(each, "llama").base_model.model.model.embed_tokens
            weights.append(getattr(layer, "base_layer", layer).weight.detach().numpy())
        np.testing.assert_array_equal(*weights)

    def test_trained_biases_where_nothing_is_dropped(self, models: Any, tmp_path: Path) -> None:
        folder = models.trained(
            tmp_path / "a", 1, r=4, lora_alpha=6, target_modules=["linear", "head"], bias="all"
        )
        graded(folder / WEIGHTS)
        ao.compress(folder, out=tmp_path / "c", energy=0.8, ragged=True)
        one, two = (
            {
                name: value.detach().numpy()
                for name, value in models.reloaded(each).named_parameters()
                if name.endswith(".bias")
            }
            for each in (folder, tmp_path / "c")
        )
        assert len(one) >= 8 and all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "options", [{"ragged": True}, {"sv_fro": 0.9}, {"rank": 2, "ragged": True}], ids=str
)
def test_an_adapter_of_zeros_stays_loadable(
    options: dict[str, Any], models: Any, tmp_path: Path
) -> None:
    """Published as results, and what every fresh adapter is; a file without factors is none."""
    folder = models.trained(tmp_path / "a", 1, r=4, lora_alpha=6, target_modules=["linear", "head"])
    rewritten(folder / WEIGHTS, lambda name, v: 0 * v if "lora_B" in name else v)
    try:
        ao.compress(folder, out=tmp_path / "c", **options)
    except AdapterOpsError:
        assert not (tmp_path / "c").exists()
        return
    after = models.deltas(models.reloaded(tmp_path / "c"))
    assert not any(value.any() for value in after.values())
    assert ao.open_adapter(tmp_path / "c") is not None


class TestSharedRanks:
    """Modules that PEFT can only give one rank."""

    @pytest.mark.parametrize(
        "options",
        [{"ragged": True}, {"energy": 0.8, "ragged": True}, {"ratio": 0.5, "allocate": "global"}],
        ids=["ragged", "energy", "global"],
    )
    def test_attention_s_two_projections(
        self, options: dict[str, Any], models: Any, tmp_path: Path
    ) -> None:
        """One `rank_pattern` stands for an MHA's in_proj and out_proj."""
        folder = models.trained(
            tmp_path / "a", 1, r=4, lora_alpha=6, target_modules=["mha", "linear"]
        )

        def change(name: str, value: np.ndarray) -> np.ndarray:
            if not name.endswith("out_proj.lora_B.weight"):
                return value
            return value * (np.arange(value.shape[1]) < 1)

        rewritten(folder / WEIGHTS, change)
        before = models.deltas(models.reloaded(folder))
        report = ao.compress(folder, out=tmp_path / "c", **options)
        after = models.deltas(models.reloaded(tmp_path / "c"))
        found = {name: after.get(name, 0 * value) for name, value in before.items()}
        assert distance(found, before) == pytest.approx(report.error, rel=1e-5, abs=1e-7)


EXPERTS = (
    "one parameter",
    "two parameters",
    "two parameters and a linear layer",
    "(E, in, out)",
    "rsLoRA",
    "Qwen3-MoE",
    "Mixtral",
)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Mixtures of experts: the model, an adapter as PEFT saves it, and ΔW as PEFT reloads it."""
    moe = pytest.importorskip("tests.test_moe")
    found = {}
    for case in EXPERTS:
        model, config = moe.CASES[case]
        folder = moe.saved(model, tmp_path_factory.mktemp("moe") / "a", r=3, lora_alpha=4, **config)
        before = moe.deltas(model, folder)
        count = 1 + max(int(name.partition("[")[2][:-1] or 0) for name in before)
        graded(folder / WEIGHTS, count)
        found[case] = model, folder, moe.deltas(model, folder)
    return found


class TestExperts:
    """`target_parameters`: what PEFT reloads, expert by expert."""

    @pytest.mark.parametrize(
        "options",
        [
            {"rank": 2},
            {"rank": 5, "scaling": "keep"},
            {"rank": 2, "scaling": "rslora", "form": "svd"},
            {"energy": 0.85, "ragged": True},
            {"ratio": 0.5, "allocate": "global", "min_rank": 1},
            {"ratio": 0.3, "allocate": "global"},
            {"energy": 0.85, "ragged": True, "scaling": "rslora", "dtype": "bfloat16"},
        ],
        ids=[
            "uniform",
            "raised, keep",
            "svd, rslora",
            "ragged",
            "global",
            "global, dropped",
            "ragged, rslora, bfloat16",
        ],
    )
    @pytest.mark.parametrize("case", EXPERTS)
    def test_reloaded(
        self, case: str, options: dict[str, Any], experts: Any, tmp_path: Path
    ) -> None:
        from tests import test_moe

        model, folder, before = experts[case]
        report = ao.compress(folder, out=tmp_path / "c", **options)
        with warnings.catch_warnings():
            if report.dropped:  # the next test's concern
                warnings.filterwarnings("ignore", message="Found missing adapter keys")
            after = test_moe.deltas(model, tmp_path / "c")
        for name, module in report.modules.items():
            if not module.rank:  # PEFT wraps all the parameters of a module that it wraps at all
                assert not np.any(after.pop(name, np.zeros(1)))
        assert_kept(report, before, after, dtype=options.get("dtype", "float32"))
        assert_counted(report, tmp_path / "c" / WEIGHTS)
        for name, module in report.modules.items():  # experts share their tensors
            assert report.modules[f"{name.partition('[')[0]}[0]" if "[" in name else name].rank == (
                module.rank
            )

    def test_experts_that_are_left_out_are_no_targets(self, tmp_path: Path) -> None:
        """A short name of a parameter takes in every layer; PEFT then misses their factors."""
        moe = pytest.importorskip("tests.test_moe")
        model, config = moe.CASES["one parameter"]
        folder = moe.saved(model, tmp_path / "a", r=3, lora_alpha=4, **config)
        rewritten(
            folder / WEIGHTS, lambda name, v: 1e-6 * v if "layers.1" in name and "_B" in name else v
        )
        before = moe.deltas(model, folder)
        report = ao.compress(folder, out=tmp_path / "c", ratio=0.5, allocate="global")
        assert report.dropped == tuple(f"layers.1.experts[{index}]" for index in range(3))
        after = moe.deltas(model, tmp_path / "c")  # warnings are errors
        assert_kept(report, before, {n: v for n, v in after.items() if n not in report.dropped})


# ---- diffusers -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def images() -> Any:
    pytest.importorskip("diffusers")
    return pytest.importorskip("tests.image_models")


def source(case: Diffusers, folder: Path, rank: int = 5) -> Path:
    from tests.test_diffusers import write

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "a.safetensors"
    configured = case.alpha[0] is not None and "rank_pattern" not in case.config
    write(case, file, 1, rank, 7.0 if configured else case.alpha[0])
    graded(file)
    return file


def header(file: Path) -> dict[str, Any]:
    with safe_open(file, "numpy") as opened:
        return json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))


RAGGED: dict[str, dict[str, Any]] = {
    "ragged": {"energy": 0.9, "ragged": True},
    "global": {"ratio": 0.4, "allocate": "global"},
    "global, bfloat16": {"ratio": 0.5, "allocate": "global", "dtype": "bfloat16"},
    "sv_fro, orthonormal-b": {"sv_fro": 0.93, "form": "orthonormal-b"},
    "uniform": {"rank": 2},
    "raised, float16": {"rank": 9, "dtype": "float16"},
}
COMPONENTS = tuple(case for case in DIFFUSERS if not case.bare)


class TestDiffusers:
    @pytest.mark.parametrize("options", RAGGED)
    @pytest.mark.parametrize(
        "case", COMPONENTS, ids=[f"{each.component}-{each.kind}" for each in COMPONENTS]
    )
    def test_reloaded(self, case: Diffusers, options: str, images: Any, tmp_path: Path) -> None:
        """In every spelling; ragged ranks need the new one and patterns in its header."""
        chosen = dict(RAGGED[options])
        if "lora_bias" in case.config:
            chosen |= {"min_rank": 1} if "allocate" in chosen else {}
        file = source(case, tmp_path / "a")
        before = images.deltas(file, case.component)
        out = tmp_path / "c" / "c.safetensors"
        out.parent.mkdir()
        report = ao.compress(file, out=out, **chosen)
        after = images.deltas(out, case.component)
        stems = {_plain(name): name for name in report.modules}
        assert_kept(
            report,
            before,
            after,
            stem=lambda name: stems[name],
            dtype=chosen.get("dtype", "float32"),
        )
        assert_counted(report, out)
        ranks = {module.rank for module in report.modules.values()} - {0}
        if len(ranks) > 1:
            config = header(out)
            names = config[f"{case.component}.rank_pattern"]
            assert names and names == config[f"{case.component}.alpha_pattern"]
            assert all(".lora_A." in n or ".lora_B." in n for n in load_file(out))
        again = {_plain(n): f.dense() for n, f in ao.open_adapter(out).items()}
        matrices = {n: matrix(v) for n, v in after.items() if not n.endswith(".bias")}
        assert distance(again, matrices) < 1e-12

    def test_old_attention_processors_without_a_component(
        self, images: Any, tmp_path: Path
    ) -> None:
        """catundchat's spelling: no `unet.`, which a ragged result must add."""
        case = next(each for each in DIFFUSERS if each.bare)
        file = source(case, tmp_path / "a")
        before = images.deltas(file, "unet", bare=True)
        (tmp_path / "c").mkdir()
        for name, options in RAGGED.items():
            out = tmp_path / "c" / f"{name}.safetensors"
            report = ao.compress(file, out=out, **options)
            after = images.deltas(out, "unet")
            assert_kept(
                report,
                before,
                after,
                stem=lambda name: f"unet.{name}",
                dtype=options.get("dtype", "float32"),
            )

    def test_a_models_own_file_says_its_ranks(self, images: Any, tmp_path: Path) -> None:
        """Bare names: diffusers before mid-2025 takes alpha = r of the commonest rank for all.

        Only a header can tell it; a ragged result must carry one, or be refused.
        """
        tensors = {}
        rng = np.random.default_rng(1)
        for rank, leaf in enumerate(("to_q", "to_k", "to_v"), 1):
            stem = f"down_blocks.0.attentions.0.transformer_blocks.0.attn1.{leaf}"
            tensors[f"{stem}.lora_A.weight"] = rng.standard_normal((rank, 32)).astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = rng.standard_normal((32, rank)).astype(np.float32)
        save_file(tensors, tmp_path / "a.safetensors")
        out = tmp_path / "c.safetensors"
        try:
            ao.compress(tmp_path / "a.safetensors", out=out, ragged=True)
        except UsageError as error:
            assert "one rank" in str(error)
        else:
            assert any(key.endswith("rank_pattern") and value for key, value in header(out).items())

    @pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
    def test_text_encoders(self, component: str, images: Any, tmp_path: Path) -> None:
        """SDXL's second one has `text_model.` in its paths, transformers 5's first has not."""
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        config = CLIPTextConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=20,
            max_position_embeddings=8,
            projection_dim=8,
        )
        kind = CLIPTextModel if component == "text_encoder" else CLIPTextModelWithProjection
        rng = np.random.default_rng(1)
        tensors = {}
        for layer in (0, 1):
            for leaf in ("q_proj", "k_proj", "v_proj"):
                stem = f"{component}.text_model.encoder.layers.{layer}.self_attn.{leaf}"
                A, B = rng.standard_normal((4, 16)), rng.standard_normal((16, 4))
                tensors[f"{stem}.lora_A.weight"] = A.astype(np.float32)
                tensors[f"{stem}.lora_B.weight"] = B.astype(np.float32)
        file = tmp_path / "a.safetensors"
        save_file(tensors, file, {"format": "pt"})
        graded(file)
        out = tmp_path / "c.safetensors"
        report = ao.compress(file, out=out, energy=0.9, ragged=True)
        assert len({module.rank for module in report.modules.values()}) > 1
        before, after = (_encoder(each, kind(config), component, images) for each in (file, out))
        assert len(before) == 6
        assert distance(after, before) == pytest.approx(report.error, rel=1e-5)

    @pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
    def test_ragged_text_encoders_are_read_back(self, component: str, tmp_path: Path) -> None:
        rng = np.random.default_rng(1)
        tensors = {}
        for rank in (1, 2, 3):
            stem = f"{component}.text_model.encoder.layers.{rank}.self_attn.q_proj"
            tensors[f"{stem}.lora_A.weight"] = rng.standard_normal((rank, 16)).astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = rng.standard_normal((16, rank)).astype(np.float32)
        save_file(tensors, tmp_path / "a.safetensors")
        out = tmp_path / "c.safetensors"
        ao.compress(tmp_path / "a.safetensors", out=out, ragged=True)
        one, two = (
            {name: f.dense() for name, f in ao.open_adapter(each).items()}
            for each in (tmp_path / "a.safetensors", out)
        )
        assert distance(two, one) < 1e-6

    def test_names_of_no_component_stay_uniform(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(1)
        tensors = {}
        for rank in (1, 2):
            stem = f"transformer_blocks.{rank}.attn.to_q"
            tensors[f"{stem}.lora_A.weight"] = rng.standard_normal((rank, 8)).astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = rng.standard_normal((8, rank)).astype(np.float32)
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(UsageError, match="one rank"):
            ao.compress(tmp_path / "a.safetensors", out=tmp_path / "c.safetensors", ragged=True)
        assert not (tmp_path / "c.safetensors").exists()


def _plain(stem: str) -> str:
    """A stem of ours as the tiny models call the module (transformers 5 has no `text_model.`)."""
    part = stem.partition(".")[2]
    return part.removeprefix("text_model.") if stem.startswith("text_encoder.") else part


def _encoder(file: Path, host: Any, component: str, images: Any) -> dict[str, np.ndarray]:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
    from peft.tuners.lora import LoraLayer

    with images.strict():
        state, alphas, metadata = Loader.lora_state_dict(
            str(file.parent), weight_name=file.name, return_lora_metadata=True
        )
        Loader.load_lora_into_text_encoder(
            state, network_alphas=alphas, metadata=metadata, text_encoder=host, prefix=component
        )
    return {
        name: layer.get_delta_weight(*layer.scaling).detach().numpy().astype(float)
        for name, layer in host.double().named_modules()
        if isinstance(layer, LoraLayer)
    }


# ---- kohya ---------------------------------------------------------------------------------------

BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
KOHYA = {
    f"{BLOCK}attn1_to_q": (32, 32),
    f"{BLOCK}attn1_to_out_0": (32, 32),
    f"{BLOCK}attn2_to_k": (32, 16),
    "lora_unet_down_blocks_0_attentions_0_proj_in": (32, 32, 1, 1),
    "lora_unet_conv_in": (32, 4, 3, 3),
}


def kohya_file(file: Path, dtype: Any = np.float32) -> Path:
    """Ranks and alphas of the modules' own."""
    rng = np.random.default_rng(1)
    tensors = {}
    for index, (stem, (out, *inside)) in enumerate(KOHYA.items()):
        rank = (6, 4, 6, 5, 6)[index]
        up = 0.3 * rng.standard_normal((out, rank, *(1,) * (len(inside) - 1)))
        tensors[f"{stem}.lora_up.weight"] = up.astype(dtype)
        down = 0.3 * rng.standard_normal((rank, *inside))
        tensors[f"{stem}.lora_down.weight"] = down.astype(dtype)
        tensors[f"{stem}.alpha"] = np.array((3.0, 1.1, 6.0, 1.0, 0.7)[index], dtype)
    save_file(tensors, file, {"ss_network_module": "networks.lora"})
    graded(file)
    return file


def kohya_deltas(file: Path) -> dict[str, np.ndarray]:
    """alpha / r · up · down of each module, as sd-scripts does."""
    tensors = load_file(file)
    result = {}
    for name, up in tensors.items():
        stem, end, _ = name.partition(".lora_up.weight")
        if end:
            down = tensors[f"{stem}.lora_down.weight"].astype(float)
            scale = float(tensors[f"{stem}.alpha"].reshape(-1)[0]) / len(down)
            product = matrix(up.astype(float)) @ matrix(down)
            result[stem] = scale * product
    return result


class TestKohya:
    @pytest.mark.parametrize("dtype", ["keep", "float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("scaling", ["folded", "keep"])
    @pytest.mark.parametrize("options", RAGGED)
    def test_reloaded(self, options: str, scaling: str, dtype: str, tmp_path: Path) -> None:
        file = kohya_file(tmp_path / "a.safetensors")
        before = kohya_deltas(file)
        out = tmp_path / "c.safetensors"
        chosen = {**RAGGED[options], "scaling": scaling, "dtype": dtype}
        report = ao.compress(file, out=out, **chosen)
        kept = "float32" if dtype == "keep" else dtype
        assert report.dtype == kept
        assert_kept(report, before, kohya_deltas(out), dtype=kept)
        assert_counted(report, out)
        tensors = load_file(out)
        for stem, module in report.modules.items():
            if module.rank:
                down = tensors[f"{stem}.lora_down.weight"]
                assert len(down) == module.rank and down.ndim == (len(KOHYA[stem]))
                if scaling == "folded":
                    assert tensors[f"{stem}.alpha"] == module.rank
            else:
                assert not any(name.startswith(f"{stem}.") for name in tensors)
        with safe_open(out, "numpy") as opened:
            told = dict(opened.metadata())
        ranks = {module.rank for module in report.modules.values()} - {0}
        assert told["ss_network_dim"] == (str(*ranks) if len(ranks) == 1 else "Dynamic")
        alphas = {float(v) for name, v in tensors.items() if name.endswith(".alpha")}
        assert told["ss_network_alpha"] == (str(*alphas) if len(alphas) == 1 else "Dynamic")

    def test_float16_alphas(self, tmp_path: Path) -> None:
        """1.1 in 16 bits is 1.0996: the scale is the one stored."""
        file = kohya_file(tmp_path / "a.safetensors", np.float16)
        before = kohya_deltas(file)
        out = tmp_path / "c.safetensors"
        report = ao.compress(file, out=out, energy=0.9, ragged=True, scaling="keep")
        assert report.dtype == "float16"
        assert_kept(report, before, kohya_deltas(out), dtype="float16")

    def test_diffusers_reads_uniform_ones(self, images: Any, tmp_path: Path) -> None:
        """Per-module alphas of attention layers are lost on diffusers 0.42.1 (test_convert)."""
        file = kohya_file(tmp_path / "a.safetensors")
        before = kohya_deltas(file)
        out = tmp_path / "c.safetensors"
        report = ao.compress(file, out=out, rank=3)
        after = {
            f"lora_unet_{name.replace('.', '_')}": matrix(value)
            for name, value in images.deltas(out, "unet").items()
        }
        assert_kept(report, before, after)

    def test_ragged_for_diffusers_by_way_of_its_own_dialect(
        self, images: Any, tmp_path: Path
    ) -> None:
        file = kohya_file(tmp_path / "a.safetensors")
        before = kohya_deltas(file)
        out = tmp_path / "c.safetensors"
        report = ao.compress(file, out=out, energy=0.9, ragged=True, to="diffusers")
        after = {
            f"lora_unet_{name.replace('.', '_')}": matrix(value)
            for name, value in images.deltas(out, "unet").items()
        }
        names = {
            f"lora_unet_{stem.removeprefix('unet.').replace('.', '_')}" for stem in (report.modules)
        }
        assert names == before.keys()
        assert distance(after, before) == pytest.approx(report.error, rel=1e-5)


# ---- targets, measured ---------------------------------------------------------------------------


class TestTargets:
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("allocate", ["uniform", "global", "ragged"])
    def test_a_bound_holds_on_what_is_applied(
        self, allocate: str, dtype: str, models: Any, tmp_path: Path
    ) -> None:
        config = {"r": 6, "lora_alpha": 9, "target_modules": ["linear", "wide", "conv2", "head"]}
        folder = models.trained(tmp_path / "a", 1, **config)
        graded(folder / WEIGHTS)
        before = models.deltas(models.reloaded(folder))
        how = {"ragged": True} if allocate == "ragged" else {"allocate": allocate}
        for bound in (0.5, 0.1):
            out = tmp_path / str(bound)
            report = ao.compress(folder, out=out, max_error=bound, dtype=dtype, **how)
            after = models.deltas(models.reloaded(out))
            measured = distance({n: after.get(n, 0 * v) for n, v in before.items()}, before)
            assert measured <= bound
            assert measured == pytest.approx(report.error, rel=1e-6)

    @pytest.mark.parametrize("allocate", ["uniform", "global", "ragged"])
    @pytest.mark.parametrize("to", ["peft", "kohya"])
    def test_a_size_is_kept_and_one_step_more_would_not_fit(
        self, to: str, allocate: str, tmp_path: Path
    ) -> None:
        if to == "peft":
            from tests.support import pairs, write_peft

            shapes = {f"layers.{n}.q_proj": (24, 16 + n) for n in range(4)}
            adapter = write_peft(tmp_path / "a", pairs(1, shapes, 6), alpha=9)
            graded(adapter / WEIGHTS)
        else:
            adapter = kohya_file(tmp_path / "a.safetensors")
        how = {"ragged": True} if allocate == "ragged" else {"allocate": allocate}
        smallest = ao.compress(adapter, out=tmp_path / "s", rank=1).size
        for index, size in enumerate((smallest + 700, smallest + 2500)):
            out = tmp_path / (f"c{index}" if to == "peft" else f"c{index}.safetensors")
            report = ao.compress(adapter, out=out, size=size, **how)
            file = out / WEIGHTS if to == "peft" else out
            assert file.stat().st_size == report.size <= size
            if allocate == "uniform":
                more = ao.compress(adapter, out=tmp_path / f"m{index}", rank=report.rank + 1)
                assert more.size > size or report.rank == 6
