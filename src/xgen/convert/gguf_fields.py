"""What GGUF's reader and writer share: the keys of llama.cpp's "llama", its order of rotary rows, its rotary factors.

Facts of llama.cpp: `conversion/llama.py` for what files hold, `src/models/llama.cpp` and `src/llama-context.cpp` for
what is computed from it.
"""

from __future__ import annotations

import math

import numpy as np

from xgen.model.rope import frequencies
from xgen.model.weights import Weight
from xgen.recipe.schema import Model, RopeScaling

ARCHITECTURE = "llama"

COUNTS = {
    "llama.block_count": "layers",
    "llama.embedding_length": "hidden_size",
    "llama.feed_forward_length": "mlp_size",
    "llama.attention.head_count": "heads",
    "llama.attention.head_count_kv": "kv_heads",
    "llama.attention.key_length": "head_size",
    "llama.attention.value_length": "head_size",
    "llama.rope.dimension_count": "head_size",
    "llama.vocab_size": "vocab_size",
}
"""Key -> what `Model` calls it."""

NUMBERS = {
    "llama.attention.layer_norm_rms_epsilon": "norm_epsilon",
    "llama.rope.freq_base": "rope_theta",
}
CONTEXT = "llama.context_length"
SCALING = "llama.rope.scaling."
FACTORS = "rope_freqs.weight"
"""The tensor of Llama 3's scaling: what each plane's frequency is divided by."""

_ALLOWED = 1e-5
"""Relative: the factors are stored, and were computed, in float32."""


def rotary_heads(row: Weight, model: Model) -> int | None:
    """Heads of a row whose outputs are turned by position, None for every other row."""
    heads = {"block.query": model.heads, "block.key": model.kv_heads}
    return heads.get(row.name.removesuffix("_bias"))


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads x size, ...] of ours, a plane's two in the two halves of a head, as llama.cpp has them: side by
    side."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def half_split(array: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleaved`."""
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def own_sharpening(factor: float) -> float:
    """What llama.cpp multiplies cosine and sine by of its own accord under YaRN: what YaRN publishes."""
    return RopeScaling(kind="yarn", factor=factor).attention_factor


def rotary_factors(model: Model) -> np.ndarray:
    """float32 [head_size / 2]: what scaling divides each plane's frequency by."""
    plain = model.model_copy(update={"rope_scaling": RopeScaling()})
    found: np.ndarray = frequencies(plain) / frequencies(model)
    return found.astype(np.float32)


def recognised(factors: np.ndarray, model: Model, lengths: tuple[int, ...]) -> RopeScaling | None:
    """The scaling of Llama 3 that gives `factors`, None when none does. The file does not say its original length:
    it is computed from a blended plane, or tried among `lengths` and the powers of two when no plane is blended."""
    if not (np.isfinite(factors).all() and factors.min() >= 1 and len(factors) == model.head_size // 2):
        return None
    largest = float(str(factors.max()))
    if largest == 1:
        return RopeScaling()
    tried = (*_solved(factors.astype(np.float64), model), *lengths, *(1 << power for power in range(8, 25)))
    for length in tried:
        scaling = RopeScaling(kind="llama3", factor=largest, original_length=length)
        wanted = rotary_factors(model.model_copy(update={"rope_scaling": scaling}))
        if np.allclose(factors, wanted, rtol=_ALLOWED, atol=0):
            return scaling
    return None


def _solved(factors: np.ndarray, model: Model) -> tuple[int, ...]:
    """The original length by the plane that is blended most evenly, of which 1 / factor = keep + (1 - keep) / largest
    and keep = (turns - 1) / (4 - 1); () when none is."""
    keep = (1 / factors - 1 / factors.max()) / (1 - 1 / factors.max())
    plane = int(np.argmin(np.abs(keep - 0.5)))
    if not 1e-3 < keep[plane] < 1 - 1e-3:
        return ()
    turns_a_token = frequencies(model)[plane] / (2 * math.pi)
    return (max(1, round((1 + 3 * keep[plane]) / turns_a_token)),)
