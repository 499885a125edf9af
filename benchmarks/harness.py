"""Measure whole processes side by side, keep the figures in a file, print them as a table.

What is claimed are ratios of two things run in turn (A B A B …) on one machine: a busy or slow
machine moves both. `python benchmarks/harness.py FILE…` prints results files as Markdown.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SCHEMA = "adapterops.bench/1"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Child:
    """One finished process: seconds on the clock, seconds of all cores, peak memory in bytes."""

    wall: float
    cpu: float
    rss: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Ratio:
    """min, median and max of the ratios of the single pairs, and how many there were."""

    low: float
    median: float
    high: float
    pairs: int


@dataclass(frozen=True)
class Row:
    """One line of the table: a ratio or figure that is claimed and those that explain it.

    `others` is the share of the machine that other processes took meanwhile.
    """

    name: str
    compared: str
    ratio: Ratio | None = None
    target: str = ""
    met: bool | None = None
    figures: dict[str, float | str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    others: float | None = None


def child(argv: Sequence[str], *, input_text: str = "", check: bool = True) -> Child:
    """Run a command alone and measure it, start to exit, without BLAS thread settings of ours.

    `wait4` gives this child's own peak, which Linux starts at the memory of the parent that
    forked it: a parent must stay small. What needs much memory is done in children of its own.
    """
    environment = {k: v for k, v in os.environ.items() if k not in _THREAD_VARIABLES}
    with (
        tempfile.TemporaryFile("w+") as stdin,
        tempfile.TemporaryFile("w+") as stdout,
        tempfile.TemporaryFile("w+") as stderr,
    ):
        stdin.write(input_text)
        stdin.seek(0)
        start = time.perf_counter()
        process = subprocess.Popen(argv, stdin=stdin, stdout=stdout, stderr=stderr, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        stderr.seek(0)
        result = Child(
            wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, stdout.read(), stderr.read()
        )
    if check and process.returncode != 0:
        raise RuntimeError(f"{argv[:4]} … exited {process.returncode}:\n{result.stderr[-2000:]}")
    return result


def python(script: str, *arguments: str, **options: Any) -> Child:
    """Run one of the scripts beside this file."""
    return child([sys.executable, str(HERE / script), *arguments], **options)


def adapterops(*arguments: str) -> Child:
    """Run the command line of the package, as its console script does."""
    start = "from adapterops.cli import main; main()"
    return child([sys.executable, "-c", start, *arguments])


def alternate(
    first: Callable[[], Child], second: Callable[[], Child], pairs: int
) -> tuple[list[Child], list[Child]]:
    """Run A B A B …, the first pair unmeasured to fill the caches."""
    runs = [(first(), second()) for _ in range(pairs + 1)][1:]
    return [a for a, _ in runs], [b for _, b in runs]


def ratio(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """first/second, pair by pair."""
    ratios = sorted(a / b for a, b in zip(first, second, strict=True))
    return Ratio(ratios[0], statistics.median(ratios), ratios[-1], len(ratios))


def median(runs: Sequence[Child], what: str) -> float:
    """Median of one of the measured figures."""
    return statistics.median(getattr(run, what) for run in runs)


def watched(measure: Callable[[], Row]) -> Row:
    """Run a measurement and note how busy others kept the machine."""
    start, busy, own = time.perf_counter(), _busy(), _own()
    row = measure()
    available = (time.perf_counter() - start) * (os.cpu_count() or 1)
    return replace(row, others=max(0.0, _busy() - busy - (_own() - own)) / available)


def _busy() -> float:
    """Seconds that all processors were not idle since the start of the machine."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    """CPU seconds of this process and its finished children."""
    return sum(os.times()[:4])


def machine() -> dict[str, Any]:
    """What the figures depend on; no names of hosts or paths."""
    names = ("numpy", "torch", "peft", "safetensors")
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpu": _gpu(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "versions": {name: version for name in names if (version := _version(name))},
    }


def _cpu() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = dict(re.findall(r"^([^\t:\n]+)\t*: (.+)$", file.read(), re.MULTILINE))
    return lines.get("model name", platform.machine()).strip()


def _gpu() -> str | None:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.strip().splitlines()[0] if found.strip() else None


def _version(name: str) -> str | None:
    """Version of an installed package; from the module itself where it has no metadata."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return getattr(sys.modules.get(name), "__version__", None)


def save(
    rows: Sequence[Row], folder: Path = RESULTS, *, day: str | None = None, prefix: str = ""
) -> Path:
    """Write rows to `<folder>/<date>-<machine>.json`; rows of other names there are kept."""
    described = machine()
    slug = re.sub(r"[^a-z0-9]+", "-", (described["gpu"] or described["cpu"]).lower()).strip("-")
    path = folder / f"{day or date.today().isoformat()}-{prefix}{slug}.json"
    kept: dict[str, Any] = {}
    if path.exists():
        kept = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    kept.update({row.name: asdict(row) for row in rows})
    document = {"schema": SCHEMA, "machine": described, "rows": list(kept.values())}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return path


def table(path: Path) -> str:
    """A results file as a Markdown table under a line about the machine."""
    document = json.loads(path.read_text())
    about = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    machine_line = f"{about['cores']} cores of {about['cpu']}, {about['ram_gb']} GB"
    lines = [
        f"{machine_line}, {about['gpu'] or 'no GPU'}; Python {about['python']}, {versions}",
        "",
        "| row | compared | ratio: median (range) | target | met | figures | errors | others |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        cells = [
            row["name"],
            row["compared"],
            _shown_ratio(row["ratio"]),
            row["target"],
            {True: "yes", False: "**no**", None: ""}[row["met"]],
            "; ".join(f"{key} {_shown(value)}" for key, value in row["figures"].items()),
            "; ".join(f"{key} {value:.3g}" for key, value in row["errors"].items()),
            "" if row["others"] is None else f"{row['others']:.0%}",
        ]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def latest_table(folder: Path = RESULTS) -> str:
    """The newest results without a GPU, as the README shows them."""
    newest = max(path for path in folder.glob("*.json") if "torch-" not in path.name)
    return f"[`{newest.name}`](benchmarks/results/{newest.name}): {table(newest)}"


def _shown_ratio(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    low, middle, high = (_shown(found[key]) for key in ("low", "median", "high"))
    return f"{middle} ({low} to {high}), {found['pairs']} pairs"


def _shown(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(table(Path(name)), end="\n\n")
