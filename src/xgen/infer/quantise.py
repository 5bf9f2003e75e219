"""Weights as the engine holds them: layer by layer, in the compute type or in int8 with a scale for each output.

A layer's matrices are arrays of their own: cut out of stacked ones, each would be copied on CPUs before its product,
which costs more than the product itself when one token is decoded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Int8

from xgen.convert.pieces import Source
from xgen.model import Spec, Weights
from xgen.model.linear import accumulator
from xgen.model.weights import Axis, Block, Weight, abstract, map_rows, rows
from xgen.parallel.mesh import Sizes
from xgen.parallel.program import ONE_DEVICE
from xgen.parallel.rules import partition

SUMMED: tuple[Axis, ...] = ("head", "mlp", "embed")
"""A product with a weight sums over the first of these that it has (and over the heads, which have scales apart); an
embedding's row and the head's column are summed over `embed` too."""

GROUP = 64
"""Inputs of an output that share a scale: one for all of them costs a real model twice the loss."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantised:
    """A matrix as `values` times `scale`, of which `scale` has one for each group of neighbours along one axis: the one
    that is shorter in it. Symmetric, so that 0 stays 0."""

    values: Int8[Array, "*_"]
    scale: BFloat16[Array, "*_"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Served:
    """A decoder's weights, as `Weights`, the layers one by one. Matrices are arrays in the compute type or `Quantised`,
    vectors float32."""

    embedding: Any
    blocks: tuple[Block, ...]
    final_norm: Float[Array, " D"]
    final_norm_bias: Float[Array, " D"] | None
    head: Any


def serve(weights: Weights, spec: Spec, int8: bool, sizes: Sizes = ONE_DEVICE.sizes) -> Served:
    """`weights` for the engine; those of a mesh of `sizes` lie as they did."""
    unit = map_rows(weights, lambda row: row)
    below = jax.tree.map(_of_layer, unit.block)

    def layer(at: int) -> Block:
        whole: Block = jax.tree.map(lambda leaf, row: _kept(leaf[at], row, spec, int8, sizes), weights.block, below)
        return whole

    top = {
        name: _kept(getattr(weights, name), getattr(unit, name), spec, int8, sizes)
        for name in _TOP
        if _has(weights, name)
    }
    return Served(blocks=tuple(layer(at) for at in range(spec.model.layers)), **_ABSENT | top)


def serve_from(source: Source, int8: bool, spec: Spec) -> Served:
    """The weights of `source` for the engine, a piece at a time: nothing larger than a matrix is held twice.

    Raises CheckpointError where a piece is damaged.
    """

    def read(row: Weight, layer: int | None) -> Any:
        return _kept(
            jnp.asarray(source.read(row, layer), jnp.float32), row if layer is None else _of_layer(row), spec, int8
        )

    table = {row.name: row for row in rows(spec)}

    def block(at: int) -> Block:
        named = {one.name: table.get(f"block.{one.name}") for one in fields(Block)}
        return Block(**{name: None if row is None else read(row, at) for name, row in named.items()})  # type: ignore[arg-type]

    blocks = tuple(block(at) for at in range(spec.model.layers))
    return Served(blocks=blocks, **_ABSENT | {name: read(table[name], None) for name in _TOP if name in table})


_TOP = tuple(one.name for one in fields(Served) if one.name != "blocks")
_ABSENT: dict[str, Any] = dict.fromkeys(_TOP)


def _kept(leaf: Array, row: Weight, spec: Spec, int8: bool, sizes: Sizes = ONE_DEVICE.sizes) -> Any:
    if not row.decay:
        return leaf
    return quantised(leaf, row, sizes) if int8 else leaf.astype(spec.dtype)


def _has(weights: Weights, name: str) -> bool:
    return getattr(weights, name) is not None


def _of_layer(row: Weight) -> Weight:
    return replace(row, axes=row.axes[1:])


def quantised(matrix: Float[Array, "*_"], row: Weight, sizes: Sizes = ONE_DEVICE.sizes) -> Quantised:
    """Rounded to the nearest of 255 levels of its group's largest value; no group lies across parts of a mesh."""
    axis = next(row.axes.index(name) for name in SUMMED if name in row.axes)
    parts = {"head": 1, "mlp": sizes.tensor, "embed": sizes.fsdp * sizes.context}[row.axes[axis]]
    group = math.gcd(GROUP, matrix.shape[axis] // parts)
    folded = matrix.reshape(*matrix.shape[:axis], -1, group, *matrix.shape[axis + 1 :])
    scale = scale_of(folded, axis + 1)
    values = jnp.round(folded / scale.astype(folded.dtype)).astype(jnp.int8)
    return Quantised(values.reshape(matrix.shape), jnp.squeeze(scale, axis + 1))


def scale_of(values: Float[Array, "*_"], axis: int) -> BFloat16[Array, "*_"]:
    """Brings the largest along `axis` to 127: the next bfloat16 above, since below the largest would be cut off."""
    largest = jnp.max(jnp.abs(values.astype(jnp.float32)), axis=axis, keepdims=True) / 127
    # Of zeros alone no scale would be left: numbers below the smallest normal one count as 0 on many devices.
    held: Array = jnp.maximum(largest, float(np.finfo(np.float32).tiny))
    bits = (jax.lax.bitcast_convert_type(held, jnp.uint32) >> 16) + 1
    scale: Array = jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)
    return scale


def spread(scale: BFloat16[Array, "*_"], shape: tuple[int, ...]) -> Float[Array, "*_"]:
    """A scale for each value of a matrix of `shape`."""
    wide = scale.astype(jnp.float32)
    for axis, size in enumerate(shape):
        if wide.shape[axis] != size:
            wide = jnp.repeat(wide, size // wide.shape[axis], axis)
    return wide


def dense(block: Block, spec: Spec) -> Block:
    """The layer's matrices in the compute type."""
    whole = jax.tree.map(lambda leaf: plain(leaf, spec.dtype), block, is_leaf=lambda leaf: isinstance(leaf, Quantised))
    return cast("Block", whole)


def plain(matrix: Any, dtype: jnp.dtype) -> Array:
    """A matrix in `dtype`, whichever way it is held."""
    if isinstance(matrix, Quantised):
        return (matrix.values.astype(accumulator(dtype)) * spread(matrix.scale, matrix.values.shape)).astype(dtype)
    array: Array = matrix
    return array


def partitions(served: Served, spec: Spec) -> Served:
    """Of `served` on a mesh: where its arrays lie, a tree shaped as it is."""
    unit = map_rows(abstract(spec), lambda row: row)

    def of(leaf: Any, row: Weight) -> Any:
        whole = partition(row)
        if not isinstance(leaf, Quantised):
            return whole
        return Quantised(whole, whole)  # type: ignore[arg-type]  # a tree of places, not of arrays

    def tree(held: Any, below: Any) -> Any:
        return jax.tree.map(of, held, below, is_leaf=lambda leaf: isinstance(leaf, Quantised))

    below = jax.tree.map(_of_layer, unit.block)
    top = {
        one.name: tree(getattr(served, one.name), getattr(unit, one.name))
        for one in fields(Served)
        if one.name != "blocks"
    }
    return Served(blocks=tuple(tree(block, below) for block in served.blocks), **top)


def stored_bytes(served: Served) -> int:
    """Of all its arrays, on all devices together."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(served))
