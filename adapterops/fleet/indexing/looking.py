"""One tenant's adapter looked at: the work that `index` spreads over processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from adapterops.batch.processes import settle
from adapterops.errors import AdapterOpsError, FileError, MemoryLimitError, UnsupportedError
from adapterops.files.remote import is_remote, located
from adapterops.fleet.signing.measured import measure
from adapterops.fleet.signing.reading import Pass
from adapterops.fleet.signing.signature import signature
from adapterops.fleet.signing.sketch import SIDES
from adapterops.fleet.tenants.finding import check_adapter
from adapterops.fleet.tenants.versions import has_pickle, versions
from adapterops.fleet.types import Signature, Tenant
from adapterops.formats import AdapterFile, read_adapter

CHANGED = "changed while it was read; the next `index` reads it again"


@dataclass(frozen=True, slots=True)
class Task:
    """How adapters are looked at; `apart`: in a process of its own, one of several.

    `inside` is a folder for copies of remote ones, whose maker removes it.
    """

    seed: int
    allow_pickle: bool
    apart: bool
    inside: str | None = None


class Looked(NamedTuple):
    """What was found: `version` is "" where the files have to be read again next time.

    `error` is why the signature is "broken" or "ineligible".
    """

    version: str
    signature: Signature
    error: AdapterOpsError | None = None

    @property
    def is_unreachable(self) -> bool:
        """Whether it is no fault of the adapter's, as far as one can tell."""
        return isinstance(self.error, FileError) and not self.version


def marked(version: str, allow_pickle: bool) -> str:
    """A version that differs with whether pickles are read, where there is one."""
    return f"{version}\npickles too" if allow_pickle and has_pickle(version) else version


def look_at_all(task: Task, items: Sequence[tuple[Tenant, str]]) -> list[Looked]:
    """`look` for each of some items."""
    return [look(task, item) for item in items]


def look(task: Task, item: tuple[Tenant, str]) -> Looked:
    """The signature of a tenant's adapter, whose files had this version when they were listed."""
    if task.apart:
        settle()
    tenant, version = item
    try:
        return _look(task, tenant, version)
    except AdapterOpsError as error:
        return _failed(error, version)
    except MemoryError:
        return _failed(MemoryLimitError("out of memory", path=tenant.path), "")


def _look(task: Task, tenant: Tenant, listed: str) -> Looked:
    local = not is_remote(tenant.location)
    before = _version(tenant, task) if local else listed
    place = located(
        tenant.location,
        inside=task.inside,
        accept=check_adapter,
        allow_pickle=task.allow_pickle,
    )
    with place as path:
        found = signature(path, task.seed, allow_pickle=task.allow_pickle)
        good = found.status in ("ok", "no-op")
        error = None if good else _why(path, task, tenant, found)
    if local and _version(tenant, task) != before:
        changed = FileError(CHANGED, path=tenant.path)
        return Looked("", Signature("broken", changed.message), changed)
    return Looked("" if isinstance(error, FileError) else before, found, error)


def _version(tenant: Tenant, task: Task) -> str:
    return marked(versions([tenant])[tenant.name], task.allow_pickle)


def _failed(error: AdapterOpsError, version: str) -> Looked:
    """What is recorded of an adapter that could not be brought here."""
    passing = isinstance(error, FileError | MemoryLimitError)
    said = error.message + (f"; {error.hint}" if error.hint else "")
    return Looked("" if passing else version, Signature("broken", said), error)


def _why(path: str, task: Task, tenant: Tenant, found: Signature) -> AdapterOpsError:
    """The error behind a signature that is "broken" or "ineligible", looked for once more.

    A FileError where it cannot be found again: whatever was wrong has passed.
    """
    passing = FileError(found.reason)
    error: AdapterOpsError = UnsupportedError(found.reason)
    try:
        file = read_adapter(path, allow_pickle=task.allow_pickle)
        if file.problems:
            error = file.problems[0]
        elif found.status == "broken":
            error = passing
            _measure(file, task.seed)
    except AdapterOpsError as raised:
        error = raised
    except Exception as raised:
        error = AdapterOpsError(f"unexpected {type(raised).__name__}: {raised}")
    error.path = tenant.path
    return error


def _measure(file: AdapterFile, seed: int) -> None:
    """Read all modules; raises what is wrong with their numbers."""
    reader = Pass(file)
    try:
        for ready in reader.modules(file.sites):
            for _ in measure(ready, reader, seed, SIDES[-1]):
                pass
    finally:
        for source in file.sources:
            source.close()
