"""Kernels of convolutions that an adapter's tensors do not show, from the base's weights.

The halves of a LoHa or LoKr, and AdaLoRA's factors, may be matrices whatever the layer: a 1 x 1
convolution looks like a linear layer in them, another has its kernel among its columns. As LoRA it
has factors of four or more dimensions, or its loaders refuse it.
"""

from __future__ import annotations

from dataclasses import replace

from adapterops.basemodel import BaseModel, ldm, names
from adapterops.formats.model import AdapterFile, Site
from adapterops.rebased.weights import ways
from adapterops.target import hides_kernel


def with_kernels(file: AdapterFile, base: BaseModel) -> AdapterFile:
    """The adapter with the kernels that its base's weights have and its tensors hide.

    Modules whose weights the base lacks, or has in another shape, stay as they are.
    """
    hidden = {stem: site for stem, site in file.sites.items() if hides_kernel(site)}
    if not hidden:
        return file
    tensors = {name.removesuffix(".weight"): ref for name, ref in base.tensors.items()}

    def fits(site: Site, path: str) -> bool:
        return bool(ways(site, tensors[path]))

    found = names.find(hidden, names.index(tensors), fits)
    refs = {stem: tensors[path] for stem, path in found.items()}
    table = ldm.paths({name: ref.shape for name, ref in base.tensors.items()}) or {}
    for stem in hidden:
        parts = ldm.find(stem, table) or ()
        if len(parts) == 1 and parts[0].rows is None and parts[0].of is None:
            refs[stem] = base.tensors[parts[0].tensor]
    sites = {
        stem: replace(hidden[stem], layer="conv", kernel=ref.shape[2:])
        for stem, ref in refs.items()
        if len(ref.shape) > 2 and ways(hidden[stem], ref)
    }
    return replace(file, sites={**file.sites, **sites}) if sites else file
