"""What a sum is called and stored as: names in the output's dialect, its type, what to warn of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from adapterops.casts import DTYPE_NAMES
from adapterops.errors import IncompatibleError, UsageError
from adapterops.formats.kinds import BESIDE, kind_of
from adapterops.formats.model import AdapterFile, Site
from adapterops.formats.names import DIRECTORIES, translate
from adapterops.plan import DenseSum, Module, Part

# SDXL's kohya files name SGM blocks; its cross attention reads 2048 numbers, SD 1's and 2's fewer.
_SDXL_CONTEXT = 2048
_CONTEXT = re.compile(r"attn2[._]to_k$")
_CONVOLUTION = re.compile(
    r"(^|[._])(conv(olution|\d[a-z]?|_?(in|out|shortcut|stem|head|proj|point|inverted))?|op"
    r"|in_layers_2|out_layers_3|(attentions[._]\d+|blocks_\d+_1)[._]proj_(in|out))$"
)
# Pieces of names that only linear layers have in models with convolutions.
_LINEAR = re.compile(
    r"attn|attention|mlp|(^|[._])(ff|fc|lin|to_[qkv]|[qkvo]$)|dense|proj|query|key|value|emb|head|classifier"
)
# Kinds whose tensors may hold a convolution's kernel flattened into the columns.
_FLAT_KINDS = {"loha", "lokr", "adalora"}
_SHOWN = 3


def check_deltas(deltas: Sequence[DenseSum], to: str, first: AdapterFile) -> None:
    """Raise IncompatibleError where full deltas would have to change their names."""
    if deltas and to != first.dialect:
        raise IncompatibleError(
            f"--to {to}: the full delta {deltas[0].name!r} has no name in that dialect",
            path=first.path,
            hint=f"leave --to away to write {first.dialect}",
        )


def output_names(
    chosen: Mapping[str, Sequence[Part]], first: AdapterFile, to: str
) -> dict[str, str]:
    """stem -> the module's name in the output's dialect."""
    stems = sorted(chosen)
    sites = [(stem, part.site) for stem in stems for part in chosen[stem]]
    if to in DIRECTORIES and first.dialect in DIRECTORIES:
        for stem, site in sites:
            plain = not site.expert and site.layer != "conv" and "bias" not in site.parts
            if site.dialect != to and not plain:
                raise IncompatibleError(
                    f"--to {to}: experts, convolutions and biases of {site.dialect} adapters have "
                    "no counterpart there",
                    module=stem,
                )
        return {stem: stem for stem in stems}
    if to == first.dialect:
        return {stem: stem for stem in stems}
    if {site.dialect for _, site in sites} != {first.dialect}:
        raise IncompatibleError(f"--to {to}: the inputs are in several dialects", path=first.path)
    names = translate(stems, first.dialect, to)
    odd = [stem for stem, s in sites if s.layer == "embedding" or "bias" in s.parts or s.expert]
    if odd:
        raise IncompatibleError(
            f"--to {to}: an embedding, a bias or an expert has no place in that dialect",
            module=odd[0],
        )
    wide = [stem for stem, s in sites if s.shape[1] == _SDXL_CONTEXT and _CONTEXT.search(stem)]
    if names is None or ("kohya" in (to, first.dialect) and wide):
        raise IncompatibleError(
            f"--to {to}: not every module of this {first.dialect} adapter has a name there "
            f"(the first is {stems[0]!r}); fused and split projections and SGM names differ in "
            "more than spelling",
            path=first.path,
            hint=f"leave --to away to write {first.dialect}",
        )
    return names


def base_warnings(inputs: Sequence[AdapterFile]) -> list[str]:
    """A warning where the inputs name different base models."""
    bases = {file.base: file for file in reversed(inputs) if file.base}
    if len(bases) < 2:
        return []
    shown = ", ".join(f"{base!r} ({bases[base].path})" for base in reversed(bases))
    return [f"the inputs name different base models: {shown}; their shapes agree"]


def orientation_warnings(inputs: Sequence[AdapterFile]) -> list[str]:
    """A warning where the inputs disagree on `fan_in_fan_out`."""
    flags = {bool(file.config.get("fan_in_fan_out")): file.path for file in reversed(inputs)}
    if len(flags) < 2 or inputs[0].dialect != "peft":
        return []
    return [
        f"fan_in_fan_out is set in {flags[True]} and not in {flags[False]}; the first input's "
        "value is kept"
    ]


def hides_kernel(site: Site) -> bool:
    """Whether a module may be a convolution although no tensor of it shows a kernel."""
    kind = kind_of(frozenset(site.parts) - BESIDE) or (site.inner or site).kind
    return not site.kernel and kind in _FLAT_KINDS and site.layer == "linear"


def kernel_warnings(modules: Sequence[Module]) -> list[str]:
    """Modules that may be convolutions whose kernel no input shows: loaders want its shape.

    Names tell, and where there are convolutions at all, all names but those of linear layers.
    """
    flat = [m for m in modules if not m.kernel and all(hides_kernel(site) for _, site in m.origins)]
    named = {module.stem for module in flat if _CONVOLUTION.search(module.stem)}
    beside = bool(named) or any(module.kernel for module in modules)
    hidden = [m.stem for m in flat if m.stem in named or (beside and not _LINEAR.search(m.stem))]
    if not hidden:
        return []
    more = f" and {len(hidden) - _SHOWN} more" if len(hidden) > _SHOWN else ""
    return [
        f"{', '.join(hidden[:_SHOWN])}{more}: if this is a convolution, its factors do not show "
        "the kernel; they are written as matrices, which not every loader takes (convert --base "
        "MODEL takes kernels from the model)"
    ]


def output_dtype(name: str, first: AdapterFile) -> str:
    """The storage type that `--dtype` means; raises UsageError for an unknown one."""
    if name == "keep":
        return first.dtype
    if name not in DTYPE_NAMES:
        raise UsageError(f"dtype {name!r}: expected keep, {', '.join(DTYPE_NAMES)}")
    return DTYPE_NAMES[name]
