"""The step learns what there is to learn, and nothing that there is not."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import spec_of

from xgen.model import initialise
from xgen.recipe.schema import Optimizer, Stage
from xgen.training.optimizer import build
from xgen.training.state import State
from xgen.training.step import Tokens, compile_step

LENGTH, ROWS, VOCABULARY = 32, 8, 64


def trainer(name: str, rate: float, precision: str):
    """A one-layer decoder and its step: (state, ids [ROWS, LENGTH + 1]) -> (state, loss)."""
    spec = spec_of(layers=1, hidden_size=64, mlp_size=128, head_size=16, vocab_size=VOCABULARY, precision=precision)
    optimizer = Optimizer(name=name, learning_rate=rate, warmup=0, weight_decay=0.0)
    batch = LENGTH * ROWS
    stage = Stage(
        name="s", length=LENGTH, tokens=batch, batch_tokens=batch, microbatch_tokens=batch, mixture={"a": 1.0}
    )
    transformation = build(optimizer)
    weights = initialise(spec, 0)
    state = State(weights, transformation.init(weights))
    compiled = compile_step(spec, stage, optimizer, transformation, state)
    places = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (ROWS, LENGTH))

    def step(state, ids, rate):
        batch = Tokens(jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:]), jnp.zeros_like(places), places)
        state, said = compiled(state, batch, np.float32(rate))
        return state, float(said.loss)

    return state, step


@pytest.mark.parametrize(("name", "precision"), [("adamw", "bfloat16"), ("muon", "float32")])
def test_a_tiny_corpus_is_learnt_by_heart(name, precision):
    """Eight random rows that begin with their own token: each next token follows from what stands before it."""
    state, step = trainer(name, 1e-2, precision)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH + 1), np.int32)
    ids[:, 0] = np.arange(ROWS)
    losses = []
    for number in range(300):
        state, loss = step(state, ids, 1e-2 * (1 - number / 300))
        losses.append(loss)
    assert losses[0] > 0.9 * np.log(VOCABULARY)
    assert losses[-1] < 0.05


def test_a_random_corpus_ends_at_its_entropy_and_never_below():
    """Fresh uniform tokens every step: the loss before each update is that of text never seen, whose expectation is
    at least log V. A step's mean over 256 tokens may lie below by its own scatter only: its deviation shrinks with
    the excess, for a model that bets little gains little by luck."""
    state, step = trainer("adamw", 3e-3, "bfloat16")
    random, entropy, losses = np.random.default_rng(1), np.log(VOCABULARY), []
    for number in range(400):
        ids = random.integers(0, VOCABULARY, (ROWS, LENGTH + 1), np.int32)
        state, loss = step(state, ids, 3e-3 * (1 - number / 400))
        losses.append(loss)
    assert losses[0] > 1.02 * entropy
    assert np.mean(losses[-50:]) < 1.02 * entropy
    assert np.mean(losses[-50:]) > (1 - 1e-3) * entropy
    for start in range(0, 400, 50):
        assert np.mean(losses[start : start + 50]) > entropy - 3 * scatter(losses[start : start + 50])


def scatter(losses) -> float:
    """The deviation of the mean of `losses`, from the differences of neighbours: a trend does not enter."""
    return float(np.std(np.diff(losses)) / np.sqrt(2) / np.sqrt(len(losses)))
