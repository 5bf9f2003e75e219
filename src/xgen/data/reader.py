"""The batch as a pure function of the recipe and the token position.

The law of the stream: a source's stream is its training documents in a seeded order, epoch after epoch, each
document with the end-of-text id at its head. A stage takes from each source the next stretch of its stream in
sequences of its own length: sequence j reads length + 1 tokens, of which the first `length` are inputs and
the last `length` targets. So every token is an input exactly once an epoch, the target after a
document's last token is the next document's end-of-text, and nothing needs to be masked out of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from xgen.data.order import Integers, source_counts, source_of
from xgen.data.store import Store
from xgen.data.stream import Pieces, Stream
from xgen.errors import DataError
from xgen.recipe.schema import Recipe, Stage


@dataclass(frozen=True)
class Batch:
    """N sequences of L tokens. `segments` number the documents within a row, from 0; `positions` count
    from 0 in each segment. Without document masks a row is one segment."""

    ids: Int32[np.ndarray, "N L"]
    targets: Int32[np.ndarray, "N L"]
    segments: Int32[np.ndarray, "N L"]
    positions: Int32[np.ndarray, "N L"]
    position: int
    """tokens of the run before this batch"""
    stage: int


@dataclass(frozen=True)
class Span:
    """Columns start..stop of a row and the document their inputs come from."""

    row: int
    start: int
    stop: int
    source: str
    document: int
    """number of the document in the source's training split"""
    name: str
    offset: int
    """where the span starts in the document's ids; 0 is the end-of-text id at its head"""


@dataclass(frozen=True)
class _Plan:
    """What a stage takes: from each source of its mixture, by name, in alphabetical order."""

    sources: tuple[str, ...]
    weights: tuple[float, ...]
    bases: tuple[int, ...]
    """where in its stream each source starts"""
    planned: tuple[int, ...]
    """sequences of each source within the stage's tokens, before they are rounded up to whole batches"""


class Reader:
    """Batches of a run. Opening one reads nothing; equal recipes and stores give equal batches anywhere."""

    def __init__(self, recipe: Recipe, stores: Mapping[str, Store]) -> None:
        """`stores` by source name. Raises `DataError` when a source of a mixture is missing or too small."""
        self.recipe = recipe
        used = sorted({name for stage in recipe.stages for name in stage.mixture})
        for name in used:
            if name not in stores:
                raise DataError(f"source {name!r} of a mixture has no store; there are {', '.join(sorted(stores))}")
        self._streams = {name: Stream(name, stores[name].train, recipe.data.seed) for name in used}
        self._plans = _plans(recipe, self._streams)

    def batch(self, position: int, rows: slice = slice(None)) -> Batch:
        """The batch that begins at token `position`, or those of its rows that `rows` selects.

        `position` must be the start of a batch (`ValueError`); past the run's end it is an `IndexError`.
        """
        index, stage, numbers = self._numbers(position, rows)
        stream_tokens = np.empty((len(numbers), stage.length + 1), np.int32)
        starts = np.zeros((len(numbers), stage.length + 1), np.bool_)
        for mine, stream, pieces in self._parts(index, stage, numbers):
            stream_tokens[mine] = stream.tokens(pieces).reshape(-1, stage.length + 1)
            heads = np.zeros((len(mine), stage.length + 1), np.bool_)
            heads.reshape(-1)[pieces.target[pieces.offset == 0]] = True
            starts[mine] = heads
        segments, positions = _segments(starts[:, :-1], self.recipe.data.document_mask)
        return Batch(
            np.ascontiguousarray(stream_tokens[:, :-1]),
            np.ascontiguousarray(stream_tokens[:, 1:]),
            segments,
            positions,
            position,
            index,
        )

    def documents(self, position: int, rows: slice = slice(None)) -> list[Span]:
        """Where every input of the batch at `position` comes from, row by row, left to right."""
        index, stage, numbers = self._numbers(position, rows)
        chosen = range(stage.sequences)[rows]
        spans = []
        for mine, stream, pieces in self._parts(index, stage, numbers):
            line, column = np.divmod(pieces.target, stage.length + 1)
            for piece in np.flatnonzero(column < stage.length).tolist():
                start = int(column[piece])
                document = int(pieces.document[piece])
                spans.append(
                    Span(
                        row=chosen[int(mine[line[piece]])],
                        start=start,
                        stop=min(start + int(pieces.count[piece]), stage.length),
                        source=stream.name,
                        document=document,
                        name=stream.split.name(document),
                        offset=int(pieces.offset[piece]),
                    )
                )
        return sorted(spans, key=lambda span: (span.row, span.start))

    def epochs(self) -> dict[str, float]:
        """How often the whole run reads each source: 1.0 is every training document once."""
        taken = dict.fromkeys(self._streams, 0)
        for stage, plan in zip(self.recipe.stages, self._plans, strict=True):
            counts = source_counts(stage.steps * stage.sequences, plan.weights)
            for name, count in zip(plan.sources, counts, strict=True):
                taken[name] += count * stage.length
        return {name: tokens / self._streams[name].epoch_tokens for name, tokens in taken.items()}

    def _numbers(self, position: int, rows: slice) -> tuple[int, Stage, Integers]:
        """The stage at `position` and the numbers within it of the sequences asked for."""
        index = self.recipe.stage_at(position)
        stage = self.recipe.stages[index]
        into = position - self.recipe.stage_start(index)
        if position < 0 or into % stage.batch_tokens:
            raise ValueError(
                f"token position {position} is not the start of a batch; the batch around it begins at "
                f"{position - into % stage.batch_tokens}"
            )
        first = into // stage.length
        return index, stage, np.arange(first, first + stage.sequences, dtype=np.int64)[rows]

    def _parts(self, index: int, stage: Stage, numbers: Integers) -> list[tuple[Integers, Stream, Pieces]]:
        """For each source with a share in the sequences: its rows, its stream and its pieces."""
        plan = self._plans[index]
        source, within = source_of(numbers, plan.weights)
        parts = []
        for place, name in enumerate(plan.sources):
            mine = np.flatnonzero(source == place)
            if mine.size:
                stream = self._streams[name]
                starts = stream.starts(within[mine], plan.bases[place], plan.planned[place], stage.length, index)
                parts.append((mine, stream, stream.pieces(starts, stage.length + 1)))
        return parts


def _plans(recipe: Recipe, streams: Mapping[str, Stream]) -> list[_Plan]:
    given = dict.fromkeys(streams, 0)
    plans = []
    for stage in recipe.stages:
        sources = tuple(sorted(stage.mixture))
        weights = tuple(stage.mixture[name] for name in sources)
        for name in sources:
            _check_size(stage, streams[name])
        planned = source_counts(-(-stage.tokens // stage.length), weights)
        plans.append(_Plan(sources, weights, tuple(given[name] for name in sources), tuple(planned)))
        for name, count in zip(sources, source_counts(stage.steps * stage.sequences, weights), strict=True):
            given[name] += count * stage.length
    return plans


def _check_size(stage: Stage, stream: Stream) -> None:
    if stream.epoch_tokens < stage.length + 1:
        raise DataError(
            f"source {stream.name!r} has {stream.epoch_tokens} training tokens in {stream.split.documents} documents, "
            f"too few for one sequence of stage {stage.name!r} ({stage.length} tokens and the next); "
            "add text or shorten the stage"
        )


def _segments(
    starts: np.ndarray[tuple[int, int], np.dtype[np.bool_]], masked: bool
) -> tuple[Int32[np.ndarray, "N L"], Int32[np.ndarray, "N L"]]:
    """Segments and positions of rows whose documents begin where `starts` is true."""
    columns = np.arange(starts.shape[1], dtype=np.int32)
    if not masked:
        return np.zeros(starts.shape, np.int32), np.broadcast_to(columns, starts.shape).copy()
    starts[:, 0] = False
    segments = np.cumsum(starts, axis=1, dtype=np.int32)
    begin = np.maximum.accumulate(np.where(starts, columns, np.int32(0)), axis=1)
    return segments, columns - begin
