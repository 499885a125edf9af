"""What the inputs of a model's modules look like: the one file format, read and written.

A safetensors file of float32. For every module one tensor, named by the module's path in the model
it was collected from:

    <module>.gram     (n, n)  second moments E[xxᵀ]: the mean of x·xᵀ over all tokens, not centred
    <module>.samples  (k, n)  k inputs as they were, one a row

and strings in the header's metadata:

    tokens  how many tokens the moments are means of, or the samples were drawn from
    model   the model's name, as adapters name their base
    shared  optional: a JSON object, module -> the module whose tensor it shares; queries, keys and
            values read the same inputs, which are stored once

Only the header is read here. That numbers are finite, and second moments symmetric and positive
semidefinite, shows where they are used (`metric.py`), block by block.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from adapterops import casts
from adapterops.errors import (
    ChangedError,
    FormatError,
    IncompatibleError,
    NumericsError,
    UnsupportedError,
)
from adapterops.files.header import Header, encode_header, layout
from adapterops.files.output import stage
from adapterops.files.source import LocalFile, Source, read_header
from adapterops.formats.model import Ref, Site
from adapterops.metric import Inputs, Kind

_KINDS: tuple[Kind, ...] = ("gram", "samples")
_MODULES_HINT = "collect activations from the adapter's base model"
_LEAVE_OUT = "leave it out with --modules, or use --metric frobenius"
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Activations:
    """An activation file: inputs by module, tokens they were taken from, the model's name.

    `digest` tells two files apart in provenance: sha256 of the metadata, of names and shapes and of
    the first 4 KiB of every tensor. It is no hash of the whole, which may have many gigabytes.
    """

    path: str
    modules: Mapping[str, Inputs]
    tokens: int
    model: str
    digest: str

    def __reduce__(self) -> tuple[object, ...]:
        # Another process opens the file itself.
        return _reopened, (self.path, self.digest)


@lru_cache(maxsize=4)
def _reopened(path: str, digest: str) -> Activations:
    found = open_activations(path)
    if found.digest != digest:
        raise ChangedError("is not the activation file that the run began with", path=path)
    return found


def open_activations(path: str | os.PathLike[str]) -> Activations:
    """The activation file at `path`; only its header and a probe of each tensor are read.

    Raises FileError, and FormatError for what is no activation file.
    """
    source = LocalFile(path)
    try:
        header = read_header(source)
        tokens, model = _tokens(header.metadata), _model(header.metadata)
        modules = _modules(source, header)
        for module, other in _shared(header.metadata).items():
            if module in modules or other not in modules:
                raise FormatError(
                    f"shared says that {module!r} has the inputs of {other!r}, "
                    + ("and both have tensors" if other in modules else "which has no tensor")
                )
            modules[module] = modules[other]
        digest = _digest(source, header)
    except FormatError as error:
        error.path = source.path
        raise
    finally:
        source.close()
    return Activations(source.path, modules, tokens, model, digest)


def for_modules(
    activations: Activations, sites: Mapping[str, Site], base: str | None = None
) -> dict[str, Inputs]:
    """stem -> its inputs, for every one of these sites; `base` is what the adapter calls its model.

    Names agree, or all differ by one prefix (`model.`), on either side; where an adapter has flat
    stems (kohya), dots of module paths count as underscores. A convolution's inputs are its
    unfolded patches, channels x kernel numbers. Raises IncompatibleError for modules that the file
    lacks, whose inputs have another size or whose names fit in two ways, UnsupportedError for
    embeddings: their inputs are token numbers.
    """
    for stem, site in sites.items():
        if site.layer == "embedding":
            raise UnsupportedError(
                "is an embedding, whose inputs are token numbers: there are no activations of it",
                module=stem,
                hint=_LEAVE_OUT,
            )
    flat = any(site.dialect == "kohya" for site in sites.values())
    names = named(activations, sites, "adapter", flat=flat)
    lacking = [stem for stem in sites if stem not in names]
    if lacking:
        raise IncompatibleError(
            f"lacks {len(lacking)} of the adapter's {len(sites)} modules: {_some(lacking)}; "
            f"it holds {_some(sorted(activations.modules))} of model {activations.model!r}",
            path=activations.path,
            hint=f"{_MODULES_HINT}, or leave modules out with --modules",
        )
    for stem, site in sites.items():
        width = activations.modules[names[stem]].width
        if width != site.shape[1]:
            raise _other_size(activations, site, width, base)
    return {stem: activations.modules[name] for stem, name in names.items()}


def named(
    activations: Activations, sought: Iterable[str], owner: str, *, flat: bool = False
) -> dict[str, str]:
    """stem -> module of the file, of the stems `sought`, by the change of prefix that finds most.

    `flat` if stems have underscores where the file's names have dots. Raises IncompatibleError
    where names fit those of the stems' `owner`, adapter or base, in two ways.
    """
    separator = "_" if flat else "."

    def spelled(names: Iterable[str]) -> dict[str, str]:
        return {name.replace(".", "_") if flat else name: name for name in names}

    stems, modules = spelled(sought), spelled(activations.modules)
    hits: Counter[tuple[str, str]] = Counter()  # (what goes from the stem, what comes before it)
    for stem in stems:
        hits.update((p, "") for p in _prefixes(stem, separator) if stem[len(p) :] in modules)
    for name in modules:
        hits.update(("", p) for p in _prefixes(name, separator)[1:] if name[len(p) :] in stems)
    if not hits:
        return {}
    most = max(hits.values())
    best = [change for change, count in hits.items() if count == most]
    if len(best) > 1 and ("", "") not in best:
        ways = " or ".join(f"{new or old!r}" for old, new in sorted(best)[:_SHOWN])
        raise IncompatibleError(
            f"its modules' names fit the {owner}'s in several ways (a prefix of {ways})",
            path=activations.path,
            hint=f"name the modules as the {owner} does",
        )
    old, new = ("", "") if ("", "") in best else best[0]
    wanted = {stem: new + stem[len(old) :] for stem in stems if stem.startswith(old)}
    return {stems[stem]: modules[name] for stem, name in wanted.items() if name in modules}


def base_note(activations: Activations, base: str | None) -> str | None:
    """A warning where the adapter names another base model than the activations; sizes agree."""
    if not base or base == activations.model:
        return None
    return (
        f"the activations are of {activations.model!r}, the adapter is of {base!r}; "
        "their sizes agree"
    )


def write_activations(
    path: str | os.PathLike[str],
    modules: Mapping[str, tuple[Kind, np.ndarray[Any, Any]]],
    *,
    tokens: int,
    model: str,
    shared: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write an activation file: module -> (kind, values), any float type, stored as float32.

    `shared` names further modules by the one whose inputs they have. Raises ValueError where the
    values are none of the format, NumericsError for NaN and what float32 cannot hold, and
    OutputExistsError.
    """
    metadata = {"tokens": str(tokens), "model": model, "format": "pt"}
    if shared:
        metadata["shared"] = json.dumps(dict(sorted(shared.items())))
    _tokens(metadata)
    _model(metadata)
    for module, (kind, values) in modules.items():
        _check_shape(f"{module}.{kind}", kind, values.shape)
    wrong = [
        name for name, other in (shared or {}).items() if name in modules or other not in modules
    ]
    if wrong or not modules:
        raise ValueError(f"shared names {wrong}" if wrong else "there are no modules to write")
    named = {f"{module}.{kind}": values for module, (kind, values) in modules.items()}
    entries = layout({name: ("F32", values.shape) for name, values in named.items()})
    out = Path(path)
    with stage(out, directory=False, overwrite=overwrite) as staging:
        writer = staging.tensors(out.name, entries, len(encode_header(entries, metadata)))
        for name, values in named.items():
            writer.put(name, _float32(name, values))
        writer.finish(metadata)


def _float32(name: str, values: np.ndarray[Any, Any]) -> memoryview:
    if casts.count_nonfinite(values):
        raise NumericsError(f"{name} holds NaN or infinities")
    casts.check_range(values, "F32", name)
    return casts.stored_bytes(values.astype("<f4"))


def _tokens(metadata: Mapping[str, str]) -> int:
    text = metadata.get("tokens", "")
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and int(text) > 0):
        raise FormatError(
            f"its metadata has tokens {metadata.get('tokens')!r}, expected a count above 0",
            hint="is it an activation file (tokens and model in the header, .gram or .samples)?",
        )
    return int(text)


def _model(metadata: Mapping[str, str]) -> str:
    name = metadata.get("model", "").strip()
    if not name:
        raise FormatError("its metadata does not name the model that the activations are of")
    return name


def _modules(source: Source, header: Header) -> dict[str, Inputs]:
    found: dict[str, Inputs] = {}
    for name, entry in header.tensors.items():
        module, _, suffix = name.rpartition(".")
        kind = next((kind for kind in _KINDS if kind == suffix), None)
        if kind is None or not module:
            raise FormatError(f"{name!r} is neither <module>.gram nor <module>.samples")
        if module in found:
            raise FormatError(f"module {module!r} has both a gram and samples")
        if entry.dtype != "F32":
            raise FormatError(
                f"{name!r} is of type {casts.format_name(entry.dtype)}, expected float32"
            )
        _check_shape(name, kind, entry.shape)
        start = header.data_start + entry.start
        ref = Ref(source, name, entry.dtype, entry.shape, start, entry.nbytes)
        found[module] = Inputs(kind, ref)
    if not found:
        raise FormatError("holds no tensors")
    return found


def _check_shape(name: str, kind: Kind, shape: Sequence[int]) -> None:
    if len(shape) != 2 or 0 in shape or (kind == "gram" and shape[0] != shape[1]):
        wanted = "a square matrix" if kind == "gram" else "a matrix, a sample in each row"
        raise FormatError(f"{name!r} has the shape {list(shape)}, expected {wanted}")


def _shared(metadata: Mapping[str, str]) -> dict[str, str]:
    try:
        pairs = json.loads(metadata.get("shared", "{}"), object_pairs_hook=lambda found: found)
    except (ValueError, RecursionError):
        pairs = None
    if not isinstance(pairs, list) or not all(
        isinstance(pair, tuple) and isinstance(pair[1], str) for pair in pairs
    ):
        raise FormatError("shared in its metadata is no JSON object of names")
    result = dict(pairs)
    if len(result) != len(pairs):
        raise FormatError("shared in its metadata names a module twice")
    return result


def _digest(source: Source, header: Header) -> str:
    shapes = {name: entry.shape for name, entry in sorted(header.tensors.items())}
    digest = hashlib.sha256(json.dumps([dict(header.metadata), shapes], sort_keys=True).encode())
    for name in shapes:
        entry = header.tensors[name]
        start = header.data_start + entry.start
        ref = Ref(source, name, entry.dtype, entry.shape, start, entry.nbytes)
        digest.update(ref.sample())
    return digest.hexdigest()


def _prefixes(name: str, separator: str) -> list[str]:
    ends = [at + 1 for at, letter in enumerate(name) if letter == separator]
    return [name[:end] for end in (0, *ends)]


def _other_size(
    activations: Activations, site: Site, width: int, base: str | None
) -> IncompatibleError:
    what = f"its inputs have {site.shape[1]} numbers"
    if site.kernel:
        what += f" (channels x kernel {list(site.kernel)})"
    return IncompatibleError(
        f"{what} in the adapter of {base or 'an unnamed model'}, "
        f"{width} in the activations of {activations.model}",
        path=activations.path,
        module=site.stem,
        hint=_MODULES_HINT,
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
