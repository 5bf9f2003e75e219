"""Attention on TPUs: JAX's splash kernel, whose scores never leave the chip's own memory.

The kernel skips blocks above the diagonal by tables made here for the host, in numpy, for every part of a spread
sequence; a device takes the rows of its own part. So a program for any number of parts is written once and compiles as
fast as one for a single part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    Mask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jaxtyping import Array, Bool, Float, Int

from xgen.errors import RecipeError
from xgen.model.attention.spread import Axes, natural, stored
from xgen.model.split import gather, zigzag

LANES = 128
"""The kernel's blocks are multiples of a TPU's lanes; shorter and odd lengths are filled up."""

BLOCK = 512
"""Queries, and keys, of a block. Every byte of keys that a block of queries fetches serves 512 operations, where a v4
can do 229 in the time its memory delivers one (275 TFLOP/s, 1.2 TB/s; v5e 240, v5p 166, v6e 560). 1,024 takes the
compiler nearly three times as long, and 2,048 does not fit the 16 MiB of a core's own memory."""

LONG = 65_536
"""Columns past which blocks are twice as large, since their tables lie in the scalar core's small memory."""


def splash(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    segments: Int[Array, "B S"],
    axes: Axes = (),
    interpret: bool = False,
) -> Float[Array, "B S H E"]:
    """Keys and values of all devices along `axes` are gathered, and kept for the backward pass unless the layer is
    rematerialised; their gradients are summed over the devices in float32.

    `interpret` runs the kernel step by step, on any platform. Raises RecipeError for types other than bfloat16 and
    float32.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise RecipeError(f"compute.attention: splash computes in bfloat16 or float32, not in {q.dtype}; use blockwise")
    parts = jax.lax.axis_size(axes) if axes else 1
    columns = q.shape[1]
    shape = Shape.of(columns, parts)
    kernel = _kernel(shape, q.shape[2], jax.lax.axis_index(axes) if axes else 0, interpret)
    keys, values = (_filled(_whole(x, axes), shape.keys) for x in (k, v))
    key_segments = _filled(_gathered(segments, axes), shape.keys)
    scaled = (q.astype(jnp.float32) / math.sqrt(q.shape[-1])).astype(q.dtype)
    queries, query_segments = (_filled(scaled, shape.queries), _filled(segments, shape.queries))
    heads_first = partial(jnp.swapaxes, axis1=1, axis2=2)
    out = jax.vmap(kernel)(
        heads_first(queries), heads_first(keys), heads_first(values), SegmentIds(query_segments, key_segments)
    )
    return heads_first(out)[:, :columns].astype(q.dtype)


@dataclass(frozen=True)
class Shape:
    """Of one device's work: its columns, the parts of a whole sequence, and both filled up to whole blocks."""

    columns: int
    parts: int
    queries: int
    keys: int
    block: int

    @classmethod
    def of(cls, columns: int, parts: int) -> Shape:
        """Blocks of the size above, or the largest half of it that fits: whole blocks in a device's early and its late
        columns, so that a block is above the diagonal or is not."""
        queries = columns + -columns % LANES
        keys = columns * parts + -(columns * parts) % LANES
        halves = parts > 1 and columns % (2 * LANES) == 0
        both = math.gcd(keys, columns // 2 if halves else queries)
        most = BLOCK if keys <= LONG else 2 * BLOCK
        return cls(columns, parts, queries, keys, next(most // n for n in (1, 2, 4, 8) if both % (most // n) == 0))


def _filled(x: Array, length: int) -> Array:
    """Zeros after the columns, on axis 1: as keys they come after every query, as queries they are cut off."""
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _whole(x: Array, axes: Axes) -> Array:
    """The columns of all devices in their natural order."""
    return _gathered(x, axes)


def _gathered(x: Array, axes: Axes) -> Array:
    return natural(gather(x, axes, 1), jax.lax.axis_size(axes), 1) if axes else x


def _whole_forward(x: Array, axes: Axes) -> tuple[Array, None]:
    return _whole(x, axes), None


def _whole_backward(axes: Axes, _: None, gradient: Array) -> tuple[Array]:
    """Every device gets the others' shares of the gradient of its own columns and sums them in float32.

    Written as a reduce-scatter in float32, the TPU's compiler makes of it a sum of the whole in bfloat16.
    """
    if not axes:
        return (gradient,)
    parts = jax.lax.axis_size(axes)
    shares = jax.lax.all_to_all(stored(gradient, parts, 1), axes, 1, 1, tiled=True)
    by_part = shares.reshape(shares.shape[0], parts, -1, *shares.shape[2:])
    return (by_part.astype(jnp.float32).sum(axis=1).astype(gradient.dtype),)


_whole.defvjp(_whole_forward, _whole_backward)


def _causal(query: Any, key: Any) -> Any:
    return query >= key


class _Places(Mask):
    """The causal mask of queries at these places, which ascend within a block; keys stand in their natural order.

    Of a block only the corners are given: whether any pair of it is visible, and whether all are, is then the same, and
    that is all JAX asks of a mask that the kernel computes for itself. Whole blocks take ten seconds at 32K places.
    """

    mask_function = staticmethod(_causal)

    def __init__(self, queries: Int[np.ndarray, " Q"], keys: int) -> None:
        self.q_sequence, self._keys = queries.astype(np.int32), keys

    @property
    def shape(self) -> tuple[int, int]:
        return self.q_sequence.size, self._keys

    def __getitem__(self, at: tuple[slice, slice]) -> Bool[np.ndarray, "2 2"]:
        query, key = at
        corners: np.ndarray = _causal(self.q_sequence[query][[0, -1], None], np.array([key.start, key.stop - 1]))
        return corners

    __hash__ = object.__hash__


def _kernel(shape: Shape, heads: int, part: Int[Array, ""] | int, interpret: bool) -> Any:
    """The kernel of one part of the sequence."""

    def of_part(table: np.ndarray) -> Array:
        axis = 1 if table.ndim == 3 else 0
        by_part = table.reshape(*table.shape[:axis], shape.parts, -1, *table.shape[axis + 1 :])
        chosen: Array = jax.lax.dynamic_index_in_dim(jnp.asarray(by_part), part, axis, keepdims=False)
        return chosen

    return jax.tree.map(of_part, _tables(shape, heads, interpret))


@lru_cache(maxsize=32)
def _tables(shape: Shape, heads: int, interpret: bool) -> Any:
    """The kernel with the tables of all parts, one after the other: which blocks meet, and where the queries stand."""
    places = zigzag(shape.columns * shape.parts, shape.parts).reshape(shape.parts, -1)
    filled = np.pad(places, [(0, 0), (0, shape.queries - shape.columns)], mode="edge")
    mask = MultiHeadMask([_Places(filled.reshape(-1), shape.keys)] * heads)
    block, compute = shape.block, min(shape.block, BLOCK)
    sizes = BlockSizes(block, block, compute, block, block, compute, block, block)
    with jax.ensure_compile_time_eval():
        kernel = make_splash_mha(
            mask=mask, block_sizes=sizes, head_shards=1, q_seq_shards=shape.parts, interpret=interpret
        )
        return jax.tree.map(np.asarray, kernel)
