"""What similarity is usual between tenants that have nothing to do with each other.

The null of a cosine is estimated from the fleet itself, most of whose pairs are unrelated. Two
things differ between tenants: one whose change lies in directions that all share is a little like
everybody, and one of low effective rank scatters more. With aᵢ the level and sᵢ the spread of
tenant i, both medians over a sample and shrunk towards the common one by what chance alone explains
(James & Stein 1961),

    yᵢⱼ = (cosᵢⱼ − aᵢ − aⱼ) / √(sᵢsⱼ)

is as good of one pair as of another. Of the y, mean and standard deviation are those of the pairs
that do not stand out, found by iteration from median and absolute deviations.

Their tail is not normal: ⟨ΔW, ΔW′⟩ is a sum of products, ⟨ΔWΔWᵀ, ΔW′ΔW′ᵀ⟩ one of squares. Both are
sub-gamma (Boucheron, Lugosi & Massart 2013, Concentration inequalities, section 2.4):

    P(z > √(2h) + c·h) ≤ e⁻ʰ,   h(z) = (1 + cz − √(1 + 2cz)) / c²,

c = skewness/2 for a gamma law, √(excess kurtosis/6) for a sum of products of normals; the larger of
the two is taken, a standard error above what was seen. The kurtosis is also looked for below the
mean, where no related pairs are. p is Student's tail at √(2h), which is z itself where c = 0.

Moments of n pairs that share tenants are known less well than of n that do not, down to n^½ of
them where each tenant decides how far all of its pairs scatter: their standard error is taken at
n^⅔. Taken at n, too thin a tail let one in fourteen fleets of eight unrelated tenants show a pair
by one kind alone at q = 0.05, where three modules carry the change and outputs have rank one, and
one in twelve of two hundred tenants of rank two.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

SAMPLE = 1024  # tenants; half a million pairs
_MAD = 1.4826  # of a normal law, standard deviations in an absolute deviation
_MEDIAN_NOISE = math.pi / 2  # variance of a median, over σ²/n
_MAD_NOISE = 1.361  # of log MAD, over 1/n (Rousseeuw & Croux 1993)
_STANDS_OUT = 0.1  # pairs expected beyond the cut by chance
_LEAST_TAIL, _USUAL_TAIL = 0.1, 0.2  # a hundred products make 0.1
_NOISE = -1 / 3  # of moments of pairs that share tenants: -1/2 if they did not, -1/4 by tenants
_ROUNDS = 50
_TINY = 1e-9
_FLIPPED = -0.5  # a pair that far below was negated, it did not scatter


@dataclass(frozen=True, slots=True)
class Levels:
    """Unit `vectors` (N, D), and each tenant's `level` aᵢ and `width` √sᵢ, float32 (N,)."""

    vectors: Array
    level: Array
    width: Array

    def between(self, rows: slice | Array, columns: slice | Array) -> Array:
        """The y of some rows with others, float32."""
        y: Array = self.vectors[rows] @ self.vectors[columns].T
        y -= self.level[rows, None]
        y -= self.level[columns]
        y /= self.width[rows, None]
        y /= self.width[columns]
        return y

    def cosines(self, y: Array, rows: Array, columns: Array) -> Array:
        """The cosines of pairs that have these y."""
        level, width = self.level.astype(np.float64), self.width.astype(np.float64)
        return np.asarray(y * width[rows] * width[columns] + level[rows] + level[columns])


@dataclass(frozen=True, slots=True)
class Background:
    """Mean, standard deviation and tail c of the usual y, seen in `pairs` of them."""

    location: float
    scale: float
    tail: float
    pairs: int

    def cut(self, p: float) -> float:
        """The y whose p-value is `p`, at most ½."""
        from scipy.special import stdtrit

        root = -float(stdtrit(self.pairs - 1, p))
        return self.location + self.scale * (root + self.tail * root**2 / 2)


def sampled(count: int, seed: int) -> Array:
    """Rows to look at, ascending: all of up to 1,024, else as many by the smallest Philox words."""
    if count <= SAMPLE:
        return np.arange(count)
    key = hashlib.sha256(f"{seed}\0background".encode()).digest()
    words = np.random.Philox(key=int.from_bytes(key[:16], "little")).random_raw(count)
    return np.sort(np.argsort(words, kind="stable")[:SAMPLE])


def levels(vectors: Array, sample: Array) -> Levels:
    """The standardised rows of `vectors` (N, D), unit norm, each compared with the sample."""
    count = len(vectors)
    middle, spread = np.empty(count), np.empty(count)
    for start in range(0, count, SAMPLE):
        rows = np.arange(start, min(start + SAMPLE, count))
        cosines = (vectors[rows] @ vectors[sample].T).astype(np.float64)
        cosines[rows[:, None] == sample] = np.nan  # itself
        middle[rows] = np.nanmedian(cosines, axis=1)
        spread[rows] = _MAD * np.nanmedian(np.abs(cosines - middle[rows, None]), axis=1)
    seen = len(sample) - 1
    usual = float(np.median(spread))
    level = _shrunk(middle - np.median(middle), _MEDIAN_NOISE * usual**2 / seen)
    width = np.ones(count)
    if usual > 0.0:
        width = np.exp(_shrunk(np.log(np.maximum(spread / usual, _TINY)), _MAD_NOISE / seen))
    return Levels(vectors, level.astype(np.float32), np.sqrt(width).astype(np.float32))


def _shrunk(values: Array, noise: float) -> Array:
    """Effects about 0 that are known up to a variance of `noise`, without what chance explains."""
    seen = float(np.mean(values * values))
    return values * max(0.0, 1.0 - noise / seen) if seen > 0.0 else values


def background(values: Array) -> Background | None:
    """The law of the y that do not stand out; None where they have no spread."""
    values = values[values > _FLIPPED]
    if not len(values):
        return None
    location = float(np.median(values))
    scale = _MAD * float(np.median(np.abs(values - location)))
    found = Background(location, scale, 0.0, len(values))
    kept, tail = 0, 0.0
    for _ in range(_ROUNDS):
        if found.scale <= _TINY:
            return None
        # The tail that was found would let in related pairs, which widen it until all are in.
        usual = values[values < replace(found, tail=tail).cut(_STANDS_OUT / len(values))]
        if len(usual) == kept:
            break
        kept, tail = len(usual), _USUAL_TAIL
        found = _fitted(usual, values)
    return found


def _fitted(values: Array, everything: Array) -> Background:
    location, scale = float(values.mean()), float(values.std(ddof=1))
    if scale <= _TINY:
        return Background(location, 0.0, 0.0, len(values))
    z = (values - location) / scale
    noise = len(values) ** _NOISE
    skewness, excess = float(np.mean(z**3)), float(np.mean(z**4)) - 3.0
    low = (everything[everything < location] - location) / scale
    lower = float(np.mean(low**4) / np.mean(low**2) ** 2) - 3.0
    excess = max(excess, lower) + math.sqrt(24) * noise
    tail = max((skewness + math.sqrt(6) * noise) / 2, math.sqrt(max(excess, 0.0) / 6), _LEAST_TAIL)
    return Background(location, scale, tail, len(values))


def p_values(null: Background, values: Array) -> Array:
    """One-sided p of y, float64."""
    from scipy.special import stdtr

    z = np.maximum((values - null.location) / null.scale, 0.0)
    c = null.tail
    # (1 + cz − √(1 + 2cz)) / c² without cancellation, which is z²/2 at c = 0.
    half = z**2 / (1 + c * z + np.sqrt(1 + 2 * c * z))
    return np.asarray(stdtr(null.pairs - 1, -np.sqrt(2 * half)))
