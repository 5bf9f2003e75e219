"""The one product of activations and weights, with its gradients written out.

Left to automatic differentiation, a bfloat16 product with a float32 result gets float32 cotangents and so
float32 backward products, at half the speed or less. Here all three products take operands in the compute
type and accumulate in float32; the weight's gradient stays float32, as the master weights are.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def project(
    x: Float[Array, "*T D"],
    weight: Float[Array, "D *N"],  # noqa: UP037 - a shape, not a product
) -> Float[Array, "*TN"]:
    """`x` times `weight` over the last axis of `x`: [*T, *N], in the type of `x`."""
    leading, outputs = x.shape[:-1], weight.shape[1:]
    flat = _product(x.reshape(-1, x.shape[-1]), weight.reshape(weight.shape[0], math.prod(outputs)))
    return flat.reshape(*leading, *outputs)


@jax.custom_vjp
def _product(x: Float[Array, "T D"], weight: Float[Array, "D N"]) -> Float[Array, "T N"]:
    return dot(x, weight.astype(x.dtype), 1, 0).astype(x.dtype)


def _product_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, weight), (x, weight)


def _product_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = saved
    x_gradient = dot(gradient, weight.astype(x.dtype), 1, 1).astype(x.dtype)
    return x_gradient, outer(x, gradient).astype(weight.dtype)


_product.defvjp(_product_forward, _product_backward)


def dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Contract one axis of each matrix; operands as they are, the result at least float32."""
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=accumulator(a.dtype))


def outer(x: Float[Array, "T D"], y: Float[Array, "T N"]) -> Float[Array, "D N"]:
    """The weight gradient: sum over tokens of x_t y_t."""
    # Two contracted axes run on XLA's CPU at nearly twice the speed of one (175 against 300 GFLOP/s, bfloat16).
    parts = 4 if x.shape[0] % 4 == 0 else 1
    a, b = x.reshape(parts, -1, x.shape[1]), y.reshape(parts, -1, y.shape[1])
    return jax.lax.dot_general(a, b, (((0, 1), (0, 1)), ((), ())), preferred_element_type=accumulator(x.dtype))


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """The type sums are kept in: float32, or float64 where the reference runs in it."""
    return jnp.promote_types(dtype, jnp.float32)
