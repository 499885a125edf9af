"""Fleets for reports: planted, with tenants of hostile names, a broken file and two bases."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import adapterops
from tests.planted import plant

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<!--<script>",
    "a&b'c\"d`e|f_g*h[i](javascript:x)$j$@k",
    "\u202eright to left",
    "=cmd|'/c calc'!A1",
)


def planned(root: Path, **options: object) -> Path:
    """The path of a plan of 3 planted clusters, the first of its tenants with hostile names.

    One adapter is of another base, one is broken.
    """
    fleet = plant(root / "adapters", 3)
    names = sorted(fleet.tenants)
    other = root / "adapters" / names[-1] / "adapter_config.json"
    config = json.loads(other.read_text())
    other.write_text(json.dumps({**config, "base_model_name_or_path": "planted/other"}))
    (root / "adapters" / "broken").mkdir()
    (root / "adapters" / "broken" / "adapter_model.safetensors").write_bytes(b"no adapter")
    (root / "adapters" / "broken" / "adapter_config.json").write_text(json.dumps(config))
    called = dict(zip(names, HOSTILE, strict=False))
    rows = [(called.get(name, name), root / "adapters" / name) for name in [*names, "broken"]]
    with (root / "tenants.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows(
            [("tenant", "path", "traffic"), *((*row, 1 + i) for i, row in enumerate(rows))]
        )
    adapterops.index(out=root / "fleet", manifest=root / "tenants.csv", jobs=1)
    adapterops.cluster(
        root / "fleet", out=root / "plan", **{"allow_sharing": "all", "jobs": 1, **options}
    )
    return root / "plan"
