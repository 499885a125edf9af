"""Kinds that PEFT saves beside LoRA: LoHa, LoKr, AdaLoRA, MultiheadAttention, old MergedLinear.

PEFT makes each adapter on a tiny model; ΔW is what the reloaded model's `get_delta_weight` says in
float64, and a formula of its own on the file's tensors says the same before ours is asked.
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterops as ao
from adapterops.errors import IncompatibleError, UnsupportedError
from adapterops.formats import open_adapter_file
from tests.kinds import assert_dora, dense, gap, read, write
from tests.support import distance, load_file, pairs, read_peft, weighted, write_peft

pytest.importorskip("peft")
PREFIX = "base_model.model."
EXACT = 1e-13
_NOISE = (
    "fan_in_fan_out is set to",
    "The following (rank|alpha)_pattern keys did not match",  # AdaLoRA's lists of kept ranks
    "Adapter 'default': .*invalid shape",  # of rank 0, after AdaLoRA pruned all
    "LoRA adapter added to ConvNd layer with groups > 1",
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        yield


def base() -> Any:
    """A model with one of each layer that LoHa, LoKr and AdaLoRA adapt."""
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 20)
            self.tall = nn.Linear(20, 36)
            self.wide = Conv1D(24, 36)
            self.conv = nn.Conv2d(12, 24, 3)
            self.rect = nn.Conv2d(12, 24, (3, 2))
            self.point = nn.Conv2d(12, 24, 1)
            self.conv1 = nn.Conv1d(12, 24, 3)
            self.grouped = nn.Conv2d(6, 8, 3, groups=2)
            self.mha = nn.MultiheadAttention(16, 2)

        def forward(self, x: Any) -> Any:
            image = torch.nn.functional.pad(x, (0, 96)).reshape(-1, 12, 3, 3)
            return self.wide(self.tall(self.linear(x))), self.conv(image)

    torch.manual_seed(1)
    return Tiny().eval()


def saved(folder: Path, config: Any, seed: int = 0) -> Path:
    """An adapter as PEFT saves it, every trained number random and none zero."""
    import torch
    from peft import get_peft_model

    with quiet():
        adapted = get_peft_model(base(), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in adapted.parameters():
                if value.requires_grad:
                    value.copy_(0.4 * torch.randn(value.shape, generator=generator))
        adapted.save_pretrained(folder)
    return folder


def deltas(folder: Path) -> dict[str, np.ndarray]:
    """ΔW by module path as PEFT reloads it in float64, (out, channels · kernel)."""
    from peft import PeftModel

    with quiet():
        model = PeftModel.from_pretrained(base(), str(folder)).double().eval()
    result = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight") and name.startswith(PREFIX):
            change = layer.get_delta_weight("default").detach().numpy()
            turned = getattr(layer, "fan_in_fan_out", False)
            flat = change.T if turned else change.reshape(len(change), -1)
            result[name.removeprefix(PREFIX)] = flat
    return result


def tensors(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """The file's tensors by module path and suffix."""
    result: dict[str, dict[str, np.ndarray]] = {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        stem, _, suffix = name.removeprefix(PREFIX).rpartition(".")
        result.setdefault(stem, {})[suffix] = value
    return result


@dataclass(frozen=True)
class Lycoris:
    """A LoHa or LoKr adapter of PEFT; `scales` by module where they are not alpha / r."""

    title: str
    name: str
    config: Mapping[str, Any]
    targets: tuple[str, ...] = ("linear", "tall", "conv", "rect", "point", "conv1")
    scales: Mapping[str, float] = field(default_factory=dict)

    def make(self, folder: Path, seed: int = 0, **changed: Any) -> Path:
        import peft

        kind = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[self.name]
        options = {"target_modules": [*self.targets], **self.config, **changed}
        return saved(folder, kind(**options), seed)

    def scale(self, module: str) -> float:
        return self.scales.get(module, self.config["alpha"] / self.config["r"])


LYCORIS = (
    Lycoris("LoHa", "loha", {"r": 2, "alpha": 3}),
    Lycoris(
        "LoHa, use_effective_conv2d", "loha", {"r": 2, "alpha": 3, "use_effective_conv2d": True}
    ),
    Lycoris(
        "LoHa, patterns",
        "loha",
        {
            "r": 2,
            "alpha": 3,
            "rank_pattern": {"linear": 4, "^conv$": 1},
            "alpha_pattern": {"tall": 5, "^conv$": 7},
        },
        scales={"linear": 0.75, "tall": 2.5, "conv": 7.0},
    ),
    Lycoris("LoKr", "lokr", {"r": 2, "alpha": 3}, ("linear", "tall", "conv", "rect", "point")),
    Lycoris("LoKr, decompose_both", "lokr", {"r": 1, "alpha": 3, "decompose_both": True}),
    Lycoris("LoKr, decompose_factor", "lokr", {"r": 2, "alpha": 3, "decompose_factor": 2}),
    Lycoris(
        "LoKr, use_effective_conv2d",
        "lokr",
        {"r": 2, "alpha": 3, "use_effective_conv2d": True, "decompose_both": True},
    ),
    Lycoris(
        "LoKr, both full: scaled by the config's rank all the same",
        "lokr",
        {"r": 64, "alpha": 8},
        ("linear", "tall", "conv", "rect", "point"),
    ),
    Lycoris(
        "LoKr, patterns",
        "lokr",
        {
            "r": 2,
            "alpha": 3,
            "rank_pattern": {"tall": 64, "linear": 1},
            "alpha_pattern": {"linear": 5, "tall": 16},
        },
        ("linear", "tall", "rect"),
        scales={"tall": 0.25, "linear": 5.0},
    ),
)
by_case = pytest.mark.parametrize("case", LYCORIS, ids=lambda case: case.title)


class TestLycoris:
    @by_case
    def test_the_formula_is_peft_s(self, case: Lycoris, tmp_path: Path) -> None:
        """The oracle of the next tests; none of our code is involved."""
        folder = case.make(tmp_path)
        theirs = deltas(folder)
        assert sorted(theirs) == sorted(case.targets)
        for module, arrays in tensors(folder).items():
            assert gap(case.scale(module) * dense(arrays), theirs[module]) < EXACT

    @by_case
    def test_is_read_exactly(self, case: Lycoris, tmp_path: Path) -> None:
        folder = case.make(tmp_path)
        assert distance(read(folder), deltas(folder)) < EXACT
        file = open_adapter_file(folder)
        assert file.dialect == "peft"
        for module, site in file.sites.items():
            assert site.kind == case.name
            assert site.scale == case.scale(module)

    @by_case
    def test_merges_exactly(self, case: Lycoris, tmp_path: Path) -> None:
        """Into a plain PEFT LoRA, read by its own config."""
        a = case.make(tmp_path / "a", 1)
        b = case.make(tmp_path / "b", 2, alpha=1.5)
        ao.merge([a, b], [0.7, -0.3], out=tmp_path / "m", dtype="float32", rank=36)
        wanted = weighted((0.7, deltas(a)), (-0.3, deltas(b)))
        assert distance(read_peft(tmp_path / "m"), wanted) < 1e-6
        config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        assert not {"use_effective_conv2d", "decompose_both"} & config.keys()

    @pytest.mark.parametrize(
        ("title", "rank", "targets"),
        [
            ("LoHa", 2, ("linear", "tall")),
            ("LoHa, use_effective_conv2d", 2, ("linear", "tall", "conv", "rect")),
            ("LoKr", 3, ("linear", "tall", "conv", "rect")),  # w2 of a convolution is full
            ("LoKr, use_effective_conv2d", 2, ("linear", "tall", "conv", "rect")),
        ],
    )
    def test_peft_reloads_the_merge(
        self, title: str, rank: int, targets: tuple[str, ...], tmp_path: Path
    ) -> None:
        """Where the file shows the kernel; flattened, it could be any convolution's."""
        case = next(case for case in LYCORIS if case.title == title)
        folders = [
            case.make(tmp_path / str(seed), seed, target_modules=[*targets], r=rank)
            for seed in (1, 2)
        ]
        ao.merge(folders, [0.7, 0.3], out=tmp_path / "m", dtype="float32", rank=36)
        wanted = weighted(*zip((0.7, 0.3), map(deltas, folders), strict=True))
        assert distance(deltas(tmp_path / "m"), wanted) < 1e-6

    def test_full_lokr_of_a_conv1d_is_peft_s_or_refused(self, tmp_path: Path) -> None:
        """PEFT 0.21.2 puts the 3-D w2 of a Conv1d into `torch.kron` with w1 against its last axes.

        What it trains and reloads is therefore no Kronecker product of channels; LyCORIS' rule
        would change the adapter without a word.
        """
        case = Lycoris("", "lokr", {"r": 64, "alpha": 8}, ("conv1",))
        folder = case.make(tmp_path)
        [theirs] = deltas(folder).values()
        [arrays] = tensors(folder).values()
        assert gap(dense(arrays) / 8, theirs) > 0.5
        one, two = arrays["lokr_w1"], arrays["lokr_w2"]
        rule = np.kron(one[None].astype(np.float64), two.astype(np.float64)) / 8
        assert gap(rule.reshape(24, -1), theirs) < EXACT
        try:
            [ours] = read(folder).values()
        except UnsupportedError as error:
            assert "conv1" in str(error)
        else:
            assert gap(ours, theirs) < EXACT

    def test_with_a_plain_lora_of_the_same_modules(self, tmp_path: Path) -> None:
        """Kinds differ between inputs; deltas add up all the same."""
        from peft import LoraConfig

        targets = ["linear", "tall"]
        folders = [
            LYCORIS[0].make(tmp_path / "a", 1, target_modules=targets),
            saved(tmp_path / "b", LoraConfig(r=2, lora_alpha=3, target_modules=targets), 2),
            LYCORIS[4].make(tmp_path / "c", 3, target_modules=targets),
        ]
        ao.merge(folders, [0.7, 0.3, -1.0], out=tmp_path / "m", dtype="float32", rank=12)
        wanted = weighted(*zip((0.7, 0.3, -1.0), map(deltas, folders), strict=True))
        kept = {}
        for name, value in wanted.items():
            u, s, v = np.linalg.svd(value)
            kept[name] = (u[:, :12] * s[:12]) @ v[:12]
        assert distance(read_peft(tmp_path / "m"), kept) < 1e-5

    @pytest.mark.parametrize("title", ["LoHa", "LoKr"])
    def test_without_its_config_there_is_no_scale(self, title: str, tmp_path: Path) -> None:
        case = next(case for case in LYCORIS if case.title == title)
        folder = case.make(tmp_path / "a", target_modules=["tall"])
        (folder / "adapter_config.json").unlink()
        with pytest.raises(IncompatibleError, match="--alpha"):
            ao.open_adapter(folder)
        [arrays] = tensors(folder).values()
        [found] = read(folder, alpha=5.0).values()
        assert gap(found, 2.5 * dense(arrays)) < EXACT


class TestAdaLoRA:
    """ΔW = B·(E ∘ A) · alpha / (init_r + 1e-5): the rank that is not saved is the initial one."""

    @staticmethod
    def trained(folder: Path, *, pruned: bool, seed: int = 3, **config: Any) -> dict[str, Any]:
        """A few steps of training, so that E is not zero; ΔW of the live model."""
        import torch
        from peft import AdaLoraConfig, get_peft_model

        options = {"init_r": 6, "target_r": 2, "lora_alpha": 5, "tinit": 1, "tfinal": 3}
        targets = ["linear", "tall", "wide", "conv"]
        torch.manual_seed(seed)
        with quiet():
            adapted = get_peft_model(
                base(),
                AdaLoraConfig(
                    **{**options, **config}, deltaT=1, total_step=12, target_modules=targets
                ),
            )
            weights = [value for value in adapted.parameters() if value.requires_grad]
            optimiser = torch.optim.Adam(weights, lr=0.05)
            x, y, z = torch.randn(32, 12), torch.randn(32, 24), torch.randn(32, 24, 1, 1)
            for step in range(12):
                one, two = adapted.base_model.model(x)
                (((one - y) ** 2).mean() + ((two - z) ** 2).mean()).backward()
                optimiser.step()
                if pruned:
                    adapted.base_model.update_and_allocate(step)
                optimiser.zero_grad()
            adapted.save_pretrained(folder)
        adapted.double()
        result = {}
        for name, layer in adapted.named_modules():
            if hasattr(layer, "ranknum"):
                change = layer.get_delta_weight("default").detach().numpy()
                flat = change.T if name.endswith("wide") else change.reshape(len(change), -1)
                result[name.removeprefix(PREFIX)] = flat
        return result

    @staticmethod
    def formula(folder: Path) -> dict[str, np.ndarray]:
        config = json.loads((folder / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / (config["init_r"] + 1e-5)
        result = {}
        for module, arrays in tensors(folder).items():
            A, B, E = (arrays[f"lora_{part}"].astype(np.float64) for part in "ABE")
            result[module] = scale * B @ (E * A)
        return result

    @pytest.mark.parametrize("pruned", [False, True])
    def test_is_read_as_the_model_was(self, pruned: bool, tmp_path: Path) -> None:
        live = self.trained(tmp_path, pruned=pruned)
        ranks = {module: len(arrays["lora_E"]) for module, arrays in tensors(tmp_path).items()}
        assert (set(ranks.values()) != {6}) == pruned
        theirs = deltas(tmp_path)
        assert distance(theirs, live) < 1e-12
        assert distance(self.formula(tmp_path), theirs) < EXACT
        assert all(np.linalg.norm(value) > 1e-3 for name, value in live.items() if ranks[name])
        assert distance(read(tmp_path), theirs) < EXACT
        sites = open_adapter_file(tmp_path).sites
        assert {module: site.rank for module, site in sites.items()} == ranks
        assert {site.kind for site in sites.values()} == {"adalora"}
        assert {site.scale for site in sites.values()} == {5 / (6 + 1e-5)}

    def test_pruning_can_take_a_whole_module(self, tmp_path: Path) -> None:
        """Rank 0 in the file: a module that changes nothing."""
        self.trained(tmp_path, pruned=True, target_r=1)
        ranks = {module: len(arrays["lora_E"]) for module, arrays in tensors(tmp_path).items()}
        assert 0 in ranks.values() and any(ranks.values())
        assert distance(read(tmp_path), deltas(tmp_path)) < EXACT
        ao.merge([tmp_path], [2.0], out=tmp_path / "m", dtype="float32")
        found = read_peft(tmp_path / "m")
        for module, value in deltas(tmp_path).items():
            if ranks[module]:
                assert gap(found[module], 2 * value) < 1e-6
            else:
                assert not found.get(module, np.zeros(1)).any()

    def test_an_alpha_of_zero_is_the_rank(self, tmp_path: Path) -> None:
        """PEFT takes r for an alpha that is not positive; read so, or refused."""
        self.trained(tmp_path, pruned=False, lora_alpha=0)
        try:
            found = read(tmp_path)
        except IncompatibleError as error:
            assert "alpha" in str(error)
        else:
            assert distance(found, deltas(tmp_path)) < EXACT

    def test_merges_with_its_like_and_with_lora(self, tmp_path: Path) -> None:
        from peft import LoraConfig

        self.trained(tmp_path / "a", pruned=True)
        self.trained(tmp_path / "b", pruned=False, seed=5, init_r=4, lora_alpha=3)
        targets = ["linear", "tall", "wide"]
        saved(tmp_path / "c", LoraConfig(r=2, lora_alpha=3, target_modules=targets), 6)
        folders, weights = [tmp_path / name for name in "abc"], [0.7, -0.4, 0.1]
        ao.merge(folders, weights, out=tmp_path / "m", dtype="float32", rank=12)
        wanted = weighted(*zip(weights, map(deltas, folders), strict=True))
        found = read_peft(tmp_path / "m")
        assert distance(found, wanted) < 1e-6
        config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and "init_r" not in config


class TestMultiheadAttention:
    """Two pairs: the fused q/k/v projection under the module's own name, and out_proj below it."""

    def test_is_read_exactly(self, tmp_path: Path) -> None:
        from peft import LoraConfig

        folder = saved(tmp_path, LoraConfig(r=2, lora_alpha=3, target_modules=["mha"]))
        arrays = tensors(folder)
        wanted = {
            "mha": arrays["mha.lora_B"]["weight"] @ arrays["mha.lora_A"]["weight"],
            "mha.base_layer.out_proj": arrays["mha.base_layer.out_proj.lora_B"]["weight"]
            @ arrays["mha.base_layer.out_proj.lora_A"]["weight"],
        }
        assert [value.shape for value in wanted.values()] == [(48, 16), (16, 16)]
        found = read(folder)
        assert distance(found, {name: 1.5 * value for name, value in wanted.items()}) < 1e-6
        assert distance({"mha": found["mha"]}, {"mha": deltas(folder)["mha"]}) < 1e-6


def merged_linear(A: np.ndarray, B: np.ndarray, enabled: list[bool], scale: float) -> np.ndarray:
    """ΔW of an old MergedLinear, as loralib and PEFT 0.2 merged it: a grouped 1-D convolution.

    A is (r·k, in) for k enabled slots, B (out / slots · k, r, 1).
    """
    import torch

    one, two = (torch.from_numpy(value.astype(np.float64)) for value in (A, B))
    product = torch.nn.functional.conv1d(one[None], two, groups=sum(enabled))[0]
    result = np.zeros((len(enabled), len(B) // sum(enabled), A.shape[1]))
    result[np.array(enabled)] = product.numpy().reshape(sum(enabled), -1, A.shape[1])
    return scale * result.reshape(-1, A.shape[1])


class TestMergedLinear:
    SLOTS = (
        [True, False, True],
        [True, True, True],
        [False, True, True],
        [True, False, False],
        [False, False, True],
        [True, True],
    )

    @staticmethod
    def make(
        folder: Path, enabled: list[bool], seed: int = 0, rank: int = 2, **config: Any
    ) -> dict[str, np.ndarray]:
        """A directory as PEFT 0.2 saved it; ΔW of its two modules."""
        rng = np.random.default_rng(seed)
        folder.mkdir()
        k = sum(enabled)
        named, wanted = {}, {}
        for layer in range(2):
            stem = f"transformer.h.{layer}.self_attention.query_key_value"
            A = rng.standard_normal((rank * k, 20)).astype(np.float32)
            B = rng.standard_normal((10 * k, rank, 1)).astype(np.float32)
            named[PREFIX + stem] = {"lora_A.weight": A, "lora_B.weight": B}
            wanted[stem] = merged_linear(A, B, enabled, 5 / rank)
        write(folder / "adapter_model.safetensors", named)
        document = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 5,
            "enable_lora": enabled,
            "fan_in_fan_out": True,
            "merge_weights": False,
            "target_modules": ["query_key_value"],
            **config,
        }
        (folder / "adapter_config.json").write_text(json.dumps(document))
        return wanted

    @pytest.mark.parametrize("enabled", SLOTS, ids=str)
    def test_the_oracle_is_block_diagonal(self, enabled: list[bool]) -> None:
        """The same by a loop over slots; none of our code is involved."""
        rng = np.random.default_rng(0)
        k = sum(enabled)
        A, B = rng.standard_normal((2 * k, 7)), rng.standard_normal((3 * k, 2, 1))
        blocks, trained = [], 0
        for on in enabled:
            rows, columns = (slice(trained * size, (trained + 1) * size) for size in (3, 2))
            blocks.append(B[rows, :, 0] @ A[columns] if on else np.zeros((3, 7)))
            trained += on
        assert gap(merged_linear(A, B, enabled, 1.5), 1.5 * np.vstack(blocks)) < EXACT

    @pytest.mark.parametrize("enabled", SLOTS, ids=str)
    def test_is_read_exactly(self, enabled: list[bool], tmp_path: Path) -> None:
        wanted = self.make(tmp_path / "a", enabled)
        assert distance(read(tmp_path / "a"), wanted) < EXACT
        for stem, site in open_adapter_file(tmp_path / "a").sites.items():
            assert (site.kind, site.dim, site.scale) == ("merged_linear", 2, 2.5)
            assert site.rank == 2 * sum(enabled)
            assert site.shape == wanted[stem].shape

    def test_merges_into_a_plain_lora(self, tmp_path: Path) -> None:
        a = self.make(tmp_path / "a", [True, False, True])
        b = self.make(tmp_path / "b", [True, True, True], 1, rank=1)
        stem = "transformer.h.0.self_attention.query_key_value"
        factors = pairs(2, {stem: (30, 20)}, 3)
        write_peft(tmp_path / "c", factors, fan_in_fan_out=True)
        c = {name: B.astype(float) @ A.astype(float) for name, (B, A) in factors.items()}
        folders, weights = [tmp_path / name for name in "abc"], [0.7, -0.4, 0.1]
        ao.merge(folders, weights, out=tmp_path / "m", dtype="float32", rank=20)
        wanted = weighted(*zip(weights, (a, b, c), strict=True))
        assert distance(read_peft(tmp_path / "m"), wanted) < 1e-6
        config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
        assert not config.get("enable_lora") and config["fan_in_fan_out"] is True

    def test_without_a_config_the_slots_are_unknown(self, tmp_path: Path) -> None:
        self.make(tmp_path / "a", [True, False, True])
        (tmp_path / "a" / "adapter_config.json").unlink()
        with pytest.raises(IncompatibleError, match=r"MergedLinear|enable_lora"):
            ao.open_adapter(tmp_path / "a", alpha=5.0)

    def test_slots_that_do_not_fit_the_tensors(self, tmp_path: Path) -> None:
        self.make(tmp_path / "a", [True, False, True])
        file = tmp_path / "a" / "adapter_config.json"
        for enabled in ([True, True, True], [False, False, False], "yes"):
            file.write_text(json.dumps({**json.loads(file.read_text()), "enable_lora": enabled}))
            with pytest.raises(ao.AdapterOpsError):
                ao.open_adapter(tmp_path / "a")

    def test_the_corpus_file(self, corpus: Path) -> None:
        """BLOOM-560m, r = 8 on the first and last third of query_key_value; pickled on a GPU."""
        import torch

        folder = corpus / "wujindou__BLOOM-LORA"
        named = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
        entries = json.loads((corpus / "manifest.json").read_text())
        norm = next(e["fro"] for e in entries if e["file"].startswith(folder.name))
        wanted = {}
        for name, A in named.items():
            if name.endswith(".lora_A.weight"):
                B = named[name.replace("lora_A", "lora_B")].numpy()
                stem = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
                wanted[stem] = merged_linear(A.numpy(), B, [True, False, True], 2.0)
        assert math.hypot(*map(np.linalg.norm, wanted.values())) == pytest.approx(norm, rel=1e-6)
        adapter = ao.open_adapter(folder, allow_pickle=True)
        assert len(adapter) == len(wanted) == 24
        for stem, value in wanted.items():
            assert gap(adapter[stem].dense(), value) < EXACT
            assert not value[1024:2048].any()
        found = math.hypot(*(factors.norm() for factors in adapter.values()))
        assert found == pytest.approx(norm, rel=1e-6)


class TestRefused:
    """What PEFT itself saves of kinds that have no ΔW of their own here."""

    @pytest.mark.parametrize(
        ("name", "options", "says"),
        [
            ("IA3Config", {"feedforward_modules": []}, "IA"),
            ("OFTConfig", {"r": 0, "oft_block_size": 4}, "OFT"),
            ("VeraConfig", {"r": 4}, "VeRA"),
            ("RandLoraConfig", {"r": 4}, "RandLoRA"),
            ("HRAConfig", {"r": 2}, "HRA"),
            ("VBLoRAConfig", {"r": 2, "num_vectors": 4, "vector_length": 4}, "VBLoRA"),
            ("FourierFTConfig", {"n_frequency": 10}, "FourierFT"),
        ],
    )
    @pytest.mark.parametrize("configured", [True, False])
    def test_by_name(
        self, name: str, options: dict[str, Any], says: str, configured: bool, tmp_path: Path
    ) -> None:
        import peft

        config = getattr(peft, name)(target_modules=["linear"], **options)
        folder = saved(tmp_path / "a", config)
        if not configured:
            (folder / "adapter_config.json").unlink()
        with pytest.raises(ao.AdapterOpsError) as caught:
            ao.open_adapter(folder)
        assert caught.value.exit_code in (3, 4)
        assert str(folder) in str(caught.value)
        if configured:
            assert isinstance(caught.value, UnsupportedError)
            assert says.lower() in str(caught.value).lower()

    def test_grouped_convolutions(self, tmp_path: Path) -> None:
        from peft import LoraConfig

        folder = saved(tmp_path, LoraConfig(r=4, target_modules=["grouped"]))
        with pytest.raises(UnsupportedError, match="grouped convolution"):
            ao.open_adapter(folder)

    def test_grouped_convolutions_of_loha_have_a_group_s_channels(self, tmp_path: Path) -> None:
        """LoHa and LoKr of PEFT know groups: ΔW has the weight's own shape, and adds up."""
        case = Lycoris("", "loha", {"r": 2, "alpha": 3, "use_effective_conv2d": True}, ("grouped",))
        folder = case.make(tmp_path)
        assert deltas(folder)["grouped"].shape == (8, 27)
        assert distance(read(folder), deltas(folder)) < EXACT

    @pytest.mark.parametrize("target", ["linear", "wide", "conv"])
    def test_dora(self, target: str, tmp_path: Path) -> None:
        from peft import LoraConfig

        folder = saved(tmp_path / "a", LoraConfig(r=2, target_modules=[target], use_dora=True))
        [shape] = [
            value.shape
            for name, value in load_file(folder / "adapter_model.safetensors").items()
            if "magnitude" in name
        ]
        assert_dora(folder, target, shape)


def rows() -> list[tuple[str, str, str]]:
    """(dialect, title, kind) of each case here, for the table of what is supported."""
    return [("peft", case.title, case.name) for case in LYCORIS] + [
        ("peft", "AdaLoRA", "adalora"),
        ("peft", "AdaLoRA, pruned (rank_pattern)", "adalora"),
        ("peft", "MultiheadAttention", "lora"),
        *(
            ("peft", f"old MergedLinear {slots}", "merged_linear")
            for slots in TestMergedLinear.SLOTS
        ),
    ]
