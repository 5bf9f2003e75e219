"""Rotary position embedding, full head, half-split layout (Su et al. 2021; the layout of Hugging Face's LLaMA)."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from xgen.recipe.schema import Model, RopeScaling


def frequencies(model: Model) -> np.ndarray:
    """Radians a position turns each of the head_size/2 planes by, float64, after the recipe's scaling."""
    plain = model.rope_theta ** (-np.arange(0, model.head_size, 2, dtype=np.float64) / model.head_size)
    scaling = model.rope_scaling
    if scaling.kind == "none":
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    return _yarn(plain, scaling, model)


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1's rule: planes that turn less than once in the old length are stretched, those that turn
    over four times are kept, those between are blended."""
    turns = scaling.original_length * plain / (2 * math.pi)
    keep = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return plain * (keep + (1 - keep) / scaling.factor)


def _yarn(plain: np.ndarray, scaling: RopeScaling, model: Model) -> np.ndarray:
    """YaRN (Peng et al. 2023, section 3.2) with its published bounds of 32 and 1 turns, blended by plane index."""

    def plane(turns: float) -> float:
        wavelengths = scaling.original_length / (turns * 2 * math.pi)
        return model.head_size * math.log(wavelengths) / (2 * math.log(model.rope_theta))

    low, high = max(math.floor(plane(32.0)), 0), min(math.ceil(plane(1.0)), model.head_size - 1)
    ramp = np.clip((np.arange(model.head_size // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return plain * (1 - ramp) + plain / scaling.factor * ramp


def attention_factor(model: Model) -> float:
    """YaRN's sharpening of queries and keys; 1 for every other scaling."""
    if model.rope_scaling.kind != "yarn" or model.rope_scaling.factor <= 1:
        return 1.0
    return 0.1 * math.log(model.rope_scaling.factor) + 1.0


def angles(
    positions: Int[Array, "B S"], model: Model, dtype: jnp.dtype
) -> tuple[Float[Array, "B S 1 P"], Float[Array, "B S 1 P"]]:
    """Cosine and sine of each position's turn, for `rotate`; `dtype` is float32 or wider."""
    turn = positions[..., None, None].astype(dtype) * jnp.asarray(frequencies(model), dtype)
    factor = attention_factor(model)
    return jnp.cos(turn) * factor, jnp.sin(turn) * factor


def rotate(
    x: Float[Array, "B S H E"], cosine: Float[Array, "B S 1 P"], sine: Float[Array, "B S 1 P"]
) -> Float[Array, "B S H E"]:
    """Turn each head's planes (x_i, x_{i + E/2}) by its position's angle; computed in the angles' type."""
    first, second = jnp.split(x.astype(cosine.dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, first * sine + second * cosine], axis=-1)
    return turned.astype(x.dtype)
