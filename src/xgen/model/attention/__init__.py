"""Causal attention within documents: one interface, a plain reference, and backends whose memory is linear.

A query sees the keys at or before its own place in the row that carry its own segment number; so with a
document mask nothing leaks between documents, and without one all segment numbers are 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xgen.errors import RecipeError
from xgen.model.attention.spread import gathered, ringed, whole
from xgen.model.attention.tiles import BLOCK, MASKED, blockwise
from xgen.model.linear import accumulator
from xgen.model.native import platform
from xgen.model.split import local_places

__all__ = ["BACKENDS", "BLOCK", "attention", "blockwise", "cudnn", "reference"]


def attention(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    segments: Int[Array, "B S"],
    backend: str = "auto",
    context: tuple[str, ...] = (),
    exchange: str = "gather",
) -> Float[Array, "B S H E"]:
    """Softmax(q k / sqrt(E)) v under the causal and the segment mask.

    `backend`: "reference" holds all S x S scores; "blockwise" holds BLOCK x BLOCK of one key head at a time, forward
    and backward; "splash" is the TPU's kernel; "cudnn" is the GPU's. "auto" is splash where the program is for a TPU
    (`native.platform`), cudnn where it is for a GPU and `_suits_cudnn`, and blockwise elsewhere.

    `context`: inside `jax.shard_map`, the mesh axes over which columns are spread, in the order of
    `xgen.model.split.zigzag`; S is then one device's columns. `exchange` says how keys reach the queries: "gather", or
    "ring", which keeps memory per device independent of the number of devices and which is always blockwise. Raises
    RecipeError for a backend or exchange that cannot be had.
    """
    if not context:
        chosen = _auto(q) if backend == "auto" else backend
        return BACKENDS[chosen](q, k, v, segments)
    chosen = _auto() if backend == "auto" else backend
    if exchange == "ring":
        if backend not in ("auto", "blockwise"):
            raise RecipeError(
                f"compute.exchange: a ring is computed blockwise, not by {backend!r}; set compute.attention to 'auto' "
                "or 'blockwise', or compute.exchange to 'gather'"
            )
        return ringed(q, k, v, segments, context)
    if exchange != "gather":
        raise RecipeError(f"compute.exchange: {exchange!r} is not known; use 'gather' or 'ring'")
    if chosen not in GATHERED:
        raise RecipeError(f"compute.attention: {chosen!r} wants whole sequences on a device; use 'auto' or 'blockwise'")
    return GATHERED[chosen](q, k, v, segments, context)


def _auto(whole: Array | None = None) -> str:
    """`whole`: the queries, where a device has all columns of its rows."""
    if platform() == "gpu":
        return "cudnn" if whole is not None and _suits_cudnn(whole) else "blockwise"
    return "splash" if platform() == "tpu" else "blockwise"


CUDNN_COLUMNS = 8192
"""cuDNN knows documents, as JAX offers it, only from a bias of all pairs: 128 MiB a row here, and past it too much."""


def _suits_cudnn(q: Float[Array, "B S H E"]) -> bool:
    return q.dtype == jnp.bfloat16 and q.shape[1] <= CUDNN_COLUMNS and q.shape[3] % 8 == 0 and q.shape[3] <= 128


def cudnn(q: Array, k: Array, v: Array, segments: Array, implementation: Literal["xla", "cudnn"] = "cudnn") -> Array:
    """cuDNN's flash attention. `implementation` "xla" computes the same anywhere, in the memory of all pairs."""
    if implementation == "cudnn" and platform() != "gpu":
        raise RecipeError(f"compute.attention: cudnn is for GPUs, and this is {platform()}; use 'auto' or 'blockwise'")
    same = segments[:, None, :, None] == segments[:, None, None, :]
    out: Array = jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True, implementation=implementation)
    return out


def reference(q: Array, k: Array, v: Array, segments: Array) -> Array:
    """The definition, as an einsum over all pairs; differentiated automatically."""
    return _pairs(q, k, v, segments, segments, jnp.arange(q.shape[1]))


def _reference_gathered(q: Array, k: Array, v: Array, segments: Array, context: tuple[str, ...]) -> Array:
    keys, values, key_segments = whole(context, k, v, segments)
    return _pairs(q, keys, values, segments, key_segments, local_places(q.shape[1], context))


def _pairs(q: Array, k: Array, v: Array, segments: Array, key_segments: Array, places: Array) -> Array:
    groups = q.shape[2] // k.shape[2]
    wide = accumulator(q.dtype)
    keys, values = (jnp.repeat(x, groups, axis=2).astype(wide) for x in (k, v))
    scores = jnp.einsum("bshe,bthe->bhst", q.astype(wide), keys) / math.sqrt(q.shape[-1])
    visible = (places[:, None] >= jnp.arange(k.shape[1])) & (segments[:, :, None] == key_segments[:, None, :])
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, MASKED), axis=-1)
    return jnp.einsum("bhst,bthe->bshe", weights, values).astype(q.dtype)


def _splash(q: Array, k: Array, v: Array, segments: Array, context: tuple[str, ...] = ()) -> Array:
    if platform() != "tpu":
        raise RecipeError(f"compute.attention: splash is for TPUs, and this is {platform()}; use 'auto' or 'blockwise'")
    # Not imported above: Pallas takes half a second to import, and only programs for TPUs need it.
    from xgen.model.attention.splash import splash

    return splash(q, k, v, segments, context)


BACKENDS: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
    "reference": reference,
    "blockwise": blockwise,
    "splash": _splash,
    "cudnn": cudnn,
}

GATHERED: dict[str, Callable[[Array, Array, Array, Array, tuple[str, ...]], Array]] = {
    "reference": _reference_gathered,
    "blockwise": gathered,
    "splash": _splash,
}
