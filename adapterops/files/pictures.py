"""The description in a picture of ours: where its data came from. Read, never rendered."""

from __future__ import annotations

import html
import os
import re

from adapterops.errors import FormatError
from adapterops.files.source import LocalFile, read_bytes

_PNG = b"\x89PNG\r\n\x1a\n"
_SEARCHED = 1 << 20
_SVG = re.compile(rb"<dc:description>(.*?)</dc:description>", re.DOTALL)


def description(path: str | os.PathLike[str]) -> str | None:
    """The text under `Description` in an SVG's or PNG's metadata; None where there is none.

    Only the first megabyte is looked at: both formats keep it before the picture. Raises FileError,
    and FormatError where the text is not UTF-8.
    """
    file = LocalFile(path)
    try:
        data = bytes(read_bytes(file, 0, min(file.size(), _SEARCHED)))
    finally:
        file.close()
    try:
        if data.startswith(_PNG):
            return _from_png(data)
        found = _SVG.search(data)
        return html.unescape(found[1].decode()) if found else None
    except UnicodeDecodeError:
        raise FormatError("its metadata are not UTF-8", path=path) from None


def _from_png(data: bytes) -> str | None:
    """The chunk `tEXt`: keyword, NUL, text (PNG 1.2, 4.2.3)."""
    position = len(_PNG)
    while position + 8 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kind, body = data[position + 4 : position + 8], data[position + 8 :][:length]
        keyword, _, text = body.partition(b"\0")
        if kind == b"tEXt" and keyword == b"Description":
            return text.decode()
        position += 12 + length
    return None
