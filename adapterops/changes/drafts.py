"""Targets as they are gathered: what every input adds to each stored tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from adapterops.align import check_coefficient
from adapterops.changes.locate import Located
from adapterops.changes.pieces import Piece, Reading
from adapterops.changes.places import Base
from adapterops.changes.ruled import Ruled, peak
from adapterops.changes.shifts import BiasShift, FullDelta
from adapterops.changes.targets import DenseTerm, Target, Term, as_matrix
from adapterops.errors import IncompatibleError, UnsupportedError
from adapterops.formats.kinds import KINDS
from adapterops.formats.model import AdapterFile, Ref, Site
from adapterops.rebased.dora import Dora, Residual


@dataclass(slots=True)
class Draft:
    """A target while changes are gathered; `turned` as of its terms, None before the first."""

    ref: Ref
    matrix: tuple[int, int]
    turned: bool | None = None
    terms: list[Term] = field(default_factory=list)
    dense: list[DenseTerm] = field(default_factory=list)


Drafts = dict[str, Draft]  # by the tensor's name in the result


def gather(
    drafts: Drafts,
    base: Base,
    index: int,
    file: AdapterFile,
    weight: float,
    sites: Mapping[str, Site],
    located: Located,
) -> None:
    """Add one input's changes, which lie as `located` says, to the drafts.

    Raises UsageError for coefficients that cannot be computed with, IncompatibleError where two of
    its modules are one part of the base, UnsupportedError for what has no place of its own there.
    """
    places: dict[tuple[object, ...], str] = {}
    for stem, reading in located.sites.items():
        site = sites[stem]
        coefficient = weight * site.factor * site.scale
        made = f"its scale {site.scale:g} ({site.scale_from}), weighted by {weight:g},"
        check_coefficient(coefficient, made, file, stem)
        for piece in reading:
            _check_apart(places, piece, stem, file)
        if site.kind in ("dora", "residual"):
            piece = _only(reading, site)
            relative = partial(Dora if site.kind == "dora" else Residual, site)
            draft = _turned(drafts, piece, file, stem)
            draft.dense.append(DenseTerm(index, coefficient, stem, relative))
            continue
        if site.kind == "elementwise":
            for piece in reading:
                change, held = partial(Ruled, site, piece), peak(site, piece)
                _turned(drafts, piece, file, stem).dense.append(
                    DenseTerm(index, coefficient, stem, change, held)
                )
            continue
        if site.kind not in KINDS and not site.made:
            raise UnsupportedError(f"{site.kind} has no delta", path=file.path, module=stem)
        for piece in reading:
            term = Term(
                index,
                coefficient,
                site,
                piece.rows,
                piece.columns,
                piece.turned,
                piece.outputs,
                piece.inputs,
            )
            _turned(drafts, piece, file, stem).terms.append(term)
        if "bias" in site.parts:
            _gather_bias(drafts, base, index, file, coefficient, site, reading)
    for name, piece in located.deltas.items():
        check_coefficient(weight, f"the weight {weight:g}", file, name)
        delta = partial(FullDelta, file.deltas[name], piece)
        _draft(drafts, piece.name, piece.ref, piece.matrix).dense.append(
            DenseTerm(index, weight, name, delta)
        )


def _gather_bias(
    drafts: Drafts,
    base: Base,
    index: int,
    file: AdapterFile,
    coefficient: float,
    site: Site,
    reading: Reading,
) -> None:
    """Add what a module's LoRA adds to biases."""
    places: dict[str, list[tuple[slice, slice | None]]] = defaultdict(list)
    for piece in reading:
        name = _bias_of(piece.name)
        if name not in base.tensors or piece.experts is not None:
            raise UnsupportedError(
                f"its LoRA has a bias, and {base.model.path} has no {name!r} to add it to",
                path=file.path,
                module=site.stem,
                hint="PEFT does not merge it either (lora_bias); serve the adapter unmerged, or "
                "leave the module out with --modules",
            )
        outputs = piece.columns if piece.turned else piece.rows
        places[name].append((outputs, piece.outputs))
    for name, parts in places.items():
        ref = base.tensors[name]
        size = as_matrix(ref.shape)
        if len(ref.shape) != 1 or max(columns.stop for columns, _ in parts) > size[1]:
            raise IncompatibleError(
                f"{base.model.path} has {name!r} of shape {list(ref.shape)}, and the LoRA's bias "
                f"has {site.shape[0]} numbers; are both of the same model?",
                path=file.path,
                module=site.stem,
            )
        shift = partial(BiasShift, site, parts, size[1])
        _draft(drafts, name, ref, size).dense.append(
            DenseTerm(index, coefficient, site.stem, shift)
        )


def _bias_of(weight: str) -> str:
    owner, dot, leaf = weight.rpartition(".")
    return f"{owner}{dot}in_proj_bias" if leaf == "in_proj_weight" else f"{owner}{dot}bias"


def _only(reading: Reading, site: Site) -> Piece:
    """The one piece of a module whose change is dense."""
    piece = reading[0]
    whole = (slice(0, piece.matrix[0], 1), slice(0, piece.matrix[1], 1))
    if len(reading) > 1 or (piece.rows, piece.columns) != whole:
        raise UnsupportedError(
            f"it is {site.kind}, and {piece.name!r} holds other modules beside it, or only a part",
            module=site.stem,
            hint="convert the adapter to a plain LoRA first: adapterops convert --base",
        )
    return piece


def _check_apart(
    places: dict[tuple[object, ...], str], piece: Piece, stem: str, file: AdapterFile
) -> None:
    """Raise IncompatibleError where two modules of one adapter are the same part of the base."""
    rows, columns = piece.rows, piece.columns
    where = (piece.name, rows.start, rows.stop, rows.step, columns.start, columns.stop)
    other = places.setdefault((*where, columns.step), stem)
    if other != stem:
        raise IncompatibleError(
            f"is {piece.name!r} of the base, and so is {other!r}",
            path=file.path,
            module=stem,
            hint="leave one of them out with --modules",
        )


def _draft(drafts: Drafts, name: str, ref: Ref, matrix: tuple[int, int]) -> Draft:
    draft = drafts.setdefault(name, Draft(ref, matrix))
    if draft.matrix != matrix:
        raise UnsupportedError(
            f"{name!r} is changed as {draft.matrix[0]} rows by one adapter and as {matrix[0]} by "
            "another",
            hint="bake one after the other",
        )
    return draft


def _turned(drafts: Drafts, piece: Piece, file: AdapterFile, stem: str) -> Draft:
    """A piece's draft, whose terms agree on its orientation, experts aside."""
    draft = _draft(drafts, piece.name, piece.ref, piece.matrix)
    if draft.turned not in (None, piece.turned) and piece.experts is None:
        raise IncompatibleError(
            f"{piece.name!r} is square, and the adapters say differently whether it is stored as "
            "(in, out)",
            path=file.path,
            module=stem,
            hint="put the base's config.json beside its weights",
        )
    draft.turned = piece.turned
    return draft


def target(name: str, draft: Draft) -> Target:
    """The finished target of a tensor."""
    return Target(
        name,
        draft.ref,
        draft.matrix,
        tuple(draft.terms),
        tuple(draft.dense),
        "rows" if draft.turned else "columns",
    )
