"""What the plan chooses: even, within the limit, and the cheapest of all there are."""

from __future__ import annotations

import math

import pytest

from xgen.model import Spec
from xgen.model.flops import flops_per_token
from xgen.parallel.mesh import Sizes
from xgen.parallel.rules import require_even
from xgen.parallel.slices import Slice, parse_slice
from xgen.planning.choice import ALL, Choice, Freedom, choices, meshes_of, microbatches, overrides
from xgen.planning.search import MARGIN, NEAR, arithmetic, cheapest, executed_flops, step_seconds
from xgen.recipe.load import load_recipe
from xgen.recipe.schema import Recipe

SLICES = ["v4:2x2x2", "v4:4x4x4", "v5e:16x16", "2*v5e:16x16", "h100:64"]


def of(name: str) -> tuple[Recipe, Spec]:
    recipe = load_recipe(name).recipe
    return recipe, Spec(recipe.model, recipe.model.vocab_size, recipe.compute)


def brute(spec: Spec, on: Slice) -> set[Sizes]:
    """Every mesh of so many chips, by trying all."""
    found = set()
    for replica in range(1, on.chips + 1):
        for tensor in range(1, 33):
            for context in range(1, on.chips + 1):
                if on.chips % (replica * tensor * context):
                    continue
                fsdp = on.chips // (replica * tensor * context)
                even = spec.model.kv_heads % tensor == 0 and spec.model.hidden_size % (fsdp * context) == 0
                if even and replica % on.slices == 0:
                    found.add(Sizes(replica, fsdp, context, tensor))
    return found


@pytest.mark.parametrize("name", ["v4:2x2x2", "v4:4x4x4"])
def test_no_mesh_is_left_out(name: str) -> None:
    _, spec = of("xgen-7b-8k")
    on = parse_slice(name)
    assert set(meshes_of(on.chips, on.slices, spec)) == brute(spec, on)


@pytest.mark.parametrize("name", SLICES)
def test_every_choice_is_even_and_keeps_shards_within_a_slice(name: str) -> None:
    recipe, spec = of("xgen-7b-8k")
    on, stage = parse_slice(name), recipe.stages[2]
    found = list(choices(spec, stage, None, ALL, on.chips, on.slices))
    assert found
    for choice in {(one.sizes, one.microbatch_tokens): one for one in found}.values():
        assert choice.sizes.devices == on.chips
        assert choice.sizes.replica % on.slices == 0
        require_even(spec.model, choice.applied(stage), choice.sizes, "stages.2")
        assert stage.batch_tokens % choice.microbatch_tokens == 0


@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize("index", [0, 2])
def test_the_cheapest_is_that_of_all_that_fit(name: str, index: int) -> None:
    recipe, spec = of("xgen-7b-8k")
    on, stage = parse_slice(name), recipe.stages[index]
    (best,) = cheapest(spec, stage, recipe.optimizer, on, None, ALL)
    limit = MARGIN * on.chip.usable_memory
    fitting = [
        step_seconds(spec, stage, choice, on)
        for choice in choices(spec, stage, None, ALL, on.chips, on.slices)
        if arithmetic(spec, stage, recipe.optimizer, choice).total <= limit
    ]
    assert best.memory.total <= limit
    assert best.seconds <= NEAR * min(fitting)


def test_what_is_not_free_stays() -> None:
    recipe, spec = of("xgen-7b-8k")
    on, stage = parse_slice("v4:4x4x4"), recipe.stages[0]
    base = Choice(Sizes(1, 16, 1, 4), 16 * 2048, "block")
    assert [one.choice for one in cheapest(spec, stage, recipe.optimizer, on, base, Freedom())] == [base]
    for one in choices(spec, stage, base, Freedom(microbatch_tokens=True), on.chips, on.slices):
        assert (one.sizes, one.remat) == (base.sizes, base.remat)
    for one in choices(spec, stage, base, Freedom(mesh=True), on.chips, on.slices):
        assert (one.microbatch_tokens, one.remat) == (base.microbatch_tokens, base.remat)


def test_a_choice_as_good_as_the_recipes_own_does_not_replace_it() -> None:
    recipe, spec = of("xgen-7b-8k")
    on, stage = parse_slice("v4:8x8x8"), recipe.stages[2]
    written = Choice(Sizes(1, 512, 1, 1), stage.microbatch_tokens, "block")
    free = Freedom(mesh=True, microbatch_tokens=True)
    assert cheapest(spec, stage, recipe.optimizer, on, written, free)[0].choice == written
    assert overrides(2, written, stage, written.sizes) == []


def test_overrides_say_what_changed_and_load() -> None:
    recipe, _ = of("xgen-7b-8k")
    wanted = Choice(Sizes(2, 32, 1, 1), 64 * 2048, "dots")
    said = overrides(0, wanted, recipe.stages[0], Sizes(1, 64, 1, 1))
    stage = load_recipe("xgen-7b-8k", said).recipe.stages[0]
    assert stage == wanted.applied(recipe.stages[0])


@pytest.mark.parametrize("length", [2048, 4096, 8192])
def test_executed_flops_by_hand(length: int) -> None:
    _, spec = of("xgen-7b-8k")
    layers, width, inner = 32, 4096, 11008
    scores = 2 * layers * width * length / 2  # one product of queries and half the keys, as FLOPs a token
    products = 2 * layers * (4 * width * width + 3 * width * inner)
    model = flops_per_token(spec, length)
    # Forward in blocks of 512 keys; backward five products, one more than the model's, in four blocks of keys.
    forward, backward = 2 * scores * (1 + 512 / length), 5 * scores * 1.25
    none = model - 6 * scores + forward + backward
    assert math.isclose(executed_flops(spec, length, "none"), none)
    assert math.isclose(executed_flops(spec, length, "dots"), none + forward)
    block = none + forward + products - 2 * layers * width * inner
    assert math.isclose(executed_flops(spec, length, "block"), block)
    assert block / model < 1.34


def test_exchanges_tell() -> None:
    """More replicas do not move fewer weights; tensor parts cost time; hosts of GPUs are joined by a slower network."""
    recipe, spec = of("xgen-7b-8k")
    on, stage = parse_slice("h100:64"), recipe.stages[2]

    def seconds(sizes: Sizes, micro: int = 64 * 8192) -> float:
        return step_seconds(spec, stage, Choice(sizes, micro, "block"), on)

    assert seconds(Sizes(1, 64, 1, 1), 64 * 8192) > seconds(Sizes(1, 64, 1, 1), 128 * 8192)
    assert seconds(Sizes(8, 8, 1, 1), 512 * 8192) < seconds(Sizes(8, 1, 1, 8), 8 * 8192)
    assert math.isfinite(seconds(Sizes(1, 16, 4, 1), 16 * 8192))


def test_microbatches_divide_the_batch_and_deal_out_evenly() -> None:
    recipe, _ = of("xgen-7b-8k")
    stage = recipe.stages[2]
    assert microbatches(stage, 64) == [rows * 8192 for rows in (512, 256, 128, 64)]
    assert microbatches(stage, 3) == []
    assert microbatches(stage, 1024) == []
