"""From values to px, and the round numbers on the axes; honest thinning of long curves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scale:
    """Maps low..high to start..end px, linearly or by the logarithm; `ticks` lie within low..high."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def nice_scale(low: float, high: float, start: float, end: float, about: int, *, exact: bool = False) -> Scale:
    """A linear scale with about `about` round ticks; its bounds are ticks unless `exact`."""
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        room = abs(low) * 0.05 or 0.5
        low, high = low - room, high + room
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(multiple * power for multiple in (1, 2, 2.5, 5, 10) if multiple * power >= rough * 0.999)
    first, last = (
        (math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9))
        if exact
        else (math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9))
    )
    ticks = tuple(round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1))
    if exact:
        return Scale(low, high, start, end, ticks)
    return Scale(ticks[0], ticks[-1], start, end, ticks)


def log_scale(low: float, high: float, start: float, end: float, most: int) -> Scale:
    """A logarithmic scale with ticks at powers of two, at most about `most` of them."""
    if not high > low * (1 + 1e-9):
        low, high = low / 2, high * 2
    first, last = math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9)
    every = -(-(last - first + 1) // most)
    return Scale(low, high, start, end, tuple(2.0**power for power in range(first, last + 1, every)), log=True)


@dataclass(frozen=True)
class Thinned:
    """A curve in groups of `per_point` neighbours: where each group ends, and its mean, least and greatest value.

    Nothing is hidden by it: every value lies between `low` and `high` of its group. Values that
    are not finite are left out of their group; a group without any finite value is NaN.
    """

    x: Floats
    mean: Floats
    low: Floats
    high: Floats
    per_point: int


def thin(x: Floats, y: Floats, points: int) -> Thinned:
    """At most `points` groups of equal size (the last may be smaller) of the curve y over x."""
    per_point = max(1, -(-len(x) // points))
    groups = -(-len(x) // per_point)
    padded = np.full(groups * per_point, np.nan)
    padded[: len(y)] = np.where(np.isfinite(y), y, np.nan)
    table = padded.reshape(groups, per_point)
    known = np.isfinite(table)
    some = known.any(axis=1)
    total = np.where(known, table, 0.0).sum(axis=1)
    return Thinned(
        x=np.asarray(x, dtype=np.float64)[np.minimum(np.arange(1, groups + 1) * per_point, len(x)) - 1],
        mean=np.where(some, total / np.maximum(known.sum(axis=1), 1), np.nan),
        low=np.where(some, np.where(known, table, np.inf).min(axis=1, initial=np.inf), np.nan),
        high=np.where(some, np.where(known, table, -np.inf).max(axis=1, initial=-np.inf), np.nan),
        per_point=per_point,
    )
