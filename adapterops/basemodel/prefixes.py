"""One renaming of prefixes that puts every module of an adapter into a checkpoint, or none.

Before the first number of a module path stands its head (`model.layers` of
`model.layers.0.self_attn.q_proj`). Checkpoints and the models made from them call heads otherwise
(`transformer.h` and `h`, `model.language_model.layers` and `language_model.model.layers`), but all
modules below a head alike: each head of the adapter gets one of the checkpoint's that holds
everything below it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from adapterops.basemodel.heads import Head, clashing, is_plain, likeness, related
from adapterops.basemodel.names import split
from adapterops.errors import IncompatibleError
from adapterops.formats import diffusers


@dataclass(frozen=True, slots=True)
class Renaming:
    """What the heads of an adapter's modules are called in the checkpoint.

    `lacking` are the modules, by stem, that are in no head of it. Where some are, the head that has
    the most of what is below theirs is listed all the same.
    """

    heads: Mapping[Head, Head]
    lacking: tuple[str, ...] = ()

    def __call__(self, path: str) -> str:
        """A module path of the adapter, as the checkpoint has it.

        One below a head that no module has (a classifier beside adapted layers) takes part in what
        changed in front of the others' heads.
        """
        head, tail = split(path)
        if head in self.heads:
            return ".".join((*self.heads[head], tail))
        for own, other in sorted(map(changed, self.heads.items()), key=_length, reverse=True):
            if head[: len(own)] == own:
                return ".".join((*other, *head[len(own) :], tail))
        return path

    @property
    def telling(self) -> dict[str, str]:
        """The heads whose other name is more than one with or without `model.`."""
        return {
            ".".join(own): ".".join(other)
            for own, other in self.heads.items()
            if not is_plain(own, other)
        }


def renaming(
    paths: Mapping[str, str],
    heads: Collection[Head],
    holds: Callable[[str, str, bool], bool],
    *,
    pipeline: bool,
    where: str,
) -> Renaming:
    """How the modules `paths`, by stem, are found below a checkpoint's `heads`.

    `holds(stem, path, by_shape)` says whether the checkpoint has a module at a path, and if asked
    to, of the right shape. A head that holds everything keeps its name; else the other must hold
    everything, by shape if one does, and be a name of the same part of the model; two heads do not
    become one. In a `pipeline` models keep their folders. Raises IncompatibleError where two heads
    are equally good.
    """
    below: dict[Head, list[str]] = defaultdict(list)
    for stem, path in paths.items():
        below[split(path)[0]].append(stem)
    found: dict[Head, Head] = {}
    partly: dict[Head, Head] = {}
    lacking: list[str] = []
    for head, stems in below.items():

        def held(other: Head, by_shape: bool, stems: Sequence[str] = stems) -> Iterator[bool]:
            tails = (".".join((*other, split(paths[stem])[1])) for stem in stems)
            return (holds(s, t, by_shape) for s, t in zip(stems, tails, strict=True))

        if all(held(head, False)):
            found[head] = head
            continue
        others = [h for h in heads if related(head, h, heads)]
        others = [h for h in others if not (pipeline and _leaves(head, h))]
        full = [h for h in others if all(held(h, True))] or [
            h for h in others if all(held(h, False))
        ]
        if full:
            found[head] = _best(head, full, where)
            continue
        alike = [head] if any(held(head, False)) else [head, *others]
        best = max(alike, key=lambda other: sum(held(other, False)))
        absent = [stem for stem, there in zip(stems, held(best, False), strict=True) if not there]
        lacking += absent
        if len(absent) < len(stems):
            partly[head] = best
    tails = {head: [split(paths[stem])[1] for stem in stems] for head, stems in below.items()}
    for head in clashing(found, tails):
        del found[head]
        lacking += below[head]
    taken = set(found.values())
    found |= {head: best for head, best in partly.items() if best not in taken}
    return Renaming(found, tuple(lacking))


def _best(head: Head, full: Sequence[Head], where: str) -> Head:
    """The most alike of the heads that hold everything."""
    ranked = sorted(full, key=lambda other: likeness(head, other), reverse=True)
    if len(ranked) > 1 and likeness(head, ranked[0]) == likeness(head, ranked[1]):
        one, other = sorted(ranked[:2])
        raise IncompatibleError(
            f"modules below {'.'.join(head) or 'the root'!r} may be those below "
            f"{'.'.join(one)!r} or {'.'.join(other)!r} of {where}: both hold them all",
            hint="give the part of the model that was trained, or rename the adapter's modules",
        )
    return ranked[0]


def _leaves(head: Head, other: Head) -> bool:
    """Whether a module would leave the model of a pipeline that it names."""
    part = diffusers.component(".".join(head))
    return bool(part) and other[:1] != (part,)


def changed(pair: tuple[Head, Head]) -> tuple[Head, Head]:
    """What differs in front of two heads; equal ones are equal in their first words."""
    own, other = pair
    if own == other:
        return own[:1], own[:1]
    same = 0
    while same < min(len(own), len(other)) and own[-1 - same] == other[-1 - same]:
        same += 1
    return own[: len(own) - same], other[: len(other) - same]


def _length(pair: tuple[Head, Head]) -> int:
    return len(pair[0])
