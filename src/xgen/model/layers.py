"""Norms and the feed-forward circuit. Norms are computed in float32 and returned in the type of their input."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from xgen.model import native
from xgen.model.linear import accumulator, project
from xgen.model.split import Groups, Split, leave
from xgen.model.weights import Block
from xgen.recipe.schema import Model


def norm(
    x: Float[Array, "*T D"], scale: Float[Array, " D"], bias: Float[Array, " D"] | None, model: Model
) -> Float[Array, "*T D"]:
    """RMSNorm (Zhang and Sennrich 2019), or LayerNorm when the table has a bias for it."""
    if bias is None and native.applies(x):
        return _rms_norm(x, scale.astype(jnp.float32), model.norm_epsilon)
    normed: Array = _norm(x, scale, bias, model.norm_epsilon)
    return normed


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    return native.rms_norm(x, scale, epsilon)


def _rms_norm_forward(x: Array, scale: Array, epsilon: float) -> tuple[Array, tuple[Array, Array]]:
    return _rms_norm(x, scale, epsilon), (x, scale)


def _rms_norm_backward(epsilon: float, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    return native.rms_norm_gradients(*saved, gradient, epsilon)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


# What has no product is cheaper to compute again than to keep: of a norm two float32 arrays, of SwiGLU three more.
@partial(jax.checkpoint, static_argnums=3)
def _norm(x: Array, scale: Array, bias: Array | None, epsilon: float) -> Array:
    wide = x.astype(accumulator(x.dtype))
    if bias is not None:
        wide = wide - wide.mean(axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    scaled = wide * scale if bias is None else wide * scale + bias
    return scaled.astype(x.dtype)


def mlp(x: Float[Array, "*T D"], w: Block, split: Split) -> Float[Array, "*T D"]:
    """SwiGLU (Shazeer 2020) when there is a gate, else GeLU in its tanh form (as JaxFormer's)."""
    inner = inward(x, w.up, w.up_bias, split)
    if w.gate is None:
        return outward(_gelu(inner), w.down, w.down_bias, split)
    gate = inward(x, w.gate, w.gate_bias, split)
    if not native.applies(gate, inner):
        return outward(_swiglu(gate, inner), w.down, w.down_bias, split)
    return _biased(leave(_swiglu_outward(gate, inner, w.down, split.shards), split.tensor), w.down_bias)


@jax.checkpoint
def _gelu(inner: Array) -> Array:
    return jax.nn.gelu(inner, approximate=True)


@jax.custom_vjp
def _swiglu(gate: Array, up: Array) -> Array:
    if native.applies(gate, up):
        return native.swiglu(gate, up)
    return jax.nn.silu(gate) * up


def _swiglu_forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return _swiglu(gate, up), (gate, up)


def _swiglu_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """One after the other, so that each gradient can take the place of an array that is read for the last time, and
    neither is computed again in every product that it goes into."""
    gate, up = saved
    if native.applies(gate, up, gradient):
        return native.swiglu_gradients(gate, up, gradient)
    _, pull = jax.vjp(lambda gate: jax.nn.silu(gate) * up, gate)
    gate_gradient, gate, gradient = jax.lax.optimization_barrier((*pull(gradient), gate, gradient))
    both: tuple[Array, Array] = jax.lax.optimization_barrier((gate_gradient, jax.nn.silu(gate) * gradient))
    return both


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _swiglu_outward(gate: Array, up: Array, weight: Array, shards: Groups) -> Array:
    """SwiGLU's product is as large as what it is made of: it is made again, where it is needed, rather than kept."""
    return project(_swiglu(gate, up), weight, shards, stored=1)


def _swiglu_outward_forward(
    gate: Array, up: Array, weight: Array, shards: Groups
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _swiglu_outward(gate, up, weight, shards), (gate, up, weight)


def _swiglu_outward_backward(
    shards: Groups, saved: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array, Array, Array]:
    gate, up, weight = saved
    inner = native.swiglu(gate, up, gradient)
    _, pull = jax.vjp(lambda inner, weight: project(inner, weight, shards, stored=1), inner, weight)
    inner_gradient, weight_gradient = pull(gradient)
    return *native.swiglu_gradients(gate, up, inner_gradient), weight_gradient


_swiglu_outward.defvjp(_swiglu_outward_forward, _swiglu_outward_backward)


PROJECTION = "projection"


def inward(
    x: Float[Array, "*T D"],
    weight: Float[Array, "D *N"],  # noqa: UP037 - a shape, not a product
    bias: Float[Array, "*N"] | None,
    split: Split,
) -> Float[Array, "*TN"]:
    """From the stream into a circuit; of a mesh's tensor parts each computes its own outputs."""
    return _biased(project(x, weight, split.shards), bias)


def outward(
    x: Float[Array, "*T N"], weight: Float[Array, "N D"], bias: Float[Array, " D"] | None, split: Split
) -> Float[Array, "*T D"]:
    """From a circuit back to the stream; a mesh's tensor parts, which hold inputs of their own, add up."""
    return _biased(leave(project(x, weight, split.shards, stored=1), split.tensor), bias)


def _biased(product: Array, bias: Array | None) -> Array:
    """The product, marked so that the rematerialisation policy "dots" can keep it, and the bias.

    The sum is taken in float32, and so is the bias's gradient: a sum over all tokens.
    """
    product = checkpoint_name(product, PROJECTION)
    return product if bias is None else (product.astype(accumulator(product.dtype)) + bias).astype(product.dtype)
