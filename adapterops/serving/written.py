"""An output as its readers will see it, before it is there: from names, shapes and config alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapterops.files.source import MemoryFile
from adapterops.formats import peft
from adapterops.formats.group import dialect_of, group
from adapterops.formats.model import AdapterFile, Ref
from adapterops.formats.scale import ScaleFinder
from adapterops.formats.sites import make_sites

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape)


def as_written(
    tensors: Tensors,
    config: Mapping[str, Any],
    *,
    weights_file: str = peft.WEIGHTS,
    config_file: str | None = peft.CONFIG,
    side_files: Sequence[str] = (),
) -> AdapterFile:
    """What `read_adapter` would say of a file of these tensors with this config beside it.

    Nothing in it can be read. `config_file` is None where the config is in the weights' header.
    Raises the first problem that keeps it from being an adapter.
    """
    nowhere = MemoryFile(weights_file, b"")
    refs = {name: Ref(nowhere, name, *form, 0, 0) for name, form in tensors.items()}
    heads = [str(name) for name in peft.listed(config, "modules_to_save")]
    found = group(refs, weights_file, heads)
    dialects = {stem: dialect_of(stem, g.spelling, config) for stem, g in found.groups.items()}
    sites, problems = make_sites(found.groups, dialects, config, weights_file)
    for problem in (*found.problems, *problems):
        raise problem
    finder = ScaleFinder(weights_file, {}, None, False)
    finder.add_config(config, config_file or weights_file)
    for stem, site in sites.items():
        if site.dialect == "peft":  # others keep alphas in tensors
            sites[stem] = finder.scaled(site)
    spoken = {site.dialect for site in sites.values()}
    return AdapterFile(
        path=weights_file,
        source=nowhere,
        dialect=spoken.pop() if len(spoken) == 1 else "mixed",
        sites=sites,
        extras=found.rest,
        tensors=refs,
        deltas=found.deltas,
        config=config,
        weights_file=weights_file,
        config_file=config_file,
        side_files=tuple(side_files),
    )
