"""The shapes that signatures state are held to while the tests run (tests/conftest.py), and the check can fail."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError
from small_models import batch_of, spec_of, weights_of

from xgen.model import attention, decoder, layers, linear, loss, rope
from xgen.model.attention import attention as attend


def test_every_module_is_checked():
    for function in (attend, decoder.forward, layers.norm, linear.project, loss.token_nll, rope.rotate):
        assert hasattr(function, "__wrapped__"), f"{function.__module__} was imported before tests/conftest.py"


def test_a_wrong_shape_is_caught():
    model = spec_of().model
    with pytest.raises(TypeCheckError):
        layers.norm(jnp.zeros((2, 32)), jnp.zeros(31), None, model)
    with pytest.raises(TypeCheckError):
        rope.rotate(jnp.zeros((1, 5, 4, 8)), jnp.zeros((1, 4, 1, 4)), jnp.zeros((1, 5, 1, 4)))
    with pytest.raises(TypeCheckError):
        attend(jnp.zeros((1, 5, 4, 8)), jnp.zeros((1, 5, 2, 8)), jnp.zeros((1, 5, 4, 8)), jnp.zeros((1, 5), jnp.int32))
    with pytest.raises(TypeCheckError):
        loss.token_nll(jnp.zeros((3, 8)), jnp.zeros((8, 9)), jnp.zeros(4, jnp.int32), 9)


def test_a_wrong_type_is_caught():
    spec = spec_of()
    ids, _, segments, positions = batch_of(spec, [[16], [16]])
    with pytest.raises(TypeCheckError):
        decoder.forward(weights_of(spec), spec, ids.astype(jnp.float32), segments, positions)
    with pytest.raises(TypeCheckError):
        attention.reference(*[jnp.zeros((1, 5, 2, 8))] * 3, "segments")
