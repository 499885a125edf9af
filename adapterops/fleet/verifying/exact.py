"""How far an adapter that serves a tenant is from the tenant's own: exact, of the files on disk.

Errors are over all modules, biases included; one that an adapter lacks is zero there. They come
from factors in float64, as differences (`frames`), and say what is missing and what is foreign
(`shortfall`).
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import cache, partial
from itertools import chain

from adapterops.activations import Activations
from adapterops.errors import AdapterOpsError
from adapterops.files.remote import is_remote
from adapterops.files.scratch import scratch
from adapterops.fleet.verifying.held import CHUNK, Held, Result
from adapterops.fleet.verifying.opening import Opener
from adapterops.fleet.verifying.shortfall import Error
from adapterops.formats.locate import locate
from adapterops.stream import Compute, Job, Spread, alone, run

__all__ = ["Error", "Result", "compare", "compare_groups", "compare_many"]

Group = tuple[str | None, Sequence[str]]
Slice = tuple[str | None, tuple[str, ...]]
_SLICE = 16  # members of a job
_TOGETHER = 64  # members of a task in another process
_UNKNOWN = 64 << 20


def compare(
    representative: str | None,
    member: str,
    *,
    activations: Activations | None = None,
    allow_pickle: bool = False,
) -> Error:
    """The error of serving the tenant at `member` by the adapter at `representative`.

    None is no adapter at all, the base model. Raises what opening and reading either raises, and
    IncompatibleError where a module has another shape.
    """
    [result] = compare_many(
        representative, [member], Compute(), activations=activations, allow_pickle=allow_pickle
    )
    if isinstance(result, AdapterOpsError):
        raise result
    return result


def compare_many(
    representative: str | None,
    members: Sequence[str],
    on: Compute,
    *,
    activations: Activations | None = None,
    allow_pickle: bool = False,
) -> Iterator[Result]:
    """`compare` of many members, in order; one that fails yields its error instead.

    What is wrong with the representative is yielded for every member.
    """
    groups = [(representative, members)]
    for results in compare_groups(groups, on, activations=activations, allow_pickle=allow_pickle):
        yield from results


def compare_groups(
    groups: Iterable[Group],
    on: Compute,
    *,
    activations: Activations | None = None,
    allow_pickle: bool = False,
) -> Generator[list[Result], None, None]:
    """`compare_many` of many representatives in one run: a list for each, in order.

    Every member is opened and read once for each group that it is in, every representative once,
    or once for every `_TOGETHER` members where `on` spreads over processes.
    """
    if on.spread is not None:
        yield from _far(groups, on.spread, activations, allow_pickle, on.share)
        return
    opener, stack = Opener(allow_pickle=allow_pickle), ExitStack()
    sizes: deque[int] = deque()

    def jobs() -> Iterator[Job[list[Result]]]:
        inside = None
        for representative, members in groups:
            remote = representative is not None and is_remote(representative)
            if inside is None and (remote or any(map(is_remote, members))):
                inside = stack.enter_context(scratch())
            held = Held(representative, opener, activations, on.memory // 4, inside)
            # One that is fetched is fetched once; else a job is a few members.
            few = max(1, min(_SLICE, math.ceil(len(members) / on.threads)))
            size = max(1, len(members)) if remote else few
            slices = [members[at : at + size] for at in range(0, len(members), size)] or [()]
            sizes.append(len(slices))
            for part in slices:
                peak = _peak(representative, part, on.memory // 4)
                yield Job(representative or "the base model", held.against, (part,), peak)

    with stack, closing(run(jobs(), on)) as results:
        yield from _gathered(results, sizes)


def _gathered(
    results: Iterable[list[Result]], sizes: deque[int]
) -> Generator[list[Result], None, None]:
    """Results of whole groups from those of their slices; `sizes` are the groups' slices, left."""
    gathered: list[Result] = []
    done = 0
    for result in results:
        gathered += result
        done += 1
        if done == sizes[0]:
            yield gathered
            sizes.popleft()
            gathered, done = [], 0


def _far(
    groups: Iterable[Group],
    spread: Spread,
    activations: Activations | None,
    allow_pickle: bool,
    share: int | None,
) -> Generator[list[Result], None, None]:
    """`compare_groups` in other processes, `_TOGETHER` members of one or several groups at a time.

    The slices are the same however many there are.
    """
    sizes: deque[int] = deque()

    def batches() -> Iterator[list[Slice]]:
        batch: list[Slice] = []
        size = 0
        for representative, members in groups:
            cuts = range(0, max(1, len(members)), _TOGETHER)
            sizes.append(len(cuts))
            for at in cuts:
                batch.append((representative, tuple(members[at : at + _TOGETHER])))
                size += len(batch[-1][1])
                if size >= _TOGETHER:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    work = partial(compare_slices, activations, allow_pickle, share)
    with closing(spread(work, batches())) as results:
        yield from _gathered(chain.from_iterable(results), sizes)


def compare_slices(
    activations: Activations | None,
    allow_pickle: bool,
    share: int | None,
    slices: Sequence[Slice],
) -> list[list[Result]]:
    """The errors of the members of each slice; `share` is the memory of one task, if given."""
    budget = alone(share).memory // 4
    opener = _opener(allow_pickle)
    with ExitStack() as stack:
        inside = None
        if any(is_remote(path) for own, members in slices for path in (own or "", *members)):
            inside = stack.enter_context(scratch())
        return [
            Held(representative, opener, activations, budget, inside).against(members)
            for representative, members in slices
        ]


@cache
def _opener(allow_pickle: bool) -> Opener:
    return Opener(allow_pickle=allow_pickle)


def _peak(representative: str | None, members: Sequence[str], budget: int) -> int:
    """Bytes that a job needs at most, guessed from sizes on disk: factors of 16 bits."""
    own = _size(representative) if representative is not None else 0
    largest = max(map(_size, members), default=0)
    return min(4 * own, budget) + largest + 8 * 8 * min(CHUNK, max(own, largest) // 2)


def _size(path: str) -> int:
    try:
        return os.path.getsize(locate(path).weights)
    except (AdapterOpsError, OSError):
        return _UNKNOWN  # remote, or missing, which reading it will say
