"""What the TPU's own compiler makes of a mesh."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from xgen.model.linear import project
from xgen.parallel import topology
from xgen.parallel.hlo import read_work
from xgen.parallel.mesh import Sizes, line_of, split_of
from xgen.parallel.program import Layout
from xgen.parallel.rules import RULES, TOKENS
from xgen.parallel.slices import parse_slice

pytestmark = pytest.mark.oracle

INPUTS, OUTPUTS = 4096, 11008


@pytest.fixture(scope="module")
def chips():
    if not topology.available():
        pytest.fail("these tests need libtpu; pip install 'xgen[tpu]', or leave them out with -m \"not oracle\"")
    assert os.environ.get("JAX_PLATFORMS", "cpu") == "cpu"
    return tuple(topology.describe(parse_slice("v4:4x4x4")))


def weight_gradient_bytes(chips, sizes: Sizes, line: int | None) -> dict[str, int]:
    """Bytes by kind of what a product's backward pass exchanges for the gradient of its weight, stored in parts."""
    layout = Layout(sizes, chips, line)
    shards = split_of(layout.mesh).shards
    stored = PartitionSpec(RULES["embed"], None)

    def gradient(x, weight, back):
        return jax.vjp(lambda weight: project(x, weight, shards), weight)[1](back)[0]

    rows = PartitionSpec(TOKENS[0], None)
    program = jax.jit(layout.spread(gradient, (rows, stored, rows), stored))

    def array(shape: tuple[int, int], place: PartitionSpec, dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(place))

    tokens = 64 * 128
    given = array((tokens, INPUTS), rows, jnp.bfloat16), array((INPUTS, OUTPUTS), stored, jnp.float32)
    compiled = program.lower(*given, array((tokens, OUTPUTS), rows, jnp.bfloat16)).compile()
    return dict(read_work(compiled.as_text()).bytes_by_kind())


def test_gradients_are_scattered_over_a_whole_torus(chips):
    sizes = Sizes(1, 64, 1, 1)
    assert line_of(sizes, chips) == 4
    assert weight_gradient_bytes(chips, sizes, None).keys() == {"reduce-scatter"}
    # What the line is for: uncut, every chip would get the whole sum first. When this fails, the line can go.
    whole = weight_gradient_bytes(chips, sizes, 1)
    assert whole == {"all-reduce": 4 * INPUTS * OUTPUTS}


def test_within_a_plane_no_line_is_needed(chips):
    sizes = Sizes(1, 16, 1, 4)
    assert line_of(sizes, chips) == 1
    assert weight_gradient_bytes(chips, sizes, None).keys() == {"reduce-scatter"}
