"""The law of the stream in plain Python, a token at a time: the oracle the reader is held against.

It shares with the reader the two keyed permutations only (`document_order`, `permute`), whose own laws
`test_order.py` proves; streams, epochs, mixtures, rows, targets, segments and positions are done anew, the slow way.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import floor

import numpy as np

from xgen.data.order import derive_key, document_order, permute
from xgen.recipe.schema import Recipe

Rows = list[list[int]]


class SlowStream:
    """Tokens of a source's stream, written out as far as they are asked for."""

    def __init__(self, name: str, documents: list[list[int]], seed: int) -> None:
        self.name, self.documents, self.seed = name, documents, seed
        self.epoch_tokens = sum(map(len, documents))
        self.written: list[tuple[int, bool]] = []
        self.epochs = 0

    def read(self, start: int, count: int) -> list[tuple[int, bool]]:
        """(token, whether a document begins with it) from stream offset `start` on."""
        while len(self.written) < start + count:
            for document in document_order(self.seed, self.name, self.epochs, len(self.documents)):
                self.written += [(token, place == 0) for place, token in enumerate(self.documents[document])]
            self.epochs += 1
        return self.written[start : start + count]


def split_evenly(sequences: int, weights: Mapping[str, float]) -> list[str]:
    """The source of each sequence, by walking along and giving each source its due, first source first."""
    names = sorted(weights)
    sources = []
    for number in range(sequences):
        rest = number
        for place, name in enumerate(names):
            left = sum(Fraction(weights[other]) for other in names[place:])
            share = Fraction(round(Fraction(weights[name]) / left * 2**32), 2**32)
            before, after = floor(rest * share + Fraction(1, 2)), floor((rest + 1) * share + Fraction(1, 2))
            if after > before:
                sources.append(name)
                break
            rest -= before
    return sources


def slow_run(recipe: Recipe, documents: Mapping[str, list[list[int]]]) -> list[dict[str, Rows]]:
    """All batches of the run, in order: ids, targets, segments, positions. `documents` with their heads."""
    streams = {name: SlowStream(name, rows, recipe.data.seed) for name, rows in documents.items()}
    given = dict.fromkeys(streams, 0)
    batches = []
    for index, stage in enumerate(recipe.stages):
        sources = split_evenly(stage.steps * stage.sequences, stage.mixture)
        planned = split_evenly(-(-stage.tokens // stage.length), stage.mixture)
        starts = {
            name: _starts(streams[name], given[name], sources.count(name), planned.count(name), stage.length, index)
            for name in stage.mixture
        }
        used = dict.fromkeys(streams, 0)
        rows = []
        for source in sources:
            rows.append(streams[source].read(starts[source][used[source]], stage.length + 1))
            used[source] += 1
        for name, count in used.items():
            given[name] += count * stage.length
        for step in range(stage.steps):
            chosen = rows[step * stage.sequences : (step + 1) * stage.sequences]
            batches.append(_batch(chosen, recipe.data.document_mask))
    return batches


def _starts(stream: SlowStream, base: int, count: int, planned: int, length: int, stage: int) -> list[int]:
    """Stream offsets of a source's sequences in a stage, in the order they are given out."""
    starts = [base + number * length for number in range(count)]
    by_epoch: dict[int, list[int]] = {}
    for number in range(planned):
        by_epoch.setdefault(starts[number] // stream.epoch_tokens, []).append(number)
    shuffled = list(starts)
    for epoch, numbers in by_epoch.items():
        key = derive_key("sequences", stream.seed, stream.name, stage, epoch)
        order = permute(np.arange(len(numbers)), len(numbers), key)
        for number, other in zip(numbers, order, strict=True):
            shuffled[number] = starts[numbers[other]]
    return shuffled


def _batch(rows: list[list[tuple[int, bool]]], mask: bool) -> dict[str, Rows]:
    segments, positions = [], []
    for row in rows:
        segment, position = 0, 0
        of_row: tuple[list[int], list[int]] = ([], [])
        for column, (_, begins) in enumerate(row[:-1]):
            if begins and column > 0 and mask:
                segment, position = segment + 1, 0
            of_row[0].append(segment)
            of_row[1].append(position)
            position += 1
        segments.append(of_row[0])
        positions.append(of_row[1])
    return {
        "ids": [[token for token, _ in row[:-1]] for row in rows],
        "targets": [[token for token, _ in row[1:]] for row in rows],
        "segments": segments,
        "positions": positions,
    }
