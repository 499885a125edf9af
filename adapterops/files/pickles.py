"""Legacy `.bin` and `.pt` files, read only on request and without running code from them.

The archive is checked before PyTorch sees it: stored entries only, whose sizes add up to the file
(a compressed bomb cannot), then `weights_only=True`, never a fallback. What comes out is turned
into safetensors bytes, so that everything behind this module knows one format.
"""

from __future__ import annotations

import os
import struct
import zipfile
from typing import Any

from adapterops.errors import FormatError, UnsafeFileError, UnsupportedError
from adapterops.files.source import LocalFile, MemoryFile, read_bytes


def open_pickle(path: str | os.PathLike[str]) -> MemoryFile:
    """The tensors of a PyTorch zip archive as an in-memory safetensors file.

    Raises UnsafeFileError for anything but a plain archive of tensors.
    """
    name = os.fspath(path)
    file = LocalFile(name)
    _check_archive(file)
    return MemoryFile(name, _to_safetensors(name, _load(name)), file)


def _check_archive(file: LocalFile) -> None:
    path, size = file.path, file.size()
    start = bytes(read_bytes(file, 0, min(size, 4)))
    file.close()
    if start != b"PK\x03\x04":  # by the start, as torch judges; zipfile looks from the end
        raise UnsafeFileError(
            "not a PyTorch zip archive (pickles of before torch 1.6 are refused)",
            path=path,
            hint="re-save it with a current torch, or as safetensors",
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise FormatError(f"a broken zip archive ({error})", path=path) from None
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UnsafeFileError(f"the archive entry {entry.filename!r} is compressed", path=path)
    total = sum(entry.file_size for entry in entries)
    if total > size:
        raise UnsafeFileError(
            f"the archive's entries claim {total} bytes, the file has {size}", path=path
        )


def _load(path: str) -> dict[str, Any]:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises many kinds; none may be retried unsafely
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsafeFileError(f"not a plain archive of tensors ({reason})", path=path) from None
    if isinstance(content, list):
        content = _named_pairs(content, torch)
    if not isinstance(content, dict):
        raise UnsupportedError(
            f"the pickle holds a {type(content).__name__}, not a dictionary of named tensors or a "
            "list of pairs; its tensors cannot be told apart",
            path=path,
        )
    wrong = [key for key, value in content.items() if not _is_named_tensor(key, value, torch)]
    if wrong:
        raise FormatError(
            f"{wrong[0]!r} is a {type(content[wrong[0]]).__name__}, not a tensor", path=path
        )
    claimed = sum(value.numel() * value.element_size() for value in content.values())
    if claimed > os.path.getsize(path):
        raise UnsafeFileError(
            f"its tensors claim {claimed} bytes, more than the file has", path=path
        )
    return content


def _named_pairs(items: list[Any], torch: Any) -> dict[str, Any] | list[Any]:
    """cloneofsimo's first format is a bare list: up and down of each module in turn.

    Which modules these are follows from the order in which one version of that tool walked one
    model; the pairs are numbered, and nothing more is claimed.
    """
    if len(items) % 2 or not items or not all(isinstance(item, torch.Tensor) for item in items):
        return items
    ups, downs = items[::2], items[1::2]
    if not all(_is_pair(up, down) for up, down in zip(ups, downs, strict=True)):
        return items
    pairs = {f"list:{index}:up": up for index, up in enumerate(ups)}
    return {**pairs, **{f"list:{index}:down": down for index, down in enumerate(downs)}}


def _is_pair(up: Any, down: Any) -> bool:
    """Whether two tensors multiply as up (out, r) and down (r, in), with a rank that is low."""
    if up.dim() < 2 or down.dim() < 2 or up.shape[1] != down.shape[0]:
        return False
    rank: int = up.shape[1]
    return bool(rank <= min(up.shape[0], down.shape[1:].numel()))


def _is_named_tensor(key: Any, value: Any, torch: Any) -> bool:
    return (
        isinstance(key, str)
        and isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not value.is_quantized
    )


def _to_safetensors(path: str, tensors: dict[str, Any]) -> bytes:
    from safetensors.torch import save

    try:
        data: bytes = save(
            {name: value.detach().contiguous().clone() for name, value in tensors.items()}
        )
    except (ValueError, RuntimeError, KeyError) as error:
        raise FormatError(f"its tensors cannot be stored plainly ({error})", path=path) from None
    return data
