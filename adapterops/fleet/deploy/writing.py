"""The representatives of a plan, one by one, into a staged folder under names of their own."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from adapterops.errors import AdapterOpsError, BudgetError, IncompatibleError, PickleRefusedError
from adapterops.files.remote import located
from adapterops.fleet.deploy import names
from adapterops.fleet.deploy.checks import check_content
from adapterops.fleet.deploy.forms import Formed, Terms, form
from adapterops.fleet.deploy.report import Deployed
from adapterops.fleet.plans.plan import Plan, Representative
from adapterops.fleet.signing.content import content_hash
from adapterops.formats import open_adapter_file
from adapterops.formats.model import AdapterFile
from adapterops.stream import Compute

Progress = Callable[[str, int, int], None]
_DIGITS = 16
_NOTES = 12


@dataclass(slots=True)
class Written:
    """What was put where: adapters, their forms and folders by id, tenants left out, notes.

    `digests` are of the content, for those that were written. `notes` are what -> (adapters, said).
    """

    adapters: list[Deployed] = field(default_factory=list)
    forms: dict[str, Formed] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)

    def sharing(self) -> list[str]:
        """Tenants whose prefix cache another one would see: of one adapter, or of equal bytes."""
        alike = Counter(self.digests.values())
        return [
            tenant
            for item in self.adapters
            for tenant in item.members
            if len(item.members) > 1 or alike[self.digests.get(item.id, "")] > 1
        ]

    def said(self) -> list[str]:
        """The notes, each once with how many adapters it is about."""
        lines = [f"{n} adapters: {text}" if n > 1 else text for n, text in self.notes.values()]
        more = len(lines) - _NOTES
        return lines if more <= 0 else [*lines[:_NOTES], f"and {more} more notes of this kind"]


def write_all(
    plan: Plan,
    chosen: Sequence[Representative],
    places: Mapping[str, str],
    root: Path | None,
    terms: Terms,
    on: Compute,
    *,
    allow_pickle: bool,
    progress: Progress | None,
) -> Written:
    """Write `chosen` below `root`; with None only say what they would be.

    `places` are their paths or URIs by id. Tenants of one that the engine cannot serve are left
    out with the reason, and so are those of one whose modules have other shapes than in adapters
    before it, those that name a base first: it is of another model. Raises IncompatibleError for a
    file that is not what was planned, and whatever reading one raises.
    """
    result, taken, shapes = Written(), set[str](), dict[str, tuple[int, int]]()
    for count, rep in enumerate(sorted(chosen, key=lambda rep: not rep.base)):
        if progress:
            progress("adapters", count, len(chosen))
        staged = None if root is None else root / f"{names.PREFIX}new"
        try:
            with opened(places[rep.id], allow_pickle) as file:
                check_content(rep, content_of(file))
                stem = _unlike(file, shapes)
                if stem is not None:
                    result.left |= dict.fromkeys(rep.members, _other(file, stem, shapes))
                    continue
                label = rep.content[:_DIGITS] or "representative"
                try:
                    found = form(file, label, staged, terms, on)
                except (IncompatibleError, BudgetError) as error:
                    result.left |= dict.fromkeys(rep.members, _reason(error))
                    continue
        except PickleRefusedError as error:
            result.left |= dict.fromkeys(rep.members, _reason(error))
            continue
        name = ""
        if staged is not None:
            digest = names.content(staged)
            name = names.fresh(digest, taken)
            taken.add(name)
            result.folders[rep.id] = staged.rename(staged.with_name(name))
            result.digests[rep.id] = digest
        traffic = sum(plan.served[tenant].traffic for tenant in rep.members)
        result.forms[rep.id] = found
        shapes |= found.shapes
        result.adapters.append(
            Deployed(
                name,
                rep.id,
                rep.kind,
                rep.members,
                traffic,
                found.rank,
                found.size,
                found.dtype,
                found.how,
                found.change,
            )
        )
        for rule, text in found.notes.items():
            before = result.notes.get(rule, (0, text))
            result.notes[rule] = (before[0] + 1, before[1])
    if progress:
        progress("adapters", len(chosen), len(chosen))
    order = {rep.id: place for place, rep in enumerate(chosen)}
    result.adapters.sort(key=lambda item: order[item.id])
    return result


def _unlike(file: AdapterFile, shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """The first module whose shape is not what other adapters of the deployment say."""
    sites = file.sites.items()
    return next((stem for stem, site in sites if shapes.get(stem, site.shape) != site.shape), None)


def _other(file: AdapterFile, stem: str, shapes: Mapping[str, tuple[int, int]]) -> str:
    (out, into), (rows, columns) = file.sites[stem].shape, shapes[stem]
    return (
        f"module {stem}: has out={out}, in={into}, other adapters of this deployment have "
        f"out={rows}, in={columns}: they are of two base models; name them with cluster "
        "--base-alias, or index them apart"
    )


@contextmanager
def opened(place: str, allow_pickle: bool) -> Iterator[AdapterFile]:
    """The adapter at a path or URI, closed at the end; what changed meanwhile is an error."""
    with located(place, allow_pickle=allow_pickle, side_files=True) as path:
        file = open_adapter_file(path, allow_pickle=allow_pickle)
        try:
            yield file
            for source in file.sources:
                source.check_unchanged()
        finally:
            for source in file.sources:
                source.close()


def content_of(file: AdapterFile) -> str:
    """The content hash that the plan has of a representative."""
    digests = {name: hashlib.sha256(ref.raw().data).digest() for name, ref in file.tensors.items()}
    return content_hash(file, digests)


def _reason(error: AdapterOpsError) -> str:
    """Why an engine does not serve an adapter; the path would be that of a copy."""
    where = f"module {error.module}: " if error.module else ""
    return f"{where}{error.message}" + (f"; {error.hint}" if error.hint else "")
