"""How fast `index`, `cluster` and `assign` are, and what memory they take.

`python benchmarks/fleet.py [--quick] [--only NAME …]`; see benchmarks/README.md for the rows. The
fleets are planted ones (`fleet_data.py`), written before a row and removed after it.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import data
from check import drop, files
from harness import Child, Row, adapterops, alternate, median, python, ratio
from rows import MB, main, output

ADAPTER = 84 * MB
SHARE, CORE_SECONDS = 0.8, 0.15  # of raw reading speed; per 84 MB: the slower of the two
FLAT = 30 * MB
TEN_THOUSAND, HUNDRED_THOUSAND = 30.0, 900.0
ASSIGN = 0.05
BOUND = "0.2"
_LAST = "member3"  # of every cluster: left out of the index, and assigned


@contextmanager
def planted(name: str) -> Iterator[Path]:
    """A fleet, written by another process and removed in the end."""
    python("fleet_data.py", name)
    try:
        yield data.DATA / name
    finally:
        remove(name)


def remove(name: str) -> None:
    shutil.rmtree(data.DATA / name, ignore_errors=True)
    (data.DATA / f"{name}.truth.json").unlink(missing_ok=True)


def indexed(out: Path, *source: Path | str) -> Child:
    """One run of index into a place emptied before it."""
    shutil.rmtree(out, ignore_errors=True)
    return adapterops("index", *map(str, source), "-o", str(out), "--no-progress", "-q")


def clustered(fleet: Path, out: Path, bound: str = BOUND) -> Child:
    shutil.rmtree(out, ignore_errors=True)
    options = ("--max-error", bound, "--allow-sharing", "all", "--no-progress", "-q")
    return adapterops("cluster", str(fleet), "-o", str(out), *options)


def large(quick: bool) -> list[Row]:
    """Adapters of all linear modules of Llama-3-8B: index beside plain reading, start-up off."""
    rows = []
    with planted("large-quick" if quick else "large") as folder, output() as place:
        fleet = Path(place) / "fleet"
        every = sorted(folder.glob("*/*"))
        single = Path(place) / "single"
        single.mkdir()
        shutil.copytree(every[0], single / "one")
        size = sum(weights(each).stat().st_size for each in every)
        for cold in (True, False):

            def run(start: Callable[[], Child], cold: bool = cold) -> Child:
                if cold:
                    os.sync()
                    for each in folder.iterdir():
                        drop(each)
                return start()

            pairs = 2 if quick else 5
            ours, plain = alternate(
                partial(run, partial(indexed, fleet, folder)),
                partial(run, partial(python, "fleet.py", "--inner", "reading", str(folder))),
                pairs,
            )
            start, nothing = alternate(
                partial(indexed, fleet, single),
                partial(python, "fleet.py", "--inner", "reading", str(single)),
                pairs,
            )
            rest = len(every) - 1
            seconds = [a.wall - median(start, "wall") for a in ours]
            reading = [b.wall - median(nothing, "wall") for b in plain]
            cpu = (median(ours, "cpu") - median(start, "cpu")) / rest * ADAPTER / (size / 12)
            speeds = ratio(reading, seconds)
            rows.append(
                Row(
                    f"fleet index, {'from the disk' if cold else 'cached'}",
                    f"bytes per second after the first adapter: adapterops index of {len(every)} "
                    f"adapters ({size / 1e9:.2g} GB) / plain reading",
                    speeds,
                    f"{SHARE:.0%} of reading or {CORE_SECONDS} core-s per 84 MB"
                    if not quick
                    else "",
                    None if quick else speeds.median >= SHARE or cpu <= CORE_SECONDS,
                    {
                        "core-s per 84 MB": cpu,
                        "GB/s": rest / len(every) * size / 1e9 / statistics.median(seconds),
                        "plain GB/s": rest / len(every) * size / 1e9 / statistics.median(reading),
                        "s": median(ours, "wall"),
                        "one s": median(start, "wall"),
                        "peak MB": max(run.rss for run in ours) / MB,
                    },
                )
            )
    return rows


def weights(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def reading(folder: str) -> None:
    """What plain reading does, alone in its process, on as many threads as cores."""
    from concurrent.futures import ThreadPoolExecutor

    from check import read

    found = [file for each in [Path(folder), *Path(folder).iterdir()] for file in files(each)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        list(threads.map(read, found))


def many(quick: bool) -> list[Row]:
    """Ten times as many adapters: what memory index takes more; then cluster and assign."""
    small, big = ("certified-quick", "fleet-1000") if quick else ("fleet-1000", "fleet-10000")
    with planted(small) as few, planted(big) as lots, output() as place:
        fleet, plan = Path(place) / "fleet", Path(place) / "plan"
        less = indexed(fleet, few)
        less_kept = kept(fleet)
        source = "--manifest", str(left_out(lots, Path(place) / "tenants.csv"))
        more = indexed(fleet, *source)
        again = adapterops("index", *source, "-o", str(fleet), "--no-progress", "-q")
        index = kept(fleet)
        count = len(json.loads((data.DATA / f"{big}.truth.json").read_text()))
        rows = [
            Row(
                "fleet index, many",
                f"peak memory of adapterops index of {count:,} adapters of 52 kB / of a tenth",
                target="" if quick else f"{FLAT / MB:.0f} MB more at most, beyond signatures",
                met=None if quick else more.rss - less.rss <= FLAT + index - less_kept,
                figures={
                    "peak MB": more.rss / MB,
                    "peak MB, a tenth": less.rss / MB,
                    "s": more.wall,
                    "CPU s": more.cpu,
                    "files/s": count / more.wall,
                    "index MB": index / MB,
                    "index MB, a tenth": less_kept / MB,
                    "again, nothing new, s": again.wall,
                },
            ),
            planning(f"fleet cluster, {count:,}", fleet, plan, TEN_THOUSAND, quick),
            assigning(lots, plan, Path(place), quick),
        ]
    return rows


def kept(fleet: Path) -> int:
    """Bytes of an index: signatures and records."""
    return sum(file.stat().st_size for file in fleet.rglob("*") if file.is_file())


def left_out(folder: Path, manifest: Path) -> Path:
    """A manifest of all but the last plain member of every cluster."""
    with open(manifest, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["tenant", "path"])
        for each in sorted(folder.glob("*/*")):
            if each.name != _LAST:
                rows.writerow([each.relative_to(folder).as_posix(), str(each)])
    return manifest


def planning(name: str, fleet: Path, plan: Path, limit: float, quick: bool) -> Row:
    """One run of cluster at a bound of 0.2, sharing allowed."""
    run = clustered(fleet, plan)
    document = json.loads((plan / "plan.json").read_text())
    return Row(
        name,
        f"adapterops cluster --max-error {BOUND} --allow-sharing all of "
        f"{len(document['served']):,} adapters, the whole process",
        target="" if quick else f"below {limit:g} s",
        met=None if quick else run.wall < limit,
        figures={
            "s": run.wall,
            "CPU s": run.cpu,
            "peak MB": run.rss / MB,
            "adapters left": deployed(document),
            "largest error": max(one["error"] for one in document["served"].values()),
        },
    )


def deployed(plan: dict[str, Any]) -> int:
    """How many adapters a plan serves; the base model alone is none."""
    return sum(one["kind"] != "base" for one in plan["representatives"].values())


def assigning(folder: Path, plan: Path, place: Path, quick: bool) -> Row:
    """New members of clusters that the plan has, one by one in a process: seconds of each more."""
    found = sorted(folder.glob(f"*/{_LAST}"))[: 20 if quick else 200]
    new = [f"{each.relative_to(folder).as_posix()}={each}" for each in found]

    def run(paths: Sequence[str]) -> Child:
        out = place / f"assigned-{len(paths)}"
        shutil.rmtree(out, ignore_errors=True)
        return adapterops("assign", str(plan), *paths, "-o", str(out), "--no-progress", "-q")

    all_, one = alternate(partial(run, new), partial(run, new[:1]), 1 if quick else 5)
    served = json.loads((place / f"assigned-{len(new)}" / "plan.json").read_text())
    each = (median(all_, "wall") - median(one, "wall")) / (len(new) - 1)
    return Row(
        "fleet assign",
        f"adapterops assign of {len(new)} new tenants to a plan of {len(served['served']):,}, "
        "each beyond the first",
        target="" if quick else f"below {ASSIGN * 1e3:g} ms",
        met=None if quick else each < ASSIGN,
        figures={
            "ms each": 1e3 * each,
            "one s": median(one, "wall"),
            "all s": median(all_, "wall"),
            "peak MB": max(run.rss for run in all_) / MB,
        },
    )


def hundred_thousand(quick: bool) -> list[Row]:
    """Index and cluster 10⁵ adapters of 52 kB."""
    name = "fleet-1000" if quick else "fleet-100000"
    with planted(name) as folder, output() as place:
        fleet, plan = Path(place) / "fleet", Path(place) / "plan"
        run = indexed(fleet, folder)
        found = planning(
            f"fleet cluster, {name.partition('-')[2]}", fleet, plan, HUNDRED_THOUSAND, quick
        )
        found.figures.update(
            {"index s": run.wall, "index CPU s": run.cpu, "index MB": run.rss / MB}
        )
        return [found]


ROWS: dict[str, Callable[[bool], list[Row]]] = {
    "large": large,
    "many": many,
    "hundred_thousand": hundred_thousand,
}
INNER: dict[str, Callable[..., Any]] = {"reading": reading}

if __name__ == "__main__":
    main(__doc__, ROWS, INNER)  # type: ignore[arg-type]
