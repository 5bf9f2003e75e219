"""Continuations for the training log: small, plain, the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from xgen.errors import NonFiniteError
from xgen.measure.losses import Floats, Ids

NextLogits = Callable[[Ids, int], npt.NDArray[np.float32]]
"""(ids int32 [1, window], length) to the logits [vocabulary] of the token that follows ids[0, :length]."""


def sample(
    next_logits: NextLogits,
    prompt: Sequence[int],
    *,
    tokens: int,
    real_vocab: int,
    window: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 1,
    stop: int | None = None,
) -> list[int]:
    """`tokens` new ids that follow `prompt` (which is not repeated in the result).

    `window` is the one shape the model is called with. The model always sees the last `window` ids:
    once the text is longer the oldest fall out, on purpose, since this is a glimpse for the log
    and not the engine. Ids from `real_vocab` on are padding of the embedding and never drawn.
    Temperature 0 takes the likeliest; `top_k` None draws from all; generation ends after `stop`.

    Raises:
        ValueError: an empty prompt or a setting out of range.
        NonFiniteError: logits that are not numbers.
    """
    if not prompt:
        raise ValueError("the prompt is empty; begin with the end-of-text token")
    if temperature < 0 or window < 1 or real_vocab < 1 or (top_k is not None and top_k < 1):
        raise ValueError(f"cannot sample with {temperature=}, {window=}, {real_vocab=}, {top_k=}")
    generator = np.random.default_rng(seed)
    text = list(prompt)
    for _ in range(tokens):
        seen = text[-window:]
        ids = np.zeros((1, window), np.int32)
        ids[0, : len(seen)] = seen
        logits = np.asarray(next_logits(ids, len(seen)), np.float64)[:real_vocab]
        if not np.isfinite(logits).all():
            raise NonFiniteError(f"the logits after {len(seen)} tokens are not finite; the weights are damaged")
        text.append(_draw(logits, temperature, top_k, generator))
        if text[-1] == stop:
            break
    return text[len(prompt) :]


def _draw(logits: Floats, temperature: float, top_k: int | None, generator: np.random.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[:top_k]
    weights = np.cumsum(np.exp((logits[order] - logits[order[0]]) / temperature))
    return int(order[np.searchsorted(weights[:-1], generator.random() * weights[-1], side="right")])
