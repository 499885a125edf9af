"""From groups of tensors to sites: kind, shape and rank of every module, experts one by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

from adapterops import casts
from adapterops.errors import AdapterOpsError, FormatError, IncompatibleError, UnsupportedError
from adapterops.formats import diffusers, peft
from adapterops.formats.group import Group
from adapterops.formats.kinds import BESIDE, KINDS, kind_of
from adapterops.formats.model import Layer, Ref, Site

_EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embedding"}
_MOST_NESTED = 5  # parameters of one module that PEFT wraps in one another
DORA = "dora"


def make_sites(
    groups: Mapping[str, Group],
    dialects: Mapping[str, str],
    config: Mapping[str, Any],
    path: str,
) -> tuple[dict[str, Site], list[AdapterOpsError]]:
    """Sites by module, and what is wrong with the modules that make none."""
    sites: dict[str, Site] = {}
    problems: list[AdapterOpsError] = []
    levels = _levels(groups, config)
    for stem, module in sorted(groups.items()):
        name = _module(stem, dialects[stem])
        try:
            made = _sites(name, module, dialects[stem], config, levels)
        except AdapterOpsError as error:
            error.path, error.module = path, name
            problems.append(error)
            continue
        for site in made:
            if site.stem in sites:
                text = "is named twice, in two spellings"
                problems.append(FormatError(text, path=path, module=name))
            sites[site.stem] = site
    return sites, problems


def check_magnitudes(sites: Mapping[str, Site], path: str) -> None:
    """Raise UnsupportedError where a module is DoRA by its tensors."""
    magnitudes = [s.parts["magnitude"].name for s in sites.values() if s.kind == DORA]
    if magnitudes:
        raise UnsupportedError(
            f"this is DoRA (tensor {magnitudes[0]!r}), which needs the base weight",
            path=path,
            hint=peft.WITH_BASE,
        )


def _levels(
    groups: Mapping[str, Group], config: Mapping[str, Any]
) -> dict[str, dict[str, int]] | None:
    """owner -> its nested modules -> rows of A, None where no parameter can be meant."""
    nested = any(stem.endswith(".base_layer") for stem in groups)
    if config and not nested and not peft.listed(config, "target_parameters"):
        return None
    levels: dict[str, dict[str, int]] = defaultdict(dict)
    for stem, module in groups.items():
        if "A" in module.parts and module.parts["A"].shape:
            path = peft.module_path(stem)
            levels[owner_of(path)][path] = module.parts["A"].shape[0]
    return levels


def owner_of(module: str) -> str:
    """The module whose parameters are adapted: PEFT nests one wrapper per parameter in another."""
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return module


def _module(stem: str, dialect: str) -> str:
    if dialect == "peft":
        return peft.module_path(stem)
    return diffusers.canonical(stem) if dialect == "diffusers" else stem


def _sites(
    name: str,
    module: Group,
    dialect: str,
    config: Mapping[str, Any],
    levels: Mapping[str, Mapping[str, int]] | None,
) -> list[Site]:
    """One site, or one per expert. Raises for tensors that make no module of a known kind."""
    roles = frozenset(module.parts) - BESIDE
    kind = kind_of(roles)
    if kind is None:
        raise _no_kind(roles, module)
    for role in sorted(roles):  # of several the same is named in every run
        _check_dtype(module.parts[role])
    if dialect == "mlx":
        return _mlx(name, module)
    if kind == "lora" and dialect == "peft" and config.get("peft_type") == "ADALORA":
        raise FormatError("is AdaLoRA by its config, and has no lora_E")
    if kind == "lora":
        possible = dialect == "peft" and levels is not None
        expert = _experts(name, module, config, levels or {}) if possible else None
        if expert is not None:
            return expert
        kind = _merged_linear(module, dialect, config)
    if kind == "lokr" and dialect == "peft" and len(_shape(module, "kw2")) == 3:
        raise UnsupportedError(
            "PEFT multiplies the full lokr_w2 of a Conv1d by lokr_w1 along the wrong axes; what "
            "this adapter does has no low-rank form"
        )
    enabled = tuple(map(bool, peft.listed(config, "enable_lora")))
    return [_site(name, module, dialect, kind, enabled if kind == "merged_linear" else ())]


def _no_kind(roles: frozenset[str], module: Group) -> AdapterOpsError:
    shown = next(iter(module.parts.values())).name
    if roles < {"A", "B"} or roles == {"A", "E"} or roles == {"B", "E"}:
        missing = "A" if "A" not in roles else "B"
        return FormatError(f"has {shown!r} but no {missing} factor")
    names = ", ".join(repr(module.parts[role].name) for role in sorted(roles))
    return FormatError(f"its tensors make no adapter of a known kind: {names or repr(shown)}")


def _check_dtype(ref: Ref) -> None:
    if ref.dtype not in casts.READABLE:
        raise UnsupportedError(
            f"{ref.name!r} is of type {ref.dtype}, which is no number format of factors"
        )


def _shape(module: Group, role: str) -> tuple[int, ...]:
    return module.parts[role].shape if role in module.parts else ()


def _merged_linear(module: Group, dialect: str, config: Mapping[str, Any]) -> str:
    """Whether a pair is one of loralib's fused projections: those have a 3-D B beside a 2-D A."""
    if len(_shape(module, "A")) != 2 or len(_shape(module, "B")) != 3:
        return "lora"
    if not peft.listed(config, "enable_lora"):
        raise UnsupportedError(
            f"B of shape {list(_shape(module, 'B'))} beside A of {list(_shape(module, 'A'))} is an "
            "old MergedLinear LoRA, and no config says which of its slots were trained "
            "(enable_lora)"
        )
    return "merged_linear"


def _site(
    name: str, module: Group, dialect: str, kind: str, enabled: tuple[bool, ...] = ()
) -> Site:
    parts = module.parts
    shapes = {role: ref.shape for role, ref in parts.items()}
    size = KINDS[kind].measure(shapes, enabled)
    bias = parts.get("bias")
    if bias is not None and module.spelling != "peft":
        raise UnsupportedError(
            f"the tensor {bias.name!r} beside factors named {parts['A'].name!r} is of no known kind"
        )
    if bias is not None and bias.shape != (size.out,):
        raise FormatError(f"the bias has shape {list(bias.shape)}, B has {size.out} rows")
    layer: Layer = "conv" if size.kernel else "linear"
    if module.spelling == "embedding":
        layer = "embedding"
    return Site(
        stem=name,
        dialect=dialect,
        kind=DORA if "magnitude" in parts else kind,
        layer=layer,
        shape=(size.out, size.columns),
        kernel=size.kernel,
        rank=size.rank,
        dim=size.dim,
        parts=parts,
        enabled=enabled,
    )


def _mlx(name: str, module: Group) -> list[Site]:
    """MLX keeps A as (in, r) and B as (r, out), of switch layers (E, r, in) and (E, out, r)."""
    A, B = module.parts["A"], module.parts["B"]
    if len(A.shape) == 3 and len(B.shape) == 3 and A.shape[0] == B.shape[0]:
        count = A.shape[0]
        pairs = [(_nth(A, e, count), _nth(B, e, count)) for e in range(count)]
        return _per_expert(name, module, "mlx", pairs)
    if len(A.shape) != 2 or len(B.shape) != 2:
        raise FormatError(f"lora_a {list(A.shape)} and lora_b {list(B.shape)} do not multiply")
    turned = {
        **module.parts,
        "A": replace(A, shape=A.shape[::-1], transposed=True),
        "B": replace(B, shape=B.shape[::-1], transposed=True),
    }
    site = _site(name, Group(turned, "mlx"), "mlx", "lora")
    is_embedding = name.rpartition(".")[2] in _EMBEDDINGS
    return [replace(site, layer="embedding") if is_embedding else site]


def _nth(ref: Ref, index: int, count: int) -> Ref:
    """The index-th of `count` matrices: of a stack of them, or one above the other."""
    shape = ref.shape[1:] if len(ref.shape) == 3 else (ref.shape[0] // count, ref.shape[1])
    nbytes = ref.nbytes // count
    return replace(ref, shape=shape, offset=ref.offset + index * nbytes, nbytes=nbytes)


def _per_expert(
    name: str,
    module: Group,
    dialect: str,
    pairs: list[tuple[Ref, Ref]],
    owned: tuple[str, ...] = (),
    meant: tuple[str, ...] = (),
) -> list[Site]:
    sites = []
    for index, (A, B) in enumerate(pairs):
        parts = {**module.parts, "A": A, "B": B}
        site = _site(f"{name}[{index}]", Group(parts, module.spelling), dialect, "lora")
        expert = (index, len(pairs))
        owner = owner_of(name)
        sites.append(replace(site, expert=expert, owner=owner, owned=owned, meant=meant))
    return sites


def _experts(
    name: str, module: Group, config: Mapping[str, Any], levels: Mapping[str, Mapping[str, int]]
) -> list[Site] | None:
    """The experts of a PEFT `target_parameters` module, None if it is an ordinary one.

    A_e is A[e·r:(e+1)·r], B_e is B[:, e::E] (peft 0.21.2, `lora/layer.py`, ParamWrapper). Neither
    E nor which of several nested pairs adapts which parameter is in the file: both follow from the
    ranks that the config gives, where only one assignment of parameters to pairs has one E.
    """
    owner = owner_of(name)
    rows = levels.get(owner, {})
    owned = _owned(owner, len(rows), config)
    if not owned:
        if owner != name or (owner.endswith("experts") and not config):
            raise UnsupportedError(
                "this is MoE target_parameters, and no config says which and of what rank"
            )
        return None
    A, B = module.parts["A"], module.parts["B"]
    found = _assignments(owner, rows, owned, peft.Scales(config, ""))
    ranks = {assigned[name][1] for assigned in found}
    if len(ranks) != 1:
        raise IncompatibleError(
            f"MoE target_parameters are ambiguous: the config adapts {', '.join(owned)}, the file "
            f"has {len(rows)} factor pairs here, of {' and '.join(map(str, rows.values()))} rows, "
            "and their ranks do not say how many experts there are",
            hint="correct r, rank_pattern or target_parameters in adapter_config.json",
        )
    rank = ranks.pop()
    meant = tuple(sorted({assigned[name][0] for assigned in found}))
    count = A.shape[0] // rank
    if count == 1:
        site = _site(name, module, "peft", "lora")
        return [replace(site, owner=owner, owned=owned, meant=meant)]
    if len(A.shape) != 2 or len(B.shape) != 2 or B.shape[1] != A.shape[0]:
        raise FormatError(f"A {list(A.shape)} and B {list(B.shape)} are no experts' factors")
    width = (B.shape[0], rank)
    pairs = [(_nth(A, e, count), replace(B, shape=width, every=(e, count))) for e in range(count)]
    return _per_expert(name, module, "peft", pairs, owned, meant)


def _assignments(
    owner: str, rows: Mapping[str, int], owned: Sequence[str], scales: peft.Scales
) -> list[dict[str, tuple[str, int]]]:
    """Every way to give each pair a parameter so that all have the same number of experts."""
    found = []
    for order in permutations(owned) if len(owned) == len(rows) <= _MOST_NESTED else ():
        counts = set()
        assigned = {}
        for (stem, height), parameter in zip(rows.items(), order, strict=True):
            rank = int(scales.rank(f"{owner}.{parameter}", height) or 0)
            counts.add(height // rank if rank and height % rank == 0 else 0)
            assigned[stem] = (parameter, rank)
        if len(counts) == 1 and counts != {0}:
            found.append(assigned)
    return found


def _owned(owner: str, depth: int, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a module's parameters that the config adapts, `depth` of them.

    An entry without a parent (`gate_up_proj`) may be any module's: of one that is a target itself
    it is none.
    """
    named, bare = set(), set()
    for entry in peft.listed(config, "target_parameters"):
        parent, _, parameter = str(entry).rpartition(".")
        if not parent:
            bare.add(parameter)
        elif owner == parent or owner.endswith(f".{parent}"):
            named.add(parameter)
    if named and len(named) == depth:
        return tuple(sorted(named))
    if not named and depth == 1 and peft.is_target(owner, config):
        return ()
    return tuple(sorted(named | bare))
