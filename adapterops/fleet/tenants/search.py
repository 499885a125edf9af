"""Where adapters lie below a folder or a URI, and which tenant a pattern reads from a path.

A folder and a bucket are searched by the same rules: a bucket's keys, listed once, are made into
folders first. Unlike a batch, which works on each adapter once, a fleet keeps every path to one:
two tenants may be links to the same files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from adapterops.batch.search import OTHERS, WEIGHTS, is_adapter
from adapterops.errors import UsageError
from adapterops.files.names import WEIGHTS as ADAPTER_WEIGHTS
from adapterops.files.remote import Entry, unsafe_part

Note = Callable[[str], None]
Inside = list[tuple[str, bool]]  # names in a folder, sorted, and whether each is a folder itself
_CHECKPOINT = "checkpoint-"
_TENANT = "{tenant}"
_SHOWN = 3
# What an index, a plan and a deployment have in them: their files are no tenants.
_OURS = (
    {"fleet.sqlite"},
    {"plan.json", "sketches.safetensors"},
    {"routes.json", "adapterops.json"},
)


class Tree(Protocol):
    """Folders below a root; names are relative to it, parts joined by `/`, "" is the root."""

    def inside(self, name: str) -> Inside | None: ...
    def enter(self, name: str) -> bool: ...


class LocalTree:
    """A folder of this machine; links are followed."""

    def __init__(self, root: str, note: Note) -> None:
        self._root = root
        self._note = note
        self._entered: set[tuple[int, int]] = set()

    def inside(self, name: str) -> Inside | None:
        """What is in a folder; None where there is no such folder or it cannot be read."""
        try:
            with os.scandir(os.path.join(self._root, name)) as entries:
                return sorted((entry.name, _is_folder(entry)) for entry in entries)
        except OSError:
            return None

    def enter(self, name: str) -> bool:
        """Whether a folder is searched for the first time; links may lead back to one."""
        path = os.path.join(self._root, name)
        try:
            status = os.stat(path)
        except OSError:  # gone meanwhile
            return False
        identity = status.st_dev, status.st_ino
        if identity in self._entered:
            self._note(f"{path}: a link to a folder that is searched already, entered once")
            return False
        self._entered.add(identity)
        return True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


class RemoteTree:
    """The folders that the keys below a URI spell; keys that spell none are noted."""

    def __init__(self, root: str, entries: Iterable[Entry], note: Note) -> None:
        self._folders: dict[str, dict[str, bool]] = {}
        hostile: list[str] = []
        for entry in entries:
            key = entry.path[len(root) + 1 :]
            if not entry.path.startswith(root + "/") or unsafe_part(key) is not None:
                hostile.append(entry.path)
                continue
            self._add(key)
        if hostile:
            shown = ", ".join(map(repr, hostile[:_SHOWN]))
            more = ", …" if len(hostile) > _SHOWN else ""
            note(f"{root}: {len(hostile)} keys passed over that are no paths: {shown}{more}")

    def _add(self, key: str) -> None:
        folder, _, name = key.rpartition("/")
        self._folders.setdefault(folder, {})[name] = False
        while folder:
            above, _, name = folder.rpartition("/")
            siblings = self._folders.setdefault(above, {})
            if siblings.get(name):
                return
            siblings[name] = True
            folder = above

    def inside(self, name: str) -> Inside | None:
        """What is in a folder; None where no key spells it."""
        found = self._folders.get(name)
        return None if found is None else sorted(found.items())

    def enter(self, name: str) -> bool:
        """True: no bucket has links."""
        return True


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def adapters_in(tree: Tree, note: Note = lambda text: None) -> Iterator[str]:
    """The adapters of a tree by the rule for batches, without checkpoints; "" is the root itself.

    Indexes, plans and deployments are not searched: what serves tenants is no tenant. A folder that
    cannot be read counts as one: opening it says why.
    """
    waiting = [("", True)]
    checkpoints, others = 0, 0
    nested: list[str] = []
    while waiting:
        name, is_folder = waiting.pop()
        inside = tree.inside(name) if is_folder else []
        if not is_folder or inside is None or is_adapter(part for part, _ in inside):
            nested += _nested(tree, name, inside or [])
            yield name
            continue
        if not tree.enter(name):
            continue
        if any(marks <= {part for part, _ in inside} for marks in _OURS):
            note(f"{name or 'the folder'}: an index, plan or deployment of adapterops, passed over")
            continue
        for part, is_inner in reversed(inside):
            if part.startswith(".") or not (is_inner or part.lower().endswith(WEIGHTS)):
                continue
            if part.startswith(_CHECKPOINT):
                checkpoints += 1
            elif not is_inner and OTHERS.fullmatch(part):
                others += 1
            else:
                waiting.append((_below(name, part), is_inner))
    if checkpoints:
        note(f"{checkpoints} checkpoint-* passed over; list them in a manifest to count them")
    if others:
        note(f"{others} files of base models or trainers passed over")
    if nested:
        note(
            f"{len(nested)} adapters inside the folders of others passed over, {min(nested)!r} "
            "first; list them in a manifest to count them"
        )


def _nested(tree: Tree, name: str, inside: Inside) -> Iterator[str]:
    """Adapters in an adapter's own folder, where PEFT saves all but the first of a model."""
    for part, is_folder in inside:
        if is_folder and not part.startswith((".", _CHECKPOINT)):
            found = tree.inside(_below(name, part))
            if found and is_adapter(each for each, _ in found):
                yield _below(name, part)


class Pattern:
    """`{tenant}/*/adapter_model.safetensors`: a mark stands for one part of a path, or within one.

    Raises UsageError for a pattern that names no tenant, or leads out of the root.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._parts = text.split("/")
        problem = _problem(text, self._parts)
        if problem:
            raise UsageError(
                f"the tenant pattern {text!r} {problem}",
                hint="write it relative to PATH, as in '{tenant}/*/adapter_model.safetensors'",
            )
        self._rules = [_rule(part) for part in self._parts]

    def adapters_in(self, tree: Tree, note: Note = lambda text: None) -> Iterator[tuple[str, str]]:
        """Names in a tree that the whole pattern matches and that are adapters, with the tenant.

        `*` and `{tenant}` stand for no hidden name and no `checkpoint-*`, where these are not
        spelled. Weights that a folder would be opened by stand for their folder.
        """
        waiting = [("", 0, "")]
        empty = 0
        while waiting:
            folder, depth, tenant = waiting.pop()
            last = depth == len(self._parts) - 1
            for part, is_folder in reversed(tree.inside(folder) or []):
                found = self._match(depth, part)
                if found is None:
                    continue
                name, owner = _below(folder, part), found.get("tenant", tenant)
                if not last:
                    if is_folder:
                        waiting.append((name, depth + 1, owner))
                elif self._is_adapter(tree, name, is_folder):
                    yield (folder if self._stands_for_folder(part) else name), owner
                else:
                    empty += 1
        if empty:
            note(f"{empty} matches of {self.text!r} passed over, which are no adapters")

    def _match(self, depth: int, part: str) -> dict[str, str] | None:
        spelled = self._parts[depth]
        for unspoken in (".", _CHECKPOINT):
            if part.startswith(unspoken) and not spelled.startswith(unspoken):
                return None
        found = self._rules[depth].fullmatch(part)
        return None if found is None else found.groupdict()

    def _stands_for_folder(self, part: str) -> bool:
        return part == ADAPTER_WEIGHTS[0] and _TENANT not in self._parts[-1]

    def _is_adapter(self, tree: Tree, name: str, is_folder: bool) -> bool:
        if is_folder:
            inside = tree.inside(name)
            return inside is None or is_adapter(part for part, _ in inside)
        part = name.rpartition("/")[2]
        is_spelled = part == self._parts[-1]
        return part.lower().endswith(WEIGHTS) and (is_spelled or not OTHERS.fullmatch(part))


def _problem(text: str, parts: list[str]) -> str | None:
    """What is wrong with a pattern, None if nothing."""
    if text.count(_TENANT) != 1:
        return f"holds {_TENANT} {text.count(_TENANT)} times, once is needed"
    if "**" in text:
        return "holds '**'; a '*' is one part of a path"
    if set("{}") & set(text.replace(_TENANT, "")):
        return f"holds a brace that is not {_TENANT}"
    if {"", ".", ".."} & set(parts):
        return "is absolute, or holds an empty part, '.' or '..'"
    return None


def _rule(part: str) -> re.Pattern[str]:
    if part == "*":
        return re.compile("[^/]+", re.DOTALL)
    marks = {"*": "[^/]*", _TENANT: "(?P<tenant>[^/]+)"}
    pieces = re.split(r"(\*|\{tenant\})", part)
    return re.compile("".join(marks.get(piece, re.escape(piece)) for piece in pieces), re.DOTALL)
