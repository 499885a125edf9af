"""The index on disk: what goes in comes out, one writer, matrices, nothing stays behind."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from adapterops.errors import (
    FileError,
    FormatError,
    IncompatibleError,
    OutputExistsError,
)
from adapterops.fleet.indexing import chunks, schema
from adapterops.fleet.indexing.chunks import Arrays, open_chunk, write_chunk
from adapterops.fleet.indexing.lineage import components
from adapterops.fleet.indexing.opened import open_fleet
from adapterops.fleet.indexing.store import Store
from adapterops.fleet.types import Layout, Signature, Tenant

STEMS = ("m.0.q", "m.1.q", "m.2.v")


def tenant(name: str, traffic: float = 1.0) -> Tenant:
    return Tenant(name, f"in/{name}", f"/in/{name}", traffic)


def signed(seed: int, stems: tuple[str, ...] = STEMS, side: int = 4) -> Signature:
    """A signature of random numbers; two of one seed are equal."""
    rng = np.random.default_rng(seed)
    norms = rng.random(len(stems)) + 0.5
    return Signature(
        "ok",
        content=f"{seed:064x}",
        base="tiny/base",
        dialect="peft",
        dtype="float32",
        size=1000 + seed,
        rank=8,
        needed=(7, 3),
        norm=float(np.linalg.norm(norms)),
        layout=Layout(stems, tuple((8, 6) for _ in stems), side),
        norms=norms,
        sketch=rng.standard_normal((len(stems), side, side)).astype(np.float16),
        outputs=rng.standard_normal(16).astype(np.float16),
        start=rng.standard_normal(12).astype(np.float16),
    )


def filled(path: Path, count: int, *, size: int = 7) -> Path:
    with Store.create(path, 5) as store:
        for first in range(0, count, size):
            names = range(first, min(first + size, count))
            store.put([(tenant(f"t{i:04d}"), f"v{i}", signed(i)) for i in names], "/in")
    return path


def content(path: Path) -> dict[str, object]:
    """All that an index says, but not where in it."""
    fleet = open_fleet(path)
    return {
        record.tenant.name: (
            record.tenant,
            record.version,
            *(getattr(found, name) for name in ("status", "reason", "content", "extras", "base")),
            *(getattr(found, name) for name in ("dialect", "dtype", "size", "rank", "needed")),
            found.norm,
            found.layout,
            *(getattr(found, name).tobytes() for name in ("norms", "sketch", "outputs", "start")),
        )
        for record, found in zip(fleet.records, fleet.signatures(fleet.records), strict=True)
    }


def test_what_goes_in_comes_out(tmp_path):
    given = {
        "a": signed(1),
        "b/c": signed(2, STEMS[:2], 8),
        os.fsdecode(b"d\xff"): signed(3),
        "e": Signature("broken", "cut off; é \udc80"),
        "f": Signature("no-op", content="x", norm=0.0),
        "g": signed(4, STEMS[:2], 8),
    }
    with Store.create(tmp_path / "fleet", 2**62) as store:
        store.put([(tenant(name, 2.5), f"v {name}", found) for name, found in given.items()])
        assert store.seed == 2**62
    fleet = open_fleet(tmp_path / "fleet")
    assert fleet.seed == 2**62 and [r.tenant.name for r in fleet.records] == sorted(given)
    for record, found in zip(fleet.records, fleet.signatures(fleet.records), strict=True):
        name = record.tenant.name
        assert record.tenant == tenant(name, 2.5) and record.version == f"v {name}"
        for field in Signature.__slots__:
            expected, is_value = getattr(given[name], field), getattr(found, field)
            if isinstance(expected, np.ndarray):
                assert expected.dtype == is_value.dtype
                np.testing.assert_array_equal(expected, is_value)
            else:
                assert expected == is_value, field
        if record.layout >= 0:
            assert fleet.layouts[record.layout] == given[name].layout
    assert len(fleet.layouts) == 2


def test_the_order_of_writing_shows_nowhere_but_in_rows(tmp_path):
    orders = [[0, 1, 2, 3], [3, 1, 0, 2]]
    for number, order in enumerate(orders):
        with Store.create(tmp_path / str(number), 0) as store:
            for i in order:
                stems = STEMS[: 1 + i % 3]
                store.put([(tenant(f"t{i}"), "v", signed(i, stems))])
    one, other = (open_fleet(tmp_path / str(i)) for i in range(2))
    assert one.layouts == other.layouts
    assert [r.layout for r in one.records] == [r.layout for r in other.records]
    assert content(tmp_path / "0") == content(tmp_path / "1")


def test_a_signature_that_is_put_again_replaces_the_old_one(tmp_path):
    filled(tmp_path / "f", 4)
    with Store.open(tmp_path / "f") as store:
        store.put([(tenant("t0001"), "new", signed(9))])
        store.put([(tenant("t0002"), "new", Signature("broken", "cut"))])
        store.tidy()
    fleet = open_fleet(tmp_path / "f")
    assert [r.version for r in fleet.records] == ["v0", "new", "new", "v3"]
    assert [r.row >= 0 for r in fleet.records] == [True, True, False, True]
    np.testing.assert_array_equal(next(fleet.signatures(fleet.records[1:2])).norms, signed(9).norms)


# Matrices.


def test_matrix_against_five_lines_of_numpy(tmp_path):
    """Two layouts, two sides: over the union, at the smaller side, rescaled."""
    with Store.create(tmp_path / "f", 0) as store:
        store.put([(tenant(f"t{i}"), "v", signed(i, STEMS[:2], 8)) for i in range(3)])
        store.put([(tenant(f"t{i}"), "v", signed(i, STEMS[1:], 4)) for i in range(3, 6)])
        store.put([(tenant("t6"), "v", Signature("no-op"))])
    fleet = open_fleet(tmp_path / "f")
    rows = [fleet.records[i] for i in (4, 1, 6, 0, 5)]
    matrix, energies, stems = fleet.matrix(rows)
    assert stems == STEMS and matrix.dtype == energies.dtype == np.float32
    expected, shares = np.zeros((5, 3, 4, 4)), np.zeros((5, 3))
    for row, i in enumerate((4, 1, None, 0, 5)):
        if i is not None:
            found = signed(i, STEMS[:2], 8) if i < 3 else signed(i, STEMS[1:], 4)
            at = slice(0, 2) if i < 3 else slice(1, 3)
            expected[row, at] = found.sketch[:, :4, :4].astype(float) * (2 if i < 3 else 1)
            shares[row, at] = (found.norms / found.norm) ** 2
    np.testing.assert_allclose(matrix, expected.reshape(5, -1), rtol=1e-6)
    np.testing.assert_allclose(energies, shares, rtol=1e-6)
    np.testing.assert_array_equal(fleet.outputs(rows)[1], signed(1, STEMS[:2], 8).outputs)
    starts = fleet.starts(rows)
    np.testing.assert_allclose(np.linalg.norm(starts, axis=1), [1, 1, 0, 1, 1], rtol=1e-6)
    first = signed(4, STEMS[1:], 4).start.astype(float)
    np.testing.assert_allclose(starts[0], first / np.linalg.norm(first), rtol=1e-3)


def test_matrices_of_nothing(tmp_path):
    Store.create(tmp_path / "f", 0).close()
    fleet = open_fleet(tmp_path / "f")
    matrix, energies, stems = fleet.matrix([])
    assert (matrix.shape, energies.shape, stems) == ((0, 0), (0, 0), ())
    assert fleet.starts([]).shape[0] == fleet.outputs([]).shape[0] == 0
    assert fleet.records == ()


def test_one_stem_of_two_shapes_is_two_columns(tmp_path):
    found = signed(1, STEMS[:1])
    wide = Layout(STEMS[:1], ((8, 7),), 4)
    with Store.create(tmp_path / "f", 0) as store:
        other = {name: getattr(found, name) for name in Signature.__slots__} | {"layout": wide}
        store.put([(tenant("a"), "v", found), (tenant("b"), "v", Signature(**other))])
    fleet = open_fleet(tmp_path / "f")
    matrix, _, stems = fleet.matrix(fleet.records)
    assert stems == (STEMS[0], STEMS[0])
    assert matrix[0] @ matrix[1] == 0 and np.array_equal(matrix[0, :16], matrix[1, 16:])


def test_ten_thousand_records_in_a_moment(tmp_path):
    """Ten times as many take ten times as long: a few seconds."""
    found = signed(1)
    with Store.create(tmp_path / "f", 0) as store:
        for first in range(0, 10_000, 1000):
            store.put([(tenant(f"t{i:05d}"), "v", found) for i in range(first, first + 1000)])
    start = time.process_time()
    fleet = open_fleet(tmp_path / "f")
    matrix, _, _ = fleet.matrix(fleet.records)
    assert time.process_time() - start < 2.0
    assert matrix.shape == (10_000, 48) and np.ptp(matrix, axis=0).max() == 0


# Chunks.


def test_a_chunk_is_a_plain_safetensors_file(tmp_path):
    from safetensors.numpy import load_file

    items = [
        Arrays(*(getattr(signed(i, STEMS[: 1 + i % 2]), n) for n in Arrays._fields))
        for i in range(5)
    ]
    name, rows = write_chunk(tmp_path, items, 3)
    assert os.listdir(tmp_path) == [name] and sorted(rows) == list(range(5))
    tensors = load_file(tmp_path / name)
    assert tensors["000.norms"].shape == (3, 1) and tensors["001.sketch"].shape == (2, 2, 4, 4)
    chunk = open_chunk(tmp_path / name)
    for item, row in zip(items, rows, strict=True):
        for expected, found in zip(item, chunk.arrays(row), strict=True):
            np.testing.assert_array_equal(expected, found)
    with pytest.raises(FormatError, match="has 5 rows, row 5 is wanted"):
        chunk.read("norms", [5])


@pytest.mark.parametrize("damage", ["cut", "other", "gone"])
def test_a_damaged_chunk_is_named(damage, tmp_path):
    filled(tmp_path / "f", 3)
    fleet = open_fleet(tmp_path / "f")
    (file,) = (tmp_path / "f" / "signatures").iterdir()
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 10)
    elif damage == "gone":
        file.unlink()
    else:
        name, _ = write_chunk(
            tmp_path, [Arrays(*(getattr(signed(1, STEMS[:1]), n) for n in Arrays._fields))] * 3, 0
        )
        (tmp_path / name).rename(file)
    with pytest.raises((FileError, FormatError), match=file.name):
        fleet.matrix(fleet.records)


def test_a_lost_chunk_is_read_again(tmp_path):
    filled(tmp_path / "f", 14)
    lost = sorted((tmp_path / "f" / "signatures").iterdir())[0]
    lost.unlink()
    with Store.open(tmp_path / "f") as store:
        again = [name for name, known in store.known().items() if not known.version]
    assert len(again) == 7
    assert {r.status for r in open_fleet(tmp_path / "f").records if r.tenant.name in again} == {
        "broken"
    }


# Who may write.


def test_a_second_writer_is_refused(tmp_path):
    filled(tmp_path / "f", 2)
    with Store.open(tmp_path / "f"):
        with pytest.raises(
            FileError, match=f"another process is writing.*process {os.getpid()} on"
        ) as caught:
            Store.open(tmp_path / "f")
        assert caught.value.exit_code == 6
        assert len(open_fleet(tmp_path / "f").records) == 2  # readers are not kept out
    Store.open(tmp_path / "f").close()


def test_the_lock_ends_with_its_process(tmp_path):
    filled(tmp_path / "f", 2)
    code = (
        "import sys, time; from adapterops.fleet.indexing.store import Store\n"
        "store = Store.open(sys.argv[1]); print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "f"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(FileError, match=f"process {process.pid} on"):
            Store.open(tmp_path / "f")
        process.kill()
    Store.open(tmp_path / "f").close()


def test_without_locks_the_later_writer_wins_and_the_earlier_stops(tmp_path, monkeypatch):
    def no_locks(descriptor: int, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("adapterops.fleet.indexing.lock.fcntl.flock", no_locks)
    filled(tmp_path / "f", 2)
    first = Store.open(tmp_path / "f")
    second = Store.open(tmp_path / "f")
    for write in (
        lambda: first.put([(tenant("x"), "v", signed(1))]),
        lambda: first.forget(["t0000"]),
        lambda: first.vanish(["t0000"]),
        lambda: first.set_part("/in", "1/1", True),
    ):
        with pytest.raises(FileError, match="taken over"):
            write()
    second.put([(tenant("y"), "v", signed(2))])
    first.close()
    second.close()
    assert [r.tenant.name for r in open_fleet(tmp_path / "f").records] == ["t0000", "t0001", "y"]
    assert len(list((tmp_path / "f" / "signatures").iterdir())) == 2


def test_no_write_ahead_log(tmp_path):
    filled(tmp_path / "f", 2)
    database = sqlite3.connect(tmp_path / "f" / "fleet.sqlite")
    assert database.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    database.close()
    assert sorted(os.listdir(tmp_path / "f")) == ["fleet.sqlite", "lock", "signatures"]


# What is no index.


def test_what_is_no_index_is_refused(tmp_path):
    with pytest.raises(FileError, match="is no index"):
        open_fleet(tmp_path)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(OutputExistsError, match="is no index of adapterops"):
        Store.create(tmp_path, 0)
    assert os.listdir(tmp_path) == ["notes"]
    filled(tmp_path / "f", 1)
    with pytest.raises(OutputExistsError, match="is an index already"):
        Store.create(tmp_path / "f", 0)
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "fleet.sqlite").write_bytes(b"no database at all" * 99)
    with pytest.raises(FormatError, match="damaged"):
        open_fleet(tmp_path / "g")
    other = sqlite3.connect(tmp_path / "g2.sqlite")
    other.execute("CREATE TABLE t (x)")
    other.close()
    (tmp_path / "g2.sqlite").rename(tmp_path / "g" / "fleet.sqlite")
    for refused in (open_fleet, Store.open, lambda path: Store.create(path, 0)):
        with pytest.raises(FormatError, match="no index of adapterops"):
            refused(tmp_path / "g")


def test_an_index_of_another_version_is_refused(tmp_path):
    filled(tmp_path / "f", 1)
    database = sqlite3.connect(tmp_path / "f" / "fleet.sqlite")
    database.execute(f"PRAGMA user_version={schema.VERSION + 1}")
    database.close()
    for refused in (open_fleet, Store.open):
        with pytest.raises(
            IncompatibleError, match=f"version {schema.VERSION + 1}, this"
        ) as caught:
            refused(tmp_path / "f")
        assert caught.value.exit_code == 4


def test_a_creation_that_was_cut_off_is_finished(tmp_path):
    folder = tmp_path / "f"
    (folder / "signatures").mkdir(parents=True)
    (folder / "fleet.sqlite").touch()
    with pytest.raises(FileError, match="creation was cut off"):
        open_fleet(folder)
    Store.create(folder, 3).close()
    assert open_fleet(folder).seed == 3


# Off-boarding and tidying.


def test_forgetting_leaves_no_number_behind(tmp_path):
    filled(tmp_path / "f", 10)
    before = content(tmp_path / "f")
    with Store.open(tmp_path / "f") as store:
        store.forget(["t0003", "t0008"])
        assert store.removed() == {"t0003", "t0008"}
    after = content(tmp_path / "f")
    assert after == {name: kept for name, kept in before.items() if name not in ("t0003", "t0008")}
    data = b"".join(p.read_bytes() for p in (tmp_path / "f").rglob("*") if p.is_file())
    assert signed(4).sketch.tobytes() in data and b"/in/t0004" in data
    for i in (3, 8):
        assert signed(i).sketch.tobytes() not in data and signed(i).norms.tobytes() not in data
        assert f"/in/t{i:04d}".encode() not in data and signed(i).content.encode() not in data
    with Store.open(tmp_path / "f") as store:
        store.restore(["t0003"])
        assert store.removed() == {"t0008"}


def test_forgetting_all_leaves_an_empty_index(tmp_path):
    filled(tmp_path / "f", 3)
    with Store.open(tmp_path / "f") as store:
        store.forget([f"t{i:04d}" for i in range(3)])
    assert content(tmp_path / "f") == {} and not list((tmp_path / "f" / "signatures").iterdir())
    assert open_fleet(tmp_path / "f").layouts == ()


def test_tidying_joins_small_chunks_and_drops_dead_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("adapterops.fleet.indexing.store.ROWS", 16)
    filled(tmp_path / "f", 40, size=3)
    before, folder = content(tmp_path / "f"), tmp_path / "f" / "signatures"
    assert len(list(folder.iterdir())) == 14
    with Store.open(tmp_path / "f") as store:
        store.tidy()
        assert sorted(open_chunk(p).starts[-1] for p in folder.iterdir()) == [8, 16, 16]
        names = {p.name for p in folder.iterdir()}
        store.tidy()
        assert {p.name for p in folder.iterdir()} == names, "done once, nothing is left to do"
        store.put([(tenant(f"t{i:04d}"), f"v{i}", signed(i)) for i in range(16)])
        store.tidy()
        assert sum(open_chunk(p).starts[-1] for p in folder.iterdir()) == 40
    assert content(tmp_path / "f") == before


def test_a_reader_of_before_says_that_the_index_was_rewritten(tmp_path):
    fleet = open_fleet(filled(tmp_path / "f", 3))
    with Store.open(tmp_path / "f") as store:
        store.forget(["t0000"])
    with pytest.raises(FileError, match="rewritten since"):
        fleet.matrix(fleet.records)


def test_vanished_tenants_come_back_without_being_read(tmp_path):
    filled(tmp_path / "f", 3)
    with Store.open(tmp_path / "f") as store:
        store.vanish(["t0001"])
    fleet = open_fleet(tmp_path / "f")
    assert fleet.vanished == {"t0001"} and len(fleet.records) == 2
    with Store.open(tmp_path / "f") as store:
        store.update([(tenant("t0001", 7.0), "/in")])
    fleet = open_fleet(tmp_path / "f")
    assert not fleet.vanished and fleet.records[1].tenant.traffic == 7.0
    assert fleet.records[1].row >= 0


PARTS = {
    "whole": ({("/in", "1/1"): True}, ()),
    "begun": ({("/in", "1/1"): False}, ("/in",)),
    "two of three": (
        {("/in", "1/3"): True, ("/in", "3/3"): True},
        ("shard 2/3 of /in",),
    ),
    "all of three": ({("/in", f"{i}/3"): True for i in (1, 2, 3)}, ()),
    "one begun": (
        {("/in", "1/2"): True, ("/in", "2/2"): False},
        ("shard 2/2 of /in",),
    ),
    "a shard again": ({("/in", "1/1"): True, ("/in", "2/8"): True}, ()),
    "two sources": ({("/a", "1/1"): True, ("/b", "1/2"): True}, ("shard 2/2 of /b",)),
}


@pytest.mark.parametrize("case", PARTS)
def test_what_is_not_indexed_yet(case):
    parts, expected = PARTS[case]
    assert schema.unfinished(parts) == expected


# Lineages.


@pytest.mark.parametrize("count", [0, 1, 90, 400])
def test_components_against_a_full_product(count):
    """Chains of vectors that turn by 20° each, dense groups, and vectors alone."""
    rng = np.random.default_rng(count)
    rows = []
    for group in range(count // 30):
        a, b = np.linalg.qr(rng.standard_normal((200, 2)))[0].T
        angles = np.radians(20) * np.arange(9) if group % 2 else rng.random(9) * 0.2
        rows += [np.cos(t) * a + np.sin(t) * b for t in angles]
    rows += list(rng.standard_normal((count - len(rows), 200)))
    order = rng.permutation(count)
    matrix = np.array(rows).reshape(count, 200)[order]
    matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-9)
    matrix[3:5] = 0
    matrix = matrix.astype(np.float32)
    labels = np.arange(count)
    near = matrix @ matrix.T >= 0.9
    for _ in range(count):
        labels = np.where(near, labels, count).min(1, initial=count)
    labels[labels == count] = -1
    for block in (7, 2048):
        np.testing.assert_array_equal(components(matrix, 0.9, block), labels)


def test_rows_of_a_chunk_fit_their_address():
    for chunk, row in ((1, 0), (2**30, 2**20 - 1)):
        assert schema.placed(schema.address(chunk, row)) == (chunk, row)
    assert chunks.ROWS < 2**20
