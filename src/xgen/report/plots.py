"""Line plots as SVG text, drawn by hand: axes, ticks, bands, whiskers, labels on the lines, hover.

A plot is plain data (`Plot`), drawn at a size (`Size`); colours are CSS classes, so that light and
dark need no second drawing. Everything works without a script: hovering is CSS and SVG titles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from xgen.report.markup import clipped, escape
from xgen.report.scales import Scale, log_scale, nice_scale

Floats = NDArray[np.float64]

CHARACTER = 6.3
BOLD_CHARACTER = 7.2
"""Widths of a character of 11.5 px system text, in px, on the wide side: what fits by them fits by any system font."""
LINE_HEIGHT = 14.0
MOST_HITS = 90


@dataclass(frozen=True)
class Size:
    """A drawing's width and height in px and the px right of the frame kept for labels."""

    name: str
    width: int
    height: int
    labels: int


WIDE = Size("wide", 780, 330, 108)
NARROW = Size("narrow", 350, 280, 66)
SMALL = Size("small", 380, 178, 14)


@dataclass(frozen=True)
class Axis:
    title: str
    text: Callable[[float], str]
    """A tick's text."""
    kind: str = "linear"
    """ "linear" or "log"; logarithmic ticks are at powers of two."""
    bounds: tuple[float, float] | None = None
    ticks: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Series:
    """One line; x and the others are arrays of one length, NaN is a gap."""

    name: str
    tone: str
    """CSS class of the colour: "t0".."t5" for stages, "ink", "quiet"."""
    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None
    label: str = ""
    """Written at the line's end."""
    line: bool = True
    marker: str = ""
    """ "circle", "square", "diamond", "triangle" or none."""
    whiskers: bool = False
    """Draw low and high as whiskers instead of a band."""
    solid_until: float = math.inf
    """Past this x the line is dashed and the markers are hollow."""
    dodge: float = 0.0
    """px the series is moved sideways, so that whiskers do not hide each other."""


@dataclass(frozen=True)
class Rule:
    """An upright line at x with a word beside it; `until` bounds the room for the word."""

    x: float
    label: str
    tone: str
    short: str = ""
    """Said instead of the label where there is no room for that."""
    until: float = math.nan
    line: bool = True


@dataclass(frozen=True)
class Hit:
    """What is said when the pointer is near x."""

    x: float
    text: str


@dataclass(frozen=True)
class Plot:
    id: str
    title: str
    description: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    rules: tuple[Rule, ...] = ()
    hits: tuple[Hit, ...] = ()


@dataclass(frozen=True)
class Frame:
    """Where the data lies in the drawing, in px."""

    x: Scale
    y: Scale
    left: float
    right: float
    top: float
    bottom: float


def draw(plot: Plot, size: Size) -> str:
    """The plot as an <svg> element."""
    frame = _frame(plot, size)
    height = size.height
    ident = f"{plot.id}-{size.name}"
    parts = [
        f'<svg class="plot {size.name}" role="img" aria-labelledby="{ident}-t {ident}-d" '
        f'viewBox="0 0 {size.width} {height}" width="{size.width}" height="{height}" '
        'xmlns="http://www.w3.org/2000/svg">',
        f'<title id="{ident}-t">{escape(plot.title)}</title><desc id="{ident}-d">{escape(plot.description)}</desc>',
        _axes(plot, frame, size),
        "".join(_rule(rule, frame) for rule in plot.rules),
        # A nested svg clips at the frame without needing an id that would have to be unique.
        f'<svg x="{frame.left}" y="{frame.top}" width="{_n(frame.right - frame.left)}" '
        f'height="{_n(frame.bottom - frame.top)}" '
        f'viewBox="{frame.left} {frame.top} {_n(frame.right - frame.left)} {_n(frame.bottom - frame.top)}">',
        "".join(_band(series, frame) for series in plot.series if not series.whiskers),
        "".join(_line(series, frame) for series in plot.series if series.line),
        "</svg>",
        "".join(_markers(series, frame) for series in plot.series if series.marker),
        _above(plot, frame),
        _labels(plot, frame, size),
        _hits(plot, frame, size),
        "</svg>",
    ]
    return "".join(parts)


def _n(value: float) -> str:
    """A coordinate: a tenth of a px is finer than any screen shows."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def _frame(plot: Plot, size: Size) -> Frame:
    top = 40.0 if any(rule.label for rule in plot.rules) else 26.0
    bottom = size.height - (53.0 if plot.hits else 40.0)
    low, high = plot.y.bounds or data_bounds(
        [column for s in plot.series for column in (s.y, s.low, s.high) if column is not None]
    )
    y = (log_scale if plot.y.kind == "log" else nice_scale)(low, high, bottom, top, 5 if size.height > 200 else 3)
    widest = max((len(plot.y.text(tick)) for tick in y.ticks), default=1)
    left = round(10 + CHARACTER * widest)
    right = float(size.width - (size.labels if any(s.label for s in plot.series) else 14))
    low, high = plot.x.bounds or data_bounds([s.x for s in plot.series])
    if plot.x.kind == "log":
        x = log_scale(low, high, left + 12, right - 12, 12 if size.width > 500 else 7)
    else:
        x = nice_scale(low, high, left, right, 7 if size.width > 500 else 4, exact=True)
    if plot.x.ticks is not None:
        x = replace(x, ticks=plot.x.ticks)
    return Frame(x, y, left, right, top, bottom)


def data_bounds(columns: Sequence[Floats]) -> tuple[float, float]:
    """Least and greatest finite value of all columns; (0, 1) when there is none."""
    finite = [column[np.isfinite(column)] for column in columns]
    values = np.concatenate(finite) if finite else np.empty(0)
    return (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)


def _axes(plot: Plot, frame: Frame, size: Size) -> str:
    parts = ['<g class="axes" aria-hidden="true">']
    for tick in frame.y.ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{_n(frame.left)}" x2="{_n(frame.right)}" y1="{_n(y)}" y2="{_n(y)}"/>')
        parts.append(
            f'<text x="{_n(frame.left - 6)}" y="{_n(y + 4)}" text-anchor="end">{escape(plot.y.text(tick))}</text>'
        )
    free = -math.inf
    for tick in frame.x.ticks:
        x, text = frame.x(tick), plot.x.text(tick)
        half = CHARACTER * len(text) / 2
        if x - half < free:
            continue
        free = x + half + 6
        anchor = "end" if x + half > size.width else "middle"
        parts.append(
            f'<line class="tick" x1="{_n(x)}" x2="{_n(x)}" y1="{_n(frame.bottom)}" y2="{_n(frame.bottom + 4)}"/>'
        )
        parts.append(f'<text x="{_n(x)}" y="{_n(frame.bottom + 17)}" text-anchor="{anchor}">{escape(text)}</text>')
    parts.append(
        f'<line class="base" x1="{_n(frame.left)}" x2="{_n(frame.right)}" y1="{_n(frame.bottom)}" '
        f'y2="{_n(frame.bottom)}"/>'
    )
    parts.append(f'<text class="title" x="0" y="12">{escape(plot.y.title)}</text>')
    parts.append(
        f'<text class="title" x="{_n(frame.right)}" y="{_n(frame.bottom + 33)}" text-anchor="end">'
        f"{escape(plot.x.title)}</text>"
    )
    return "".join(parts) + "</g>"


def _rule(rule: Rule, frame: Frame) -> str:
    x = frame.x(rule.x)
    if not frame.left - 1 <= x <= frame.right + 1:
        return ""
    until = frame.right if math.isnan(rule.until) else frame.x(rule.until)
    room = max(2, int((until - x - 6) / BOLD_CHARACTER))
    label = rule.label if len(rule.label) <= room else clipped(rule.short or rule.label, room)
    line = (
        f'<line class="rule" x1="{_n(x)}" x2="{_n(x)}" y1="{_n(frame.top - 12)}" y2="{_n(frame.bottom)}"/>'
        if rule.line
        else ""
    )
    return (
        f'<g class="{rule.tone}">{line}'
        f'<text class="name" x="{_n(x + 4)}" y="{_n(frame.top - 4)}"><title>{escape(rule.label)}</title>'
        f"{escape(label)}</text></g>"
    )


def _runs(*columns: Floats) -> list[slice]:
    """The stretches in which all columns are finite."""
    good = np.concatenate([[False], np.logical_and.reduce([np.isfinite(column) for column in columns]), [False]])
    edges = np.flatnonzero(good[1:] != good[:-1])
    return [slice(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def _points(xs: Floats, ys: Floats, frame: Frame, dodge: float) -> str:
    return " ".join(f"{_n(frame.x(x) + dodge)},{_n(frame.y(y))}" for x, y in zip(xs.tolist(), ys.tolist(), strict=True))


def _band(series: Series, frame: Frame) -> str:
    if series.low is None or series.high is None:
        return ""
    parts = []
    for run in _runs(series.low, series.high):
        upper = _points(series.x[run], series.high[run], frame, series.dodge)
        lower = _points(series.x[run][::-1], series.low[run][::-1], frame, series.dodge)
        parts.append(f'<polygon class="band {series.tone}" points="{upper} {lower}"/>')
    return "".join(parts)


def _line(series: Series, frame: Frame) -> str:
    parts = []
    for run in _runs(series.y):
        x, y = series.x[run], series.y[run]
        inside = int(np.searchsorted(x, series.solid_until, side="right"))
        if inside > 0:
            parts.append(
                f'<polyline class="line {series.tone}" '
                f'points="{_points(x[:inside], y[:inside], frame, series.dodge)}"/>'
            )
        if inside < len(x):
            start = max(0, inside - 1)
            parts.append(
                f'<polyline class="line past {series.tone}" '
                f'points="{_points(x[start:], y[start:], frame, series.dodge)}"/>'
            )
    return "".join(parts)


SHAPES = {
    "circle": '<circle class="mark{0}" cx="{1}" cy="{2}" r="3.6"/>',
    "square": '<rect class="mark{0}" x="{1}" y="{2}" width="6.6" height="6.6" transform="translate(-3.3 -3.3)"/>',
    "diamond": '<path class="mark{0}" d="M0,-4.6 L4.6,0 L0,4.6 L-4.6,0 Z" transform="translate({1} {2})"/>',
    "triangle": '<path class="mark{0}" d="M-4.2,3.4 H4.2 L0,-4.2 Z" transform="translate({1} {2})"/>',
}


def _markers(series: Series, frame: Frame) -> str:
    parts = [f'<g class="{series.tone}">']
    for i in np.flatnonzero(np.isfinite(series.y)):
        x, y = frame.x(float(series.x[i])) + series.dodge, frame.y(float(series.y[i]))
        if y < frame.top - 0.5:
            continue
        if series.whiskers and series.low is not None and series.high is not None:
            ends = [
                min(max(frame.y(float(bound)), frame.top), frame.bottom)
                for bound in (series.low[i], series.high[i])
                if math.isfinite(bound)
            ]
            if len(ends) == 2:
                parts.append(f'<line class="whisker" x1="{_n(x)}" x2="{_n(x)}" y1="{_n(ends[0])}" y2="{_n(ends[1])}"/>')
        parts.append(SHAPES[series.marker].format(" past" if series.x[i] > series.solid_until else "", _n(x), _n(y)))
    return "".join(parts) + "</g>"


def _above(plot: Plot, frame: Frame) -> str:
    """Points above the frame: an arrow at its edge with the value each stands for, one under the other."""
    rows: dict[float, int] = {}
    parts = []
    for series in plot.series:
        if not series.marker:
            continue
        for i in np.flatnonzero(np.isfinite(series.y)):
            value, x = float(series.y[i]), frame.x(float(series.x[i]))
            if frame.y(value) < frame.top - 0.5:
                row = rows[x] = rows.get(x, 0) + 1
                anchor = "end" if x > frame.right - 30 else "start" if x < frame.left + 30 else "middle"
                at = min(x, frame.right)
                parts.append(
                    f'<text class="name above {series.tone}" x="{_n(at)}" y="{_n(frame.top + LINE_HEIGHT * row - 2)}" '
                    f'text-anchor="{anchor}">↑ {value:.2f}</text>'
                )
    return "".join(parts)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places nearest to `wanted` in the same order, at least `gap` apart and within low..high.

    When they cannot all fit they are spaced evenly.
    """
    if not wanted:
        return []
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    placed: list[float] = []
    for i in order:
        at = min(max(wanted[i], low), high)
        placed.append(max(at, placed[-1] + gap) if placed else at)
    limit = high
    for at in range(len(placed) - 1, -1, -1):
        placed[at] = min(placed[at], limit)
        limit = placed[at] - gap
    result = [0.0] * len(wanted)
    for i, y in zip(order, placed, strict=True):
        result[i] = y
    return result


def _labels(plot: Plot, frame: Frame, size: Size) -> str:
    """The names of the lines at their right ends, moved apart where they would overlap."""
    named = [(s, np.flatnonzero(np.isfinite(s.y))) for s in plot.series if s.label]
    named = [(s, good) for s, good in named if good.size]
    ends = [min(max(frame.y(float(s.y[good[-1]])), frame.top), frame.bottom) for s, good in named]
    room = int((size.width - frame.right - 8) / BOLD_CHARACTER)
    parts = []
    for (series, _), y in zip(named, spread(ends, LINE_HEIGHT, frame.top, frame.bottom), strict=True):
        text = escape(clipped(series.label, room))
        parts.append(
            f'<g class="{series.tone}"><text class="name" x="{_n(frame.right + 8)}" y="{_n(y + 4)}">'
            f"<title>{escape(series.name)}</title>{text}</text></g>"
        )
    return "".join(parts)


def _hits(plot: Plot, frame: Frame, size: Size) -> str:
    """Upright strips that light up under the pointer and say what is there."""
    if not plot.hits:
        return ""
    step = -(-len(plot.hits) // (MOST_HITS if size.width > 500 else MOST_HITS // 2))
    hits = plot.hits[step // 2 :: step]
    xs = [frame.x(hit.x) for hit in hits]
    edges = [frame.left, *((a + b) / 2 for a, b in pairwise(xs)), frame.right]
    room = int(size.width / CHARACTER)
    parts = ['<g class="hits">']
    for hit, x, start, stop in zip(hits, xs, edges[:-1], edges[1:], strict=True):
        parts.append(
            f'<g class="hit"><title>{escape(hit.text)}</title>'
            f'<rect x="{_n(start)}" y="{_n(frame.top)}" width="{_n(max(0.0, stop - start))}" '
            f'height="{_n(frame.bottom - frame.top)}"/>'
            f'<line x1="{_n(x)}" x2="{_n(x)}" y1="{_n(frame.top)}" y2="{_n(frame.bottom)}"/>'
            f'<text x="0" y="{size.height - 3}">{escape(clipped(hit.text, room))}</text></g>'
        )
    return "".join(parts) + "</g>"


@dataclass(frozen=True)
class Interval:
    """One row of an interval plot: a difference with its 95 % interval."""

    label: str
    value: float
    low: float
    high: float
    text: str
    """The same in numbers, written at the right."""


def draw_intervals(ident: str, title: str, x_title: str, rows: Sequence[Interval], tone: str, size: Size) -> str:
    """Differences as dots with whiskers around an upright line at 0; below 0 is better."""
    row_height, top, bottom = 30.0, 22.0, 40.0
    height = round(top + bottom + row_height * len(rows))
    left = round(16 + CHARACTER * max(len(row.label) for row in rows))
    wide = size.width > 500
    right = size.width - (round(16 + CHARACTER * max(len(row.text) for row in rows)) if wide else 12)
    low, high = data_bounds([np.asarray([0.0, row.value, row.low, row.high]) for row in rows])
    scale = nice_scale(low, high, left + 8, right, 6 if wide else 3)
    description = "; ".join(f"{row.label}: {row.text}" for row in rows)
    name = f"{ident}-{size.name}"
    parts = [
        f'<svg class="plot {size.name}" role="img" aria-labelledby="{name}-t {name}-d" viewBox="0 0 {size.width} '
        f'{height}" '
        f'width="{size.width}" height="{height}" xmlns="http://www.w3.org/2000/svg">',
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc><g class="axes">',
    ]
    base = top + row_height * len(rows)
    for tick in scale.ticks:
        x, kind = scale(tick), "zero" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{_n(x)}" x2="{_n(x)}" y1="{top}" y2="{base}"/>')
        parts.append(f'<text x="{_n(x)}" y="{base + 16}" text-anchor="middle">{signed_tick(tick)}</text>')
    parts.append(f'<text class="title" x="{_n(scale(0) - 8)}" y="14" text-anchor="end">← better</text>')
    if scale.high > 0 and right - scale(0) > 60:
        parts.append(f'<text class="title" x="{_n(scale(0) + 8)}" y="14">worse →</text>')
    parts.append(
        f'<text class="title" x="{right}" y="{base + 33}" text-anchor="end">{escape(x_title)}</text></g><g '
        f'class="{tone}">'
    )
    for i, row in enumerate(rows):
        y = top + row_height * (i + 0.5)
        parts.append(f'<text class="plain" x="0" y="{_n(y + 4)}">{escape(row.label)}</text>')
        if wide:
            parts.append(
                f'<text class="plain" x="{size.width}" y="{_n(y + 4)}" text-anchor="end">{escape(row.text)}</text>'
            )
        if math.isfinite(row.low) and math.isfinite(row.high):
            parts.append(
                f'<line class="whisker wide" x1="{_n(scale(row.low))}" x2="{_n(scale(row.high))}" y1="{_n(y)}" '
                f'y2="{_n(y)}"/>'
            )
        if math.isfinite(row.value):
            parts.append(SHAPES["circle"].format("", _n(scale(row.value)), _n(y)))
        parts.append(f"<title>{escape(f'{row.label}: {row.text}')}</title>")
    return "".join(parts) + "</g></svg>"


def signed_tick(value: float) -> str:
    return f"{value:+.3g}".replace("-", "\N{MINUS SIGN}") if value else "0"
