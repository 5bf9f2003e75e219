"""The decoder once more, written to be read: all pairs of tokens, all logits at once, automatic differentiation.

An oracle: of the package it uses only the recipe's schema. It computes in the type of the weights it is given, which is
float64 in the tests.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from xgen.recipe.schema import Model

Named = Mapping[str, jax.Array]


def attention(q, k, v, segments):
    """q [B, S, H, E], k and v [B, S, K, E]; query head h reads key head h // (H / K)."""
    b, s, h, e = q.shape
    q = q.reshape(b, s, k.shape[2], h // k.shape[2], e)
    scores = jnp.einsum("bskge,btke->bkgst", q, k) / math.sqrt(e)
    seen = np.tril(np.ones((s, s), bool)) & (segments[:, :, None] == segments[:, None, :])
    shares = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgst,btke->bskge", shares, v).reshape(b, s, h, e)


def rotate(x, turn, length):
    """Each plane (x_i, x_{i + E/2}) as a complex number, turned by its angle and made longer."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * length * jnp.exp(1j * turn[:, :, None])
    return jnp.concatenate([turned.real, turned.imag], axis=-1)


def turns(model: Model, segments, positions):
    """Radians [B, S, E / 2] by which each token's planes are turned: position x base^(-2i / E), stretched."""
    scaling, plane = model.rope_scaling, np.arange(model.head_size // 2)
    base = jnp.full((*positions.shape, 1), float(model.rope_theta))
    if scaling.kind == "dynamic":  # the base grows with the token's document, as transformers writes it
        same = segments[:, :, None] == segments[:, None, :]
        length = jnp.where(same, positions[:, None, :], 0).max(axis=2, keepdims=True) + 1
        ratio = jnp.maximum(length, scaling.original_length) / scaling.original_length
        base *= (scaling.factor * ratio - (scaling.factor - 1)) ** (model.head_size / (model.head_size - 2))
    turn = positions[:, :, None] * base ** (-2 * plane / model.head_size)
    if scaling.kind in ("none", "dynamic"):
        return turn
    return turn * ((1 - stretched(model)) + stretched(model) / scaling.factor)


def stretched(model: Model) -> np.ndarray:
    """How far each plane is slowed to a `factor`-th, 0 to 1: all alike, by its wavelength, or by its index."""
    scaling, planes = model.rope_scaling, range(model.head_size // 2)
    per_turn = [2 * math.pi * model.rope_theta ** (2 * plane / model.head_size) for plane in planes]
    if scaling.kind == "linear":
        return np.ones(len(planes))
    if scaling.kind == "llama3":
        shortest, longest = scaling.original_length / scaling.high_turns, scaling.original_length / scaling.low_turns
        blend = scaling.high_turns - scaling.low_turns
        between = [(scaling.high_turns - scaling.original_length / wave) / blend for wave in per_turn]
        return np.select([np.less(per_turn, shortest), np.greater(per_turn, longest)], [0.0, 1.0], between)
    first, last = (
        model.head_size / 2 * math.log(scaling.original_length / (2 * math.pi * turns), model.rope_theta)
        for turns in (scaling.high_turns, scaling.low_turns)
    )
    first, last = max(math.floor(first), 0), min(math.ceil(last), model.head_size - 1)
    return np.array([min(max((plane - first) / (last - first), 0.0), 1.0) for plane in planes])


def norm(x, scale, bias, model: Model):
    if bias is None:
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + model.norm_epsilon) * scale
    spread = jnp.sqrt(x.var(-1, keepdims=True) + model.norm_epsilon)
    return (x - x.mean(-1, keepdims=True)) / spread * scale + bias


def mlp(x, w: Named):
    raised = x @ w["up"] + w.get("up_bias", 0)
    if "gate" in w:
        gated = x @ w["gate"] + w.get("gate_bias", 0)
        inner = gated / (1 + jnp.exp(-gated)) * raised
    else:
        inner = 0.5 * raised * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (raised + 0.044715 * raised**3)))
    return inner @ w["down"] + w.get("down_bias", 0)


def hidden(weights: Named, model: Model, ids, segments, positions):
    """Hidden states after the final norm, a layer at a time."""
    x = weights["embedding"][ids]
    for layer in range(model.layers):
        w = {name[6:]: array[layer] for name, array in weights.items() if name.startswith("block.")}
        x = _layer(x, w, model, segments, positions)
    return norm(x, weights["final_norm"], weights.get("final_norm_bias"), model)


def _layer(x, w: Named, model: Model, segments, positions):
    first = norm(x, w["attention_norm"], w.get("attention_norm_bias"), model)
    q, k, v = (
        jnp.einsum("bsd,dhe->bshe", first, w[name]) + w.get(f"{name}_bias", 0) for name in ("query", "key", "value")
    )
    turn = turns(model, segments, positions)
    q, k = (rotate(part, turn, model.rope_scaling.attention_factor) for part in (q, k))
    attended = jnp.einsum("bshe,hed->bsd", attention(q, k, v, segments), w["output"]) + w.get("output_bias", 0)
    if model.circuits == "parallel":
        return x + attended + mlp(first, w)
    x = x + attended
    return x + mlp(norm(x, w["mlp_norm"], w.get("mlp_norm_bias"), model), w)


def logits(weights: Named, model: Model, ids, segments, positions):
    """All rows of the vocabulary, padding included and unmasked."""
    head = weights["head"] if "head" in weights else weights["embedding"].T
    return hidden(weights, model, ids, segments, positions) @ head


def token_nll(scores, targets, real_vocab: int):
    """Each target's nll over the real rows, and the log-sum-exp."""
    real = scores[..., :real_vocab]
    return -jnp.take_along_axis(jax.nn.log_softmax(real), targets[..., None], -1)[..., 0], jax.nn.logsumexp(real, -1)


def objective(weights: Named, model: Model, real_vocab: int, batch, token_weight, z_loss=0.0):
    """token_weight x the sum over tokens of nll + z_loss x lse^2; `batch` is ids, targets, segments, positions."""
    ids, targets, segments, positions = batch
    nll, lse = token_nll(logits(weights, model, ids, segments, positions), targets, real_vocab)
    return (token_weight * (nll + z_loss * lse**2)).sum()
