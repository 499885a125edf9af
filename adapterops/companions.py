"""The files beside the weights: config, tokenizer files, model card, and the sidecar."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from adapterops.card import model_card
from adapterops.certificate import Report, fields_of
from adapterops.files.output import SIDECAR, Staging
from adapterops.files.source import LocalFile, read_bytes
from adapterops.formats.model import AdapterFile
from adapterops.layout import sidecar_name
from adapterops.provenance import Provenance, base_name


def side_files(
    inputs: Sequence[AdapterFile], directory: bool
) -> tuple[dict[str, bytes], list[str]]:
    """Tokenizer files beside the inputs: those that travel, warnings about those that do not."""
    carried: dict[str, bytes] = {}
    warnings = []
    for name in sorted({name for file in inputs for name in file.side_files}):
        contents = {_content(Path(file.path) / name) for file in inputs if name in file.side_files}
        if not directory:
            warnings.append(f"{name} beside the inputs does not fit into one file")
        elif len(contents) > 1:
            warnings.append(f"{name} differs between the inputs and was left out")
        else:
            carried[name] = contents.pop()
    return carried, warnings


def _content(path: Path) -> bytes:
    file = LocalFile(path)
    try:
        return bytes(read_bytes(file, 0, file.size()))
    finally:
        file.close()


def write_companions(
    target: Staging, files: Mapping[str, bytes], report: Report, provenance: Provenance
) -> None:
    """Config, tokenizer files, model card and the sidecar with every measured figure."""
    for name, data in files.items():
        target.write(name, [data])
    if target.directory:
        target.write("README.md", [model_card(report).encode()])
    measured = fields_of(report)
    del measured["warnings"], measured["notes"]  # they may name paths, and an output travels
    names = [path.name for path in target.root.iterdir()] if target.directory else []
    document = {
        "schema": report.schema,
        **measured,
        "output": base_name(report.output),
        "files": sorted(names) or [target.final.name],
        "provenance": provenance.to_dict(),
    }
    name = SIDECAR if target.directory else sidecar_name(target.final)
    target.write(name, [_encoded(document)])


def _encoded(document: dict[str, Any]) -> bytes:
    """JSON, indented; a name that is no valid text has its odd characters replaced."""
    try:
        return msgspec.json.format(msgspec.json.encode(document), indent=1)
    except UnicodeEncodeError:
        text = json.dumps(
            document, indent=1, ensure_ascii=False, allow_nan=False, default=fields_of
        )
        return text.encode("utf-8", "replace")
