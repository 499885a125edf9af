"""What provenance says of adapters that were put together of others: a tree of weights and methods.

A sum is a list of [weight, adapter]. An adapter on disk is its number among the inputs; what a
method made is the method with its options and the sum `of` what it was given; what rules of weights
made is these `module_weights`, what they were given and which of it this is. `recipe.composing`
makes the adapters of a tree again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from adapterops.formats.model import AdapterFile, leaves

Term = tuple[float, AdapterFile]


def places(files: Sequence[AdapterFile], weights: Sequence[float]) -> dict[int, int]:
    """The numbers of the inputs of a sum by the ids of their files, and of those before rules."""
    found: dict[int, int] = {}
    for number, leaf in enumerate(leaves(files, weights)[0]):
        file: AdapterFile | None = leaf
        while file:
            found.setdefault(id(file), number)
            file = file.ruled.of[file.ruled.at][1] if file.ruled else None
    return found


def tree(terms: Iterable[Term], numbers: Mapping[int, int]) -> list[list[Any]]:
    """A sum as provenance has it; None for an adapter that is not among the inputs."""
    return [[weight, _node(file, numbers)] for weight, file in terms]


def _node(file: AdapterFile, numbers: Mapping[int, int]) -> Any:
    if file.ruled:
        rules, of = list(file.ruled.rules), tree(file.ruled.of, numbers)
        return {"module_weights": rules, "at": file.ruled.at, "of": of}
    if file.made_of:
        return {**file.made_by, "of": tree(file.made_of, numbers)}
    return numbers.get(id(file))


def recorded(
    files: Sequence[AdapterFile], weights: Sequence[float], how: Mapping[str, Any]
) -> dict[str, Any]:
    """What a verb records of how it was asked to put adapters together, `how`.

    Where that is one method, or rules, of adapters that were put together themselves, the tree
    stands in its place.
    """
    ruled, given = bool(how.get("module_weights")), list(files)
    if how.get("method"):
        given = [file for made in files for _, file in made.made_of]
    if ruled:
        given = [file.ruled.of[file.ruled.at][1] if file.ruled else file for file in given]
    if "expression" in how or not any(file.made_of or file.ruled for file in given):
        return dict(how)
    own = {} if ruled or how.get("method") else how
    terms = zip(weights, files, strict=True)
    return {**own, "sum": tree(terms, places(files, weights))}


def single_terms(files: Sequence[AdapterFile], weights: Sequence[float]) -> set[int]:
    """The ids of adapters on disk whose weight is the coefficient of one term, and no more.

    Terms are those of the sum, or, where it is one method with the weight 1, those of that.
    """
    terms = list(files)
    if len(terms) == 1 and terms[0].made_of and weights[0] == 1.0:
        terms = [file for _, file in terms[0].made_of]
    uses = Counter(id(leaf) for file in terms for leaf in _uses(file))
    return {id(file) for file in terms if not file.made_of and uses[id(file)] == 1}


def _uses(file: AdapterFile) -> Iterator[AdapterFile]:
    """The adapters on disk of a file, each as often as it occurs."""
    if not file.made_of:
        yield file
    for _, inner in file.made_of:
        yield from _uses(inner)


def method_of(files: Sequence[AdapterFile]) -> str:
    """The method that made all of a sum, linear where there are several terms."""
    return str(files[0].made_by.get("method", "linear")) if len(files) == 1 else "linear"
