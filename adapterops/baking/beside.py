"""The files beside a base's weights: which travel with the result, and what becomes of configs.

Configs, tokenizers, code and licences travel. Weights in other formats and copies of the weights
do not: they are the model without the adapters.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterops import casts
from adapterops.basemodel import BaseModel
from adapterops.changes import entries
from adapterops.changes.targets import Changes
from adapterops.errors import FormatError
from adapterops.files import checkpoint
from adapterops.files.output import SIDECAR
from adapterops.files.source import unreadable
from adapterops.formats.locate import read_text
from adapterops.formats.model import AdapterFile
from adapterops.formats.peft import read_config

_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack"),
    *(".onnx", ".onnx_data", ".onnx.data", ".tflite", ".pb", ".npz", ".ot", ".mlmodel", ".nemo"),
)
_INDEX = ".index.json"
_OURS = (SIDECAR, ".adapterops.json", ".undo")
_MODULES = "modules.json"  # of sentence-transformers: folders with layers after the model
_DTYPES = ("torch_dtype", "dtype")


@dataclass(frozen=True, slots=True)
class Carried:
    """A file of the result by its path in the output's folder: a copy of `source`, or `content`."""

    name: str
    source: str | None = None
    content: bytes | None = None


def carried(
    base: BaseModel, inputs: Sequence[AdapterFile], changes: Changes, dtype: str | None = None
) -> tuple[list[Carried], list[str]]:
    """The files that travel with a base given as a folder or an index, and notes on them.

    A base given as a file has none. `dtype` (F32, BF16, F16) is the type of all floats of the
    result, None if they keep theirs. Raises FileError for what cannot be read, FormatError for a
    config that is none.
    """
    given = Path(base.path)
    if not given.is_dir() and not checkpoint.is_index(given):
        return [], []
    root = given if given.is_dir() else given.parent
    kept, left = _sorted_out(base, root)
    files = {name: Carried(name, source=os.fspath(path)) for name, path in kept.items()}
    for part in base.configs:
        name = f"{part}/config.json" if part else "config.json"
        content = _config(kept.get(name), changes.config.get(part, {}), dtype)
        if content is not None:
            files[name] = Carried(name, content=content)
    notes = []
    if left:
        notes.append(
            f"left out, as they are the model without the adapters: {', '.join(left[:6])}"
            + (f" and {len(left) - 6} more" if len(left) > 6 else "")
        )
    if "README.md" in files:
        notes.append("README.md is the base's")
    tokenizer, said = _tokenizer(base, inputs, files)
    return [*{**files, **tokenizer}.values()], [*notes, *said]


def index_json(
    names_to_shard: Mapping[str, str],
    sizes: Mapping[str, int],
    metadata: Mapping[str, Any],
    parameters: int | None = None,
) -> bytes:
    """An index of shards: tensor -> file, and the true number of bytes of all tensors.

    `sizes` are bytes by tensor, `metadata` that of the source's index, of which other entries are
    kept; `total_parameters` is `parameters`, and left out if None.
    """
    kept = {key: value for key, value in metadata.items() if key != "total_parameters"}
    if "total_parameters" in metadata and parameters is not None:
        kept["total_parameters"] = parameters
    kept["total_size"] = sum(sizes[name] for name in names_to_shard)
    document = {"metadata": kept, "weight_map": dict(names_to_shard)}
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def index_metadata(index: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of an index of shards, {} where it has none."""
    try:
        found = json.loads(read_text(os.fspath(index), 64 << 20))["metadata"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return dict(found) if isinstance(found, dict) else {}


def _sorted_out(base: BaseModel, root: Path) -> tuple[dict[str, Path], list[str]]:
    """Files that travel by their path below `root`, and names of weights that do not."""
    baked = {os.path.realpath(os.path.dirname(file)) for file in base.files}
    own = {os.path.realpath(file) for file in base.files}
    layers = _layers(root)
    kept: dict[str, Path] = {}
    left: list[str] = []
    for folder, names in _walk(root):
        relative = folder.relative_to(root)
        weights = [name for name in names if name.lower().endswith(_WEIGHTS)]
        top = relative.parts[0] if relative.parts else ""
        is_part = base.is_pipeline or not top or top in layers
        if os.path.realpath(folder) not in baked and weights and not is_part:
            left.append(f"{relative.as_posix()}/")
            continue
        alone = os.path.realpath(folder) not in baked  # a part that is stored in another format
        for name in names:
            path = folder / name
            if name.endswith(_OURS):
                continue
            if not alone and (name in weights or name.endswith(_INDEX)):
                if os.path.realpath(path) not in own and name in weights:
                    left.append((relative / name).as_posix())
                continue
            kept[(relative / name).as_posix()] = path
    inside = tuple(name for name in left if name.endswith("/"))
    return {n: p for n, p in kept.items() if not n.startswith(inside)}, left


def _walk(folder: Path, above: tuple[str, ...] = ()) -> Iterator[tuple[Path, list[str]]]:
    """Folders and the names of their files, hidden ones left out; links to folders are followed
    unless they lead back to one above."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise unreadable(os.fspath(folder), error) from None
    modes = {name: _mode(folder / name) for name in names}
    yield folder, [name for name, mode in modes.items() if stat.S_ISREG(mode)]
    for name, mode in modes.items():
        if stat.S_ISDIR(mode):
            yield from _walk(folder / name, (*above, real))


def _mode(path: Path) -> int:
    """What is at a path; 0 for a link to nothing."""
    try:
        return os.stat(path).st_mode
    except OSError:
        return 0


def _layers(root: Path) -> set[str]:
    """Folders whose weights are layers of the model and no copy of it."""
    file = root / _MODULES
    if not file.is_file():
        return set()
    try:
        modules = json.loads(read_text(os.fspath(file)))
        return {str(module["path"]).split("/")[0] for module in modules} - {""}
    except (ValueError, LookupError, TypeError, RecursionError):
        raise FormatError("is no list of modules", path=file) from None


def _config(path: Path | None, changed: Mapping[str, Any], dtype: str | None) -> bytes | None:
    """A config.json with entries changed, in its own order; None where it stays as it is."""
    if path is None:
        return None
    text = read_text(os.fspath(path))
    config = read_config(text, os.fspath(path))
    wanted = entries.merged(_typed(config, dtype), changed)
    result = entries.merged(config, wanted)
    if result == config:
        return None
    plain = text.decode("utf-8", "replace")
    if list(config) == sorted(config):
        result = dict(sorted(result.items()))
    document = json.dumps(result, indent=2, ensure_ascii=plain.isascii())
    return (document + ("\n" if plain.endswith("\n") else "")).encode()


def _typed(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """The entries that say the type of the weights, at every level that says one."""
    if dtype is None:
        return {}
    name = casts.format_name(dtype)
    found: dict[str, Any] = {key: name for key in _DTYPES if config.get(key) is not None}
    if not found and "model_type" in config:
        found = {"torch_dtype": name}
    for key, below in config.items():
        if isinstance(below, Mapping):
            inner = _typed({k: v for k, v in below.items() if k != "model_type"}, dtype)
            found |= {key: inner} if inner else {}
    return found


def _tokenizer(
    base: BaseModel, inputs: Sequence[AdapterFile], files: Mapping[str, Carried]
) -> tuple[dict[str, Carried], list[str]]:
    """Tokenizer files of the adapters in place of the base's, where those that have any agree."""
    sets = [
        {name: read_text(os.fspath(Path(file.path) / name), 1 << 30) for name in file.side_files}
        for file in inputs
        if file.side_files
    ]
    differ = [n for n, d in (sets[0] if sets else {}).items() if d != _content(files.get(n))]
    if not sets or (not differ and all(other == sets[0] for other in sets)):
        return {}, []
    names = ", ".join(sorted({name for each in sets for name in each})[:4])
    if base.is_pipeline:
        return {}, [f"the adapters' {names} are left out: the pipeline's own are kept"]
    if any(other != sets[0] for other in sets):
        return {}, [f"the adapters' tokenizers differ ({names}): the base's is kept"]
    owner = next(file for file in inputs if file.side_files)
    taken = {n: Carried(n, source=os.fspath(Path(owner.path) / n)) for n in owner.side_files}
    return taken, [f"the adapters' tokenizer takes the place of the base's: {', '.join(differ)}"]


def _content(file: Carried | None) -> bytes | None:
    return read_text(file.source, 1 << 30) if file is not None and file.source else None
