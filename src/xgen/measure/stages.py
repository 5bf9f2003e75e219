"""Every stage's checkpoint on the same held-out text, with every figure and its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypedDict

import numpy as np

from xgen.errors import DataError
from xgen.measure import windows
from xgen.measure.intervals import difference_interval, mean_interval
from xgen.measure.losses import (
    Floats,
    Ids,
    Score,
    Sums,
    document_bytes,
    fixed_target_loss,
    loss_by_position,
    strided_loss,
)
from xgen.measure.since import Kept, SinceStart, since_start
from xgen.measure.text import Sample, xz_bits_per_byte

_LARGEST_EXPONENT = 700.0
"""Of a perplexity: a broken model's may pass what a float holds; its loss is there to tell."""

Progress = Callable[[float], None]
"""Told the share of the work that is done, 0 to 1, never falling."""


class Settings(Protocol):
    """The recipe's `[evaluation]`, as far as it bears on the measurement."""

    @property
    def contexts(self) -> tuple[int, ...]: ...

    @property
    def target(self) -> int: ...

    @property
    def stride(self) -> float: ...


class Text(TypedDict):
    documents: int
    tokens: int
    bytes: int
    xz_bits_per_byte: float


class Strided(TypedDict):
    checkpoint: str
    context: int
    stride: int
    loss: float
    low: float | None
    high: float | None
    loss_per_document: float
    perplexity: float
    bits_per_byte: float
    documents: int
    tokens: int


Bin = TypedDict(
    "Bin", {"from": int, "to": int, "loss": float, "low": float | None, "high": float | None, "tokens": int}
)
"""Tokens predicted from at least `from` ids and fewer than `to`."""


class ByPosition(TypedDict):
    checkpoint: str
    length: int
    bins: list[Bin]
    documents: int


class FixedTarget(TypedDict):
    checkpoint: str
    context: int
    target: int
    loss: float
    low: float | None
    high: float | None
    documents: int
    tokens: int


class Gain(TypedDict):
    checkpoint: str
    from_context: int
    to_context: int
    difference: float
    low: float | None
    high: float | None
    documents: int


class Measurements(TypedDict):
    """What is written to a run's `evals/after_training.json`; docs/reference/measurements.md defines each figure.

    Bounds are null where fewer than two documents bear on a figure; a list is empty, and a note says
    why, where no document is long enough for it.
    """

    text: Text
    strided: list[Strided]
    by_position: list[ByPosition]
    fixed_target: list[FixedTarget]
    fixed_target_gain: list[Gain]
    since_start: list[SinceStart]
    notes: list[str]


def measure_checkpoints(
    checkpoints: Sequence[tuple[str, Score]],
    sample: Sample,
    settings: Settings,
    byte_lengths: Ids,
    text: bytes,
    progress: Progress | None = None,
    seed: int = 1,
    *,
    since: int | None = None,
) -> Measurements:
    """All measures of all checkpoints, each at all contexts, also past the length it was trained on.

    `since` is the length that the first checkpoint was trained on when the others continue it: each is then set beside
    those before it, below and past that length.

    `text` is `sample.text(tokenizer.token_bytes)`: the very bytes of the tokens scored. Checkpoints are
    measured one after the other, so a scorer may load its weights at its first call.

    Raises:
        DataError: `text` is not as long as `byte_lengths` say.
    """
    documents = sample.ids
    size = int(document_bytes(documents, byte_lengths).sum())
    if size != len(text):
        raise DataError(
            f"the held-out text has {len(text)} bytes, but its tokens stand for {size}; "
            "take both from the tokenizer the text was prepared with"
        )
    result = Measurements(
        text=Text(
            documents=len(documents),
            tokens=sum(len(ids) - 1 for ids in documents),
            bytes=size,
            xz_bits_per_byte=xz_bits_per_byte(text),
        ),
        strided=[],
        by_position=[],
        fixed_target=[],
        fixed_target_gain=[],
        since_start=[],
        notes=[*sample.notes, *_notes(documents, settings)],
    )
    meter = _Meter(progress, forward_tokens(documents, settings, seed) * len(checkpoints))
    bins = windows.position_bins(max(settings.contexts), since)
    spans, kept = _spans([len(ids) for ids in documents], settings), {}
    for name, score in checkpoints:
        result["strided"] += _strided(name, score, documents, settings, byte_lengths, meter)
        positions = loss_by_position(score, documents, max(settings.contexts), seed, meter, since)
        result["by_position"] += _by_position(name, positions, bins)
        contexts = _fixed_contexts(settings)
        targets = fixed_target_loss(score, documents, contexts, settings.target, spans, seed, meter)
        rows, gains = _fixed_target(name, targets, settings.target)
        result["fixed_target"] += rows
        result["fixed_target_gain"] += gains
        kept[name] = Kept(positions, targets)
    if since is not None:
        result["since_start"] = since_start(kept, bins, since, settings.target)
    return result


def forward_tokens(documents: Sequence[Ids], settings: Settings, seed: int = 1) -> int:
    """Ids that pass through the model to measure one checkpoint: what the measurement costs."""
    lengths = [len(ids) for ids in documents]
    longest = max(settings.contexts)
    plans = [windows.strided(lengths, context, _stride(settings, context)) for context in settings.contexts]
    plans.append(windows.by_position(lengths, longest, windows.random_offsets(len(lengths), longest, seed)))
    contexts = _fixed_contexts(settings)
    plans += windows.fixed_target(lengths, contexts, settings.target, _spans(lengths, settings), seed).values()
    return sum(plan.forward_tokens for plan in plans)


def _strided(
    name: str, score: Score, documents: list[Ids], settings: Settings, byte_lengths: Ids, meter: _Meter
) -> list[Strided]:
    sums = [
        strided_loss(score, documents, context, _stride(settings, context), byte_lengths, meter)
        for context in settings.contexts
    ]
    loss, tokens = _table(sums)
    means, per_document = mean_interval(loss, tokens), mean_interval(loss, tokens, per="document", resamples=1)
    return [
        Strided(
            checkpoint=name,
            context=context,
            stride=_stride(settings, context),
            loss=mean.value,
            low=mean.low,
            high=mean.high,
            loss_per_document=even.value,
            perplexity=math.exp(min(mean.value, _LARGEST_EXPONENT)),
            bits_per_byte=float(sums.loss.sum() / math.log(2) / sums.bytes.sum()),
            documents=mean.documents,
            tokens=int(sums.tokens.sum()),
        )
        for context, sums, mean, even in zip(settings.contexts, sums, means, per_document, strict=True)
    ]


def _by_position(name: str, sums: Sums, positions: list[tuple[int, int]]) -> list[ByPosition]:
    used = sums.tokens.any(axis=1)
    if not used.any():
        return []
    means = mean_interval(sums.loss[used], sums.tokens[used])
    bins = [
        Bin(
            {
                "from": first,
                "to": last + 1,
                "loss": mean.value,
                "low": mean.low,
                "high": mean.high,
                "tokens": int(count),
            }
        )
        for (first, last), mean, count in zip(positions, means, sums.tokens.sum(0).tolist(), strict=True)
        if mean.documents > 0
    ]
    return [ByPosition(checkpoint=name, length=positions[-1][1], bins=bins, documents=int(used.sum()))]


def _fixed_target(name: str, sums: Mapping[int, Sums], target: int) -> tuple[list[FixedTarget], list[Gain]]:
    contexts = list(sums)
    used = sums[contexts[0]].tokens > 0
    if not used.any():
        return [], []
    loss, tokens = _table([sums[context] for context in contexts])
    loss, tokens = loss[used], tokens[used]
    counted = int(tokens[:, 0].sum())
    rows = [
        FixedTarget(
            checkpoint=name,
            context=context,
            target=target,
            loss=mean.value,
            low=mean.low,
            high=mean.high,
            documents=mean.documents,
            tokens=counted,
        )
        for context, mean in zip(contexts, mean_interval(loss, tokens), strict=True)
    ]
    gains = difference_interval(loss[:, :-1], loss[:, -1:], tokens[:, :-1])
    return rows, [
        Gain(
            checkpoint=name,
            from_context=context,
            to_context=contexts[-1],
            difference=gain.value,
            low=gain.low,
            high=gain.high,
            documents=gain.documents,
        )
        for context, gain in zip(contexts, gains, strict=False)
    ]


def _table(sums: Sequence[Sums]) -> tuple[Floats, Floats]:
    """Losses and counts side by side: [D, K]."""
    return np.stack([one.loss for one in sums], 1), np.stack([one.tokens for one in sums], 1)


def _stride(settings: Settings, context: int) -> int:
    return max(1, int(context * settings.stride))


def _fixed_contexts(settings: Settings) -> list[int]:
    """The recipe's contexts and a quarter of the largest, from which the headline gain is taken."""
    quarter = max(settings.contexts) // 4
    return sorted({*settings.contexts, *([quarter] if quarter > settings.target else [])})


def _spans(lengths: Sequence[int], settings: Settings) -> int:
    """Target spans a document: so many that at the largest context they cost what the strided measure costs."""
    longest = max(settings.contexts)
    usable = [length for length in lengths if length > longest]
    return max(1, round(sum(usable) / (settings.stride * longest * max(1, len(usable)))))


def _notes(documents: Sequence[Ids], settings: Settings) -> list[str]:
    longest = max(settings.contexts)
    used = sum(len(ids) >= 2 * longest for ids in documents)
    if used == len(documents):
        return []
    return [
        f"Loss by position rests on the {used} of {len(documents)} documents with {2 * longest} tokens or more; "
        "the others are too short for two windows."
    ]


class _Meter:
    """Counts ids given to scorers and reports the share of all."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, ids: int) -> None:
        self.done += ids
        if self.progress is not None:
            self.progress(min(1.0, self.done / self.total))
