"""Keys and values of all rows under way, in pages of one pool.

A page holds N places of one row, for all heads of a layer. Keys lie with their places last, as the product with the
queries reads them. bfloat16 is held as its bits: XLA's CPU has no bfloat16 slices and would widen the whole pool first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, UInt16

from xgen.infer.quantise import scale_of
from xgen.model import Spec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer's pool of P pages: float32, bits of bfloat16, or int8 with a scale for each head and place, which
    is bits of a bfloat16 too."""

    key: Array
    """[P K E N]"""
    value: Array
    """[P K N E]"""
    key_scale: UInt16[Array, "P K N"] | None
    value_scale: UInt16[Array, "P K N"] | None


Cache = tuple[LayerCache, ...]
"""A pool for each layer; a page has the same number in all of them."""

HEADS = PartitionSpec(None, "tensor")
"""On a mesh each of the tensor parts holds its own heads."""


def empty(spec: Spec, pages: int, page: int, int8: bool) -> Cache:
    """Pools of `pages` pages of `page` places."""
    heads, size = spec.model.kv_heads, spec.model.head_size
    kind = jnp.int8 if int8 else jnp.uint16 if spec.dtype == jnp.bfloat16 else spec.dtype

    def layer() -> LayerCache:
        scales = [jnp.zeros((pages, heads, page), jnp.uint16) if int8 else None for _ in range(2)]
        keys, values = jnp.zeros((pages, heads, size, page), kind), jnp.zeros((pages, heads, page, size), kind)
        return LayerCache(keys, values, *scales)

    return tuple(layer() for _ in range(spec.model.layers))


def token_bytes(spec: Spec, int8: bool) -> int:
    """Of one place in all layers."""
    size = spec.model.head_size * (1 if int8 else spec.dtype.itemsize) + (2 if int8 else 0)
    return 2 * spec.model.layers * spec.model.kv_heads * size


def read(pool: LayerCache, pages: Int[Array, " R"], kind: jnp.dtype) -> LayerCache:
    """A page of each row: keys [R K E N] and values [R K N E] of type `kind`, or int8 with float32 scales [R K N]."""
    found: LayerCache = jax.tree.map(lambda leaf: leaf[pages], pool)
    if found.key_scale is not None and found.value_scale is not None:
        return replace(found, key_scale=_wide(found.key_scale), value_scale=_wide(found.value_scale))
    held = kind == jnp.bfloat16 and found.key.dtype == jnp.uint16
    key, value = (_bfloat16(leaf) if held else _wide(leaf) for leaf in (found.key, found.value))
    return LayerCache(key, value, None, None)


def _bfloat16(bits: Array) -> Array:
    number: Array = jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
    return number


def write(
    pool: LayerCache,
    keys: Float[Array, "R C K E"],
    values: Float[Array, "R C K E"],
    table: Int[Array, "R M"],
    start: Int[Array, " R"],
    length: Int[Array, " R"],
) -> LayerCache:
    """The first `length` columns of each row go to its places `start`, `start` + 1, ...; `table` numbers its pages."""
    new = _laid(keys, values, pool)
    page, columns = pool.key.shape[-1], keys.shape[1]
    if columns == 1:
        placed: LayerCache = jax.lax.fori_loop(0, keys.shape[0], partial(_one_place, new, table, start), pool)
        return placed
    touched = -(-columns // page) + 1
    padded = jax.tree.map(lambda leaf, at: _padded(leaf, at + 1, page), new, _place_axes(new))

    def body(at: Int[Array, ""], held: LayerCache) -> LayerCache:
        row, index = at // touched, start[at // touched] // page + at % touched
        first = index * page - start[row]
        wanted = (first + jnp.arange(page) >= 0) & (first + jnp.arange(page) < length[row])

        def put(into: Array, whole: Array, axis: int) -> Array:
            return _part_of_page(into, whole[row], table[row, index], first + page, wanted, axis)

        placed: LayerCache = jax.tree.map(put, held, padded, _place_axes(held))
        return placed

    filled: LayerCache = jax.lax.fori_loop(0, keys.shape[0] * touched, body, pool)
    return filled


def _one_place(new: LayerCache, table: Array, start: Array, row: Array, held: LayerCache) -> LayerCache:
    page = held.key.shape[-1]
    number, offset = table[row, start[row] // page], start[row] % page

    def put(into: Array, whole: Array, axis: int) -> Array:
        at = [number, *[jnp.zeros((), jnp.int32)] * (into.ndim - 1)]
        at[axis + 1] = offset
        return jax.lax.dynamic_update_slice(into, whole[row][None], at)

    placed: LayerCache = jax.tree.map(put, held, new, _place_axes(held))
    return placed


def _part_of_page(into: Array, columns: Array, number: Array, offset: Array, wanted: Array, axis: int) -> Array:
    page = wanted.shape[0]
    fresh = jax.lax.dynamic_slice_in_dim(columns, offset, page, axis)
    mask = wanted.reshape([page if at == axis else 1 for at in range(fresh.ndim)])
    old = jax.lax.dynamic_index_in_dim(into, number, keepdims=False)
    whole: Array = jax.lax.dynamic_update_index_in_dim(into, jnp.where(mask, fresh, old), number, 0)
    return whole


def _padded(columns: Array, axis: int, page: int) -> Array:
    return jnp.pad(columns, [(page, page) if at == axis else (0, 0) for at in range(columns.ndim)])


def _place_axes(pool: LayerCache) -> LayerCache:
    """Which axis of a page runs along its places."""
    scale = None if pool.key_scale is None else 1
    return LayerCache(2, 1, scale, scale)  # type: ignore[arg-type]  # a tree of axes, not of arrays


def _laid(keys: Float[Array, "R C K E"], values: Float[Array, "R C K E"], pool: LayerCache) -> LayerCache:
    """As pages hold them: keys [R K E C], values [R K C E]."""
    turned, held = keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3)
    if pool.key_scale is None:
        return LayerCache(_narrow(turned, pool.key.dtype), _narrow(held, pool.value.dtype), None, None)
    key, key_scale = _rounded(turned, 2)
    value, value_scale = _rounded(held, 3)
    return LayerCache(key, value, key_scale, value_scale)


def _rounded(heads: Array, axis: int) -> tuple[Array, Array]:
    """int8 with a scale, its bits, for each head and place."""
    scale = scale_of(heads, axis)
    values = jnp.round(heads.astype(jnp.float32) / scale.astype(jnp.float32)).astype(jnp.int8)
    return values, _narrow(jnp.squeeze(scale, axis), jnp.dtype(jnp.uint16))


def _narrow(x: Array, kind: jnp.dtype) -> Array:
    bits: Array = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return bits if kind == jnp.uint16 else x.astype(kind)


def _wide(x: Array) -> Array:
    if x.dtype != jnp.uint16:
        return x
    wide: Array = jax.lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32)
    return wide
