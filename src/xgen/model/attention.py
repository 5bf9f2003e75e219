"""Causal attention within documents: one interface, a plain reference and a memory-linear backend.

A query sees the keys at or before its own place in the row that carry its own segment number; so with a
document mask nothing leaks between documents, and without one all segment numbers are 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from xgen.model.linear import accumulator

BLOCK = 512
"""Queries, and keys, that `blockwise` handles at once, at most."""

# Large enough that exp underflows to 0 beside any real score, small enough to stay finite in float32.
_MASKED = -1e30


def attention(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    segments: Int[Array, "B S"],
    backend: str = "auto",
) -> Float[Array, "B S H E"]:
    """Softmax(q k / sqrt(E)) v under the causal and the segment mask.

    `backend`: "reference" holds all S x S scores; "blockwise" holds BLOCK x BLOCK of one key head at a time, forward
    and backward; "auto" is blockwise.
    """
    return BACKENDS[backend](q, k, v, segments)


def reference(q: Array, k: Array, v: Array, segments: Array) -> Array:
    """The definition, as an einsum over all pairs; differentiated automatically."""
    groups = q.shape[2] // k.shape[2]
    wide = accumulator(q.dtype)
    keys, values = (jnp.repeat(x, groups, axis=2).astype(wide) for x in (k, v))
    scores = jnp.einsum("bshe,bthe->bhst", q.astype(wide), keys) / math.sqrt(q.shape[-1])
    place = jnp.arange(q.shape[1])
    visible = (place[:, None] >= place[None, :]) & (segments[:, :, None] == segments[:, None, :])
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, _MASKED), axis=-1)
    return jnp.einsum("bhst,bthe->bshe", weights, values).astype(q.dtype)


def blockwise(q: Array, k: Array, v: Array, segments: Array) -> Array:
    """Attention in tiles of queries and keys, those above the diagonal left out: the softmax is carried from tile to
    tile, and the backward pass recomputes the scores from its log-sum-exp (Dao et al. 2022)."""
    b, s, h, e = q.shape
    kv = k.shape[2]
    rows = jnp.repeat(segments, kv, axis=0)  # one row of work per sequence and key head
    by_head = partial(_to_rows, kv_heads=kv)
    out = _rows_attention(by_head(q), by_head(k)[:, 0], by_head(v)[:, 0], rows)
    return out.reshape(b, kv, h // kv, s, e).transpose(0, 3, 1, 2, 4).reshape(b, s, h, e)


BACKENDS: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
    "reference": reference,
    "blockwise": blockwise,
    "auto": blockwise,
}


def _to_rows(x: Float[Array, "B S H E"], kv_heads: int) -> Float[Array, "R G S E"]:
    b, s, h, e = x.shape
    return (
        x.reshape(b, s, kv_heads, h // kv_heads, e).transpose(0, 2, 3, 1, 4).reshape(b * kv_heads, h // kv_heads, s, e)
    )


def _over_rows(function: Callable[..., tuple[Array, ...]], length: int) -> Callable[..., tuple[Array, ...]]:
    """Short rows run as one batch; long ones a row at a time, which keeps the scores few and in cache (half the time
    of one batched product at 4,096 positions)."""
    if length <= BLOCK:
        return jax.vmap(function)
    return lambda *arrays: jax.lax.map(lambda row: function(*row), arrays)


@jax.custom_vjp
def _rows_attention(
    q: Float[Array, "R G S E"], k: Float[Array, "R S E"], v: Float[Array, "R S E"], segments: Int[Array, "R S"]
) -> Float[Array, "R G S E"]:
    return _over_rows(_row_forward, q.shape[2])(q, k, v, segments)[0]


def _rows_forward(q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, tuple[Array, ...]]:
    out, lse = _over_rows(_row_forward, q.shape[2])(q, k, v, segments)
    return out, (q, k, v, segments, out, lse)


def _rows_backward(saved: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
    dq, dk, dv = _over_rows(_row_backward, gradient.shape[2])(*saved, gradient)
    return dq, dk, dv, None


_rows_attention.defvjp(_rows_forward, _rows_backward)


@dataclass(frozen=True)
class _Tiles:
    """A row cut into equal tiles, zeros after its end. Nothing real sees what stands there: it comes later."""

    length: int
    size: int
    count: int

    @classmethod
    def of(cls, length: int) -> _Tiles:
        count = -(-length // BLOCK)
        size = -(-length // count)
        return cls(length, size + (-size % 8 if count > 1 else 0), count)

    def cut(self, x: Array, axis: int, fill: float = 0) -> Array:
        """The tiles of `axis` on a new leading axis."""
        widths = [(0, self.size * self.count - self.length if place == axis else 0) for place in range(x.ndim)]
        padded = jnp.pad(x, widths, constant_values=fill)
        return jnp.moveaxis(padded.reshape(*x.shape[:axis], self.count, self.size, *x.shape[axis + 1 :]), axis, 0)

    def join(self, tiles: Array, axis: int) -> Array:
        """The inverse of `cut`."""
        whole = jnp.moveaxis(tiles, 0, axis)
        whole = whole.reshape(*whole.shape[:axis], self.count * self.size, *whole.shape[axis + 2 :])
        return jax.lax.slice_in_dim(whole, 0, self.length, axis=axis)

    def places(self, tile: Int[Array, ""]) -> Int[Array, " Q"]:
        return tile * self.size + jnp.arange(self.size)


def _visible(
    query_places: Int[Array, " Q"],
    key_places: Int[Array, " M"],
    query_segments: Int[Array, " Q"],
    key_segments: Int[Array, " M"],
) -> Bool[Array, "Q M"]:
    return (query_places[:, None] >= key_places) & (query_segments[:, None] == key_segments)


def _scores(q: Float[Array, "G Q E"], k: Float[Array, "M E"], visible: Bool[Array, "Q M"]) -> Float[Array, "G Q M"]:
    """Scaled and masked."""
    return jnp.where(visible, _einsum("gqe,ke->gqk", q, k) / math.sqrt(q.shape[-1]), _MASKED)


def _row_forward(
    q: Float[Array, "G S E"], k: Float[Array, "S E"], v: Float[Array, "S E"], segments: Int[Array, " S"]
) -> tuple[Float[Array, "G S E"], Float[Array, "G S"]]:
    """Output and log-sum-exp of one key head. A tile whose keys are all masked adds what the next real one scales by
    exp(-1e30) = 0."""
    tiles, wide = _Tiles.of(q.shape[1]), accumulator(q.dtype)
    keys, values, documents = tiles.cut(k, 0), tiles.cut(v, 0), tiles.cut(segments, 0)

    def queries(block: tuple[Array, Array]) -> tuple[Array, Array]:
        index, rows = block

        def against(tile: Array, sofar: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, peak, total = sofar
            visible = _visible(tiles.places(index), tiles.places(tile), documents[index], documents[tile])
            scores = _scores(rows, keys[tile], visible)
            higher = jnp.maximum(peak, scores.max(axis=-1, keepdims=True))
            weights, faded = jnp.exp(scores - higher), jnp.exp(peak - higher)
            mixed = _einsum("gqk,ke->gqe", weights.astype(v.dtype), values[tile])
            return out * faded + mixed, higher, total * faded + weights.sum(axis=-1, keepdims=True)

        lead = rows.shape[:-1]
        start = (jnp.zeros(rows.shape, wide), jnp.full((*lead, 1), -jnp.inf, wide), jnp.zeros((*lead, 1), wide))
        out, peak, total = jax.lax.fori_loop(0, index + 1, against, start)
        return (out / total).astype(q.dtype), (peak + jnp.log(total))[..., 0]

    out, lse = jax.lax.map(queries, (jnp.arange(tiles.count), tiles.cut(q, 1)))
    return tiles.join(out, 1), tiles.join(lse, 1)


def _row_backward(
    q: Array, k: Array, v: Array, segments: Array, out: Array, lse: Array, gradient: Array
) -> tuple[Array, Array, Array]:
    """With P = softmax(S): dV = P' dO, dS = P (dO V' - rowsum(dO O)), dQ = dS K, dK = dS' Q."""
    tiles, wide = _Tiles.of(q.shape[1]), accumulator(q.dtype)
    keys, values, documents = tiles.cut(k, 0), tiles.cut(v, 0), tiles.cut(segments, 0)
    inner = jnp.sum(gradient.astype(wide) * out.astype(wide), axis=-1)

    def queries(sums: tuple[Array, Array], block: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        index, rows, rows_lse, rows_inner, rows_gradient = block

        def against(tile: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = sums
            visible = _visible(tiles.places(index), tiles.places(tile), documents[index], documents[tile])
            weights = jnp.exp(_scores(rows, keys[tile], visible) - rows_lse[..., None])
            d_weights = _einsum("gqe,ke->gqk", rows_gradient, values[tile])
            d_scores = (weights * (d_weights - rows_inner[..., None]) / math.sqrt(q.shape[-1])).astype(q.dtype)
            dv = dv.at[tile].add(_einsum("gqk,gqe->ke", weights.astype(q.dtype), rows_gradient))
            dk = dk.at[tile].add(_einsum("gqk,gqe->ke", d_scores, rows))
            return dq + _einsum("gqk,ke->gqe", d_scores, keys[tile]), dk, dv

        dq, dk, dv = jax.lax.fori_loop(0, index + 1, against, (jnp.zeros(rows.shape, wide), *sums))
        return (dk, dv), dq.astype(q.dtype)

    # A log-sum-exp that no score reaches gives the surplus queries weights of 0.
    blocks = (tiles.cut(q, 1), tiles.cut(lse, 1, -_MASKED), tiles.cut(inner, 1), tiles.cut(gradient, 1))
    zeros = (jnp.zeros(keys.shape, wide), jnp.zeros(values.shape, wide))
    (dk, dv), dq = jax.lax.scan(queries, zeros, (jnp.arange(tiles.count), *blocks))
    return tiles.join(dq, 1), tiles.join(dk, 0).astype(k.dtype), tiles.join(dv, 0).astype(v.dtype)


def _einsum(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=accumulator(a.dtype))
