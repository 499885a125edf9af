"""Kinds: how the tensors of one module make the factors of ΔW = B·A, exactly, nothing dense.

Each kind is two functions. `measure` knows shapes only: it checks that the tensors go together and
says how large ΔW is. `expand` computes B (m, r) and A (r, n) in float64, the scale left out.

Entries of an expansion are products of two stored numbers, which float64 holds exactly for 16- and
32-bit inputs; only Tucker cores add up such products, and halves in an extreme gauge are made anew.

- lora: Hu et al. 2021 (arXiv 2106.09685). A of a convolution is flattened to (r, channels·kernel).
- tucker ("CP", `lora_mid`): ΔW[o,i,·] = Σ up[o,p]·mid[p,q,·]·down[q,i] (Tucker-2).
- loha: ΔW = (W1a·W1b) ∘ (W2a·W2b) (FedPara, Hyeon-Woo et al. 2022, proposition 1), whose factors
  are the row-wise and column-wise Khatri-Rao products: rank r².
- lokr: ΔW = W1 ⊗ W2 (LyCORIS, arXiv 2309.14859, §3.3); (L1·R1) ⊗ (L2·R2) = (L1⊗L2)·(R1⊗R2).
- adalora: ΔW = B·diag(E)·A (arXiv 2303.10512, eq. 3).
- merged_linear: loralib's fused projections, block-diagonal, slots that were not trained are zero.
- pissa, olora: a lora relative to a base that its initialisation changed (`inits`): 2r columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from adapterops import linalg
from adapterops.arrays import Array, namespace
from adapterops.errors import FormatError, UnsupportedError
from adapterops.formats import inits

Shapes = Mapping[str, tuple[int, ...]]
BESIDE = frozenset({"alpha", "bias", "magnitude"})  # roles that modules of any kind may have


@dataclass(frozen=True, slots=True)
class Measure:
    """Sizes of one module: ΔW is out x columns, `rank` columns of factors, trained with `dim`.

    `columns` counts channels x kernel; `kernel` is () where there is none or no tensor shows it.
    """

    out: int
    columns: int
    rank: int
    dim: int
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Kind:
    """The sets of roles that make a module of this kind, and its two functions.

    Both also take which slots of a fused projection were trained (merged_linear; else empty).
    `start` is for kinds that are relative to a changed base: from the base's weight, the rank and
    the scale it makes the factors that training started from.
    """

    forms: tuple[frozenset[str], ...]
    measure: Callable[[Shapes, Sequence[bool]], Measure]
    expand: Callable[[Mapping[str, Array], Sequence[bool]], tuple[Array, Array]]
    start: Callable[[inits.Matrix, int, float], tuple[inits.Matrix, inits.Matrix]] | None = None


def kind_of(roles: frozenset[str]) -> str | None:
    """The kind that a module's roles make, None if they make none."""
    for name, kind in KINDS.items():
        if roles in kind.forms:
            return name
    return None


def _measure_lora(shapes: Shapes, enabled: Sequence[bool]) -> Measure:
    A, B = shapes["A"], shapes["B"]
    if len(A) < 2 or len(B) < 2 or any(extent != 1 for extent in B[2:]):
        raise UnsupportedError(
            f"factors of shape A {list(A)}, B {list(B)} are no linear, convolution or embedding "
            "LoRA"
        )
    rank = A[0]
    if B[1] != rank:
        if rank and B[1] and rank % B[1] == 0 and len(A) > 2:
            raise UnsupportedError(
                f"A has rank {rank}, B has {B[1]}: a grouped convolution, which has no single "
                "low-rank delta"
            )
        raise FormatError(f"A has rank {rank}, B has rank {B[1]}")
    return Measure(B[0], math.prod(A[1:]), rank, rank, A[2:])


def _expand_lora(v: Mapping[str, Array], enabled: Sequence[bool]) -> tuple[Array, Array]:
    B, A = v["B"], v["A"]
    return B.reshape(B.shape[0], B.shape[1]), _flat(A)


def _measure_started(shapes: Shapes, enabled: Sequence[bool]) -> Measure:
    plain = _measure_lora(shapes, enabled)
    return replace(plain, rank=2 * plain.rank)


def _measure_tucker(shapes: Shapes, enabled: Sequence[bool]) -> Measure:
    mid, up, down = shapes["mid"], shapes["B"], shapes["A"]
    if len(mid) < 3 or len(up) < 2 or len(down) < 2 or math.prod(up[2:]) * math.prod(down[2:]) != 1:
        raise FormatError(
            f"lora_mid {list(mid)} between up {list(up)} and down {list(down)} is no Tucker core"
        )
    if mid[0] != up[1] or mid[1] != down[0]:
        raise FormatError(
            f"lora_mid is {mid[0]} x {mid[1]}, up has rank {up[1]} and down {down[0]}"
        )
    return Measure(up[0], down[1] * math.prod(mid[2:]), mid[0], down[0], mid[2:])


def _expand_tucker(v: Mapping[str, Array], enabled: Sequence[bool]) -> tuple[Array, Array]:
    up, down = v["B"], v["A"]
    return up.reshape(up.shape[0], up.shape[1]), _core_times(v["mid"], _flat(down))


def _measure_loha(shapes: Shapes, enabled: Sequence[bool]) -> Measure:
    one, two = (_side(shapes, f"w{k}_a", f"w{k}_b", f"t{k}") for k in (1, 2))
    if (one.out, one.columns) != (two.out, two.columns):
        raise FormatError(
            f"hada_w1 makes {one.out} x {one.columns}, hada_w2 makes {two.out} x {two.columns}"
        )
    return Measure(one.out, one.columns, one.rank * two.rank, one.dim, one.kernel or two.kernel)


def _expand_loha(v: Mapping[str, Array], enabled: Sequence[bool]) -> tuple[Array, Array]:
    left_1, right_1 = _factors(v, "w1_a", "w1_b", "t1")
    left_2, right_2 = _factors(v, "w2_a", "w2_b", "t2")
    rank = right_1.shape[0] * right_2.shape[0]
    B = (left_1[:, :, None] * left_2[:, None, :]).reshape(left_1.shape[0], rank)
    A = (right_1[:, None, :] * right_2[None, :, :]).reshape(rank, right_1.shape[1])
    return B, A


def _measure_lokr(shapes: Shapes, enabled: Sequence[bool]) -> Measure:
    sides = []
    for name in ("kw1", "kw2"):
        if name in shapes:
            shape = shapes[name]
            if len(shape) < 2:
                raise FormatError(f"lokr_{name[1:]} has shape {list(shape)}, expected a matrix")
            columns = math.prod(shape[1:])
            sides.append(Measure(shape[0], columns, min(shape[0], columns), 0, shape[2:]))
        else:
            sides.append(_side(shapes, f"{name}_a", f"{name}_b", f"kt{name[-1]}"))
    one, two = sides
    return Measure(
        one.out * two.out,
        one.columns * two.columns,
        one.rank * two.rank,
        two.dim or one.dim,
        two.kernel,
    )


def _expand_lokr(v: Mapping[str, Array], enabled: Sequence[bool]) -> tuple[Array, Array]:
    sides = []
    for name in ("kw1", "kw2"):
        if name in v:
            sides.append(split(_flat(v[name])))
        else:
            sides.append(_factors(v, f"{name}_a", f"{name}_b", f"kt{name[-1]}"))
    (left_1, right_1), (left_2, right_2) = sides
    return _kron(left_1, left_2), _kron(right_1, right_2)


def _measure_adalora(shapes: Shapes, enabled: Sequence[bool]) -> Measure:
    plain = _measure_lora(shapes, enabled)
    if shapes["E"] != (plain.rank, 1):
        raise FormatError(f"lora_E has shape {list(shapes['E'])}, expected [{plain.rank}, 1]")
    return plain


def _expand_adalora(v: Mapping[str, Array], enabled: Sequence[bool]) -> tuple[Array, Array]:
    B, A = _expand_lora(v, enabled)
    return B, A * v["E"]


def _measure_merged_linear(shapes: Shapes, enabled: Sequence[bool]) -> Measure:
    A, B = shapes["A"], shapes["B"]
    groups = sum(enabled)
    if not groups or len(A) != 2 or len(B) not in (2, 3) or A[0] != groups * B[1] or B[0] % groups:
        raise FormatError(
            f"A {list(A)} and B {list(B)} are no MergedLinear LoRA of enable_lora={list(enabled)}"
        )
    return Measure(B[0] // groups * len(enabled), A[1], A[0], B[1])


def _expand_merged_linear(v: Mapping[str, Array], enabled: Sequence[bool]) -> tuple[Array, Array]:
    A, B = v["A"], v["B"]
    groups = sum(enabled)
    height, dim = B.shape[0] // groups, B.shape[1]
    blocks = B.reshape(groups, height, dim)
    xp = namespace(B)
    rows, group = [], 0
    for trained in enabled:
        row = [xp.zeros_like(blocks[0])] * groups
        if trained:
            row[group] = blocks[group]
            group += 1
        rows.append(xp.concat(row, axis=1))
    return xp.concat(rows, axis=0), A


def _side(shapes: Shapes, a: str, b: str, core: str) -> Measure:
    """Sizes of one half of a LoHa or LoKr: a·b, or a core with a and b on its two modes."""
    names = ", ".join(f"{role} {list(shapes[role])}" for role in (a, b, core) if role in shapes)
    left, right = shapes[a], shapes[b]
    if core in shapes:
        mid = shapes[core]
        if len(mid) < 3 or (left[0], right[0]) != mid[:2] or len(left) != 2 or len(right) != 2:
            raise FormatError(f"{names} do not multiply")
        return Measure(left[1], right[1] * math.prod(mid[2:]), mid[0], mid[0], mid[2:])
    if len(left) != 2 or len(right) < 2 or left[1] != right[0]:
        raise FormatError(f"{names} do not multiply")
    return Measure(left[0], math.prod(right[1:]), left[1], right[0], right[2:])


def _factors(v: Mapping[str, Array], a: str, b: str, core: str) -> tuple[Array, Array]:
    left, right = (v[a].mT, _core_times(v[core], v[b])) if core in v else (v[a], _flat(v[b]))
    return _balanced(left, right)


def _balanced(left: Array, right: Array) -> tuple[Array, Array]:
    """The same product from columns that do not cancel.

    A product of two halves squares what their gauges amplify: two of condition 1e6 would leave
    four digits. Where columns cancel so far, each half is refactored on its own first.
    """
    if not linalg.cores(left[None], right[None])[0].cancels:
        return left, right
    result = linalg.truncate(left[None], right[None], left.shape[1])[0]
    return result.B, result.A


def _core_times(core: Array, right: Array) -> Array:
    """Σ_q core[p,q,k]·right[q,i] as (p, i·k): i counts channels, k positions of the kernel."""
    p, q = core.shape[0], core.shape[1]
    moved = core.reshape(p, q, -1).mT @ right  # (p, k, i)
    return moved.mT.reshape(p, -1)


def split(full: Array) -> tuple[Array, Array]:
    """A matrix as factors of the smaller of its sides: itself and an identity."""
    rows, columns = full.shape
    xp = namespace(full)
    side = min(rows, columns)
    identity = xp.zeros_like(full[:side, :side])
    identity[range(side), range(side)] = 1.0
    return (full, identity) if columns <= rows else (identity, full)


def _kron(a: Array, b: Array) -> Array:
    """a ⊗ b; torch's own cannot take the transposed views that occur here."""
    product = a[:, None, :, None] * b[None, :, None, :]
    return product.reshape(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])


def _flat(values: Array) -> Array:
    return values.reshape(values.shape[0], math.prod(values.shape[1:]))


_LOHA = frozenset({"w1_a", "w1_b", "w2_a", "w2_b"})
_LOKR = tuple(
    frozenset({*first, *second})
    for first in (("kw1",), ("kw1_a", "kw1_b"))
    for second in (("kw2",), ("kw2_a", "kw2_b"), ("kw2_a", "kw2_b", "kt2"))
)

KINDS: Mapping[str, Kind] = {
    "lora": Kind((frozenset("AB"),), _measure_lora, _expand_lora),
    "tucker": Kind((frozenset({"A", "B", "mid"}),), _measure_tucker, _expand_tucker),
    "loha": Kind((_LOHA, _LOHA | {"t1", "t2"}), _measure_loha, _expand_loha),
    "lokr": Kind(_LOKR, _measure_lokr, _expand_lokr),
    "adalora": Kind((frozenset("ABE"),), _measure_adalora, _expand_adalora),
    # The roles of a lora: what tells them apart is enable_lora in the config.
    "merged_linear": Kind((), _measure_merged_linear, _expand_merged_linear),
    # Also a lora's: init_lora_weights in the config tells, and the base must be at hand.
    "pissa": Kind((), _measure_started, _expand_lora, inits.pissa),
    "olora": Kind((), _measure_started, _expand_lora, inits.olora),
}
