"""Cross entropy over the vocabulary in chunks of tokens: all logits are never held at once.

At 8,192 positions and 51,200 rows the float32 logits alone would take 1.7 GB a sequence.

Of a mesh's tensor parts each holds a stretch of the vocabulary: it computes the logits of its own rows, and of the
others it learns the largest logit, the sum of exponentials, and whether the target is theirs.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xgen.model import native
from xgen.model.linear import accumulator, dot, outer
from xgen.model.split import ONE, Split, gather, scatter, total

CHUNK_LOGITS = 1 << 24
"""Logits held at once: 64 MiB in float32."""

_MASKED = -1e30


def token_nll(
    x: Float[Array, "T D"], head: Float[Array, "D V"], targets: Int[Array, " T"], real_vocab: int, split: Split = ONE
) -> Float[Array, " T"]:
    """Negative log-likelihood of each target in nats, padding rows of the vocabulary masked."""
    narrow = gather(head.astype(x.dtype), split.shards, 0)

    def chunk(_: None, part: tuple[Array, ...]) -> tuple[None, Array]:
        rows, target = part
        scores = _masked_logits(rows, narrow, real_vocab, split)
        return None, _logsumexp(scores, split) - _picked(scores, target, split)

    _, nll = jax.lax.scan(chunk, None, _chunks((x, targets), head.shape[1]))
    return nll.reshape(-1)[: x.shape[0]]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def weighted_loss(
    x: Float[Array, "T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, " T"],
    weights: Float[Array, " T"],
    real_vocab: int,
    z_loss: float,
    split: Split = ONE,
) -> tuple[Float[Array, ""], Float[Array, " T"]]:
    """Sum over (this device's) tokens of weight x (nll + z_loss x logsumexp^2), and each token's nll.

    The gradient of the sum is computed in the forward pass, chunk by chunk, while the logits are there. The second
    result is for reporting and has no gradient. z_loss: PaLM's penalty (Chowdhery et al. 2022), 0 to leave it out.
    """
    return _loss_forward(x, head, targets, weights, real_vocab, z_loss, split)[0]


def _loss_forward(
    x: Array, head: Array, targets: Array, weights: Array, real_vocab: int, z_loss: float, split: Split
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    narrow = gather(head.astype(x.dtype), split.shards, 0)
    wide = accumulator(x.dtype)

    def chunk(head_gradient: Array, part: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        rows, target, weight = part
        if native.applies(rows) and not split.tensor:
            nll, lse, gradient = native.cross_entropy(dot(rows, narrow, 1, 0), target, weight, real_vocab, z_loss)
        else:
            nll, lse, gradient = _cross_entropy(rows, narrow, target, weight, real_vocab, z_loss, split)
        loss = jnp.sum(weight * (nll + z_loss * lse * lse))
        x_gradient = total(dot(gradient, narrow, 1, 1), split.tensor).astype(x.dtype)
        return outer(rows, gradient, head_gradient), (loss, nll, x_gradient)

    parts = _chunks((x, targets, weights), head.shape[1])
    head_gradient, (losses, nll, x_gradient) = jax.lax.scan(chunk, jnp.zeros(narrow.shape, wide), parts)
    # XLA's CPU would fold a tied head's transpose into a lone chunk's product, a form it cannot run in bfloat16.
    head_gradient = scatter(jax.lax.optimization_barrier(head_gradient), split.shards, 0)
    # Nothing before the optimizer needs the head's gradient, so XLA would keep the whole of it through the backward
    # pass and scatter it after.
    head_gradient, x_gradient = jax.lax.optimization_barrier((head_gradient, x_gradient))
    tokens = x.shape[0]
    saved = (x_gradient.reshape(-1, x.shape[1])[:tokens], head_gradient, weights)
    return (losses.sum(), nll.reshape(-1)[:tokens]), saved


def _cross_entropy(
    rows: Array, narrow: Array, target: Array, weight: Array, real_vocab: int, z_loss: float, split: Split
) -> tuple[Array, Array, Array]:
    """As `native.cross_entropy`, of this device's logits."""
    scores = _masked_logits(rows, narrow, real_vocab, split)
    lse = _logsumexp(scores, split)
    nll = lse - _picked(scores, target, split)
    share = weight * (1 + 2 * z_loss * lse)
    hit = _rows(scores, split) == target[:, None]
    gradient = jnp.exp(scores - lse[:, None]) * share[:, None] - jnp.where(hit, weight[:, None], 0)
    return nll, lse, gradient.astype(rows.dtype)


def _loss_backward(
    real_vocab: int,  # noqa: ARG001 - custom_vjp hands the static arguments over
    z_loss: float,  # noqa: ARG001
    split: Split,  # noqa: ARG001
    saved: tuple[Array, Array, Array],
    gradients: tuple[Array, Array],
) -> tuple[Array, Array, None, Array]:
    x_gradient, head_gradient, weights = saved
    scale = gradients[0]
    return (x_gradient * scale).astype(x_gradient.dtype), head_gradient * scale, None, jnp.zeros_like(weights)


weighted_loss.defvjp(_loss_forward, _loss_backward)


def masked_logits(
    x: Float[Array, "*T D"], head: Float[Array, "D V"], real_vocab: int, split: Split = ONE
) -> Float[Array, "*T V"]:
    """Float32 logits, whole on every device; padding rows of the vocabulary are -1e30, so that they are never
    sampled."""
    narrow = gather(head.astype(x.dtype), split.shards, 0)
    flat = gather(_masked_logits(x.reshape(-1, x.shape[-1]), narrow, real_vocab, split), split.tensor, 1)
    return flat.reshape(*x.shape[:-1], flat.shape[1])


def _masked_logits(x: Array, narrow: Array, real_vocab: int, split: Split) -> Float[Array, "C V"]:
    """Of this device's rows of the vocabulary."""
    scores = dot(x, narrow, 1, 0)
    if not split.tensor and real_vocab == scores.shape[-1]:
        return scores
    return jnp.where(_rows(scores, split) < real_vocab, scores, _MASKED)


def _rows(scores: Float[Array, "C V"], split: Split) -> Int[Array, " V"]:
    """The ids that this device's logits are of."""
    mine = jnp.arange(scores.shape[-1])
    return mine + jax.lax.axis_index(split.tensor) * scores.shape[-1] if split.tensor else mine


def _logsumexp(scores: Float[Array, "C V"], split: Split) -> Float[Array, " C"]:
    """Over the whole vocabulary."""
    lse: Array = jax.nn.logsumexp(scores, axis=-1)
    if not split.tensor:
        return lse
    peak = jax.lax.pmax(lse, split.tensor)
    whole: Array = peak + jnp.log(total(jnp.exp(lse - peak), split.tensor))
    return whole


def _picked(scores: Float[Array, "C V"], targets: Int[Array, " C"], split: Split) -> Float[Array, " C"]:
    """Each target's logit, which one of the tensor parts has."""
    if not split.tensor:
        return jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]
    hit = _rows(scores, split) == targets[:, None]
    return total(jnp.where(hit, scores, 0).sum(axis=-1), split.tensor)


def _chunks(arrays: tuple[Array, ...], vocabulary: int) -> tuple[Array, ...]:
    """Cut the token axis into equal chunks of at most CHUNK_LOGITS logits. Where no number of chunks near the smallest
    divides the tokens the last is padded with zeros (weight 0), and its surplus is cut off by the caller."""
    tokens = arrays[0].shape[0]
    fewest = -(-tokens * vocabulary // CHUNK_LOGITS)
    even = (count for count in range(fewest, 2 * fewest) if tokens % count == 0 and tokens // count % 4 == 0)
    count = next(even, fewest)
    size = -(-tokens // count)
    size += -size % 4 if count > 1 else 0
    padding = -tokens % size

    def cut(array: Array) -> Array:
        padded = jnp.pad(array, ((0, padding), *((0, 0),) * (array.ndim - 1))) if padding else array
        return padded.reshape(-1, size, *array.shape[1:])

    return tuple(cut(array) for array in arrays)
