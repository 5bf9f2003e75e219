"""A LLaMA made and run by transformers: logits at short and long, loss and gradients, without transformers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_models import quick_jit, relative_error

from xgen.model import WEIGHTS, Spec, as_dict, from_dict, logits, objective
from xgen.model.weights import rows
from xgen.recipe.schema import Compute, Model

FOLDER = Path(__file__).parent / "data" / "tiny-llama"
MODEL = Model(
    layers=4,
    hidden_size=64,
    heads=4,
    kv_heads=4,
    head_size=16,
    mlp_size=176,
    vocab_size=512,
)


def spec(attention="auto"):
    return Spec(MODEL, 512, Compute(precision="float32", attention=attention))


def theirs(row, layer):
    return row.hugging_face.format(layer=layer)


def to_ours(row, shape, matrix):
    """Hugging Face keeps a matrix as [out, in], our axes are inputs first; the embedding is [vocab, embed] in both."""
    return (matrix.T if row.init in ("input", "output") else matrix).reshape(shape)


@pytest.fixture(scope="module")
def weights():
    tensors, arrays = load_file(FOLDER / "model.safetensors"), {}
    for row in rows(spec()):
        shape = row.shape(spec())
        if row.axes[0] == "layer":
            arrays[row.name] = np.stack(
                [to_ours(row, shape[1:], tensors.pop(theirs(row, layer))) for layer in range(MODEL.layers)]
            )
        else:
            arrays[row.name] = to_ours(row, shape, tensors.pop(row.hugging_face))
    assert not tensors, "tensors that the table does not name"
    return from_dict({name: jnp.asarray(array) for name, array in arrays.items()}, spec())


@pytest.fixture(scope="module")
def reference():
    return dict(np.load(FOLDER / "reference.npz"))


def whole(ids):
    ids = jnp.asarray(ids)
    return ids, jnp.zeros_like(ids), jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_short_logits(weights, reference, backend):
    found = jax.jit(logits, static_argnums=1)(weights, spec(backend), *whole(reference["short_ids"]))
    assert np.abs(found - reference["short_logits"]).max() <= 1e-4


def test_long_logits(weights, reference):
    found = jax.jit(logits, static_argnums=1)(weights, spec(), *whole(reference["long_ids"]))
    assert np.abs(found[0, reference["long_positions"]] - reference["long_logits"]).max() <= 1e-4


def test_loss_and_gradients(weights, reference):
    ids, segments, positions = whole(reference["short_ids"])
    batch = (ids[:, :-1], ids[:, 1:], segments[:, 1:], positions[:, :-1])

    def loss(weights):
        return objective(weights, spec(), *batch, 1 / batch[0].size)

    (total, per_token), gradient = quick_jit(jax.value_and_grad(loss, has_aux=True))(weights)
    assert abs(total - reference["short_loss"]) < 1e-5
    assert abs(per_token.mean() - reference["short_loss"]) < 1e-5
    wanted = dict(np.load(FOLDER / "reference_grads.npz"))
    ours = as_dict(gradient)
    norm = np.sqrt(sum(np.sum(np.square(np.asarray(array, np.float64))) for array in ours.values()))
    assert abs(norm / wanted.pop("grad_norm") - 1) < 1e-5
    rows_of = {theirs(row, layer): (row, layer) for row in WEIGHTS for layer in range(MODEL.layers)}
    assert len(wanted) == 6
    for name, array in wanted.items():
        row, layer = rows_of[name]
        found = ours[row.name][layer] if row.axes[0] == "layer" else ours[row.name]
        assert relative_error(found, to_ours(row, found.shape, array)) < 1e-5, name
