"""Adapters relative to their base (DoRA, PiSSA and kin) against the libraries that make them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import adapterops as ao
from adapterops import operators
from adapterops.basemodel import open_model
from adapterops.errors import (
    AdapterOpsError,
    FormatError,
    IncompatibleError,
    NumericsError,
    UnsupportedError,
    UsageError,
)
from adapterops.formats import inits, read_adapter
from adapterops.formats.kinds import KINDS
from adapterops.formats.model import AdapterFile, Site
from adapterops.rebased import dora
from adapterops.rebased.dora import Dora, Residual
from adapterops.rebased.rebase import rebase
from tests import ldm_checkpoints, peft_models
from tests.support import pairs, write_kohya, write_peft

pytest.importorskip("peft")
torch = pytest.importorskip("torch")

LAYERS = ["linear", "square", "wide", "conv1", "conv2", "point", "conv3", "embed", "head"]
MODULES = ["LoConModule", "LohaModule", "LokrModule"]  # LyCORIS'


def rows() -> list[tuple[str, str, str]]:
    """(dialect, title, kind) of each case here, for the table of what is supported."""
    return [
        *(("peft", f"DoRA, {layer}", "dora") for layer in LAYERS),
        *(("kohya", f"DoRA, {name}, on outputs and on inputs", "dora") for name in MODULES),
        ("diffusers", "DoRA", "dora"),
        ("mlx", "DoRA, linear", "dora"),
        ("mlx", "DoRA, embedding", "dora"),
        ("peft", "PiSSA", "pissa"),
        ("peft", "OLoRA", "olora"),
        ("peft", "PiSSA or OLoRA with DoRA", "dora"),
        ("peft", "any other initialisation, with what it left of the base", "residual"),
    ]


def dense(site: Site) -> np.ndarray:
    """ΔW of a site as (out, columns)."""
    if site.kind in KINDS:
        B, A = site.factors()
        return site.scale * (B @ A)
    operator = operators.KINDS[site.kind](site)
    operator.check()
    rows = operator.rows(0, operator.shape[0])
    return rows.T if operator.transposed else rows


def laid_out(site: Site, weight: np.ndarray) -> np.ndarray:
    """ΔW in the layout of the base's weight."""
    change = dense(site)
    turned = site.parts["base"].transposed
    return (change.T if turned else change).reshape(weight.shape)


def saved(folder: Path, weights: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Any:
    """A base model on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(value) for name, value in weights.items()}
    save_file(arrays, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return open_model(folder)


def state(model: Any) -> dict[str, np.ndarray]:
    """A model's weights by name."""
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def assert_changes(
    file: AdapterFile,
    base: Any,
    merged: Any,
    tolerance: float,
    names: Mapping[str, str] | None = None,
) -> None:
    """Every site's ΔW is W′ − W, relative to ‖W′ − W‖."""
    before, after = state(base), state(merged)
    for stem, site in file.sites.items():
        name = f"{stem}.weight"
        W = before[name].astype(np.float64)
        expected = after[name].astype(np.float64) - W
        gap = np.linalg.norm(laid_out(site, W) - expected) / np.linalg.norm(expected)
        assert gap < tolerance, (stem, gap)


def merged_by_peft(folder: Path) -> Any:
    """The tiny model as PEFT merges the adapter into it, in float64 once the adapter is loaded."""
    return peft_models.reloaded(folder).merge_and_unload()


def tiny_base(folder: Path, **config: Any) -> Any:
    return saved(folder, state(peft_models.base()), config or None)


CORDA = {"init_lora_weights": "corda"}
DORA = {"use_dora": True}
MAGNITUDE = {"lora_magnitude_vector": np.ones(12, np.float32)}
HEAD = (12, 16)


def plain(
    folder: Path,
    config: Mapping[str, Any],
    extras: Mapping[str, np.ndarray] | None = None,
    module: str = "head",
    shape: tuple[int, int] = HEAD,
) -> Path:
    """A PEFT directory of one module of rank 2, with more in its config and beside its factors."""
    named = {f"base_model.model.{module}.{name}": x for name, x in (extras or {}).items()}
    return write_peft(folder / "a", pairs(1, {module: shape}, 2), extras=named, **config)


class TestDoRAOfPEFT:
    @pytest.mark.parametrize("layer", LAYERS)
    def test_each_layer(self, layer: str, tmp_path: Path) -> None:
        config = {"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": [layer]}
        folder = peft_models.trained(tmp_path / "a", 3, **config)
        file = rebase(read_adapter(folder), tiny_base(tmp_path / "base"))
        assert [(s.kind, s.rank, s.scale) for s in file.sites.values()] == [
            ("dora", min(file.sites[layer].shape), 1.0)
        ]
        assert_changes(file, peft_models.base(), merged_by_peft(folder), 1e-12)

    @pytest.mark.parametrize(
        "config",
        [
            pytest.param({"use_rslora": True}, id="rslora"),
            pytest.param(
                {"rank_pattern": {"head": 5}, "alpha_pattern": {"conv2": 1}}, id="patterns"
            ),
            pytest.param({"init_lora_weights": "pissa", "target_modules": ["head"]}, id="pissa"),
            pytest.param({"init_lora_weights": "olora", "target_modules": ["head"]}, id="olora"),
        ],
    )
    def test_scales_and_inits(self, config: dict[str, Any], tmp_path: Path) -> None:
        given = {"r": 2, "lora_alpha": 3, "target_modules": ["linear", "head", "conv2"], **config}
        folder = peft_models.trained(tmp_path / "a", 4, use_dora=True, **given)
        file = rebase(read_adapter(folder), tiny_base(tmp_path / "base"))
        exact = "init_lora_weights" not in config  # PEFT decomposes in float32
        assert_changes(file, peft_models.base(), merged_by_peft(folder), 1e-12 if exact else 2e-6)

    def test_an_untrained_one_changes_nothing(self, tmp_path: Path) -> None:
        """m is ‖W‖ rounded to float32 and B is 0: what is left is that rounding."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(use_dora=True, target_modules=["head"])
        get_peft_model(peft_models.base(), config).save_pretrained(tmp_path / "a")
        file = rebase(read_adapter(tmp_path / "a"), tiny_base(tmp_path / "base"))
        W = state(peft_models.base())["head.weight"]
        assert np.linalg.norm(dense(file.sites["head"])) < 2e-7 * np.linalg.norm(W)

    @pytest.mark.parametrize("layer", ["head", "wide", "embed", "conv2"])
    def test_rows_do_not_depend_on_the_blocks(
        self, layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = peft_models.trained(tmp_path / "a", 5, use_dora=True, target_modules=[layer])
        file = rebase(read_adapter(folder), tiny_base(tmp_path / "base"))
        whole = Dora(file.sites[layer])
        expected = whole.rows(0, whole.shape[0])
        monkeypatch.setattr(dora, "_BLOCK", 100)
        again = Dora(file.sites[layer])
        again.check()
        parts = [again.rows(i, min(i + 5, again.shape[0])) for i in range(0, again.shape[0], 5)]
        np.testing.assert_allclose(np.concatenate(parts), expected, rtol=0, atol=1e-14)
        np.testing.assert_array_equal(again.single(2, 4), again.rows(2, 4).astype(np.float32))
        assert again.noise(0, 3) == 0.0
        W = state(peft_models.base())[f"{layer}.weight"]
        assert np.linalg.norm(W) < again.beta(0.0) < 1000 * np.linalg.norm(W)


class TestOrientation:
    """Of a square weight only its surroundings say in which order it is stored."""

    @pytest.mark.parametrize(
        "targets",
        [
            pytest.param(["square", "wide"], id="as the others"),
            pytest.param(["square"], id="by the flag"),
            pytest.param(["linear", "head"], id="linear as the others"),
            pytest.param(["linear"], id="linear by the flag"),
        ],
    )
    def test_of_PEFT(self, targets: list[str], tmp_path: Path) -> None:
        folder = peft_models.trained(tmp_path / "a", 6, use_dora=True, target_modules=targets)
        file = rebase(read_adapter(folder), tiny_base(tmp_path / "base"))
        assert {s.parts["base"].transposed for s in file.sites.values()} == {"square" in targets}
        assert_changes(file, peft_models.base(), merged_by_peft(folder), 1e-12)

    @pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", None])
    def test_by_the_kind_of_model(self, kind: str | None, tmp_path: Path) -> None:
        """Without a config, by attention's c_attn beside it; the flag is wrong here."""
        module = "transformer.h.0.attn.c_proj"
        config = {**DORA, "fan_in_fan_out": kind == "gpt_neo"}
        weights = {
            f"{module}.weight": np.ones((12, 12), np.float32),
            "transformer.h.0.attn.c_attn.weight": np.ones((12, 36), np.float32),
        }
        base = saved(tmp_path / "base", weights, {"model_type": kind} if kind else None)
        folder = plain(tmp_path, config, MAGNITUDE, module=module, shape=(12, 12))
        site = rebase(read_adapter(folder), base).sites[module]
        assert site.parts["base"].transposed == (kind != "gpt_neo")

    def test_a_tied_head_is_the_embedding(self, tmp_path: Path) -> None:
        W = np.random.default_rng(1).standard_normal(HEAD).astype(np.float32)
        config = {"model_type": "llama", "tie_word_embeddings": True}
        base = saved(tmp_path / "base", {"model.embed_tokens.weight": W}, config)
        folder = plain(tmp_path, DORA, MAGNITUDE, module="lm_head")
        site = rebase(read_adapter(folder), base).sites["lm_head"]
        np.testing.assert_allclose(np.linalg.norm(dense(site) + W, axis=1), 1.0)

    def test_is_refused_where_others_disagree(self, tmp_path: Path) -> None:
        targets = ["linear", "wide", "head"]
        folder = peft_models.trained(tmp_path / "a", 6, use_dora=True, target_modules=targets)
        with pytest.raises(IncompatibleError, match=r"linear.*nothing says which"):
            rebase(read_adapter(folder), tiny_base(tmp_path / "base"))


class TestInitialisations:
    @pytest.mark.parametrize("init", ["pissa", "olora"])
    @pytest.mark.parametrize(
        "config",
        [
            pytest.param({}, id="plain"),
            pytest.param({"use_rslora": True}, id="rslora"),
            pytest.param(
                {"rank_pattern": {"head": 5}, "alpha_pattern": {"linear": 1}}, id="patterns"
            ),
        ],
    )
    def test_is_what_PEFT_applies(self, init: str, config: dict[str, Any], tmp_path: Path) -> None:
        given = {"r": 3, "lora_alpha": 7, "target_modules": ["linear", "head"], **config}
        folder = peft_models.trained(tmp_path / "a", 7, init_lora_weights=init, **given)
        file = rebase(read_adapter(folder), tiny_base(tmp_path / "base"))
        assert not file.problems
        for site in file.sites.values():
            B, A = site.factors()
            assert site.kind == init and B.shape[1] == A.shape[0] == site.rank == 2 * site.dim
        assert_changes(file, peft_models.base(), merged_by_peft(folder), 2e-6)

    @pytest.mark.parametrize("layer", ["square", "wide"])
    def test_pissa_of_Conv1D(self, layer: str, tmp_path: Path) -> None:
        config = {"r": 3, "init_lora_weights": "pissa", "target_modules": [layer]}
        folder = peft_models.trained(tmp_path / "a", 8, **config)
        file = rebase(read_adapter(folder), tiny_base(tmp_path / "base"))
        assert_changes(file, peft_models.base(), merged_by_peft(folder), 2e-6)

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    @pytest.mark.parametrize("noise", [0.0, 1e-5], ids=["deficient", "nearly"])
    def test_weights_of_low_rank(
        self, init: str, noise: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Singular values beyond W's own rank do not decide anything."""
        generator = torch.Generator().manual_seed(9)

        def draw(*shape: int) -> Any:
            return torch.randn(*shape, generator=generator)

        weight = draw(12, 4) @ draw(4, 16) + noise * draw(12, 16)
        plain = peft_models.base

        def low(kind: str = "tiny") -> Any:
            model = plain(kind)
            model.head.weight.data = weight.clone()
            return model

        monkeypatch.setattr(peft_models, "base", low)
        config = {"r": 6 if init == "pissa" else 4, "target_modules": ["head"]}
        folder = peft_models.trained(tmp_path / "a", 9, init_lora_weights=init, **config)
        file = rebase(read_adapter(folder), tiny_base(tmp_path / "base"))
        assert_changes(file, low(), merged_by_peft(folder), 5e-6)

    def test_an_untrained_one_changes_nothing(self, tmp_path: Path) -> None:
        """ΔW is 0 up to the float32 in which PEFT decomposes, though sBA is most of W."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(init_lora_weights="pissa", r=8, target_modules=["head"])
        get_peft_model(peft_models.base(), config).save_pretrained(tmp_path / "a")
        file = rebase(read_adapter(tmp_path / "a"), tiny_base(tmp_path / "base"))
        W = state(peft_models.base())["head.weight"]
        assert np.linalg.norm(dense(file.sites["head"])) < 2e-6 * np.linalg.norm(W)

    def test_the_rounding_of_a_16_bit_base_is_named(self, tmp_path: Path) -> None:
        config = {"init_lora_weights": "olora", "target_modules": ["head"]}
        folder = peft_models.trained(tmp_path / "a", 7, **config)
        half = {n: v.astype(np.float16) for n, v in state(peft_models.base()).items()}
        file = rebase(read_adapter(folder), saved(tmp_path / "base", half))
        assert any("rounded what it left of the base to float16" in note for note in file.notes)
        assert file.dtype == "F32"

    def test_Lanczos_finds_the_same_subspace(self) -> None:
        rng = np.random.default_rng(10)
        W = rng.standard_normal((600, 40)) @ rng.standard_normal((40, 560)) / 10
        W += 1e-3 * rng.standard_normal(W.shape)
        U, values, Vh = np.linalg.svd(W, full_matrices=False)
        B, A = inits.pissa(W, 12, 0.5)
        expected = (U[:, :12] * values[:12]) @ Vh[:12] / 0.5
        assert np.linalg.norm(B @ A - expected) < 1e-12 * np.linalg.norm(expected)

    def test_Lanczos_of_a_weight_without_rank(self) -> None:
        W = np.zeros((600, 560))
        W[:3, :5] = np.arange(15).reshape(3, 5)
        B, A = inits.pissa(W, 12, 1.0)
        assert np.linalg.norm(B @ A - W) < 1e-12 * np.linalg.norm(W)

    def test_olora_of_a_permuted_sign_is_the_same(self) -> None:
        """Only the product counts: any orthonormal basis of the first columns gives it."""
        W = np.random.default_rng(11).standard_normal((20, 14))
        Q, R = np.linalg.qr(W)
        B, A = inits.olora(W, 5, 3.0)
        np.testing.assert_allclose(B @ A, Q[:, :5] @ R[:5], atol=1e-13)

    @pytest.mark.parametrize(
        ("start", "W"),
        [
            pytest.param(inits.pissa, np.eye(16), id="pissa of equal singular values"),
            pytest.param(inits.olora, np.ones((16, 16)), id="olora of equal columns"),
        ],
    )
    def test_what_float32_cannot_tell_is_refused(self, start: Any, W: np.ndarray) -> None:
        with pytest.raises(NumericsError, match=r"depends on the machine.*--residual"):
            start(W, 4, 1.0)


def _shown(layer: Any, rank: int) -> None:
    """What PEFT's preprocess_corda leaves at a layer: leading parts of WC and of VᵀC⁻¹."""
    inputs = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(2))
    covariance = inputs.T @ inputs / 64
    U, S, Vh = torch.linalg.svd(layer.weight.data @ covariance, full_matrices=False)
    V = (Vh @ torch.linalg.inv(covariance)).T
    layer.eigens = SimpleNamespace(U_WC=U[:, :rank], S_WC=S[:rank], V_WC=V[:, :rank])


def trained_here(init: str, **config: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """A PEFT model with a moved base and random factors, and its base as it is now."""
    from peft import LoraConfig, get_peft_model

    base = peft_models.base()
    given = {"r": 3, "lora_alpha": 5, "target_modules": ["head", "linear"], **config}
    if init == "corda":
        from peft.tuners.lora.config import CordaConfig

        given["corda_config"] = CordaConfig()
        for name in given["target_modules"]:
            _shown(getattr(base, name), given["r"])
    adapted = get_peft_model(base, LoraConfig(init_lora_weights=init, **given))
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    left = {
        name: layer.get_base_layer().weight.detach().numpy().copy()
        for name, layer in peft_models.layers(adapted).items()
    }
    return adapted, left


class TestResiduals:
    @pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
    @pytest.mark.parametrize("init", ["corda", "pissa_niter_2", "pissa", "olora"])
    def test_stands_in_for_the_initialisation(
        self, init: str, use_dora: bool, tmp_path: Path
    ) -> None:
        adapted, left = trained_here(init, use_dora=use_dora)
        adapted.save_pretrained(tmp_path / "a")
        changed = {f"{name}.weight": value for name, value in left.items()}
        before = state(peft_models.base())
        assert any(not np.array_equal(before[name], value) for name, value in changed.items())
        residual = saved(tmp_path / "residual", {**before, **changed})
        file = rebase(read_adapter(tmp_path / "a"), tiny_base(tmp_path / "base"), residual)
        assert {s.kind for s in file.sites.values()} == {"dora" if use_dora else "residual"}
        merged = adapted.double().merge_and_unload()
        assert_changes(file, peft_models.base(), merged, 1e-12)

    def test_lies_as_the_base_does(self, tmp_path: Path) -> None:
        """People save it without its config.json, which told the order of a square weight."""
        module = "transformer.h.0.attn.c_proj"
        config = {**CORDA, "fan_in_fan_out": False}
        folder = plain(tmp_path, config, module=module, shape=(12, 12))
        W, R = np.random.default_rng(3).standard_normal((2, 12, 12)).astype(np.float32)
        base = saved(tmp_path / "base", {f"{module}.weight": W}, {"model_type": "gpt2"})
        residual = saved(tmp_path / "residual", {f"{module}.weight": R})
        site = rebase(read_adapter(folder), base, residual).sites[module]
        assert site.inner is not None
        expected = R.astype(float) - W + dense(site.inner).T
        np.testing.assert_allclose(laid_out(site, W), expected, atol=1e-13)

    def test_takes_the_rounding_along(self, tmp_path: Path) -> None:
        """Derived from the base, ΔW lacks what the initialisation rounded away; here it is in."""
        adapted, left = trained_here("pissa")
        adapted.save_pretrained(tmp_path / "a")
        rounded = {f"{name}.weight": value.astype(np.float16) for name, value in left.items()}
        base = tiny_base(tmp_path / "base")
        residual = saved(tmp_path / "residual", rounded)
        derived = rebase(read_adapter(tmp_path / "a"), base).sites["head"]
        kept = rebase(read_adapter(tmp_path / "a"), base, residual).sites["head"]
        lost = rounded["head.weight"].astype(np.float64) - left["head"]
        assert (
            np.linalg.norm(dense(kept) - dense(derived) - lost) < 1e-5 * np.linalg.norm(lost) + 1e-6
        )

    def test_beta_is_of_everything_that_went_in(self, tmp_path: Path) -> None:
        adapted, left = trained_here("olora")
        adapted.save_pretrained(tmp_path / "a")
        residual = saved(tmp_path / "r", {f"{n}.weight": v for n, v in left.items()})
        file = rebase(read_adapter(tmp_path / "a"), tiny_base(tmp_path / "base"), residual)
        W = np.linalg.norm(state(peft_models.base())["head.weight"])
        operator = Residual(file.sites["head"])
        assert W < operator.beta(0.0) < 100 * W and operator.noise(0, 1) == 0.0
        np.testing.assert_array_equal(operator.single(0, 2), operator.rows(0, 2).astype("f4"))

    def test_the_base_itself_is_none(self, tmp_path: Path) -> None:
        base = tiny_base(tmp_path / "base")
        with pytest.raises(UsageError, match="are one file"):
            rebase(read_adapter(plain(tmp_path, CORDA)), base, open_model(tmp_path / "base"))

    def test_of_another_shape(self, tmp_path: Path) -> None:
        wrong = saved(tmp_path / "r", {"head.weight": np.ones((12, 17), np.float32)})
        with pytest.raises(IncompatibleError, match=r"12 x 16.*12 x 17"):
            rebase(read_adapter(plain(tmp_path, CORDA)), tiny_base(tmp_path / "base"), wrong)


UNET = "lora_unet_mid_q"


class TestLyCORIS:
    """The oracle is the library's `forward`: every basis input through the module."""

    @staticmethod
    def made(name: str, layer: str, **options: Any) -> tuple[Any, Any]:
        """A DoRA module, all its weights random and float32, in float64; and its base layer."""
        modules = pytest.importorskip("lycoris.modules")
        torch.manual_seed(3)
        sizes = {"linear": (30, 24), "square": (24, 24)}
        base = (
            torch.nn.Conv2d(12, 24, (3, 2)) if layer == "conv2" else torch.nn.Linear(*sizes[layer])
        )
        given = {"lora_dim": 2, "alpha": 3.0, "weight_decompose": True, **options}
        module = getattr(modules, name)(UNET, base, 1.0, **given)
        with torch.no_grad():
            for value in module.parameters():
                value.copy_(0.3 * torch.randn(value.shape))
        return module.double().eval(), base.double()

    @pytest.mark.parametrize("by_output", [True, False], ids=["outputs", "inputs"])
    @pytest.mark.parametrize("layer", ["linear", "square", "conv2"])
    @pytest.mark.parametrize("name", MODULES)
    def test_modules(self, name: str, layer: str, by_output: bool, tmp_path: Path) -> None:
        module, base = self.made(name, layer, wd_on_out=by_output)
        tensors = {
            f"{UNET}.{role}": value.detach().float().numpy()
            for role, value in module.custom_state_dict().items()
        }
        save_file(tensors, tmp_path / "a.safetensors", {"ss_network_args": '{"dora_wd": "True"}'})
        weight = base.weight.detach().float().numpy()
        model = saved(tmp_path / "base", {"mid.q.weight": weight})
        file = rebase(read_adapter(tmp_path / "a.safetensors"), model)
        channels, *kernel = weight.shape[1:]
        inputs = torch.eye(weight[0].size, dtype=torch.float64)
        with torch.no_grad():
            shaped = inputs.reshape(-1, channels, *kernel) if kernel else inputs
            expected = (module(shaped) - base(shaped)).reshape(len(inputs), -1).T.numpy()
        gap = np.linalg.norm(dense(file.sites[UNET]) - expected) / np.linalg.norm(expected)
        assert gap < 1e-12
        assert json.loads(file.metadata["ss_network_args"]) == {}

    def test_only_the_modules_with_magnitudes_change(self, tmp_path: Path) -> None:
        factors = pairs(4, {UNET: (24, 30), "lora_unet_other": (6, 8)}, 2)
        path = write_kohya(tmp_path / "a.safetensors", factors, alpha=1.0)
        plain_sites = read_adapter(path).sites
        tensors = {**_loaded(path), f"{UNET}.dora_scale": np.ones((24, 1), np.float32)}
        save_file(tensors, path)
        weight = np.random.default_rng(5).standard_normal((24, 30)).astype(np.float32)
        base = saved(tmp_path / "base", {"mid.q.weight": weight})  # and nothing of the other
        file = rebase(read_adapter(path), base)
        other = file.sites["lora_unet_other"]
        assert (file.sites[UNET].kind, other.kind) == ("dora", "lora")
        np.testing.assert_array_equal(dense(other), dense(plain_sites["lora_unet_other"]))

    @pytest.mark.parametrize(
        ("shape", "fits"),
        [
            pytest.param((24,), True, id="PEFT's, converted"),
            pytest.param((30,), False, id="inputs without a second dimension"),
            pytest.param((24, 30), False, id="a whole matrix"),
            pytest.param((1, 29), False, id="another width"),
            pytest.param((1, 15), False, id="half of the inputs"),
            pytest.param((1, 30), True, id="inputs"),
            pytest.param((24, 1), True, id="outputs"),
        ],
    )
    def test_shapes_of_magnitudes(self, shape: tuple[int, ...], fits: bool, tmp_path: Path) -> None:
        path = write_kohya(tmp_path / "a.safetensors", pairs(4, {UNET: (24, 30)}, 2), alpha=1.0)
        magnitude = np.ones(shape, np.float32)
        save_file({**_loaded(path), f"{UNET}.dora_scale": magnitude}, path)
        base = saved(tmp_path / "base", {"mid.q.weight": np.ones((24, 30), np.float32)})
        if not fits:
            with pytest.raises(FormatError, match="no magnitude of a weight of 24 x 30"):
                rebase(read_adapter(path), base)
            return
        W = dense(rebase(read_adapter(path), base).sites[UNET]) + 1.0
        np.testing.assert_allclose(np.linalg.norm(W, axis=0 if shape == (1, 30) else 1), 1.0)


def _loaded(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return dict(load_file(path))


@pytest.mark.parametrize("use_dora", [True, None], ids=["said", "unsaid"])
def test_diffusers_beside_a_pipeline(use_dora: bool | None, tmp_path: Path) -> None:
    """DoRA as diffusers saves it: PEFT's tensors below the component, the config in the header."""
    rng = np.random.default_rng(7)
    W = rng.standard_normal((24, 30)).astype(np.float32)
    A, B = rng.standard_normal((2, 30)), rng.standard_normal((24, 2))
    m = rng.uniform(1, 2, 24)
    tensors = {"lora_A.weight": A, "lora_B.weight": B, "lora_magnitude_vector": m}
    config = {"unet.r": 2, "unet.lora_alpha": 3.0}
    if use_dora:
        config["unet.use_dora"] = True
    path = tmp_path / "a.safetensors"
    save_file(
        {f"unet.mid_block.q.{name}": x.astype(np.float32) for name, x in tensors.items()},
        path,
        {"lora_adapter_metadata": json.dumps(config)},
    )
    saved(tmp_path / "base" / "unet", {"mid_block.q.weight": W}, {"_class_name": "UNet"})
    file = rebase(read_adapter(path), open_model(tmp_path / "base"))
    adapted = W + 1.5 * (B.astype("f4").astype(float) @ A.astype("f4"))
    scaled = adapted * (m.astype("f4") / np.linalg.norm(adapted, axis=1))[:, None]
    found = dense(file.sites["unet.mid_block.q"])
    np.testing.assert_allclose(found, scaled - W, atol=1e-13)
    assert set(file.config) == {"unet.r", "unet.lora_alpha"}


class TestOtherNames:
    """The lookup of baking, where the weight is a tensor of its own."""

    @staticmethod
    def file(path: Path, stem: str, shape: tuple[int, int]) -> AdapterFile:
        kohya = stem.startswith("lora_")
        B, A = pairs(3, {stem: shape}, 2)[stem]
        m = np.full(shape[0], 2, np.float32)
        if kohya:
            write_kohya(path, {stem: (B, A)}, alpha=2.0)
            save_file({**_loaded(path), f"{stem}.dora_scale": m[:, None]}, path)
        else:
            names = {"lora_A.weight": A, "lora_B.weight": B, "lora_magnitude_vector": m}
            tensors = {f"{stem}.{name}": value for name, value in names.items()}
            save_file(tensors, path, {"lora_adapter_metadata": json.dumps({"unet.r": 2})})
        return read_adapter(path)

    @staticmethod
    def sd(folder: Path, *, second: bool = False) -> Any:
        size = ldm_checkpoints.TINY
        shapes = ldm_checkpoints.sd2(size, 16, 2) if second else ldm_checkpoints.sd1(size, 16, 2)
        shapes = {n: s for n, s in shapes.items() if not n.startswith("first_stage_model")}
        rng = np.random.default_rng(5)
        values = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
        return saved(folder / "base", values)

    @pytest.mark.parametrize(
        ("stem", "shape", "name"),
        [
            pytest.param(
                "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
                (32, 32),
                "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
                id="diffusers",
            ),
            pytest.param(
                "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k",
                (32, 16),
                "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
                id="kohya",
            ),
            pytest.param(
                "lora_te_text_model_encoder_layers_1_mlp_fc1",
                (64, 16),
                "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight",
                id="text encoder",
            ),
        ],
    )
    def test_on_a_checkpoint_in_one_file(
        self, stem: str, shape: tuple[int, int], name: str, tmp_path: Path
    ) -> None:
        base = self.sd(tmp_path)
        file = rebase(self.file(tmp_path / "a.safetensors", stem, shape), base)
        assert file.sites[stem].parts["base"].name == name
        W = base.tensors[name].read().astype(float)
        norms = np.linalg.norm(W.reshape(shape) + dense(file.sites[stem]), axis=1)
        np.testing.assert_allclose(norms, 2)

    def test_a_weight_fused_with_others(self, tmp_path: Path) -> None:
        """open_clip's in_proj_weight."""
        stem = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
        file = self.file(tmp_path / "a.safetensors", stem, (16, 16))
        with pytest.raises(UnsupportedError, match=r"in_proj_weight', which holds other modules"):
            rebase(file, self.sd(tmp_path, second=True))

    @pytest.mark.parametrize(
        ("own", "there", "error"),
        [
            pytest.param("q_proj", ["qkv_proj"], "qkv_proj', which holds other modules", id="q"),
            pytest.param(
                "qkv_proj", ["q_proj", "k_proj"], r"in 2 tensors, '.*k_proj' and", id="qkv"
            ),
            pytest.param("up_proj", ["gate_up_proj"], "which holds other modules", id="up"),
        ],
    )
    def test_a_language_model_that_fuses(
        self, own: str, there: list[str], error: str, tmp_path: Path
    ) -> None:
        stem = f"model.layers.0.{own}"
        m = {f"base_model.model.{stem}.lora_magnitude_vector": np.ones(6, np.float32)}
        write_peft(tmp_path / "a", pairs(1, {stem: (6, 4)}, 2), extras=m, use_dora=True)
        names = {f"layers.0.{name}.weight": np.ones((18, 4), np.float32) for name in there}
        base = saved(tmp_path / "base", names)
        with pytest.raises(UnsupportedError, match=error):
            rebase(read_adapter(tmp_path / "a"), base)


class TestMLX:
    """mlx-lm's formula in numpy (`tuner/dora.py`): one norm for each row of the stored weight."""

    @pytest.mark.parametrize("module", ["layers.0.q_proj", "embed_tokens"])
    def test_rows_of_the_stored_weight(self, module: str, tmp_path: Path) -> None:
        rng = np.random.default_rng(6)
        rows, columns = 20, 14
        W = rng.standard_normal((rows, columns)).astype(np.float32)
        embedding = module == "embed_tokens"
        A = rng.standard_normal((rows if embedding else columns, 3)).astype(np.float32)
        B = rng.standard_normal((3, columns if embedding else rows)).astype(np.float32)
        m = rng.uniform(1, 2, rows).astype(np.float32)
        folder = tmp_path / "a"
        folder.mkdir()
        tensors = {f"{module}.lora_a": A, f"{module}.lora_b": B, f"{module}.m": m}
        save_file(
            {n: np.ascontiguousarray(x) for n, x in tensors.items()},
            folder / "adapters.safetensors",
        )
        config = {"fine_tune_type": "dora", "lora_parameters": {"rank": 3, "scale": 2.5}}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        file = rebase(read_adapter(folder), saved(tmp_path / "b", {f"{module}.weight": W}))
        product = A.astype(float) @ B
        adapted = W + 2.5 * (product if embedding else product.T)
        expected = (m / np.linalg.norm(adapted, axis=1))[:, None] * adapted - W
        found = laid_out(file.sites[module], W)
        np.testing.assert_allclose(found, expected, atol=1e-13)


class TestConvert:
    """From adapter and base to a plain adapter that PEFT loads on the base as it is."""

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_initialisations_lose_nothing(self, init: str, tmp_path: Path) -> None:
        config = {"r": 3, "lora_alpha": 7, "target_modules": ["linear", "head"]}
        folder = peft_models.trained(tmp_path / "a", 7, init_lora_weights=init, **config)
        saved(tmp_path / "base", state(peft_models.base()))
        out = tmp_path / "out"
        report = ao.convert(folder, base=tmp_path / "base", out=out, dtype="float32")
        assert report.rank == 6 and report.error < 1e-6
        _assert_plain(out, 6)
        found = peft_models.outputs(peft_models.reloaded(out))
        wanted = peft_models.outputs(peft_models.reloaded(folder))
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("use_rslora", [False, True])
    def test_dora_to_the_error_that_is_reported(self, use_rslora: bool, tmp_path: Path) -> None:
        config = {"r": 3, "target_modules": ["wide", "conv2", "embed"], "use_rslora": use_rslora}
        folder = peft_models.trained(tmp_path / "a", 8, use_dora=True, **config)
        saved(tmp_path / "base", state(peft_models.base()))
        out = tmp_path / "out"
        report = ao.convert(folder, base=tmp_path / "base", out=out, rank=6, dtype="float32")
        _assert_plain(out, 6)
        before, after = state(peft_models.base()), state(merged_by_peft(folder))
        found = peft_models.deltas(peft_models.reloaded(out))
        lost = whole = best = 0.0
        for name, change in found.items():
            wanted = after[f"{name}.weight"] - before[f"{name}.weight"].astype(np.float64)
            values = np.linalg.svd(wanted.reshape(len(wanted), -1), compute_uv=False)
            lost += float(np.sum((change - wanted) ** 2))
            whole += float(np.sum(wanted**2))
            best += float(np.sum(values[6:] ** 2))
        assert report.error == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
        assert lost < 1.001 * best

    def test_dora_without_a_rank_is_refused(self, tmp_path: Path) -> None:
        config = {"use_dora": True, "target_modules": ["head"]}
        folder = peft_models.trained(tmp_path / "a", 8, **config)
        saved(tmp_path / "base", state(peft_models.base()))
        with pytest.raises(UsageError, match="--rank"):
            ao.convert(folder, base=tmp_path / "base", out=tmp_path / "out")

    def test_kohya_is_no_copy(self, tmp_path: Path) -> None:
        """A one-file dialect is copied where nothing changes; here the kind does."""
        path = write_kohya(tmp_path / "a.safetensors", pairs(4, {UNET: (24, 30)}, 2), alpha=1.0)
        magnitude = np.ones((24, 1), np.float32)
        save_file({**_loaded(path), f"{UNET}.dora_scale": magnitude}, path)
        saved(tmp_path / "base", {"mid.q.weight": np.ones((24, 30), np.float32)})
        out = tmp_path / "out.safetensors"
        with pytest.raises(UsageError, match="--rank"):
            ao.convert(path, base=tmp_path / "base", out=out)
        ao.convert(path, base=tmp_path / "base", out=out, rank=5)
        assert set(_loaded(out)) == {
            f"{UNET}.{name}" for name in ("lora_up.weight", "lora_down.weight", "alpha")
        }


def _assert_plain(folder: Path, rank: int) -> None:
    """The written config says nothing of the source's kind."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config.get("use_dora") and config["init_lora_weights"] is True
    assert config["r"] == rank and config["use_rslora"] is False
    assert not read_adapter(folder).problems


class TestRefusals:
    def test_an_ordinary_adapter_is_returned_as_it_is(self, tmp_path: Path) -> None:
        file = read_adapter(plain(tmp_path, {}))
        assert rebase(file, tiny_base(tmp_path / "base")) is file

    @pytest.mark.parametrize(
        ("init", "why"),
        [
            ("pissa_niter_16", "is random"),
            ("corda", "the data it was shown"),
            ("lora_ga", "the gradients it was shown"),
            ("loftq", "it quantised them"),
            ("olora_2", "is not known here"),
        ],
    )
    def test_what_the_base_does_not_tell(self, init: str, why: str, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedError, match=rf"head.*{init}.*{why}.*--residual"):
            _rebased(tmp_path, {"init_lora_weights": init})

    def test_other_problems_come_first(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedError, match="aLoRA"):
            _rebased(tmp_path, {**DORA, "alora_invocation_tokens": [1]}, MAGNITUDE)

    @pytest.mark.parametrize(
        ("config", "extras", "error", "says"),
        [
            pytest.param(DORA, {}, FormatError, "use_dora is true.*no magnitude", id="none"),
            pytest.param(
                {"use_dora": False},
                MAGNITUDE,
                FormatError,
                "use_dora is false.*a magn",
                id="unsaid",
            ),
            pytest.param(
                {**DORA, "lora_bias": True},
                {**MAGNITUDE, "lora_B.bias": np.ones(12, np.float32)},
                UnsupportedError,
                "lora_bias",
                id="lora_bias",
            ),
            pytest.param(
                DORA,
                {"lora_magnitude_vector": np.ones(11, np.float32)},
                FormatError,
                r"\[11\].*12 x 16",
                id="a magnitude of another size",
            ),
            pytest.param(
                {"init_lora_weights": "pissa", "lora_alpha": 0},
                {},
                IncompatibleError,
                "scale is 0",
                id="no scale",
            ),
        ],
    )
    def test_contradictions(
        self,
        config: dict[str, Any],
        extras: dict[str, np.ndarray],
        error: type[AdapterOpsError],
        says: str,
        tmp_path: Path,
    ) -> None:
        with pytest.raises(error, match=says) as caught:
            _rebased(tmp_path, config, extras)
        assert "head" in str(caught.value)

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_embeddings_have_no_such_initialisation(self, init: str, tmp_path: Path) -> None:
        folder = peft_models.trained(tmp_path / "a", 1, target_modules=["embed"])
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": init}))
        with pytest.raises(UnsupportedError, match="nothing that PEFT trains"):
            rebase(read_adapter(folder), tiny_base(tmp_path / "base"))

    def test_olora_of_Conv1D(self, tmp_path: Path) -> None:
        config = {"init_lora_weights": "olora", "fan_in_fan_out": True}
        folder = plain(tmp_path, config, module="square", shape=(12, 12))
        with pytest.raises(UnsupportedError, match=r"square.*Conv1D.*--residual"):
            rebase(read_adapter(folder), tiny_base(tmp_path / "base"))

    @pytest.mark.parametrize(
        ("weights", "error", "says"),
        [
            pytest.param(
                {"other.weight": np.ones(HEAD, "f4")},
                IncompatibleError,
                r"1 of 1 modules.*'head' here, 'other.weight'",
                id="a missing module",
            ),
            pytest.param(
                {"head.weight": np.ones((12, 17), "f4")},
                IncompatibleError,
                r"head.*12 x 16.*12 x 17",
                id="another shape",
            ),
            pytest.param(
                {"head.weight": np.ones(HEAD, "i1")},
                UnsupportedError,
                "quantised.*head.weight",
                id="a quantised base",
            ),
            pytest.param(
                {"head.weight": np.ones(HEAD, "i2")},
                UnsupportedError,
                "head.*I16.*no number format",
                id="integers",
            ),
        ],
    )
    def test_bases_that_do_not_fit(
        self,
        weights: dict[str, np.ndarray],
        error: type[AdapterOpsError],
        says: str,
        tmp_path: Path,
    ) -> None:
        base = saved(tmp_path / "base", weights)
        with pytest.raises(error, match=says):
            rebase(read_adapter(plain(tmp_path, DORA, MAGNITUDE)), base)

    @pytest.mark.parametrize(
        ("weight", "magnitude", "says"),
        [
            pytest.param(np.nan, 1.0, r"192 of 192 values of head.weight are NaN", id="the base"),
            pytest.param(1.0, np.inf, r"12 of 12 values of .*magnitude_vector", id="magnitudes"),
        ],
    )
    def test_values_that_are_no_numbers(
        self, weight: float, magnitude: float, says: str, tmp_path: Path
    ) -> None:
        base = saved(tmp_path / "base", {"head.weight": np.full(HEAD, weight, "f4")})
        extras = {"lora_magnitude_vector": np.full(12, magnitude, "f4")}
        file = rebase(read_adapter(plain(tmp_path, DORA, extras)), base)
        with pytest.raises(NumericsError, match=says) as caught:
            Dora(file.sites["head"]).check()
        assert caught.value.module == "head"

    def test_a_base_of_nan_below_pissa(self, tmp_path: Path) -> None:
        base = saved(tmp_path / "base", {"head.weight": np.full(HEAD, np.nan, "f4")})
        file = rebase(read_adapter(plain(tmp_path, {"init_lora_weights": "pissa"})), base)
        with pytest.raises(NumericsError, match=r"192 of 192 values of head.weight"):
            file.sites["head"].factors()

    def test_units_without_direction(self, tmp_path: Path) -> None:
        """A zero row can only have the magnitude 0."""
        folder = plain(tmp_path, DORA, MAGNITUDE)
        pair = _loaded(folder / "adapter_model.safetensors")
        pair["base_model.model.head.lora_B.weight"][3] = 0
        save_file(pair, folder / "adapter_model.safetensors")
        W = np.ones(HEAD, "f4")
        W[3] = 0
        base = saved(tmp_path / "base", {"head.weight": W})
        with pytest.raises(NumericsError, match="unit 3 of the weight is zero"):
            Dora(rebase(read_adapter(folder), base).sites["head"]).check()
        pair["base_model.model.head.lora_magnitude_vector"][3] = 0
        save_file(pair, folder / "adapter_model.safetensors")
        site = rebase(read_adapter(folder), base).sites["head"]
        assert np.all(dense(site)[3] == 0) and np.all(np.isfinite(dense(site)))

    @pytest.mark.parametrize("config", [DORA, {"init_lora_weights": "pissa"}], ids=["dora", "init"])
    def test_the_config_no_longer_says_so(self, config: dict[str, Any], tmp_path: Path) -> None:
        extras = MAGNITUDE if config == DORA else {}
        file = _rebased(tmp_path, config, extras)
        assert not {"use_dora", "init_lora_weights"} & set(file.config)
        assert file.problems == file.relative == ()


def _rebased(
    folder: Path, config: dict[str, Any], extras: dict[str, np.ndarray] | None = None
) -> AdapterFile:
    return rebase(read_adapter(plain(folder, config, extras)), tiny_base(folder / "base"))
