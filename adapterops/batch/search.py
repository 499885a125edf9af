"""From the paths a user gives to the adapters there: directories are searched, lists are read."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from adapterops.errors import FileError, UsageError
from adapterops.files.source import unreadable
from adapterops.provenance import base_name

WEIGHTS = (".safetensors", ".bin", ".pt")
_MARKS = {"adapter_config.json", "adapters.safetensors"}
_MARK = re.compile(r"(adapter_model|pytorch_lora_weights)\.")
# Shards and files of base models, and what trainers keep beside an adapter.
OTHERS = re.compile(
    r".*-\d{5}-of-\d{5}\..*|diffusion_pytorch_model.*|(model|pytorch_model)\.(safetensors|bin)"
    r"|(optimizer|scheduler|training_args|rng_state.*|scaler)\.(bin|pt)"
)
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Item:
    """One adapter to work on.

    `path` is what is opened, `root` the path that was given and led to it, `name` where it lies
    below the root (or the root's own name where that is the adapter itself).
    """

    path: str
    name: str
    root: str

    def __str__(self) -> str:
        return self.path


def is_one(path: str | os.PathLike[str]) -> bool:
    """Whether a path names an adapter (or nothing) rather than a directory to search for some."""
    try:
        return is_adapter(os.listdir(path))
    except OSError:  # a file, or nothing that could be searched
        return True


def is_adapter(names: Iterable[str]) -> bool:
    """Whether a directory with these names in it is one adapter."""
    return any(name in _MARKS or _MARK.match(name) for name in names)


def find(
    paths: Iterable[str | os.PathLike[str]],
    from_file: str | None = None,
    *,
    exclude: str | os.PathLike[str] | None = None,
    note: Note = lambda text: None,
) -> list[Item]:
    """The adapters at `paths` and at those listed in `from_file` ("-" is stdin), in order.

    A directory with an `adapter_config.json`, an `adapter_model.*`, `adapters.safetensors` or
    `pytorch_lora_weights.*` is one adapter. Any other is searched: for such directories and for
    single .safetensors, .bin and .pt files that are no part of a base model or a trainer's state by
    their names. Links are followed, each directory is entered once, hidden ones and `exclude` (the
    output) never. Below a directory the order is that of the sorted names. What is reached twice
    counts once, and `note` is told. A path that does not exist is an item too: opening it says so.

    Raises UsageError where nothing was given, FileError where nothing was found or the list cannot
    be read.
    """
    given = [os.fspath(path) for path in paths]
    if from_file is not None:
        given += _listed(from_file)
    if not given:
        raise UsageError("no input: give paths, or a list of them with --from FILE")
    closed = None if exclude is None else os.path.realpath(exclude)
    found: dict[str, Item] = {}
    for root in given:
        search, empty = _Search(root, closed, note), True
        for item, real in search:
            empty = False
            first = found.setdefault(real, item)
            if first is not item:
                note(f"{item.path}: the same as {first.path}, counted once")
        if search.passed_over:
            note(f"{root}: {search.passed_over} files of base models or trainers passed over")
        if empty and len(given) > 1:
            note(f"{root}: holds no adapter")
    if not found:
        raise FileError(
            "no adapter in it: no folder with an adapter_config.json, no .safetensors file",
            path=given[0],
        )
    return list(found.values())


def _listed(file: str) -> list[str]:
    """Paths of a list, one a line; blank lines and those that start with # are skipped."""
    try:
        if file == "-":
            data = sys.stdin.buffer.read()
        else:
            with open(file, "rb") as stream:
                data = stream.read()
    except OSError as error:
        raise unreadable(file, error) from None
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise UsageError(
            f"--from {file}: line {line} holds a NUL byte",
            hint="one path a line; `find -print`, not `-print0`",
        )
    lines = (os.fsdecode(line.strip()) for line in data.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


class _Search:
    """The adapters below one path, each with its real path; counts what was passed over."""

    def __init__(self, root: str, closed: str | None, note: Note) -> None:
        self.root = root
        self.passed_over = 0
        self._closed = closed
        self._note = note
        self._entered: set[tuple[int, int]] = set()

    def __iter__(self) -> Iterator[tuple[Item, str]]:
        real = os.path.realpath(self.root)
        if not os.path.isdir(self.root):
            yield Item(self.root, base_name(self.root), self.root), real
            return
        waiting = [("", real, True)]  # names below the root, real paths, the next one last
        while waiting:
            name, real, is_directory = waiting.pop()
            path = self._path(name)
            item = Item(path, name or base_name(self.root), self.root)
            if not is_directory:
                yield item, real
                continue
            if real == self._closed or not self._enter(path):
                continue
            try:
                with os.scandir(path) as entries:
                    inside = sorted(entries, key=lambda entry: entry.name, reverse=True)
            except OSError:
                yield item, real  # opening it reports why
                continue
            if is_adapter(entry.name for entry in inside):
                yield item, real
            else:
                waiting += self._below(name, real, inside)

    def _path(self, name: str) -> str:
        """What is opened: the root as it was given and the name below it."""
        if not name or self.root in (".", "./"):
            return name or self.root
        return os.path.join(self.root, name)

    def _enter(self, path: str) -> bool:
        """Whether a directory is entered for the first time; links may lead back to one."""
        try:
            status = os.stat(path)
        except OSError:  # gone meanwhile; scandir says so
            return True
        identity = status.st_dev, status.st_ino
        if identity in self._entered:
            self._note(f"{path}: a link to a folder that is searched already, entered once")
            return False
        self._entered.add(identity)
        return True

    def _below(
        self, name: str, real: str, inside: list[os.DirEntry[str]]
    ) -> Iterator[tuple[str, str, bool]]:
        for entry in inside:
            if entry.name.startswith("."):
                continue
            is_directory = _is_directory(entry)
            if not is_directory and not entry.name.lower().endswith(WEIGHTS):
                continue
            if not is_directory and OTHERS.fullmatch(entry.name):
                self.passed_over += 1
                continue
            below = f"{name}/{entry.name}" if name else entry.name
            target = f"{real}/{entry.name}"
            yield below, os.path.realpath(target) if entry.is_symlink() else target, is_directory


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False
