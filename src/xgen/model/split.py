"""How one device's part of a program knows of the others: the mesh axes by name, and the collectives over them.

The model's functions run as one program on every device of a mesh (`jax.shard_map`), each on its own rows, columns and
shards. Which axes there are is said by a `Split`; with the empty one, the default, nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Int


@dataclass(frozen=True)
class Split:
    """Names of mesh axes. Empty: one device holds everything.

    `batch`: over which the sequences are spread. `shards`: over which the weights' embed axis is stored, in the order
    of the mesh; gathered before use, the axes of a group at once and the last group first. `context`: over which each
    sequence's columns are spread, in `zigzag` order. `tensor`: over which heads, the feed-forward's inner width and the
    vocabulary are spread.
    """

    batch: tuple[str, ...] = ()
    shards: tuple[tuple[str, ...], ...] = ()
    context: tuple[str, ...] = ()
    tensor: tuple[str, ...] = ()

    @property
    def shard_axes(self) -> tuple[str, ...]:
        """Those of all groups of `shards`."""
        return tuple(axis for group in self.shards for axis in group)


ONE = Split()

Groups = tuple[str | tuple[str, ...], ...]
"""Mesh axes, or groups of them that a collective takes at once."""


def zigzag(length: int, parts: int) -> Int[np.ndarray, " S"]:
    """Natural places of the columns as they are stored: part p of `parts` holds [p S/parts, (p+1) S/parts) of these.

    The sequence is cut into 2 x parts chunks and part p gets chunks p and 2 parts - 1 - p: each part then has the same
    share of the causal triangle, an early chunk and a late one (the balance of Llama 3's context parallelism,
    arXiv 2407.21783, section 3.3.2). With one part it is the natural order. `length` must be a multiple of 2 x parts.
    """
    if parts == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * parts, -1)
    return np.concatenate([np.concatenate([chunks[p], chunks[2 * parts - 1 - p]]) for p in range(parts)])


def local_places(length: int, axes: Sequence[str]) -> Int[Array, " S"]:
    """Natural places in the whole row of this device's `length` columns."""
    if not axes:
        return jax.numpy.arange(length)
    parts = jax.lax.axis_size(tuple(axes))
    whole = jax.numpy.asarray(zigzag(length * parts, parts).reshape(parts, length))
    mine: Array = jax.lax.dynamic_index_in_dim(whole, jax.lax.axis_index(tuple(axes)), keepdims=False)
    return mine


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def enter(x: Array, axes: tuple[str, ...]) -> Array:  # noqa: ARG001 - its gradient needs them
    """Before products whose outputs are spread over `axes`: x itself; its gradient is the sum of the parts'."""
    return x


def _enter_forward(x: Array, axes: tuple[str, ...]) -> tuple[Array, None]:  # noqa: ARG001 - custom_vjp's signature
    return x, None


def _enter_backward(axes: tuple[str, ...], _: None, gradient: Array) -> tuple[Array]:
    return (total(gradient, axes),)


enter.defvjp(_enter_forward, _enter_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def leave(x: Array, axes: tuple[str, ...]) -> Array:
    """After products whose inputs are spread over `axes`: the sum of the parts; its gradient is each part's."""
    return total(x, axes)


def _leave_forward(x: Array, axes: tuple[str, ...]) -> tuple[Array, None]:
    return total(x, axes), None


def _leave_backward(axes: tuple[str, ...], _: None, gradient: Array) -> tuple[Array]:  # noqa: ARG001
    return (gradient,)


leave.defvjp(_leave_forward, _leave_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_with_gradient(x: Array, axes: Groups, dimension: int) -> Array:
    """`gather`, with its gradient: each part gets its share of the sum."""
    return gather(x, axes, dimension)


def _gather_forward(x: Array, axes: Groups, dimension: int) -> tuple[Array, None]:
    return gather(x, axes, dimension), None


def _gather_backward(axes: Groups, dimension: int, _: None, gradient: Array) -> tuple[Array]:
    return (scatter(gradient, axes, dimension),)


gather_with_gradient.defvjp(_gather_forward, _gather_backward)


def total(x: Array, axes: tuple[str, ...]) -> Array:
    """The sum over `axes`; without gradient rules of its own: see `enter` and `leave`."""
    return jax.lax.psum(x, axes) if axes else x


def gather(x: Array, axes: Groups, dimension: int) -> Array:
    """The whole of an array whose `dimension` is stored in parts over `axes`; the innermost, whose parts are neighbours
    in the array, first."""
    for axis in reversed(axes):
        x = jax.lax.all_gather(x, axis, axis=dimension, tiled=True)
    return x


def scatter(x: Array, axes: Groups, dimension: int) -> Array:
    """This device's part of the sum over `axes`, cut along `dimension`: the transpose of `gather`; an axis at a time,
    which leaves less to the next."""
    for axis in axes:
        if isinstance(axis, tuple):
            x = scatter(x, axis, dimension)
        else:
            x = jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)
    return x
