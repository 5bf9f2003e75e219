"""The learning rate is a closed form of the tokens, and of nothing else."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xgen.recipe.load import load_recipe
from xgen.recipe.schema import Recipe, Stage
from xgen.training.schedule import learning_rate

PEAK, FINAL = 3e-4, 0.1


def stage(tokens: int, length: int = 64, sequences: int = 4, **changes: Any) -> Stage:
    batch = length * sequences
    given = {"batch_tokens": batch, "microbatch_tokens": batch, "mixture": {"a": 1.0}, **changes}
    return Stage(name=f"s{tokens}", length=length, tokens=tokens, **given)


def recipe_of(stages: list[Stage], warmup: int = 1000) -> Recipe:
    recipe = load_recipe("xgen-7b-8k").recipe
    rate = {"learning_rate": PEAK, "final_fraction": FINAL, "warmup": warmup}
    optimizer = recipe.optimizer.model_copy(update=rate)
    return recipe.model_copy(update={"stages": tuple(stages), "optimizer": optimizer})


def test_the_closed_form():
    recipe = recipe_of([stage(6144), stage(5120, 128)], warmup=1024)
    quarter = PEAK * (FINAL + (1 - FINAL) * (2 + math.sqrt(2)) / 4)
    wanted = {0: 0, 1: PEAK / 1024, 512: PEAK / 2, 1024: PEAK, 3584: quarter, 6144: 0.55 * PEAK, 11_264: PEAK * FINAL}
    for tokens, rate in wanted.items():
        assert learning_rate(recipe, tokens) == pytest.approx(rate, rel=1e-12), tokens


def test_xgen_7b():
    recipe = load_recipe("xgen-7b-8k").recipe
    peak, final = recipe.optimizer.learning_rate, recipe.optimizer.final_fraction
    assert learning_rate(recipe, recipe.optimizer.warmup) == peak
    assert learning_rate(recipe, 1_500_000_000_000) == pytest.approx(peak * final)
    assert learning_rate(recipe, recipe.total_tokens) == pytest.approx(peak * final)


TOKENS = st.integers(1, 30_000)


@settings(deadline=None)  # on a busy machine any example may take long
@given(TOKENS, TOKENS, st.integers(3, 9), st.integers(1, 7), st.integers(0, 60_000))
def test_length_batch_and_the_cut_into_stages_do_not_enter(first, second, power, sequences, tokens):
    """At equal tokens: one stage or two, any length, any batch, dividing the stage's tokens or not."""
    warmup = (first + second) // 10
    plain = recipe_of([stage(first + second, 8, 1)], warmup)
    changes = {"microbatch_tokens": 2**power, "remat": "block"}
    other = recipe_of([stage(first, 2**power, sequences, **changes), stage(second, 16, 3)], warmup)
    assert learning_rate(other, tokens) == learning_rate(plain, tokens)


@settings(deadline=None)
@given(st.integers(0, 5000), st.integers(5001, 50_000))
def test_it_rises_to_the_peak_then_falls_to_the_final_rate_and_stays(warmup, total):
    recipe = recipe_of([stage(total)], warmup)
    places = range(0, total + 2000, max(total // 50, 1))
    rates = [learning_rate(recipe, tokens) for tokens in places]
    for tokens, before, after in zip(places, rates, rates[1:], strict=False):
        if tokens + places.step <= warmup:
            assert after > before
        elif tokens >= warmup:
            assert after <= before
    assert max(rates) <= PEAK == learning_rate(recipe, warmup)
    assert rates[-1] == learning_rate(recipe, total) == pytest.approx(PEAK * FINAL)


def test_the_first_step_learns_and_the_last_has_the_final_rate():
    recipe = recipe_of([stage(10_000)], warmup=0)
    assert learning_rate(recipe, recipe.stages[0].batch_tokens) > 0
    assert learning_rate(recipe, recipe.total_tokens) == pytest.approx(PEAK * FINAL)
