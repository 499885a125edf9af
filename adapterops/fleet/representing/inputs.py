"""Members of a group as inputs of a sum: opened and made nameless.

A representative goes to where others' adapters are served, so nothing in it may tell whose it is.
What is written of an input is what `nameless` leaves: hashes, and of its config and metadata what a
loader needs. Tokenizer files stay behind; they name models, folders and people.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from adapterops.casts import FORMATS, format_name
from adapterops.files.remote import located
from adapterops.fleet.types import Record
from adapterops.formats import AdapterFile, open_adapter_file

_HASH = 16  # hexadecimal digits of a content hash that stand for a name
# What the writers of configs and headers ask an input for; all else of these files is left behind.
_CONFIG = frozenset(
    {
        "task_type",
        "bias",
        "fan_in_fan_out",
        "modules_to_save",
        "trainable_token_indices",
        "target_modules",
        "target_parameters",
        "layers_to_transform",
        "exclude_modules",
        "num_layers",
    }
)
_METADATA = frozenset(
    {
        "ss_base_model_version",
        "ss_v2",
        "ss_sd_model_hash",
        "ss_network_module",
        "modelspec.architecture",
        "modelspec.implementation",
        "modelspec.prediction_type",
        "unet",
        "text_encoder",
    }
)
_TOKEN = "<embed>"  # cloneofsimo's mark of a trained token, which is among the extras


@contextmanager
def opened(
    records: Sequence[Record], *, allow_pickle: bool = False
) -> Generator[list[AdapterFile], None, None]:
    """The records' adapters, nameless, in their order; remote ones are here for the time being.

    Raises what opening an adapter raises.
    """
    with ExitStack() as stack:
        files = []
        for record in records:
            path = stack.enter_context(located(record.tenant.location, allow_pickle=allow_pickle))
            files.append(open_adapter_file(path, allow_pickle=allow_pickle))
            for source in files[-1].sources:
                stack.callback(source.close)
        yield nameless(files, [record.content for record in records])


def by_content(records: Sequence[Record]) -> list[Record]:
    """Records by the hash of what they hold, so that names do not decide the order of a sum."""
    return sorted(records, key=lambda record: (record.content, record.tenant.name))


def nameless(files: Sequence[AdapterFile], hashes: Sequence[str]) -> list[AdapterFile]:
    """The same adapters, called by their hashes, with nothing of their owners'."""
    base = _base([file.base for file in files if file.base])
    mappings = [file.config.get("auto_mapping") for file in files]
    shared = {"auto_mapping": mappings[0]} if all(m == mappings[0] for m in mappings) else {}
    return [
        replace(
            file,
            path=digest[:_HASH] or f"input-{index}",
            base=base,
            sites={stem: replace(s, scale_from="its own") for stem, s in file.sites.items()},
            config={**_kept(file.config, _CONFIG), **shared} if file.config else {},
            metadata=_kept(file.metadata, _METADATA)
            | {key: value for key, value in file.metadata.items() if value == _TOKEN},
            notes=(),
            side_files=(),
        )
        for index, (file, digest) in enumerate(zip(files, hashes, strict=True))
    ]


def _kept(given: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key in names}


def _base(names: Sequence[str]) -> str | None:
    """The commonest of a base model's names, of a path on somebody's machine its last part."""
    public = [
        name.replace("\\", "/").rstrip("/").rpartition("/")[2]
        if name.startswith(("/", "~", ".")) or "\\" in name
        else name
        for name in names
    ]
    counts = Counter(name for name in public if name)
    return min(counts, key=lambda name: (-counts[name], name)) if counts else None


def commonest_dtype(files: Sequence[AdapterFile]) -> str:
    """The number format that most of them are in, the widest of several; float32 for others."""
    counts = Counter(file.dtype for file in files)
    name = max(counts, key=lambda n: (counts[n], FORMATS[n].bits if n in FORMATS else 0, n))
    return format_name(name) if name in ("F16", "BF16", "F32") else "float32"


def columns(files: Sequence[AdapterFile]) -> int:
    """Σr over the files of their widest module."""
    totals: Counter[str] = Counter()
    for file in files:
        for stem, site in file.sites.items():
            totals[stem] += site.rank
    return max(totals.values(), default=0)
