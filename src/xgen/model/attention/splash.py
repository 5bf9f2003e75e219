"""Attention on TPUs: JAX's splash kernel, whose scores never leave the chip's own memory.

The kernel skips blocks above the diagonal by tables made here for the host, in numpy, for every part of a spread
sequence; a device takes the rows of its own part. So a program for any number of parts is written once and compiles as
fast as one for a single part.
"""

from __future__ import annotations

import math
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
from xgen.model.attention.blocks import BLOCK, Blocks
from xgen.model.attention.spread import Axes, natural, stored
from xgen.model.split import gather, zigzag


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
    blocks = Blocks.of(columns, parts)
    kernel = _kernel(blocks, q.shape[2], jax.lax.axis_index(axes) if axes else 0, interpret)
    keys, values = (_filled(_whole(x, axes), blocks.keys) for x in (k, v))
    key_segments = _filled(_gathered(segments, axes), blocks.keys)
    scaled = (q.astype(jnp.float32) / math.sqrt(q.shape[-1])).astype(q.dtype)
    queries, query_segments = (_filled(scaled, blocks.queries), _filled(segments, blocks.queries))
    heads_first = partial(jnp.swapaxes, axis1=1, axis2=2)
    rows = (heads_first(queries), heads_first(keys), heads_first(values))
    out = _attended(*rows, kernel, SegmentIds(query_segments, key_segments))
    return heads_first(out)[:, :columns].astype(q.dtype)


@jax.custom_vjp
def _attended(q: Array, k: Array, v: Array, kernel: Any, segments: SegmentIds) -> Array:
    """The kernel over all rows. Bound to the result, what its gradient needs is taken from the kernel's output at once:
    XLA would keep the log-sum-exps, one number a query, in the rows of 128 copies that the kernel writes."""
    out: Array = jax.vmap(kernel)(q, k, v, segments)
    return out


def _attended_forward(q: Array, k: Array, v: Array, kernel: Any, segments: SegmentIds) -> tuple[Array, Any]:
    out, pull = jax.vjp(lambda *rows: jax.vmap(kernel)(*rows, segments), q, k, v)
    bound: tuple[Array, Any] = jax.lax.optimization_barrier((out, pull))
    return bound


def _attended_backward(pull: Any, gradient: Array) -> tuple[Array | None, ...]:
    return (*pull(gradient), None, None)


_attended.defvjp(_attended_forward, _attended_backward)


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


def _kernel(blocks: Blocks, heads: int, part: Int[Array, ""] | int, interpret: bool) -> Any:
    """The kernel of one part of the sequence."""

    def of_part(table: np.ndarray) -> Array:
        axis = 1 if table.ndim == 3 else 0
        by_part = table.reshape(*table.shape[:axis], blocks.parts, -1, *table.shape[axis + 1 :])
        chosen: Array = jax.lax.dynamic_index_in_dim(jnp.asarray(by_part), part, axis, keepdims=False)
        return chosen

    return jax.tree.map(of_part, _tables(blocks, heads, interpret))


@lru_cache(maxsize=32)
def _tables(blocks: Blocks, heads: int, interpret: bool) -> Any:
    """The kernel with the tables of all parts, one after the other: which blocks meet, and where the queries stand."""
    places = zigzag(blocks.columns * blocks.parts, blocks.parts).reshape(blocks.parts, -1)
    filled = np.pad(places, [(0, 0), (0, blocks.queries - blocks.columns)], mode="edge")
    mask = MultiHeadMask([_Places(filled.reshape(-1), blocks.keys)] * heads)
    compute, separate = min(blocks.block, BLOCK), None if blocks.fused else blocks.block
    sizes = BlockSizes(
        block_q=blocks.block,
        block_kv=blocks.block,
        block_kv_compute=compute,
        block_q_dkv=blocks.block,
        block_kv_dkv=blocks.fused or blocks.block,
        block_kv_dkv_compute=compute,
        block_q_dq=separate,
        block_kv_dq=separate,
        use_fused_bwd_kernel=blocks.fused is not None,
    )
    with jax.ensure_compile_time_eval():
        kernel = make_splash_mha(
            mask=mask, block_sizes=sizes, head_shards=1, q_seq_shards=blocks.parts, interpret=interpret
        )
        return jax.tree.map(np.asarray, kernel)
