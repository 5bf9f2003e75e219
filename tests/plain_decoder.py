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


def rotate(x, positions, theta):
    """Each plane (x_i, x_{i + E/2}) as a complex number, turned by position x theta^(-2i / E)."""
    half = x.shape[-1] // 2
    turn = positions[:, :, None, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * turn)
    return jnp.concatenate([turned.real, turned.imag], axis=-1)


def norm(x, scale, bias, model: Model):
    if bias is None:
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + model.norm_epsilon) * scale
    spread = jnp.sqrt(x.var(-1, keepdims=True) + model.norm_epsilon)
    return (x - x.mean(-1, keepdims=True)) / spread * scale + bias


def mlp(x, gate, up, down):
    raised = x @ up
    if gate is None:
        return (0.5 * raised * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (raised + 0.044715 * raised**3)))) @ down
    gated = x @ gate
    return (gated / (1 + jnp.exp(-gated)) * raised) @ down


def hidden(weights: Named, model: Model, ids, segments, positions):
    """Hidden states after the final norm, a layer at a time."""
    x = weights["embedding"][ids]
    for layer in range(model.layers):
        w = {name[6:]: array[layer] for name, array in weights.items() if name.startswith("block.")}
        x = _layer(x, w, model, segments, positions)
    return norm(x, weights["final_norm"], weights.get("final_norm_bias"), model)


def _layer(x, w: Named, model: Model, segments, positions):
    first = norm(x, w["attention_norm"], w.get("attention_norm_bias"), model)
    q, k, v = (jnp.einsum("bsd,dhe->bshe", first, w[name]) for name in ("query", "key", "value"))
    q, k = (rotate(part, positions, model.rope_theta) for part in (q, k))
    attended = jnp.einsum("bshe,hed->bsd", attention(q, k, v, segments), w["output"])
    if model.circuits == "parallel":
        return x + attended + mlp(first, w.get("gate"), w["up"], w["down"])
    x = x + attended
    return x + mlp(norm(x, w["mlp_norm"], w.get("mlp_norm_bias"), model), w.get("gate"), w["up"], w["down"])


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
