"""check: what is wrong with adapters, one by one, among each other, for engines, on a base."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from adapterops.batch.run import run_many
from adapterops.batch.search import Item, find
from adapterops.checking import sets
from adapterops.checking.findings import Finding
from adapterops.checking.reading import failure
from adapterops.checking.report import Checked, CheckReport
from adapterops.checking.single import Options, check_file, unread
from adapterops.errors import AdapterOpsError, UsageError
from adapterops.options import compute
from adapterops.stream import Compute

Progress = Callable[[str, int, int], None]
Alphas = float | Mapping[Any, float] | None
Work = Callable[[Item], tuple[Checked, sets.Facts | None]]

_FEW = 300  # above, `run_many` has processes of its own


def check(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    from_file: str | None = None,
    engine: str | Sequence[str] = (),
    base: str | os.PathLike[str] | None = None,
    recompute: bool = False,
    inputs: str | os.PathLike[str] | None = None,
    alpha: Alphas = None,
    strict: bool = False,
    allow_pickle: bool = False,
    memory: str | int | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """What is wrong with adapters; every tensor is read once.

    Args:
        paths: adapters, and folders that are searched for some.
        from_file: also the paths listed in this file, one a line; "-" is stdin.
        engine: names of serving engines, whose dated rules are applied too; "portable" is all.
        base: the base model, a checkpoint, pipeline or config.json, to compare names and shapes
            with. Headers only.
        recompute: make adapters that carry our provenance again, as `run` does, and compare.
        inputs: folder below which these inputs lie, found by their hashes; the current one.
        alpha: for adapters that do not say their scale; a mapping gives it to single paths.
        strict: count warnings as errors in the exit code.
        memory: bytes in flight. jobs: workers. progress: called with (what, done, count).

    Raises UsageError for options that make no sense, FileError where nothing is found or a list
    cannot be read, and what reading `base` raises. Whatever is wrong with an adapter is a finding.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    return check_items(
        find(given, from_file),
        engine=engine,
        base=base,
        recompute=recompute,
        inputs=inputs,
        alpha=alpha,
        strict=strict,
        allow_pickle=allow_pickle,
        memory=memory,
        jobs=jobs,
        progress=progress,
    )


def check_items(
    items: Sequence[Item],
    *,
    engine: str | Sequence[str] = (),
    base: str | os.PathLike[str] | None = None,
    recompute: bool = False,
    inputs: str | os.PathLike[str] | None = None,
    alpha: Alphas = None,
    strict: bool = False,
    allow_pickle: bool = False,
    memory: str | int | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """`check` of adapters that were searched for already."""
    options = _options(items, engine, base, alpha, allow_pickle, memory, jobs)
    if inputs is not None and not recompute:
        raise UsageError("--inputs says where --recompute finds its inputs, which is not asked for")
    found: dict[str, Checked] = {}
    known_facts: list[sets.Facts] = []

    def gather(item: Item, result: tuple[Checked, sets.Facts | None]) -> None:
        found[item.path], facts = result
        if facts is not None:
            known_facts.append(facts)

    def fail(item: Item, error: AdapterOpsError) -> None:
        found[item.path] = unread(item.path, error)

    single = {os.fspath(k): v for k, v in alpha.items()} if isinstance(alpha, Mapping) else {}
    several = len(items) > 1 and options.on.threads > 1
    inner = replace(options, on=replace(options.on, threads=1)) if several else options
    work = partial(_work, inner, single)
    with _Ahead(work, items, options.on.threads) as ahead:
        few = several and len(items) <= _FEW
        run_many(
            items,
            ahead if few else work,
            gather,
            fail,
            what="checking",
            jobs=jobs,
            processes=not few,
            progress=progress,
        )
    between = _between(known_facts, options.engines)
    if recompute:
        paths = [facts.path for facts in known_facts]
        between += _recomputed(paths, inputs, options.on, allow_pickle, progress)
    return CheckReport(tuple(found[item.path] for item in items), tuple(between), strict)


class _Ahead:
    """Checks of the next adapters in threads, while the first of them is waited for.

    So one is read while another is judged. Called with each item in order.
    """

    def __init__(self, work: Work, items: Sequence[Item], threads: int) -> None:
        self._work = work
        self._rest = iter(items)
        self._pool = ThreadPoolExecutor(threads)
        self._ahead = threads + 1
        self._running: dict[str, Future[tuple[Checked, sets.Facts | None]]] = {}

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __call__(self, item: Item) -> tuple[Checked, sets.Facts | None]:
        """The check of an item."""
        for following in islice(self._rest, self._ahead - len(self._running)):
            self._running[following.path] = self._pool.submit(self._work, following)
        return self._running.pop(item.path).result()


def _options(
    items: Sequence[Item],
    engine: str | Sequence[str],
    base: str | os.PathLike[str] | None,
    alpha: Alphas,
    allow_pickle: bool,
    memory: str | int | None,
    jobs: int | None,
) -> Options:
    """The options, checked once for all adapters; the base is read here, and its errors raised."""
    values = alpha.values() if isinstance(alpha, Mapping) else [alpha]
    for value in values:
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"alpha {value}: expected a number above 0")
    if isinstance(alpha, Mapping):
        unknown = sorted({os.fspath(k) for k in alpha} - {item.path for item in items})
        if unknown:
            raise UsageError(f"--alpha names {unknown[0]!r}, which is not among the inputs")
    engines = (engine,) if isinstance(engine, str) else tuple(engine)
    if engines:
        from adapterops.checking.engines import known

        engines = known(engines)
    if base is not None:
        from adapterops.checking.located import load

        load.cache_clear()
        load(os.fspath(base))
    return Options(
        on=compute("cpu", memory, jobs),
        engines=engines,
        base=None if base is None else os.fspath(base),
        alpha=None if isinstance(alpha, Mapping) else alpha,
        allow_pickle=allow_pickle,
    )


def _work(
    options: Options, alphas: Mapping[str, float], item: Item
) -> tuple[Checked, sets.Facts | None]:
    """The check of one of many adapters, here or in another process."""
    if item.path in alphas:
        options = replace(options, alpha=alphas[item.path], alpha_wins=True)
    return check_file(item.path, options)


def _recomputed(
    paths: Sequence[str],
    inputs: str | os.PathLike[str] | None,
    on: Compute,
    allow_pickle: bool,
    progress: Progress | None,
) -> Iterator[Finding]:
    """A finding for every adapter: what computing it again says."""
    from adapterops.checking.recompute import recomputed  # imports what writes
    from adapterops.originals import Originals
    from adapterops.verbs.run import verb

    folder = Originals(os.fspath(inputs) if inputs is not None else ".", on)
    for index, path in enumerate(paths):
        yield recomputed(path, verb, folder, on, allow_pickle=allow_pickle)
        if progress:
            progress("computing again", index + 1, len(paths))


def _between(known_facts: Sequence[sets.Facts], engines: Sequence[str]) -> list[Finding]:
    """Findings between adapters; what fails there is a finding too, the rest is not lost."""
    result: list[Finding] = []
    try:
        result.extend(sets.across(known_facts, engines))
    except AdapterOpsError as error:
        result.append(failure(error))
    return result
