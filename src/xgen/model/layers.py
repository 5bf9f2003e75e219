"""Norms and the feed-forward circuit. Norms are computed in float32 and returned in the type of their input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from xgen.model.linear import accumulator, project
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


def mlp(
    x: Float[Array, "*T D"], gate: Float[Array, "D F"] | None, up: Float[Array, "D F"], down: Float[Array, "F D"]
) -> Float[Array, "*T D"]:
    """SwiGLU (Shazeer 2020) when there is a gate, else GeLU in its tanh form (as JaxFormer's)."""
    raised = named(project(x, up))
    inner = jax.nn.gelu(raised, approximate=True) if gate is None else jax.nn.silu(named(project(x, gate))) * raised
    return named(project(inner, down))


PROJECTION = "projection"


def named(x: Array) -> Array:
    """Mark a product's result, so that the rematerialisation policy "dots" can keep it."""
    marked: Array = checkpoint_name(x, PROJECTION)
    return marked
