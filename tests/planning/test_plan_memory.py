"""The arithmetic of memory: exact where it claims to be, and sums that can be followed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import pytest
from small_models import VARIANTS

from xgen.model import Spec, abstract
from xgen.model.weights import rows
from xgen.parallel.mesh import Sizes
from xgen.planning.choice import Choice
from xgen.planning.memory import KINDS, arithmetic, kept_of_layer, local, loss_bytes, optimizer_bytes, weight_bytes
from xgen.recipe.load import load_recipe
from xgen.recipe.schema import Model, Optimizer, Recipe

ONE = Sizes(1, 1, 1, 1)
GIB = 2**30


COMPILED = json.loads((Path(__file__).parent / "compiled_steps.json").read_text())["steps"]
"""What the TPU's compiler said of real steps: `python benchmarks/plan_memory.py --write` makes this file."""


def seven() -> tuple[Recipe, Spec]:
    recipe = load_recipe("xgen-7b-8k").recipe
    return recipe, Spec(recipe.model, recipe.model.vocab_size, recipe.compute)


def small(**kind: object) -> Spec:
    shape = {"layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 4, "head_size": 8, "mlp_size": 48}
    return Spec(Model(**{**shape, "vocab_size": 96, **kind}), 96)


@pytest.mark.parametrize("variant", VARIANTS)
def test_on_one_chip_the_weights_are_all_there(variant: str) -> None:
    spec = small(**VARIANTS[variant])
    assert weight_bytes(spec, ONE) == sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(spec)))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizer_state_is_that_of_the_real_optimizer(optimizer: str) -> None:
    from xgen.training.optimizer import build

    spec, wanted = small(), Optimizer(name=optimizer, learning_rate=1e-3, warmup=0)
    state = jax.eval_shape(build(wanted).init, abstract(spec))
    real = sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in jax.tree.leaves(state) if leaf.shape)
    assert 0 <= real - optimizer_bytes(spec, wanted, ONE) <= 64  # Muon keeps its three coefficients too


@pytest.mark.parametrize("sizes", [Sizes(1, 8, 1, 1), Sizes(2, 2, 2, 1), Sizes(1, 2, 1, 4), Sizes(1, 2, 2, 2)])
def test_parts_are_those_of_the_sharding_rules(sizes: Sizes) -> None:
    from jax.sharding import AbstractMesh, NamedSharding

    from xgen.parallel.mesh import NAMES
    from xgen.parallel.rules import partition

    mesh, spec = AbstractMesh((*sizes[:2], 1, *sizes[2:]), NAMES), small()
    real = sum(4 * math.prod(NamedSharding(mesh, partition(row)).shard_shape(row.shape(spec))) for row in rows(spec))
    assert weight_bytes(spec, sizes) == real


def test_the_seven_billion_on_64_chips() -> None:
    recipe, spec = seven()
    assert weight_bytes(spec, ONE) == 4 * 6_895_702_016
    sizes = Sizes(1, 64, 1, 1)
    assert weight_bytes(spec, sizes) == 4 * 6_895_702_016 // 64
    found = arithmetic(spec, recipe.stages[2], recipe.optimizer, Choice(sizes, 64 * 8192, "block"))
    assert found.by_kind["optimizer"] == 2 * found.by_kind["parameters"]
    assert found.by_kind["activations"] == 32 * 8192 * 4096 * 2  # a layer's input, 32 times: 2 GiB
    assert found.by_kind["gradients"] == 2 * found.by_kind["parameters"]  # summed over microbatches, and this one's
    assert set(found.by_kind) == set(KINDS)
    assert found.total == sum(found.by_kind.values())


def test_what_a_layer_keeps_rises_from_block_to_dots_to_none() -> None:
    _, spec = seven()
    at = local(spec, Choice(Sizes(1, 64, 1, 1), 64 * 2048, "none"))
    tokens = 2048
    assert kept_of_layer(at, "block") == tokens * 4096 * 2
    assert kept_of_layer(at, "dots") == tokens * 2 * (4096 + 4 * 4096 + 2 * 11008)  # input; q, k, v, out; gate, up
    assert kept_of_layer(at, "none") > kept_of_layer(at, "dots")


def test_the_loss_is_bounded_by_its_chunks() -> None:
    _, spec = seven()
    few = local(spec, Choice(Sizes(1, 64, 1, 1), 64 * 8192, "block"))
    many = local(spec, Choice(Sizes(1, 64, 1, 1), 64 * 8 * 8192, "block"))
    assert loss_bytes(many) - loss_bytes(few) == 3 * 7 * 8192 * 4096 * 2  # states, not logits
    assert loss_bytes(few) < 8192 * 51200 * 4  # all logits of one sequence would already be more


def test_tensor_parts_share_a_row_and_cut_what_is_wide() -> None:
    recipe, spec = seven()
    stage = recipe.stages[2]
    whole = arithmetic(spec, stage, recipe.optimizer, Choice(Sizes(1, 64, 1, 1), 64 * 8192, "dots"))
    parts = arithmetic(spec, stage, recipe.optimizer, Choice(Sizes(1, 16, 1, 4), 16 * 8192, "dots"))
    assert parts.by_kind["parameters"] == pytest.approx(whole.by_kind["parameters"], rel=1e-3)
    assert parts.by_kind["activations"] < whole.by_kind["activations"]
    ring = arithmetic(spec, stage, recipe.optimizer, Choice(Sizes(1, 16, 4, 1), 16 * 8192, "dots"))
    assert ring.by_kind["activations"] * 4 == whole.by_kind["activations"]


def test_one_microbatch_needs_no_sum_of_gradients() -> None:
    recipe, spec = seven()
    stage = recipe.stages[2]
    sizes = Sizes(1, 512, 1, 1)
    one = arithmetic(spec, stage, recipe.optimizer, Choice(sizes, stage.batch_tokens, "block"))
    assert one.by_kind["gradients"] == one.by_kind["parameters"]


def name_of(told: dict[str, Any]) -> str:
    return "-".join(str(told[key]) for key in ("recipe", "on", "stage", "sizes", "rows", "remat", "microbatches"))


@pytest.mark.parametrize("told", COMPILED, ids=name_of)
def test_it_is_within_a_tenth_of_the_compiler(told: dict[str, Any]) -> None:
    recipe, sizes = load_recipe(told["recipe"], told["overrides"]).recipe, Sizes(*told["sizes"])
    stage = recipe.stages[told["stage"]]
    choice = Choice(sizes, told["rows"] * sizes.replica * sizes.fsdp * stage.length, told["remat"])
    stage = stage.model_copy(update={"batch_tokens": told["microbatches"] * choice.microbatch_tokens})
    spec = Spec(recipe.model, recipe.model.vocab_size, recipe.compute)
    found = arithmetic(spec, stage, recipe.optimizer, choice)
    assert found.total == pytest.approx(told["bytes_per_chip"], rel=0.1), found


def test_enough_steps_were_compiled() -> None:
    assert len(COMPILED) >= 12
    assert {step["remat"] for step in COMPILED} == {"none", "dots", "block"}
    assert len({(step["recipe"], step["on"]) for step in COMPILED}) >= 8
