"""A representative while its members stream past: its bases are made once and kept."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from adapterops.activations import Activations
from adapterops.errors import AdapterOpsError, IncompatibleError, MemoryLimitError
from adapterops.files.remote import located
from adapterops.fleet.verifying import frames
from adapterops.fleet.verifying.frames import Frame
from adapterops.fleet.verifying.opening import Blueprint, Opened, Opener, Piece
from adapterops.fleet.verifying.responses import response_error
from adapterops.fleet.verifying.shortfall import Error, Row, error_of, itself, rows_of

CHUNK = 2 << 20  # numbers of one representative's factors worked on at once
_LAYOUTS = 16  # of members that are remembered, the last ones

Result = Error | AdapterOpsError
Shape = tuple[int, int]
# Places in a stretch of modules, their stems, and whether the member has them.
_Match = tuple[list[int], list[str], bool]


class Held:
    """A representative while its members stream past; its bases are kept up to `budget` bytes."""

    def __init__(
        self,
        path: str | None,
        opener: Opener,
        activations: Activations | None,
        budget: int,
        inside: Path | None = None,
    ) -> None:
        """`inside` is the folder for copies of remote adapters."""
        self._path, self._opener, self._activations = path, opener, activations
        self._budget, self._inside = budget, inside
        self._lock = threading.Lock()
        self._kept: dict[int, Frame] = {}
        self._chunks: list[list[str]] = []
        # By the blueprint's id, which is the same object's as long as it is kept here.
        self._matches: dict[int, tuple[Blueprint, list[list[_Match]]]] = {}

    def against(self, members: Sequence[str]) -> list[Result]:
        """The errors of some members; what is wrong with the representative is every member's."""
        with ExitStack() as stack:
            try:
                own = self._open(self._path, stack) if self._path is not None else None
                results = [self._attempt(own, member) for member in members]
                if own:
                    own.check_unchanged()
            except MemoryLimitError:
                raise
            except AdapterOpsError as error:
                return [error for _ in members]
            return results

    def _open(self, path: str, stack: ExitStack) -> Opened:
        pickles = self._opener.allow_pickle
        local = located(path, inside=self._inside, allow_pickle=pickles)
        opened = self._opener.open(stack.enter_context(local), path)
        stack.callback(opened.close)
        return opened

    def _attempt(self, own: Opened | None, member: str) -> Result:
        try:
            with ExitStack() as stack:
                item = self._open(member, stack)
                rows = self._shared(own, item) if own else {}
                alone = [piece for stem, piece in item.pieces.items() if stem not in rows]
                for chunk in _chunks(alone):
                    frame = frames.no_frame(len(chunk), item.pieces[chunk[0]].shape)
                    rows |= rows_of(chunk, frames.figures(frame, *item.stacks(chunk)))
                measured = None
                if self._activations:
                    measured = response_error(own, item, self._activations)
                item.check_unchanged()
                found = error_of(rows, measured)
                return itself(found) if member == self._path else found
        except MemoryLimitError:
            raise
        except AdapterOpsError as error:
            return error

    def _shared(self, own: Opened, item: Opened) -> dict[str, Row]:
        """The figures of every module that the representative changes."""
        rows: dict[str, Row] = {}
        for index, parts in enumerate(self._matched(own, item)):
            frame = self._frame(own, index)
            for places, stems, there in parts:
                part = frame.take(places)
                if there:
                    rows |= rows_of(stems, frames.figures(part, *item.stacks(stems)))
                else:
                    rows |= rows_of(stems, frames.absent(part, own.pieces[stems[0]].shape))
        return rows

    def _matched(self, own: Opened, item: Opened) -> list[list[_Match]]:
        """What of each stretch of the representative's modules a member has, by rank."""
        with self._lock:
            if not self._chunks:
                self._chunks = _chunks(own.pieces.values())
            known = self._matches.get(id(item.blueprint))
            if known is None:
                found = [_match(own, item, chunk) for chunk in self._chunks]
                while len(self._matches) >= _LAYOUTS:
                    del self._matches[next(iter(self._matches))]
                known = self._matches[id(item.blueprint)] = (item.blueprint, found)
            return known[1]

    def _frame(self, own: Opened, index: int) -> Frame:
        numbers = sum(piece.rank * sum(piece.shape) for piece in own.pieces.values())
        if 8 * numbers > self._budget:
            return frames.frame(*own.stacks(self._chunks[index]))
        with self._lock:
            if index not in self._kept:
                self._kept[index] = frames.frame(*own.stacks(self._chunks[index]))
            return self._kept[index]


def _match(own: Opened, item: Opened, chunk: Sequence[str]) -> list[_Match]:
    ranks: defaultdict[int | None, list[int]] = defaultdict(list)
    for place, stem in enumerate(chunk):
        if stem in item.pieces:
            _check_alike(own, item, stem)
        ranks[item.pieces[stem].rank if stem in item.pieces else None].append(place)
    return [
        (places, [chunk[place] for place in places], rank is not None)
        for rank, places in ranks.items()
    ]


def _chunks(pieces: Iterable[Piece]) -> list[list[str]]:
    """Stems of pieces of one shape and rank, at most `CHUNK` numbers at a time."""
    alike: defaultdict[tuple[Shape, int], list[str]] = defaultdict(list)
    for piece in pieces:
        alike[piece.shape, piece.rank].append(piece.stem)
    chunks = []
    for (shape, rank), stems in alike.items():
        step = max(1, CHUNK // max(1, rank * sum(shape)))
        chunks += [stems[at : at + step] for at in range(0, len(stems), step)]
    return chunks


def _check_alike(own: Opened, item: Opened, stem: str) -> None:
    first, second = own.pieces[stem], item.pieces[stem]
    if first.shape != second.shape or first.layer != second.layer:
        raise IncompatibleError(
            f"it is {_describe(second)} here and {_describe(first)} in {own.path}",
            path=item.path,
            module=stem,
            hint="are both adapters of the same base model?",
        )


def _describe(piece: Piece) -> str:
    kind, kernel = piece.layer
    return f"{kind} {list(piece.shape)}" + (f" with kernel {list(kernel)}" if kernel else "")
