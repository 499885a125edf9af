"""Planted fleets on disk: clusters at known errors, copies in other forms, and decoys.

`plant(root, ...)` writes PEFT directories `c00000/centre`, `c00000/member0`, … and says of each
which cluster it belongs to and the exact error of serving it by the cluster's centre. Everything
follows from the seed and the cluster's number. An error is ‖C − D‖ / ‖D‖ over all modules, C the
centre.

What a cluster is planted at holds for the factors before they are rounded to the file's type;
`Planted.error` is measured in float64 on the values in the files (to about 1e-8).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.planted_files import Array, Deltas, error, inner, norm, write

EPSILONS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
SHAPES: Mapping[str, tuple[int, int]] = {
    "model.layers.0.mlp.down_proj": (16, 40),
    "model.layers.0.self_attn.q_proj": (24, 16),
    "model.layers.0.self_attn.v_proj": (8, 16),
    "model.layers.1.self_attn.q_proj": (24, 16),
}
TYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
COPIES = ("bytes", "refactored", "rescaled", "rslora", "padded", "split", *TYPES)
NEAR = ("louder", "one-module", "absent")
FAR = ("flipped", "decoy", "no-op")
KINDS = COPIES + NEAR + FAR
NO_OP = "no-op"


@dataclass(frozen=True)
class Planted:
    """One tenant: its cluster, what it is, and how far from the centre.

    `label` is the same for all that belong together: the cluster's name, the tenant's own name for
    flipped ones and decoys, "no-op" for all whose change is zero. `epsilon` is what was planted,
    `error` what the files say; both are about the cluster's centre, infinite where ΔW = 0.
    `copy_of` names the tenant that a copy was made from and `drift` is the error of being served by
    that one: 0 but for rounding, to fp16 below 1e-3, to bf16 above it.
    """

    name: str
    cluster: str
    kind: str
    label: str
    epsilon: float
    error: float
    copy_of: str = ""
    drift: float = math.inf
    private: bool = False


@dataclass(frozen=True)
class Recipe:
    """What every cluster is made of.

    `members` are plain ones at exactly the cluster's ε, on top of one tenant for each of `kinds`.
    The clusters take `epsilons` in turn; those of even number share their initial A. The last
    plain member is private where `private` is set.
    """

    shapes: Mapping[str, tuple[int, int]]
    rank: int = 3
    members: int = 4
    kinds: tuple[str, ...] = KINDS
    epsilons: tuple[float, ...] = EPSILONS
    dtype: str = "F32"
    private: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Fleet:
    """A planted fleet: where it is and what is true of it."""

    root: Path
    tenants: Mapping[str, Planted]

    @property
    def private(self) -> set[str]:
        return {name for name, tenant in self.tenants.items() if tenant.private}

    def labels(self, names: Sequence[str] | None = None) -> list[str]:
        """True labels in the order of the names, or of all tenants by name."""
        return [self.tenants[name].label for name in names or sorted(self.tenants)]

    def of(self, *kinds: str) -> list[Planted]:
        """The tenants of these kinds, by name."""
        return [self.tenants[n] for n in sorted(self.tenants) if self.tenants[n].kind in kinds]

    def within(self, epsilon: float) -> list[str]:
        """Names of the tenants of all clusters planted at most so far apart, decoys included."""
        return sorted(n for n, tenant in self.tenants.items() if tenant.epsilon <= epsilon)

    def write_policy(self, path: Path) -> Path:
        """The private tenants as a policy file."""
        lines = ["tenant,private", *(f"{name},true" for name in sorted(self.private))]
        path.write_text("\n".join(lines) + "\n")
        return path


def plant(
    root: Path,
    clusters: int = 6,
    *,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    first: int = 0,
    **options: Any,
) -> Fleet:
    """Write `clusters` clusters below `root`, numbered from `first`; `options` are Recipe's."""
    recipe = Recipe(dict(shapes), **options)
    found = [
        tenant
        for number in range(first, first + clusters)
        for tenant in plant_cluster(root, number, recipe)
    ]
    return Fleet(root, {tenant.name: tenant for tenant in found})


def plant_cluster(root: Path, number: int, recipe: Recipe) -> list[Planted]:
    """Write one cluster; it depends on the recipe and its number alone."""
    rng = np.random.Generator(np.random.Philox(key=[recipe.seed, number]))
    epsilon = recipe.epsilons[number % len(recipe.epsilons)]
    name = f"c{number:05d}"
    start = _start(recipe) if number % 2 == 0 else None
    centre = _centre(rng, recipe, epsilon, start)
    alpha, dtype = 2.0 * recipe.rank, recipe.dtype
    written = {"centre": write(root / name / "centre", centre, alpha, dtype)}
    planted = [Planted(f"{name}/centre", name, "centre", name, epsilon, 0.0)]

    def add(short: str, kind: str, stored: Deltas, source: str = "", own: str = "") -> None:
        written[short] = stored
        planted.append(
            Planted(
                name=f"{name}/{short}",
                cluster=name,
                kind=kind,
                label=own or name,
                epsilon=epsilon,
                error=error(written["centre"], stored),
                copy_of=source and f"{name}/{source}",
                drift=error(written[source], stored) if source else math.inf,
                private=kind == "member" and recipe.private and short == last,
            )
        )

    last = f"member{recipe.members - 1}"
    exact = {"centre": centre}
    for index in range(recipe.members):
        short = f"member{index}"
        exact[short] = _at_distance(centre, _direction(rng, centre, index), epsilon)
        add(short, "member", write(root / name / short, exact[short], alpha, dtype))
    for index, kind in enumerate(recipe.kinds):
        place = root / name / kind
        if kind in COPIES:
            source = list(exact)[index % len(exact)]
            add(kind, kind, _write_copy(rng, place, kind, exact[source], recipe), source)
        elif kind in NEAR:
            add(kind, kind, write(place, _near(rng, kind, centre, epsilon, number), alpha, dtype))
        else:
            own = NO_OP if kind == "no-op" else f"{name}/{kind}"
            add(kind, kind, write(place, _far(rng, kind, centre), alpha, dtype), own=own)
    return planted


def _noise(rng: np.random.Generator, m: int, n: int) -> Array:
    return rng.standard_normal((m, n), np.float32).astype(np.float64)


def _start(recipe: Recipe) -> dict[str, Array]:
    """The A that clusters of even number start from."""
    rng = np.random.Generator(np.random.Philox(key=[recipe.seed, 2**63]))
    return {stem: _noise(rng, recipe.rank, n) / n**0.5 for stem, (_, n) in recipe.shapes.items()}


def _centre(
    rng: np.random.Generator, recipe: Recipe, epsilon: float, start: Mapping[str, Array] | None
) -> Deltas:
    """Factors with B smaller than A, as training leaves them, by up to ten times from case to case.

    The last module holds ε times the norm of the others: leaving it out is an error of ε.
    """
    size = 10 ** float(rng.uniform(-1.5, -0.5))
    made = {}
    for stem, (m, n) in recipe.shapes.items():
        A = _noise(rng, recipe.rank, n) / n**0.5
        if start is not None:
            A = start[stem] + 0.1 * A
        made[stem] = (size * _noise(rng, m, recipe.rank) / m**0.5, A)
    *others, last = made
    B, A = made[last]
    rest = norm({stem: made[stem] for stem in others})
    return made | {last: (B * (epsilon * rest / norm({last: (B, A)})), A)}


def _direction(
    rng: np.random.Generator, centre: Deltas, number: int, stem: str | None = None
) -> dict[str, tuple[Array | None, Array | None]]:
    """A change of B in every other module and of A in the rest, or of one module alone."""
    found: dict[str, tuple[Array | None, Array | None]] = {}
    for index, (name, (B, A)) in enumerate(centre.items()):
        if stem not in (None, name):
            found[name] = (None, None)
        elif (index + number) % 2:
            found[name] = (_noise(rng, *B.shape) * _rms(B), None)
        else:
            found[name] = (None, _noise(rng, *A.shape) * _rms(A))
    return found


def _rms(x: Array) -> float:
    return float(np.linalg.norm(x)) / x.size**0.5


def _at_distance(
    centre: Deltas, change: Mapping[str, tuple[Array | None, Array | None]], epsilon: float
) -> Deltas:
    """D = C + tE with ‖D − C‖ = ε‖D‖: (1−ε²)‖E‖²t² − 2ε²⟨C, E⟩t − ε²‖C‖² = 0."""
    E = {
        stem: (b if b is not None else B, a if a is not None else A)
        for stem, (B, A) in centre.items()
        for b, a in [change[stem]]
        if b is not None or a is not None
    }
    square, across, whole = inner(E, E), inner(centre, E), inner(centre, centre)
    a, b, c = (1 - epsilon**2) * square, -2 * epsilon**2 * across, -(epsilon**2) * whole
    t = (-b + (b * b - 4 * a * c) ** 0.5) / (2 * a)
    return {
        stem: (
            B if change[stem][0] is None else B + t * change[stem][0],
            A if change[stem][1] is None else A + t * change[stem][1],
        )
        for stem, (B, A) in centre.items()
    }


def _near(
    rng: np.random.Generator, kind: str, centre: Deltas, epsilon: float, number: int
) -> Deltas:
    """What is at ε from the centre in a particular way."""
    if kind == "louder":  # C + sC: s‖C‖ = ε(1 + s)‖C‖
        return {stem: (B / (1 - epsilon), A) for stem, (B, A) in centre.items()}
    if kind == "absent":
        return dict(list(centre.items())[:-1])
    stem = list(centre)[number % (len(centre) - 1)]
    return _at_distance(centre, _direction(rng, centre, number, stem), epsilon)


def _far(rng: np.random.Generator, kind: str, centre: Deltas) -> Deltas:
    """What must not be served by the centre."""
    if kind == "flipped":
        return {stem: (-B, A) for stem, (B, A) in centre.items()}
    if kind == "no-op":
        return {stem: (0 * B, A) for stem, (B, A) in centre.items()}
    return {
        stem: (_noise(rng, *B.shape) * _rms(B), A + 0.02 * _rms(A) * _noise(rng, *A.shape))
        for stem, (B, A) in centre.items()
    }


def _write_copy(
    rng: np.random.Generator, folder: Path, kind: str, exact: Deltas, recipe: Recipe
) -> Deltas:
    """The same adapter in another form; what its files hold."""
    alpha, dtype, rank = 2.0 * recipe.rank, recipe.dtype, recipe.rank
    if kind == "rescaled":
        return write(folder, exact, 0.5 * rank, dtype)
    if kind == "rslora":
        return write(folder, exact, alpha, dtype, rslora=True)
    if kind in TYPES:
        return write(folder, exact, alpha, TYPES[kind])
    forms = {"bytes": _same, "refactored": _refactored, "padded": _padded, "split": _split}
    made = {stem: forms[kind](rng, B, A) for stem, (B, A) in exact.items()}
    wider = {"padded": rank + 2, "split": 2 * rank}.get(kind, rank)
    return write(folder, made, 2.0 * wider, dtype)


def _same(rng: np.random.Generator, B: Array, A: Array) -> tuple[Array, Array]:
    return B, A


def _refactored(rng: np.random.Generator, B: Array, A: Array) -> tuple[Array, Array]:
    """(BG, G⁻¹A) with singular values of G between 1/2 and 2."""
    U, _, Vh = np.linalg.svd(rng.standard_normal((B.shape[1],) * 2))
    G = (U * rng.uniform(0.5, 2, B.shape[1])) @ Vh
    return B @ G, np.linalg.solve(G, A)


def _padded(rng: np.random.Generator, B: Array, A: Array) -> tuple[Array, Array]:
    """Two ranks more: zero columns of B over rows of A that are not zero."""
    extra = _noise(rng, 2, A.shape[1]) * _rms(A)
    return np.hstack([B, np.zeros((len(B), 2))]), np.vstack([A, extra])


def _split(rng: np.random.Generator, B: Array, A: Array) -> tuple[Array, Array]:
    """Twice the rank: every term in two unequal parts."""
    return np.hstack([0.25 * B, 0.75 * B]), np.vstack([A, A])


def adjusted_rand(first: Sequence[object], second: Sequence[object]) -> float:
    """Adjusted Rand index of two labellings (Hubert and Arabie 1985, eq. 5); 1 if they agree."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} labels against {len(second)}")
    _, rows = np.unique(np.array([str(x) for x in first]), return_inverse=True)
    _, columns = np.unique(np.array([str(x) for x in second]), return_inverse=True)
    cells = np.unique(np.stack([rows, columns]), axis=1, return_counts=True)[1]

    def pairs(counts: Array) -> float:
        return float((counts * (counts - 1.0)).sum() / 2)

    both, one, other = pairs(cells), pairs(np.bincount(rows)), pairs(np.bincount(columns))
    chance = one * other / max(1.0, len(first) * (len(first) - 1) / 2)
    highest = (one + other) / 2
    return 1.0 if highest == chance else (both - chance) / (highest - chance)
