"""What the TPU's own compiler makes of a mesh."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from xgen.errors import RecipeError
from xgen.model.linear import project
from xgen.parallel import topology
from xgen.parallel.hlo import read_work
from xgen.parallel.mesh import Sizes, line_of, split_of
from xgen.parallel.program import Layout
from xgen.parallel.rules import RULES, TOKENS
from xgen.parallel.slices import parse_slice

pytestmark = pytest.mark.oracle

INPUTS, OUTPUTS = 4096, 11008


def chips_of(name: str):
    if not topology.available():
        pytest.fail("these tests need libtpu; pip install 'xgen[tpu]', or leave them out with -m \"not oracle\"")
    assert os.environ.get("JAX_PLATFORMS", "cpu") == "cpu"
    return tuple(topology.describe(parse_slice(name)))


def exchanged(chips, sizes: Sizes, what: str, line: int | None = None) -> dict[str, int]:
    """Bytes by kind of what a product whose weight is stored in parts exchanges: `what` is "result", or "gradient" of
    that weight."""
    layout = Layout(sizes, chips, line)
    shards = split_of(layout.mesh).shards
    stored = PartitionSpec(RULES["embed"], None)

    def gradient(x, weight, back):
        return jax.vjp(lambda weight: project(x, weight, shards), weight)[1](back)[0]

    rows = PartitionSpec((*TOKENS[0], TOKENS[1]), None)
    result = layout.spread(lambda x, weight, _: project(x, weight, shards), (rows, stored, rows), rows)
    program = jax.jit(layout.spread(gradient, (rows, stored, rows), stored) if what == "gradient" else result)

    def array(shape: tuple[int, int], place: PartitionSpec, dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(place))

    tokens = sizes.replica * sizes.fsdp * sizes.context * 128
    given = array((tokens, INPUTS), rows, jnp.bfloat16), array((INPUTS, OUTPUTS), stored, jnp.float32)
    compiled = program.lower(*given, array((tokens, OUTPUTS), rows, jnp.bfloat16)).compile()
    return dict(read_work(compiled.as_text()).bytes_by_kind())


@pytest.mark.parametrize(
    ("name", "fsdp", "line"),
    [("v4:4x4x4", 64, 4), ("v4:4x4x8", 128, 4), ("v4:8x8x4", 256, 8), ("v5e:16x16", 256, 8), ("v4:8x8x8", 512, 16)],
)
def test_gradients_are_scattered_over_a_whole_slice(name, fsdp, line):
    sizes, chips = Sizes(1, fsdp, 1, 1), chips_of(name)
    assert line_of(sizes, chips) == line
    assert exchanged(chips, sizes, "gradient").keys() == {"reduce-scatter"}


def test_uncut_every_chip_would_get_the_whole_sum_first():
    """What the line is for. When this fails, the line can go."""
    whole = exchanged(chips_of("v4:4x4x4"), Sizes(1, 64, 1, 1), "gradient", 1)
    assert whole == {"all-reduce": 4 * INPUTS * OUTPUTS}


def test_over_few_chips_no_line_is_needed():
    sizes, chips = Sizes(1, 16, 1, 4), chips_of("v4:4x4x4")
    assert line_of(sizes, chips) == 1
    assert exchanged(chips, sizes, "gradient").keys() == {"reduce-scatter"}


@pytest.mark.parametrize(
    ("name", "sizes", "groups"),
    [
        ("v4:4x4x4", Sizes(1, 64, 1, 1), 1),
        ("v4:8x8x4", Sizes(1, 256, 1, 1), 1),
        ("v4:8x8x8", Sizes(1, 512, 1, 1), 2),  # no sides of eight make 32 chips
        ("v4:4x4x4", Sizes(1, 16, 4, 1), 1),
        ("v4:4x4x4", Sizes(1, 32, 2, 1), 2),
    ],
)
def test_weights_are_gathered_and_not_summed_from_zeros(name, sizes, groups):
    chips = chips_of(name)
    assert len(split_of(Layout(sizes, chips).mesh).shards) == groups
    assert exchanged(chips, sizes, "result").keys() == {"all-gather"}


def test_slices_hold_whole_replicas():
    chips = chips_of("2*v5e:4x4")
    mesh = Layout(Sizes(2, 16, 1, 1), chips).mesh
    assert [{chip.slice_index for chip in replica.flat} for replica in mesh.devices] == [{0}, {1}]
    with pytest.raises(RecipeError, match=r"mesh\.replica: 1 replicas.*2 slices; use a multiple of 2"):
        _ = Layout(Sizes(1, 32, 1, 1), chips).mesh
    between = exchanged(chips, Sizes(2, 16, 1, 1), "gradient")
    assert between.keys() == {"reduce-scatter"}  # the replicas' sum is taken once a step
