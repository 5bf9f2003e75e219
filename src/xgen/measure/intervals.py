"""95 % intervals by bootstrap over documents, single and paired.

Documents are the unit that is drawn anew, because the tokens of one document are not independent. The
figure is a ratio of sums (loss by tokens), so a resample draws both. The intervals are percentile
intervals widened for few documents (T. Hesterberg, "What Teachers Should Know About the Bootstrap",
2015, section 5.3): plain ones use a variance (D - 1) / D too small and the normal's quantile in place
of Student's, and cover only 92 % or so at 20 documents.

They speak of other documents of the same kind, not of another training run with another seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from xgen.measure.losses import Floats

RESAMPLES = 10_000
COVERAGE = 0.95
CHUNK = 2_000_000
"""Draw counts held in memory at a time."""

Per = Literal["token", "document"]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval; the bounds are None when fewer than two documents bear on it."""

    value: float
    low: float | None
    high: float | None
    documents: int


def mean_interval(
    loss: Floats, tokens: Floats, *, per: Per = "token", resamples: int = RESAMPLES, seed: int = 1
) -> list[Interval]:
    """Mean loss of each column, from sums and counts [D, K].

    per "token": all tokens weigh alike (a corpus's loss); per "document": all documents do.
    """
    columns = loss.shape[1]
    loss, tokens = _weighted(loss, tokens, per)

    def ratio(sums: Floats) -> Floats:
        return _divide(sums[:, :columns], sums[:, columns:])

    return _intervals(np.hstack([loss, tokens]), ratio, (tokens > 0).sum(0), resamples, seed)


def difference_interval(
    before: Floats, after: Floats, tokens: Floats, *, per: Per = "token", resamples: int = RESAMPLES, seed: int = 1
) -> list[Interval]:
    """Mean loss `after` minus mean loss `before` on the same tokens, paired: both of a document are
    drawn together, so what is hard in a document cancels. Sums and counts [D, K]; negative is a gain.
    """
    return mean_interval(after - before, tokens, per=per, resamples=resamples, seed=seed)


def _weighted(loss: Floats, tokens: Floats, per: Per) -> tuple[Floats, Floats]:
    if per == "token":
        return loss, tokens
    return np.where(tokens > 0, _divide(loss, tokens), 0.0), (tokens > 0).astype(np.float64)


def _divide(loss: Floats, tokens: Floats) -> Floats:
    """NaN where there is no token."""
    quotient = np.full(loss.shape, np.nan)
    np.divide(loss, tokens, out=quotient, where=tokens > 0)
    return quotient


def _intervals(
    table: Floats, statistic: Callable[[Floats], Floats], documents: Floats, resamples: int, seed: int
) -> list[Interval]:
    values = statistic(table.sum(0, keepdims=True))[0]
    draws = statistic(_resample(table, resamples, seed))
    result = []
    for value, column, count in zip(values, draws.T, documents.tolist(), strict=True):
        if count < 2:
            result.append(Interval(float(value), None, None, count))
            continue
        tail = _tail(count)
        # A resample that drew no token of a sparse bin says nothing about it.
        low, high = np.quantile(column[~np.isnan(column)], [tail, 1 - tail])
        result.append(Interval(float(value), float(low), float(high), count))
    return result


def _resample(table: Floats, resamples: int, seed: int) -> Floats:
    """Column sums of `table` [D, M] over `resamples` draws of D documents with replacement: [resamples, M]."""
    generator = np.random.default_rng(seed)
    count = len(table)
    even = np.full(count, 1 / max(count, 1))
    rows = max(1, CHUNK // max(count, 1))
    sizes = [min(rows, resamples - done) for done in range(0, resamples, rows)]
    return np.concatenate([generator.multinomial(count, even, size).astype(np.float64) @ table for size in sizes])


def _tail(documents: int) -> float:
    """Share of resamples left out on either side: Student's quantile, corrected by sqrt(D / (D - 1))."""
    freedom = documents - 1
    z = NormalDist().inv_cdf((1 + COVERAGE) / 2)
    # Cornish and Fisher's expansion of Student's quantile (Abramowitz and Stegun 26.7.5).
    student = (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
    return NormalDist().cdf(-student * (documents / freedom) ** 0.5)
