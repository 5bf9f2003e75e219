"""Which tokens are scored, and with how much text to their left: pure planning on document lengths.

A document is its ids with a leading end-of-text, so a document of n ids has n - 1 tokens to score,
numbered 1 .. n - 1. A window feeds the ids [start, stop) and so predicts the tokens start + 1 .. stop;
of these it scores [first, last). No window reaches into another document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xgen.errors import RecipeError

Ints = npt.NDArray[np.int64]

BATCH_TOKENS = 16_384
"""Ids of one call of a scorer: enough to fill two cores, few enough for a laptop's memory."""


@dataclass(frozen=True)
class Windows:
    """Windows of at most `context` ids; one element of each array a window."""

    context: int
    document: Ints
    start: Ints
    stop: Ints
    first: Ints
    last: Ints

    def __len__(self) -> int:
        return len(self.document)

    @property
    def scored(self) -> int:
        """Tokens scored, all windows together."""
        return int((self.last - self.first).sum())

    @property
    def forward_tokens(self) -> int:
        """Ids that pass through the model, the padding of the last batch included."""
        rows = rows_per_batch(self.context)
        return -(-len(self) // rows) * rows * self.context


def rows_per_batch(context: int) -> int:
    """Rows of the one batch shape used for windows of `context` ids."""
    return max(1, BATCH_TOKENS // context)


def strided(lengths: Sequence[int], context: int, stride: int) -> Windows:
    """Every token of every document exactly once, in windows that advance by `stride`.

    A document's first window begins with it and scores everything in it; each later window ends
    `stride` tokens after the one before (the last one at the document's end) and scores only what is
    new, so that a token has at least `context - stride + 1` ids to its left, or its whole document.
    """
    _positive(context=context, stride=stride)
    if stride > context:
        raise RecipeError(
            f"evaluation.stride: {stride} tokens, but windows of {context} would leave gaps; at most {context}"
        )
    parts = []
    for document, length in enumerate(lengths):
        tokens = length - 1
        if tokens < 1:
            continue
        stop = np.append(np.arange(context, tokens, stride, dtype=np.int64), tokens)
        first = np.concatenate([[1], stop[:-1] + 1])
        parts.append(_part(document, np.maximum(stop - context, 0), stop, first, stop + 1))
    return _join(context, parts)


def by_position(lengths: Sequence[int], length: int, offsets: Sequence[int]) -> Windows:
    """Full windows of `length` ids that tile each document from its offset in [0, length).

    Scored are the tokens that lie at least a window away from both ends: exactly those that could
    stand at any position of a window. With offsets drawn uniformly every such token is equally
    likely at every position, so title pages and closing formulas cannot pass for an effect of
    position. A document of fewer than two windows has no such token and is left out.
    """
    _positive(length=length)
    parts = []
    for document, (size, offset) in enumerate(zip(lengths, offsets, strict=True)):
        start = np.arange(offset, size - length, length, dtype=np.int64)
        first = np.maximum(start + 1, length)
        last = np.minimum(start + length + 1, size - length + 1)
        keep = first < last
        parts.append(_part(document, start[keep], start[keep] + length, first[keep], last[keep]))
    return _join(length, parts)


def random_offsets(documents: int, length: int, seed: int) -> list[int]:
    """For each document an offset in [0, length), the same for every model that is asked with this seed."""
    return [int(offset) for offset in np.random.default_rng(seed).integers(0, length, documents)]


def fixed_target(
    lengths: Sequence[int], contexts: Sequence[int], target: int, spans: int, seed: int
) -> dict[int, Windows]:
    """The same target spans under every context: windows of exactly `context` ids that end together.

    Up to `spans` spans of `target` tokens a document, disjoint and spread over all places that have
    max(contexts) ids to the left of the span's end. A shorter document has no such place and is left
    out for every context alike.
    """
    _positive(target=target, spans=spans)
    if target >= min(contexts):
        raise RecipeError(
            f"evaluation.target: {target} tokens leave nothing to their left in a context of {min(contexts)}; "
            f"at most {min(contexts) - 1}"
        )
    longest = max(contexts)
    generator = np.random.default_rng(seed)
    ends = []
    for document, size in enumerate(lengths):
        places = (size - 1 - longest) // target + 1 if size > longest else 0
        chosen = _spread(places, spans, generator)
        ends.append((document, longest + chosen * target))
    return {
        context: _join(
            context, [_part(document, end - context, end, end - target + 1, end + 1) for document, end in ends]
        )
        for context in contexts
    }


def position_bins(length: int, since: int | None = None) -> list[tuple[int, int]]:
    """Bins (from, to), both inclusive, of the count of ids a token is predicted from (1 .. length).

    Each begins at a power of two below `length`; what lies from `since` on is cut into four more at least. The last one
    ends at `length`.
    """
    starts = [1]
    while starts[-1] * 2 < length:
        starts.append(starts[-1] * 2)
    if since is not None and since < length:
        starts = sorted({*starts, *(since + (length - since) * part // 4 for part in range(4))})
    return list(zip(starts, [start - 1 for start in starts[1:]] + [length], strict=True))


def _spread(places: int, wanted: int, generator: np.random.Generator) -> Ints:
    """At most `wanted` distinct numbers below `places`, one drawn from each of equally wide strata."""
    count = min(places, wanted)
    if count == 0:
        return np.zeros(0, np.int64)
    edges = np.arange(count + 1, dtype=np.int64) * places // count
    return generator.integers(edges[:-1], edges[1:])


def _part(document: int, start: Ints, stop: Ints, first: Ints, last: Ints) -> tuple[Ints, ...]:
    return np.full(len(start), document, np.int64), start, stop, first, last


def _join(context: int, parts: list[tuple[Ints, ...]]) -> Windows:
    empty = tuple(np.zeros(0, np.int64) for _ in range(5))
    return Windows(context, *(np.concatenate(column) for column in zip(empty, *parts, strict=True)))


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise RecipeError(f"evaluation: {name} must be at least 1, not {value}")
