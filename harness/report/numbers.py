"""Numbers as people read them."""

from __future__ import annotations

import math
from typing import Any

NOTHING = "–"
"""Where there is no value."""


def format_number(value: Any, digits: int = 4) -> str:
    """A count with all its digits, in threes; a fraction with so many significant ones; None as a dash.

    A float that is a whole number is a count. Scalars of numpy and torch are welcome. NaN and the infinities are shown
    as such.
    """
    value = scalar(value)
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        text = f"{int(value):,}"
    else:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")  # rounded: 0.99999 has the exponent of 1
        if -4 <= int(exponent) < 15:
            text = f"{value:,.{max(0, digits - 1 - int(exponent))}f}"
        else:
            text = f"{mantissa}×10{_raised(int(exponent))}"
    return text.replace("-", "−")


def format_bytes(count: float | None) -> str:
    """Three digits with a unit: 566 B, 2.30 kB, 47.8 MB. A kB has 1,000 bytes."""
    if count is None or not math.isfinite(count):
        return format_number(count)
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= 0.9995 * size:
            return f"{format_number(count / size, 3)} {unit}"
    return f"{format_number(count, 3)} B"


def format_seconds(seconds: float | None) -> str:
    """Two units at most: 0.420 s, 4 min 05 s, 2 h 03 min, 3 d 04 h."""
    if seconds is None or not math.isfinite(seconds):
        return format_number(seconds)
    if seconds < 59.95:
        return f"{format_number(seconds, 3)} s"
    whole = round(seconds)
    for large, small, size, part in (("min", "s", 60, 1), ("h", "min", 3600, 60), ("d", "h", 86400, 3600)):
        if large == "d" or whole < size * (60 if large == "min" else 24):
            return f"{whole // size:,} {large} {whole % size // part:02d} {small}"
    raise AssertionError("days have no end")


def is_number(value: Any) -> bool:
    return isinstance(scalar(value), (int, float)) and not isinstance(scalar(value), bool)


def scalar(value: Any) -> Any:
    """Python's own number for one of numpy or torch; anything else as it is."""
    plain = value is None or type(value) in (str, bool, int, float)
    return value.item() if not plain and hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value


def _raised(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
