"""What calibration.py measured: summed up, drawn and as tables."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

COLOURS = {
    "continued": "#1b7837",
    "own, cut": "#888888",
    "same domain, other seed": "#2166ac",
    "whole domain": "#762a83",
    "other domain": "#b2182b",
}
PANELS = (("medoid", ("medoid",)), ("mean", ("mean", "mixture")), ("minimax", ("minimax",)))
BOUNDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, math.inf)  # of ε, in the table
KINDS = ("medoid", "mean", "minimax", "mixture", "cut")
LOWEST, HIGHEST = -0.6, 1.6  # of the share that is drawn; further points lie on the edge


def joint(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rank-8 mean of a domain's two seeds beside each of them on the domain's text."""
    found = [
        point
        for point in points
        if (point["relation"], point["kind"], point["rank"])
        == ("same domain, other seed", "mean", 8)
    ]
    return [
        {
            "domain": one["tenant"].partition("-")[0],
            "errors": [one["error"], two["error"]],
            "mean": one["loss"],
            "own": [one["own"], two["own"]],
            "base": one["base"],
            "more": [[one["more"], one["±"]], [two["more"], two["±"]]],
        }
        for one, two in zip(found[::2], found[1::2], strict=True)
    ]


def curve(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By kind of representative and range of ε: how much of the gain is lost."""
    found = []
    for kind in KINDS:
        for low, high in pairwise(BOUNDS):
            some = [p for p in points if p["kind"] == kind and low < p["error"] <= high]
            if some:
                lost = [point["lost"] for point in some]
                found.append(
                    {
                        "kind": kind,
                        "errors": [min(p["error"] for p in some), max(p["error"] for p in some)],
                        "points": len(some),
                        "lost": [min(lost), statistics.median(lost), max(lost)],
                        "nats": [f(point["more"] for point in some) for f in (min, max)],
                    }
                )
    return found


def draw(record: dict[str, Any], path: Path) -> None:
    """One panel for each kind of representative: the share of the gain that is lost against ε."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4.2), sharex=True, sharey=True)
    for axis, (title, kinds) in zip(axes, PANELS, strict=True):
        for relation, colour in COLOURS.items():
            some = [
                point
                for point in record["points"]
                if point["relation"] == relation and point["kind"] in (*kinds, "cut")
            ]
            mixed = [point["kind"] == "mixture" for point in some]
            for open_circles in (False, True):
                shown = [p for p, m in zip(some, mixed, strict=True) if m == open_circles]
                axis.scatter(
                    [point["error"] for point in shown],
                    [min(HIGHEST, max(LOWEST, point["lost"])) for point in shown],
                    s=22,
                    facecolors="none" if open_circles else colour,
                    edgecolors=colour,
                    linewidths=0.8,
                    label=None if open_circles else relation,
                )
        axis.axhline(0, color="#333333", linewidth=0.8)
        axis.axhline(1, color="#333333", linewidth=0.8, linestyle=":")
        axis.axvline(0.2, color="#333333", linewidth=0.8, linestyle="--")
        axis.set(
            xscale="log",
            title=title,
            xlabel="ε = ‖C − D‖ / ‖D‖",
            xlim=(0.01, 1.6),
            ylim=(LOWEST, HIGHEST),
        )
        axis.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5, 1], ["0.02", "0.05", "0.1", "0.2", "0.5", "1"])
        axis.minorticks_off()
    axes[0].set_ylabel("share of the tenant's own gain that is lost")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(COLOURS), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def tables(record: dict[str, Any]) -> str:
    """Curve, joint means and cosines as Markdown."""
    return "\n\n".join((_curve(record), _joint(record), _cosines(record)))


def _curve(record: dict[str, Any]) -> str:
    lines = [
        "| served by | ε | points | gain lost: median (range) | more loss, nats |",
        "|---|---|---:|---|---|",
    ]
    for row in record["curve"]:
        (low, high), (least, middle, most) = row["errors"], row["lost"]
        lines.append(
            f"| {row['kind']} | {low:.3f} to {high:.3f} | {row['points']} | "
            f"{middle:.1%} ({least:.1%} to {most:.1%}) | "
            f"{row['nats'][0]:+.4f} to {row['nats'][1]:+.4f} |"
        )
    return "\n".join(lines)


def _joint(record: dict[str, Any]) -> str:
    lines = [
        "| domain | ε of the rank-8 mean to a, to b | loss: base | a | b | the mean "
        "| mean − a | mean − b |",
        "|---|---|---:|---:|---:|---:|---|---|",
    ]
    for row in record["joint"]:
        errors = ", ".join(f"{x:.3f}" for x in row["errors"])
        losses = " | ".join(f"{x:.4f}" for x in (row["base"], *row["own"], row["mean"]))
        more = " | ".join(f"{x:+.4f} ± {noise:.4f}" for x, noise in row["more"])
        lines.append(f"| {row['domain']} | {errors} | {losses} | {more} |")
    return "\n".join(lines)


def _cosines(record: dict[str, Any]) -> str:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for pair in record["similarities"]:
        found[pair["relation"]].append(pair)
    lines = ["| pairs | how many | cosine of ΔW | of ΔW·ΔWᵀ |", "|---|---:|---|---|"]
    for relation, pairs in found.items():
        ranges = [
            f"{min(p[key] for p in pairs):.3f} to {max(p[key] for p in pairs):.3f}"
            for key in ("delta", "outputs")
        ]
        lines.append(f"| {relation} | {len(pairs)} | {ranges[0]} | {ranges[1]} |")
    return "\n".join(lines)
