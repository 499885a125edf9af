"""From addresses of an adapter's modules to the parts of tensors that they change, by shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from adapterops.basemodel.parts import Part, Parts
from adapterops.changes import experts
from adapterops.changes.naming import Addresses
from adapterops.changes.pieces import Piece, Reading, fit, piece
from adapterops.changes.places import PARAMETERS, Base, readings
from adapterops.errors import IncompatibleError, UnsupportedError
from adapterops.formats.model import AdapterFile, Site
from adapterops.rebased import weights


@dataclass(frozen=True, slots=True)
class Located:
    """Where one adapter's modules, by stem, and full deltas, by name, are.

    `notes` say aloud which weights' order no shape told.
    """

    sites: Mapping[str, Reading]
    deltas: Mapping[str, Piece]
    notes: tuple[str, ...] = ()


def locate(
    file: AdapterFile,
    base: Base,
    found: Addresses,
    sites: Mapping[str, Site],
    deltas: Sequence[str],
) -> Located:
    """The pieces of the base's tensors that `sites` and `deltas` change, by their addresses.

    Raises IncompatibleError, with both shapes, for weights of another shape, and where the order of
    a square one cannot be told; UnsupportedError for full deltas of what the base keeps in pieces.
    """
    known = {stem: ways(site, stem, base, found) for stem, site in sites.items()}
    fitting = {
        stem: [way for way in every if fit(way, sites[stem])] for stem, every in known.items()
    }
    for stem, every in fitting.items():
        if not every:
            raise _another_shape(file, base, stem, sites[stem].shape, known[stem][0][0])
    chosen, notes = _oriented(file, base, sites, fitting)
    changed = {name: delta(file, base, name, found) for name in deltas}
    return Located(chosen, changed, (*_renamed(file, base, found), *notes))


def _renamed(file: AdapterFile, base: Base, found: Addresses) -> list[str]:
    """A note of the names that are not the checkpoint's own."""
    pairs = [f"{own!r} as {other!r}" for own, other in found.renaming.telling.items()]
    where = f"found under other names in {base.model.path}"
    notes = [f"{file.path}: modules below {', '.join(pairs)}, {where}"] if pairs else []
    if found.loaded:
        own, other = next(iter(found.loaded.items()))
        count = len(found.loaded)
        what = f"{count} modules, {own!r} as {other!r}" if count > 1 else f"{own!r} as {other!r}"
        notes.append(f"{file.path}: {what}, {where}: transformers 5 renames them as it loads it")
    return notes


def ways(site: Site, stem: str, base: Base, found: Addresses) -> list[Reading]:
    """What of the base a module may be, by its address alone: of these shapes choose."""
    if stem in found.parts:
        parts = found.parts[stem]
        return [tuple(piece(part, base.tensors[part.tensor]) for part in parts)]
    return readings(site, found.paths[stem], base)


def _oriented(
    file: AdapterFile,
    base: Base,
    sites: Mapping[str, Site],
    fitting: Mapping[str, list[Reading]],
) -> tuple[dict[str, Reading], list[str]]:
    """Of the readings that fit the one that is meant, and what decided it if shapes did not."""
    chosen = {stem: ways[0] for stem, ways in fitting.items() if len(ways) == 1}
    square: dict[str, list[Reading]] = {}
    for stem, ways in fitting.items():
        if len(ways) > 1 and ways[0][0].experts is not None:
            config = base.config(ways[0][0].name)
            chosen[stem] = experts.choose(file, sites[stem], ways, config)
        elif len(ways) > 1:
            square[stem] = ways
    if not square:
        return chosen, []
    possible = {
        stem: {way[0].turned for way in ways}
        for stem, ways in fitting.items()
        if ways[0][0].experts is None
    }
    turned = weights.orientation(file, base.model, possible)
    for stem, ways in square.items():
        chosen[stem] = next(way for way in ways if way[0].turned == turned[stem])
    count = sum(turned[stem] for stem in square)
    kind = base.model.config.get("model_type")
    who = f"as {kind}'s config says" if kind else "by the names and shapes of the others, or "
    who += "" if kind else "fan_in_fan_out in the adapter's config"
    plural = "square weight" if count == 1 else "square weights"
    note = f"{file.path}: {count} {plural} of {base.model.path} taken as (in, out), {who}"
    notes = [note] if count else []
    linear = sum(weights.is_misflagged(file, stem) and not turned[stem] for stem in square)
    if linear and not kind:
        notes.append(
            f"{file.path}: {linear} square weights of {base.model.path} taken as (out, in): "
            "fan_in_fan_out in the adapter's config is for Conv1D, and PEFT resets it for layers "
            "of such names"
        )
    return chosen, notes


def delta(file: AdapterFile, base: Base, name: str, found: Addresses) -> Piece:
    """What a full delta changes: a whole tensor, or rows of a fused one.

    Raises as `locate` does.
    """
    parameter = PARAMETERS[name.rpartition(".")[2]]
    parts: Parts = found.parts.get(name) or (Part(f"{found.paths[name]}.weight"),)
    part = parts[0]
    if len(parts) > 1 or part.turned or part.of:
        raise UnsupportedError(
            f"{base.model.path} keeps what this full delta changes in another order, or in several "
            "tensors",
            path=file.path,
            module=name,
            hint="leave it out with --modules, or give a base with the adapter's own names",
        )
    tensor = part.tensor if parameter == "weight" else part.bias
    ref = base.tensors.get(tensor or "")
    if tensor is None or ref is None:
        raise IncompatibleError(
            f"{base.model.path} has no {tensor or parameter!r}, which this full delta changes",
            path=file.path,
            module=name,
            hint="give the base model that the adapter was trained on",
        )
    whole = piece(Part(tensor), ref)
    height = ref.shape[0] if ref.shape else 1
    if part.rows:
        height = len(range(height)[part.rows])
        rows = slice(part.rows.start, part.rows.stop, part.rows.step or 1)
        vector = len(ref.shape) < 2
        whole = replace(whole, columns=rows) if vector else replace(whole, rows=rows)
    given = file.deltas[name].shape
    if given != (height, *ref.shape[1:]):
        raise _another_shape(file, base, name, given, whole)
    return whole


def _another_shape(
    file: AdapterFile, base: Base, module: str, shape: Sequence[int], found: Piece
) -> IncompatibleError:
    return IncompatibleError(
        f"{file.path} changes a weight of {_size(shape)}, {base.model.path} has "
        f"{_size(found.ref.shape)} as {found.ref.name!r}; are both of the same model?",
        module=module,
        hint="give the base model that the adapter was trained on",
    )


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
