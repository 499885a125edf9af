"""One adapter of every kind as kohya's and LyCORIS' files store it, with the dense ΔW it means.

Each kind has a formula of its own here, one einsum; `test_kinds` compares it with lycoris-lora's
functional API and with what the library's modules compute, and then our reading with it.
(LyCORIS: arXiv 2309.14859; suffixes and shapes: lycoris-lora 4.1.3, `modules/*.py`.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import adapterops as ao
from adapterops.errors import UnsupportedError
from adapterops.formats import read_adapter
from tests.support import load_file

Arrays = Mapping[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]

OUT, IN = 24, 30  # of every linear case; a convolution has OUT x 6 channels
CHANNELS = 6
SPLIT_OUT, SPLIT_IN = (3, 8), (5, 6)  # LoKr: OUT = 3·8, IN = 5·6
SPLIT_CHANNELS = (2, 3)


@dataclass(frozen=True)
class Kind:
    """A kind of adapter in one of its spellings.

    `name` is what `Site.kind` says. `shapes` maps the trained rank ("dim") to each tensor's shape
    by suffix; `rank` bounds the columns of its exact factors. `kernel` is what the file shows of
    it: a LoHa whose in-channels and kernel are flattened into one shows none. `scaled`: whether
    alpha / dim applies at all.
    """

    name: str
    title: str
    shapes: Callable[[int], Shapes]
    rank: Callable[[int], int]
    kernel: tuple[int, ...] = ()
    scaled: bool = True

    @property
    def layer(self) -> str:
        """What `Site.layer` says."""
        return "conv" if self.kernel else "linear"

    def draw(self, seed: int, dim: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
        """Random tensors by suffix."""
        rng = np.random.default_rng([seed, dim])
        return {
            suffix: (0.3 * rng.standard_normal(shape)).astype(dtype)
            for suffix, shape in self.shapes(dim).items()
        }

    def scale(self, dim: int, alpha: float | None) -> float:
        """alpha / dim; 1 without an alpha, and where no factor has a rank."""
        return alpha / dim if self.scaled and alpha is not None else 1.0


# ---- LoRA, LoCon, Tucker -------------------------------------------------------------------------


def _pair(arrays: Arrays) -> np.ndarray:
    up, down = arrays["lora_up.weight"], arrays["lora_down.weight"]
    return np.einsum("or,ri...->oi...", up.reshape(len(up), -1), down)


def _tucker(arrays: Arrays) -> np.ndarray:
    up, down = (arrays[f"lora_{side}.weight"] for side in ("up", "down"))
    up, down = up.reshape(len(up), -1), down.reshape(len(down), -1)
    return np.einsum("pq...,op,qi->oi...", arrays["lora_mid.weight"], up, down)


def _locon(title: str, channels: int, kernel: tuple[int, ...]) -> Kind:
    def shapes(dim: int) -> Shapes:
        ones = (1,) * len(kernel)
        return {
            "lora_up.weight": (OUT, dim, *ones),
            "lora_down.weight": (dim, channels, *kernel),
        }

    return Kind("lora", title, shapes, lambda dim: dim, kernel)


def _cp(title: str, kernel: tuple[int, ...]) -> Kind:
    def shapes(dim: int) -> Shapes:
        ones = (1,) * len(kernel)
        return {
            "lora_up.weight": (OUT, dim, *ones),
            "lora_down.weight": (dim, CHANNELS, *ones),
            "lora_mid.weight": (dim, dim, *kernel),
        }

    return Kind("tucker", title, shapes, lambda dim: dim, kernel)


# ---- LoHa ----------------------------------------------------------------------------------------


def _loha_plain(arrays: Arrays) -> np.ndarray:
    one, two = (arrays[f"hada_w{k}_a"] @ arrays[f"hada_w{k}_b"] for k in (1, 2))
    return one * two


def _loha_tucker(arrays: Arrays) -> np.ndarray:
    one, two = (
        np.einsum(
            "pq...,po,qi->oi...",
            arrays[f"hada_t{k}"],
            arrays[f"hada_w{k}_a"],
            arrays[f"hada_w{k}_b"],
        )
        for k in (1, 2)
    )
    return one * two


def _loha(title: str, columns: int) -> Kind:
    def shapes(dim: int) -> Shapes:
        a, b = (OUT, dim), (dim, columns)
        return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}

    return Kind("loha", title, shapes, lambda dim: dim * dim)


def _loha_core(title: str, kernel: tuple[int, ...]) -> Kind:
    def shapes(dim: int) -> Shapes:
        a, b, t = (dim, OUT), (dim, CHANNELS), (dim, dim, *kernel)
        return {
            "hada_w1_a": a,
            "hada_w1_b": b,
            "hada_t1": t,
            "hada_w2_a": a,
            "hada_w2_b": b,
            "hada_t2": t,
        }

    return Kind("loha", title, shapes, lambda dim: dim * dim, kernel)


# ---- LoKr ----------------------------------------------------------------------------------------


def _kronecker(arrays: Arrays) -> np.ndarray:
    one = arrays["lokr_w1"] if "lokr_w1" in arrays else arrays["lokr_w1_a"] @ arrays["lokr_w1_b"]
    if "lokr_w2" in arrays:
        two = arrays["lokr_w2"]
    elif "lokr_t2" in arrays:
        two = np.einsum(
            "pq...,po,qi->oi...", arrays["lokr_t2"], arrays["lokr_w2_a"], arrays["lokr_w2_b"]
        )
    else:
        two = arrays["lokr_w2_a"] @ arrays["lokr_w2_b"]
    out, channels = one.shape[0] * two.shape[0], one.shape[1] * two.shape[1]
    product = np.einsum("ac,bd...->abcd...", one, two)
    return product.reshape(out, channels, *two.shape[2:])


def _lokr(title: str, w1: str, w2: str, kernel: tuple[int, ...] = ()) -> Kind:
    """w1 is full or factored; w2 is full, factored or core (Tucker); `kernel` of a convolution.

    A factored w2 of a convolution has in-channels and kernel flattened into one axis.
    """
    (p, m), (q, n) = SPLIT_OUT, SPLIT_CHANNELS if kernel else SPLIT_IN
    cells = math.prod(kernel)

    def shapes(dim: int) -> Shapes:
        one: Shapes = {"lokr_w1": (p, q)}
        if w1 == "factored":
            one = {"lokr_w1_a": (p, dim), "lokr_w1_b": (dim, q)}
        if w2 == "full":
            return {**one, "lokr_w2": (m, n, *kernel)}
        if w2 == "core":
            core = (dim, dim, *kernel)
            return {**one, "lokr_t2": core, "lokr_w2_a": (dim, m), "lokr_w2_b": (dim, n)}
        return {**one, "lokr_w2_a": (m, dim), "lokr_w2_b": (dim, n * cells)}

    def rank(dim: int) -> int:
        first = min(p, q, dim) if w1 == "factored" else min(p, q)
        return first * (min(m, n * cells) if w2 == "full" else min(m, dim))

    shown = kernel if w2 in ("full", "core") else ()
    scaled = (w1, w2) != ("full", "full")
    return Kind("lokr", title, shapes, rank, shown, scaled)


def dense(arrays: Arrays) -> np.ndarray:
    """ΔW without its scale in float64, (out, channels · kernel), the kernel in C order."""
    exact = {name: value.astype(np.float64) for name, value in arrays.items()}
    suffixes = exact.keys()
    if suffixes & {"lokr_w1", "lokr_w1_a"}:
        delta = _kronecker(exact)
    elif "hada_w1_a" in suffixes:
        delta = (_loha_tucker if "hada_t1" in suffixes else _loha_plain)(exact)
    else:
        delta = (_tucker if "lora_mid.weight" in suffixes else _pair)(exact)
    return delta.reshape(len(delta), -1)


KINDS = (
    _locon("LoRA, linear", IN, ()),
    _locon("LoCon, 3 x 3", CHANNELS, (3, 3)),
    _locon("LoCon, 3 x 2", CHANNELS, (3, 2)),
    _locon("LoCon, 1-D", CHANNELS, (5,)),
    _locon("LoCon, 3-D", CHANNELS, (3, 2, 2)),
    _cp("CP/Tucker LoCon, 3 x 3", (3, 3)),
    _cp("CP/Tucker LoCon, 3 x 2", (3, 2)),
    _cp("CP/Tucker LoCon, 1-D", (5,)),
    _cp("CP/Tucker LoCon, 3-D", (3, 2, 2)),
    _loha("LoHa, linear", IN),
    _loha("LoHa, 3 x 3, flattened", CHANNELS * 9),
    _loha_core("LoHa, Tucker 3 x 3", (3, 3)),
    _loha_core("LoHa, Tucker 3 x 2", (3, 2)),
    _loha_core("LoHa, Tucker 1-D", (5,)),
    _loha_core("LoHa, Tucker 3-D", (3, 2, 2)),
    _lokr("LoKr, both full", "full", "full"),
    _lokr("LoKr, w2 factored", "full", "factored"),
    _lokr("LoKr, w1 factored", "factored", "full"),
    _lokr("LoKr, both factored", "factored", "factored"),
    _lokr("LoKr, 3 x 2, both full", "full", "full", (3, 2)),
    _lokr("LoKr, 3 x 2, w2 factored", "full", "factored", (3, 2)),
    _lokr("LoKr, 3 x 2, w1 factored", "factored", "full", (3, 2)),
    _lokr("LoKr, 3 x 2, both factored", "factored", "factored", (3, 2)),
    _lokr("LoKr, Tucker 3 x 2", "full", "core", (3, 2)),
    _lokr("LoKr, Tucker 3 x 2, w1 factored", "factored", "core", (3, 2)),
    _lokr("LoKr, 1-D, both full", "full", "full", (5,)),
    _lokr("LoKr, Tucker 1-D", "full", "core", (5,)),
    _lokr("LoKr, Tucker 3-D", "full", "core", (3, 2, 2)),
)


# ---- files ---------------------------------------------------------------------------------------


def write(
    file: Path,
    modules: Mapping[str, Arrays],
    alpha: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    **tensors: np.ndarray,
) -> Path:
    """A safetensors file: stem -> tensors by suffix, alphas by stem, and further whole names."""
    named = {
        f"{stem}.{suffix}": value
        for stem, arrays in modules.items()
        for suffix, value in arrays.items()
    }
    named |= {f"{stem}.alpha": np.asarray(value) for stem, value in (alpha or {}).items()}
    contiguous = {name: np.ascontiguousarray(value) for name, value in (named | tensors).items()}
    for name, value in named.items():
        contiguous[name] = contiguous[name].reshape(value.shape)  # a 0-d array stays one
    save_file(contiguous, file, metadata=dict(metadata or {"format": "pt"}))
    return file


def read(path: Path, **options: Any) -> dict[str, np.ndarray]:
    """Every ΔW of an adapter as we read it, float64 (out, in)."""
    return {stem: factors.dense() for stem, factors in ao.open_adapter(path, **options).items()}


def assert_dora(path: Path, stem: str, shape: tuple[int, ...]) -> None:
    """Recognised with its magnitude by `read_adapter`, refused by name by everything that sums."""
    found = read_adapter(path)
    site = found.sites[stem]
    assert site.kind == "dora"
    assert site.parts["magnitude"].shape == shape
    assert any(isinstance(problem, UnsupportedError) for problem in found.problems)
    for refused in (
        lambda: ao.open_adapter(path),
        lambda: ao.merge([path], out=path.parent / "out"),
        lambda: ao.merge([path, path], [0.5, 0.5], out=path.parent / "out", dry_run=True),
    ):
        with pytest.raises(UnsupportedError, match="DoRA"):
            refused()
    assert not list(path.parent.glob("out*"))


# Suffixes of a down and up (A and B) pair in every spelling that is written, by what precedes them.
_PAIR = re.compile(
    r"(?P<stem>.*?)(?P<mark>\.lora_[AB](?:\.default)?\.weight|\.lora_(?:down|up)\.weight"
    r"|\.(?:down|up)\.weight|:(?:down|up))$"
)


def plain(file: Path) -> dict[str, np.ndarray]:
    """ΔW of each pair in a written one-file adapter by the plain rule: (alpha / r) · up · down.

    Without an `.alpha`, alpha = r: what our outputs promise in every dialect. What is neither a
    factor nor an alpha must be a full delta and is left to the caller.
    """
    tensors = load_file(file)
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        found = _PAIR.match(name)
        if found:
            side = "up" if re.search(r"lora_B|up", found["mark"]) else "down"
            pairs.setdefault(found["stem"], {})[side] = value.astype(np.float64)
    result = {}
    for stem, pair in pairs.items():
        up, down = pair["up"].reshape(len(pair["up"]), -1), pair["down"]
        rank = len(down)
        alpha = tensors.get(f"{stem}.alpha")
        scale = 1.0 if alpha is None else float(alpha.reshape(-1)[0]) / rank
        result[stem] = scale * up @ down.reshape(rank, -1)
    return result


def matched(
    found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], tolerance: float
) -> dict[str, str]:
    """wanted name -> found name, one to one by content; an AssertionError that says which is off.

    For dialects whose stems a test has no business to know.
    """
    assert len(found) == len(wanted), (sorted(found), sorted(wanted))
    result: dict[str, str] = {}
    left = dict(found)
    for name, value in wanted.items():
        near = [
            stem
            for stem, other in left.items()
            if other.shape == value.shape and gap(other, value) < tolerance
        ]
        assert near, f"{name} is none of {sorted(left)}"
        result[name] = near[0]
        del left[near[0]]
    return result


def gap(found: np.ndarray, wanted: np.ndarray) -> float:
    """‖found − wanted‖ / ‖wanted‖, the plain norm where nothing is wanted."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float(np.linalg.norm(found - wanted)) / (float(np.linalg.norm(wanted)) or 1.0)


def rows(kinds: Iterable[Kind] = KINDS) -> list[tuple[str, str, str]]:
    """(dialect, title, kind) of each case here, for the table of what is supported."""
    return [("kohya", kind.title, kind.name) for kind in kinds]
