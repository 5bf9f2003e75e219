"""Attention of a device that holds some columns of each sequence, in zigzag order, to the keys of all devices.

Two ways. `gathered`: every device gets all keys and values and attends to them at once; memory for the keys grows with
the whole length, and the fewest messages are sent. `ringed`: keys and values go round the devices, and each device
keeps only its own and the ones that are passing through; memory stays that of its own columns. Either way a device's
early and late chunk meet the same number of tiles as any other device's. Both run inside `jax.shard_map`; `axes` are
the mesh axes over which the columns are spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from xgen.errors import RecipeError
from xgen.model.attention.tiles import (
    Meeting,
    Softmax,
    from_rows,
    over_rows,
    row_advance,
    row_backward,
    row_forward,
    to_rows,
)
from xgen.model.linear import accumulator
from xgen.model.split import gather, scatter, zigzag

Axes = tuple[str, ...]


def gathered(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    segments: Int[Array, "B S"],
    axes: Axes,
) -> Float[Array, "B S H E"]:
    """Keys and values of all devices are gathered, again for the backward pass; their gradients are summed over the
    devices in at least float32."""
    return from_rows(_gathered(*to_rows(q, k, v, segments), axes), q.shape[0])


def ringed(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    segments: Int[Array, "B S"],
    axes: Axes,
) -> Float[Array, "B S H E"]:
    """Keys and values go from device to device; in the backward pass their gradients, in at least float32, go round
    with them and end at home (Liu et al. 2023, arXiv 2310.01889)."""
    return from_rows(_ringed(*to_rows(q, k, v, segments), axes), q.shape[0])


def natural(x: Array, parts: int, dimension: int) -> Array:
    """Columns that are stored in zigzag order, in their natural order."""
    return _reordered(x, np.argsort(zigzag(2 * parts, parts)), dimension)


def stored(x: Array, parts: int, dimension: int) -> Array:
    """The inverse of `natural`."""
    return _reordered(x, zigzag(2 * parts, parts), dimension)


def _reordered(x: Array, order: Sequence[int] | np.ndarray, dimension: int) -> Array:
    chunks = jnp.split(x, len(order), axis=dimension)
    return jnp.concatenate([chunks[chunk] for chunk in order], axis=dimension)


def _chunks(part: Int[Array, ""], parts: int) -> Int[Array, " 2"]:
    """The natural numbers of the two chunks that a part holds."""
    return jnp.asarray(zigzag(2 * parts, parts).reshape(parts, 2))[part]


def _chunk_length(columns: int) -> int:
    if columns % 2:
        raise RecipeError(
            f"mesh.context: a device's {columns} columns cannot be cut into an early and a late half; "
            "use a length that is a multiple of twice mesh.context"
        )
    return columns // 2


def _all_keys(length: int, axes: Axes) -> Meeting:
    """This device's queries and all keys in their natural order."""
    parts = jax.lax.axis_size(axes)
    return Meeting.of(_chunk_length(length), _chunks(jax.lax.axis_index(axes), parts), jnp.arange(2 * parts))


def whole(axes: Axes, *arrays: Array) -> list[Array]:
    """The columns, on axis 1, of all devices, in their natural order."""
    return [natural(gather(x, axes, 1), jax.lax.axis_size(axes), 1) for x in arrays]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _gathered(
    q: Float[Array, "R G S E"],
    k: Float[Array, "R S E"],
    v: Float[Array, "R S E"],
    segments: Int[Array, "R S"],
    axes: Axes,
) -> Float[Array, "R G S E"]:
    return _gathered_forward(q, k, v, segments, axes)[0]


def _gathered_forward(q: Array, k: Array, v: Array, segments: Array, axes: Axes) -> tuple[Array, tuple[Array, ...]]:
    length = q.shape[2]
    forward = partial(row_forward, _all_keys(length, axes))
    out, lse = over_rows(forward, length)(q, segments, *whole(axes, k, v, segments))
    return out, (q, k, v, segments, out, lse)


def _gathered_backward(axes: Axes, saved: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
    q, k, v, segments, out, lse = saved
    length, parts = q.shape[2], jax.lax.axis_size(axes)
    backward = partial(row_backward, _all_keys(length, axes), (q.dtype, accumulator(k.dtype)))
    keys = whole(axes, k, v, segments)
    dq, *sums = over_rows(backward, length)(q, segments, *keys, out, lse, gradient)
    dk, dv = (scatter(stored(x, parts, 1), axes, 1).astype(k.dtype) for x in sums)
    return dq, dk, dv, None


_gathered.defvjp(_gathered_forward, _gathered_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ringed(
    q: Float[Array, "R G S E"],
    k: Float[Array, "R S E"],
    v: Float[Array, "R S E"],
    segments: Int[Array, "R S"],
    axes: Axes,
) -> Float[Array, "R G S E"]:
    return _ringed_forward(q, k, v, segments, axes)[0]


class _Ring:
    """Who meets whose keys after how many moves: everything moves on by one device at a time."""

    def __init__(self, length: int, axes: Axes) -> None:
        self.axes, self.chunk = axes, _chunk_length(length)
        self.parts, self.me = jax.lax.axis_size(axes), jax.lax.axis_index(axes)

    def moved(self, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        onward = [(part, (part + 1) % self.parts) for part in range(self.parts)]
        return tuple(jax.lax.ppermute(x, self.axes, onward) for x in arrays)

    def meeting(self, moves: Int[Array, ""]) -> Meeting:
        """This device's queries and the keys that are here after so many moves. Their late chunk is later than all
        that an early chunk of queries meets, so that the tiles met are still the first few."""
        owner = (self.me - moves) % self.parts
        return Meeting.of(self.chunk, _chunks(self.me, self.parts), _chunks(owner, self.parts))


def _ringed_forward(q: Array, k: Array, v: Array, segments: Array, axes: Axes) -> tuple[Array, tuple[Array, ...]]:
    length = q.shape[2]
    ring = _Ring(length, axes)

    def advance(moves: Array, sofar: Softmax, passing: tuple[Array, ...]) -> Softmax:
        step = partial(row_advance, ring.meeting(moves))
        return Softmax(*over_rows(step, length)(sofar, q, segments, *passing))

    def meet(moves: Array, state: tuple[Softmax, tuple[Array, ...]]) -> tuple[Softmax, tuple[Array, ...]]:
        sofar, passing = state
        return advance(moves, sofar, passing), ring.moved(passing)

    # First of all come a device's own keys, of which every query sees at least itself.
    start = (Softmax.start(q.shape, accumulator(q.dtype)), (k, v, segments))
    sofar, passing = jax.lax.fori_loop(0, ring.parts - 1, meet, start)
    out, lse = advance(jnp.asarray(ring.parts - 1), sofar, passing).end(q.dtype)
    return out, (q, k, v, segments, out, lse)


def _ringed_backward(axes: Axes, saved: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
    q, k, v, segments, out, lse = saved
    length, wide = q.shape[2], accumulator(q.dtype)
    ring = _Ring(length, axes)

    def add(moves: Array, sums: tuple[Array, ...], passing: tuple[Array, ...]) -> tuple[Array, ...]:
        step = partial(row_backward, ring.meeting(moves), (wide, wide))
        more = over_rows(step, length)(q, segments, *passing, out, lse, gradient)
        dq, dk, dv = (x + y for x, y in zip(sums, more, strict=True))
        return dq, *ring.moved((dk, dv))

    def meet(moves: Array, state: tuple[tuple[Array, ...], ...]) -> tuple[tuple[Array, ...], ...]:
        sums, passing = state
        return add(moves, sums, passing), ring.moved(passing)

    start = (tuple(jnp.zeros(x.shape, wide) for x in (q, k, v)), (k, v, segments))
    sums, passing = jax.lax.fori_loop(0, ring.parts - 1, meet, start)
    dq, dk, dv = add(jnp.asarray(ring.parts - 1), sums, passing)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ringed.defvjp(_ringed_forward, _ringed_backward)
