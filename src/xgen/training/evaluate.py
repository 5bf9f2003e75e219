"""What the loop and the measurement after it ask of a model: losses, next tokens, samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import jax
import numpy as np
from jaxtyping import Array

from xgen.measure import HeldOut, Sample, Score, loss_by_position, position_bins, sample, strided_loss
from xgen.model import Spec, Weights, abstract, last_logits, nll
from xgen.model.split import zigzag
from xgen.parallel.program import EVERYWHERE, ONE_DEVICE, Layout, weight_shardings
from xgen.parallel.rules import TOKENS, weight_partitions
from xgen.parallel.world import World
from xgen.tokens.tokenizer import Tokenizer

# The held-out text of the loop is a part of the one measured at the end, and is seen in windows that do not overlap.
_LOOP_SHARE = 4
_SAMPLE_TOKENS = 48
_PROMPT_TOKENS = 16
_SAMPLE_WINDOW = 64
_TEMPERATURE = 0.8


Program = Callable[..., Array]
"""Compiled for arguments of certain shapes, weights first."""


@lru_cache
def _score_one(spec: Spec) -> Program:
    """`nll` on one device; compiled once a shape."""
    return jax.jit(lambda weights, *batch: nll(weights, spec, *batch))


@lru_cache
def _score(spec: Spec, layout: Layout, rows: int, columns: int) -> Program:
    """`nll` of whole arrays of this shape on a mesh; the result is whole everywhere, its columns as they are stored."""
    local = layout.spec(spec)
    inputs = (weight_partitions(spec), *[TOKENS] * 4)
    spread = layout.spread(lambda weights, *batch: nll(weights, local, *batch), inputs, TOKENS)
    batch = [jax.ShapeDtypeStruct((rows, columns), np.int32, sharding=layout.tokens)] * 4
    program = jax.jit(spread, out_shardings=layout.sharding(EVERYWHERE))
    return program.lower(_placed_weights(spec, layout), *batch).compile()


@lru_cache
def _next_one(spec: Spec) -> Program:
    """`last_logits` of one row, on one device."""
    return jax.jit(lambda weights, ids, length: last_logits(weights, spec, ids, length)[0])


@lru_cache
def _next(spec: Spec, layout: Layout, window: int) -> Program:
    """`last_logits` of one row so wide on a mesh, where every device computes it from the same tokens."""
    local = layout.spec(spec)
    local = replace(local, split=replace(local.split, batch=(), context=()))
    inputs = (weight_partitions(spec), EVERYWHERE, EVERYWHERE)

    def alike(weights: Weights, *given: Array) -> Array:
        """The same to the bit everywhere, or two processes could draw different tokens."""
        mine: Array = jax.lax.pmax(last_logits(weights, local, *given)[0], layout.mesh.axis_names)
        return mine

    given = [jax.ShapeDtypeStruct(shape, np.int32, sharding=layout.sharding(EVERYWHERE)) for shape in ((1, window), ())]
    return jax.jit(layout.spread(alike, inputs, EVERYWHERE)).lower(_placed_weights(spec, layout), *given).compile()


def _placed_weights(spec: Spec, layout: Layout) -> Weights:
    """Shapes of the weights and where they lie."""

    def placed(leaf: jax.ShapeDtypeStruct, place: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return cast("Weights", jax.tree.map(placed, abstract(spec), weight_shardings(spec, layout)))


def scorer(
    weights: Callable[[], Weights], spec: Spec, layout: Layout = ONE_DEVICE, world: World | None = None
) -> Score:
    """A `Score` over the weights, which are fetched at the first call; compiled once a shape. All of `world`, the
    processes that hold them, call it together."""
    held: list[Weights] = []
    met: set[tuple[int, int]] = set()

    def score(ids: np.ndarray, targets: np.ndarray, positions: np.ndarray, segments: np.ndarray) -> np.ndarray:
        if not held:
            held.append(weights())
        batch = (ids, targets, segments, positions)
        if layout.single:
            return np.asarray(_score_one(spec)(held[0], *batch))
        wide = [_whole_parts(array, layout) for array in batch]
        rows, columns = wide[0].shape
        program = _score(spec, layout, rows, columns)
        if world is not None and (rows, columns) not in met:
            world.ready(f"loss of {rows} x {columns} tokens")
            met.add((rows, columns))
        found = program(held[0], *[layout.place(array, rows, slice(0, rows)) for array in wide])
        natural = np.argsort(zigzag(columns, layout.sizes.context))
        return np.asarray(found)[: ids.shape[0], natural[: ids.shape[1]]]

    return score


def _whole_parts(array: np.ndarray, layout: Layout) -> np.ndarray:
    """With rows and columns added so that every device has as many; what comes after a row changes nothing in it."""
    across = 2 * layout.sizes.context if layout.sizes.context > 1 else 1
    rows = -array.shape[0] % (layout.sizes.replica * layout.sizes.fsdp)
    return np.pad(array, ((0, rows), (0, -array.shape[1] % across)))


@dataclass(frozen=True)
class LoopEvaluation:
    """Held-out measurement within training: mean loss in nats a token, and by the context a token had."""

    loss: float
    loss_by_position: dict[str, float]
    documents: int
    tokens: int


def evaluate(
    weights: Weights,
    spec: Spec,
    held_out: Sample,
    length: int,
    byte_lengths: np.ndarray,
    layout: Layout = ONE_DEVICE,
    world: World | None = None,
) -> LoopEvaluation:
    """Loss over windows of `length` tokens of the held-out documents, one beside the other; and by position, as far
    as documents are long enough for it."""
    score = scorer(lambda: weights, spec, layout, world)
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


def write_sample(
    weights: Weights,
    spec: Spec,
    tokenizer: Tokenizer,
    document: HeldOut,
    seed: int,
    layout: Layout = ONE_DEVICE,
    world: World | None = None,
) -> tuple[str, str]:
    """A held-out document's first words, and what the model makes of them (temperature 0.8, seeded)."""
    prompt = document.ids[: 1 + _PROMPT_TOKENS].tolist()

    program = _next_one(spec) if layout.single else _next(spec, layout, _SAMPLE_WINDOW)
    if world is not None:
        world.ready("next token")

    def next_logits(ids: np.ndarray, length: int) -> np.ndarray:
        return np.asarray(program(weights, layout.constant(np.asarray(ids)), layout.constant(np.int32(length))))

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
