"""Findings between adapters: duplicates, base names against shapes, ranks served together."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from adapterops.checking.findings import Finding, Findings, few, finding, plural
from adapterops.checking.numbers import Measured
from adapterops.formats import AdapterFile, read_adapter
from adapterops.inspection.stems import families

Shapes = tuple[tuple[str, tuple[tuple[int, int], ...]], ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """What is kept of one adapter to compare it with others; small, there may be thousands.

    `shapes` are those of its kinds of modules (layers numbered away), vocabulary left out: it may
    grow. `tensors` and `factors` are hashes over checksums of all tensors, and of the factors:
    equal where the bytes are equal, whatever the names.
    """

    path: str
    base: str | None
    shapes: Shapes
    rank: int
    size: int
    tensors: bytes
    factors: bytes
    allow_pickle: bool


def facts(found: Measured, size: int, *, allow_pickle: bool) -> Facts:
    """What to keep of an adapter."""
    file = found.file
    owned = set(found.owners()) | {
        ref.name for site in file.sites.values() for ref in site.parts.values()
    }
    return Facts(
        path=file.path,
        base=file.base,
        shapes=_shapes(file),
        rank=file.rank,
        size=size,
        tensors=_digest(found, file.tensors),
        factors=_digest(found, owned),
        allow_pickle=allow_pickle,
    )


def _shapes(file: AdapterFile) -> Shapes:
    stems = tuple(sorted(s for s, site in file.sites.items() if not _of_vocabulary(s, site.layer)))
    found: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for family in families(stems) if stems else ():
        for position in family.members:
            found[family.name].add(file.sites[stems[position]].shape)
    return tuple((name, tuple(sorted(shapes))) for name, shapes in sorted(found.items()))


def _of_vocabulary(stem: str, layer: str) -> bool:
    return layer == "embedding" or stem.rpartition(".")[2] in ("lm_head", "embed_out")


def _digest(found: Measured, names: Iterable[str]) -> bytes:
    """A hash of the checksums of some tensors, in no order: names do not count."""
    items = sorted(
        (ref.dtype, ref.nbytes, found.figures[name].checksum)
        for name in names
        if (ref := found.file.tensors.get(name)) is not None
    )
    return hashlib.sha256(repr(items).encode()).digest()


def across(found: Sequence[Facts], engines: Sequence[str]) -> Findings:
    """Everything that is found between adapters."""
    yield from duplicates(found)
    yield from bases(found)
    yield from ranks(found, engines)


def duplicates(found: Sequence[Facts]) -> Findings:
    """Adapters that are another one: as files, as tensors, as factors.

    What has equal checksums is read again and compared by sha256 of each tensor.
    """
    done: set[str] = set()
    read: dict[str, _Hashes] = {}

    def hashes(item: Facts) -> _Hashes:
        if item.path not in read:
            read[item.path] = _hashes(item)
        return read[item.path]

    for suspects in _alike(found, lambda item: item.tensors):
        for equal in _alike(suspects, lambda item: hashes(item).tensors):
            for same in _alike(equal, lambda item: hashes(item).whole):
                done.update(item.path for item in same[1:])
                text = "are the same: names, tensors, metadata and config"
                yield _duplicate("duplicate", same, text)
            distinct = [item for item in equal if item.path not in done]
            if len(distinct) > 1:
                done.update(item.path for item in distinct[1:])
                text = "hold the same tensors under other names, metadata or scales"
                yield _duplicate("duplicate-tensors", distinct, text)
    rest = [item for item in found if item.path not in done]
    for suspects in _alike(rest, lambda item: item.factors):
        for equal in _alike(suspects, lambda item: hashes(item).factors):
            text = "hold the same factors beside different extras (heads, biases, token rows)"
            yield _duplicate("duplicate-factors", equal, text)


def _alike(found: Iterable[Facts], key: Callable[[Facts], Hashable]) -> list[list[Facts]]:
    """Groups of two and more with one key."""
    groups: dict[Hashable, list[Facts]] = defaultdict(list)
    for item in found:
        groups[key(item)].append(item)
    return [group for group in groups.values() if len(group) > 1]


def _duplicate(code: str, group: Sequence[Facts], text: str) -> Finding:
    paths = [item.path for item in group]
    hint = "one of them is enough" if code == "duplicate" else None
    return finding(code, f"{few(paths, 5)} {text}", path=paths[0], hint=hint)


@dataclass(frozen=True, slots=True)
class _Hashes:
    whole: bytes
    tensors: bytes
    factors: bytes


def _hashes(item: Facts) -> _Hashes:
    """sha256 of an adapter's header and tensors, of its tensors, of its factors; names left out."""
    file = read_adapter(item.path, allow_pickle=item.allow_pickle)
    owned = {ref.name for site in file.sites.values() for ref in site.parts.values()}
    every: list[str] = []
    factors: list[str] = []
    named: list[str] = []
    try:
        for name, ref in file.tensors.items():
            digest = hashlib.sha256(ref.raw().data).hexdigest()
            described = f"{ref.dtype} {ref.stored_shape} {digest}"
            every.append(described)
            named.append(f"{name} {described}")
            if name in owned:
                factors.append(described)
    finally:
        file.source.close()
    about = repr((sorted(file.metadata.items()), sorted(file.config.items(), key=str)))

    def of(lines: Iterable[str]) -> bytes:
        return hashlib.sha256("\n".join(sorted(lines)).encode()).digest()

    return _Hashes(of([*named, about]), of(every), of(factors))


def bases(found: Sequence[Facts]) -> Findings:
    """One base name with different shapes; one set of shapes under several names."""
    named: dict[str, list[Facts]] = defaultdict(list)
    for item in found:
        if item.base and item.shapes:
            named[item.base].append(item)
    for group in named.values():
        clash = _clash(group)
        if clash:
            yield clash
    names: dict[Shapes, Counter[str]] = defaultdict(Counter)
    for base, group in named.items():
        for item in group:
            names[item.shapes][base] += 1
    for counts in names.values():
        if len(counts) > 1:
            shown = [f"{name!r} ({count})" for name, count in counts.most_common()]
            yield finding(
                "base-aliases",
                f"{plural(counts.total(), 'adapter')} of the same modules and shapes name "
                f"{len(counts)} bases: {few(shown, 5)}",
                hint="is it one model? engines and registries compare the name",
            )


def _clash(group: Sequence[Facts]) -> Finding | None:
    """The first kind of module that two adapters of one base name have in different shapes."""
    known: dict[str, tuple[Facts, tuple[tuple[int, int], ...]]] = {}
    for item in group:
        for name, shapes in item.shapes:
            other, before = known.setdefault(name, (item, shapes))
            if len(before) == len(shapes) == 1 and before != shapes:
                return finding(
                    "base-conflict",
                    f"{other.path} and {item.path} both name the base {item.base!r}, and {name} is "
                    f"{_size(before)} in one and {_size(shapes)} in the other",
                    path=item.path,
                    hint="one of them is of another model",
                )
    return None


def _size(shapes: tuple[tuple[int, int], ...]) -> str:
    return " x ".join(map(str, shapes[0]))


def ranks(found: Sequence[Facts], engines: Sequence[str]) -> Findings:
    """Ranks of a set that an engine keeps in slots of one size: all pay for the largest."""
    counts = Counter(item.rank for item in found if item.rank)
    if not engines:
        return
    from adapterops.serving import ENGINES  # slow to import, and rarely asked for

    for name in engines:
        engine = ENGINES[name]
        slots: Mapping[int, int | None] = {rank: engine.slot_rank(rank) for rank in counts}
        known = {slot for slot in slots.values() if slot}
        if engine.memory == "slots" and len(known) > 1:
            largest = max(counts)
            shown = ", ".join(f"{rank} ({counts[rank]})" for rank in sorted(counts))
            widest = [item.path for item in found if item.rank == largest]
            yield finding(
                "mixed-ranks",
                f"ranks (adapters) {shown}: {engine.title} {engine.version} keeps all in slots of "
                f"rank {max(known)}",
                path=widest[0],
                rule=f"{engine.name} {engine.version}: mixed-ranks",
                hint=f"lower the rank of {few(widest)}: merge --rank",
            )
