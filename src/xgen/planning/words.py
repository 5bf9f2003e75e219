"""Numbers of a plan as text, the same on the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping

from xgen.report.words import SPACE, duration


def count(value: int) -> str:
    """In full: 6,895,702,016."""
    return f"{value:,}"


def number(value: float) -> str:
    """Three digits, or all before the point: 0.52, 12.3, 163,337."""
    if value == 0 or abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def short(tokens: float) -> str:
    """Three digits and a decimal unit: 800B, 1.05M."""
    for unit, one in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if tokens >= 0.9995 * one:
            return f"{tokens / one:.3g}{unit}"
    return f"{tokens:.3g}"


def flops(value: float) -> str:
    """41.7 G."""
    return f"{value / 1e9:.1f} G" if value >= 1e8 else f"{value / 1e6:.2f} M"


def size(bytes_: float) -> str:
    """Binary units: 4.63 GiB."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if bytes_ >= 2**power:
            return f"{bytes_ / 2**power:.3g} {unit}" if bytes_ < 1000 * 2**power else f"{bytes_ / 2**power:,.0f} {unit}"
    return f"{bytes_:.0f} bytes"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def hours(value: float) -> str:
    """The two largest units: "13 d 7 h", "2 h 5 min", "40 s"."""
    return duration(3600 * value).replace(SPACE, " ")


def dollars(value: float) -> str:
    return f"${value:,.0f}" if value >= 100 else f"${value:.2f}" if value >= 0.005 or not value else f"${value:.1g}"


def co2(kilograms: float) -> str:
    """t from a tonne on, else kg."""
    return f"{number(kilograms / 1000)} t" if kilograms >= 1000 else f"{number(kilograms)} kg"


def mesh(sizes: Mapping[str, int]) -> str:
    """Axes of more than one chip: "fsdp 128 x tensor 4"."""
    return " x ".join(f"{axis} {parts}" for axis, parts in sizes.items() if parts > 1) or "one chip"
