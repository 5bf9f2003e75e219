"""Attention in tiles of queries and keys, whose memory grows with the length and not with its square.

A row of work is one sequence and one key head. Its places are cut into chunks, contiguous in the natural order: one
chunk when a device holds whole sequences, an early and a late one of two when the columns are spread
(`xgen.model.split.zigzag`). Chunks are cut into tiles, numbered in the natural order of the whole row; a tile of
queries meets the tiles of keys up to its own number, so what lies above the diagonal is never touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from xgen.model import native
from xgen.model.linear import accumulator

BLOCK = 512
"""Queries, and keys, that are handled at once, at most."""

# Large enough that exp underflows to 0 beside any real score, small enough to stay finite in float32.
MASKED = -1e30

# A place after every real one: of the zeros that fill a chunk's last tile.
_AFTER_ALL = 2**31 - 1


def blockwise(q: Array, k: Array, v: Array, segments: Array) -> Array:
    """Attention in tiles of queries and keys, those above the diagonal left out: the softmax is carried from tile to
    tile, and the backward pass recomputes the scores from its log-sum-exp (Dao et al. 2022)."""
    if native.applies(q, k, v):
        return _native(q, k, v, segments)
    rows = to_rows(q, k, v, segments)
    return from_rows(_rows_attention(*rows), q.shape[0])


@jax.custom_vjp
def _native(q: Array, k: Array, v: Array, segments: Array) -> Array:
    """The same by the CPU's kernels."""
    return native.attend(q, k, v, segments)[0]


def _native_forward(q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, tuple[Array, ...]]:
    out, lse = native.attend(q, k, v, segments)
    return out, (q, k, v, segments, out, lse)


def _native_backward(saved: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
    q, k, v, segments, out, lse = saved
    return *native.attend_gradients(q, k, v, segments, out, lse, gradient), None


_native.defvjp(_native_forward, _native_backward)


class Rows(NamedTuple):
    """The work of one key head a row."""

    q: Float[Array, "R G S E"]
    k: Float[Array, "R S E"]
    v: Float[Array, "R S E"]
    segments: Int[Array, "R S"]


def to_rows(
    q: Float[Array, "B S H E"], k: Float[Array, "B S K E"], v: Float[Array, "B S K E"], segments: Int[Array, "B S"]
) -> Rows:
    kv = k.shape[2]
    rows = jnp.repeat(segments, kv, axis=0)
    by_head = partial(_by_head, kv_heads=kv)
    return Rows(by_head(q), by_head(k)[:, 0], by_head(v)[:, 0], rows)


def from_rows(out: Float[Array, "R G S E"], sequences: int) -> Float[Array, "B S H E"]:
    """The inverse of what `to_rows` does to the queries."""
    r, g, s, e = out.shape
    kv = r // sequences
    return out.reshape(sequences, kv, g, s, e).transpose(0, 3, 1, 2, 4).reshape(sequences, s, kv * g, e)


def _by_head(x: Float[Array, "B S H E"], kv_heads: int) -> Float[Array, "R G S E"]:
    b, s, h, e = x.shape
    return (
        x.reshape(b, s, kv_heads, h // kv_heads, e).transpose(0, 2, 3, 1, 4).reshape(b * kv_heads, h // kv_heads, s, e)
    )


def over_rows(function: Callable[..., tuple[Array, ...]], length: int) -> Callable[..., tuple[Array, ...]]:
    """Short rows run as one batch; long ones a row at a time, which keeps the scores few and in cache (half the time
    of one batched product at 4,096 positions)."""
    if length <= BLOCK:
        return jax.vmap(function)
    return lambda *arrays: jax.lax.map(lambda row: function(*row), arrays)


@jax.custom_vjp
def _rows_attention(
    q: Float[Array, "R G S E"], k: Float[Array, "R S E"], v: Float[Array, "R S E"], segments: Int[Array, "R S"]
) -> Float[Array, "R G S E"]:
    return _rows_forward(q, k, v, segments)[0]


def _rows_forward(q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, tuple[Array, ...]]:
    length = q.shape[2]
    forward = partial(row_forward, Meeting.whole(length))
    out, lse = over_rows(forward, length)(q, segments, k, v, segments)
    return out, (q, k, v, segments, out, lse)


def _rows_backward(saved: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
    q, k, v, segments, out, lse = saved
    length = q.shape[2]
    backward = partial(row_backward, Meeting.whole(length), (q.dtype, k.dtype))
    return *over_rows(backward, length)(q, segments, k, v, segments, out, lse, gradient), None


_rows_attention.defvjp(_rows_forward, _rows_backward)


@dataclass(frozen=True)
class Tiles:
    """Chunks of `length` places cut into `count` equal tiles each, zeros after a chunk's end."""

    length: int
    size: int
    count: int

    @classmethod
    def of(cls, length: int) -> Tiles:
        count = -(-length // BLOCK)
        size = -(-length // count)
        return cls(length, size + (-size % 8 if count > 1 else 0), count)

    def numbers(self, chunks: Int[Array, " C"]) -> Int[Array, " N"]:
        """Of the tiles of these chunks, in the natural order of the whole row."""
        return (chunks[:, None] * self.count + jnp.arange(self.count)).reshape(-1)

    def cut(self, x: Array, axis: int, fill: float = 0) -> Array:
        """The tiles of `axis`, which is made of whole chunks, on a new leading axis."""
        before, after, chunks = (x.shape[:axis], x.shape[axis + 1 :], x.shape[axis] // self.length)
        widths = [(0, 0)] * (x.ndim + 1)
        widths[axis + 1] = (0, self.size * self.count - self.length)
        padded = jnp.pad(x.reshape(*before, chunks, self.length, *after), widths, constant_values=fill)
        return jnp.moveaxis(padded.reshape(*before, chunks * self.count, self.size, *after), axis, 0)

    def join(self, tiles: Array, axis: int) -> Array:
        """The inverse of `cut`."""
        whole, chunks = jnp.moveaxis(tiles, 0, axis), tiles.shape[0] // self.count
        before, after = whole.shape[:axis], whole.shape[axis + 2 :]
        padded = whole.reshape(*before, chunks, self.count * self.size, *after)
        kept = jax.lax.slice_in_dim(padded, 0, self.length, axis=axis + 1)
        return kept.reshape(*before, chunks * self.length, *after)

    def places(self, number: Int[Array, ""]) -> Int[Array, " Q"]:
        """Natural places of a tile. Nothing real sees the zeros after a chunk's end: they stand after everything."""
        if self.size * self.count == self.length:
            return number * self.size + jnp.arange(self.size)
        within = number % self.count * self.size + jnp.arange(self.size)
        return jnp.where(within < self.length, number // self.count * self.length + within, _AFTER_ALL)


class Meeting(NamedTuple):
    """Which tiles of queries meet which of keys: each those keys whose number is not above its own.

    The keys' numbers ascend, and so each meets the first few of them.
    """

    tiles: Tiles
    queries: Int[Array, " N"]
    keys: Int[Array, " M"]

    @classmethod
    def whole(cls, length: int) -> Meeting:
        """Of a row that one device holds, in its natural order."""
        return cls.of(length, jnp.arange(1), jnp.arange(1))

    @classmethod
    def of(cls, length: int, queries: Int[Array, " C"], keys: Int[Array, " K"]) -> Meeting:
        """Of the queries and the keys of these chunks of `length` places, by their natural numbers."""
        tiles = Tiles.of(length)
        return cls(tiles, tiles.numbers(queries), tiles.numbers(keys))

    def met(self, query: Int[Array, ""]) -> Int[Array, ""]:
        """How many tiles of keys the tile of queries of this number meets."""
        return jnp.sum(self.keys <= query)


def _visible(
    query_places: Int[Array, " Q"],
    key_places: Int[Array, " M"],
    query_segments: Int[Array, " Q"],
    key_segments: Int[Array, " M"],
) -> Bool[Array, "Q M"]:
    return (query_places[:, None] >= key_places) & (query_segments[:, None] == key_segments)


def _scores(q: Float[Array, "G Q E"], k: Float[Array, "M E"], visible: Bool[Array, "Q M"]) -> Float[Array, "G Q M"]:
    """Scaled and masked."""
    return jnp.where(visible, _einsum("gqe,ke->gqk", q, k) / math.sqrt(q.shape[-1]), MASKED)


class Softmax(NamedTuple):
    """A softmax underway: the sum of values weighted by exp(score - peak), the peak, the sum of the weights."""

    out: Float[Array, "*R G Q E"]
    peak: Float[Array, "*R G Q 1"]
    total: Float[Array, "*R G Q 1"]

    @classmethod
    def start(cls, shape: tuple[int, ...], dtype: jnp.dtype) -> Softmax:
        lead = (*shape[:-1], 1)
        return cls(jnp.zeros(shape, dtype), jnp.full(lead, -jnp.inf, dtype), jnp.zeros(lead, dtype))

    def end(self, dtype: jnp.dtype) -> tuple[Array, Array]:
        """The mean of the values, and the log-sum-exp of the scores."""
        return (self.out / self.total).astype(dtype), (self.peak + jnp.log(self.total))[..., 0]


class _Keys(NamedTuple):
    keys: Float[Array, "N M E"]
    values: Float[Array, "N M E"]
    segments: Int[Array, "N M"]


def _sweep(
    meeting: Meeting,
    number: Int[Array, ""],
    rows: Float[Array, "G Q E"],
    segments: Int[Array, " Q"],
    against: _Keys,
    sofar: Softmax,
) -> Softmax:
    """One tile of queries against its tiles of keys. A tile whose keys are all masked adds what the next real one
    scales by exp(-1e30) = 0, or, after a real one, nothing."""

    def step(tile: Array, sofar: Softmax) -> Softmax:
        out, peak, total = sofar
        places = meeting.tiles.places(number), meeting.tiles.places(meeting.keys[tile])
        visible = _visible(*places, segments, against.segments[tile])
        scores = _scores(rows, against.keys[tile], visible)
        higher = jnp.maximum(peak, scores.max(axis=-1, keepdims=True))
        weights, faded = jnp.exp(scores - higher), jnp.exp(peak - higher)
        mixed = _einsum("gqk,ke->gqe", weights.astype(against.values.dtype), against.values[tile])
        return Softmax(out * faded + mixed, higher, total * faded + weights.sum(axis=-1, keepdims=True))

    carried: Softmax = jax.lax.fori_loop(0, meeting.met(number), step, sofar)
    return carried


def row_forward(
    meeting: Meeting,
    q: Float[Array, "G S E"],
    segments: Int[Array, " S"],
    k: Float[Array, "T E"],
    v: Float[Array, "T E"],
    key_segments: Int[Array, " T"],
) -> tuple[Float[Array, "G S E"], Float[Array, "G S"]]:
    """Output and log-sum-exp of one key head."""
    tiles = meeting.tiles
    against = _Keys(tiles.cut(k, 0), tiles.cut(v, 0), tiles.cut(key_segments, 0))

    def queries(block: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        number, rows, documents = block
        start = Softmax.start(rows.shape, accumulator(q.dtype))
        return _sweep(meeting, number, rows, documents, against, start).end(q.dtype)

    out, lse = jax.lax.map(queries, (meeting.queries, tiles.cut(q, 1), tiles.cut(segments, 0)))
    return tiles.join(out, 1), tiles.join(lse, 1)


def row_advance(
    meeting: Meeting,
    sofar: Softmax,
    q: Float[Array, "G S E"],
    segments: Int[Array, " S"],
    k: Float[Array, "T E"],
    v: Float[Array, "T E"],
    key_segments: Int[Array, " T"],
) -> Softmax:
    """The softmax of one key head's queries, carried on over these keys."""
    tiles = meeting.tiles
    against = _Keys(tiles.cut(k, 0), tiles.cut(v, 0), tiles.cut(key_segments, 0))

    def queries(block: tuple[Array, Array, Array, Softmax]) -> Softmax:
        number, rows, documents, sofar = block
        return _sweep(meeting, number, rows, documents, against, sofar)

    cut = Softmax(*(tiles.cut(part, 1) for part in sofar))
    carried = jax.lax.map(queries, (meeting.queries, tiles.cut(q, 1), tiles.cut(segments, 0), cut))
    return Softmax(*(tiles.join(part, 1) for part in carried))


def row_backward(
    meeting: Meeting,
    kinds: tuple[jnp.dtype, jnp.dtype],
    q: Float[Array, "G S E"],
    segments: Int[Array, " S"],
    k: Float[Array, "T E"],
    v: Float[Array, "T E"],
    key_segments: Int[Array, " T"],
    out: Float[Array, "G S E"],
    lse: Float[Array, "G S"],
    gradient: Float[Array, "G S E"],
) -> tuple[Float[Array, "G S E"], Float[Array, "T E"], Float[Array, "T E"]]:
    """With P = softmax(S): dV = P' dO, dS = P (dO V' - rowsum(dO O)), dQ = dS K, dK = dS' Q.

    `kinds`: the types of dQ and of dK, dV, which are summed in the accumulator's type whatever they are.
    """
    tiles, wide = meeting.tiles, accumulator(q.dtype)
    keys, values, documents = (tiles.cut(k, 0), tiles.cut(v, 0), tiles.cut(key_segments, 0))
    inner = jnp.sum(gradient.astype(wide) * out.astype(wide), axis=-1)

    def queries(sums: tuple[Array, Array], block: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        number, rows, rows_segments, rows_lse, rows_inner, rows_gradient = block

        def against(tile: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = sums
            places = tiles.places(number), tiles.places(meeting.keys[tile])
            visible = _visible(*places, rows_segments, documents[tile])
            weights = jnp.exp(_scores(rows, keys[tile], visible) - rows_lse[..., None])
            d_weights = _einsum("gqe,ke->gqk", rows_gradient, values[tile])
            d_scores = (weights * (d_weights - rows_inner[..., None]) / math.sqrt(q.shape[-1])).astype(q.dtype)
            dv = dv.at[tile].add(_einsum("gqk,gqe->ke", weights.astype(q.dtype), rows_gradient))
            dk = dk.at[tile].add(_einsum("gqk,gqe->ke", d_scores, rows))
            return dq + _einsum("gqk,ke->gqe", d_scores, keys[tile]), dk, dv

        dq, dk, dv = jax.lax.fori_loop(0, meeting.met(number), against, (jnp.zeros(rows.shape, wide), *sums))
        return (dk, dv), dq.astype(kinds[0])

    # A log-sum-exp that no score reaches gives the surplus queries weights of 0.
    blocks = (tiles.cut(segments, 0), tiles.cut(lse, 1, -MASKED), tiles.cut(inner, 1), tiles.cut(gradient, 1))
    zeros = (jnp.zeros(keys.shape, wide), jnp.zeros(values.shape, wide))
    (dk, dv), dq = jax.lax.scan(queries, zeros, (meeting.queries, tiles.cut(q, 1), *blocks))
    return (tiles.join(dq, 1), tiles.join(dk, 0).astype(kinds[1]), tiles.join(dv, 0).astype(kinds[1]))


def _einsum(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=accumulator(a.dtype))
