"""The decoder's forward pass and its losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real

from xgen.model import native
from xgen.model.attention import attention
from xgen.model.layers import PROJECTION, inward, mlp, norm, outward
from xgen.model.linear import accumulator
from xgen.model.loss import masked_logits, token_nll, weighted_loss
from xgen.model.rope import angles, rotate
from xgen.model.spec import Spec
from xgen.model.split import Split, enter, gather, gather_with_gradient, leave
from xgen.model.weights import Block, Weight, Weights, map_rows


class Places(NamedTuple):
    """Where each token stands: its rotary angles and its document."""

    cosine: Float[Array, "B S 1 P"]
    sine: Float[Array, "B S 1 P"]
    segments: Int[Array, "B S"]


def forward(
    weights: Weights,
    spec: Spec,
    ids: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    remat: str = "none",
) -> Float[Array, "B S D"]:
    """Hidden states after the final norm, in the compute type.

    `segments` numbers the documents of a row, `positions` the places within them. `remat` says what the backward
    pass recomputes: "none", "dots" (all but the products' results), "block" (everything but the layers' inputs).
    """
    weights = _with_whole_vectors(weights, spec.split)
    places = Places(*angles(positions, segments, spec.model, accumulator(spec.dtype), spec.split), segments)
    x = embed(weights.embedding, ids, spec.dtype, spec.split)
    # XLA's CPU cannot put bfloat16 into the stack that a loop's backward pass reads from: it widens the whole stack to
    # float32 and back for every layer. Without the loop there is no stack, and kernels are cheap to compile.
    loop = not native.applies(x)
    layer = (_in_loop if loop else _in_line)(lambda x, w: block(x, w, places, spec), remat)
    x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights.block, unroll=not loop)
    return norm(x, weights.final_norm, weights.final_norm_bias, spec.model)


def _with_whole_vectors(weights: Weights, split: Split) -> Weights:
    """Of a mesh that stores the stream's axis in parts, the vectors along it whole: a collective for all layers."""
    if not split.shards:
        return weights

    def of(leaf: Array, row: Weight) -> Array:
        stored = row.axes[-1] == "embed" and not row.decay
        return gather_with_gradient(leaf, split.shards, leaf.ndim - 1) if stored else leaf

    gathered: Weights = jax.tree.map(of, weights, map_rows(weights, lambda row: row))
    return gathered


LOOKUP = 1 << 19
"""Tokens of all devices that are looked up at once. Each takes 512 bytes of a TPU however few columns a device stores,
since rows are filled up to 128 float32."""


def embed(
    embedding: Real[Array, "V K"], ids: Int[Array, "B S"], dtype: jnp.dtype, split: Split
) -> Float[Array, "B S D"]:
    """Each token's row in the compute type; K are the columns of it that this device stores.

    On a mesh a device looks up the tokens of all with which it shares the rows, in the columns that it stores, and they
    exchange what they found: bytes in proportion to the tokens, where a gather of the table would move all of it.
    """
    if not split.shards:
        return _looked_up(embedding, ids, dtype, split)
    tokens, length = ids.size * jax.lax.axis_size(split.shard_axes), ids.shape[1]
    count = next(n for n in range(1, length + 1) if length % n == 0 and (tokens <= LOOKUP * n or n == length))
    if count == 1:
        return _looked_up(embedding, ids, dtype, split)
    columns = jnp.moveaxis(ids.reshape(ids.shape[0], count, -1), 1, 0)
    found = jax.lax.map(lambda part: _looked_up(embedding, part, dtype, split), columns)
    return jnp.moveaxis(found, 0, 1).reshape(*ids.shape, -1)


def _looked_up(embedding: Array, ids: Array, dtype: jnp.dtype, split: Split) -> Float[Array, "B S D"]:
    wanted = gather(ids, split.shards, 0)
    if split.tensor:
        wanted = wanted - jax.lax.axis_index(split.tensor) * embedding.shape[0]
        mine = (wanted >= 0) & (wanted < embedding.shape[0])
        found = jnp.where(mine[..., None], embedding[jnp.clip(wanted, 0, embedding.shape[0] - 1)], 0)
    else:
        found = embedding[wanted]
    found = found.astype(dtype)
    if split.shards:
        found = jax.lax.all_to_all(found, split.shard_axes, split_axis=0, concat_axis=2, tiled=True)
    return leave(found, split.tensor)


def block(x: Float[Array, "B S D"], w: Block, at: Places, spec: Spec) -> Float[Array, "B S D"]:
    """One layer (the leading axis L of `w` is gone): sequential circuits as XGen's and LLaMA's, or parallel ones
    on one shared norm as GPT-J's and JaxFormer's."""
    split = spec.split
    normed = enter(norm(x, w.attention_norm, w.attention_norm_bias, spec.model), split.tensor)
    attended = attend(normed, w, at, spec)
    if w.mlp_norm is None:
        return x + attended + mlp(normed, w, split)
    x = x + attended
    return x + mlp(enter(norm(x, w.mlp_norm, w.mlp_norm_bias, spec.model), split.tensor), w, split)


def attend(x: Float[Array, "B S D"], w: Block, at: Places, spec: Spec) -> Float[Array, "B S D"]:
    """The attention circuit on a normed input."""
    split = spec.split
    q = rotate(inward(x, w.query, w.query_bias, split), at.cosine, at.sine)
    k = rotate(inward(x, w.key, w.key_bias, split), at.cosine, at.sine)
    v = inward(x, w.value, w.value_bias, split)
    mixed = attention(q, k, v, at.segments, spec.compute.attention, split.context, spec.compute.exchange)
    flat = mixed.reshape(*mixed.shape[:2], -1)
    return outward(flat, w.output.reshape(flat.shape[-1], -1), w.output_bias, split)


Layer = Callable[[Array, Block], Array]


def _in_loop(layer: Layer, remat: str) -> Layer:
    if remat == "none":
        return layer
    keep = jax.checkpoint_policies.save_only_these_names(PROJECTION) if remat == "dots" else None
    # A loop around the layer already keeps XLA from merging the recomputation away.
    wrapped: Layer = jax.checkpoint(layer, policy=keep, prevent_cse=False)
    return wrapped


def _in_line(layer: Layer, remat: str) -> Layer:
    """For kernels: the layer, of which the backward pass computes nothing again before the gradient comes to it. Left
    to itself XLA's CPU would do that for all layers first, and hold them all."""
    if remat == "none":
        return layer
    graded = _in_loop(layer, remat)

    def backward(pull: Callable[[Array], tuple[Array, Block]], gradient: Array) -> tuple[Array, Block]:
        def late(leaf: Array) -> Array:
            return native.after(leaf, gradient) if leaf.dtype == gradient.dtype else leaf

        gradients: tuple[Array, Block] = jax.tree.map(late, pull)(gradient)
        return gradients

    wrapped = jax.custom_vjp(layer)
    wrapped.defvjp(lambda x, w: jax.vjp(graded, x, w), backward)
    return wrapped


def head_of(weights: Weights) -> Float[Array, "D V"]:
    """The output embedding: its own, or the input embedding turned when they are tied."""
    return weights.embedding.T if weights.head is None else weights.head


def objective(
    weights: Weights,
    spec: Spec,
    ids: Int[Array, "B S"],
    targets: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    token_weight: Float[Array, ""] | float,
    z_loss: float = 0.0,
    remat: str = "none",
) -> tuple[Float[Array, ""], Float[Array, "B S"]]:
    """What training minimises: token_weight x the sum over tokens of nll (plus z-loss); and each token's nll.

    `token_weight` is one over the tokens of the whole batch, so that microbatches add up to the batch's mean.
    """
    x = forward(weights, spec, ids, segments, positions, remat)
    flat = x.reshape(-1, x.shape[-1])
    each = jnp.full(flat.shape[0], token_weight, accumulator(spec.dtype))
    head, flat_targets = head_of(weights), targets.reshape(-1)
    loss, per_token = weighted_loss(flat, head, flat_targets, each, spec.real_vocab, z_loss, spec.split)
    return loss, jax.lax.stop_gradient(per_token).reshape(ids.shape)


def nll(
    weights: Weights,
    spec: Spec,
    ids: Int[Array, "B S"],
    targets: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    positions: Int[Array, "B S"],
) -> Float[Array, "B S"]:
    """Each target's negative log-likelihood in nats; never all logits at once; for measurement, not for gradients."""
    x = forward(weights, spec, ids, segments, positions)
    flat = token_nll(x.reshape(-1, x.shape[-1]), head_of(weights), targets.reshape(-1), spec.real_vocab, spec.split)
    return flat.reshape(ids.shape)


def logits(
    weights: Weights,
    spec: Spec,
    ids: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    positions: Int[Array, "B S"],
) -> Float[Array, "B S V"]:
    """All logits in float32; rows past the tokenizer's are masked."""
    return masked_logits(
        forward(weights, spec, ids, segments, positions), head_of(weights), spec.real_vocab, spec.split
    )


def last_logits(weights: Weights, spec: Spec, ids: Int[Array, "B S"], length: Int[Array, ""]) -> Float[Array, "B V"]:
    """Logits of the token after the first `length` of each row; what stands past them is not looked at."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    x = forward(weights, spec, ids, (positions >= length).astype(jnp.int32), positions)
    last = jax.lax.dynamic_index_in_dim(x, length - 1, axis=1, keepdims=False)
    return masked_logits(last, head_of(weights), spec.real_vocab, spec.split)
