"""Norms and the feed-forward circuit. Norms are computed in float32 and returned in the type of their input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from xgen.model.linear import accumulator, project
from xgen.model.split import Split, leave
from xgen.model.weights import Block
from xgen.recipe.schema import Model


def norm(
    x: Float[Array, "*T D"], scale: Float[Array, " D"], bias: Float[Array, " D"] | None, model: Model
) -> Float[Array, "*T D"]:
    """RMSNorm (Zhang and Sennrich 2019), or LayerNorm when the table has a bias for it."""
    wide = x.astype(accumulator(x.dtype))
    if bias is not None:
        wide = wide - wide.mean(axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + model.norm_epsilon)
    scaled = wide * scale if bias is None else wide * scale + bias
    return scaled.astype(x.dtype)


def mlp(x: Float[Array, "*T D"], w: Block, split: Split) -> Float[Array, "*T D"]:
    """SwiGLU (Shazeer 2020) when there is a gate, else GeLU in its tanh form (as JaxFormer's)."""
    inner = inward(x, w.up, w.up_bias, split)
    if w.gate is None:
        inner = jax.nn.gelu(inner, approximate=True)
    else:
        inner = jax.nn.silu(inward(x, w.gate, w.gate_bias, split)) * inner
    return outward(inner, w.down, w.down_bias, split)


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
