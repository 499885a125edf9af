"""The representatives of a plan into a staged folder, under names of their own."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from adapterops.errors import AdapterOpsError, BudgetError, IncompatibleError, PickleRefusedError
from adapterops.files.remote import is_remote, located
from adapterops.files.scratch import scratch
from adapterops.fleet.deploy import names
from adapterops.fleet.deploy.checks import check_content
from adapterops.fleet.deploy.forms import Formed, Terms, form
from adapterops.fleet.deploy.report import Deployed
from adapterops.fleet.plans.plan import Plan, Representative
from adapterops.fleet.signing.content import content_hash
from adapterops.formats import open_adapter_file
from adapterops.formats.model import AdapterFile
from adapterops.stream import Compute, Job, run

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
    ordered = sorted(chosen, key=lambda rep: not rep.base)
    width = max(1, min(on.threads, len(ordered)))
    each = replace(on, threads=on.threads // width, memory=on.memory // width)
    with ExitStack() as stack:
        remote = any(is_remote(places[rep.id]) for rep in ordered)
        inside = stack.enter_context(scratch()) if remote else None
        jobs = (
            Job(
                rep.path,
                _make,
                (
                    rep,
                    places[rep.id],
                    None if root is None else root / f"{names.PREFIX}new-{number}",
                    terms,
                    each,
                    allow_pickle,
                    inside,
                ),
                each.memory,
            )
            for number, rep in enumerate(ordered)
        )
        made = stack.enter_context(closing(run(jobs, on)))
        for count, (rep, one) in enumerate(zip(ordered, made, strict=True), 1):
            _add(result, plan, rep, one, taken, shapes)
            if progress:
                progress("adapters", count, len(ordered))
    order = {rep.id: place for place, rep in enumerate(chosen)}
    result.adapters.sort(key=lambda item: order[item.id])
    return result


@dataclass(frozen=True, slots=True)
class _Made:
    """One adapter in its form, in `folder` unless that is None; `shapes` are its own modules'.

    `formed` is None where the engine cannot serve it, for a `reason`. `digest` is of the content.
    """

    shapes: Mapping[str, tuple[int, int]]
    formed: Formed | None
    reason: str = ""
    folder: Path | None = None
    digest: str = ""


def _make(
    rep: Representative,
    place: str,
    folder: Path | None,
    terms: Terms,
    on: Compute,
    allow_pickle: bool,
    inside: Path | None,
) -> _Made:
    """One representative, checked and written; its bytes are read once to be hashed."""
    try:
        with opened(place, allow_pickle, inside) as file:
            digests = digests_of(file)
            check_content(rep, content_hash(file, digests))
            shapes = {stem: site.shape for stem, site in file.sites.items()}
            label = rep.content[:_DIGITS] or "representative"
            try:
                found = form(file, label, folder, terms, on)
            except (IncompatibleError, BudgetError) as error:
                return _Made(shapes, None, _reason(error))
    except PickleRefusedError as error:
        return _Made({}, None, _reason(error))
    if folder is None:
        return _Made(shapes, found)
    known = None if found.how == "written" else digests
    return _Made(shapes, found, "", folder, names.content(folder, known))


def _add(
    result: Written,
    plan: Plan,
    rep: Representative,
    made: _Made,
    taken: set[str],
    shapes: dict[str, tuple[int, int]],
) -> None:
    """One more in the deployment, or its tenants among those that are left out."""
    found = made.formed
    own = made.shapes.items()
    stem = next((stem for stem, shape in own if shapes.get(stem, shape) != shape), None)
    if stem is not None or found is None:
        reason = made.reason if stem is None else _other(made.shapes[stem], stem, shapes[stem])
        result.left |= dict.fromkeys(rep.members, reason)
        if made.folder is not None:
            shutil.rmtree(made.folder)
        return
    name = ""
    if made.folder is not None:
        name = names.fresh(made.digest, taken)
        taken.add(name)
        result.folders[rep.id] = made.folder.rename(made.folder.with_name(name))
        result.digests[rep.id] = made.digest
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


def _other(own: tuple[int, int], stem: str, others: tuple[int, int]) -> str:
    (out, into), (rows, columns) = own, others
    return (
        f"module {stem}: has out={out}, in={into}, other adapters of this deployment have "
        f"out={rows}, in={columns}: they are of two base models; name them with cluster "
        "--base-alias, or index them apart"
    )


@contextmanager
def opened(place: str, allow_pickle: bool, inside: Path | None = None) -> Iterator[AdapterFile]:
    """The adapter at a path or URI, closed at the end; what changed meanwhile is an error.

    `inside` is the folder for a copy of a remote one.
    """
    with located(place, inside=inside, allow_pickle=allow_pickle, side_files=True) as path:
        file = open_adapter_file(path, allow_pickle=allow_pickle)
        try:
            yield file
            for source in file.sources:
                source.check_unchanged()
        finally:
            for source in file.sources:
                source.close()


def digests_of(file: AdapterFile) -> dict[str, bytes]:
    """SHA-256 of the bytes of every tensor, by name, read in the order of the file."""
    refs = sorted(file.tensors.items(), key=lambda pair: pair[1].offset)
    return {name: hashlib.sha256(ref.raw().data).digest() for name, ref in refs}


def _reason(error: AdapterOpsError) -> str:
    """Why an engine does not serve an adapter; the path would be that of a copy."""
    where = f"module {error.module}: " if error.module else ""
    return f"{where}{error.message}" + (f"; {error.hint}" if error.hint else "")
