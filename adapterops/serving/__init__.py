"""Serving engines: what each accepts, rejects or silently misreads, as dated rows.

One module an engine holds its data and rows, read in its source; `judge` compares a file with them.
"""

from __future__ import annotations

from adapterops.serving.model import Engine, Objection, Row, gpu_bytes
from adapterops.serving.objections import ENGINES, ROWS, judge

__all__ = ["ENGINES", "ROWS", "Engine", "Objection", "Row", "gpu_bytes", "judge"]
