"""Adapters in a bucket: found, and brought to disk with no more requests and bytes than needed.

A URI is `protocol://…`, opened by fsspec: s3 (extra `[s3]`), gs, hf, memory and whatever else is
installed, with the credentials and endpoints that each finds in its own environment.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterops.errors import FileError, FormatError, UnsafeFileError
from adapterops.files.header import Header
from adapterops.files.names import CONFIG, PICKLES, SIDE_FILES, WEIGHTS, config_names
from adapterops.files.objects import (
    Entry,
    RemoteFile,
    find_file,
    folder_listing,
    listing,
    read_small,
    trimmed,
)
from adapterops.files.output import unwritable
from adapterops.files.scratch import scratch
from adapterops.files.source import Source, read_header

__all__ = ["Accept", "Entry", "fetched", "is_remote", "listing", "located", "unsafe_part"]

Accept = Callable[[Source, Header], None]
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_CONFIG_LIMIT = 16_000_000
_LONGEST = 200  # bytes of a name that every file system takes


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URI and not a name on this machine's file system."""
    return isinstance(path, str) and _URI.match(path) is not None


def unsafe_part(key: str) -> str | None:
    """The first part of a key that no file below a folder could be called, None if there is none.

    A key of a bucket is any text: `..`, empty parts and backslashes are no folders there.
    """
    for part in key.split("/"):
        if part in ("", ".", "..") or "\\" in part:
            return part
        if not part.isprintable() and any(unicodedata.category(c) in ("Cc", "Cs") for c in part):
            return part
    return None


@contextmanager
def located(
    location: str,
    *,
    inside: str | os.PathLike[str] | None = None,
    accept: Accept | None = None,
    allow_pickle: bool = False,
    side_files: bool = False,
) -> Iterator[str]:
    """A local path of the adapter at `location`: itself, or a copy of a remote one.

    The copy is removed at the end, with the temporary folder that it lies in: one below `inside`,
    where given. A run over many adapters in threads makes that one with `scratch`, in its main
    thread, so that an interruption removes what the threads were at. The other arguments and the
    errors are those of `fetched`.
    """
    if not is_remote(location):
        yield location
        return
    with scratch(inside) as folder:
        yield os.fspath(
            fetched(
                location, folder, accept=accept, allow_pickle=allow_pickle, side_files=side_files
            )
        )


def fetched(
    uri: str,
    folder: str | os.PathLike[str],
    *,
    accept: Accept | None = None,
    allow_pickle: bool = False,
    side_files: bool = False,
) -> Path:
    """Bring the adapter at `uri`, a file or a folder of a store, into `folder`; its path there.

    Beside the weights come the configs that `read_adapter` looks at, and with `side_files` the
    tokenizer's files. The weights' header is read first: what it shows to be malformed or hostile,
    and what `accept` raises an error for, is refused before the rest is asked for. Raises
    UnsafeFileError for a key that no path should be made of, FormatError, FileError for what is
    missing or unreachable, ChangedError where the weights or config change meanwhile.
    """
    uri = trimmed(uri)
    part = unsafe_part(uri.partition("://")[2])
    if part is not None:
        raise UnsafeFileError(f"the key has the part {part!r}, which is no name", path=uri)
    weights, beside = _find(uri)
    is_pickle = weights.path.lower().endswith(PICKLES)
    if is_pickle and not allow_pickle:
        raise FormatError(
            "is a PyTorch pickle, which can run code when it is opened",
            path=weights.path,
            hint="pass --allow-pickle to read it with weights_only=True",
        )
    source = RemoteFile(weights)
    if not is_pickle:
        header = read_header(source)
        if accept is not None:
            accept(source, header)
    target = Path(folder, _local_name(uri))
    if weights.path == uri:
        _save_configs(uri, target)
        source.save(target)
        return target
    _make(target)
    for name in beside if side_files else [name for name in beside if name == CONFIG]:
        _check_size(beside[name])
        RemoteFile(beside[name]).save(target / name)
    source.save(target / weights.path.rpartition("/")[2])
    return target


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from None


def _check_size(entry: Entry) -> None:
    """The limit of `read_adapter`, before it is asked for."""
    if entry.path.endswith("/" + CONFIG) and entry.size > _CONFIG_LIMIT:
        text = f"has {entry.size} bytes, too large for a config"
        raise FormatError(text, path=entry.path)


def _local_name(uri: str) -> str:
    """A key's last part, shortened where no file may be called that."""
    name = uri.rpartition("/")[2]
    if len(os.fsencode(name)) <= _LONGEST:
        return name
    suffix = os.path.splitext(name)[1][:20]
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:32] + suffix


def _find(uri: str) -> tuple[Entry, dict[str, Entry]]:
    """The weights at a URI and, for a folder, what lies in it and belongs to them."""
    if uri.lower().endswith((".safetensors", *PICKLES)):
        weights = find_file(uri)
        if weights is not None:
            return weights, {}
    inside = {entry.path.rpartition("/")[2]: entry for entry in folder_listing(uri)}
    if not inside:
        raise FileError("no such file or directory", path=uri)
    for entry in inside.values():
        if entry.path == uri:  # a file whose name says nothing
            return entry, {}
    name = _weights(inside, uri)
    return inside[name], {
        other: inside[other] for other in (CONFIG, *SIDE_FILES) if other in inside
    }


def _weights(inside: dict[str, Entry], uri: str) -> str:
    """The weights that a folder with these files stands for, by the rule for local folders."""
    found = [name for name in WEIGHTS if name in inside]
    if found:
        return found[0]
    others = [name for name in inside if name.endswith(".safetensors")]
    if len(others) > 1:
        raise FormatError(
            f"holds {len(others)} safetensors files ({', '.join(others[:4])}, …) and no "
            f"{WEIGHTS[0]}",
            path=uri,
            hint="name one of the files",
        )
    if not others:
        raise FormatError(
            f"is not an adapter: the directory holds no {WEIGHTS[0]}",
            path=uri,
        )
    return others[0]


def _save_configs(uri: str, target: Path) -> None:
    """The configs that may belong to a single file: asked for by name, its folder may be large."""
    folder, _, name = uri.rpartition("/")
    for other, own in zip(config_names(name), config_names(target.name), strict=True):
        text = read_small(f"{folder}/{other}", _CONFIG_LIMIT + 1)
        if text is None:
            continue
        if len(text) > _CONFIG_LIMIT:
            if other == CONFIG:
                raise FormatError("is too large for a config", path=f"{folder}/{other}")
            continue  # notes of an image program, no config
        place = target.parent / own
        _make(place.parent)
        try:
            place.write_bytes(text)
        except OSError as error:
            raise unwritable(place, error) from None
