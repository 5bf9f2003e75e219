"""What the engine has done so far, counted."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

REASONS = ("stop", "length", "cancelled", "failed")
"""How requests end."""

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper bounds of the histograms' buckets, from a step of a tiny model to a long prompt behind others."""

SECONDS_A_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` values were at most `bounds[i]` and above the bound before it; the last count is of those above all.
    `total` is the sum of the values."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


@dataclass(frozen=True)
class Statistics:
    """The engine at one moment, and all that it did until then. Times are in seconds, and wall time.

    `pages_used` are held by rows, `pages_cached` by the prefix cache alone. `prompt_tokens` came into the cache, of
    which `cached_tokens` were there from an earlier request. `finished` counts requests by their finish reason, and
    those that "failed". A `rejected` request was never taken in. `computed_tokens` went through `prefill_calls`,
    recomputed ones included; `decoded_rows` through `decode_calls`. `queue_seconds` run from a request's arrival to its
    slot, `first_token_seconds` to its first token, `request_seconds` to its end; `token_seconds` are those from its
    first token to its end, for each token after the first.
    """

    slots: int
    running: int
    waiting: int
    pages_total: int
    pages_used: int
    pages_cached: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    finished: Mapping[str, int]
    rejected: int
    preemptions: int
    steps: int
    prefill_calls: int
    computed_tokens: int
    prefill_seconds: float
    decode_calls: int
    decoded_rows: int
    decode_seconds: float
    queue_seconds: Histogram
    first_token_seconds: Histogram
    token_seconds: Histogram
    request_seconds: Histogram


class _Buckets:
    """A histogram that is being filled."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def now(self) -> Histogram:
        return Histogram(self._bounds, tuple(self._counts), self._total)


@dataclass
class Meter:
    """The counts of `Statistics` as they grow."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    preemptions: int = 0
    steps: int = 0
    prefill_calls: int = 0
    computed_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_calls: int = 0
    decoded_rows: int = 0
    decode_seconds: float = 0.0
    queue_seconds: _Buckets = field(default_factory=lambda: _Buckets(SECONDS))
    first_token_seconds: _Buckets = field(default_factory=lambda: _Buckets(SECONDS))
    token_seconds: _Buckets = field(default_factory=lambda: _Buckets(SECONDS_A_TOKEN))
    request_seconds: _Buckets = field(default_factory=lambda: _Buckets(SECONDS))

    def snapshot(self, **state: Any) -> Statistics:
        """The counts by now; `state` gives the fields that are none."""
        counts: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        counts |= {name: value.now() for name, value in counts.items() if isinstance(value, _Buckets)}
        counts["finished"] = {reason: self.finished[reason] for reason in REASONS}
        return Statistics(**counts, **state)
