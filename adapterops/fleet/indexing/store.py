"""A fleet's index on disk, FLEET: `fleet.sqlite` for records, `signatures/` for their arrays.

A batch of signatures is first a chunk under its final name, flushed, then one transaction that
refers to it. Killed in between, the index is what it was, and the next writer removes the file.
Whatever else changes does so in one transaction, after which files that nothing refers to go.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from adapterops.errors import FileError
from adapterops.files.output import unwritable
from adapterops.files.publish import undisturbed
from adapterops.fleet.indexing import schema
from adapterops.fleet.indexing.chunks import ROWS, Arrays, Chunk, is_chunk, open_chunk, write_chunk
from adapterops.fleet.indexing.creating import create_index, has_index
from adapterops.fleet.indexing.lock import hold
from adapterops.fleet.indexing.schema import DATABASE, SIGNATURES, with_names
from adapterops.fleet.types import Layout, Signature, Tenant

Batch = Sequence[tuple[Tenant, str, Signature]]
_NAMED = "tenant = CAST(? AS TEXT)"


class Known(NamedTuple):
    """What the index has of a tenant: enough to see whether it has to be read."""

    tenant: Tenant
    source: str
    version: str
    vanished: bool
    size: int
    status: str
    reason: str


class Store:
    """An index that is open for writing, by this process alone; a context manager.

    Every method but `close` raises FileError for what the operating system refuses, or where
    another process has taken the index over, and FormatError for a database that is damaged.
    """

    def __init__(self, path: Path, database: sqlite3.Connection, lock: int, token: str) -> None:
        self.path = path
        self._database, self._lock, self._token = database, lock, token
        self.seed = int(schema.meta(database)["seed"])

    @classmethod
    def create(cls, path: str | os.PathLike[str], seed: int) -> Self:
        """A new index; OutputExistsError where there is one, or something else."""
        create_index(path, seed)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """The index at `path`. FileError where there is none or another process is writing it."""
        folder = Path(os.path.realpath(path))
        if not has_index(folder):
            raise FileError("no such index", path=path)
        lock = hold(folder)
        try:
            database = schema.connect(folder)
        except BaseException:
            os.close(lock)
            raise
        try:
            token = secrets.token_hex(8)
            with schema.reported(folder / DATABASE):
                database.execute("UPDATE meta SET value = ? WHERE key = 'writer'", (token,))
            store = cls(folder, database, lock, token)
            store._mend()
        except BaseException:
            database.close()
            os.close(lock)
            raise
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others write; safe to call twice."""
        if self._lock >= 0:
            self._database.close()
            os.close(self._lock)
            self._lock = -1

    def removed(self) -> set[str]:
        """Tenants that were off-boarded."""
        with self._transaction() as database:
            return {name for (name,) in database.execute("SELECT tenant FROM removed")}

    def known(self) -> dict[str, Known]:
        """What the index has of every tenant, those that vanished from their source too."""
        columns = "path, location, traffic, source, version, vanished, size, status, reason"
        with self._transaction() as database:
            return {
                name: Known(Tenant(name, path, location, traffic), source, version, *rest)
                for name, path, location, traffic, source, version, *rest in database.execute(
                    f"SELECT tenant, {columns} FROM tenants"
                )
            }

    def put(self, batch: Batch, source: str = "") -> None:
        """Add signatures, each with the version of the files that it is of, or replace them.

        `source` is the place that the tenants were found in.
        """
        arrays = {
            index: Arrays(found.norms, found.sketch, found.outputs, found.start)
            for index, (_, _, found) in enumerate(batch)
            if found.status == "ok"
        }
        with self._new_chunks([list(arrays.values())]) as [(file, rows)]:
            places = dict(zip(arrays, rows, strict=True))
            with self._transaction() as database:
                number = _add_chunk(database, file, len(rows))
                for index, (tenant, version, found) in enumerate(batch):
                    layout = -1 if found.layout is None else _layout(database, found.layout)
                    place = (layout, number, places[index]) if index in places else (-1, -1, -1)
                    row = schema.row_of(tenant, version, found, source, place)
                    database.execute(schema.PUT, row)

    def update(self, tenants: Iterable[tuple[Tenant, str]]) -> None:
        """Tenants whose files are what they were, as they are listed now, and in which source."""
        statement = (
            "UPDATE tenants SET vanished = 0, source = CAST(? AS TEXT), path = CAST(? AS TEXT), "
            f"location = CAST(? AS TEXT), traffic = ? WHERE {_NAMED}"
        )
        with self._transaction() as database:
            for tenant, source in tenants:
                where = map(schema.text, (source, tenant.path, tenant.location))
                with_names(database, statement, [tenant.name], *where, tenant.traffic)

    def vanish(self, names: Iterable[str]) -> None:
        """Mark tenants whose files are gone; should they come back, they are known."""
        with self._transaction() as database:
            with_names(database, f"UPDATE tenants SET vanished = 1 WHERE {_NAMED}", names)

    def forget(self, names: Collection[str]) -> None:
        """Off-board tenants: no number of theirs stays in the index, only that they are removed."""

        def also(database: sqlite3.Connection) -> None:
            with_names(database, f"DELETE FROM tenants WHERE {_NAMED}", names)
            with_names(database, "INSERT OR IGNORE INTO removed VALUES (CAST(? AS TEXT))", names)
            database.execute("DELETE FROM alike")

        gone = set(names)
        with self._transaction() as database:
            chunks = {
                chunk
                for name, chunk in database.execute("SELECT tenant, chunk FROM tenants")
                if name in gone and chunk >= 0
            }
        self._repack(chunks, gone, also)

    def restore(self, names: Iterable[str]) -> None:
        """Let tenants that were off-boarded be indexed again."""
        with self._transaction() as database:
            with_names(database, f"DELETE FROM removed WHERE {_NAMED}", names)

    def parts(self) -> dict[tuple[str, str], bool]:
        """Which parts of which sources the index is of, and whether each was finished."""
        with self._transaction() as database:
            return schema.parts(database)

    def set_part(self, source: str, shard: str, finished: bool) -> None:
        """Record that a part of a source is being indexed, or is; "1/1" takes in its shards."""
        with self._transaction() as database:
            if finished and shard == "1/1":
                database.execute(
                    "DELETE FROM parts WHERE source = CAST(? AS TEXT)", (schema.text(source),)
                )
            database.execute(
                "INSERT OR REPLACE INTO parts VALUES (CAST(? AS TEXT), ?, ?)",
                (schema.text(source), shard, finished),
            )

    def noted(self, digest: str) -> str | None:
        """What was noted of tenants with this digest, if that is what was noted last."""
        with self._transaction() as database:
            query = "SELECT found FROM alike WHERE digest = ?"
            found = database.execute(query, (digest,)).fetchone()
        return None if found is None else str(found[0])

    def note(self, digest: str, found: str) -> None:
        """Keep what is known of tenants beside each other, and nothing that was noted before."""
        with self._transaction() as database:
            database.execute("DELETE FROM alike")
            database.execute("INSERT INTO alike VALUES (?, ?)", (digest, found))

    def abandon(self, sources: Iterable[str]) -> None:
        """Forget that there were sources which no tenant is of any more."""
        statement = (
            "DELETE FROM parts WHERE source = CAST(? AS TEXT) "
            "AND source NOT IN (SELECT source FROM tenants)"
        )
        with self._transaction() as database:
            database.executemany(statement, [(schema.text(source),) for source in sources])

    def tidy(self) -> None:
        """Rewrite chunks that are small, or half of rows that nothing refers to any more."""
        with self._transaction() as database:
            used = dict(database.execute("SELECT chunk, count(*) FROM tenants GROUP BY chunk"))
            rows = dict(database.execute("SELECT id, rows FROM chunks"))
        dead = {number for number in rows if used.get(number, 0) * 2 <= rows[number]}
        small = {number for number in rows if used.get(number, 0) * 4 <= ROWS}
        if dead or len(small) > 1:
            self._repack(dead | small, set(), lambda database: None)

    def _repack(
        self,
        chunks: Collection[int],
        without: Collection[str],
        also: Callable[[sqlite3.Connection], None],
    ) -> None:
        """Put what is alive in these chunks into new ones, and do `also`, in one transaction."""
        with self._transaction() as database:
            alive = sorted(
                (name, chunk, row)
                for name, chunk, row in database.execute("SELECT tenant, chunk, row FROM tenants")
                if chunk in chunks and name not in without
            )
            files = schema.files(database)
        opened = {number: open_chunk(self._file(files[number])) for number in chunks}
        parts = [alive[first : first + ROWS] for first in range(0, len(alive), ROWS)]
        new = self._new_chunks(map(_Reading(opened), parts))
        with new as written, self._transaction() as database:
            for part, (file, rows) in zip(parts, written, strict=True):
                number = _add_chunk(database, file, len(rows))
                for (name, _, _), row in zip(part, rows, strict=True):
                    move = f"UPDATE tenants SET chunk = ?, row = ? WHERE {_NAMED}"
                    with_names(database, move, [name], number, row)
            also(database)
            database.executemany("DELETE FROM chunks WHERE id = ?", [(n,) for n in chunks])
            used = "SELECT layout FROM tenants"
            database.execute(f"DELETE FROM layouts WHERE id NOT IN ({used})")
        self._unlink(files[number] for number in chunks)

    def _mend(self) -> None:
        """Remove chunks that nothing refers to; tenants whose chunk is lost must be read again."""
        folder = self.path / SIGNATURES
        try:
            folder.mkdir(exist_ok=True)
            there = set(os.listdir(folder))
        except OSError as error:
            raise unwritable(folder, error) from None
        with self._transaction() as database:
            database.execute(schema.ALIKE)
            chunks = {file: number for number, file in schema.files(database).items()}
            for file in chunks.keys() - there:
                database.execute(
                    "UPDATE tenants SET version = '', status = 'broken', norm = 0, layout = -1, "
                    "reason = 'its signature was lost', chunk = -1, row = -1 WHERE chunk = ?",
                    (chunks[file],),
                )
                database.execute("DELETE FROM chunks WHERE id = ?", (chunks[file],))
        self._unlink(name for name in there - chunks.keys() if is_chunk(name))

    @contextmanager
    def _new_chunks(
        self, parts: Iterable[Sequence[Arrays]]
    ) -> Iterator[list[tuple[str, list[int]]]]:
        """Chunks of these arrays, none where a part is empty; removed if the block fails."""
        written: list[tuple[str, list[int]]] = []
        try:
            for part in parts:
                nothing: tuple[str, list[int]] = "", []
                folder = self.path / SIGNATURES
                written.append(write_chunk(folder, part, self.seed) if part else nothing)
            yield written
        except BaseException:
            self._unlink(file for file, _ in written if file)
            raise

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction of ours; signals wait for it. FileError where another has taken over."""
        with schema.reported(self.path / DATABASE), undisturbed():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                if schema.meta(self._database).get("writer") != self._token:
                    raise FileError(
                        "another process has taken over this index",
                        path=self.path,
                        hint="run again when it is done",
                    )
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    def _file(self, name: str) -> Path:
        return self.path / SIGNATURES / name

    def _unlink(self, names: Iterable[str]) -> None:
        """Remove chunks that nothing refers to; one that stays is removed by the next writer."""
        for name in names:
            with suppress(OSError):
                self._file(name).unlink()


class _Reading:
    """The arrays of some tenants, (name, chunk, row), from chunks that are open."""

    def __init__(self, chunks: dict[int, Chunk]) -> None:
        self._chunks = chunks

    def __call__(self, part: Iterable[tuple[str, int, int]]) -> list[Arrays]:
        return [self._chunks[chunk].arrays(row) for _, chunk, row in part]


def _add_chunk(database: sqlite3.Connection, file: str, rows: int) -> int:
    """The number of a new chunk, -1 for none."""
    if not file:
        return -1
    done = database.execute("INSERT INTO chunks (file, rows) VALUES (?, ?)", (file, rows))
    return done.lastrowid or -1


def _layout(database: sqlite3.Connection, layout: Layout) -> int:
    """The number of a layout, which is added if it is new."""
    digest, modules = schema.layout_key(layout)
    statement = "INSERT OR IGNORE INTO layouts (digest, side, modules) VALUES (?, ?, ?)"
    database.execute(statement, (digest, layout.side, modules))
    query = "SELECT id FROM layouts WHERE digest = ?"
    number: int = database.execute(query, (digest,)).fetchone()[0]
    return number
