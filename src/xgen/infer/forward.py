"""The decoder over the cache: new tokens in, their hidden states out, their keys and values kept.

Attention goes over a row's pages one after the other with a running softmax (Milakov and Gimelshein 2018), as many as
the longest row has: cost and memory follow what is there, and no shape depends on it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from xgen.infer.cache import Cache, LayerCache, read, write
from xgen.infer.quantise import Quantised, Served, dense, plain, spread
from xgen.model import Spec, native
from xgen.model.decoder import embed
from xgen.model.layers import inward, mlp, norm, outward
from xgen.model.linear import accumulator, dot
from xgen.model.rope import angles, rotate
from xgen.model.split import Split, gather
from xgen.model.weights import WEIGHTS, Block


class Where(NamedTuple):
    """Where the new tokens stand: the pages of each row, the place of its first column, how many columns it has."""

    table: Int[Array, "R M"]
    start: Int[Array, " R"]
    length: Int[Array, " R"]


class _Turns(NamedTuple):
    cosine: Float[Array, "R C 1 P"]
    sine: Float[Array, "R C 1 P"]
    places: Int[Array, "R C"]


_HIDDEN = -1e30
"""Score of a pair that does not see each other, and of what is no token."""


def forward(
    weights: Served, spec: Spec, cache: Cache, ids: Int[Array, "R C"], where: Where
) -> tuple[Float[Array, "R C D"], Cache]:
    """Hidden states after the final norm; of columns past a row's length they mean nothing."""
    places = where.start[:, None] + jnp.arange(ids.shape[1])
    turns = _Turns(*angles(places, jnp.zeros_like(places), spec.model, accumulator(spec.dtype)), places)
    x = _embedded(weights, ids, spec)
    held = []
    for stored, pool in zip(weights.blocks, cache, strict=True):
        x, pool = _block(x, stored, pool, where, turns, spec)
        held.append(pool)
    scale, bias = gather(weights.final_norm, spec.split.shards, 0), _vector(weights.final_norm_bias, spec.split)
    return norm(x, scale, bias, spec.model), tuple(held)


def next_logits(weights: Served, spec: Spec, x: Float[Array, "T D"]) -> Float[Array, "T V"]:
    """Float32 logits, whole on every device; padding rows of the vocabulary are -1e30."""
    if weights.head is None:
        table = gather(plain(weights.embedding, spec.dtype), spec.split.shards, 1)
        scores = dot(x, table, 1, 1) if native.applies(x, table) else _turned(table, x)
    else:
        scores = dot(x, gather(plain(weights.head, spec.dtype), spec.split.shards, 0), 1, 0)
    whole = gather(scores, spec.split.tensor, 1)
    return jnp.where(jnp.arange(whole.shape[1]) < spec.real_vocab, whole, _HIDDEN)


def _turned(table: Float[Array, "V D"], x: Float[Array, "T D"]) -> Float[Array, "T V"]:
    """XLA's CPU multiplies a bfloat16 matrix with one row ten times slower than with two, and with the matrix turned
    ten times slower than with the rows turned."""
    rows = jnp.tile(x, (2, 1)) if x.shape[0] == 1 and x.dtype == jnp.bfloat16 else x
    return dot(table, rows, 1, 1)[:, : x.shape[0]].T


def _embedded(weights: Served, ids: Int[Array, "R C"], spec: Spec) -> Float[Array, "R C D"]:
    table = weights.embedding
    if not isinstance(table, Quantised):
        return embed(table, ids, spec.dtype, spec.split)
    wide = accumulator(spec.dtype)
    scale = gather(gather(table.scale, spec.split.tensor, 0), spec.split.shards, 1)
    found = embed(table.values, ids, wide, spec.split)
    return (found * spread(scale[ids], found.shape)).astype(spec.dtype)


# Compiled as one program with the rest, but traced once for all layers: nine tenths of a warm start otherwise.
@partial(jax.jit, static_argnums=5)
def _block(
    x: Float[Array, "R C D"], w: Block, pool: LayerCache, where: Where, turns: _Turns, spec: Spec
) -> tuple[Float[Array, "R C D"], LayerCache]:
    """One layer, as `xgen.model.decoder.block`, its keys and values read from and added to the cache."""
    w = dense(_whole_vectors(w, spec.split), spec)
    normed = norm(x, w.attention_norm, w.attention_norm_bias, spec.model)
    attended, pool = _attend(normed, w, pool, where, turns, spec)
    if w.mlp_norm is None:
        return x + attended + mlp(normed, w, spec.split), pool
    x = x + attended
    return x + mlp(norm(x, w.mlp_norm, w.mlp_norm_bias, spec.model), w, spec.split), pool


def _attend(
    x: Float[Array, "R C D"], w: Block, pool: LayerCache, where: Where, turns: _Turns, spec: Spec
) -> tuple[Float[Array, "R C D"], LayerCache]:
    split = spec.split
    q = rotate(inward(x, w.query, w.query_bias, split), turns.cosine, turns.sine)
    k = rotate(inward(x, w.key, w.key_bias, split), turns.cosine, turns.sine)
    v = inward(x, w.value, w.value_bias, split)
    pool = write(pool, k, v, *where)
    if native.attends_pages(q, pool.value):
        mixed = native.attend_pages(q, pool.key, pool.value, *where)
    else:
        mixed = over_pages(q, pool, where, turns.places)
    flat = mixed.astype(x.dtype).reshape(*mixed.shape[:2], -1)
    return outward(flat, w.output.reshape(flat.shape[-1], -1), w.output_bias, split), pool


def over_pages(
    q: Float[Array, "R C H E"], pool: LayerCache, where: Where, places: Int[Array, "R C"]
) -> Float[Array, "R C H E"]:
    """Causal attention of the new tokens to all places of their rows up to their own.

    Sums are in float32. So are the products' operands where there is one column: it is the memory that decoding waits
    for, and XLA's CPU has no fast bfloat16 product of so few rows.
    """
    rows, columns, heads, size = q.shape
    kv_heads, page = pool.value.shape[1], pool.value.shape[2]
    wide = accumulator(q.dtype)
    kind = wide if columns == 1 else q.dtype
    # Heads that share keys stand together: one product for all of them and all columns.
    grouped = (q.astype(wide) / math.sqrt(size)).astype(kind).reshape(rows, columns, kv_heads, -1, size)
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, -1, size)
    own = jnp.tile(places, (1, heads // kv_heads))[:, None, :, None]

    def body(masked: bool, index: Int[Array, ""], carried: _Running) -> _Running:
        block = read(pool, jax.lax.dynamic_index_in_dim(where.table, index, 1, keepdims=False), kind)
        scores = _product(grouped, block.key)
        if block.key_scale is not None:
            scores = scores * block.key_scale[:, :, None, :]
        if masked:
            scores = jnp.where(index * page + jnp.arange(page) <= own, scores, _HIDDEN)
            block = _written(block, index * page + jnp.arange(page) < (where.start + where.length)[:, None])
        higher = jnp.maximum(carried.peak, scores.max(axis=-1))
        weights, kept = jnp.exp(scores - higher[..., None]), jnp.exp(carried.peak - higher)
        mass = carried.mass * kept + weights.sum(axis=-1)
        if block.value_scale is not None:
            weights = weights * block.value_scale[:, :, None, :]
        mixed = carried.mixed * kept[..., None] + _product(weights.astype(kind), block.value)
        return _Running(higher, mass, mixed)

    shape = grouped.shape[:-1]
    begun = _Running(jnp.full(shape, _HIDDEN, wide), jnp.zeros(shape, wide), jnp.zeros(grouped.shape, wide))
    # Pages that lie before every row's first column are seen whole.
    whole, last = jnp.min(where.start) // page, jnp.max(where.start + where.length + page - 1) // page
    begun = jax.lax.fori_loop(0, whole, partial(body, False), begun)
    ended = jax.lax.fori_loop(whole, last, partial(body, True), begun)
    parted = (ended.mixed / ended.mass[..., None]).reshape(rows, kv_heads, -1, columns, size)
    result: Array = parted.transpose(0, 3, 1, 2, 4).reshape(q.shape)
    return result


def _written(block: LayerCache, there: Bool[Array, "R N"]) -> LayerCache:
    """`block` without what an earlier row left in its values: a weight of 0 does not hide what is not a number."""
    if block.value_scale is None:
        return replace(block, value=jnp.where(there[:, None, :, None], block.value, 0))
    return replace(block, value_scale=jnp.where(there[:, None], block.value_scale, 0))


class _Running(NamedTuple):
    """A softmax over the pages so far: the largest score, the sum of exponentials below it, the sum of the values."""

    peak: Float[Array, "R K Q"]
    mass: Float[Array, "R K Q"]
    mixed: Float[Array, "R K Q E"]


def _product(a: Float[Array, "R K Q A"], b: Array) -> Float[Array, "R K Q B"]:
    both = (((3,), (2,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b.astype(a.dtype), both, preferred_element_type=accumulator(a.dtype))


def _whole_vectors(block: Block, split: Split) -> Block:
    """Of a mesh that stores the stream's axis in parts, the layer's vectors along it whole."""
    parted = {name: _vector(getattr(block, name), split) for name in _ALONG_STREAM}
    return replace(block, **parted)  # type: ignore[arg-type]  # None only where the model has none


def _vector(leaf: Float[Array, " D"] | None, split: Split) -> Float[Array, " D"] | None:
    return None if leaf is None else gather(leaf, split.shards, 0)


_ALONG_STREAM = tuple(
    row.name.removeprefix("block.")
    for row in WEIGHTS
    if row.name.startswith("block.") and row.axes[-1] == "embed" and not row.decay
)
"""Vectors of a layer."""
