"""The tree of a provenance as the Adapter that it was: the sums, methods and rules of `composed`.

Anybody could have written it, so every part is checked before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from adapterops.adapter import Adapter
from adapterops.combining import made, rule_for
from adapterops.composed import Term
from adapterops.errors import UsageError
from adapterops.formats import AdapterFile
from adapterops.moduleweights.apply import apply
from adapterops.options import is_whole
from adapterops.recipe.document import Document, Key
from adapterops.recipe.fitting import check_patterns, described, fitted, is_held

_RULE: Mapping[str, Any] = {
    "method": str,
    "parameters": Mapping[str, Any],
    "space": str,
    "seed": int,
    "calibrate": str,
    "match_norm": str,
}
_MADE = {**_RULE, "modules": str, "activations": Sequence[str], "of": list[Any]}
_RULED: Mapping[str, Any] = {"module_weights": Sequence[str], "at": int, "of": list[Any]}


class Composer:
    """Makes the sums of one provenance, of the `files` that its inputs are.

    `activations` gives the path of a file by its digest. Equal parts become one object.
    """

    def __init__(
        self,
        document: Document,
        files: Sequence[AdapterFile],
        activations: Callable[[str], str],
    ) -> None:
        self._document = document
        self._files = files
        self._activations = activations
        self._known: dict[Hashable, Sequence[AdapterFile]] = {}

    def adapter(self, tree: Any, key: Key) -> Adapter:
        """The Adapter of a tree that stands at `key`. Nothing but headers is read.

        Raises UsageError, with the key, for what is no such tree, and what methods and rules raise.
        """
        return Adapter(tuple(self._terms(tree, key)))

    def _terms(self, value: Any, key: Key) -> list[Term]:
        pairs = fitted(self._document, key, value, list[Any], "")
        if not pairs:
            raise self._wrong(key, value, "weights and adapters")
        found = []
        for index, pair in enumerate(pairs):
            at = (*key, index)
            if not (isinstance(pair, list) and len(pair) == 2 and is_held(pair[0])):
                raise self._wrong(at, pair, "a finite weight and an adapter")
            found.append((float(pair[0]), self._file(pair[1], (*at, 1))))
        return found

    def _file(self, node: Any, key: Key) -> AdapterFile:
        if is_whole(node) and 0 <= node < len(self._files):
            return self._files[int(node)]
        if node is None:
            raise self._document.error(
                key, "is of an adapter that is not recorded", "make it again in Python"
            )
        if not isinstance(node, Mapping):
            last = len(self._files) - 1
            raise self._wrong(key, node, f"an input's number, from 0 to {last}, or a method")
        if "module_weights" in node:
            return self._ruled(self._fields(node, key, _RULED), key)
        return self._made(self._fields(node, key, _MADE), key)

    def _fields(
        self, node: Mapping[str, Any], key: Key, kinds: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The parts of a node, each of its kind, those that are missing left out."""
        for name in node:
            if name not in kinds:
                raise self._document.error((*key, name), "is not known to this version")
        needed = [name for name in ("method", "at", "of") if name in kinds]
        names = dict.fromkeys((*needed, *node))
        return {n: fitted(self._document, (*key, n), node.get(n), kinds[n], "") for n in names}

    def _made(self, node: Mapping[str, Any], key: Key) -> AdapterFile:
        """What a method makes."""
        weights, files = zip(*self._terms(node["of"], (*key, "of")), strict=True)
        check_patterns(self._document, (*key, "modules"), [node.get("modules", "")])
        how = {name: value for name, value in node.items() if name != "of"}
        paths = [self._activations(digest) for digest in node.get("activations", ())]
        try:
            rule = rule_for(**{name: node[name] for name in _RULE if name in node})
            return self._once(
                (repr(how), weights, *map(id, files)),
                lambda: [made(files, weights, rule, node.get("modules"), paths or None)],
            )[0]
        except UsageError as error:
            error.path = error.path or self._document.name
            raise

    def _ruled(self, node: Mapping[str, Any], key: Key) -> AdapterFile:
        """One of the adapters that rules of weights make."""
        weights, files = zip(*self._terms(node["of"], (*key, "of")), strict=True)
        rules, at = node["module_weights"], int(node["at"])
        check_patterns(self._document, (*key, "module_weights"), rules)
        if not 0 <= at < len(files):
            raise self._wrong((*key, "at"), at, f"a number from 0 to {len(files) - 1}")
        same = (*rules, weights, *map(id, files))
        return self._once(same, lambda: apply(files, weights, rules)[0])[at]

    def _once(
        self, same: Hashable, make: Callable[[], Sequence[AdapterFile]]
    ) -> Sequence[AdapterFile]:
        if same not in self._known:
            self._known[same] = make()
        return self._known[same]

    def _wrong(self, key: Key, value: Any, expected: str) -> UsageError:
        return self._document.error(key, f"is {described(value)}; expected {expected}")
