"""Which heads of module paths may be one: what a model's parts and their containers are called.

A head is what stands before the first number of a path (`model.layers`). Classes wrap one another
(`model.`, `language_model.`, `bert.`), so that a part of a model has several heads; but the layers
of an image encoder or of a draft model are other layers, even of the same names and shapes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping

Head = tuple[str, ...]

_WRAPPERS = ("base_model", "model")
_CONTAINER = re.compile(
    r"base_model|model|transformer|backbone|language_model|text_model|llm|module|gpt_neox"
    r"|unet|diffusion_model|(\w+_)?\w*bert\w*|electra"
)
# Parts that are no others, by the words that their names have.
_PART = re.compile(
    r"(?:^|_)(vision|visual|image|img|audio|speech|encoder|decoder|mtp|nextn|draft|eagle|medusa"
    r"|talker)(?:_|\d*$)"
)
_VISION = ("vision", "visual", "image", "img")
_TEXT_ENCODER = re.compile(r"text_encoder(_\d)?")  # a folder of a pipeline


def related(head: Head, other: Head, heads: Collection[Head]) -> bool:
    """Whether an adapter's `head` may be called `other` in a checkpoint with these `heads`.

    They differ in containers, or one is the other with words in front; where these are the
    adapter's, they name no part that `other` does not. A decoder is no part beside no encoder.
    """
    alone = not any("encoder" in word for each in heads for word in each)
    if _inner(head, alone) == _inner(other, alone):
        return True
    if not _ends_alike(head, other):
        return False
    dropped = head[: max(len(head) - len(other), 0)]
    return _parts(dropped, alone) <= _parts(other, alone)


def likeness(head: Head, other: Head) -> tuple[bool, bool, int]:
    """The greater, the likelier two related heads are one."""
    plain = _inner(head, True) == _inner(other, True)
    return plain, _ends_alike(head, other), len(set(head) & set(other))


def clashing(found: Mapping[Head, Head], below: Mapping[Head, Collection[str]]) -> set[Head]:
    """The heads that are called otherwise, but like another one, of which `below` has other layers.

    `below` are the tails of module paths by the adapter's head. A module below both is not seen to
    here: two changes of one weight are an error of their own.
    """
    shared: dict[Head, list[Head]] = defaultdict(list)
    for head, other in found.items():
        if all(tail[:1].isdigit() for tail in below[head]):
            shared[other].append(head)
    return {
        head
        for other, mine in shared.items()
        for head in mine
        if head != other and any(_apart(below[head], below[h]) for h in mine if h != head)
    }


def is_plain(head: Head, other: Head) -> bool:
    """Whether two heads differ in no more than the wrapper of a task's model or of PEFT."""
    own, there = (tuple(w for w in each if w not in _WRAPPERS) for each in (head, other))
    return own == there


def _apart(one: Collection[str], other: Collection[str]) -> bool:
    return not set(one) & set(other)


def _inner(head: Head, alone: bool) -> Head:
    """A head without containers."""
    return tuple(
        word
        for word in head
        if not _CONTAINER.fullmatch(word) and not (alone and word == "decoder")
    )


def _parts(words: Head, alone: bool) -> set[str]:
    """The parts of a model that words name."""
    found = set()
    for word in words:
        part = _PART.search(word)
        if part and not _TEXT_ENCODER.fullmatch(word) and not (alone and word == "decoder"):
            found.add("vision" if part[1] in _VISION else part[1])
    return found


def _ends_alike(head: Head, other: Head) -> bool:
    """Whether one is the other with words in front."""
    short, long = sorted((head, other), key=len)
    return long[len(long) - len(short) :] == short
