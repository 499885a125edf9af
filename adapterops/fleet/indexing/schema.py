"""The SQLite side of a fleet's index: tables, connections, and how rows become records.

No write-ahead log, which needs shared memory and so fails on network file systems: the rollback
journal, with the directory flushed after each commit (synchronous=EXTRA), for files are deleted
once nothing committed refers to them. Text is bound as bytes, because paths need not be UTF-8.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from adapterops.errors import FileError, FormatError, IncompatibleError
from adapterops.fleet.types import Layout, Record, Signature, Tenant

DATABASE, SIGNATURES = "fleet.sqlite", "signatures"
VERSION = 1
_APPLICATION = 0x61_6F_66_6C  # "aofl", in the header of the database
_WAIT = 30.0  # seconds until a database that another process is just committing to is an error
_SHIFT = 20  # Record.row: the chunk's number above the row in it

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE layouts (id INTEGER PRIMARY KEY, digest TEXT UNIQUE, side INTEGER, modules TEXT);
CREATE TABLE chunks (id INTEGER PRIMARY KEY AUTOINCREMENT, file TEXT UNIQUE, rows INTEGER);
CREATE TABLE removed (tenant TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE parts (source TEXT, shard TEXT, finished INTEGER, PRIMARY KEY (source, shard));
CREATE TABLE tenants (
  tenant TEXT PRIMARY KEY, source TEXT, path TEXT, location TEXT, traffic REAL, version TEXT,
  vanished INTEGER, status TEXT, reason TEXT, content TEXT, extras TEXT, base TEXT, dialect TEXT,
  dtype TEXT, size INTEGER, rank INTEGER, rank1 INTEGER, rank5 INTEGER, norm REAL,
  layout INTEGER, chunk INTEGER, row INTEGER
);
CREATE INDEX by_chunk ON tenants (chunk);
"""
# What is kept of all tenants together; made by whoever writes first, older indexes lack it.
ALIKE = "CREATE TABLE IF NOT EXISTS alike (digest TEXT PRIMARY KEY, found TEXT)"
_RECORD = (
    "tenant, path, location, traffic, version, status, reason, content, extras, base, dialect, "
    "dtype, size, rank, rank1, rank5, norm, layout, chunk, row"
)
PUT = (
    "INSERT OR REPLACE INTO tenants VALUES "
    "(CAST(? AS TEXT), CAST(? AS TEXT), CAST(? AS TEXT), CAST(? AS TEXT), ?, CAST(? AS TEXT), 0, ?,"
    f" CAST(? AS TEXT), ?, ?, CAST(? AS TEXT){', ?' * 10})"
)


def text(value: str) -> bytes:
    """Text as it is bound, within CAST(? AS TEXT): names of files need not be UTF-8."""
    return value.encode("utf-8", "surrogateescape")


def decoded(value: bytes) -> str:
    """Text as it comes back: the inverse of `text`."""
    return value.decode("utf-8", "surrogateescape")


def connect(path: Path) -> sqlite3.Connection:
    """The database of the index at `path`, which may be half created; FileError, FormatError.

    It is opened for writing where that is allowed, for readers too: what an interrupted commit left
    is rolled back first.
    """
    file = path / DATABASE
    with reported(file):
        connection = sqlite3.connect(
            f"file:{quote(os.fsencode(file))}?mode=rw",
            uri=True,
            timeout=_WAIT,
            isolation_level=None,
        )
        connection.text_factory = decoded
        try:
            connection.execute("PRAGMA trusted_schema=OFF")
            connection.execute("PRAGMA journal_mode=DELETE")
            connection.execute("PRAGMA synchronous=EXTRA")
            connection.execute("PRAGMA secure_delete=ON")
            _check_application(connection, file)
        except BaseException:
            connection.close()
            raise
    return connection


def _check_application(connection: sqlite3.Connection, file: Path) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != _APPLICATION and tables:
        raise FormatError("is a database, but no index of adapterops", path=file)
    if tables and version != VERSION:
        raise IncompatibleError(
            f"the index has version {version}, this adapterops writes version {VERSION}",
            path=file,
            hint="index into a new FLEET",
        )


def create_tables(connection: sqlite3.Connection, meta: dict[str, str]) -> None:
    """All tables and what is said once, within a transaction of the caller's."""
    for statement in _TABLES.split(";\n"):
        if statement.strip():
            connection.execute(statement)
    connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
    connection.execute(f"PRAGMA application_id={_APPLICATION}")
    connection.execute(f"PRAGMA user_version={VERSION}")


@contextmanager
def reported(file: Path) -> Iterator[None]:
    """SQLite's errors as ours, with the file they are about."""
    try:
        yield
    except sqlite3.OperationalError as error:
        said = f"{error}"
        if "locked" in said:
            raise FileError(
                f"another process has been writing it for {_WAIT:.0f} s", path=file
            ) from None
        if "unable to open" in said and not file.exists():
            raise FileError("no such index", path=file.parent) from None
        full = "full" in said
        raise FileError("the disk is full" if full else f"cannot be used: {said}", path=file) from (
            None
        )
    except sqlite3.DatabaseError as error:
        raise FormatError(
            f"is damaged: {error}", path=file, hint="remove it and index again"
        ) from None


def meta(connection: sqlite3.Connection) -> dict[str, str]:
    """What is said once of an index; empty while it is only half created."""
    if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        return {}
    return dict(connection.execute("SELECT key, value FROM meta"))


def layout_key(layout: Layout) -> tuple[str, str]:
    """A digest of a layout, and its modules as JSON."""
    modules = json.dumps([layout.stems, layout.shapes], separators=(",", ":"))
    return hashlib.sha256(f"{layout.side} {modules}".encode()).hexdigest(), modules


class Snapshot(NamedTuple):
    """All that an index says, at one moment; the same whatever order it came in but for rows."""

    records: list[Record]
    layouts: list[Layout]
    removed: frozenset[str]
    vanished: frozenset[str]
    parts: dict[tuple[str, str], bool]
    files: dict[int, str]
    sources: dict[str, str]


def snapshot(connection: sqlite3.Connection) -> Snapshot:
    """The whole index, within a transaction of the caller's."""
    numbered = _layouts(connection)
    order = sorted(numbered, key=lambda number: _sorting(numbered[number]))
    places = {number: place for place, number in enumerate(order)}
    vanished = connection.execute("SELECT tenant FROM tenants WHERE vanished = 1")
    return Snapshot(
        _records(connection, places),
        [numbered[number] for number in order],
        frozenset(name for (name,) in connection.execute("SELECT tenant FROM removed")),
        frozenset(name for (name,) in vanished),
        parts(connection),
        files(connection),
        dict(connection.execute("SELECT tenant, source FROM tenants WHERE vanished = 0")),
    )


def _sorting(layout: Layout) -> tuple[object, ...]:
    return layout.stems, layout.shapes, layout.side


def _layouts(connection: sqlite3.Connection) -> dict[int, Layout]:
    """The layouts that records refer to, by their numbers in the database."""
    found = {}
    wanted = "SELECT layout FROM tenants WHERE vanished = 0"
    for number, side, modules in connection.execute(
        f"SELECT id, side, modules FROM layouts WHERE id IN ({wanted})"
    ):
        stems, shapes = json.loads(modules)
        found[number] = Layout(tuple(stems), tuple((m, n) for m, n in shapes), side)
    return found


def _records(connection: sqlite3.Connection, places: dict[int, int]) -> list[Record]:
    """All records sorted by tenant; `places` gives each layout of the database its place."""
    found = []
    for row in connection.execute(f"SELECT {_RECORD} FROM tenants WHERE vanished = 0"):
        name, path, location, traffic, version, status, reason, content, extras = row[:9]
        base, dialect, dtype, size, rank, one, five, norm, layout, chunk, inside = row[9:]
        record = Record(
            tenant=Tenant(name, path, location, traffic),
            version=version,
            status=status,
            reason=reason,
            content=content,
            extras=extras,
            base=base,
            dialect=dialect,
            dtype=dtype,
            size=size,
            rank=rank,
            needed=(one, five),
            norm=norm,
            layout=places.get(layout, -1),
            row=address(chunk, inside) if chunk >= 0 else -1,
        )
        found.append(record)
    found.sort(key=lambda record: record.tenant.name)
    return found


def files(connection: sqlite3.Connection) -> dict[int, str]:
    """The names of all chunks by their numbers."""
    return dict(connection.execute("SELECT id, file FROM chunks"))


def parts(connection: sqlite3.Connection) -> dict[tuple[str, str], bool]:
    """Whether each part (source, "i/n") was finished."""
    found = connection.execute("SELECT source, shard, finished FROM parts")
    return {(source, shard): bool(finished) for source, shard, finished in found}


def unfinished(parts: Mapping[tuple[str, str], bool]) -> tuple[str, ...]:
    """What an index lacks: parts that were begun only, and shards of a source that are not there.

    A source is whole where it was indexed as one, or where all n shards are there for some n.
    """
    lacking = []
    for source in sorted({source for source, _ in parts}):
        mine = {shard for of, shard in parts if of == source}
        begun = [s for s in mine if not parts[source, s]]
        missing = []
        for count in sorted({int(shard.partition("/")[2]) for shard in mine}):
            missing = sorted({f"{i + 1}/{count}" for i in range(count)} - mine, key=_first)
            if not missing:
                break
        for shard in sorted({*begun, *missing}, key=_first):
            lacking.append(source if shard == "1/1" else f"shard {shard} of {source}")
    return tuple(lacking)


def _first(shard: str) -> tuple[int, str]:
    return int(shard.partition("/")[0]), shard


def address(chunk: int, row: int) -> int:
    """`Record.row`: where in the whole index the arrays are."""
    return chunk << _SHIFT | row


def placed(address: Any) -> tuple[Any, Any]:
    """The chunk's number and the row in it, of an `address` or an array of them."""
    return address >> _SHIFT, address & (1 << _SHIFT) - 1


def row_of(
    tenant: Tenant, version: str, found: Signature, source: str, place: tuple[int, int, int]
) -> tuple[Any, ...]:
    """What `PUT` binds; `place` is the layout's number, the chunk's, and the row in it."""
    return (
        *map(text, (tenant.name, source, tenant.path, tenant.location)),
        tenant.traffic,
        text(version),
        found.status,
        text(found.reason),
        found.content,
        found.extras,
        text(found.base),
        *(found.dialect, found.dtype, found.size, found.rank, *found.needed, found.norm),
        *place,
    )


def with_names(
    connection: sqlite3.Connection, statement: str, names: Iterable[str], *fixed: Any
) -> None:
    """Run a statement that ends in a tenant for each of `names`."""
    bound: Sequence[tuple[Any, ...]] = [(*fixed, text(name)) for name in names]
    connection.executemany(statement, bound)
