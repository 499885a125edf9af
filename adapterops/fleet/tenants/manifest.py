"""A list of tenants: CSV with the header `tenant,path` or `tenant,path,traffic`."""

from __future__ import annotations

import csv
import io
import math
import os
import unicodedata

from adapterops.errors import FileError, UsageError
from adapterops.files.objects import read_small
from adapterops.files.remote import is_remote
from adapterops.files.source import LocalFile, read_bytes
from adapterops.fleet.types import Tenant

_COLUMNS = ("tenant", "path", "traffic")
_LIMIT = 1_000_000_000  # bytes


def read_manifest(path: str) -> list[Tenant]:
    """The tenants of a manifest, a file or URI, in its order.

    Paths are relative to the manifest's folder unless absolute or URIs; blank lines are skipped,
    spaces around a field too, and a blank traffic is 1. Raises FileError, and UsageError with the
    line for a column that is unknown or missing, an empty field, or a traffic that is no number.
    """
    rows = csv.reader(io.StringIO(_text(path), newline=""), strict=True, skipinitialspace=True)
    found: list[Tenant] = []
    columns: list[str] = []
    try:
        for fields in rows:
            row = [field.strip() for field in fields]
            if not any(row):
                continue
            if not columns:
                columns = _header(row, path)
            else:
                found.append(_tenant(columns, row, path, rows.line_num))
    except csv.Error as error:
        raise _wrong(path, rows.line_num, f"is no CSV ({error})") from None
    if not found:
        raise UsageError("the manifest lists no tenant", path=path)
    return found


def _text(path: str) -> str:
    data = _remote_bytes(path) if is_remote(path) else _local_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _wrong(path, line, f"is not UTF-8 ({error.reason})") from None


def _local_bytes(path: str) -> bytes:
    file = LocalFile(path)
    try:
        return bytes(read_bytes(file, 0, file.size()))
    finally:
        file.close()


def _remote_bytes(path: str) -> bytes:
    data = read_small(path, _LIMIT)
    if data is None:
        raise FileError("no such file or directory", path=path)
    return data


def _header(row: list[str], path: str) -> list[str]:
    unknown = [name for name in row if name not in _COLUMNS]
    missing = [name for name in _COLUMNS[:2] if name not in row]
    if unknown or missing or len(set(row)) != len(row):
        raise UsageError(
            f"the manifest's first line is {','.join(row)[:200]!r}",
            path=path,
            hint="begin it with the header tenant,path or tenant,path,traffic",
        )
    return row


def _tenant(columns: list[str], row: list[str], path: str, line: int) -> Tenant:
    if len(row) != len(columns):
        raise _wrong(path, line, f"has {len(row)} fields, the header {len(columns)}")
    fields = dict(zip(columns, row, strict=True))
    for name in _COLUMNS[:2]:
        if not fields[name]:
            raise _wrong(path, line, f"has no {name}")
        if any(unicodedata.category(c) == "Cc" for c in fields[name]):
            raise _wrong(path, line, f"has a control character in its {name}")
    place = fields["path"]
    traffic = _traffic(fields.get("traffic", ""), path, line)
    return Tenant(fields["tenant"], place, _location(place, path), traffic)


def _traffic(text: str, path: str, line: int) -> float:
    if not text:
        return 1.0
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise _wrong(path, line, f"has the traffic {text[:40]!r}, no number that is 0 or more")
    return value


def _location(place: str, manifest: str) -> str:
    if is_remote(place) or os.path.isabs(place):
        return place
    if is_remote(manifest):
        return f"{manifest.rpartition('/')[0]}/{place}"
    return os.path.abspath(os.path.join(os.path.dirname(manifest), place))


def _wrong(path: str, line: int, what: str) -> UsageError:
    return UsageError(f"line {line} of the manifest {what}", path=path)
