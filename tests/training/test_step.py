"""One optimizer step: what it changes, by how much, and what it says of it."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import plain_decoder as plain
import pytest
from small_models import batch_of, exact, relative_error, spec_of, weights_of

from xgen.model import as_dict
from xgen.recipe.schema import Optimizer, Stage
from xgen.training.optimizer import build
from xgen.training.state import State
from xgen.training.step import Tokens, compile_step, mean_loss_by_position, position_bins

DOCUMENTS = [[11, 21], [32, 0], [1, 31], [16, 16]]
RATE = np.float32(1e-2)


# Epsilon is larger than the rounding of a gradient, so that the update of a weight that has next to none is defined.
OPTIMIZER = Optimizer(learning_rate=1.0, warmup=0, epsilon=1e-3, clip=0.5, z_loss=1e-3, weight_decay=0.3)


def stage_of(microbatch: int, remat: str) -> Stage:
    return Stage(
        name="s",
        length=32,
        tokens=1280,
        batch_tokens=128,
        microbatch_tokens=microbatch,
        mixture={"a": 1.0},
        remat=remat,
    )


SPEC = spec_of("grouped_tied")


@cache
def compiled(microbatch: int, remat: str = "none"):
    transformation = build(OPTIMIZER)
    weights = weights_of(SPEC)
    return compile_step(
        SPEC, stage_of(microbatch, remat), OPTIMIZER, transformation, State(weights, transformation.init(weights))
    )


def fresh(weights=None) -> State:
    """A state of its own: a step consumes the one it is given."""
    own = jax.tree.map(lambda x: jnp.array(x, copy=True), weights_of(SPEC) if weights is None else weights)
    return State(own, build(OPTIMIZER).init(own))


def batches(count: int) -> list[Tokens]:
    return [Tokens(*batch_of(SPEC, DOCUMENTS, seed=seed)) for seed in range(count)]


def numbers(tree) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]


def change(after, before) -> np.ndarray:
    pairs = zip(numbers(after), numbers(before), strict=True)
    return np.concatenate([(one - other).ravel() for one, other in pairs])


def norm(tree) -> float:
    return float(np.sqrt(sum((x**2).sum() for x in numbers(tree))))


def test_microbatches_make_the_update_of_one_batch():
    """At a rate so large that the weights' own rounding does not show in their difference."""
    weights, rate = weights_of(SPEC), np.float32(10)
    (batch,) = batches(1)
    whole, said = compiled(128)(fresh(), batch, rate)
    parts, said_of_parts = compiled(32)(fresh(), batch, rate)
    assert relative_error(change(parts.weights, weights), change(whole.weights, weights)) < 1e-6
    for name in ("loss", "grad_norm", "update_norm", "param_norm", "bin_losses", "bin_tokens"):
        assert relative_error(getattr(said_of_parts, name), getattr(said, name)) < 1e-6, name


def test_rematerialisation_changes_no_update():
    weights, rate = weights_of(SPEC), np.float32(10)
    (batch,) = batches(1)
    plainly, remade = (compiled(32, how)(fresh(), batch, rate)[0] for how in ("none", "block"))
    assert relative_error(change(remade.weights, weights), change(plainly.weights, weights)) < 1e-6


def test_three_steps_are_those_of_float64():
    """Gradient by a plain float64 decoder, clipping and AdamW by numpy: the weights' whole change to 1e-5."""
    state, weights = fresh(), {name: np.asarray(x, np.float64) for name, x in as_dict(weights_of(SPEC)).items()}
    first, second = ({name: np.zeros_like(x) for name, x in weights.items()} for _ in range(2))
    one, two = OPTIMIZER.betas
    for number, batch in enumerate(batches(3), 1):
        state, said = compiled(32)(state, batch, RATE)
        loss, gradient = exact_gradient_of(weights, batch)
        length = norm(gradient)
        assert length > 1.2 * OPTIMIZER.clip, "clipping has something to do"
        assert relative_error(said.grad_norm, length) < 1e-5
        assert relative_error(said.loss, loss) < 1e-5
        for name, slope in gradient.items():
            slope = slope * min(1, OPTIMIZER.clip / length)
            first[name] = one * first[name] + (1 - one) * slope
            second[name] = two * second[name] + (1 - two) * slope**2
            scaled = np.sqrt(second[name] / (1 - two**number)) + OPTIMIZER.epsilon
            decay = 0 if "norm" in name else OPTIMIZER.weight_decay * weights[name]
            weights[name] = weights[name] - float(RATE) * (first[name] / (1 - one**number) / scaled + decay)
    for name, start in as_dict(weights_of(SPEC)).items():
        start = np.asarray(start, np.float64)
        moved = np.asarray(as_dict(state.weights)[name], np.float64) - start
        assert relative_error(moved, weights[name] - start) < 1e-5, name


@cache
def _gradient_function():
    def total(named, batch):
        nll, lse = plain.token_nll(
            plain.logits(named, SPEC.model, batch[0], batch[2], batch[3]), batch[1], SPEC.real_vocab
        )
        return (nll + OPTIMIZER.z_loss * lse**2).mean(), nll.mean()

    return jax.value_and_grad(total, has_aux=True)


def exact_gradient_of(weights, batch):
    """Mean nll, and the gradient of the objective with its z-loss."""
    (_, loss), gradient = exact(_gradient_function(), weights, tuple(batch))
    return loss, gradient


def test_the_norms_it_reports_are_those_of_what_it_did():
    weights = weights_of(SPEC)
    (batch,) = batches(1)
    after, said = compiled(32)(fresh(), batch, RATE)
    moved = change(after.weights, weights)
    assert relative_error(said.update_norm, np.linalg.norm(moved)) < 1e-5
    assert relative_error(said.param_norm, norm(after.weights)) < 1e-6
    assert said.finite


def test_a_rate_of_zero_changes_no_weight():
    (batch,) = batches(1)
    after, said = compiled(32)(fresh(), batch, np.float32(0))
    assert not change(after.weights, weights_of(SPEC)).any()
    assert said.update_norm == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_a_step_that_is_not_finite_changes_nothing_and_says_so(bad):
    first, second = batches(2)
    state = compiled(32)(fresh(), first, RATE)[0]
    poisoned = dataclasses.replace(
        state.weights, final_norm=state.weights.final_norm.at[3].set(bad), embedding=state.weights.embedding * 2
    )
    state = State(poisoned, state.optimizer)
    before = [np.array(x) for x in jax.tree.leaves(state)]
    after, said = compiled(32)(state, second, RATE)
    assert not said.finite
    for one, other in zip(jax.tree.leaves(after), before, strict=True):
        assert np.asarray(one).tobytes() == other.tobytes()


def test_a_finite_gradient_whose_update_is_not_finite_changes_nothing_either():
    (batch,) = batches(1)
    after, said = compiled(32)(fresh(), batch, np.float32(3e38))
    assert np.isfinite(said.grad_norm)
    assert not said.finite
    assert not change(after.weights, weights_of(SPEC)).any()


def test_losses_by_position_are_those_of_each_token():
    (batch,) = batches(1)
    said = compiled(32)(fresh(), batch, np.float32(0))[1]
    scores = exact(lambda w, b: plain.logits(w, SPEC.model, b[0], b[2], b[3]), as_dict(weights_of(SPEC)), tuple(batch))[
        ..., : SPEC.real_vocab
    ]
    targets, positions = np.asarray(batch.targets), np.asarray(batch.positions)
    each = np.log(np.exp(scores).sum(-1)) - np.take_along_axis(scores, targets[..., None], -1)[..., 0]
    assert relative_error(said.loss, each.mean()) < 1e-6
    found = mean_loss_by_position(np.asarray(said.bin_losses), np.asarray(said.bin_tokens))
    # A target at position p of its document is predicted from p + 1 tokens, the bins being [1, 2), [2, 4), [4, 8) ...
    seen, edges = positions + 1, (1, 2, 4, 8, 16)
    assert position_bins(32) == len(edges)
    assert found.keys() == {str(edge) for edge in edges}
    for edge in edges:
        inside = (seen >= edge) & ((seen < 2 * edge) | (edge == 16))
        assert found[str(edge)] == pytest.approx(each[inside].mean(), rel=1e-5), edge
    assert sum(np.asarray(said.bin_tokens)) == 128


@pytest.mark.parametrize(("length", "bins"), [(8, 3), (9, 4), (64, 6), (100, 7), (8192, 13)])
def test_the_last_bin_ends_at_the_length(length, bins):
    assert position_bins(length) == bins
