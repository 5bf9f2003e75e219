"""Cross entropy over the vocabulary in chunks of tokens: all logits are never held at once.

At 8,192 positions and 51,200 rows the float32 logits alone would take 1.7 GB a sequence.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xgen.model.linear import accumulator, dot, outer

CHUNK_LOGITS = 1 << 24
"""Logits held at once: 64 MiB in float32."""

_MASKED = -1e30


def token_nll(
    x: Float[Array, "T D"], head: Float[Array, "D V"], targets: Int[Array, " T"], real_vocab: int
) -> Float[Array, " T"]:
    """Negative log-likelihood of each target in nats, padding rows of the vocabulary masked."""
    narrow = head.astype(x.dtype)

    def chunk(_: None, part: tuple[Array, ...]) -> tuple[None, Array]:
        rows, target = part
        scores = _masked_logits(rows, narrow, real_vocab)
        return None, jax.nn.logsumexp(scores, axis=-1) - _picked(scores, target)

    _, nll = jax.lax.scan(chunk, None, _chunks((x, targets), head.shape[1]))
    return nll.reshape(-1)[: x.shape[0]]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def weighted_loss(
    x: Float[Array, "T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, " T"],
    weights: Float[Array, " T"],
    real_vocab: int,
    z_loss: float,
) -> tuple[Float[Array, ""], Float[Array, " T"]]:
    """Sum over tokens of weight x (nll + z_loss x logsumexp^2), and each token's nll.

    The gradient of the sum is computed in the forward pass, chunk by chunk, while the logits are there. The second
    result is for reporting and has no gradient. z_loss: PaLM's penalty (Chowdhery et al. 2022), 0 to leave it out.
    """
    return _loss_forward(x, head, targets, weights, real_vocab, z_loss)[0]


def _loss_forward(
    x: Array, head: Array, targets: Array, weights: Array, real_vocab: int, z_loss: float
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    narrow = head.astype(x.dtype)
    wide = accumulator(x.dtype)

    def chunk(head_gradient: Array, part: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        rows, target, weight = part
        scores = _masked_logits(rows, narrow, real_vocab)
        lse = jax.nn.logsumexp(scores, axis=-1)
        nll = lse - _picked(scores, target)
        share = weight * (1 + 2 * z_loss * lse)
        hit = jnp.arange(head.shape[1]) == target[:, None]
        gradient = jnp.exp(scores - lse[:, None]) * share[:, None] - jnp.where(hit, weight[:, None], 0)
        gradient = gradient.astype(x.dtype)
        total = jnp.sum(weight * (nll + z_loss * lse * lse))
        return head_gradient + outer(rows, gradient), (total, nll, dot(gradient, narrow, 1, 1).astype(x.dtype))

    parts = _chunks((x, targets, weights), head.shape[1])
    head_gradient, (totals, nll, x_gradient) = jax.lax.scan(chunk, jnp.zeros(head.shape, wide), parts)
    # XLA's CPU would fold a tied head's transpose into a lone chunk's product, a form it cannot run in bfloat16.
    head_gradient = jax.lax.optimization_barrier(head_gradient)
    tokens = x.shape[0]
    saved = (x_gradient.reshape(-1, x.shape[1])[:tokens], head_gradient, weights)
    return (totals.sum(), nll.reshape(-1)[:tokens]), saved


def _loss_backward(
    real_vocab: int,  # noqa: ARG001 - custom_vjp hands the static arguments over
    z_loss: float,  # noqa: ARG001
    saved: tuple[Array, Array, Array],
    gradients: tuple[Array, Array],
) -> tuple[Array, Array, None, Array]:
    x_gradient, head_gradient, weights = saved
    scale = gradients[0]
    return (x_gradient * scale).astype(x_gradient.dtype), head_gradient * scale, None, jnp.zeros_like(weights)


weighted_loss.defvjp(_loss_forward, _loss_backward)


def masked_logits(x: Float[Array, "*T D"], head: Float[Array, "D V"], real_vocab: int) -> Float[Array, "*T V"]:
    """Float32 logits; padding rows of the vocabulary are -1e30, so that they are never sampled."""
    flat = _masked_logits(x.reshape(-1, x.shape[-1]), head.astype(x.dtype), real_vocab)
    return flat.reshape(*x.shape[:-1], head.shape[1])


def _masked_logits(x: Array, narrow: Array, real_vocab: int) -> Float[Array, "C V"]:
    scores = dot(x, narrow, 1, 0)
    if real_vocab == scores.shape[-1]:
        return scores
    return jnp.where(jnp.arange(scores.shape[-1]) < real_vocab, scores, _MASKED)


def _picked(scores: Float[Array, "C V"], targets: Int[Array, " C"]) -> Float[Array, " C"]:
    return jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]


def _chunks(arrays: tuple[Array, ...], vocabulary: int) -> tuple[Array, ...]:
    """Cut the token axis into equal chunks of at most CHUNK_LOGITS logits; the last is padded with zeros
    (weight 0), and its surplus is cut off by the caller."""
    tokens = arrays[0].shape[0]
    count = -(-tokens * vocabulary // CHUNK_LOGITS)
    size = -(-tokens // count)
    size += -size % 4 if count > 1 else 0
    padding = -tokens % size

    def cut(array: Array) -> Array:
        padded = jnp.pad(array, ((0, padding), *((0, 0),) * (array.ndim - 1)))
        return padded.reshape(-1, size, *array.shape[1:])

    return tuple(cut(array) for array in arrays)
