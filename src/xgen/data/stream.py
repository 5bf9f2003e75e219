"""The endless stream of one source: its training documents in one order after the other, an epoch each.

A stream is never written down: `tokens` computes any stretch of it from the store and the seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xgen.data.order import Integers, derive_key, document_order, permute
from xgen.data.store import Split

_EPOCHS_KEPT = 2
"""Orders held in memory for each source, 16 bytes a document: a batch at an epoch's end needs two."""


@dataclass(frozen=True)
class _Epoch:
    order: Integers
    """[documents] the document at each rank"""
    starts: Integers
    """[documents + 1] where in the epoch each rank starts"""


@dataclass(frozen=True)
class Pieces:
    """Stretches of documents, in the order in which they fill the asked rows: arrays [pieces]."""

    target: Integers
    """where each piece starts among the asked tokens, rows one after the other"""
    count: Integers
    """its tokens"""
    stored: Integers
    """where it starts in the store's tokens"""
    document: Integers
    offset: Integers
    """where it starts within its document; 0 is the end-of-text id at the head"""


class Stream:
    """The stream of a source: any sequence of it by its number, in closed form."""

    def __init__(self, name: str, split: Split, seed: int) -> None:
        self.name = name
        self.split = split
        self.seed = seed
        self.epoch_tokens = split.token_count
        self._epoch = lru_cache(maxsize=_EPOCHS_KEPT)(self._make_epoch)

    def starts(self, number: Integers, base: int, planned: int, length: int, stage: int) -> Integers:
        """Where in the stream the sequences `number` of a stage start.

        The stage covers the stream from `base` on in sequences of `length`, of which `planned` lie within its
        tokens. Those that start in the same epoch change places by a keyed permutation, so that a long
        document does not fill one batch; those beyond `planned`, which only round the stage up to whole
        batches, stay where they are, so that a change of batch moves no other sequence.
        """
        placed = number.copy()
        epochs = (base + number * length) // self.epoch_tokens
        for epoch in np.unique(epochs[number < planned]).tolist():
            first = max(0, -(-(epoch * self.epoch_tokens - base) // length))
            last = min(planned, -(-((epoch + 1) * self.epoch_tokens - base) // length))
            mine = (epochs == epoch) & (number < planned)
            key = derive_key("sequences", self.seed, self.name, stage, epoch)
            placed[mine] = first + permute(number[mine] - first, last - first, key)
        return base + placed * length

    def pieces(self, starts: Integers, count: int) -> Pieces:
        """What `count` tokens from each of the stream offsets `starts` consist of.

        `count` is at most the tokens of an epoch, so a row ends in the epoch after its own at the latest.
        """
        rows = np.arange(len(starts), dtype=np.int64) * count
        epochs, local = np.divmod(starts, self.epoch_tokens)
        stop = np.minimum(local + count, self.epoch_tokens)
        over = np.flatnonzero(local + count > self.epoch_tokens)
        targets = np.concatenate([rows, rows[over] + (stop - local)[over]])
        first = np.concatenate([local, np.zeros(len(over), np.int64)])
        last = np.concatenate([stop, (local + count - self.epoch_tokens)[over]])
        epochs = np.concatenate([epochs, epochs[over] + 1])
        found = [
            self._cut(self._epoch(epoch), targets[epochs == epoch], first[epochs == epoch], last[epochs == epoch])
            for epoch in np.unique(epochs).tolist()
        ]
        columns = [np.concatenate(column) for column in zip(*found, strict=True)]
        order = np.argsort(columns[0])
        return Pieces(*(column[order] for column in columns))

    def tokens(self, pieces: Pieces) -> NDArray[Any]:
        """The ids of `pieces`, one after the other."""
        total = int(pieces.count.sum())
        index = np.repeat(pieces.stored - pieces.target, pieces.count)
        index += np.arange(total, dtype=np.int64)
        return np.take(self.split.tokens, index)

    def _make_epoch(self, epoch: int) -> _Epoch:
        offsets = np.asarray(self.split.offsets)
        order = document_order(self.seed, self.name, epoch, self.split.documents)
        starts = np.zeros(len(order) + 1, np.int64)
        np.cumsum(np.diff(offsets)[order], out=starts[1:])
        return _Epoch(order, starts)

    def _cut(self, epoch: _Epoch, target: Integers, first: Integers, last: Integers) -> tuple[Integers, ...]:
        """Stretches first..last of an epoch, cut where documents meet: the columns of `Pieces`."""
        begin = np.searchsorted(epoch.starts, first, side="right") - 1
        end = np.searchsorted(epoch.starts, last, side="left")
        counts = end - begin
        row = np.repeat(np.arange(len(first)), counts)
        rank = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts - begin, counts)
        start = np.maximum(epoch.starts[rank], first[row])
        stop = np.minimum(epoch.starts[rank + 1], last[row])
        offset = start - epoch.starts[rank]
        document = epoch.order[rank]
        return target[row] + start - first[row], stop - start, self.split.offsets[document] + offset, document, offset
