"""The memory of each stage as a bar against the chip's limit, drawn as SVG text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xgen.planning.words import percent, size
from xgen.report.markup import clipped, escape
from xgen.report.plots import BOLD_CHARACTER, CHARACTER, Size
from xgen.report.scales import Scale, nice_scale

ROW, BAR, TOP, BOTTOM, EDGE = 58.0, 22.0, 22.0, 40.0, 8.0
SLIVER = 0.6
"""px: narrower parts are not drawn; their numbers stand in the table."""
GIB = 2**30


@dataclass(frozen=True)
class Bar:
    """One stage: its bytes by kind in drawing order, and how much there is."""

    name: str
    parts: tuple[tuple[str, str, int], ...]
    """(kind, CSS class of its colour, bytes)."""
    limit: int
    fits: bool

    @property
    def total(self) -> int:
        return sum(bytes_ for _, _, bytes_ in self.parts)


def draw_bars(ident: str, title: str, bars: Sequence[Bar], drawing: Size) -> str:
    """The bars as an <svg> element, one under the other on one scale that begins at 0."""
    height = round(TOP + ROW * len(bars) + BOTTOM)
    most = max(max(bar.total, bar.limit) for bar in bars) / GIB
    scale = nice_scale(0, most * 1.03, EDGE, drawing.width - EDGE, 8 if drawing.width > 500 else 4, exact=True)
    name = f"{ident}-{drawing.name}"
    told = "; ".join(f"{bar.name}: {_told(bar)}" for bar in bars)
    base = TOP + ROW * len(bars)
    parts = [
        f'<svg class="plot {drawing.name}" role="img" aria-labelledby="{name}-t {name}-d" '
        f'viewBox="0 0 {drawing.width} {height}" width="{drawing.width}" height="{height}" '
        f'xmlns="http://www.w3.org/2000/svg"><title id="{name}-t">{escape(title)}</title>'
        f'<desc id="{name}-d">{escape(told)}</desc>',
        _axis(scale, base, drawing),
        "".join(_bar(bar, TOP + ROW * row, scale, drawing) for row, bar in enumerate(bars)),
        _limit(bars[0].limit, scale),
        "</svg>",
    ]
    return "".join(parts)


def _told(bar: Bar) -> str:
    return f"{size(bar.total)}, {percent(bar.total / bar.limit)}" + ("" if bar.fits else ", too much")


def _axis(scale: Scale, base: float, drawing: Size) -> str:
    parts = ['<g class="axes" aria-hidden="true">']
    for tick in scale.ticks:
        x = scale(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{base}"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{tick:g}</text>')
    end = drawing.width - EDGE
    parts.append(f'<text class="title" x="{end}" y="{base + 34}" text-anchor="end">GiB a chip</text></g>')
    return "".join(parts)


def _limit(limit: int, scale: Scale) -> str:
    text = f"a program may take {size(limit)}"
    return f'<text class="plain" x="{scale(limit / GIB):.1f}" y="13" text-anchor="end">{escape(text)} ↓</text>'


def _bar(bar: Bar, top: float, scale: Scale, drawing: Size) -> str:
    told = _told(bar)
    room = int((drawing.width - 2 * EDGE - CHARACTER * len(told) - 12) / BOLD_CHARACTER)
    words, y = top + 22, top + 30
    parts = [
        f'<text class="plain strong" x="{EDGE}" y="{words}">{escape(clipped(bar.name, max(3, room)))}</text>',
        f'<text class="plain{"" if bar.fits else " over"}" x="{drawing.width - EDGE}" y="{words}" '
        f'text-anchor="end">{escape(told)}</text>',
        f'<rect class="room" x="{scale(0):.1f}" y="{y}" width="{scale(bar.limit / GIB) - scale(0):.1f}" '
        f'height="{BAR}"/>',
    ]
    before = 0
    for kind, tone, bytes_ in bar.parts:
        start, stop = scale(before / GIB), scale((before + bytes_) / GIB)
        before += bytes_
        if stop - start >= SLIVER:
            parts.append(
                f'<rect class="part {tone}" x="{start:.1f}" y="{y}" width="{stop - start:.1f}" height="{BAR}">'
                f"<title>{escape(f'{bar.name}, {kind}: {size(bytes_)}')}</title></rect>"
            )
    x = scale(bar.limit / GIB)
    parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 4}" y2="{y + BAR + 4}"/>')
    return "".join(parts)
