"""Losses of a model on held-out documents, as sums per document, from any scorer of fixed batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xgen.errors import DataError, NonFiniteError
from xgen.measure import windows
from xgen.measure.windows import Ints, Windows

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]

Score = Callable[[Ids, Ids, Ids, Ids], npt.NDArray[np.float32]]
"""(ids, targets, positions, segments), each [B, S], to each target's loss in nats [B, S].

Called with one shape per context only: `rows_per_batch(context)` rows. Padding has a segment of its
own (1, where text has 0) and lies to the right; what the scorer gives for it is never looked at.
"""

Advance = Callable[[int], None]
"""Told after every call of the scorer how many ids it was given."""


@dataclass(frozen=True)
class Sums:
    """Per document: summed loss in nats and count of the tokens scored; [D], or [D, bins] by position."""

    loss: Floats
    tokens: Floats


@dataclass(frozen=True)
class StridedSums(Sums):
    """`bytes` [D]: bytes of the tokens scored."""

    bytes: Floats


def strided_loss(
    score: Score,
    documents: Sequence[Ids],
    context: int,
    stride: int,
    byte_lengths: Ids,
    advance: Advance | None = None,
) -> StridedSums:
    """Loss of every token but the leading end-of-texts, each once, with up to `context` ids to its left.

    `byte_lengths` [vocabulary] are the bytes each id stands for; control tokens stand for none.
    """
    plan = windows.strided([len(ids) for ids in documents], context, stride)
    sums = _accumulate(score, documents, plan, [1], advance)
    return StridedSums(sums.loss[:, 0], sums.tokens[:, 0], document_bytes(documents, byte_lengths))


def loss_by_position(
    score: Score,
    documents: Sequence[Ids],
    length: int,
    seed: int = 1,
    advance: Advance | None = None,
    since: int | None = None,
) -> Sums:
    """Loss in the bins of `position_bins(length, since)` of windows of `length` ids at random offsets: [D, bins].

    The offsets depend on `seed` and the count of documents only, so every model is asked the same.
    """
    offsets = windows.random_offsets(len(documents), length, seed)
    plan = windows.by_position([len(ids) for ids in documents], length, offsets)
    return _accumulate(score, documents, plan, [first for first, _ in windows.position_bins(length, since)], advance)


def fixed_target_loss(
    score: Score,
    documents: Sequence[Ids],
    contexts: Sequence[int],
    target: int,
    spans: int,
    seed: int = 1,
    advance: Advance | None = None,
) -> dict[int, Sums]:
    """Loss of the same target tokens with ever more text to their left, by context.

    A context is the whole window the model sees, the target tokens included: the first token of a
    span is predicted from context - target + 1 ids, the last one from `context`.
    """
    plans = windows.fixed_target([len(ids) for ids in documents], contexts, target, spans, seed)
    result = {}
    for context, plan in plans.items():
        sums = _accumulate(score, documents, plan, [1], advance)
        result[context] = Sums(sums.loss[:, 0], sums.tokens[:, 0])
    return result


def document_bytes(documents: Sequence[Ids], byte_lengths: Ids) -> Floats:
    """Bytes of each document's tokens, its leading end-of-text left out: [D]."""
    for number, ids in enumerate(documents):
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < len(byte_lengths):
            raise DataError(
                f"held-out document {number} has ids {int(ids.min())} to {int(ids.max())}, "
                f"but the tokenizer has {len(byte_lengths)}; prepare the store with the run's tokenizer"
            )
    return np.array([byte_lengths[ids[1:]].sum(dtype=np.int64) for ids in documents], np.float64)


def _accumulate(
    score: Score,
    documents: Sequence[Ids],
    plan: Windows,
    bins: list[int],
    advance: Advance | None,
) -> Sums:
    """Sums [documents, bins] of the tokens scored, in float64; a bin begins at so many ids predicted from."""
    shape = len(documents), len(bins)
    size = shape[0] * shape[1]
    loss, tokens = np.zeros(size), np.zeros(size)
    for document, seen, losses in _scored(score, documents, plan, advance):
        cell = document * len(bins) + np.searchsorted(bins, seen, side="right") - 1
        loss += np.bincount(cell, losses, size)
        tokens += np.bincount(cell, minlength=size)
    return Sums(loss.reshape(shape), tokens.reshape(shape))


def _scored(
    score: Score, documents: Sequence[Ids], plan: Windows, advance: Advance | None
) -> Iterator[tuple[Ints, Ints, Floats]]:
    """Batch after batch: (document, count of ids predicted from, loss in nats) of the tokens scored."""
    text = np.concatenate([np.asarray(ids, np.int32) for ids in documents]) if documents else np.zeros(0, np.int32)
    origin = np.cumsum([0, *(len(ids) for ids in documents)])
    rows, column = windows.rows_per_batch(plan.context), np.arange(plan.context)
    for begin in range(0, len(plan), rows):
        batch = slice(begin, begin + rows)
        document, start, stop = plan.document[batch], plan.start[batch], plan.stop[batch]
        token = start[:, None] + 1 + column
        inside = token <= stop[:, None]
        place = np.where(inside, origin[document][:, None] + token, 1)
        ids, targets, segments = (np.zeros((rows, plan.context), np.int32) for _ in range(3))
        used = len(document)
        ids[:used] = np.where(inside, text[place - 1], 0)
        targets[:used] = np.where(inside, text[place], 0)
        segments[:] = 1
        segments[:used] = ~inside
        positions = np.ascontiguousarray(np.broadcast_to(column.astype(np.int32), ids.shape))
        losses = np.asarray(score(ids, targets, positions, segments))
        if losses.shape != ids.shape:
            raise ValueError(f"the scorer gave losses of shape {losses.shape} for ids of shape {ids.shape}")
        row, col = np.nonzero((token >= plan.first[batch][:, None]) & (token < plan.last[batch][:, None]))
        chosen = losses[row, col].astype(np.float64)
        if not np.isfinite(chosen).all():
            raise NonFiniteError(
                f"the loss of a held-out token at context {plan.context} is {chosen[~np.isfinite(chosen)][0]}; "
                "the checkpoint's weights or the compute precision are at fault"
            )
        yield document[row], col + 1, chosen
        if advance is not None:
            advance(ids.size)
