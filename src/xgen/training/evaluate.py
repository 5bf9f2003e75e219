"""What the loop and the measurement after it ask of a model: losses, next tokens, samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from xgen.measure import HeldOut, Sample, Score, loss_by_position, position_bins, sample, strided_loss
from xgen.model import Spec, Weights, last_logits, nll
from xgen.tokens.tokenizer import Tokenizer

# The held-out text of the loop is a part of the one measured at the end, and is seen in windows that do not overlap.
_LOOP_SHARE = 4
_SAMPLE_TOKENS = 48
_PROMPT_TOKENS = 16
_SAMPLE_WINDOW = 64
_TEMPERATURE = 0.8


@partial(jax.jit, static_argnums=1)
def _score(weights: Weights, spec: Spec, ids: jax.Array, targets: jax.Array, segments: jax.Array, positions: jax.Array):  # type: ignore[no-untyped-def]
    return nll(weights, spec, ids, targets, segments, positions)


@partial(jax.jit, static_argnums=1)
def _next(weights: Weights, spec: Spec, ids: jax.Array, length: jax.Array):  # type: ignore[no-untyped-def]
    return last_logits(weights, spec, ids, length)[0]


def scorer(weights: Callable[[], Weights], spec: Spec) -> Score:
    """A `Score` over the weights, which are fetched at the first call; compiled once a shape."""
    held: list[Weights] = []

    def score(ids: np.ndarray, targets: np.ndarray, positions: np.ndarray, segments: np.ndarray) -> np.ndarray:
        if not held:
            held.append(weights())
        return np.asarray(_score(held[0], spec, ids, targets, segments, positions))

    return score


@dataclass(frozen=True)
class LoopEvaluation:
    """Held-out measurement within training: mean loss in nats a token, and by the context a token had."""

    loss: float
    loss_by_position: dict[str, float]
    documents: int
    tokens: int


def evaluate(weights: Weights, spec: Spec, held_out: Sample, length: int, byte_lengths: np.ndarray) -> LoopEvaluation:
    """Loss over windows of `length` tokens of the held-out documents, one beside the other; and by position, as far
    as documents are long enough for it."""
    score = scorer(lambda: weights, spec)
    whole = strided_loss(score, held_out.ids, length, length, byte_lengths)
    by_position = loss_by_position(score, held_out.ids, length)
    bins = zip(position_bins(length), by_position.loss.sum(axis=0), by_position.tokens.sum(axis=0), strict=True)
    return LoopEvaluation(
        loss=float(whole.loss.sum() / whole.tokens.sum()),
        loss_by_position={str(first): float(loss / count) for (first, _), loss, count in bins if count},
        documents=len(held_out.documents),
        tokens=int(whole.tokens.sum()),
    )


def loop_tokens(evaluation_tokens: int, length: int) -> int:
    """Held-out tokens looked at within training: a quarter of the final measurement's, a few windows at least."""
    return max(evaluation_tokens // _LOOP_SHARE, 4 * length)


def write_sample(weights: Weights, spec: Spec, tokenizer: Tokenizer, document: HeldOut, seed: int) -> tuple[str, str]:
    """A held-out document's first words, and what the model makes of them (temperature 0.8, seeded)."""
    prompt = document.ids[: 1 + _PROMPT_TOKENS].tolist()

    def next_logits(ids: np.ndarray, length: int) -> np.ndarray:
        return np.asarray(_next(weights, spec, jnp.asarray(ids), jnp.int32(length)))

    new = sample(
        next_logits,
        prompt,
        tokens=_SAMPLE_TOKENS,
        real_vocab=spec.real_vocab,
        window=_SAMPLE_WINDOW,
        temperature=_TEMPERATURE,
        seed=seed,
        stop=tokenizer.end_of_text,
    )
    return tokenizer.decode(prompt[1:]), tokenizer.decode(new)
