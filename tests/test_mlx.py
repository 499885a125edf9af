"""MLX: `lora_a` is (in, r), `lora_b` (r, out), y += scale · (x @ lora_a) @ lora_b.

The oracle is `Mlx`, a model in numpy of what mlx-lm does with an adapter directory: it decides from
the config alone which layers get factors, then loads the file into them without complaint about
what is left over (mlx_lm/tuner/utils.py: `load_adapters`, `linear_to_lora_layers`; the layers in
mlx_lm/tuner/lora.py). An adapter whose tensors find no layer is silently ignored there, so the
model here makes that an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import adapterops as ao
from adapterops.errors import FormatError, IncompatibleError, UnsupportedError
from adapterops.formats import open_adapter_file
from tests.kinds import assert_dora, gap, read
from tests.support import dense, distance, load_file, pairs, weighted, write_peft

EXACT = 1e-14
LAYERS = 4
SHAPES = {"self_attn.q_proj": (12, 16), "self_attn.v_proj": (6, 16), "mlp.down_proj": (16, 20)}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")


def model(layers: int = LAYERS, switch: bool = False) -> dict[str, tuple[int, ...]]:
    """Modules of a base model by path: (out, in), or (experts, out, in) for switch layers."""
    shapes: dict[str, tuple[int, ...]] = dict(SHAPES)
    if switch:
        shapes |= {"mlp.switch_mlp.gate_proj": (3, 10, 16), "mlp.switch_mlp.down_proj": (3, 16, 10)}
    result: dict[str, tuple[int, ...]] = {
        f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in shapes.items()
    }
    return {**result, "model.embed_tokens": (16, 32), "lm_head": (32, 16)}


class Mlx:
    """ΔW (out, in) of each module of a base model after mlx-lm loaded the adapter at `folder`."""

    def __init__(self, folder: Path, base: Mapping[str, tuple[int, ...]]) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config.get("fine_tune_type", "lora") == "lora"
        options = config["lora_parameters"]
        self.rank, self.scale = options["rank"], options["scale"]
        assert options["dropout"] == 0.0
        keys = set(options.get("keys") or ("self_attn.q_proj", "self_attn.v_proj"))
        found = [_LAYER.match(path) for path in base]
        count = 1 + max(int(match[1]) for match in found if match)
        numbers = list(range(count))[-max(config["num_layers"], 0) :]
        adapted = {path for path in base if path in keys}
        adapted |= {m[0] for m in found if m and int(m[1]) in numbers and m[2] in keys}
        tensors = load_file(folder / "adapters.safetensors")
        assert not any(name.rpartition(".")[0] not in adapted for name in tensors), "ignored by mlx"
        self.deltas: dict[str, np.ndarray] = {}
        for path in adapted:
            if f"{path}.lora_b" in tensors:  # it starts as zeros
                a, b = (tensors[f"{path}.lora_{side}"].astype(np.float64) for side in "ab")
                self._add(path, a, b, base[path])

    def _add(self, path: str, a: np.ndarray, b: np.ndarray, shape: tuple[int, ...]) -> None:
        if len(shape) == 3:
            experts, out, channels = shape
            assert (a.shape, b.shape) == (
                (experts, self.rank, channels),
                (experts, out, self.rank),
            )
            for e in range(experts):
                x = np.eye(channels)
                self.deltas[f"{path}[{e}]"] = (self.scale * (x @ a[e].T) @ b[e].T).T
            return
        assert (a.shape, b.shape) == ((shape[1], self.rank), (self.rank, shape[0]))
        x = np.eye(shape[1])  # an embedding looks rows up: the same as one-hot rows
        self.deltas[path] = (self.scale * (x @ a) @ b).T


def make(
    folder: Path,
    seed: int,
    *,
    rank: int = 2,
    keys: tuple[str, ...] = ("self_attn.q_proj", "self_attn.v_proj"),
    num_layers: int = 2,
    switch: bool = False,
    dtype: Any = np.float32,
    parameters: Mapping[str, Any] | None = None,
    **config: Any,
) -> Path:
    """An adapter directory as mlx-lm's trainer leaves it."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    tensors = {}
    for path, shape in model(switch=switch).items():
        match = _LAYER.match(path)
        first = LAYERS - num_layers if num_layers > 0 else 0
        inside = match and int(match[1]) >= first and match[2] in keys
        if inside or path in keys:
            a, b = (shape[-1], rank), (rank, shape[-2])
            if len(shape) == 3:
                a, b = (shape[0], *a[::-1]), (shape[0], *b[::-1])
            tensors[f"{path}.lora_a"] = (0.3 * rng.standard_normal(a)).astype(dtype)
            tensors[f"{path}.lora_b"] = (0.3 * rng.standard_normal(b)).astype(dtype)
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    if parameters is None:
        parameters = {"scale": 10.0}
    document = {
        "adapter_path": "adapters",
        "fine_tune_type": "lora",
        "model": "mlx-community/Tiny",
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": rank,
            "dropout": 0.0,
            **({"keys": [*keys]} if keys != ("self_attn.q_proj", "self_attn.v_proj") else {}),
            **parameters,
        },
        "train": True,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


ALL = (*SHAPES, "lm_head", "model.embed_tokens")
SWITCH = ("mlp.switch_mlp.gate_proj", "mlp.switch_mlp.down_proj", "self_attn.q_proj")
CASES: dict[str, dict[str, Any]] = {
    "default keys": {},
    "keys": {"keys": ALL},
    "all layers": {"num_layers": LAYERS},
    "num_layers -1": {"num_layers": -1},
    "scale and alpha": {"parameters": {"scale": 10.0, "alpha": 16}},
    "float16": {"dtype": np.float16},
    "switch layers": {"keys": SWITCH, "switch": True},
}
by_case = pytest.mark.parametrize("case", CASES)


def loaded(folder: Path, *, switch: bool = False, layers: int = LAYERS) -> dict[str, np.ndarray]:
    """What mlx-lm makes of a directory."""
    return Mlx(folder, model(layers, switch)).deltas


class TestTheOracle:
    """The model of mlx-lm itself; none of our code is involved."""

    @by_case
    def test_computes_the_layers_formula(self, case: str, tmp_path: Path) -> None:
        options = CASES[case]
        folder = make(tmp_path / "a", 1, **options)
        tensors = load_file(folder / "adapters.safetensors")
        found = loaded(folder, switch=options.get("switch", False))
        rng = np.random.default_rng(0)
        for stem, delta in found.items():
            path, _, expert = stem.removesuffix("]").partition("[")
            a, b = (tensors[f"{path}.lora_{side}"].astype(np.float64) for side in "ab")
            x = rng.standard_normal((5, delta.shape[1]))
            if expert:  # gather_mm with lora_a.swapaxes(-1, -2), then lora_b.swapaxes(-1, -2)
                a, b = a[int(expert)].T, b[int(expert)].T
            assert gap(x @ delta.T, 10 * ((x @ a) @ b)) < EXACT

    def test_sees_what_mlx_would_ignore(self, tmp_path: Path) -> None:
        folder = make(tmp_path / "a", 1, num_layers=3)
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text())
        fewer = {**config["lora_parameters"], "keys": ["self_attn.q_proj"]}
        for change in ({"num_layers": 2}, {"lora_parameters": fewer}):
            file.write_text(json.dumps({**config, **change}))
            with pytest.raises(AssertionError, match="ignored"):
                loaded(folder)
        file.write_text(json.dumps(config))
        assert len(loaded(folder)) == 6


class TestReading:
    @by_case
    def test_is_what_mlx_computes(self, case: str, tmp_path: Path) -> None:
        options = CASES[case]
        folder = make(tmp_path / "a", 1, **options)
        wanted = loaded(folder, switch=options.get("switch", False))
        assert len(wanted) >= 4
        assert distance(read(folder), wanted) < EXACT
        assert distance(read(folder / "adapters.safetensors"), wanted) < EXACT
        file = open_adapter_file(folder)
        assert (file.dialect, file.rank, file.base) == ("mlx", 2, "mlx-community/Tiny")
        for stem, site in file.sites.items():
            assert (site.kind, site.scale, site.rank) == ("lora", 10.0, 2)
            assert site.shape == wanted[stem].shape
            assert "scale" in site.scale_from

    def test_an_embedding_is_d_by_v(self, tmp_path: Path) -> None:
        """lora_a has a row per token: x is one-hot, and the weight changes by ΔWᵀ."""
        folder = make(tmp_path / "a", 1, keys=("model.embed_tokens",))
        tensors = load_file(folder / "adapters.safetensors")
        a, b = (tensors[f"model.embed_tokens.lora_{side}"].astype(float) for side in "ab")
        assert (a.shape, b.shape) == ((32, 2), (2, 16))
        [found] = read(folder).values()
        assert gap(found, 10 * (a @ b).T) < EXACT

    @pytest.mark.parametrize("parameters", [{}, {"scale": None}])
    def test_without_a_scale_alpha_is_asked_for(
        self, parameters: dict[str, Any], tmp_path: Path
    ) -> None:
        folder = make(tmp_path / "a", 1, parameters=parameters)
        with pytest.raises((IncompatibleError, FormatError), match=r"--alpha|scale"):
            ao.open_adapter(folder)
        if not parameters:
            with pytest.raises(IncompatibleError, match="--alpha"):
                ao.open_adapter(folder)
            with_scale = make(tmp_path / "b", 1, parameters={"scale": 2.0})
            assert distance(read(folder, alpha=4.0), read(with_scale)) < EXACT

    def test_without_a_config_there_is_no_scale(self, tmp_path: Path) -> None:
        folder = make(tmp_path / "a", 1)
        wanted = loaded(folder)
        (folder / "adapter_config.json").unlink()
        with pytest.raises(IncompatibleError, match="--alpha"):
            ao.open_adapter(folder)
        assert distance(read(folder, alpha=20.0), wanted) < EXACT

    def test_alpha_of_a_path_wins(self, tmp_path: Path) -> None:
        folder = make(tmp_path / "a", 1)
        ao.merge([folder], [1.0], out=tmp_path / "m", alpha={folder: 4.0}, dtype="float32")
        wanted = {name: value / 5 for name, value in loaded(folder).items()}
        assert distance(read(tmp_path / "m"), wanted) < 1e-6

    def test_checkpoints_beside_the_adapter(self, tmp_path: Path) -> None:
        """mlx-lm saves `0000100_adapters.safetensors` beside the last one, with one config."""
        folder = make(tmp_path / "a", 1)
        early = make(tmp_path / "b", 2)
        wanted, before = loaded(folder), loaded(early)
        for step in (100, 200):
            copy = folder / f"{step:07}_adapters.safetensors"
            copy.write_bytes((early / "adapters.safetensors").read_bytes())
        assert distance(read(folder), wanted) < EXACT
        assert distance(read(folder / "0000100_adapters.safetensors"), before) < EXACT

    def test_a_rank_that_is_not_the_tensors(self, tmp_path: Path) -> None:
        """The scale does not depend on the rank: read with a note, or refused; never rescaled."""
        folder = make(tmp_path / "a", 1)
        wanted = loaded(folder)
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text())
        config["lora_parameters"]["rank"] = 8
        file.write_text(json.dumps(config))
        try:
            found = read(folder)
        except IncompatibleError as error:
            assert "rank" in str(error)
        else:
            assert distance(found, wanted) < EXACT

    def test_dora(self, tmp_path: Path) -> None:
        folder = make(tmp_path / "a", 1, fine_tune_type="dora")
        tensors = load_file(folder / "adapters.safetensors")
        for name in [name for name in tensors if name.endswith("lora_b")]:
            stem = name.removesuffix(".lora_b")
            tensors[f"{stem}.m"] = np.ones(tensors[name].shape[1], np.float32)
        save_file(tensors, folder / "adapters.safetensors")
        assert_dora(folder, "model.layers.3.self_attn.q_proj", (12,))

    def test_full_fine_tuning_is_no_adapter(self, tmp_path: Path) -> None:
        folder = make(tmp_path / "a", 1, fine_tune_type="full")
        tensors = {"model.layers.3.self_attn.q_proj.weight": np.ones((12, 16), np.float32)}
        save_file(tensors, folder / "adapters.safetensors")
        with pytest.raises((FormatError, UnsupportedError)):
            ao.open_adapter(folder)

    @pytest.mark.parametrize(
        ("a", "b"),
        [((16, 2), (3, 12)), ((16, 2), (12, 2)), ((3, 2, 16), (4, 12, 2)), ((16,), (12,))],
    )
    def test_shapes_that_do_not_multiply(
        self, a: tuple[int, ...], b: tuple[int, ...], tmp_path: Path
    ) -> None:
        folder = make(tmp_path / "a", 1)
        stem = "model.layers.3.self_attn.q_proj"
        pair = {f"{stem}.lora_a": np.ones(a, np.float32), f"{stem}.lora_b": np.ones(b, np.float32)}
        save_file(pair, folder / "adapters.safetensors")
        with pytest.raises((FormatError, UnsupportedError), match=re.escape(stem)):
            ao.open_adapter(folder)

    @pytest.mark.parametrize("step", ["0000100", "0000200"])
    def test_the_corpus(self, step: str, corpus: Path) -> None:
        """Qwen2.5-0.5B, rank 8: scale 10 wins over alpha 16, with which it would be 2."""
        folder = corpus / "wyek1n__MLX-CLI" / step
        entries = json.loads((corpus / "manifest.json").read_text())
        [norm] = [e["fro"] for e in entries if e["file"].startswith(f"{folder.parent.name}/{step}")]
        wanted = Mlx(folder, qwen()).deltas
        total = float(np.sqrt(sum(np.sum(value**2) for value in wanted.values())))
        assert total == pytest.approx(norm, rel=1e-6)
        assert distance(read(folder), wanted) < EXACT


def qwen() -> dict[str, tuple[int, ...]]:
    """The attention of Qwen2.5-0.5B."""
    return {
        f"model.layers.{n}.self_attn.{name}": (rows, 896)
        for n in range(24)
        for name, rows in (("q_proj", 896), ("v_proj", 128))
    }


class TestMerging:
    @by_case
    @pytest.mark.parametrize("weights", [(0.7, 0.3), (-1.5, 0.4)], ids=str)
    def test_mlx_reads_back_the_exact_sum(
        self, case: str, weights: tuple[float, float], tmp_path: Path
    ) -> None:
        options = CASES[case]
        switch = options.get("switch", False)
        a = make(tmp_path / "a", 1, **options)
        b = make(tmp_path / "b", 2, rank=3, **{**options, "parameters": {"scale": 0.5}})
        report = ao.merge([a, b], weights, out=tmp_path / "m", dtype="float32", rank=5)
        assert report.error < 1e-6
        terms = zip(weights, (loaded(f, switch=switch) for f in (a, b)), strict=True)
        wanted = weighted(*terms)
        assert distance(loaded(tmp_path / "m", switch=switch), wanted) < 1e-6
        assert distance(read(tmp_path / "m"), wanted) < 1e-6

    def test_the_directory_is_mlx_s(self, tmp_path: Path) -> None:
        a, b = (make(tmp_path / name, n, keys=ALL) for n, name in enumerate("ab"))
        ao.merge([a, b], [0.7, 0.3], out=tmp_path / "m", rank=4)
        names = {file.name for file in (tmp_path / "m").iterdir()}
        assert {"adapters.safetensors", "adapter_config.json"} <= names
        assert not names & {"adapter_model.safetensors", "0000100_adapters.safetensors"}
        config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
        assert config["fine_tune_type"] == "lora"
        parameters = config["lora_parameters"]
        assert (parameters["rank"], parameters["scale"], parameters["dropout"]) == (4, 1.0, 0.0)
        assert "alpha" not in parameters
        assert sorted(parameters["keys"]) == sorted(ALL)
        assert "peft_type" not in config and "r" not in config

    def test_layers_and_keys_that_differ(self, tmp_path: Path) -> None:
        """The union must find its layers: more of them, and more keys, than either input's."""
        a = make(tmp_path / "a", 1, keys=("self_attn.q_proj",), num_layers=1)
        b = make(tmp_path / "b", 2, keys=("mlp.down_proj", "self_attn.q_proj"), num_layers=3)
        wanted = weighted((0.7, loaded(a)), (0.3, loaded(b)))
        for index, inputs in enumerate(([a, b], [b, a])):
            out = tmp_path / f"m{index}"
            weights = [0.7, 0.3] if inputs[0] == a else [0.3, 0.7]
            ao.merge(inputs, weights, out=out, dtype="float32", rank=4)
            assert distance(loaded(out), wanted) < 1e-6

    def test_one_adapter_alone(self, tmp_path: Path) -> None:
        folder = make(tmp_path / "a", 1, keys=ALL)
        ao.merge([folder], out=tmp_path / "m")
        assert distance(loaded(tmp_path / "m"), loaded(folder)) < 1e-6
        ao.merge([folder], [-2.0], out=tmp_path / "n", dtype="float32")
        wanted = {name: -2 * value for name, value in loaded(folder).items()}
        assert distance(loaded(tmp_path / "n"), wanted) < 1e-6

    def test_the_corpus(self, corpus: Path, tmp_path: Path) -> None:
        folders = [corpus / "wyek1n__MLX-CLI" / step for step in ("0000100", "0000200")]
        report = ao.merge(folders, [0.7, 0.3], out=tmp_path / "m", dtype="float32")
        assert report.error < 1e-6
        wanted = weighted(*zip((0.7, 0.3), (Mlx(f, qwen()).deltas for f in folders), strict=True))
        assert distance(Mlx(tmp_path / "m", qwen()).deltas, wanted) < 1e-6

    def test_switch_layers_are_single_experts_by_another_name(self, tmp_path: Path) -> None:
        """MLX stacks what a PEFT adapter of the original model holds expert by expert."""
        a = make(tmp_path / "a", 1, keys=SWITCH, switch=True)
        shapes = {
            "model.layers.2.self_attn.q_proj": (12, 16),  # a module in common
            "model.layers.2.mlp.experts.2.gate_proj": (10, 16),
        }
        b = write_peft(tmp_path / "b", pairs(2, shapes, 3))
        for files in ([a, b], [b, a]):
            with pytest.raises(IncompatibleError, match="in two dialects") as caught:
                ao.merge(files, [0.7, 0.3], out=tmp_path / "m")
            for name in ("switch_mlp.", "experts."):
                assert f"'model.layers.2.mlp.{name}" in str(caught.value)

    def test_with_a_peft_adapter_of_the_same_modules(self, tmp_path: Path) -> None:
        """MLX and PEFT call a module the same: summed by stem, or refused, never lost."""
        a = make(tmp_path / "a", 1)
        shapes = {name: value.shape for name, value in loaded(a).items()}
        factors = pairs(2, shapes, 3)
        b = write_peft(tmp_path / "b", factors)
        try:
            ao.merge([a, b], [0.7, 0.3], out=tmp_path / "m", dtype="float32", rank=5)
        except IncompatibleError as error:
            assert "peft" in str(error) and "mlx" in str(error)
        else:
            wanted = weighted((0.7, loaded(a)), (0.3, dense(factors)))
            assert distance(loaded(tmp_path / "m"), wanted) < 1e-6


class TestConversion:
    @staticmethod
    def llama(folder: Path, seed: int, **config: Any) -> Path:
        from tests import peft_models

        return peft_models.trained(folder, seed, "llama", **{"r": 2, "lora_alpha": 5, **config})

    @staticmethod
    def shapes(layers: int = 2) -> dict[str, tuple[int, ...]]:
        """tests.peft_models' llama as mlx-lm sees it."""
        names = {f"self_attn.{name}_proj": (32, 32) for name in "qkvo"}
        names |= {f"mlp.{name}_proj": (48, 32) for name in ("gate", "up")}
        names["mlp.down_proj"] = (32, 48)
        layer = {f"model.layers.{n}.{k}": v for n in range(layers) for k, v in names.items()}
        return {**layer, "model.embed_tokens": (32, 32), "lm_head": (32, 32)}

    @pytest.mark.parametrize(
        "config",
        [
            {"target_modules": ["q_proj", "v_proj", "down_proj"]},
            {"target_modules": ["q_proj"], "layers_to_transform": [1]},
            {"target_modules": ["q_proj"], "layers_to_transform": [0]},
            {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
            {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 5}},
        ],
        ids=["attention and mlp", "last layer", "first layer", "head and embedding", "ranks"],
    )
    def test_peft_to_mlx_and_back(self, config: dict[str, Any], tmp_path: Path) -> None:
        peft_models = pytest.importorskip("tests.peft_models")
        pytest.importorskip("peft")
        folder = self.llama(tmp_path / "a", 1, **config)
        wanted = peft_models.deltas(peft_models.reloaded(folder, "llama"))
        ours = {
            name: value.T if name.endswith("embed_tokens") else value
            for name, value in wanted.items()
        }
        options = {"extras": "drop"} if "embed_tokens" in config["target_modules"] else {}
        ao.merge([folder], [1.0], out=tmp_path / "m", to="mlx", dtype="float32", **options)
        assert distance(Mlx(tmp_path / "m", self.shapes()).deltas, ours) < 1e-6
        assert distance(read(tmp_path / "m"), ours) < 1e-6
        ao.merge([tmp_path / "m"], [1.0], out=tmp_path / "back", to="peft", dtype="float32")
        back = peft_models.deltas(peft_models.reloaded(tmp_path / "back", "llama"))
        assert distance(back, wanted) < 1e-6

    def test_layers_that_are_not_the_last(self, tmp_path: Path) -> None:
        """num_layers counts from the end of a base whose depth the file does not say."""
        folder = self.llama(tmp_path / "a", 1, target_modules=["q_proj"], layers_to_transform=[0])
        ao.merge([folder], [1.0], out=tmp_path / "m", to="mlx", dtype="float32")
        assert distance(Mlx(tmp_path / "m", self.shapes(2)).deltas, read(folder)) < 1e-6
        assert distance(Mlx(tmp_path / "m", self.shapes(5)).deltas, read(folder)) < 1e-6

    def test_mlx_to_peft_is_loaded_by_peft(self, tmp_path: Path) -> None:
        """From mlx-lm's own layout onto a real Llama, embedding and head included."""
        peft_models = pytest.importorskip("tests.peft_models")
        pytest.importorskip("peft")
        rng = np.random.default_rng(1)
        keys = ["self_attn.q_proj", "mlp.down_proj", "lm_head", "model.embed_tokens"]
        tensors = {}
        for path, (out, channels) in self.shapes().items():
            if path in keys or path.split(".", 3)[-1] in keys:
                a, b = rng.standard_normal((channels, 2)), rng.standard_normal((2, out))
                tensors |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
        folder = tmp_path / "a"
        folder.mkdir()
        single = {name: value.astype(np.float32) for name, value in tensors.items()}
        save_file(single, folder / "adapters.safetensors")
        parameters = {"rank": 2, "scale": 3.0, "dropout": 0.0, "keys": keys}
        config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        wanted = Mlx(folder, self.shapes()).deltas
        assert len(wanted) == 6
        ao.merge([folder], [0.5], out=tmp_path / "m", to="peft", dtype="float32")
        found = peft_models.deltas(peft_models.reloaded(tmp_path / "m", "llama"))
        found["model.embed_tokens"] = found["model.embed_tokens"].T
        assert distance(found, {name: value / 2 for name, value in wanted.items()}) < 1e-6

    def test_switch_layers_have_no_place_in_peft(self, tmp_path: Path) -> None:
        """PEFT adapts experts as one parameter of the module above: refused, or read alike."""
        folder = make(tmp_path / "a", 1, keys=SWITCH, switch=True)
        wanted = loaded(folder, switch=True)
        try:
            ao.merge([folder], [0.5], out=tmp_path / "m", to="peft", dtype="float32")
        except IncompatibleError as error:
            assert "switch_mlp" in str(error)
        else:
            assert distance(read(tmp_path / "m"), {k: v / 2 for k, v in wanted.items()}) < 1e-6

    @pytest.mark.parametrize("to", ["kohya", "diffusers"])
    def test_image_dialects_have_no_names_for_it(self, to: str, tmp_path: Path) -> None:
        folder = make(tmp_path / "a", 1)
        with pytest.raises(IncompatibleError, match=to):
            ao.merge([folder], [1.0], out=tmp_path / "m", to=to)

    def test_what_mlx_cannot_hold_is_refused(self, tmp_path: Path) -> None:
        peft_models = pytest.importorskip("tests.peft_models")
        pytest.importorskip("peft")
        for name, config in (
            ("conv", {"target_modules": ["conv2"]}),
            ("bias", {"target_modules": ["linear"], "lora_bias": True}),
            ("head", {"target_modules": ["linear"], "modules_to_save": ["head"]}),
        ):
            folder = peft_models.trained(tmp_path / name, 1, r=2, lora_alpha=2, **config)
            with pytest.raises(IncompatibleError, match="mlx"):
                ao.merge([folder], [1.0], out=tmp_path / "m", to="mlx")


def rows() -> list[tuple[str, str, str]]:
    """(dialect, title, kind) of each case here, for the table of what is supported."""
    return [("mlx", case, "lora") for case in CASES]


@pytest.mark.parametrize("name", ["experts.2.w1", "experts[2]"])
def test_switch_layers_by_mixtral_s_names_and_as_one_parameter(name: str) -> None:
    from adapterops.formats.names import two_names

    stems = {
        "a": ["model.layers.0.mlp.switch_mlp.gate_proj[2]"],
        "b": [f"model.layers.0.mlp.{name}"],
    }
    assert two_names(stems)
