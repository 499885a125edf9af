"""Many adapters at a time: what is found, where outputs go, what one failure does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import adapterops
from adapterops.batch import (
    Item,
    find,
    is_done,
    is_one,
    mirror,
    mirrored,
    recorded,
    run_many,
    skip_done,
)
from adapterops.batch import run as run_module
from adapterops.errors import (
    AdapterOpsError,
    FileError,
    FormatError,
    Interrupted,
    MemoryLimitError,
    OutputExistsError,
    UsageError,
)
from adapterops.files.output import stage
from adapterops.provenance import Origin, Provenance
from tests.support import pairs, write_kohya, write_peft

SHAPES = {"m.0.q_proj": (6, 5)}
ROOT = Path(adapterops.__file__).parent.parent


def peft(folder: Path) -> Path:
    return write_peft(folder, pairs(1, SHAPES, 2))


def kohya(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return write_kohya(file, pairs(2, {"lora_unet_q": (6, 5)}, 2), alpha=2)


def names(items: list[Item]) -> list[str]:
    return [item.name for item in items]


class TestFind:
    def test_one_adapter_is_one_item(self, tmp_path):
        folder, file = peft(tmp_path / "a"), kohya(tmp_path / "b.safetensors")
        assert find([folder, file]) == [
            Item(str(folder), "a", str(folder)),
            Item(str(file), "b.safetensors", str(file)),
        ]

    @pytest.mark.parametrize(
        "mark",
        [
            "adapter_config.json",
            "adapter_model.safetensors",
            "adapter_model.bin",
            "adapters.safetensors",
            "pytorch_lora_weights.bin",
            "pytorch_lora_weights.safetensors",
        ],
    )
    def test_what_makes_a_folder_an_adapter(self, tmp_path, mark):
        for name in (mark, "other.safetensors", "optimizer.pt"):
            (tmp_path / "x" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "x" / name).write_bytes(b"")
        kohya(tmp_path / "x" / "deeper" / "y.safetensors")
        assert names(find([tmp_path])) == ["x"]  # nothing below an adapter is looked for

    def test_what_is_one_adapter_and_not_to_be_searched(self, tmp_path):
        assert is_one(peft(tmp_path / "x" / "a")) and is_one(kohya(tmp_path / "b.safetensors"))
        assert is_one(tmp_path / "nothing")  # opening it says so
        assert not is_one(tmp_path / "x") and not is_one(tmp_path)

    def test_folders_are_searched_in_the_order_of_names(self, tmp_path):
        for name in ("b/two", "b/one", "a", "c/d/e"):
            peft(tmp_path / name)
        kohya(tmp_path / "b" / "single.safetensors")
        kohya(tmp_path / "B.safetensors")
        found = find([tmp_path])
        assert names(found) == [
            "B.safetensors",
            "a",
            "b/one",
            "b/single.safetensors",
            "b/two",
            "c/d/e",
        ]
        assert [item.path for item in found] == [str(tmp_path / name) for name in names(found)]
        assert {item.root for item in found} == {str(tmp_path)}

    def test_what_belongs_to_base_models_and_trainers_is_passed_over_and_said(self, tmp_path):
        keep = ["x.safetensors", "y.bin", "z.pt", "my model.safetensors"]
        skip = [
            "model-00001-of-00002.safetensors",
            "pytorch_model-00002-of-00002.bin",
            "diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model.fp16.safetensors",
            "model.safetensors",
            "pytorch_model.bin",
            "optimizer.pt",
            "training_args.bin",
            "rng_state_0.pt",
        ]
        for name in (*keep, *skip, "notes.txt", "x.ckpt", "sub/.safetensors", "model.json"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        notes: list[str] = []
        assert names(find([tmp_path], note=notes.append)) == sorted(keep)
        assert notes == [f"{tmp_path}: {len(skip)} files of base models or trainers passed over"]
        named = find([tmp_path / "model.safetensors"])  # what is named is taken
        assert names(named) == ["model.safetensors"]

    def test_hidden_folders_and_our_staging_are_left_alone(self, tmp_path):
        peft(tmp_path / "a")
        peft(tmp_path / ".git" / "x")
        peft(tmp_path / ".b.adapterops-17-00ff")
        kohya(tmp_path / ".c.safetensors.adapterops-17-00ff-0.safetensors")
        assert names(find([tmp_path])) == ["a"]

    def test_the_output_below_the_inputs_is_not_searched(self, tmp_path):
        peft(tmp_path / "a")
        peft(tmp_path / "out" / "a")
        assert names(find([tmp_path], exclude=tmp_path / "out")) == ["a"]
        assert names(find([tmp_path])) == ["a", "out/a"]

    def test_links_are_followed_once_and_cycles_end(self, tmp_path):
        peft(tmp_path / "real" / "a")
        (tmp_path / "real" / "up").symlink_to(tmp_path)
        (tmp_path / "again").symlink_to(tmp_path / "real")
        (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        notes: list[str] = []
        assert names(find([tmp_path], note=notes.append)) == ["again/a"]
        assert len(notes) == 2 and all("entered once" in note for note in notes)

    def test_a_link_to_a_file_in_a_hub_cache(self, tmp_path):
        blob = kohya(tmp_path / "blobs" / "0123.safetensors").rename(tmp_path / "blobs" / "0123")
        snapshot = tmp_path / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot / "x.safetensors").symlink_to(blob)
        assert names(find([tmp_path])) == ["snapshots/abc/x.safetensors"]

    def test_what_is_reached_twice_counts_once(self, tmp_path):
        a = peft(tmp_path / "a")
        (tmp_path / "b").symlink_to(a)
        notes: list[str] = []
        found = find([a, tmp_path, tmp_path / "b", f"{a}/../a"], note=notes.append)
        assert [item.path for item in found] == [str(a)]
        # In the search of tmp_path b is the folder a again.
        assert sum("the same as" in note for note in notes) == 3

    def test_a_list_of_paths(self, tmp_path, monkeypatch):
        for name in ("a", "b b", "c"):
            peft(tmp_path / name)
        listed = tmp_path / "list.txt"
        listed.write_text("# the fleet\n\na\r\n  b b  \n   # c\n")
        monkeypatch.chdir(tmp_path)
        assert [item.path for item in find(["c"], str(listed))] == ["c", "a", "b b"]

    def test_a_list_on_stdin(self, tmp_path):
        peft(tmp_path / "a")
        code = "from adapterops.batch import find; print(find([], '-')[0].path)"
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=b"a\n",
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=True,
        )
        assert done.stdout == b"a\n"

    def test_names_that_are_not_text(self, tmp_path):
        name = os.fsdecode(b"ad\xff")
        peft(tmp_path / name)
        listed = tmp_path / "list"
        listed.write_bytes(os.fsencode(tmp_path) + b"/ad\xff\n")
        assert names(find([], str(listed))) == ["ad�"] and names(find([tmp_path])) == [name]

    def test_refusals(self, tmp_path):
        with pytest.raises(UsageError, match="no input"):
            find([])
        with pytest.raises(FileError, match="no adapter in it"):
            find([tmp_path])
        with pytest.raises(FileError, match="no such file"):
            find([], str(tmp_path / "gone"))
        (tmp_path / "list").write_bytes(b"a\nb\0c\0")
        with pytest.raises(UsageError, match="line 2 holds a NUL"):
            find([], str(tmp_path / "list"))

    def test_an_empty_folder_among_others_is_said(self, tmp_path):
        peft(tmp_path / "a")
        (tmp_path / "b").mkdir()
        notes: list[str] = []
        assert len(find([tmp_path / "a", tmp_path / "b"], note=notes.append)) == 1
        assert notes == [f"{tmp_path / 'b'}: holds no adapter"]

    def test_what_is_missing_is_an_item_that_says_so_when_opened(self, tmp_path):
        assert [item.path for item in find([tmp_path / "gone"])] == [str(tmp_path / "gone")]

    def test_a_folder_that_may_not_be_read_is_an_item(self, tmp_path, monkeypatch):
        for name in ("a", "closed", "z"):
            peft(tmp_path / name)
        scandir = os.scandir

        def refusing(path: str):
            if path.endswith("closed"):
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refusing)
        assert names(find([tmp_path])) == ["a", "closed", "z"]


class TestMirror:
    def test_relative_names_are_kept(self):
        assert mirrored(Item("/x/a/b", "a/b", "/x"), "out") == "out/a/b"
        assert (
            mirrored(Item("/x/a.safetensors", "a.safetensors", "/x"), "out") == "out/a.safetensors"
        )
        assert mirrored(Item("/x/a.pt", "a.pt", "/x"), "out", ".svg") == "out/a.svg"
        assert mirrored(Item("/x/v1.5", "v1.5", "/x"), "out", ".svg") == "out/v1.5.svg"

    def test_two_on_one_output_are_refused(self):
        items = [Item("p/a", "a", "p"), Item("q/a", "a", "q")]
        with pytest.raises(
            UsageError, match=r"p/a and q/a would both be written to out/a$|once for"
        ):
            mirror(items, "out")
        with pytest.raises(UsageError, match="would both be written"):
            mirror([Item("a.bin", "a.bin", "a"), Item("a.pt", "a.pt", "a")], "out", ".svg")

    def test_one_inside_the_other_is_refused(self):
        with pytest.raises(UsageError, match="would lie inside"):
            mirror([Item("p/a/b/c", "a/b/c", "p"), Item("q/a", "a", "q")], "out")

    def test_the_order_is_kept(self):
        items = [Item(name, name, "r") for name in "cab"]
        assert mirror(items, "out", ".svg") == ["out/c.svg", "out/a.svg", "out/b.svg"]


def work(item: Item) -> str:
    """What the tests run; picklable, so that it can run in processes."""
    if item.name == "bad":
        raise FormatError("is broken", module="m")
    if item.name == "named":
        raise FormatError("is broken", path="inside/named")
    if item.name == "gone":
        raise FileNotFoundError(2, "No such file", "inner")
    if item.name == "full":
        raise MemoryError
    if item.name == "defect":
        raise KeyError("x")
    if item.name == "dies":
        os._exit(9)
    if item.name == "noisy":
        print("printed by a worker")
    if item.name == "slow":
        time.sleep(60)
    return item.name * 2


def collect(items: list[Item], **options):
    done: list[tuple[str, str]] = []
    failed: list[tuple[str, AdapterOpsError]] = []
    outcome = run_many(
        items,
        work,
        lambda item, result: done.append((item.name, result)),
        lambda item, error: failed.append((item.name, error)),
        **options,
    )
    return outcome, done, failed


def some(*unusual: str, count: int = 1000) -> list[Item]:
    """Many items, the unusual ones spread among them."""
    every = {(position + 1) * count // (len(unusual) + 1): x for position, x in enumerate(unusual)}
    return [Item(f"p/{x}", x, "p") for i in range(count) for x in [every.get(i, str(i))]]


SLEEPING = """
from adapterops.batch import run_many
from tests.test_batch import some, sleeper
run_many(some(), sleeper, lambda i, r: print(r, flush=True), lambda i, e: None, jobs=2)
"""
TIDYING = SLEEPING.replace("sleeper", "tidying")
BAD = ("bad", "named", "gone", "full", "defect")


class TestRunMany:
    @pytest.mark.parametrize("jobs", [1, 3])
    def test_one_bad_item_does_not_stop_the_rest(self, jobs):
        items = some(*BAD)
        outcome, done, failed = collect(items, jobs=jobs)
        assert done == [(i.name, i.name * 2) for i in items if i.name not in BAD]
        assert [name for name, _ in failed] == list(BAD)
        assert [(item.name, error) for item, error in outcome.failed] == failed
        errors = dict(failed)
        assert str(errors["bad"]) == "p/bad: module m: is broken"
        assert str(errors["named"]).startswith("inside/named: is broken")
        assert type(errors["gone"]) is FileError and errors["gone"].path == "inner"
        assert type(errors["full"]) is MemoryLimitError and errors["full"].path == "p/full"
        assert "unexpected KeyError" in str(errors["defect"])
        assert outcome.exit_code == 7 and outcome.done == len(items) - len(BAD)

    def test_processes_are_used_and_what_they_print_does_no_harm(self, capfd):
        def here(item: Item) -> int:
            return os.getpid()

        outcome, done, _ = collect(some("noisy"), jobs=2)
        assert outcome.exit_code == 0 and ("noisy", "noisynoisy") in done
        captured = capfd.readouterr()
        assert captured.out == "" and "printed by a worker" in captured.err
        seen: set[int] = set()
        run_many(some(), here, lambda i, pid: seen.add(pid), lambda i, e: None, processes=False)
        assert seen == {os.getpid()}  # what does not pickle runs here
        pids: set[int] = set()
        run_many(some(), process, lambda i, pid: pids.add(pid), lambda i, e: None, jobs=2)
        assert os.getpid() not in pids and 1 <= len(pids) <= 2

    def test_few_items_start_no_process(self, monkeypatch):
        monkeypatch.setattr(run_module.workers, "_Worker", None)
        assert collect(some("bad", count=300), jobs=4)[0].exit_code == 3
        with pytest.raises(TypeError):
            collect(some(count=301), jobs=4)

    @pytest.mark.parametrize("jobs", [1, 2])
    def test_strict_stops_at_the_first(self, jobs):
        done: list[str] = []
        with pytest.raises(FormatError, match="p/bad"):
            run_many(
                some("bad", "gone"),
                work,
                lambda item, result: done.append(item.name),
                lambda item, error: pytest.fail("reported"),
                jobs=jobs,
                strict=True,
            )
        assert done == [str(i) for i in range(333)]

    def test_how_many_processes(self, monkeypatch):
        width = run_module.width_for
        assert [width(n, 8) for n in (1, 300, 301, 64_000)] == [1, 1, 8, 8]
        assert [width(n, 8, few=24, chunk=4) for n in (24, 25, 29, 100)] == [1, 7, 8, 8]
        assert width(1000, 1) == 1
        monkeypatch.setattr(run_module, "available_threads", lambda: 3)
        assert width(1000) == 3
        monkeypatch.setattr(run_module.workers, "available", lambda: False)
        assert width(1000) == 1

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_workers_tidy_up_before_they_end(self, tmp_path, number):
        code = (
            "from adapterops.cli import _terminate\n"
            "import signal; signal.signal(signal.SIGTERM, _terminate)\n" + TIDYING
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
        )
        limit = time.monotonic() + 20
        while len(list(tmp_path.glob("busy-*"))) < 2:
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate(timeout=20)
        assert not list(tmp_path.glob("busy-*")) and len(list(tmp_path.glob("tidy-*"))) == 2

    def test_a_worker_that_dies_ends_the_run_with_an_error(self):
        with pytest.raises(AdapterOpsError, match=r"died \(exit code 9\)") as caught:
            collect(some("dies"), jobs=2)
        assert "-j 1" in str(caught.value)

    @pytest.mark.parametrize("error", [Interrupted("now"), KeyboardInterrupt()])
    def test_an_interruption_is_no_failure_of_the_item(self, error):
        def interrupted(item: Item) -> None:
            raise error

        with pytest.raises(type(error)):
            run_many(some(count=3), interrupted, lambda i, r: None, lambda i, e: None)

    def test_progress(self):
        seen: list[tuple[str, int, int]] = []
        collect(some(count=3), what="x", progress=lambda *args: seen.append(args))
        assert seen == [("x", 1, 3), ("x", 2, 3), ("x", 3, 3)]

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_interrupting_ends_the_workers_at_once(self, tmp_path, number):
        code = (
            "from adapterops.cli import _terminate\n"
            "import signal; signal.signal(signal.SIGTERM, _terminate)\n" + SLEEPING
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        pids = {int(process.stdout.readline()) for _ in range(100)}
        start = time.monotonic()
        process.send_signal(number)
        process.communicate(timeout=20)
        assert process.returncode != 0 and time.monotonic() - start < 10
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    def test_workers_end_with_a_parent_that_was_killed(self, tmp_path):
        code = SLEEPING
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        pids = {int(process.stdout.readline()) for _ in range(100)}
        process.kill()
        process.communicate(timeout=20)
        limit = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < limit:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)

    def test_nothing_is_imported_from_the_working_directory(self, tmp_path, monkeypatch):
        (tmp_path / "pickle.py").write_text("raise SystemExit('hostile')")
        monkeypatch.chdir(tmp_path)
        assert collect(some(), jobs=2)[0].exit_code == 0


def process(item: Item) -> int:
    return os.getpid()


def tidying(item: Item) -> None:
    """Writes a file that stands only as long as it works."""
    path = Path(f"busy-{os.getpid()}")
    path.touch()
    try:
        time.sleep(60)
    finally:
        path.rename(f"tidy-{os.getpid()}")


def sleeper(item: Item) -> int:
    """Quick at first, then slow."""
    time.sleep(0.0 if int(item.name) < 200 else 0.05)
    return os.getpid()


class TestResume:
    def made(self, **changes) -> Provenance:
        origin = Origin(changes.pop("name", "a"), changes.pop("sha256", "00"), 1.0)
        verb = changes.pop("verb", "inspect")
        return Provenance(verb, (origin,), {"modules": None, **changes})

    def write(self, path: Path, text: str | None) -> Path:
        """A weights file with this provenance."""
        metadata = {} if text is None else {"adapterops": text}
        return write_kohya(path, pairs(1, {"lora_unet_q": (6, 5)}, 2), metadata=metadata)

    def test_a_file_of_ours_is_done(self, tmp_path):
        made = self.made()
        path = tmp_path / "x.safetensors"
        assert is_done(path, made) == "absent"
        self.write(path, made.to_json())
        assert is_done(path, made) == "done" and recorded(path) == made.to_dict()

    @pytest.mark.parametrize(
        "change", [{"sha256": "01"}, {"verb": "compress"}, {"modules": "q"}, {"name": "b"}]
    )
    def test_other_work_is_foreign(self, tmp_path, change):
        path = self.write(tmp_path / "x.safetensors", self.made(**change).to_json())
        assert is_done(path, self.made()) == "foreign"
        with pytest.raises(OutputExistsError, match="--overwrite"):
            skip_done(str(path), self.made(), overwrite=False)
        assert skip_done(str(path), self.made(), overwrite=True) is False

    def test_another_version_is_foreign(self, tmp_path, monkeypatch):
        path = self.write(tmp_path / "x.safetensors", self.made().to_json())
        monkeypatch.setattr(adapterops, "__version__", "99")
        assert is_done(path, self.made()) == "foreign"

    @pytest.mark.parametrize("text", [None, "", "{", "[]", "3"])
    def test_a_strangers_file_is_foreign(self, tmp_path, text):
        path = self.write(tmp_path / "x.safetensors", text)
        assert is_done(path, self.made()) == "foreign"

    def test_files_that_are_none_are_foreign(self, tmp_path):
        for name, data in (("x.safetensors", b"no"), ("x.svg", b"<svg/>"), ("x.png", b"\x89PNG")):
            (tmp_path / name).write_bytes(data)
            assert is_done(tmp_path / name, self.made()) == "foreign"
        (tmp_path / "link.svg").symlink_to(tmp_path / "nowhere")
        assert is_done(tmp_path / "link.svg", self.made()) == "foreign"
        (tmp_path / "folder").mkdir()
        assert is_done(tmp_path / "folder", self.made()) == "foreign"

    def test_a_folder_is_known_by_its_weights(self, tmp_path):
        (tmp_path / "x").mkdir()
        self.write(tmp_path / "x" / "adapter_model.safetensors", self.made().to_json())
        assert is_done(tmp_path / "x", self.made()) == "done"

    def test_an_mlx_folder_is_known_by_its_weights(self, tmp_path):
        (tmp_path / "x").mkdir()
        self.write(tmp_path / "x" / "adapters.safetensors", self.made().to_json())
        assert is_done(tmp_path / "x", self.made()) == "done"

    def test_what_merge_writes_is_recorded(self, tmp_path):
        adapterops.merge([peft(tmp_path / "a")], out=tmp_path / "m", rank=1)
        assert recorded(tmp_path / "m")["verb"] == "merge"
        assert recorded(tmp_path / "m")["inputs"][0]["name"] == "a"

    def test_a_picture_says_what_it_was_drawn_from(self, tmp_path):
        made = self.made(modules="a<b>&\"'")
        text = made.to_json().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        svg = tmp_path / "x.svg"
        svg.write_text(f"<svg><metadata><dc:description>{text}</dc:description></metadata></svg>")
        assert is_done(svg, made) == "done"
        raw = b"Description\0" + made.to_json().encode()
        chunks = b"".join(
            len(body).to_bytes(4, "big") + kind + body + b"crc."
            for kind, body in ((b"IHDR", bytes(13)), (b"tEXt", b"Title\0x"), (b"tEXt", raw))
        )
        (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
        assert is_done(tmp_path / "x.png", made) == "done"
        for data in (b"\x89PNG\r\n\x1a\n" + chunks[:-20], b"\x89PNG\r\n\x1a\n\xff\xff\xff\xfftEXt"):
            (tmp_path / "y.png").write_bytes(data)
            assert is_done(tmp_path / "y.png", made) == "foreign"
        svg.write_bytes(b"<dc:description>\xff</dc:description>")
        assert is_done(svg, made) == "foreign"

    def test_an_interrupted_output_is_absent(self, tmp_path):
        with (
            pytest.raises(KeyboardInterrupt),
            stage(tmp_path / "x.svg", directory=False, overwrite=False) as target,
        ):
            target.write("x.svg", [b"<svg"])
            raise KeyboardInterrupt
        assert is_done(tmp_path / "x.svg", self.made()) == "absent"


def test_items_and_errors_travel_between_processes():
    import pickle

    item = Item("p", "n", "r")
    assert pickle.loads(pickle.dumps(item)) == item
    error = FormatError("m", path="p", module="x", hint="h")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_numbers_of_numpy_are_no_part_of_provenance():
    assert json.loads(Provenance("v", (), {"rank": int(np.int64(3))}).to_json())["options"] == {
        "rank": 3
    }
