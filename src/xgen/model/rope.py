"""Rotary position embedding, full head, half-split layout (Su et al. 2021; the layout of Hugging Face's LLaMA)."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from xgen.recipe.schema import Model


def frequencies(model: Model) -> np.ndarray:
    """Radians a position turns each of the head_size/2 planes by, float64, after the recipe's scaling.

    A dynamic scaling slows them further in documents that outgrow the original length: see `angles`.
    """
    # Rounded to float32 where every LLaMA that was trained rounds (theta^(i/E), then its inverse). Exact frequencies
    # differ by up to 1e-7, which at position 8,000 moves the logits of a real model by 1e-3.
    exponents = np.arange(0, model.head_size, 2, dtype=np.float32) / np.float32(model.head_size)
    powers = (model.rope_theta ** exponents.astype(np.float64)).astype(np.float32)
    plain = (1 / powers).astype(np.float64)
    keep = _KEPT[model.rope_scaling.kind](plain, model)
    return plain * (keep + (1 - keep) / model.rope_scaling.factor)


def _llama3(plain: np.ndarray, model: Model) -> np.ndarray:
    """Llama 3.1's rule: planes that turn less than `low_turns` in the old length are stretched, those that turn
    over `high_turns` are kept, those between are blended by their turns."""
    scaling = model.rope_scaling
    turns = scaling.original_length * plain / (2 * math.pi)
    return np.clip((turns - scaling.low_turns) / (scaling.high_turns - scaling.low_turns), 0.0, 1.0)


def _yarn(plain: np.ndarray, model: Model) -> np.ndarray:
    """YaRN (Peng et al. 2023, section 3.2), blended by plane index between whole planes as transformers does."""
    scaling = model.rope_scaling

    def plane(turns: float) -> float:
        wavelengths = scaling.original_length / (turns * 2 * math.pi)
        return model.head_size * math.log(wavelengths) / (2 * math.log(model.rope_theta))

    first = max(math.floor(plane(scaling.high_turns)), 0)
    last = min(math.ceil(plane(scaling.low_turns)), model.head_size - 1)
    return 1 - np.clip((np.arange(plain.size) - first) / (last - first or 1e-3), 0.0, 1.0)


_KEPT: dict[str, Callable[[np.ndarray, Model], np.ndarray]] = {
    "none": lambda plain, _: np.ones_like(plain),
    "linear": lambda plain, _: np.zeros_like(plain),
    "dynamic": lambda plain, _: np.ones_like(plain),
    "llama3": _llama3,
    "yarn": _yarn,
}
"""How much of each plane's frequency a kind of scaling keeps: 1 all of it, 0 a `factor`-th."""


def angles(
    positions: Int[Array, "B S"], segments: Int[Array, "B S"], model: Model, dtype: jnp.dtype
) -> tuple[Float[Array, "B S 1 P"], Float[Array, "B S 1 P"]]:
    """Cosine and sine of each position's turn, for `rotate`; `dtype` is float32 or wider.

    A dynamic scaling depends on the length of the token's own document within the row, and on no other document. Past
    the original length it is not causal within the document, by its nature: each token more turns all of them anew.
    """
    turn = positions[..., None, None].astype(dtype) * jnp.asarray(frequencies(model), dtype)
    if model.rope_scaling.kind == "dynamic":
        turn = turn * _slowed(_document_lengths(positions, segments), model, dtype)
    factor = model.rope_scaling.attention_factor
    return jnp.cos(turn) * factor, jnp.sin(turn) * factor


def _slowed(lengths: Int[Array, "B S"], model: Model, dtype: jnp.dtype) -> Float[Array, "B S 1 P"]:
    """What a larger base makes of the frequencies: base = theta (factor n / original - (factor - 1))^(E / (E - 2)),
    as in transformers; the slowest plane ends up that much slower, the fastest is kept."""
    scaling, planes = model.rope_scaling, model.head_size // 2
    excess = jnp.maximum(lengths - scaling.original_length, 0)[..., None, None].astype(dtype)
    stretch = 1 + scaling.factor / scaling.original_length * excess
    return stretch ** jnp.asarray(-np.arange(planes) / (planes - 1), dtype)


def _document_lengths(positions: Int[Array, "B S"], segments: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Of each token: the largest position in its document, plus 1. Documents lie in one piece."""
    document = jnp.cumsum(jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0, axis=1)
    last = jax.vmap(lambda at, place: jnp.zeros_like(place).at[at].max(place)[at])(document, positions)
    return last + 1


def rotate(
    x: Float[Array, "B S H E"], cosine: Float[Array, "B S 1 P"], sine: Float[Array, "B S 1 P"]
) -> Float[Array, "B S H E"]:
    """Turn each head's planes (x_i, x_{i + E/2}) by its position's angle; computed in the angles' type."""
    first, second = jnp.split(x.astype(cosine.dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, first * sine + second * cosine], axis=-1)
    return turned.astype(x.dtype)
