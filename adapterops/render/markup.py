"""Text, numbers and data as they stand in an HTML page, whatever names hold."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from typing import Any

from adapterops.render.text import printable

_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")
_FINEST = 1e-5  # of a ratio: what is smaller but not zero is said to be below 0.001 %


def text(value: str) -> str:
    """A name or message as HTML text, also between quotes; control characters are spelled."""
    return html.escape(printable(value), quote=True)


def percent(value: float | None) -> str:
    """A fraction in per cent to three digits, a dash where there is none."""
    if value is None:
        return "–"
    if 0.0 < value < _FINEST:
        return "< 0.001\u202f%"
    return f"{100 * value:.3g}\u202f%" if value < 10 else f"{100 * value:,.0f}\u202f%"


def size(number: float | None) -> str:
    """Bytes to three digits in powers of 1000, "not known" where there are none."""
    if number is None:
        return "not known"
    value, unit = float(number), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g}\u202f{_UNITS[unit]}"


def data(value: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element.

    Only ASCII, and `<`, `>` and `&` are escaped, so that neither `</script>` nor `<!--` occurs.
    """
    found = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        found = found.replace(sign, f"\\u{ord(sign):04x}")
    return found


def digest(script: str) -> str:
    """A script's hash as a Content-Security-Policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
