"""Rotary position embedding, full head, half-split layout (Su et al. 2021; the layout of Hugging Face's LLaMA)."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from xgen.model import native
from xgen.model.split import ONE, Split, gather, local_places, zigzag
from xgen.recipe.schema import Model


def frequencies(model: Model) -> np.ndarray:
    """Radians a position turns each of the head_size/2 planes by, float32, after the recipe's scaling.

    Rounded at every step as in the code that LLaMAs are trained with: exact frequencies differ by up to 1e-7, which at
    position 8,000 moves the logits of a real model by 1e-3. Those of a dynamic scaling are of documents within the
    original length; see `angles` for the others.
    """
    plain = 1 / _powers(model.rope_theta, model)
    return _SCALED[model.rope_scaling.kind](plain, model)


def _powers(base: float, model: Model) -> np.ndarray:
    """base^(2 i / E) for each plane i: the exponent and the power are rounded to float32, the power's way is not."""
    exponents = np.arange(0, model.head_size, 2, dtype=np.float32) / np.float32(model.head_size)
    powers: np.ndarray = (base ** exponents.astype(np.float64)).astype(np.float32)
    return powers


def _llama3(plain: np.ndarray, model: Model) -> np.ndarray:
    """Llama 3.1's rule: planes that turn less than `low_turns` in the old length are stretched, those that turn
    over `high_turns` are kept, those between are blended by their turns."""
    scaling = model.rope_scaling
    factor, wavelengths = np.float32(scaling.factor), np.float32(2 * math.pi) / plain
    turns = np.float32(scaling.original_length) / wavelengths
    keep = (turns - np.float32(scaling.low_turns)) / np.float32(scaling.high_turns - scaling.low_turns)
    blended = (1 - keep) * plain / factor + keep * plain
    return np.where(keep <= 0, plain / factor, np.where(keep >= 1, plain, blended))


def _yarn(plain: np.ndarray, model: Model) -> np.ndarray:
    """YaRN (Peng et al. 2023, section 3.2), blended by plane index between whole planes as transformers does."""
    scaling = model.rope_scaling

    def plane(turns: float) -> float:
        wavelengths = scaling.original_length / (turns * 2 * math.pi)
        return model.head_size * math.log(wavelengths) / (2 * math.log(model.rope_theta))

    first = max(math.floor(plane(scaling.high_turns)), 0)
    last = min(math.ceil(plane(scaling.low_turns)), model.head_size - 1)
    ramp = (np.arange(plain.size, dtype=np.float32) - np.float32(first)) / np.float32(last - first or 1e-3)
    keep = 1 - np.clip(ramp, np.float32(0), np.float32(1))
    stretched = 1 / (np.float32(scaling.factor) * _powers(model.rope_theta, model))
    blended: np.ndarray = stretched * (1 - keep) + plain * keep
    return blended


_SCALED: dict[str, Callable[[np.ndarray, Model], np.ndarray]] = {
    "none": lambda plain, _: plain,
    "linear": lambda plain, model: plain / np.float32(model.rope_scaling.factor),
    "dynamic": lambda plain, _: plain,
    "llama3": _llama3,
    "yarn": _yarn,
}
"""From plain frequencies to those of each kind of scaling."""


def angles(
    positions: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    model: Model,
    dtype: jnp.dtype,
    split: Split = ONE,
) -> tuple[Float[Array, "B S 1 P"], Float[Array, "B S 1 P"]]:
    """Cosine and sine of each position's turn, for `rotate`; `dtype` is float32 or wider.

    A dynamic scaling depends on the length of the token's own document within the row, and on no other document. Past
    the original length it is not causal within the document, by its nature: each token more turns all of them anew.
    """
    rates = jnp.asarray(frequencies(model), dtype)
    if model.rope_scaling.kind == "dynamic":
        columns = positions.shape[1] * (jax.lax.axis_size(split.context) if split.context else 1)
        table = jnp.asarray(_by_length(model, columns), dtype)
        beyond = jnp.maximum(_document_lengths(positions, segments, split) - model.rope_scaling.original_length, 0)
        rates = table[beyond][:, :, None]
    turn = positions[..., None, None].astype(dtype) * rates
    factor = model.rope_scaling.attention_factor
    return jnp.cos(turn) * factor, jnp.sin(turn) * factor


def _by_length(model: Model, longest: int) -> np.ndarray:
    """Frequencies of a dynamic scaling in documents 0, 1, ... tokens past the original length, to the `longest`:
    base = theta (factor n / original - (factor - 1))^(E / (E - 2)), as in transformers. A table, since on a device
    there is no double precision for the powers; an index past its end, which no row of `longest` has, is the last."""
    scaling = model.rope_scaling
    lengths = range(scaling.original_length, max(longest, scaling.original_length) + 1)
    stretches = [scaling.factor * n / scaling.original_length - (scaling.factor - 1) for n in lengths]
    power = model.head_size / (model.head_size - 2)
    return np.stack([1 / _powers(model.rope_theta * stretch**power, model) for stretch in stretches])


def _document_lengths(positions: Int[Array, "B S"], segments: Int[Array, "B S"], split: Split) -> Int[Array, "B S"]:
    """Of each token: the largest position in its document, plus 1. Documents lie in one piece."""
    if split.context:
        parts, mine = jax.lax.axis_size(split.context), local_places(positions.shape[1], split.context)
        natural = np.argsort(zigzag(positions.shape[1] * parts, parts))
        places, documents = (gather(x, split.context, 1)[:, natural] for x in (positions, segments))
        return _document_lengths(places, documents, ONE)[:, mine]
    document = jnp.cumsum(jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0, axis=1)
    last = jax.vmap(lambda at, place: jnp.zeros_like(place).at[at].max(place)[at])(document, positions)
    return last + 1


def rotate(
    x: Float[Array, "B S H E"], cosine: Float[Array, "B S 1 P"], sine: Float[Array, "B S 1 P"]
) -> Float[Array, "B S H E"]:
    """Turn each head's planes (x_i, x_{i + E/2}) by its position's angle; computed in the angles' type. The angles
    have no gradient."""
    if native.applies(x):
        return _turned(x, cosine, sine)
    first, second = jnp.split(x.astype(cosine.dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, first * sine + second * cosine], axis=-1)
    return turned.astype(x.dtype)


@jax.custom_vjp
def _turned(x: Array, cosine: Array, sine: Array) -> Array:
    return native.rotate(x, cosine, sine, backwards=False)


def _turned_forward(x: Array, cosine: Array, sine: Array) -> tuple[Array, tuple[Array, Array]]:
    return _turned(x, cosine, sine), (cosine, sine)


def _turned_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    return native.rotate(gradient, *saved, backwards=True), None, None


_turned.defvjp(_turned_forward, _turned_backward)
