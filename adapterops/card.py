"""The model card beside a PEFT output: what it is made of and how far it is from the exact sum."""

from __future__ import annotations

from adapterops.certificate import Report

_TITLES = {
    "merge": ("Merged LoRA adapter", "A weighted sum of adapters, ΔW = Σ wᵢ·ΔWᵢ"),
    "calc": ("Calculated LoRA adapter", "An expression of adapters"),
    "compress": ("Compressed LoRA adapter", "An adapter at another rank or in another form"),
    "convert": (
        "Converted LoRA adapter",
        "An adapter in another dialect, kind or scale",
    ),
    "extract": ("Extracted LoRA adapter", "The difference of two checkpoints of one model"),
}


def model_card(report: Report) -> str:
    """README.md of an output directory, with the front matter that hubs read."""
    bases = list(dict.fromkeys(item.base for item in report.inputs if item.base))
    lines = ["---", "library_name: peft"]
    floor = report.floor / report.norm if report.norm else 0.0
    if bases:
        lines.append(f"base_model: {_yaml(bases[0])}")
    title, made = _TITLES[report.verb]
    lines += ["tags:", "- lora", f"- {report.verb}", "- adapterops", "---", "", f"# {title}", ""]
    lines += [f"{made}, made by adapterops.", ""]
    lines += ["| input | weight | rank | share | retained | sha256 |", "|---|---|---|---|---|---|"]
    for item in report.inputs:
        share = "–" if item.share is None else f"{item.share:.1%}"
        kept = "–" if item.retention is None else f"{item.retention:.4f}"
        weight = "–" if item.weight is None else f"{item.weight:g}"
        name = item.name.replace("|", "\\|")
        lines.append(
            f"| {name} | {weight} | {item.rank} | {share} | {kept} | `{item.sha256[:16]}` |"
        )
    lines += [
        "",
        f"Rank {report.rank}, stored as {report.dtype}. Relative to what it was made from, the "
        "error is "
        f"{bounded(report.error, floor)} (cut off {bounded(report.truncation, floor)}, number "
        f"format {bounded(report.storage, floor)}), measured on the bytes of this file; "
        "`adapterops.json` has every module.",
        "",
    ]
    return "\n".join(lines)


def bounded(value: float, floor: float) -> str:
    """A measured figure, or that it is below the rounding noise of what was measured."""
    return f"{value:.3g}" if value == 0.0 or value > floor else f"< {floor:.1g}"


def _yaml(text: str) -> str:
    """A double-quoted YAML scalar."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else " " for c in escaped) + '"'
