"""Methods whose result is Σ cᵢDᵢ with coefficients that follow from G = (⟨Dᵢ, Dⱼ⟩) alone.

G is (T, T), w (T,), the result c (T,), all float64 on the host. G is of one module, flattened, as
in mergekit, or with `scope=adapter` of all together: one c for the whole adapter. A negative weight
turns its adapter round, its size is |w|; adapters of norm 0 or weight 0 are as if absent, their
coefficient is 0 (w in `linear`).

An angle is 2·atan2(‖x − y‖, ‖x + y‖) of the unit vectors x, y (Kahan, How futile are mindless
assessments of roundoff, 2006, section 12), the squares of both from G. Those carry the rounding of
G, a few 2⁻⁵²: angles below about 3·10⁻⁸ read as anything up to that, which changes no coefficient
by more than 10⁻¹⁵, for sin(tθ)/sin θ = t + O(θ²). Near π the same rounding decides on which side
the path goes round, so that angles within 10⁻³ of it are refused.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from adapterops.errors import NumericsError, UsageError
from adapterops.rules.registry import SCOPE, Array, Parameter, method

_OPPOSITE = 1e-3  # radians below π
_EPSILON = 2.0**-52

NORMALIZE = Parameter("normalize", "switch", False, "divide the weights by their sum")


def present(G: Array, w: Array) -> Array:
    """Indices of the adapters that count: neither norm nor weight is 0."""
    return np.flatnonzero((np.diagonal(G) > 0) & (w != 0))


def unit_gram(G: Array, w: Array, members: Array) -> tuple[Array, Array]:
    """Cosines (k, k) of sign(wᵢ)Dᵢ among `members` and sign(wᵢ)/‖Dᵢ‖ (k,)."""
    scale = np.sign(w[members]) / np.sqrt(np.diagonal(G)[members])
    cosines = np.clip(G[np.ix_(members, members)] * scale * scale[:, None], -1.0, 1.0)
    np.fill_diagonal(cosines, 1.0)
    return cosines, scale


def angle(cosine: float) -> float:
    """The angle of two unit vectors of this inner product, 0 to π."""
    return 2 * math.atan2(math.sqrt(max(2 - 2 * cosine, 0)), math.sqrt(max(2 + 2 * cosine, 0)))


def arc(theta: float, t: float) -> tuple[float, float]:
    """What x and y, at this angle, weigh in the point at t of the arc from x to y.

    sin((1−t)θ)/sin θ and sin(tθ)/sin θ (Shoemake 1985, Animating rotation with quaternion curves,
    section 3.3), in the limit θ → 0 that of the chord. Raises NumericsError near π.
    """
    if theta > math.pi - _OPPOSITE:
        raise NumericsError(
            f"the adapters are opposite (angle π − {math.pi - theta:.1e}): no arc between them is "
            "shorter than the others",
            hint="use linear, or subtract one from the other",
        )
    if theta < _EPSILON:
        return 1.0 - t, t
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def normalized(w: Array) -> Array:
    """w / Σw. Raises UsageError where the sum is 0 or lost in rounding."""
    total = float(w.sum())
    if abs(total) <= 4 * len(w) * _EPSILON * float(np.abs(w).sum()):
        raise UsageError(f"normalize: the weights add up to {total:g}", hint="leave normalize off")
    return np.asarray(w / total)


@method(
    "linear",
    "gram",
    summary="The weighted sum of the adapters.",
    reference="Ilharco et al. 2023, Editing models with task arithmetic, arXiv 2212.04089",
    parameters=[NORMALIZE],
    laws=["identity", "copies", "homogeneous", "linear"],
    measures=False,
)
def linear(G: Array, w: Array, *, normalize: bool) -> Array:
    """c = w, with `normalize` w/Σw over all adapters, whether or not they have the module."""
    return normalized(w) if normalize else np.array(w, dtype=float)


@method(
    "slerp",
    "gram",
    summary="The point at t of the arc between two adapters, each times its weight first.",
    reference="Shoemake 1985, Animating rotation with quaternion curves, section 3.3",
    parameters=[Parameter("t", "number", 0.5, "0 is the first, 1 the second", 0.0, 1.0), SCOPE],
    laws=["identity", "homogeneous"],
    least=2,
    most=2,
)
def slerp(G: Array, w: Array, *, t: float) -> Array:
    """The arc between w₁D₁ and w₂D₂; where only one of them counts, that one whole.

    Positive weights only scale what lies at the ends. Raises NumericsError near an angle of π.
    """
    return _between(G, w, t) * np.abs(w)


@method(
    "nuslerp",
    "gram",
    summary="The arc between two adapters, at the second's share of the weights.",
    reference="Shoemake 1985, section 3.3; weights as in mergekit's nuslerp",
    parameters=[SCOPE],
    laws=["identity", "copies", "homogeneous"],
    least=2,
    most=2,
)
def nuslerp(G: Array, w: Array) -> Array:
    """`slerp` of the adapters themselves at t = |w₂|/(|w₁| + |w₂|): only the ratio matters."""
    sizes = np.abs(w)
    total = float(sizes.sum())
    return _between(G, w, float(sizes[1]) / total if total else 0.5)


def _between(G: Array, w: Array, t: float) -> Array:
    members = present(G, w)
    c = np.zeros(2)
    c[members] = np.sign(w[members])
    if len(members) == 2:
        cosines, _ = unit_gram(G, w, members)
        c *= arc(angle(float(cosines[0, 1])), t)
    return c


@method(
    "karcher",
    "gram",
    summary="The weighted mean of the directions on the sphere, at the weighted mean norm.",
    reference="Karcher 1977, Riemannian center of mass, doi 10.1002/cpa.3160300502",
    parameters=[
        Parameter("max_iter", "whole", 500, "steps at most", 1, 10**6),
        Parameter("tol", "number", 1e-10, "length of the last step, in radians", 0.0, 1.0),
        SCOPE,
    ],
    laws=["identity", "copies", "homogeneous"],
)
def karcher(G: Array, w: Array, *, max_iter: int, tol: float) -> Array:
    """The x with Σ |wᵢ|·log_x(uᵢ) = 0, uᵢ = sign(wᵢ)Dᵢ/‖Dᵢ‖, times Σ|wᵢ|‖Dᵢ‖/Σ|wᵢ|.

    The fixed point stays in the span of the uᵢ, so its coefficients are iterated. It starts at the
    direction of the weighted mean; there is one answer where all lie within 90° of it. Raises
    NumericsError where directions cancel or are opposite, and where it does not settle.
    """
    c = np.zeros(len(w))
    members = present(G, w)
    if not len(members):
        return c
    cosines, scale = unit_gram(G, w, members)
    share = np.abs(w[members]) / np.abs(w[members]).sum()
    length = float(share @ np.sqrt(np.diagonal(G)[members]))
    x = _unit(share, cosines)
    for _ in range(max_iter):
        step = _step(x, share, cosines)
        size = math.sqrt(max(float(step @ cosines @ step), 0.0))
        floor = _resolution(x, step, cosines)
        x = _unit(math.cos(size) * x + np.sinc(size / math.pi) * step, cosines)
        if size <= max(tol, floor):
            c[members] = length * x * scale
            return c
    raise NumericsError(
        f"karcher: the last of {max_iter} steps was {size:.1e} rad, more than tol {tol:g}",
        hint="raise max_iter or tol",
    )


def _step(x: Array, share: Array, cosines: Array) -> Array:
    """Coefficients of Σ shareᵢ·log_x(uᵢ)."""
    along = cosines @ x
    step = np.zeros(len(x))
    for i, part in enumerate(share):
        difference = x.copy()
        difference[i] -= 1.0
        total = x.copy()
        total[i] += 1.0
        apart = math.sqrt(max(float(difference @ cosines @ difference), 0.0))
        theta = 2 * math.atan2(apart, math.sqrt(max(float(total @ cosines @ total), 0.0)))
        if theta > math.pi - _OPPOSITE:
            raise NumericsError("karcher: an adapter is opposite to the mean of all")
        stretch = part / float(np.sinc(theta / math.pi))  # θ/sin θ
        step -= stretch * along[i] * x
        step[i] += stretch
    return step


def _resolution(x: Array, step: Array, cosines: Array) -> float:
    """The length below which a step is rounding: its square's cancellation, and that of x."""
    cancelled = _EPSILON * float(np.abs(step) @ np.abs(cosines) @ np.abs(step))
    return 8 * (math.sqrt(cancelled) + _EPSILON * float(np.abs(x).sum()))


def _unit(x: Array, cosines: Array) -> Array:
    size = math.sqrt(max(float(x @ cosines @ x), 0.0))
    if size <= _OPPOSITE * float(np.abs(x).sum()):
        raise NumericsError("karcher: the directions cancel, there is no mean direction")
    return np.asarray(x / size)


@method(
    "model_stock",
    "gram",
    summary="The weighted sum, shortened the more the more the adapters disagree.",
    reference="Jang et al. 2024, Model stock, arXiv 2403.19522, equation 7",
    parameters=[replace(NORMALIZE, default=True), SCOPE],
    laws=["identity", "copies", "homogeneous"],
)
def model_stock(G: Array, w: Array, *, normalize: bool) -> Array:
    """c = t·w with t = Tq/(1 + (T−1)q), q the mean cosine of two adapters, t within [0, 1].

    `normalize`, on by default, divides the weights by the sum of those that count: equal ones make
    it the paper's t·mean. q counts every pair alike. For q < 0 the formula leaves [0, 1] and has a
    pole: t is 0.
    """
    members = present(G, w)
    c = np.zeros(len(w))
    own = w[members]
    c[members] = normalized(own) if normalize and len(members) else own
    count = len(members)
    if count < 2:
        return c
    cosines, _ = unit_gram(G, w, members)
    q = float((cosines.sum() - count) / (count * (count - 1)))
    return c * (count * q / (1 + (count - 1) * q) if q > 0 else 0.0)
