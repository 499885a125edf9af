"""How fast `adapterops inspect` goes through ten thousand adapters.

`python benchmarks/many.py [--quick] [--results FOLDER]`. Every adapter is a PEFT directory: 24
modules, a config, a header of 6 kB. In one set each header is different (as if ten thousand people
had trained), in the other all are the same bytes (one recipe, ten thousand tenants).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import harness
from harness import Row, adapterops, alternate, median, python, ratio

from adapterops.files.header import Entry, encode_header, layout

RANK, WIDTH, LAYERS, TYPES = 2, 8, 12, ("q_proj", "v_proj")
PER_FOLDER = 100
TARGET = 2000


def generate(folder: Path, count: int, *, alike: bool) -> None:
    """`count` adapters below `folder`, a hundred in each of its folders."""
    stems = [f"model.layers.{i}.self_attn.{name}" for i in range(LAYERS) for name in TYPES]
    shapes = {}
    for stem in stems:
        shapes[f"base_model.model.{stem}.lora_A.weight"] = ("F16", (RANK, WIDTH))
        shapes[f"base_model.model.{stem}.lora_B.weight"] = ("F16", (WIDTH, RANK))
    entries: dict[str, Entry] = layout(shapes)
    data = bytes(max(entry.end for entry in entries.values()))
    for index in range(count):
        place = folder / f"{index // PER_FOLDER:03d}" / f"{index:05d}"
        place.mkdir(parents=True)
        metadata = {"format": "pt"} if alike else {"format": "pt", "run": f"{index:05d}"}
        weights = encode_header(entries, metadata) + data
        (place / "adapter_model.safetensors").write_bytes(weights)
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": "tiny/base",
            "r": RANK,
            "lora_alpha": 2 * RANK,
            "target_modules": list(TYPES),
            "bias": "none",
            "rank_pattern": {},
            "alpha_pattern": {},
        }
        (place / "adapter_config.json").write_text(json.dumps(config, indent=2))


def inspect(name: str, folder: str, count: int, pairs: int) -> Row:
    """The whole command on all of them beside the floor, and beside the command on one."""
    options = ("inspect", "--no-progress")
    ours, floor = alternate(
        lambda: adapterops(*options, folder), lambda: python("many.py", "--floor", folder), pairs
    )
    first, document = alternate(
        lambda: adapterops(*options, f"{folder}/000/00000"),
        lambda: adapterops(*options, folder, "--json"),
        1 if pairs < 3 else 3,
    )
    seconds, single = median(ours, "wall"), median(first, "wall")
    rate = (count - 1) / (seconds - single)
    found = len(json.loads(document[0].stdout)["adapters"])
    if found != count or ours[0].stdout.count("\n") < count:
        raise RuntimeError(f"{found} of {count} adapters were reported")
    return Row(
        name,
        f"inspect of {count:,} adapters, {name.partition(' ')[2]} / reading headers and configs",
        ratio([run.wall for run in ours], [run.wall for run in floor]),
        f"{TARGET:,} files/s after the first",
        rate >= TARGET,
        {
            "files/s": rate,
            "s": seconds,
            "CPU s": median(ours, "cpu"),
            "one s": single,
            "floor s": median(floor, "wall"),
            "JSON s": median(document, "wall"),
            "peak MB": max(run.rss for run in ours) / 1e6,
        },
    )


def read_all(folder: Path) -> None:
    """The floor: every header and config is found, read and parsed as JSON, nothing checked."""
    for config in sorted(folder.glob("*/*/adapter_config.json")):
        json.loads(config.read_bytes())
        with open(config.with_name("adapter_model.safetensors"), "rb") as file:
            json.loads(file.read(int.from_bytes(file.read(8), "little")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1,000 adapters, one pair")
    parser.add_argument("--date", help="date in the results file's name; default today")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for it")
    parser.add_argument("--floor", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.floor:
        read_all(options.floor)
        return
    count, pairs = (1000, 1) if options.quick else (10_000, 5)
    for name, alike in (("inspect distinct headers", False), ("inspect equal headers", True)):
        print(f"{name} …", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            generate(Path(folder), count, alike=alike)
            row = harness.watched(partial(inspect, name, folder, count, pairs))
        prefix = "quick-" if options.quick else ""
        path = harness.save([row], options.results, day=options.date, prefix=prefix)
    print(harness.table(path))


if __name__ == "__main__":
    main()
