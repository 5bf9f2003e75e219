"""What training made of a model that was continued: the same tokens scored before and after, below and past the length
that the model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np

from xgen.measure.intervals import Interval, difference_interval, mean_interval
from xgen.measure.losses import Floats, Sums


class Change(TypedDict):
    """Loss less that of an earlier checkpoint on the same tokens, paired over documents: negative is a gain."""

    against: str
    difference: float
    low: float | None
    high: float | None


SinceStart = TypedDict(
    "SinceStart",
    {
        "checkpoint": str,
        "measure": Literal["by_position", "fixed_target"],
        "from": int,
        "to": int,
        "loss": float,
        "low": float | None,
        "high": float | None,
        "documents": int,
        "tokens": int,
        "changes": list[Change],
    },
)
"""Tokens predicted from at least `from` ids and fewer than `to`; a change for every checkpoint before this one."""


@dataclass(frozen=True)
class Kept:
    """One checkpoint's sums: in the bins of `position_bins`, and of the fixed targets by context."""

    by_position: Sums
    targets: Mapping[int, Sums]


def since_start(
    kept: Mapping[str, Kept], bins: Sequence[tuple[int, int]], length: int, target: int
) -> list[SinceStart]:
    """Every checkpoint of `kept`, oldest first: in the bins below `length`, in those from it on, at each context."""
    end = bins[-1][1] + 1
    split = sum(first < length for first, _ in bins)
    parts = {(1, min(length, end)): slice(0, split), (length, end): slice(split, None)}
    parts = {span: columns for span, columns in parts.items() if len(bins[columns])}
    contexts = list(next(iter(kept.values())).targets)
    return [
        *_rows(
            "by_position",
            list(parts),
            {name: [_part(one.by_position, columns) for columns in parts.values()] for name, one in kept.items()},
        ),
        *_rows(
            "fixed_target",
            [(context - target + 1, context + 1) for context in contexts],
            {name: list(one.targets.values()) for name, one in kept.items()},
        ),
    ]


def _part(sums: Sums, columns: slice) -> Sums:
    return Sums(sums.loss[:, columns].sum(1), sums.tokens[:, columns].sum(1))


def _rows(
    measure: Literal["by_position", "fixed_target"], spans: list[tuple[int, int]], found: dict[str, list[Sums]]
) -> list[SinceStart]:
    """The rows of one measure, a column of sums a span. Every checkpoint was asked the same tokens."""
    tokens = np.stack([one.tokens for one in next(iter(found.values()))], 1)
    used = tokens.any(axis=1)
    if not used.any():
        return []
    tokens = tokens[used]
    losses: dict[str, Floats] = {name: np.stack([one.loss for one in sums], 1)[used] for name, sums in found.items()}
    rows = []
    for at, (name, loss) in enumerate(losses.items()):
        earlier = list(losses.items())[:at]
        changes = [(other, difference_interval(before, loss, tokens)) for other, before in earlier]
        for column, ((start, stop), mean) in enumerate(zip(spans, mean_interval(loss, tokens), strict=True)):
            rows.append(
                SinceStart(
                    {
                        "checkpoint": name,
                        "measure": measure,
                        "from": start,
                        "to": stop,
                        "loss": mean.value,
                        "low": mean.low,
                        "high": mean.high,
                        "documents": mean.documents,
                        "tokens": int(tokens[:, column].sum()),
                        "changes": [_change(other, differences[column]) for other, differences in changes],
                    }
                )
            )
    return rows


def _change(against: str, change: Interval) -> Change:
    return Change(against=against, difference=change.value, low=change.low, high=change.high)
