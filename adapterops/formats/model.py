"""What an adapter file says, before any tensor is read: sites, extras, scale and its origin."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from adapterops import casts
from adapterops.arrays import Array, like, namespace, put
from adapterops.errors import AdapterOpsError, NumericsError, UnsupportedError
from adapterops.files.source import Source, sample
from adapterops.formats.kinds import KINDS

Layer = Literal["linear", "conv", "embedding"]


Read = Callable[["Ref"], np.ndarray[Any, Any]]


class Made(Protocol):
    """What a module's change is computed from where no file holds it: other adapters' modules."""

    @property
    def dtype(self) -> str:
        """The widest type of what it is made from."""

    @property
    def peak(self) -> int:
        """Bytes that making it needs at most, beside the result."""

    def leaves(self) -> list[tuple[AdapterFile, Site]]:
        """The modules in files that it is made from, each with its adapter."""

    def factors(self, device: str, raw: Read) -> tuple[Array, Array]:
        """B (out, rank) and A (rank, in) in float64."""

    @property
    def said(self) -> Any:
        """What the method says of its result, a `certificate.MethodFigures`, once it is made."""

    def operator(self) -> Any | None:
        """The change as an `operators.Operator` where its rank is not bounded, else None."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor in a file, or a part of one, not read yet.

    `shape` is that of the values as they are used. The file may hold them transposed (MLX), or as
    every n-th column from the i-th, `every` = (i, n), of a wider matrix (experts in PEFT).
    """

    source: Source
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    transposed: bool = False
    every: tuple[int, int] = (0, 1)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the bytes that `raw` reads."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return (*shape[:-1], shape[-1] * self.every[1]) if self.every[1] > 1 else shape

    @property
    def is_plain(self) -> bool:
        """Whether the bytes are the values in order."""
        return not self.transposed and self.every[1] == 1

    def raw(self) -> np.ndarray[Any, Any]:
        """The bytes in the file that hold it."""
        buffer = np.empty(self.nbytes, np.uint8)
        self.source.pread_into(self.offset, buffer.data)
        return buffer

    def sample(self) -> bytes:
        """Sixteen blocks of 4 KiB, spread evenly over its bytes: what tells it from another.

        Training changes most numbers of what it changes; the rest a hash of all would have to find.
        """
        return sample(self.source, self.offset, self.nbytes)

    def read(self, device: str = "cpu", raw: Read = raw) -> Array:
        """Its values as float64, exactly."""
        values = casts.decode(put(raw(self), device), self.dtype, self.stored_shape)
        values = values.mT if self.transposed else values
        first, step = self.every
        return values if step == 1 else values[..., first::step]


@dataclass(frozen=True, slots=True)
class Site:
    """One module of one adapter.

    `shape` is (out, in) of ΔW as a matrix: for a convolution, in counts channels x kernel; for an
    embedding of V rows of d numbers it is (d, V), and the weight changes by ΔWᵀ. `kind` says how
    its `parts`, tensors by role, make factors of `rank` columns; it was trained with rank `dim`,
    which alpha is divided by. ΔW = scale · B·A; `alpha` is the number that the scale was made
    from, None where it was assumed; `alpha_given` if the user said it. A scale that nothing says
    is NaN. `expert` is (index, count) where one tensor holds the factors of several; `owned` are
    the parameters that PEFT's target_parameters adapt at `owner`, `meant` those of them that this
    pair may be. The adapter's weight counts times `factor` here.
    """

    stem: str
    dialect: str
    kind: str
    layer: Layer
    shape: tuple[int, int]
    kernel: tuple[int, ...]
    rank: int
    dim: int
    parts: Mapping[str, Ref]
    enabled: tuple[bool, ...] = ()
    expert: tuple[int, int] | None = None
    owner: str = ""
    owned: tuple[str, ...] = ()
    meant: tuple[str, ...] = ()
    scale: float = math.nan
    scale_from: str = ""
    alpha: float | None = None
    alpha_given: bool = False
    inner: Site | None = None
    made: Made | None = None
    factor: float = 1.0

    def scaled(self, scale: float, alpha: float | None, origin: str) -> Site:
        """The module with its scale; written out, for `replace` takes three times as long."""
        return Site(
            self.stem,
            self.dialect,
            self.kind,
            self.layer,
            self.shape,
            self.kernel,
            self.rank,
            self.dim,
            self.parts,
            self.enabled,
            self.expert,
            self.owner,
            self.owned,
            self.meant,
            scale,
            origin,
            alpha,
        )

    @property
    def dtype(self) -> str:
        """The widest type of its factors; of a dense change, of all that it is made from."""
        if self.made:
            return self.made.dtype
        names = {ref.dtype for role, ref in self.parts.items() if role in _FACTOR_ROLES}
        names = names or {ref.dtype for ref in self.parts.values()}
        return max(names, key=lambda name: (_width(name), name))

    def factors(self, device: str = "cpu", raw: Read = Ref.raw) -> tuple[Array, Array]:
        """B (out, rank) and A (rank, in) in float64, the scale not folded in.

        `raw` reads a tensor's bytes. Raises NumericsError, naming the tensor, for NaN or
        infinities, UnsupportedError for a kind that has no factors.
        """
        if self.made:
            return self.made.factors(device, raw)
        if self.kind not in KINDS:
            raise UnsupportedError(f"{self.kind} has no low-rank delta", module=self.stem)
        values = {
            role: ref.read(device, raw) for role, ref in self.parts.items() if role in _FACTOR_ROLES
        }
        for role, array in values.items():
            self._check_finite(role, array)
        kind = KINDS[self.kind]
        B, A = kind.expand(values, self.enabled)
        if kind.start is None:
            return B, A
        W = self.parts["base"].read("cpu", raw)
        self._check_finite("base", W)
        try:
            start_b, start_a = kind.start(W, self.dim, self.scale)
        except NumericsError as error:
            error.path, error.module = self.parts["base"].source.path, self.stem
            raise
        xp = namespace(B)
        return xp.concat([B, like(-start_b, B)], -1), xp.concat([A, like(start_a, A)], 0)

    def factors_into(
        self, B: np.ndarray[Any, Any], A: np.ndarray[Any, Any], raw: Read = Ref.raw
    ) -> None:
        """`factors` into slices of larger arrays; values of a plain LoRA are not checked."""
        parts = [self.parts[role] for role in "BA" if role in self.parts]
        if self.kind != "lora" or not all(ref.is_plain for ref in parts):
            B[...], A[...] = self.factors("cpu", raw)
            return
        for ref, out in zip(parts, (B, A), strict=True):
            casts.decode_into(raw(ref), ref.dtype, out)

    def bias(self) -> Array:
        """What it adds to the bias, (out,) in float64, the scale not folded in; 0 where nothing.

        Raises NumericsError for NaN or infinities.
        """
        if "bias" not in self.parts:
            return np.zeros(self.shape[0])
        values = self.parts["bias"].read()
        self._check_finite("bias", values)
        return values

    def _check_finite(self, role: str, values: Array) -> None:
        wrong = casts.count_nonfinite(values)
        if wrong:
            raise NumericsError(
                f"{wrong} of {math.prod(values.shape)} values of {self.parts[role].name} "
                "are NaN or infinite",
                path=self.parts[role].source.path,
                module=self.stem,
                hint="the training diverged or the file is damaged; leave this adapter out",
            )


_FACTOR_ROLES = frozenset().union(*(form for kind in KINDS.values() for form in kind.forms))


def _width(dtype: str) -> int:
    return casts.FORMATS[dtype].bits if dtype in casts.FORMATS else 8


@dataclass(frozen=True, slots=True, eq=False)
class Ruled:
    """Where an adapter with a weight in each module comes from: `rules` applied to adapters `of`
    weights, of which it is number `at`.
    """

    rules: tuple[str, ...]
    of: tuple[tuple[float, AdapterFile], ...]
    at: int


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """One adapter as its files describe it.

    `extras` are absolute tensors that travel along (heads, biases, token rows), `deltas` are dense
    changes of single parameters (`.diff`), `tensors` all of the file, by full name. `dialect` is
    "mixed" where its modules are in several. `style` is the dialect's own note of how names were
    spelled. `notes` are warnings; `problems` are why its sum with others cannot be computed, and
    `relative` are those of them that end where the base model is given. One that is made from base
    models has their weights' `files`, and an `identity` in place of a hash of gigabytes. One that a
    merge method makes of others has these, with their weights, as `made_of`; `made_by` is what
    provenance records of the method. `label` is what the user calls it, "" for the name of its
    path. `left_out` are modules taken out of its sites, `ruled` says by which rules of weights.
    """

    path: str
    source: Source
    dialect: str
    sites: Mapping[str, Site]
    extras: Mapping[str, Ref]
    tensors: Mapping[str, Ref]
    deltas: Mapping[str, Ref] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    style: str = ""
    base: str | None = None
    notes: tuple[str, ...] = ()
    weights_file: str = ""
    config_file: str | None = None
    side_files: tuple[str, ...] = ()
    problems: tuple[AdapterOpsError, ...] = ()
    relative: tuple[AdapterOpsError, ...] = ()
    identity: str = ""
    files: tuple[str, ...] = ()
    made_of: tuple[tuple[float, AdapterFile], ...] = ()
    made_by: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    left_out: frozenset[str] = frozenset()
    ruled: Ruled | None = None

    @property
    def weights_files(self) -> tuple[str, ...]:
        """The files that hold its numbers: its own, or those of the models it is made from."""
        return self.files or (self.weights_file,)

    @property
    def sources(self) -> list[Source]:
        """Every file that its sites, deltas and extras are read from, its own first."""
        refs = [ref for site in self.sites.values() for ref in site.parts.values()]
        refs += [*self.deltas.values(), *self.extras.values()]
        within = (source for _, file in self.made_of for source in file.sources)
        every = (self.source, *(ref.source for ref in refs), *within)
        return list({id(source): source for source in every}.values())

    @property
    def dtype(self) -> str:
        """The type of its factors, the widest where they differ; of what is made, the first's."""
        if self.made_of:
            return self.made_of[0][1].dtype
        names = {site.dtype for site in self.sites.values()}
        names |= {ref.dtype for ref in self.deltas.values()}
        return max(names, key=lambda name: (_width(name), name), default="F32")

    @property
    def rank(self) -> int:
        """The largest rank of its sites."""
        return max((site.rank for site in self.sites.values()), default=0)


def leaves(
    files: Sequence[AdapterFile], weights: Sequence[float]
) -> tuple[list[AdapterFile], list[float]]:
    """The adapters on disk that these are made of, each once, with the products of their weights.

    Where one has several places its weights are added up; where they cancel the first one counts.
    """
    if not any(file.made_of for file in files):
        return list(files), list(weights)
    found: dict[int, tuple[AdapterFile, list[float]]] = {}
    for file, weight in zip(files, weights, strict=True):
        pairs = [(file, weight)]
        if file.made_of:
            inner = leaves([each for _, each in file.made_of], [w for w, _ in file.made_of])
            pairs = [(each, weight * share) for each, share in zip(*inner, strict=True)]
        for each, share in pairs:
            found.setdefault(id(each), (each, []))[1].append(share)
    shares = [math.fsum(each) or each[0] for _, each in found.values()]
    return [file for file, _ in found.values()], shares
