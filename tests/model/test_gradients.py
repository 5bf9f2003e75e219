"""Every written-out gradient and every chunked sum equals a plain float64 computation.

The measure is the norm-wise relative error ||found - exact|| / ||exact|| of each array. In float32 it stays below 1e-6
for each piece. In bfloat16, whose unit is 2^-8, the inputs are rounded first and each piece's results, forward and
backward, stay within BFLOAT16.
"""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import plain_decoder as plain
import pytest
from small_models import SCALINGS, batch_of, exact, quick_jit, relative_error, spec_of, weights_of

from xgen.model import as_dict, forward, logits, nll, objective
from xgen.model import loss as loss_module
from xgen.model.attention import attention, cudnn
from xgen.model.attention import tiles as attention_module
from xgen.model.layers import mlp, norm
from xgen.model.linear import project
from xgen.model.loss import token_nll, weighted_loss
from xgen.model.split import ONE
from xgen.model.weights import Block

FLOAT32 = 1e-6
BFLOAT16 = 2.0**-6
BOUNDS = {"float32": FLOAT32, "bfloat16": BFLOAT16}
precisions = pytest.mark.parametrize("precision", ["float32", "bfloat16"])


def normal(seed, *shape, precision="float32"):
    drawn = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(drawn, jnp.dtype(precision))


@cache
def with_gradients(function):
    """(arrays, rest, direction) -> the result, and the direction pulled back to each of `arrays`."""

    def both(arrays, rest, direction):
        result, pull = jax.vjp(lambda *arrays: function(*arrays, *rest), *arrays)
        return result, pull(direction.astype(result.dtype))

    return both


def assert_same_gradients(found, wanted, arrays, rest, bound):
    """`found(*arrays, *rest)` and its gradients by `arrays`, along a random direction of the result, are `wanted`'s."""
    shape = jax.eval_shape(found, *arrays, *rest)
    direction = normal(99, *shape.shape, precision=shape.dtype)
    result, gradients = quick_jit(with_gradients(found))(arrays, rest, direction)
    exact_result, exact_gradients = exact(with_gradients(wanted), arrays, rest, direction)
    assert result.dtype == shape.dtype
    assert relative_error(result, exact_result) < bound
    for place, pair in enumerate(zip(gradients, exact_gradients, strict=True)):
        assert pair[0].dtype == arrays[place].dtype
        assert relative_error(*pair) < bound, f"gradient of argument {place}"


@precisions
@pytest.mark.parametrize("tokens", [24, 21], ids=["tokens in four parts", "tokens in one part"])
def test_project(precision, tokens):
    x, weight = normal(0, 3, tokens // 3, 32, precision=precision), normal(1, 32, 4, 5)
    if precision == "bfloat16":
        weight = weight.astype(jnp.bfloat16).astype(jnp.float32)  # what the product sees of the master weight
    assert_same_gradients(project, plain_project, (x, weight), (), BOUNDS[precision])


def plain_project(x, weight):
    return jnp.einsum("bsd,dhe->bshe", x, weight)


@precisions
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm(precision, kind):
    model = spec_of(norm=kind).model
    arrays = [normal(0, 5, 7, 32, precision=precision) + 1, 1 + normal(1, 32), normal(2, 32)]
    if kind == "rms":
        arrays = arrays[:2]

    def of(function):
        return lambda x, scale, bias=None: function(x, scale, bias, model)

    assert_same_gradients(of(norm), of(plain.norm), tuple(arrays), (), BOUNDS[precision])


SHAPES = {"up": (16, 24), "down": (24, 16), "gate": (16, 24), "up_bias": (24,), "down_bias": (16,), "gate_bias": (24,)}


@precisions
@pytest.mark.parametrize("biased", [False, True], ids=["unbiased", "biased"])
@pytest.mark.parametrize("gated", [True, False], ids=["swiglu", "gelu"])
def test_mlp(precision, gated, biased):
    names = [name for name in SHAPES if (gated or "gate" not in name) and (biased or "bias" not in name)]
    absent = dict.fromkeys(field.name for field in dataclasses.fields(Block))

    def found(x, *arrays):
        return mlp(x, Block(**absent | dict(zip(names, arrays, strict=True))), ONE)

    def wanted(x, *arrays):
        return plain.mlp(x, dict(zip(names, arrays, strict=True)))

    arrays = [normal(seed, *SHAPES[name]) / 4 for seed, name in enumerate(names, 1)]
    x = normal(0, 2, 12, 16, precision=precision)
    assert_same_gradients(found, wanted, (x, *arrays), (), BOUNDS[precision])


FOUND = {name: partial(attention, backend=name) for name in ("blockwise", "reference")}
# The same call and masks as on a GPU, which is not here.
FOUND["cudnn"] = partial(cudnn, implementation="xla")


@pytest.mark.parametrize(
    ("backend", "kv_heads", "precision"),
    [
        ("blockwise", 4, "float32"),
        ("blockwise", 2, "float32"),
        ("blockwise", 1, "float32"),
        ("blockwise", 2, "bfloat16"),
        ("reference", 2, "float32"),
        ("reference", 2, "bfloat16"),
        ("cudnn", 2, "float32"),
        ("cudnn", 1, "bfloat16"),
    ],
)
def test_attention(monkeypatch, backend, kv_heads, precision):
    """43 places are three blocks of 16, the last one short; one row is one document, one has three across blocks."""
    monkeypatch.setattr(attention_module, "BLOCK", 16)
    segments = batch_of(spec_of(), [[43, 0, 0], [5, 20, 18]])[2]
    q = normal(0, 2, 43, 4, 8, precision=precision)
    k, v = (normal(seed, 2, 43, kv_heads, 8, precision=precision) for seed in (1, 2))
    assert_same_gradients(FOUND[backend], plain.attention, (q, k, v), (segments,), BOUNDS[precision])


@pytest.mark.parametrize("length", [1100])
def test_attention_in_blocks_of_the_real_size(length):
    assert attention_module.BLOCK == 512
    segments = (jnp.arange(length)[None] >= 400).astype(jnp.int32)
    q, k, v = normal(0, 1, length, 2, 8), normal(1, 1, length, 1, 8), normal(2, 1, length, 1, 8)
    assert_same_gradients(attention, plain.attention, (q, k, v), (segments,), FLOAT32)


@pytest.mark.parametrize(
    ("precision", "chunk", "real_vocab", "z_loss"),
    [("float32", 37, 90, 0.1), ("float32", 8, 90, 0.1), ("float32", 5, 96, 0.0), ("bfloat16", 8, 90, 0.1)],
)
def test_weighted_loss(monkeypatch, precision, chunk, real_vocab, z_loss):
    """37 tokens: one chunk, five of 8 with three places to spare, or ten of 4."""
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 96 * chunk)
    x, head = normal(0, 37, 16, precision=precision), normal(1, 16, 96)
    if precision == "bfloat16":
        head = head.astype(jnp.bfloat16).astype(jnp.float32)
    targets = jnp.asarray(np.random.default_rng(2).integers(0, real_vocab, 37), jnp.int32)
    each = jnp.abs(normal(3, 37))

    def found(x, head, targets, each):
        return weighted_loss(x, head, targets, each, real_vocab, z_loss)[0]

    def wanted(x, head, targets, each):
        nll, lse = plain.token_nll(x @ head, targets, real_vocab)
        return (each * (nll + z_loss * lse**2)).sum()

    assert_same_gradients(found, wanted, (x, head), (targets, each), BOUNDS[precision])
    scores = np.asarray(x, np.float64) @ np.asarray(head, np.float64)[:, :real_vocab]
    per_token = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(37), targets]
    reported, measured = quick_jit(
        lambda x, head: (
            weighted_loss(x, head, targets, each, real_vocab, z_loss)[1],
            token_nll(x, head, targets, real_vocab),
        )
    )(x, head)
    assert relative_error(reported, per_token) < BOUNDS[precision]
    assert relative_error(measured, per_token) < BOUNDS[precision]


def objective_gradients(spec, weights, batch, remat):
    def total(weights):
        return objective(weights, spec, *batch, 1 / batch[0].size, Z_LOSS, remat)

    return quick_jit(jax.value_and_grad(total, has_aux=True))(weights)


@cache
def exact_objective(model, real_vocab):
    def total(named, batch):
        return plain.objective(named, model, real_vocab, batch, 1 / batch[0].size, Z_LOSS)

    return jax.value_and_grad(total)


Z_LOSS = 1e-2
OBJECTIVES = [
    ("xgen", "none"),
    ("xgen", "dots"),
    ("xgen", "block"),
    ("grouped_tied", "dots"),
    ("parallel", "block"),
    ("jaxformer", "none"),
    ("layer_norm", "dots"),
    ("biased", "dots"),
    ("biased", "block"),
    ("biased_gelu", "none"),
]


STRETCHED = [("biased", "dots", kind) for kind in SCALINGS if kind != "none"]


@pytest.mark.parametrize(("variant", "remat", "kind"), [*((*each, "none") for each in OBJECTIVES), *STRETCHED])
def test_objective(monkeypatch, variant, remat, kind):
    monkeypatch.setattr(attention_module, "BLOCK", 24)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 96 * 24)
    spec = spec_of(variant, rope_scaling=SCALINGS[kind])
    weights, batch = weights_of(spec), batch_of(spec, [[11, 24, 6], [41, 0, 0]])
    (total, per_token), gradients = objective_gradients(spec, weights, batch, remat)
    wanted_total, wanted = exact(exact_objective(spec.model, spec.real_vocab), as_dict(weights), batch)
    assert relative_error(total, wanted_total) < FLOAT32
    found = as_dict(gradients)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert relative_error(gradient, wanted[name]) < FLOAT32, name
    if gradients.head is not None:
        assert not np.asarray(gradients.head)[:, spec.real_vocab :].any(), "padding rows have no gradient"
    if remat == "none":
        np.testing.assert_allclose(quick_jit(nll, static_argnums=1)(weights, spec, *batch), per_token, rtol=1e-5)


@pytest.mark.parametrize(("variant", "remat"), [("xgen", "dots"), ("biased", "none"), ("jaxformer", "block")])
def test_objective_in_bfloat16(variant, remat):
    """Master weights and gradients stay float32; the gradient is the float64 one's within eight units of bfloat16."""
    spec = spec_of(variant, precision="bfloat16")
    weights, batch = weights_of(spec), batch_of(spec, [[11, 24, 6], [41, 0, 0]])
    (total, _), gradients = objective_gradients(spec, weights, batch, remat)
    wanted_total, wanted = exact(exact_objective(spec.model, spec.real_vocab), as_dict(weights), batch)
    assert total.dtype == jnp.float32
    assert relative_error(total, wanted_total) < 2.0**-9
    for name, gradient in as_dict(gradients).items():
        assert gradient.dtype == jnp.float32
        assert relative_error(gradient, wanted[name]) < 2.0**-5, name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_logits_are_float32(precision):
    spec = spec_of("grouped_tied", precision=precision)
    weights, (ids, _, segments, positions) = weights_of(spec), batch_of(spec, [[20, 12]])
    scores = quick_jit(logits, static_argnums=1)(weights, spec, ids, segments, positions)
    assert scores.dtype == jnp.float32
    states = jax.eval_shape(lambda *given: forward(given[0], spec, *given[1:]), weights, ids, segments, positions)
    assert states.dtype == jnp.dtype(precision)
    wanted = exact(lambda w, *rest: plain.logits(w, spec.model, *rest), as_dict(weights), ids, segments, positions)
    real = spec.real_vocab
    assert relative_error(scores[..., :real], wanted[..., :real]) < BOUNDS[precision]
    assert (np.asarray(scores)[..., real:] == -1e30).all()


def products(spec, remat):
    """Matrix products written in the gradient's program, one layer's being all layers' (they are scanned)."""
    weights, batch = weights_of(spec), batch_of(spec, [[16]])
    gradient = jax.grad(lambda weights: objective(weights, spec, *batch, 1.0, 0.0, remat)[0])
    return str(jax.make_jaxpr(gradient)(weights)).count("dot_general")


def test_each_policy_recomputes_what_it_says():
    """ "dots" the attention's two products; "block" also query, key, value, output, gate and up. Whether down is
    recomputed does not matter: nobody's gradient needs its result."""
    plainly = products(spec_of(), "none")
    assert products(spec_of(), "dots") == plainly + 2
    assert products(spec_of(), "block") == plainly + 8


def test_tokens_are_weighted_in_float32():
    """1/82 is no number of bfloat16."""
    spec = spec_of(precision="bfloat16")
    weights, batch = weights_of(spec), batch_of(spec, [[11, 24, 6], [41, 0, 0]])
    total, per_token = quick_jit(lambda weights: objective(weights, spec, *batch, 1 / 82))(weights)
    assert relative_error(total, np.asarray(per_token, np.float64).mean()) < FLOAT32
