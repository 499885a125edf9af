"""One rank for all modules against ranks spent where they save most, at equal size, on real files.

`python benchmarks/allocation.py [--quick]` takes the adapters of examples/ and, where it is there,
of ../shared/corpus, to a half and a quarter of their rank: `compress --rank N`, and `compress
--allocate global --ratio …` with as many parameters. Errors are relative Frobenius errors of the
whole adapter as written. The table of all adapters goes to allocation.md beside the results file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import harness
from harness import HERE, Ratio, Row, python
from rows import output

EXAMPLES = HERE.parent / "examples" / "adapters"
CORPUS = HERE.parent.parent / "shared" / "corpus"
PARTS = {2: "half", 4: "a quarter"}
_HEAD = """# Ranks of one size: equal, or spent where they save most

Written by `python benchmarks/allocation.py`. Each adapter is taken to a half and to a quarter of
its rank by `compress --rank N`, and by `compress --allocate global` with at most as many
parameters. Errors are relative Frobenius errors of the whole adapter as written; sizes are those of
the weights files, heads and biases left out.

| adapter | rank | parameters | equal: kB | error | global: ranks | parameters | kB | error \
| equal / global |
|---|---|---|---|---|---|---|---|---|---|
"""


def measure(quick: str, folder: str) -> dict[str, Any]:
    """Both results of every adapter that can be read and has a rank to lose."""
    from adapterops import open_adapter
    from adapterops.errors import AdapterOpsError

    found: dict[str, Any] = {"adapters": [], "left out": []}
    for index, (name, path) in enumerate(adapters(quick == "1").items()):
        try:
            file = open_adapter(path, allow_pickle=True).terms[0][1]
            rank = max(site.rank for site in file.sites.values())
            to = "peft" if file.dialect == "mlx" else None  # its loaders take one rank for all
            for part in PARTS:
                if rank >= part:
                    row = {"name": name, "rank": rank, "part": part}
                    place = Path(folder) / f"{index}-{part}"
                    found["adapters"].append(row | both(path, rank // part, place, to))
            if rank < min(PARTS):
                found["left out"].append(f"{name}: rank {rank}")
        except AdapterOpsError as error:
            found["left out"].append(f"{name}: {error}")
    return found


def adapters(quick: bool) -> dict[str, Path]:
    """Where each is, by a short name; of the corpus those that its manifest lists."""
    found = {path.name: path for path in sorted(EXAMPLES.iterdir()) if path.is_dir()}
    if quick or not CORPUS.is_dir():
        return found
    for entry in json.loads((CORPUS / "manifest.json").read_text()):
        file = CORPUS / entry["file"]
        path = file.parent if (file.parent / "adapter_config.json").exists() else file
        owner = entry["file"].partition("__")[0]
        found[f"{owner}: {path.name if path != CORPUS / path.name else file.name}"] = path
    return found


def both(path: Path, rank: int, folder: Path, to: str | None) -> dict[str, Any]:
    """Figures of the adapter at one rank, and of ranks by gain in no more parameters."""
    from adapterops import compress

    folder.mkdir()
    options: dict[str, Any] = {"extras": "drop", "allow_pickle": True, "to": to}
    suffix = "" if path.is_dir() else ".safetensors"
    equal = compress(path, out=folder / f"equal{suffix}", rank=rank, **options)
    share = (equal.parameters + 0.5) / equal.parameters_before
    best = compress(
        path, out=folder / f"global{suffix}", ratio=min(share, 1.0), allocate="global", **options
    )
    ranks = [module.rank for module in best.modules.values()]
    if best.parameters > equal.parameters:
        raise RuntimeError(f"{path}: {best.parameters} parameters for {equal.parameters}")
    return {
        "before": equal.parameters_before,
        "to": rank,
        "ranks": [min(ranks), max(ranks), len(best.dropped)],
        "gap": best.gap,
        **{
            name: {"parameters": r.parameters, "size": r.size, "error": r.error}
            for name, r in (("equal", equal), ("global", best))
        },
    }


def table(adapters: list[dict[str, Any]]) -> str:
    """All figures as Markdown."""
    lines = []
    for row in adapters:
        equal, best, (low, high, dropped) = row["equal"], row["global"], row["ranks"]
        cells = [
            row["name"],
            f"{row['rank']} → {row['to']}",
            f"{equal['parameters']:,}",
            f"{equal['size'] / 1e3:,.0f}",
            f"{equal['error']:.4f}",
            f"{low} to {high}" + (f", {dropped} dropped" if dropped else ""),
            f"{best['parameters']:,}",
            f"{best['size'] / 1e3:,.0f}",
            f"{best['error']:.4f}",
            f"{equal['error'] / best['error']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return _HEAD + "\n".join(lines) + "\n"


def row(part: int, adapters: list[dict[str, Any]]) -> Row:
    """All adapters at one part of their rank."""
    ratios = [each["equal"]["error"] / each["global"]["error"] for each in adapters]
    gaps = [each["gap"] or 0.0 for each in adapters]
    return Row(
        f"allocation, {PARTS[part]}",
        f"error at one rank for all modules / at ranks by gain, no more parameters: "
        f"{len(adapters)} real adapters at {PARTS[part]} of their rank",
        Ratio(min(ratios), statistics.median(ratios), max(ratios), len(ratios)),
        "global never worse",
        min(ratios) >= 1 - 1e-6,
        {
            f"{name} MB": sum(each[name]["size"] for each in adapters) / 1e6
            for name in ("equal", "global")
        },
        {
            f"{name} (median)": statistics.median(each[name]["error"] for each in adapters)
            for name in ("equal", "global")
        }
        | {"largest gap to the optimum": max(gaps)},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the examples only")
    parser.add_argument("--date", help="date in the results file's name; default today")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for it")
    parser.add_argument("--inner", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        print(json.dumps(measure(*options.inner)))
        return
    with output() as folder:
        run = python("allocation.py", "--inner", str(int(options.quick)), folder)
    found = json.loads(run.stdout)
    for reason in found["left out"]:
        print(f"left out: {reason}", file=sys.stderr)
    rows = [row(part, [x for x in found["adapters"] if x["part"] == part]) for part in PARTS]
    prefix = "quick-" if options.quick else ""
    harness.save(rows, options.results, day=options.date, prefix=prefix)
    (options.results / f"{prefix}allocation.md").write_text(table(found["adapters"]))
    print(table(found["adapters"]))


if __name__ == "__main__":
    main()
