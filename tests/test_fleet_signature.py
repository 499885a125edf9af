"""Signatures against dense float64, hashes, what is eligible, one reading, the corpus."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors

import adapterops as ao
from adapterops.files.source import LocalFile
from adapterops.fleet.signing import sketch as sk
from adapterops.fleet.signing.signature import signature
from adapterops.fleet.signing.widening import codes, widened
from adapterops.fleet.types import Signature
from tests import hostile
from tests.kinds import KINDS, Kind, read, write
from tests.support import pairs, write_peft

SEED = 11
TYPES = ("float16", "bfloat16", "float32", "float64")
SHAPES = {
    f"model.layers.{layer}.self_attn.{name}": shape
    for layer in range(3)
    for name, shape in (("q_proj", (40, 24)), ("v_proj", (16, 24)))
}


def signed(path: Path, **options: Any) -> Signature:
    """The signature of an adapter that must be eligible."""
    found = signature(str(path), SEED, **options)
    assert (found.status, found.reason) == ("ok", "")
    return found


def stored(folder: Path, dtype: str) -> Path:
    """A PEFT adapter's factors cast to this type of torch's, rounded to nearest."""
    file = folder / "adapter_model.safetensors"
    tensors = load_tensors(file)
    save_tensors({name: value.to(getattr(torch, dtype)) for name, value in tensors.items()}, file)
    return folder


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def check(found: Signature, deltas: Mapping[str, np.ndarray], tolerance: float = 2e-3) -> None:
    """Every figure of a signature against dense float64 deltas."""
    deltas = {stem: D for stem, D in sorted(deltas.items()) if D.any()}
    norm = math.hypot(*(np.linalg.norm(D) for D in deltas.values()))
    assert found.layout is not None
    assert found.layout.stems == tuple(deltas)
    assert found.layout.shapes == tuple(D.shape for D in deltas.values())
    assert found.norm == pytest.approx(norm, rel=1e-12)
    np.testing.assert_allclose(
        found.norms, [np.linalg.norm(D) for D in deltas.values()], rtol=1e-12
    )
    side = found.layout.side
    wanted, numbers = [], []
    for stem, D in deltas.items():
        P, Q = sk.sides(SEED, stem, D.shape, (side, side))
        wanted.append(P @ D @ Q.T / side / norm)
        P = sk.sides(SEED, stem, D.shape, (sk.COLUMNS, 1))[0]
        numbers.append((P @ D @ D.T @ P.T)[np.triu_indices(sk.COLUMNS, 1)])
    assert found.sketch.dtype == np.float16
    np.testing.assert_allclose(found.sketch, wanted, rtol=tolerance, atol=1e-5)
    outputs = sk.folded(np.stack(numbers), SEED, tuple(deltas), "outputs", sk.OUTPUTS)
    squares = sum(np.linalg.norm(D @ D.T) ** 2 for D in deltas.values())
    outputs /= math.sqrt(squares * sk.COLUMNS * (sk.COLUMNS - 1) / 2)
    np.testing.assert_allclose(found.outputs, outputs, rtol=tolerance, atol=1e-5)
    values = [np.linalg.svd(D, compute_uv=False) ** 2 for D in deltas.values()]
    for rank, error in zip(found.needed, (0.01, 0.05), strict=True):
        tails = [sum(v[k:].sum() for v in values) / norm**2 for k in (rank, rank - 1)]
        assert tails[0] <= error**2 * (1 + 1e-6) and (rank == 1 or tails[1] > error**2 * 0.999999)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.title)
def test_every_kind_is_as_its_dense_delta(kind: Kind, tmp_path: Path) -> None:
    modules = {f"lora_unet_block_{i}": kind.draw(i, 3) for i in range(2)}
    path = write(tmp_path / "a.safetensors", modules, alpha=dict.fromkeys(modules, 2.0))
    check(signed(path), read(path))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_plain_lora_of_every_type(dtype: str, rank: int, tmp_path: Path) -> None:
    path = stored(write_peft(tmp_path / "a", pairs(0, SHAPES, rank), alpha=5), dtype)
    found = signed(path)
    check(found, read(path))
    assert found.base == "tiny/base" and found.dialect == "peft" and found.rank == rank
    assert found.size == (path / "adapter_model.safetensors").stat().st_size
    assert found.content and not found.extras


def test_mixed_ranks_and_types_and_long_modules(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {}
    for index, (rank, dtype, m, n) in enumerate(
        [
            (2, "f2", 30, 20),
            (5, "f4", 30, 20),
            (2, "f2", 30, 20),
            (2, "f2", 9000, 40),
            (2, "f2", 10, 9001),
            (40, "f4", 20, 30),
        ]
    ):
        stem = f"base_model.model.model.layers.{index}.mlp.up_proj"
        tensors[f"{stem}.lora_A.weight"] = rng.standard_normal((rank, n)).astype(dtype)
        tensors[f"{stem}.lora_B.weight"] = (0.1 * rng.standard_normal((m, rank))).astype(dtype)
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = np.ones((2, 50), "f4")
    tensors["base_model.model.model.embed_tokens.lora_embedding_B"] = np.ones((20, 2), "f4")
    folder = tmp_path / "a"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"1.mlp.up_proj": 5}}
    config["rank_pattern"]["5.mlp.up_proj"] = 40
    (folder / "adapter_config.json").write_text(json.dumps(config))
    check(signed(folder), read(folder))


def test_finishing_module_by_module_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {f"layers.{i}.up_proj": (900, 700) for i in range(10)}
    path = write_peft(tmp_path / "a", pairs(0, shapes, 60))
    wanted = signed(path)
    monkeypatch.setattr("adapterops.fleet.signing.signature._HELD", 0)
    found = signed(path)
    assert found.layout == wanted.layout and found.needed == wanted.needed
    for name in ("norms", "sketch", "outputs", "start"):
        assert np.array_equal(getattr(found, name), getattr(wanted, name))


@pytest.mark.parametrize("model", ["merged_linear", "mlx", "adalora"])
def test_kinds_of_their_own_files(model: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    folder = tmp_path / "a"
    folder.mkdir()

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    prefix, name = "base_model.model.h.0.attn", "adapter_model.safetensors"
    config: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    if model == "merged_linear":
        tensors = {
            f"{prefix}.lora_A.weight": draw(8, 24),
            f"{prefix}.lora_B.weight": draw(32, 4, 1),
        }
        config["enable_lora"] = [True, False, True]
    elif model == "adalora":
        tensors = {
            f"{prefix}.lora_A": draw(4, 24),
            f"{prefix}.lora_B": draw(32, 4),
            f"{prefix}.lora_E": draw(4, 1),
        }
        config |= {"peft_type": "ADALORA", "init_r": 4, "target_r": 2}
    else:
        tensors = {
            "model.layers.0.q_proj.lora_a": draw(24, 4),
            "model.layers.0.q_proj.lora_b": draw(4, 32),
        }
        config, name = {"lora_parameters": {"rank": 4, "scale": 10.0}}, "adapters.safetensors"
    save_file(tensors, folder / name)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    check(signed(folder), read(folder))


def test_experts_share_their_tensors(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    stem = "base_model.model.model.layers.0.mlp.experts"
    folder = tmp_path / "a"
    folder.mkdir()
    tensors = {
        f"{stem}.lora_A.weight": rng.standard_normal((3 * 2, 10)).astype(np.float32),
        f"{stem}.lora_B.weight": rng.standard_normal((14, 2 * 3)).astype(np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["mlp.experts.w"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = signed(folder)
    assert found.layout is not None and len(found.layout.stems) == 3
    check(found, read(folder))


def regauged(factors: Mapping[str, tuple[np.ndarray, np.ndarray]], how: str) -> tuple[Any, float]:
    """The same ΔW in other factors, and the alpha that goes with them."""
    rng = np.random.default_rng(9)
    result: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, (B, A) in factors.items():
        rank = B.shape[1]
        G = np.eye(rank)
        if how == "permuted":
            G = G[rng.permutation(rank)]
        elif how == "turned":
            G = np.linalg.qr(rng.standard_normal((rank, rank)))[0] @ np.diag([8.0, 1, 1, 0.2])
        elif how == "signs":
            G = np.diag([-1.0, 1, -1, 1])
        scale = {"alpha": 0.25, "graded": 1e4}.get(how, 1.0)
        result[name] = (B @ G * scale, np.linalg.solve(G, A))
        if how == "wider":
            result[name] = (np.hstack([B, B, 0 * B]) / 2, np.vstack([A, A, A]))
    return result, {"alpha": 16.0, "graded": 4e-4, "wider": 12.0}.get(how, 4.0)


@pytest.mark.parametrize(
    "how", ["same", "permuted", "turned", "signs", "alpha", "graded", "wider", "rslora"]
)
def test_the_sketch_sees_the_delta_and_not_its_factors(how: str, tmp_path: Path) -> None:
    factors = pairs(0, SHAPES, 4, np.float64)
    first = signed(write_peft(tmp_path / "a", factors))
    other, alpha = regauged(factors, how)
    options = {"use_rslora": True} if how == "rslora" else {}
    if how == "rslora":
        alpha = 2.0
    second = signed(write_peft(tmp_path / "b", other, alpha=alpha, **options))
    np.testing.assert_allclose(second.norms, first.norms, rtol=1e-11)
    np.testing.assert_allclose(second.sketch, first.sketch, rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(second.outputs, first.outputs, rtol=2e-3, atol=1e-5)
    assert second.needed == first.needed
    assert (second.content == first.content) == (how in ("same", "rslora"))


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_copies_in_16_bits_stay_near(dtype: str, error: float, tmp_path: Path) -> None:
    factors = pairs(0, SHAPES, 4)
    a = signed(write_peft(tmp_path / "a", factors))
    b = signed(stored(write_peft(tmp_path / "b", factors), dtype))
    assert np.linalg.norm(a.sketch.astype(float) - b.sketch) < error
    assert cosine(a.outputs, b.outputs) > 1 - error
    assert a.content != b.content


def test_nearly_cancelling_factors_are_seen_exactly(tmp_path: Path) -> None:
    """[B, −B₀][A; A₀] with a small difference: Gram matrices alone would see nothing."""
    rng = np.random.default_rng(0)
    factors = {}
    for name, (B, A) in pairs(0, SHAPES, 3, np.float64).items():
        moved = A + 1e-7 * rng.standard_normal(A.shape)
        factors[name] = (np.hstack([B, -B]), np.vstack([moved, A]))
    path = write_peft(tmp_path / "a", factors)
    found, deltas = signed(path), {n: B[:, :3] @ (A[:3] - A[3:]) for n, (B, A) in factors.items()}
    np.testing.assert_allclose(found.norms, [np.linalg.norm(D) for D in deltas.values()], rtol=1e-7)
    side = found.layout.side if found.layout else 0
    for stem, S in zip(deltas, found.sketch, strict=True):
        P, Q = sk.sides(SEED, stem, SHAPES[stem], (side, side))
        np.testing.assert_allclose(
            S, P @ deltas[stem] @ Q.T / side / found.norm, rtol=3e-3, atol=1e-4
        )


@pytest.mark.parametrize("size", [1e-200, 1e-30, 1e30, 1e100])
def test_extreme_sizes(size: float, tmp_path: Path) -> None:
    plain = pairs(0, SHAPES, 4, np.float64)
    a = signed(write_peft(tmp_path / "a", plain))
    factors = {name: (B * size, A) for name, (B, A) in plain.items()}
    b = signed(write_peft(tmp_path / "b", factors))
    np.testing.assert_allclose(b.norms, a.norms * size, rtol=1e-12)
    np.testing.assert_allclose(b.sketch, a.sketch, rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(b.outputs, a.outputs, rtol=2e-3, atol=1e-5)


def test_all_codes_of_16_bits_are_widened_exactly() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    for name, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        wanted = torch.from_numpy(every).view(dtype).float().numpy().reshape(256, 256)
        stored = codes(every.view(np.uint8), name).reshape(256, 256)
        for at in (slice(None), slice(3, 250)):
            found, right = widened(stored[:, at], name), wanted[:, at]
            finite = np.isfinite(right)
            assert np.array_equal(found.view(np.int32)[finite], right.view(np.int32)[finite])
            left = found[~finite]
            assert (~np.isfinite(left) | (np.abs(left) >= 2.0**16)).all()


# ---- outputs and starts --------------------------------------------------------------------------


def test_outputs_approximate_the_cosine_of_output_grams(tmp_path: Path) -> None:
    shapes = {f"layers.{i}.q_proj": (48, 32) for i in range(24)}
    a, b, c = (pairs(seed, shapes, 2, np.float64) for seed in range(3))
    other = {n: (0.8 * B + 0.6 * c[n][0], b[n][1]) for n, (B, _) in a.items()}
    grams = [
        np.stack([B @ A @ A.T @ B.T for B, A in factors.values()]) for factors in (a, other, b)
    ]
    found = [
        signed(write_peft(tmp_path / str(index), factors)).outputs
        for index, factors in enumerate((a, other, b))
    ]
    for i, j in itertools.combinations(range(3), 2):
        assert cosine(found[i], found[j]) == pytest.approx(cosine(grams[i], grams[j]), abs=0.13)
    assert cosine(grams[0], grams[1]) > 0.3
    assert [float(np.linalg.norm(x.astype(float))) for x in found] == pytest.approx(
        [1] * 3, rel=0.15
    )


def test_starts_tell_seeds_apart_and_not_tasks(tmp_path: Path) -> None:
    shapes = {f"layers.{i}.q_proj": (48, 64) for i in range(24)}
    rng = np.random.default_rng(7)

    def trained(start: int, rank: int = 8) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        result = {}
        for name, (_, A) in pairs(start, shapes, 8).items():
            moved = A + 0.1 * rng.standard_normal(A.shape).astype(np.float32)
            result[name] = (rng.standard_normal((48, rank)).astype(np.float32), moved[:rank])
        return result

    found = {
        name: signed(write_peft(tmp_path / name, factors))
        for name, factors in (
            ("a", trained(0)),
            ("b", trained(0)),
            ("narrow", trained(0, 4)),
            ("other", trained(1)),
        )
    }
    starts = {name: item.start for name, item in found.items()}
    assert starts["a"].shape == (256,)
    assert np.linalg.norm(starts["a"].astype(float)) == pytest.approx(1, rel=1e-3)
    assert cosine(starts["a"], starts["b"]) > 0.97
    assert cosine(starts["a"], starts["narrow"]) > 0.97
    assert abs(cosine(starts["a"], starts["other"])) < 0.2
    assert abs(cosine(found["a"].sketch, found["b"].sketch)) < 0.2  # unrelated all the same


# ---- hashes --------------------------------------------------------------------------------------


def test_content_is_what_it_does(tmp_path: Path) -> None:
    factors, head = pairs(0, SHAPES, 4), {"base_model.model.score.weight": np.ones((2, 4), "f4")}
    first = signed(write_peft(tmp_path / "a", factors, extras=head))

    folder = tmp_path / "elsewhere"
    folder.mkdir()
    data = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    header.pop("__metadata__")
    turned, moved = {}, b""
    for name in reversed(header):  # other metadata, another order of names and of bytes
        start, end = header[name]["data_offsets"]
        turned[name] = header[name] | {"data_offsets": [len(moved), len(moved) + end - start]}
        moved += body[start:end]
    document = {"__metadata__": {"note": "another"}, **turned}
    (folder / "adapter_model (1).safetensors").write_bytes(hostile.file(document, moved))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config |= {"task_type": "CAUSAL_LM", "lora_dropout": 0.1, "target_modules": ["other"]}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=4))
    second = signed(folder)
    assert (second.content, second.extras) == (first.content, first.extras)
    assert np.array_equal(second.sketch, first.sketch)

    name = next(iter(factors))
    B, A = factors[name]
    bit = A.copy()
    bit.view(np.uint32)[0, 0] ^= 1
    changes: dict[str, tuple[Any, Any, Any]] = {
        "bit": ({**factors, name: (B, bit)}, head, {}),
        "scale": (factors, head, {"alpha": 5}),
        "rslora": (factors, head, {"use_rslora": True}),
        "head": (factors, {k: 2 * v for k, v in head.items()}, {}),
        "no head": (factors, {}, {}),
        "name": ({**{k: v for k, v in factors.items() if k != name}, "x": (B, A)}, head, {}),
        "tokens": (factors, head, {"trainable_token_indices": [1, 2]}),
    }
    seen = {first.content: "same"}
    for what, (new, extras, options) in changes.items():
        found = signed(write_peft(tmp_path / what, new, extras=extras, **options))
        assert found.content not in seen, (what, seen[found.content])
        seen[found.content] = what
        assert (found.extras == first.extras) == (what in ("bit", "scale", "rslora", "name"))


def test_extras_hold_changes_of_biases(tmp_path: Path) -> None:
    factors = pairs(0, SHAPES, 4)
    stem = f"base_model.model.{next(iter(SHAPES))}.lora_B.bias"
    found = {
        name: signed(write_peft(tmp_path / name, factors, extras={stem: bias}, **options))
        for name, bias, options in (
            ("a", np.ones(40, "f4"), {}),
            ("same", np.ones(40, "f4"), {}),
            ("b", np.full(40, 2, "f4"), {}),
            ("scale", np.ones(40, "f4"), {"alpha": 8}),
        )
    }
    assert found["a"].extras == found["same"].extras != ""
    assert len({item.extras for item in found.values()}) == 3


# ---- status --------------------------------------------------------------------------------------


def plain(folder: Path, **config: Any) -> Path:
    """An adapter with nothing wrong but what its config says."""
    return write_peft(folder, pairs(0, SHAPES, 4), **config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"peft_type": "OFT"}, "OFT"),
        ({"layer_replication": [[0, 2]]}, "layer replication"),
        ({"r": 7}, "r=7"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_ineligible_by_its_config(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = plain(tmp_path / "a", **config)
    found = signature(str(path), SEED)
    assert found.status == "ineligible" and words in found.reason
    assert str(tmp_path) not in found.reason
    assert found.base == "tiny/base" and found.size > 0
    assert found.layout is None and not found.sketch.size and not found.norms.size
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    assert found.content and signature(str(copy), SEED).content == found.content
    other = plain(tmp_path / "other", **config, lora_dropout=0.5)
    assert signature(str(other), SEED).content != found.content  # what it means is not known


def test_ineligible_by_its_tensors(tmp_path: Path) -> None:
    factors = pairs(0, {"lora_unet_a": (8, 6)}, 2)
    tensors = {
        f"lora_unet_a.{s}": v
        for s, v in zip(("lora_up.weight", "lora_down.weight"), factors["lora_unet_a"], strict=True)
    }
    for name, more, words in (
        ("diff", {"lora_unet_b.diff": np.ones((8, 6), "f4")}, "dense"),
        ("dora", {"lora_unet_a.dora_scale": np.ones((8, 1), "f4")}, "DoRA"),
        ("unknown", {"lora_unet_a.mystery": np.ones((8, 1), "f4")}, "mystery"),
        ("alpha", {"lora_unet_a.alpha": np.zeros((), "f4")}, "alpha is 0"),
    ):
        save_file(tensors | more, tmp_path / f"{name}.safetensors")
        found = signature(str(tmp_path / f"{name}.safetensors"), SEED)
        assert found.status == "ineligible" and words in found.reason, (name, found.reason)
        assert found.content


def test_without_a_scale(tmp_path: Path) -> None:
    path = plain(tmp_path / "a")
    (path / "adapter_config.json").unlink()
    found = signature(str(path), SEED)
    assert found.status == "ineligible" and "no scale" in found.reason and found.content


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", TYPES)
def test_values_that_are_none_are_broken(value: float, dtype: str, tmp_path: Path) -> None:
    for side in (0, 1):
        factors = pairs(0, SHAPES, 4)
        name = sorted(factors)[2]
        factors[name][side][1, 2] = value
        path = stored(write_peft(tmp_path / f"{side}", factors), dtype)
        found = signature(str(path), SEED)
        assert found.status == "broken"
        assert "1 of" in found.reason and "NaN or infinite" in found.reason and name in found.reason


def test_large_finite_numbers_of_float16_are_no_infinities(tmp_path: Path) -> None:
    factors = {"x.q_proj": (np.full((40, 2), 65504, np.float16), np.eye(2, 24, dtype=np.float16))}
    check(signed(write_peft(tmp_path / "a", factors)), read(tmp_path / "a"))


def test_beyond_float64(tmp_path: Path) -> None:
    factors = {n: (B * 1e200, A * 1e200) for n, (B, A) in pairs(0, SHAPES, 4, np.float64).items()}
    found = signature(str(write_peft(tmp_path / "a", factors)), SEED)
    assert found.status == "broken" and "beyond float64" in found.reason


@pytest.mark.parametrize("name", hostile.CASES)
def test_hostile_files_are_broken(name: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(hostile.CASES[name][0])
    found = signature(str(tmp_path), SEED)
    assert found.status == "broken" and found.reason and found.content == ""


def test_files_that_are_none_are_broken(tmp_path: Path) -> None:
    path = plain(tmp_path / "a")
    weights = path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    reasons = {}
    for cut in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        found = signature(str(path), SEED)
        assert found.status == "broken"
        reasons[cut] = found.reason
    assert "truncated" in reasons[100]
    weights.write_bytes(whole)
    (path / "adapter_config.json").write_text("{not json")
    assert signature(str(path), SEED).status == "broken"
    assert signature(str(tmp_path / "absent"), SEED).reason == "no such file or directory"


def test_a_defect_of_ours_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> None:
        raise ValueError("as no file should")

    monkeypatch.setattr("adapterops.fleet.signing.signature.content_hash", fails)
    found = signature(str(plain(tmp_path / "a")), SEED)
    assert (found.status, found.base) == ("broken", "tiny/base")
    assert found.reason == "cannot be read (ValueError: as no file should)"
    for error in (MemoryError, KeyboardInterrupt):
        monkeypatch.setattr(
            "adapterops.fleet.signing.signature.content_hash",
            lambda *_, error=error: (_ for _ in ()).throw(error),
        )
        with pytest.raises(error):
            signature(str(tmp_path / "a"), SEED)


def test_pickles_need_permission(tmp_path: Path) -> None:
    path = plain(tmp_path / "a")
    wanted = signed(path)
    weights = path / "adapter_model.safetensors"
    torch.save(load_tensors(weights), path / "adapter_model.bin")
    weights.unlink()
    refused = signature(str(path), SEED)
    assert refused.status == "ineligible" and "--allow-pickle" in refused.reason
    found = signed(path, allow_pickle=True)
    assert found.content == wanted.content and np.array_equal(found.sketch, wanted.sketch)
    (path / "adapter_model.bin").write_bytes(b"PK\x03\x04 no archive")
    assert signature(str(path), SEED, allow_pickle=True).status == "broken"


def test_nothing_is_a_no_op_and_half_of_it_is_left_out(tmp_path: Path) -> None:
    factors = pairs(0, SHAPES, 4)
    zero = {n: (0 * B, A) for n, (B, A) in factors.items()}
    found = signature(str(write_peft(tmp_path / "zero", zero)), SEED)
    assert (found.status, found.norm, found.layout) == ("no-op", 0.0, None) and found.content
    assert not found.sketch.size and found.needed == (0, 0)
    unscaled = signature(str(write_peft(tmp_path / "alpha", factors, alpha=0)), SEED)
    assert unscaled.status == "no-op"
    cancelled = {n: (np.hstack([B, -B]), np.vstack([A, A])) for n, (B, A) in factors.items()}
    assert signature(str(write_peft(tmp_path / "cancelled", cancelled)), SEED).status == "no-op"
    half = {n: zero[n] if "q_proj" in n else pair for n, pair in factors.items()}
    found = signed(write_peft(tmp_path / "half", half))
    assert found.layout is not None and len(found.layout.stems) == 3
    check(found, read(tmp_path / "half"))
    kron = next(kind for kind in KINDS if kind.title == "LoKr, both factored")
    arrays = {suffix: 0 * value for suffix, value in kron.draw(0, 2).items()}
    write(tmp_path / "kron.safetensors", {"lora_unet_a": arrays})
    assert signature(str(tmp_path / "kron.safetensors"), SEED).status == "no-op"


@pytest.mark.parametrize("name", ["score.weight", "model.layers.0.self_attn.q_proj.lora_B.bias"])
def test_only_extras(name: str, tmp_path: Path) -> None:
    zero = {n: (0 * B, A) for n, (B, A) in pairs(0, SHAPES, 4).items()}
    extras = {f"base_model.model.{name}": np.ones(40, np.float32)}
    found = signature(str(write_peft(tmp_path / "a", zero, extras=extras)), SEED)
    assert (found.status, found.reason) == ("ineligible", "only extras: every ΔW is zero")
    assert found.extras and found.content


def test_subnormal_factors_are_no_zero(tmp_path: Path) -> None:
    factors = {
        n: ((1e3 * B).astype(np.float16) * np.float16(2.0**-24), A.astype(np.float16))
        for n, (B, A) in pairs(0, SHAPES, 4).items()
    }
    assert all(np.abs(B).max() < 2.0**-14 for B, _ in factors.values())
    check(signed(write_peft(tmp_path / "a", factors)), read(tmp_path / "a"))


def test_another_seed_gives_another_sketch_of_the_same_content(tmp_path: Path) -> None:
    path = plain(tmp_path / "a")
    first, other = signature(str(path), 1), signature(str(path), 2)
    assert first.content == other.content and np.array_equal(first.norms, other.norms)
    assert abs(cosine(first.sketch, other.sketch)) < 0.5
    again = signature(str(path), 1)
    for item in fields(Signature):
        a, b = getattr(first, item.name), getattr(again, item.name)
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


# ---- reading -------------------------------------------------------------------------------------


def reads(monkeypatch: pytest.MonkeyPatch, path: Path) -> tuple[np.ndarray, Signature]:
    """How often each byte of a weights file is read after its header, and the signature."""
    file = path if path.is_file() else path / "adapter_model.safetensors"
    data = int.from_bytes(file.read_bytes()[:8], "little") + 8
    counts = np.zeros(file.stat().st_size, int)
    original = LocalFile.pread_into

    def counted(self: LocalFile, offset: int, buffer: memoryview) -> None:
        if self.path == str(file) and offset:
            counts[offset : offset + len(buffer)] += 1
        original(self, offset, buffer)

    monkeypatch.setattr(LocalFile, "pread_into", counted)
    found = signature(str(path), SEED)
    monkeypatch.undo()
    return counts[data:], found


def test_every_byte_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {f"layers.{i}.up_proj": (900, 700) for i in range(10)}
    extras = {"base_model.model.head.weight": np.ones((600, 800), np.float32)}
    path = write_peft(tmp_path / "a", pairs(0, shapes, 60), extras=extras)
    for config in ({}, {"use_dora": True}):
        text = (path / "adapter_config.json").read_text()
        (path / "adapter_config.json").write_text(json.dumps(json.loads(text) | config))
        counts, found = reads(monkeypatch, path)
        assert found.content and (counts == 1).all()


def test_a_file_that_changes_while_it_is_read_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = plain(tmp_path / "a")
    weights = path / "adapter_model.safetensors"
    original = LocalFile.pread_into

    def cut(self: LocalFile, offset: int, buffer: memoryview) -> None:
        original(self, offset, buffer)
        if offset:
            with weights.open("ab") as file:
                file.write(b"\0")

    monkeypatch.setattr(LocalFile, "pread_into", cut)
    found = signature(str(path), SEED)
    assert found.status == "broken" and "changed while being read" in found.reason


def test_copies_of_the_corpus_have_sensible_statuses(corpus: Path) -> None:
    for entry in json.loads((corpus / "manifest.json").read_text()):
        path = corpus / entry["file"]
        found = signature(str(path), SEED, allow_pickle=True)
        assert (found.status, found.reason) == ("ok", ""), path
        assert found.norm == pytest.approx(entry["fro"], rel=1e-6)
        assert found.rank == max(map(int, entry["ranks"]))
        assert bool(found.extras) == bool(entry["extra_keys"])
        assert 1 <= found.needed[1] <= found.needed[0] <= found.rank
        if path.suffix != ".safetensors":
            assert signature(str(path), SEED).status == "ineligible"


def test_real_adapters_are_as_near_as_they_are(corpus: Path) -> None:
    folder = corpus / "paulohenriquecrs__RoBERTa_SEQ_CLS_LoRA_Portuguese"
    other = corpus / "AguLeon__LoRA_RoBERTa_AGNews"
    paths = [folder / f"checkpoint-{step}" for step in (500, 8500, 8610)]
    found = [signed(path) for path in (*paths, other / "checkpoint-1200")]
    deltas = [
        {stem: factors.dense() for stem, factors in ao.open_adapter(path).items()} for path in paths
    ]
    stems = sorted(deltas[0])
    flat = [np.concatenate([d[stem].ravel() for stem in stems]) for d in deltas]
    for i, j in itertools.combinations(range(3), 2):
        distance = np.linalg.norm(flat[i] - flat[j]) / np.linalg.norm(flat[i])
        a, b = (found[k].sketch.astype(float) * found[k].norm for k in (i, j))
        estimate = np.linalg.norm(a - b) / found[i].norm
        assert estimate == pytest.approx(distance, rel=0.25)
    assert len({item.extras for item in found}) == 4  # heads differ
    assert cosine(found[1].start, found[2].start) > 0.95
