"""The one product of activations and weights, with its gradients written out.

A weight that a mesh stores in parts is gathered here, in the compute type, once forward and once backward: the whole of
it is never kept between the two. Its gradient goes to the parts summed in float32.

Left to automatic differentiation, a bfloat16 product with a float32 result gets float32 cotangents and so
float32 backward products, at half the speed or less. Here all three products take operands in the compute
type and accumulate in float32; the weight's gradient stays float32, as the master weights are.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xgen.model import native
from xgen.model.split import Groups, gather, scatter


def project(
    x: Float[Array, "*T D"],
    weight: Float[Array, "K *N"],  # noqa: UP037 - a shape, not a product
    shards: Groups = (),
    stored: int = 0,
) -> Float[Array, "*TN"]:
    """`x` times `weight` over the last axis of `x`: [*T, *N], in the type of `x`.

    `shards`: mesh axes over which `weight` is stored in parts, along D (`stored` 0, and K is a part of D) or along its
    only other axis (1).
    """
    leading, outputs = x.shape[:-1], weight.shape[1:]
    matrix = weight.reshape(weight.shape[0], math.prod(outputs))
    flat = _product(x.reshape(-1, x.shape[-1]), matrix, shards, stored)
    return flat.reshape(*leading, *(outputs if stored == 0 else flat.shape[1:]))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: Float[Array, "T D"], weight: Float[Array, "A B"], shards: Groups, stored: int) -> Float[Array, "T N"]:
    return dot(x, gather(weight.astype(x.dtype), shards, stored), 1, 0, x.dtype)


def _product_forward(x: Array, weight: Array, shards: Groups, stored: int) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, weight, shards, stored), (x, weight)


def _product_backward(shards: Groups, stored: int, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = saved
    x_gradient = dot(gradient, gather(weight.astype(x.dtype), shards, stored), 1, 1, x.dtype)
    if not shards:
        return x_gradient, outer(x, gradient).astype(weight.dtype)
    # Columns are dealt out as the rows of the transposed gradient: of narrow stretches of columns the TPU's compiler
    # makes sums of the whole, and pads each to 128.
    whole = outer(gradient, x) if stored else outer(x, gradient)
    # Nothing before the optimizer needs a weight's gradient: unbound, the product and so its operands would be kept
    # until the rest of the layer is through.
    x_gradient, whole = jax.lax.optimization_barrier((x_gradient, whole))
    part = scatter(whole, shards, 0)
    return x_gradient, (part.T if stored else part).astype(weight.dtype)


_product.defvjp(_product_forward, _product_backward)


def dot(a: Array, b: Array, a_axis: int, b_axis: int, dtype: jnp.dtype | None = None) -> Array:
    """Contract one axis of each matrix; operands as they are, sums at least float32, the result in `dtype` or the sums'
    type."""
    wide = accumulator(a.dtype)
    if native.applies(a, b):
        return native.multiply(a, b, a_axis, b_axis, dtype or wide)
    product = jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=wide)
    return product.astype(dtype or wide)


def outer(
    x: Float[Array, "T D"], y: Float[Array, "T N"], base: Float[Array, "D N"] | None = None
) -> Float[Array, "D N"]:
    """The weight gradient: sum over tokens of x_t y_t, on top of `base`."""
    if native.applies(x, y):
        return native.multiply(x, y, 0, 0, accumulator(x.dtype), base)
    if base is not None:
        return base + outer(x, y)
    # Two contracted axes run on XLA's CPU at nearly twice the speed of one (175 against 300 GFLOP/s, bfloat16).
    parts = 4 if x.shape[0] % 4 == 0 else 1
    a, b = x.reshape(parts, -1, x.shape[1]), y.reshape(parts, -1, y.shape[1])
    return jax.lax.dot_general(a, b, (((0, 1), (0, 1)), ((), ())), preferred_element_type=accumulator(x.dtype))


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """The type sums are kept in: float32, or float64 where the reference runs in it."""
    return jnp.promote_types(dtype, jnp.float32)
