"""What `adapterops extract` takes beside the dense SVDs of mergekit-extract-lora, and its memory.

`python benchmarks/extract.py [--quick] [--only NAME …]`; see benchmarks/README.md for the rows. Two
layers of Llama-7B in bfloat16, 0.8 GB each side. Of each shape one module is decomposed densely,
another in every pair, and counted as often as the checkpoints have that shape. The row `mergekit`
runs mergekit itself on one module, from an environment of its own in benchmarks/data/mergekit; it
is left out, with the reason, where pip cannot make that.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import data
from harness import Row, alternate, child, median, ratio
from rows import MB, command, inner, made, main, output

RANK = 16
LEAST, PEAK = 20, 300 * MB
ONE = r"model\.layers\.0\.self_attn\.q_proj"
_WEIGHTS = "model.safetensors"
_MERGEKIT = "mergekit==0.1.5"


def extract(quick: bool) -> list[Row]:
    """All matrices of the checkpoints, the whole process, beside the SVDs alone."""
    folder = made("checkpoints-quick" if quick else "checkpoints")
    sides = [str(folder / "base"), str(folder / "tuned")]
    theirs, ours = [], []
    with output() as place:
        out = Path(place) / "out"
        run = partial(command, "extract", out, *sides, "--rank", str(RANK))
        run()
        for pair in range(1 if quick else 3):
            theirs.append(inner("extract.py", "dense", *sides, out, pair))
            ours.append(run())
    ratios = ratio([one["s"] for one in theirs], [run.wall for run in ours])
    peak, tensor = max(run.rss for run in ours), theirs[0]["largest"]
    limit = PEAK + tensor
    model = "a narrow Llama" if quick else "Llama-7B"
    return [
        Row(
            "extract",
            f"dense SVDs of mergekit-extract-lora (one module of each shape measured, the rest "
            f"counted) / adapterops extract to rank {RANK}, the whole process; "
            f"{theirs[0]['modules']} matrices of {model}, bfloat16",
            ratios,
            "" if quick else f"at least {LEAST}, peak 300 MB and one tensor ({tensor / MB:.0f} MB)",
            None if quick else ratios.median >= LEAST and peak <= limit,
            {
                "dense s (counted)": statistics.median(one["s"] for one in theirs),
                "dense CPU s (counted)": statistics.median(one["CPU s"] for one in theirs),
                "s": median(ours, "wall"),
                "CPU s": median(ours, "cpu"),
                "peak MB": peak / MB,
            },
            {f"{name} to W′ − W": theirs[-1]["errors"][name] for name in ("mergekit", "ours")}
            | {"ours / mergekit − 1 (max)": max(one["apart"] for one in theirs)},
        )
    ]


def dense(base: str, tuned: str, out: str, pick: str) -> dict[str, Any]:
    """Seconds of the peer's decompositions and both sides' errors, from one module of each shape.

    Errors are those of the factors as stored, relative to the exact difference, in float64.
    """
    import peers
    import torch
    from safetensors import safe_open

    torch.linalg.svd(torch.eye(8))
    wall, cpu, apart = 0.0, 0.0, []
    squares = {"mergekit": 0.0, "ours": 0.0, "whole": 0.0}
    with (
        safe_open(Path(base) / _WEIGHTS, "pt") as before,
        safe_open(Path(tuned) / _WEIGHTS, "pt") as after,
    ):
        classes: dict[tuple[int, ...], list[str]] = {}
        for name in after.keys():  # noqa: SIM118
            if ".layers." in name and "norm" not in name:
                classes.setdefault(tuple(after.get_slice(name).get_shape()), []).append(name)
        for names in classes.values():
            name = sorted(names)[int(pick) % len(names)]
            sides = before.get_tensor(name), after.get_tensor(name)
            seconds, busy, theirs = peers.timed(partial(peers.mergekit_extract, *sides, RANK))
            wall, cpu = wall + len(names) * seconds, cpu + len(names) * busy
            exact = sides[1].double() - sides[0].double()
            squares["whole"] += len(names) * float(exact.square().sum())
            found = {}
            for who, (B, A) in (("mergekit", theirs), ("ours", written(out, name))):
                found[who] = float((exact - B.double() @ A.double()).norm())
                squares[who] += len(names) * found[who] ** 2
            apart.append(found["ours"] / found["mergekit"] - 1)
    return {
        "s": wall,
        "CPU s": cpu,
        "modules": sum(map(len, classes.values())),
        "largest": max(2 * m * n for m, n in classes),
        "errors": {who: (squares[who] / squares["whole"]) ** 0.5 for who in ("mergekit", "ours")},
        "apart": max(apart),
    }


def written(out: str, weight: str) -> Iterator[Any]:
    """B, with the scale in it, and A of the module of this weight in our output."""
    from safetensors import safe_open

    config = json.loads((Path(out) / "adapter_config.json").read_text())
    stem = "base_model.model." + weight.removesuffix(".weight")
    with safe_open(data.weights(out), "pt") as file:
        yield file.get_tensor(f"{stem}.lora_B.weight") * (config["lora_alpha"] / config["r"])
        yield file.get_tensor(f"{stem}.lora_A.weight")


def mergekit(quick: bool) -> list[Row]:
    """mergekit's own command on one matrix, the whole process on both sides."""
    try:
        program = installed()
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or str(error)).strip().splitlines()[-1]
        print(f"mergekit: left out, it cannot be installed here: {reason}", file=sys.stderr)
        return []
    folder = made("checkpoints-quick" if quick else "checkpoints")
    base, tuned = folder / "base", folder / "tuned"
    shape = "512 x 512" if quick else "4096 x 4096"
    with output() as place:
        options = {"--model": tuned, "--base-model": base, "--out-path": f"{place}/theirs"}
        options |= {"--max-rank": RANK, "--include-regex": ONE}
        theirs = ["env", "HF_HUB_OFFLINE=1", str(program), "--skip-undecomposable"]
        theirs += ["--no-write-model-card", "--no-copy-tokenizer"]
        theirs += [str(each) for option in options.items() for each in option]
        sides = (str(base), str(tuned), "--modules", ONE, "--rank", str(RANK))
        peer, ours = alternate(
            lambda: child(theirs),
            lambda: command("extract", Path(place) / "out", *sides),
            1 if quick else 3,
        )
    return [
        Row(
            "extract, mergekit",
            f"mergekit-extract-lora 0.1.5 / adapterops extract, rank {RANK} of one {shape} matrix, "
            "whole processes",
            ratio([run.wall for run in peer], [run.wall for run in ours]),
            figures={
                "mergekit s": median(peer, "wall"),
                "mergekit peak MB": max(run.rss for run in peer) / MB,
                "s": median(ours, "wall"),
                "peak MB": max(run.rss for run in ours) / MB,
            },
        )
    ]


def installed() -> Path:
    """mergekit's command in a virtual environment of its own, with the torch of this one."""
    import importlib.metadata

    home = data.DATA / "mergekit"
    program = home / "bin" / "mergekit-extract-lora"
    if not program.exists():
        torch = re.sub(r"\+.*", "", importlib.metadata.version("torch"))
        subprocess.run([sys.executable, "-m", "venv", home], check=True, capture_output=True)
        install = [home / "bin" / "python", "-m", "pip", "install", "-q"]
        subprocess.run(
            [*install, _MERGEKIT, f"torch=={torch}"], check=True, capture_output=True, text=True
        )
    return program


INNER: dict[str, Callable[..., Any]] = {"dense": dense}

if __name__ == "__main__":
    main(__doc__, {"extract": extract, "mergekit": mergekit}, INNER)
