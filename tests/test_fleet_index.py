"""index: resumable, incremental, in shards; what is broken is recorded; nothing is read twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import adapterops as ao
from adapterops.batch import processes
from adapterops.errors import (
    FileError,
    FormatError,
    IncompatibleError,
    Interrupted,
    NumericsError,
    UnsupportedError,
    UsageError,
)
from adapterops.files.source import LocalFile
from adapterops.fleet.indexing import index as index_module
from adapterops.fleet.indexing import looking
from adapterops.fleet.indexing.opened import open_fleet
from adapterops.fleet.indexing.store import Store
from tests.support import pairs, write_peft
from tests.test_fleet_store import content

SHAPES = {f"model.layers.{i}.self_attn.{n}_proj": (24, 16) for i in range(2) for n in "qv"}


def adapter(folder: Path, seed: int) -> Path:
    return write_peft(folder, pairs(seed, SHAPES, 2))


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """A folder `in` of six adapters, t0 … t5; the folder that it is in."""
    for i in range(6):
        adapter(tmp_path / "in" / f"t{i}", i)
    return tmp_path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read from, in order, each as often as it was opened for a run."""
    seen: list[str] = []
    real = LocalFile.pread_into

    def counted(self: LocalFile, offset: int, buffer: memoryview) -> None:
        if self.path.endswith("adapter_model.safetensors") and self.path not in seen:
            seen.append(self.path)
        real(self, offset, buffer)

    monkeypatch.setattr(LocalFile, "pread_into", counted)
    return seen


def names(paths: list[str]) -> list[str]:
    return [Path(path).parent.name for path in paths]


def scratch(source: Path, out: Path, **options: object) -> dict[str, object]:
    """What an index made in one go says."""
    shutil.rmtree(out, ignore_errors=True)
    ao.index(source, out=out, **options)
    return content(out)


def test_a_first_run_and_its_report(fleet):
    shutil.copytree(fleet / "in" / "t1", fleet / "in" / "u")
    zero = {name: (0 * B, A) for name, (B, A) in pairs(1, SHAPES, 2).items()}
    write_peft(fleet / "in" / "z", zero)
    trained = {name: (B + 0.01, A + 0.001) for name, (B, A) in pairs(2, SHAPES, 2).items()}
    write_peft(fleet / "in" / "t2b", trained)
    report = ao.index(fleet / "in", out=fleet / "f")
    assert report.counts == {"ok": 8, "no-op": 1, "ineligible": 0, "broken": 0}
    assert report.tenants == report.read == 9 and report.adapters == 8 and not report.warnings
    assert report.duplicates == (("t1", "u"),) and report.no_ops == ("z",)
    assert report.lineages == (("t2", "t2b"),)
    assert report.bytes == sum(p.stat().st_size for p in (fleet / "in").rglob("*.safetensors"))
    opened = open_fleet(fleet / "f")
    assert opened.seed == 0 and opened.unfinished == ()
    assert [r.tenant.path for r in opened.records][:2] == [f"{fleet}/in/t0", f"{fleet}/in/t1"]


def test_only_what_is_new_or_changed_is_read(fleet, read):
    ao.index(fleet / "in", out=fleet / "f")
    assert names(read) == [f"t{i}" for i in range(6)]
    read.clear()
    again = ao.index(fleet / "in", out=fleet / "f")
    assert read == [] and again.read == 0 and again.unchanged == 6
    adapter(fleet / "in" / "t2", 12)
    adapter(fleet / "in" / "t9", 9)
    config = fleet / "in" / "t4" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 2', '"lora_alpha": 4'))
    report = ao.index(fleet / "in", out=fleet / "f")
    assert names(read) == ["t2", "t4", "t9"] and report.read == 3 and report.unchanged == 4
    assert content(fleet / "f") == scratch(fleet / "in", fleet / "g")


def test_a_copy_that_keeps_its_times_moves_nothing(fleet, read):
    """Notes beside the weights are no part of an adapter; a touched file is read again."""
    ao.index(fleet / "in", out=fleet / "f")
    read.clear()
    (fleet / "in" / "t1" / "README.md").write_text("new")
    os.utime(fleet / "in" / "t3" / "adapter_model.safetensors", (1, 1))
    ao.index(fleet / "in", out=fleet / "f")
    assert names(read) == ["t3"]


def test_vanished_tenants_are_marked_and_come_back(fleet, read):
    ao.index(fleet / "in", out=fleet / "f")
    (fleet / "in" / "t3").rename(fleet / "t3")
    report = ao.index(fleet / "in", out=fleet / "f")
    assert report.vanished == ("t3",) and report.tenants == 5
    assert "not there any more" in report.warnings[0]
    assert content(fleet / "f") == scratch(fleet / "in", fleet / "g")
    assert open_fleet(fleet / "f").vanished == {"t3"}
    assert ao.index(fleet / "in", out=fleet / "f").vanished == (), "said once"
    (fleet / "t3").rename(fleet / "in" / "t3")
    read.clear()
    report = ao.index(fleet / "in", out=fleet / "f")
    assert report.read == 0 and report.tenants == 6 and read == []


def test_traffic_and_paths_are_those_of_the_last_run(fleet, read, monkeypatch):
    manifest = fleet / "tenants.csv"
    manifest.write_text("tenant,path,traffic\na,in/t0,2\nb,in/t1,1\n")
    ao.index(manifest=manifest, out=fleet / "f")
    read.clear()
    manifest.write_text("tenant,path,traffic\na,in/t0,5\nb,in/t1,1\nc,in/t1,0\n")
    ao.index(manifest=manifest, out=fleet / "f")
    found = {r.tenant.name: r.tenant for r in open_fleet(fleet / "f").records}
    assert names(read) == ["t1"] and found["a"].traffic == 5 and found["c"].traffic == 0
    monkeypatch.chdir(fleet)
    ao.index("in", out="g")
    assert open_fleet("g").records[0].tenant.path == "in/t0"
    ao.index(fleet / "in", out="g")
    assert open_fleet("g").records[0].tenant.path == f"{fleet}/in/t0"


# Bad input.


def spoil(folder: Path) -> None:
    """Of six adapters t0 is cut, t1 no file of tensors, t2 a DoRA, t3 holds NaN."""
    weights = [folder / f"t{i}" / "adapter_model.safetensors" for i in range(6)]
    os.truncate(weights[0], weights[0].stat().st_size - 8)
    weights[1].write_bytes(b"<!doctype html>" * 9)
    write_peft(folder / "t2", pairs(2, SHAPES, 2), use_dora=True)
    factors = pairs(3, SHAPES, 2)
    factors["model.layers.1.self_attn.v_proj"][0][3, 1] = float("nan")
    write_peft(folder / "t3", factors)


def test_broken_adapters_are_recorded_and_stop_nothing(fleet, read):
    spoil(fleet / "in")
    report = ao.index(fleet / "in", out=fleet / "f")
    assert report.counts == {"ok": 2, "no-op": 0, "ineligible": 1, "broken": 3}
    assert [item.tenant for item in report.failed] == ["t0", "t1", "t2", "t3"]
    reasons = [item.reason for item in report.failed]
    assert "truncated" in reasons[0] and "web page" in reasons[1]
    assert "DoRA" in reasons[2] and "NaN" in reasons[3]
    assert len(report.warnings) == 2
    read.clear()
    assert ao.index(fleet / "in", out=fleet / "f").read == 0 and read == []
    adapter(fleet / "in" / "t0", 0)
    assert ao.index(fleet / "in", out=fleet / "f").counts["broken"] == 2


@pytest.mark.parametrize(
    ("mended", "kind", "code", "kept"),
    [
        ([], FormatError, 3, 0),
        ([0, 1], UnsupportedError, 4, 2),
        ([0, 1, 2], NumericsError, 5, 3),
    ],
    ids=["cut", "DoRA", "NaN"],
)
def test_strict_stops_with_the_error_of_the_adapter(mended, kind, code, kept, fleet):
    spoil(fleet / "in")
    for i in mended:
        shutil.rmtree(fleet / "in" / f"t{i}")
        adapter(fleet / "in" / f"t{i}", i)
    with pytest.raises(kind, match=f"{kept} of 6 adapters are in the index") as caught:
        ao.index(fleet / "in", out=fleet / "f", strict=True)
    assert caught.value.exit_code == code and f"in/t{kept}" in str(caught.value)
    opened = open_fleet(fleet / "f")
    assert len(opened.records) == kept and opened.unfinished == (f"{fleet}/in",)


def test_a_file_that_changes_while_it_is_read_is_read_again(fleet, read, monkeypatch):
    real, at = looking.signature, "t2"

    def changing(path: str, seed: int, **options: bool) -> object:
        if path.endswith(at):
            adapter(Path(path), 77)
        return real(path, seed, **options)

    monkeypatch.setattr(looking, "signature", changing)
    report = ao.index(fleet / "in", out=fleet / "f")
    (failed,) = report.failed
    assert failed.tenant == "t2" and "changed while it was read" in failed.reason
    at = "none"
    read.clear()
    report = ao.index(fleet / "in", out=fleet / "f")
    assert names(read) == ["t2"] and not report.failed
    assert content(fleet / "f") == scratch(fleet / "in", fleet / "g")


def test_a_file_that_goes_while_it_is_read(fleet, monkeypatch):
    real = looking.signature

    def going(path: str, seed: int, **options: bool) -> object:
        if path.endswith("t2"):
            shutil.rmtree(path)
        return real(path, seed, **options)

    monkeypatch.setattr(looking, "signature", going)
    assert ao.index(fleet / "in", out=fleet / "f").counts["broken"] == 1
    report = ao.index(fleet / "in", out=fleet / "f")
    assert report.vanished == ("t2",) and report.counts["broken"] == 0


def test_a_source_that_goes_while_it_is_read_keeps_what_was_known(tmp_path, monkeypatch):
    for i in range(20):
        adapter(tmp_path / "in" / f"t{i:02d}", i)
    ao.index(tmp_path / "in", out=tmp_path / "f")
    before = content(tmp_path / "f")
    for path in (tmp_path / "in").rglob("*.safetensors"):
        os.utime(path, (1, 1))
    real = looking.signature

    def going(path: str, seed: int, **options: bool) -> object:
        if path.endswith("t05"):
            (tmp_path / "in").rename(tmp_path / "gone")
        return real(path, seed, **options)

    monkeypatch.setattr(looking, "signature", going)
    with pytest.raises(FileError, match="gone while it was indexed; 5 of 20 adapters are in"):
        ao.index(tmp_path / "in", out=tmp_path / "f", jobs=1)
    assert content(tmp_path / "f").keys() == before.keys()
    assert all(r.status == "ok" for r in open_fleet(tmp_path / "f").records)


def test_pickles_are_read_once_they_are_allowed(fleet, monkeypatch):
    seen: list[tuple[str, bool]] = []
    real = looking.signature

    def noted(path: str, seed: int, *, allow_pickle: bool) -> object:
        seen.append((Path(path).name, allow_pickle))
        return real(path, seed)

    monkeypatch.setattr(looking, "signature", noted)
    weights = fleet / "in" / "t1" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    report = ao.index(fleet / "in", out=fleet / "f")
    assert report.failed[0].status == "ineligible" and "--allow-pickle" in report.failed[0].reason
    seen.clear()
    for allowed in (False, True, True, False, False):
        ao.index(fleet / "in", out=fleet / "f", allow_pickle=allowed)
    assert seen == [("t1", True), ("t1", False)]


def test_another_seed_is_refused(fleet):
    ao.index(fleet / "in", out=fleet / "f", seed=3)
    with pytest.raises(IncompatibleError, match="has the seed 3, expected 4"):
        ao.index(fleet / "in", out=fleet / "f", seed=4)
    assert ao.index(fleet / "in", out=fleet / "f").seed == 3
    ao.index(fleet / "in", out=fleet / "g")
    with pytest.raises(IncompatibleError, match="has the seed 0, expected 3"):
        ao.index([fleet / "f", fleet / "g"], merge=True, out=fleet / "h")
    assert not (fleet / "h").exists()


def test_two_processes_on_one_index(fleet):
    ao.index(fleet / "in", out=fleet / "f")
    with Store.open(fleet / "f"), pytest.raises(FileError, match="another process is writing"):
        ao.index(fleet / "in", out=fleet / "f")


def test_the_index_is_no_tenant_of_itself(fleet, monkeypatch):
    monkeypatch.chdir(fleet / "in")
    ao.index(".", out="fleet")
    assert ao.index(".", out="fleet").tenants == 6


def test_tenants_within_the_index_are_not_left_out_in_silence(fleet):
    out = fleet / "f"
    ao.index(fleet / "in", out=out)
    adapter(out / "extra" / "t9", 9)
    with pytest.raises(UsageError, match="'t9' lies within the index"):
        ao.index(out / "extra", out=out)
    listed = fleet / "tenants.csv"
    listed.write_text(f"tenant,path\na,{fleet / 'in' / 't0'}\nb,f/extra/t9\n")
    with pytest.raises(UsageError, match="'b' lies within the index"):
        ao.index(manifest=listed, out=out)
    adapter(fleet / "in" / "extra" / "t7", 7)
    report = ao.index(fleet, pattern="*/extra/{tenant}", out=out)
    assert "1 adapters within" in report.notes[0] and "'t9'" in report.notes[0]


def test_a_manifest_may_be_called_otherwise(fleet, read):
    """Tenants and adapters are what they were: nothing is read, and the new list has them."""
    old, new = fleet / "monday.csv", fleet / "tuesday.csv"
    old.write_text("tenant,path\na,in/t0\nb,in/t1\n")
    ao.index(manifest=old, out=fleet / "f")
    old.rename(new)
    read.clear()
    report = ao.index(manifest=new, out=fleet / "f")
    assert read == [] and report.unchanged == 2 and report.notes == ()
    found = open_fleet(fleet / "f")
    assert set(found.sources.values()) == {str(new)} and {place for place, _ in found.parts} == {
        str(new)
    }
    new.write_text("tenant,path\na,in/t0\n")
    assert ao.index(manifest=new, out=fleet / "f").vanished == ("b",)


def test_what_a_renamed_manifest_leaves_out_is_said(fleet):
    old, new = fleet / "monday.csv", fleet / "tuesday.csv"
    old.write_text("tenant,path\na,in/t0\nb,in/t1\nc,in/t2\n")
    ao.index(manifest=old, out=fleet / "f")
    new.write_text("tenant,path\na,in/t0\nd,in/t3\n")
    report = ao.index(manifest=new, out=fleet / "f")
    assert report.tenants == 4 and report.vanished == ()
    assert report.notes == (
        f"2 tenants stay as {old} listed them, 'b' first: --remove takes them out",
    )
    again = ao.index(manifest=new, out=fleet / "f")
    assert again.unchanged == 2 and again.notes == ()


def test_another_adapter_in_a_renamed_manifest_is_refused(fleet):
    old, new = fleet / "monday.csv", fleet / "tuesday.csv"
    old.write_text("tenant,path\na,in/t0\n")
    ao.index(manifest=old, out=fleet / "f")
    new.write_text("tenant,path\na,in/t1\n")
    before = content(fleet / "f")
    with pytest.raises(UsageError, match=r"'a' is in the index from .*in/t0, and is found as .*t1"):
        ao.index(manifest=new, out=fleet / "f")
    assert content(fleet / "f") == before


def test_changed_files_of_a_renamed_manifest_are_read(fleet, read):
    old, new = fleet / "monday.csv", fleet / "tuesday.csv"
    old.write_text("tenant,path\na,in/t0\nb,in/t1\n")
    ao.index(manifest=old, out=fleet / "f")
    old.rename(new)
    adapter(fleet / "in" / "t1", 21)
    read.clear()
    report = ao.index(manifest=new, out=fleet / "f")
    assert names(read) == ["t1"] and report.read == 1 and report.unchanged == 1


def test_a_process_of_its_own_keeps_its_memory(fleet, monkeypatch):
    """Without it every block is faulted in again: twice the time of an adapter."""
    called = []
    monkeypatch.setattr(processes, "keep_freed_memory", lambda: called.append("kept"))
    monkeypatch.setattr(processes, "threadpool_limits", lambda count: called.append(count))
    processes.settle.cache_clear()
    listed = index_module.tenants_of(index_module.Source((str(fleet / "in"),)), "f", print)
    for apart in (False, True, True):
        task = looking.Task(0, allow_pickle=False, apart=apart)
        looking.look(task, (listed["t0"], ""))
        assert called == ([1, "kept"] if apart else [])
    processes.settle.cache_clear()


def test_one_tenant_from_two_sources_is_refused(fleet):
    adapter(fleet / "other" / "t3", 33)
    ao.index(fleet / "in", out=fleet / "f")
    with pytest.raises(UsageError, match=r"'t3'.*/in/t3.*/other/t3"):
        ao.index(fleet / "other", out=fleet / "f")
    with pytest.raises(UsageError, match=r"'t3'.*/in/t3.*/other/t3"):
        ao.index([fleet / "in", fleet / "other"], out=fleet / "g")


def test_several_sources_vanish_by_themselves(fleet):
    for name in "ab":
        adapter(fleet / "other" / name, ord(name))
    ao.index(fleet / "in", out=fleet / "f")
    ao.index(fleet / "other", out=fleet / "f")
    shutil.rmtree(fleet / "other" / "a")
    report = ao.index([fleet / "in", fleet / "other"], out=fleet / "f")
    assert report.vanished == ("a",) and report.tenants == 7
    assert set(open_fleet(fleet / "f").sources.values()) == {f"{fleet}/in", f"{fleet}/other"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no input"),
        ({"source": "in", "shard": "0/2"}, "expected i/n"),
        ({"source": "in", "shard": "3/2"}, "expected i/n"),
        ({"source": "in", "seed": -1}, "whole number"),
        ({"source": "in", "seed": True}, "whole number"),
        ({"source": "in", "jobs": 0}, "at least 1"),
        ({"source": "in", "merge": True, "shard": "1/2"}, "puts indexes together"),
        ({"source": [], "merge": True, "remove": "x"}, "FLEETs to merge"),
        ({"source": "f", "merge": True, "out": "f"}, "is one of the indexes"),
        ({"remove": "t1", "restore": "t1", "out": "f"}, "removed and restored"),
        ({"remove": "t55", "out": "f"}, "'t55' is not in the index; did you mean t5?"),
        ({"restore": "t1", "out": "f"}, "not among the removed"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_makes_no_sense(options, message, fleet, monkeypatch):
    monkeypatch.chdir(fleet)
    ao.index("in", out="f")
    with pytest.raises(UsageError, match=message):
        ao.index(**{"out": "new", **options})
    assert not Path("new").exists()


def test_removing_from_no_index(fleet):
    with pytest.raises(FileError, match="no such index"):
        ao.index(out=fleet / "f", remove="t1")
    with pytest.raises(FileError, match="no such file"):
        ao.index(fleet / "nowhere", out=fleet / "f")
    assert not (fleet / "f").exists()


# Off-boarding.


def test_a_removed_tenant_never_comes_back_by_itself(fleet, read):
    ao.index(fleet / "in", out=fleet / "f")
    report = ao.index(out=fleet / "f", remove="t2")
    assert report.removed == ("t2",) and report.tenants == 5
    adapter(fleet / "in" / "t2", 99)
    read.clear()
    report = ao.index(fleet / "in", out=fleet / "f")
    assert report.skipped == ("t2",) and report.tenants == 5 and read == []
    assert open_fleet(fleet / "f").removed == {"t2"}
    ao.index(out=fleet / "f", remove=["t2", "t3"])  # what is removed may be removed again
    report = ao.index(fleet / "in", out=fleet / "f", restore=["t2", "t3"])
    assert names(read) == ["t2", "t3"] and report.tenants == 6
    assert content(fleet / "f") == scratch(fleet / "in", fleet / "g")


# Shards.


@pytest.mark.parametrize("order", ["123", "312"])
def test_shards_merged_in_any_order_are_the_whole(order, fleet):
    parts = [f"{fleet}/s{i}" for i in order]
    for part in parts:
        ao.index(fleet / "in", out=part, shard=f"{part[-1]}/3")
    sizes = [len(open_fleet(part).records) for part in parts]
    assert sum(sizes) == 6 and max(sizes) < 6
    report = ao.index(parts[:2], merge=True, out=fleet / "m")
    assert report.unfinished == (f"shard {order[2]}/3 of {fleet}/in",)
    ao.index([fleet / "m", parts[2]], merge=True, out=fleet / "n")
    ao.index(parts[1:], merge=True, out=fleet / "o")
    report = ao.index([parts[0], fleet / "o"], merge=True, out=fleet / "p")
    assert report.unfinished == ()
    expected = scratch(fleet / "in", fleet / "g")
    assert content(fleet / "n") == content(fleet / "p") == expected
    assert ao.index([parts[0]], merge=True, out=fleet / "n").tenants == 6, "known already"
    assert ao.index(fleet / "in", out=fleet / "n").read == 0
    assert open_fleet(fleet / "n").unfinished == ()


def test_removals_are_merged(fleet):
    ao.index(fleet / "in", out=fleet / "f")
    shutil.copytree(fleet / "f", fleet / "g")
    ao.index(out=fleet / "g", remove="t1")
    for number, order in enumerate(("fg", "gf")):
        report = ao.index([fleet / name for name in order], merge=True, out=fleet / str(number))
        assert report.tenants == 5 and open_fleet(fleet / str(number)).removed == {"t1"}


def test_a_tenant_that_two_indexes_know_differently_is_refused(fleet):
    ao.index(fleet / "in", out=fleet / "f")
    adapter(fleet / "in" / "t4", 44)
    ao.index(fleet / "in", out=fleet / "g")
    with pytest.raises(IncompatibleError, match="'t4' is known already"):
        ao.index([fleet / "f", fleet / "g"], merge=True, out=fleet / "h")


def test_shards_are_even_and_the_same_everywhere():
    counts = [0] * 8
    for i in range(4000):
        mine = [j for j in range(8) if index_module.in_shard(f"tenant-{i}", (j + 1, 8))]
        assert len(mine) == 1
        counts[mine[0]] += 1
    assert min(counts) > 400 and max(counts) < 600
    firsts = [index_module.in_shard(name, (1, 2)) for name in ("a", "b", "é", "")]
    assert firsts == [True, True, False, True]


# Processes, stores, the command line.


def test_processes_change_nothing(tmp_path):
    for i in range(13):
        adapter(tmp_path / "in" / f"t{i:02d}", i)
    os.truncate(tmp_path / "in" / "t03" / "adapter_model.safetensors", 100)
    said: list[tuple[str, int, int]] = []
    one = ao.index(tmp_path / "in", out=tmp_path / "f", jobs=1)
    two = ao.index(
        tmp_path / "in", out=tmp_path / "g", jobs=3, progress=lambda *now: said.append(now)
    )
    assert content(tmp_path / "f") == content(tmp_path / "g")
    assert one.failed == two.failed and one.bytes == two.bytes
    assert said == [("indexing", i + 1, 13) for i in range(13)]


@pytest.fixture
def bucket(fleet: Path) -> Iterator[Any]:
    """memory://bucket with the adapters t0 … t5."""
    import fsspec

    store = fsspec.filesystem("memory")
    store.put(f"{fleet}/in", "/bucket", recursive=True)
    yield store
    store.rm("/bucket", recursive=True)


def test_a_store_is_indexed_like_a_folder(fleet, bucket):
    report = ao.index("memory://bucket", out=fleet / "f")
    assert report.tenants == report.read == 6 and not report.failed
    local = scratch(fleet / "in", fleet / "g")
    for name, found in content(fleet / "f").items():
        assert found[0].location == f"memory://bucket/{name}" and found[2:] == local[name][2:]
    assert ao.index("memory://bucket", out=fleet / "f").unchanged == 6
    bucket.rm("/bucket/t1", recursive=True)
    adapter(fleet / "new", 50)
    bucket.put(f"{fleet}/new/adapter_model.safetensors", "/bucket/t2/adapter_model.safetensors")
    report = ao.index("memory://bucket", out=fleet / "f")
    assert (report.read, report.unchanged, report.vanished) == (1, 4, ("t1",))


def test_copies_lie_in_a_folder_that_goes_with_the_run(fleet, bucket, monkeypatch):
    real, folders = looking.located, []

    def interrupted(location: str, *, inside: str | None, **options: Any) -> Any:
        assert inside is not None
        folders.append(Path(inside))
        assert folders[0].is_dir()
        if location.endswith("t3"):
            raise KeyboardInterrupt
        return real(location, inside=inside, **options)

    monkeypatch.setattr(looking, "located", interrupted)
    with pytest.raises(Interrupted, match="interrupted") as caught:
        ao.index("memory://bucket", out=fleet / "f", jobs=1)
    assert "3 of 6 adapters are in the index" in str(caught.value)
    assert len({*folders}) == 1 and not folders[0].exists()


def test_a_store_that_fails_for_one_adapter_is_asked_again(fleet, bucket, monkeypatch):
    real, at = looking.located, "t4"

    def failing(location: str, **options: Any) -> Any:
        if location.endswith(at):
            raise FileError("the store answers 403", path=location)
        return real(location, **options)

    monkeypatch.setattr(looking, "located", failing)
    report = ao.index("memory://bucket", out=fleet / "f")
    assert [(item.tenant, item.reason) for item in report.failed] == [
        ("t4", "the store answers 403")
    ]
    at = "none"
    report = ao.index("memory://bucket", out=fleet / "f")
    assert report.read == 1 and not report.failed


def command(*arguments: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "adapterops", "index", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(ao.__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_the_command_line(fleet):
    spoil(fleet / "in")
    done = command("in", "-o", "f", cwd=fleet)
    assert "f: 6 tenants, 2 ok, 1 ineligible, 3 broken" in done.stdout
    assert "read 6 adapters" in done.stdout and "broken: t1: is a Git LFS" in done.stdout
    assert "warning: 3 adapters cannot be read" in done.stderr
    done = command("--remove", "t3", "--remove", "t1", "-o", "f", "--json", cwd=fleet)
    document = json.loads(done.stdout)
    assert document["schema"] == "adapterops.index/1" and document["removed"] == ["t3", "t1"]
    assert document["counts"] == {"ok": 2, "no-op": 0, "ineligible": 1, "broken": 1}
    assert document["failed"][0] == {
        "tenant": "t0",
        "path": "in/t0",
        "status": "broken",
        "reason": document["failed"][0]["reason"],
    }
    assert command("in", "-o", "f", "-q", cwd=fleet).stdout == ""
    done = command("in", "-o", "g", "--strict", cwd=fleet, code=3)
    assert "in/t0" in done.stderr and "0 of 6 adapters are in the index" in done.stderr
    done = command("in", "-o", "f", "--seed", "9", "--json", cwd=fleet, code=4)
    assert json.loads(done.stderr)["error"]["code"] == 4
    command("-o", "h", cwd=fleet, code=2)


def test_tenant_patterns_and_names_with_markup(tmp_path):
    adapter(tmp_path / "in" / "[red]a\x1b" / "v1", 1)
    adapter(tmp_path / "in" / "b" / "v1", 1)
    done = command("in", "-o", "f", "--tenant-pattern", "{tenant}/*", "-v", cwd=tmp_path)
    assert "2: [red]a\\x1b, b" in done.stdout


def test_no_torch_for_an_index(fleet):
    code = (
        "import sys, adapterops as ao; ao.index('in', out='f');"
        "print(sorted({'torch', 'transformers', 'fsspec', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=fleet, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
