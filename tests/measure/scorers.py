"""Scorers with closed forms, standing in for models. A document d holds the ids 1000 d + 0, 1, 2, ...

so that an id names its document and its place there, and a target must be its id plus one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

STEP = 1000

GARBAGE = np.float32(np.nan)
"""What the scorers give for padding: it poisons every figure that counts it."""


def documents(*lengths: int) -> list[np.ndarray]:
    return [STEP * number + np.arange(length, dtype=np.int32) for number, length in enumerate(lengths)]


class Scorer:
    """Gives loss(document, token, ids seen) for text and garbage for padding; checks what it is fed."""

    def __init__(self, loss: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]):
        self.loss = loss
        self.shapes: set[tuple[int, int]] = set()
        self.fed: list[tuple[int, ...]] = []

    def __call__(self, ids, targets, positions, segments):
        assert {array.dtype for array in (ids, targets, positions, segments)} == {np.dtype(np.int32)}
        self.shapes.add(ids.shape)
        text = segments == 0
        # Padding only at the right, with segments of its own; positions count from the window's start.
        assert (np.diff(segments, axis=1) >= 0).all()
        assert (positions == np.arange(ids.shape[1])).all()
        assert (targets[text] == ids[text] + 1).all()
        first = np.broadcast_to(ids[:, :1], ids.shape)
        assert (ids[text] // STEP == first[text] // STEP).all(), "two documents share a window"
        self.fed += [tuple(row[mask].tolist()) for row, mask in zip(ids, text, strict=True) if mask.any()]
        losses = self.loss(targets // STEP, targets % STEP, positions + 1)
        return np.where(text, losses, GARBAGE).astype(np.float32)


def saturating(knee: int) -> Scorer:
    """A model that provably makes no use of more than `knee` ids; losses are exact in float32."""
    return Scorer(lambda _document, _token, seen: 4 - np.minimum(seen, knee) / 64)


def forgetting(trained: int) -> Scorer:
    """A model that breaks past the length it was trained on."""
    return Scorer(lambda _document, _token, seen: np.where(seen <= trained, 2.0, 9.0))
