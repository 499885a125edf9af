"""diffusers files of one component, one that names it beside one that leaves it out.

A pipeline's `save_lora_weights` writes `transformer.blocks.0.attn1.to_q`, a model's own
`save_lora_adapter` writes `blocks.0.attn1.to_q`. Which component the latter is, names alone do not
say (a U-Net's do, see `diffusers.canonical`); beside files that name the component, they do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from adapterops.errors import UnsupportedError
from adapterops.formats import diffusers
from adapterops.formats.model import AdapterFile

_Paths = Mapping[str, str]  # module paths below a component, and a file that has each


def lined_up(files: Sequence[AdapterFile]) -> list[AdapterFile]:
    """The same adapters, the modules of bare ones under the component that the others name.

    Bare files that share modules are of one model, and that is the component which has modules of
    theirs by name. They are still written bare. Files that stay as they are are the same objects.

    Raises UnsupportedError where several components may be meant, and for a bare file that carries
    more than factors, for what that belongs to is not known.
    """
    result = list(files)
    bare = [index for index, file in enumerate(files) if _is_bare(file)]
    named = _named(files) if bare else {}
    for stems, members in _groups(files, bare) if named else ():
        parts = _parts(named, stems)
        if parts in ([], [""]):
            continue
        if len(parts) > 1:
            raise _ambiguous(files, members, parts, named)
        for index in members:
            result[index] = _below(files[index], parts[0], files)
    return result


def _is_bare(file: AdapterFile) -> bool:
    """Whether all modules are named as diffusers does, and none with a component."""
    return bool(file.sites) and not any(
        site.dialect != "diffusers" or diffusers.component(stem)
        for stem, site in file.sites.items()
    )


def _named(files: Sequence[AdapterFile]) -> dict[str, dict[str, str]]:
    """component -> its modules; "" for those that stand without one beside others with one."""
    named: dict[str, dict[str, str]] = defaultdict(dict)
    for file in files:
        if _is_bare(file):
            continue
        for stem, site in file.sites.items():
            if site.dialect == "diffusers":
                part = diffusers.component(stem)
                named[part].setdefault(stem.removeprefix(f"{part}."), file.path)
    return named


def _groups(files: Sequence[AdapterFile], bare: Sequence[int]) -> list[tuple[set[str], list[int]]]:
    """Bare files, those together that share modules, directly or through others."""
    groups: list[tuple[set[str], list[int]]] = []
    for index in bare:
        stems, members = set(files[index].sites), [index]
        apart = []
        for group in groups:
            if stems.isdisjoint(group[0]):
                apart.append(group)
            else:
                stems |= group[0]
                members += group[1]
        groups = [*apart, (stems, sorted(members))]
    return groups


def _parts(named: Mapping[str, _Paths], stems: set[str]) -> list[str]:
    """The components that bare modules may be of: those that share some, and their twins.

    `transformer` and `transformer_2` are two models of one class: what one has, the other has too.
    """
    sharing = {part for part, paths in named.items() if not stems.isdisjoint(paths)}
    families = {_family(part) for part in sharing}
    return sorted(part for part in named if _family(part) in families)


def _family(part: str) -> str:
    return part.rstrip("_23")


def _ambiguous(
    files: Sequence[AdapterFile],
    members: Sequence[int],
    parts: Sequence[str],
    named: Mapping[str, _Paths],
) -> UnsupportedError:
    file = files[members[0]]
    places = []
    for part in parts[:2]:
        path, where = min(named[part].items())
        places.append(f"{f'{part}.{path}'.strip('.')!r} ({where})")
    return UnsupportedError(
        f"{min(file.sites)!r} names no component, and the other inputs have modules that it may go "
        f"with in several: {' and '.join(places)}",
        path=file.path,
        hint="save it by its pipeline's save_lora_weights, which names the component",
    )


def _below(file: AdapterFile, part: str, files: Sequence[AdapterFile]) -> AdapterFile:
    """A bare file with its modules under a component; the equal one among `files`, if there is."""
    for name in (*file.deltas, *file.extras):
        raise UnsupportedError(
            f"names no component, and carries {name!r} beside its factors, which has no place in "
            f"{part!r}, where other inputs have its modules",
            path=file.path,
            hint="save it by its pipeline's save_lora_weights, which names the component",
        )
    spelling = file.style.partition("=")[2]
    result = replace(
        file,
        sites={
            f"{part}.{stem}": replace(site, stem=f"{part}.{stem}")
            for stem, site in file.sites.items()
        },
        style=f"{part}={'bare' if spelling == 'peft' else spelling}",
        left_out=frozenset(f"{part}.{stem}" for stem in file.left_out),
    )
    return next((one for one in files if not file.made_of and one == result), result)
