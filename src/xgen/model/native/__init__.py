"""bfloat16 products and attention on CPUs by kernels of our own, where the machine can build them; elsewhere XLA's.

XLA's CPU runs the products at between a third and two thirds of what the processor's VDPBF16PS gives, those of one row
at a twentieth of what memory gives, and attention on one core. The same in JAX is each kernel's oracle, and takes its
place where there is no such processor or no compiler.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt16

from xgen.model.native.build import library, missing

__all__ = [
    "applies",
    "attend",
    "attend_gradients",
    "attend_pages",
    "library",
    "missing",
    "multiply",
    "platform",
    "swiglu",
    "swiglu_gradients",
]


def platform() -> str:
    """What the program that is being traced is for: the devices of the mesh of the `jax.shard_map` around it, which
    need not be there (ahead-of-time compilation for a TPU on a machine without one), else JAX's default.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def applies(*operands: Array) -> bool:
    """Whether a product of these is for the kernels, in the program that is being traced."""
    narrow = all(operand.dtype == jnp.bfloat16 for operand in operands)
    return narrow and platform() == "cpu" and library() is not None


def multiply(
    a: Float[Array, "_ _"], b: Float[Array, "_ _"], a_axis: int, b_axis: int, dtype: jnp.dtype
) -> Float[Array, "M N"]:
    """Contract one axis of each bfloat16 matrix with float32 sums; the result in `dtype`, bfloat16 or float32."""
    shape = jax.ShapeDtypeStruct((a.shape[1 - a_axis], b.shape[1 - b_axis]), dtype)
    call = jax.ffi.ffi_call("xgen_multiply", shape, vmap_method="sequential")
    product: Array = call(a, b, a_turned=a_axis == 0, b_turned=b_axis == 1)
    return product


def attend(
    q: Float[Array, "B S H E"], k: Float[Array, "B S K E"], v: Float[Array, "B S K E"], segments: Int[Array, "B S"]
) -> tuple[Float[Array, "B S H E"], Float[Array, "B H S"]]:
    """Causal attention of bfloat16 within documents, softmax and sums in float32; and each query's log-sum-exp of
    scores, in powers of two, for `attend_gradients`."""
    batch, length, heads, _ = q.shape
    shapes = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, length), jnp.float32))
    out, lse = jax.ffi.ffi_call("xgen_attend", shapes, vmap_method="sequential")(q, k, v, segments.astype(jnp.int32))
    return out, lse


def attend_gradients(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    segments: Int[Array, "B S"],
    out: Float[Array, "B S H E"],
    lse: Float[Array, "B H S"],
    gradient: Float[Array, "B S H E"],
) -> tuple[Float[Array, "B S H E"], Float[Array, "B S K E"], Float[Array, "B S K E"]]:
    """Of `attend`, with respect to queries, keys and values; summed in float32."""
    shapes = tuple(jax.ShapeDtypeStruct(part.shape, part.dtype) for part in (q, k, v))
    call = jax.ffi.ffi_call("xgen_attend_gradients", shapes, vmap_method="sequential")
    dq, dk, dv = call(q, k, v, segments.astype(jnp.int32), out, lse, gradient)
    return dq, dk, dv


def attend_pages(
    q: Float[Array, "R C H E"],
    keys: UInt16[Array, "P K E N"],
    values: UInt16[Array, "P K N E"],
    table: Int[Array, "R M"],
    start: Int[Array, " R"],
    length: Int[Array, " R"],
) -> Float[Array, "R C H E"]:
    """Causal attention of bfloat16 queries to the cached keys of their rows, which are given as bits; softmax and sums
    in float32. What columns past a row's length get means nothing."""
    call = jax.ffi.ffi_call("xgen_attend_pages", jax.ShapeDtypeStruct(q.shape, q.dtype), vmap_method="sequential")
    mixed: Array = call(q, keys, values, *(part.astype(jnp.int32) for part in (table, start, length)))
    return mixed


def swiglu(gate: Float[Array, "*T F"], up: Float[Array, "*T F"]) -> Float[Array, "*T F"]:
    """silu(gate) x up of bfloat16, computed in float32 and rounded once."""
    call = jax.ffi.ffi_call("xgen_swiglu", jax.ShapeDtypeStruct(gate.shape, gate.dtype), vmap_method="sequential")
    product: Array = call(gate, up)
    return product


def swiglu_gradients(
    gate: Float[Array, "*T F"], up: Float[Array, "*T F"], gradient: Float[Array, "*T F"]
) -> tuple[Float[Array, "*T F"], Float[Array, "*T F"]]:
    """Of `swiglu`, with respect to the gate and to what it gates."""
    shape = jax.ShapeDtypeStruct(gate.shape, gate.dtype)
    call = jax.ffi.ffi_call("xgen_swiglu_gradients", (shape, shape), vmap_method="sequential")
    gate_gradient, up_gradient = call(gate, up, gradient)
    return gate_gradient, up_gradient
