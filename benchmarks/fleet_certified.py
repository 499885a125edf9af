"""Whether plans keep their promise on planted fleets, and what other tools make of such files.

`python benchmarks/fleet_certified.py [--quick] [--only NAME …]`; see benchmarks/README.md for the
rows. Every error is computed again here from the files, by another reader and by other arithmetic
(`tests/planted_files.py`). vlora-dev and lorashare are pure Python on torch and peft: pip puts them
into benchmarks/data/fleet-peers without their dependencies; where it cannot, their rows are left
out with the reason.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data
from fleet import clustered, deployed, indexed, planted
from harness import Child, Row, child, median, ratio
from rows import MB, inner, main, output

BOUNDS = (0.1, 0.3, 0.04, 0.6, 0.2)
WANTED = 100_000
FASTER, SMALLER = 50, 20
# An error read from Gram matrices is 10⁻⁸ wrong; the promise itself has no tolerance.
ROUNDING = 1e-7
_PEERS = ("vlora-dev==1.0.0", "lorashare==0.1.3")
_VLORA = "from vlora.cli import cli; cli()"
_LORASHARE = "from lorashare.cli import main; main()"


def certified(quick: bool) -> list[Row]:
    """All parts at two bounds each: every tenant's error against the bound and against the plan."""
    found = []
    for part in ["certified-quick"] if quick else [f"certified-{i}" for i in range(10)]:
        index = 0 if quick else int(part[-1])
        with planted(part), output() as place:
            fleet, plan = Path(place) / "fleet", Path(place) / "plan"
            indexed(fleet, data.DATA / part)
            for step in (0, 2):
                bound = BOUNDS[(index + step) % len(BOUNDS)]
                run = clustered(fleet, plan, str(bound))
                found.append(
                    {**inner("fleet_certified.py", "judge", part, plan, bound), "s": run.wall}
                )
    shared = sum(one["shared"] for one in found)
    violations = sum(one["violations"] for one in found)
    rand = min(one["rand"] for one in found)
    return [
        Row(
            "fleet certified",
            "tenants of planted fleets served by another file than their own, at bounds "
            f"{', '.join(map(str, sorted(BOUNDS)))}: errors from the files against the bound",
            target="" if quick else f"0 violations of {WANTED:,}; Rand index 1",
            met=None if quick else violations == 0 and shared >= WANTED and rand == 1,
            figures={
                "assignments": shared,
                "violations": violations,
                "lowest adjusted Rand index": rand,
                "compared for it": sum(one["compared"] for one in found),
                "adapters": sum(one["adapters"] for one in found),
                "tenants": sum(one["tenants"] for one in found),
                "s": sum(one["s"] for one in found),
            },
            errors={
                "largest error / bound": max(one["closest"] for one in found),
                "plan's error − error": max(one["apart"] for one in found),
            },
        )
    ]


def judge(name: str, plan: str, bound: str) -> dict[str, Any]:
    """One plan against the files and against what was planted.

    The Rand index is over clusters planted at no more than half the bound, with all that lies in
    their folders: copies, flipped ones, decoys, no-ops.
    """
    import math

    from fleet_data import truth_of

    from tests.planted import adjusted_rand
    from tests.planted_files import Deltas, error, norm, read

    root, limit = data.DATA / name, float(bound)
    truth = json.loads(truth_of(root).read_text())
    document = json.loads((Path(plan) / "plan.json").read_text())
    if document["served"].keys() != truth.keys():
        raise RuntimeError(f"{len(document['served'])} tenants of {len(truth)} are in the plan")
    opened: dict[str, Deltas] = {}
    shared, violations, closest, apart = 0, 0, 0.0, 0.0
    for tenant, served in sorted(document["served"].items(), key=lambda item: item[1]["by"]):
        representative = document["representatives"][served["by"]]
        own = root / tenant
        if representative["location"] and Path(representative["location"]) == own.resolve():
            continue
        shared += 1
        mine = read(own)
        if representative["kind"] == "base":
            violations += norm(mine) > 0
            continue
        if served["by"] not in opened:
            where = representative["location"] or str(Path(plan) / representative["path"])
            opened = {served["by"]: read(Path(where))}
        found = error(opened[served["by"]], mine)
        violations += not found <= limit + ROUNDING
        closest = max(closest, found / limit) if math.isfinite(found) else math.inf
        apart = max(apart, abs(found - served["error"]))
    compared = [n for n, (_, _, epsilon, _) in truth.items() if epsilon <= limit / 2]
    groups = [document["served"][n]["by"] for n in compared]
    return {
        "tenants": len(truth),
        "adapters": deployed(document),
        "shared": shared,
        "violations": int(violations),
        "closest": closest,
        "apart": apart,
        "compared": len(compared),
        "rand": adjusted_rand([truth[n][1] for n in compared], groups),
    }


def peers(quick: bool) -> list[Row]:
    """vlora-dev and lorashare on 200 adapters, beside index and cluster of the same files."""
    try:
        folder = installed()
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or str(error)).strip().splitlines()[-1]
        print(f"peers: left out, they cannot be installed here: {reason}", file=sys.stderr)
        return []
    name = "shared-quick" if quick else "shared"
    with planted(name) as root, output() as place:
        links = Path(place) / "links"
        links.mkdir()
        for each in sorted(root.glob("*/*")):  # vlora calls an adapter by its folder's own name
            (links / each.relative_to(root).as_posix().replace("/", "-")).symlink_to(each)
        paths = [str(each) for each in sorted(links.iterdir())]
        ours = [both(root, Path(place)) for _ in range(2 if quick else 4)][1:]
        plan = Path(place) / "plan"
        size = sum(f.stat().st_size for f in root.glob("*/*/*.safetensors")) / 1e9
        rand = inner("fleet_certified.py", "judge", name, plan, 0.2)["rand"]
        vlora = [
            peer(folder, _VLORA, "analyze", "--json", *paths) for _ in range(1 if quick else 3)
        ]
        theirs = inner_rand(name, vlora[0].stdout, Path(place))
        out = str(Path(place) / "share")
        share = [peer(folder, _LORASHARE, "compress", "--device", "cpu", "-o", out, *paths)]
    about = f"{len(paths)} adapters ({size:.2g} GB)"
    found = {"vlora-dev analyze": vlora, "lorashare compress": share}
    groups = {"vlora-dev analyze": {"adjusted Rand index": theirs, "ours": rand}}
    return [
        Row(
            f"fleet, {label.partition(' ')[0]}",
            f"{label} / adapterops index and cluster, whole processes, {about}",
            ratio([run.wall for run in runs], [run.wall for run in ours[: len(runs)]]),
            "" if quick else f"at least {FASTER} x faster, {SMALLER} x less memory",
            None
            if quick
            else median(runs, "wall") >= FASTER * median(ours, "wall")
            and median(runs, "rss") >= SMALLER * median(ours, "rss"),
            {
                "theirs s": median(runs, "wall"),
                "theirs CPU s": median(runs, "cpu"),
                "theirs peak MB": median(runs, "rss") / MB,
                "s": median(ours, "wall"),
                "CPU s": median(ours, "cpu"),
                "peak MB": median(ours, "rss") / MB,
                "times less memory": median(runs, "rss") / median(ours, "rss"),
                **groups.get(label, {}),
            },
        )
        for label, runs in found.items()
    ]


def both(root: Path, place: Path) -> Child:
    """index and cluster, as one."""
    first = indexed(place / "fleet", root)
    second = clustered(place / "fleet", place / "plan")
    wall, cpu = first.wall + second.wall, first.cpu + second.cpu
    return Child(wall, cpu, max(first.rss, second.rss), "", "")


def peer(folder: Path, start: str, *arguments: str) -> Child:
    """One of the peers' own commands."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); {start}"
    return child([sys.executable, "-c", code, *arguments])


def inner_rand(name: str, printed: str, place: Path) -> float:
    """The adjusted Rand index of vlora's groups at its own threshold, 0.9."""
    file = place / "vlora.json"
    document = json.loads(printed[printed.index("{") :])
    file.write_text(json.dumps(document["clusters"]))
    return float(inner("fleet_certified.py", "rand", name, file))


def rand(name: str, file: str) -> float:
    from fleet_data import truth_of

    from tests.planted import adjusted_rand

    truth = json.loads(truth_of(data.DATA / name).read_text())
    groups = {one: i for i, group in enumerate(json.loads(Path(file).read_text())) for one in group}
    names = sorted(truth)
    return adjusted_rand([truth[n][1] for n in names], [groups[n.replace("/", "-")] for n in names])


def installed() -> Path:
    """Where the peers are, put there by pip where they are not yet."""
    folder = data.DATA / "fleet-peers"
    if not (folder / "vlora").is_dir() or not (folder / "lorashare").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, *_PEERS], check=True, capture_output=True, text=True)
    return folder


ROWS: dict[str, Callable[[bool], list[Row]]] = {"certified": certified, "peers": peers}
INNER: dict[str, Callable[..., Any]] = {"judge": judge, "rand": rand}

if __name__ == "__main__":
    main(__doc__, ROWS, INNER)  # type: ignore[arg-type]
