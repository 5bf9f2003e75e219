"""One optimizer step, compiled once a stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled
from jaxtyping import Array, Bool, Float, Int

from xgen.model import Spec, Weights, objective
from xgen.model.split import total
from xgen.parallel.program import EVERYWHERE, ONE_DEVICE, Layout, whole_gradients
from xgen.parallel.rules import TOKENS, weight_partitions
from xgen.recipe.schema import Optimizer, Stage
from xgen.training.state import State


class Tokens(NamedTuple):
    """A batch on the device; N sequences of S positions."""

    ids: Int[Array, "N S"]
    targets: Int[Array, "N S"]
    segments: Int[Array, "N S"]
    positions: Int[Array, "N S"]


class Metrics(NamedTuple):
    """Scalars of a step in float32. Norms are global: of the gradient before clipping, of the change made to the
    weights, of the weights after it. The bins are powers of two of the target's place in its document."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    update_norm: Float[Array, ""]
    param_norm: Float[Array, ""]
    finite: Bool[Array, ""]
    bin_losses: Float[Array, " bins"]
    bin_tokens: Float[Array, " bins"]


class StepFunction(Protocol):
    """A step ready to run, as compiled: (state, batch, learning rate) -> (state, metrics)."""

    def __call__(self, state: State, batch: Tokens, rate: np.float32, /) -> tuple[State, Metrics]: ...


def position_bins(length: int) -> int:
    """Bins of the tokens a target is predicted from: [1, 2), [2, 4) ... the last one up to `length`, as in
    `xgen.measure.position_bins`."""
    return max((length - 1).bit_length(), 1)


def compile_step(
    spec: Spec,
    stage: Stage,
    optimizer: Optimizer,
    transformation: optax.GradientTransformation,
    state: State,
    layout: Layout = ONE_DEVICE,
) -> Compiled:
    """The stage's step, compiled ahead of time for states like `state`; call it as a `StepFunction`.

    (state, batch, learning rate) -> (state, metrics); the state given is consumed.

    The batch is cut into microbatches whose float32 gradients are added; each token counts once over the tokens of the
    whole batch. When the loss, the gradient, the update or the weights after it are not finite, the state
    comes back as it was.

    On a mesh every device computes the gradient of its own tokens, for the parts of the weights that it stores; what
    follows is a sum or a change of each element, of which the compiler sees to the rest.
    """
    gradients_of = _spread_gradients(spec, stage, optimizer.z_loss, layout)

    def step(state: State, batch: Tokens, rate: Float[Array, ""]) -> tuple[State, Metrics]:
        loss, gradients, per_token = gradients_of(state.weights, batch)
        grad_norm = optax.tree.norm(gradients)
        direction, optimizer_state = transformation.update(gradients, state.optimizer, state.weights)
        updates = jax.tree.map(lambda change: -rate * change, direction)
        moved = State(optax.apply_updates(state.weights, updates), optimizer_state)
        update_norm, param_norm = optax.tree.norm(updates), optax.tree.norm(moved.weights)
        finite = jnp.isfinite(jnp.stack([loss, grad_norm, update_norm, param_norm])).all()
        kept = jax.tree.map(partial(jnp.where, finite), moved, state)
        bins = _by_position(per_token, batch.positions, position_bins(stage.length))
        return kept, Metrics(per_token.mean(), grad_norm, update_norm, param_norm, finite, *bins)

    tokens = jax.ShapeDtypeStruct((stage.sequences, stage.length), np.int32, sharding=_unless_single(layout, TOKENS))
    rate = jax.ShapeDtypeStruct((), np.float32, sharding=_unless_single(layout, EVERYWHERE))
    batch = Tokens(*[tokens] * 4)  # type: ignore[arg-type]  # shapes stand for arrays
    compiled = jax.jit(step, donate_argnums=0)
    if not layout.single:
        metrics = Metrics(*[layout.sharding(EVERYWHERE)] * len(Metrics._fields))  # type: ignore[arg-type]
        kept = jax.tree.map(lambda leaf: leaf.sharding, state)
        compiled = jax.jit(step, donate_argnums=0, out_shardings=(kept, metrics))
    return compiled.lower(state, batch, rate).compile()


def _unless_single(layout: Layout, partition: PartitionSpec) -> NamedSharding | None:
    return None if layout.single else layout.sharding(partition)


def _spread_gradients(
    spec: Spec, stage: Stage, z_loss: float, layout: Layout
) -> Callable[[Weights, Tokens], tuple[Float[Array, ""], Weights, Float[Array, "N S"]]]:
    """`_gradients` of whole arrays."""
    if layout.single:
        return lambda weights, batch: _gradients(weights, spec, stage, z_loss, batch)
    local = layout.spec(spec)
    split = local.split

    def part(weights: Weights, batch: Tokens) -> tuple[Array, Weights, Array]:
        loss, gradients, per_token = _gradients(weights, local, stage, z_loss, batch)
        data = tuple(dict.fromkeys((*split.batch, *split.context)))
        return total(loss, data), whole_gradients(gradients, split), per_token

    weights = weight_partitions(spec)
    return layout.spread(part, (weights, Tokens(*[TOKENS] * 4)), (EVERYWHERE, weights, TOKENS))  # type: ignore[arg-type]


def _gradients(
    weights: Weights, spec: Spec, stage: Stage, z_loss: float, batch: Tokens
) -> tuple[Float[Array, ""], Weights, Float[Array, "N S"]]:
    """Objective, its float32 gradient, and each token's nll, over all microbatches; on a mesh, of one device's part of
    the batch."""
    graded = jax.value_and_grad(objective, has_aux=True)
    part = partial(graded, token_weight=1 / stage.batch_tokens, z_loss=z_loss, remat=stage.remat)
    count = stage.batch_tokens // stage.microbatch_tokens
    if count == 1:
        (loss, per_token), gradients = part(weights, spec, *batch)
        return loss, gradients, per_token

    def add(sums: tuple[Array, Weights], microbatch: Tokens) -> tuple[tuple[Array, Weights], Array]:
        (loss, per_token), gradients = part(weights, spec, *microbatch)
        return (sums[0] + loss, jax.tree.map(jnp.add, sums[1], gradients)), per_token

    parts = jax.tree.map(lambda x: x.reshape(count, -1, x.shape[1]), batch)
    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, weights))
    (loss, gradients), per_token = jax.lax.scan(add, zero, parts)
    return loss, gradients, per_token.reshape(batch.ids.shape)


def _by_position(
    per_token: Float[Array, "N S"], positions: Int[Array, "N S"], bins: int
) -> tuple[Float[Array, " bins"], Float[Array, " bins"]]:
    """Summed loss and tokens of each power-of-two bin of the context a target has (its position plus one)."""
    context = positions.reshape(-1) + 1
    edges = jnp.asarray([1 << power for power in range(1, bins)], context.dtype)
    member = jnp.searchsorted(edges, context, side="right")[:, None] == jnp.arange(bins)
    return per_token.reshape(-1) @ member.astype(jnp.float32), member.sum(axis=0).astype(jnp.float32)


def mean_loss_by_position(losses: Float[np.ndarray, " bins"], tokens: Float[np.ndarray, " bins"]) -> dict[str, float]:
    """Mean loss of every bin that has tokens, by the bin's first context length."""
    pairs = enumerate(zip(losses.tolist(), tokens.tolist(), strict=True))
    return {str(1 << power): loss / count for power, (loss, count) in pairs if count > 0 and math.isfinite(loss)}
