"""bfloat16 products and attention on CPUs by kernels of our own, where the machine can build them; elsewhere XLA's.

XLA's CPU runs the products at between a third and two thirds of what the processor's VDPBF16PS gives, those of one row
at a twentieth of what memory gives, and attention on one core. The same in JAX is each kernel's oracle, and takes its
place where there is no such processor or no compiler.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt16

from xgen.model.native.build import library, missing

__all__ = [
    "after",
    "applies",
    "attend",
    "attend_gradients",
    "attend_pages",
    "attends_pages",
    "cross_entropy",
    "library",
    "missing",
    "multiply",
    "platform",
    "rms_norm",
    "rms_norm_gradients",
    "rotate",
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


def attends_pages(q: Float[Array, "R C H E"], values: Array) -> bool:
    """Whether `attend_pages` takes these: bfloat16 and a cache of its bits, or all float32 and one query a row."""
    narrow = q.dtype == jnp.bfloat16 and values.dtype == jnp.uint16
    wide = q.dtype == values.dtype == jnp.float32 and q.shape[1] == 1
    return (narrow or wide) and platform() == "cpu" and library() is not None


def multiply(
    a: Float[Array, "_ _"],
    b: Float[Array, "_ _"],
    a_axis: int,
    b_axis: int,
    dtype: jnp.dtype,
    base: Float[Array, "M N"] | None = None,
) -> Float[Array, "M N"]:
    """Contract one axis of each bfloat16 matrix with float32 sums; the result in `dtype`, bfloat16 or float32.

    `base`, float32, is added to it in its own place.
    """
    shape = jax.ShapeDtypeStruct((a.shape[1 - a_axis], b.shape[1 - b_axis]), dtype)
    turned = {"a_turned": a_axis == 0, "b_turned": b_axis == 1}
    if base is None:
        product: Array = jax.ffi.ffi_call("xgen_multiply", shape, vmap_method="sequential")(a, b, **turned)
        return product
    call = jax.ffi.ffi_call("xgen_multiply_add", shape, vmap_method="sequential", input_output_aliases={2: 0})
    total: Array = call(a, b, base, **turned)
    return total


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
    keys: UInt16[Array, "P K E N"] | Float[Array, "P K E N"],
    values: UInt16[Array, "P K N E"] | Float[Array, "P K N E"],
    table: Int[Array, "R M"],
    start: Int[Array, " R"],
    length: Int[Array, " R"],
) -> Float[Array, "R C H E"]:
    """Causal attention of queries to the cached keys of their rows; softmax and sums in float32. What columns past a
    row's length get means nothing. See `attends_pages` for the types."""
    call = jax.ffi.ffi_call("xgen_attend_pages", jax.ShapeDtypeStruct(q.shape, q.dtype), vmap_method="sequential")
    mixed: Array = call(q, keys, values, *(part.astype(jnp.int32) for part in (table, start, length)))
    return mixed


def swiglu(gate: Float[Array, "*T F"], up: Float[Array, "*T F"], *earlier: Array) -> Float[Array, "*T F"]:
    """silu(gate) x up of bfloat16, computed in float32 and rounded once, and not before `earlier` are there: see
    `after`."""
    call = jax.ffi.ffi_call("xgen_swiglu", jax.ShapeDtypeStruct(gate.shape, gate.dtype), vmap_method="sequential")
    product: Array = call(gate, up, *earlier)
    return product


def swiglu_gradients(
    gate: Float[Array, "*T F"], up: Float[Array, "*T F"], gradient: Float[Array, "*T F"]
) -> tuple[Float[Array, "*T F"], Float[Array, "*T F"]]:
    """Of `swiglu`, with respect to the gate and to what it gates."""
    shape = jax.ShapeDtypeStruct(gate.shape, gate.dtype)
    call = jax.ffi.ffi_call("xgen_swiglu_gradients", (shape, shape), vmap_method="sequential")
    gate_gradient, up_gradient = call(gate, up, gradient)
    return gate_gradient, up_gradient


def after(x: Float[Array, "*T N"], other: Array) -> Float[Array, "*T N"]:
    """`x` in its own place, for a program that must not read it before `other` is there. XLA's CPU computes what it can
    when it can, and takes the optimization barriers of JAX out before it decides on an order."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    call = jax.ffi.ffi_call("xgen_after", shape, vmap_method="sequential", input_output_aliases={0: 0})
    same: Array = call(x, other)
    return same


def rms_norm(x: Float[Array, "*T D"], scale: Float[Array, " D"], epsilon: float) -> Float[Array, "*T D"]:
    """RMSNorm of bfloat16 with a float32 scale, computed in float32 and rounded once."""
    call = jax.ffi.ffi_call("xgen_rms_norm", jax.ShapeDtypeStruct(x.shape, x.dtype), vmap_method="sequential")
    normed: Array = call(x, scale, epsilon=np.float32(epsilon))
    return normed


def rms_norm_gradients(
    x: Float[Array, "*T D"], scale: Float[Array, " D"], gradient: Float[Array, "*T D"], epsilon: float
) -> tuple[Float[Array, "*T D"], Float[Array, " D"]]:
    """Of `rms_norm`, with respect to its input, and in float32 to the scale."""
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(scale.shape, scale.dtype))
    call = jax.ffi.ffi_call("xgen_rms_norm_gradients", shapes, vmap_method="sequential")
    x_gradient, scale_gradient = call(x, scale, gradient, epsilon=np.float32(epsilon))
    return x_gradient, scale_gradient


def rotate(
    x: Float[Array, "B S H E"], cosine: Float[Array, "B S 1 P"], sine: Float[Array, "B S 1 P"], backwards: bool
) -> Float[Array, "B S H E"]:
    """`xgen.model.rope.rotate` of bfloat16 by float32 angles, or its gradient, which turns `backwards`."""
    call = jax.ffi.ffi_call("xgen_rotate", jax.ShapeDtypeStruct(x.shape, x.dtype), vmap_method="sequential")
    turned: Array = call(x, cosine, sine, backwards=backwards)
    return turned


def cross_entropy(
    scores: Float[Array, "C V"],
    targets: Int[Array, " C"],
    weights: Float[Array, " C"],
    vocabulary: int,
    z_loss: float,
) -> tuple[Float[Array, " C"], Float[Array, " C"], Float[Array, "C V"]]:
    """Of float32 logits, of which those past `vocabulary` are none: each row's negative log-likelihood of its target,
    its log-sum-exp, and the bfloat16 gradient of weight x (nll + z_loss x lse^2)."""
    each = jax.ShapeDtypeStruct(targets.shape, jnp.float32)
    shapes = (each, each, jax.ShapeDtypeStruct(scores.shape, jnp.bfloat16))
    call = jax.ffi.ffi_call("xgen_cross_entropy", shapes, vmap_method="sequential")
    settings = {"vocabulary": np.int64(vocabulary), "z_loss": np.float32(z_loss)}
    nll, lse, gradient = call(scores, targets.astype(jnp.int32), weights, **settings)
    return nll, lse, gradient
