"""Our side: the step that the trainer compiles, on one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from protocol import Work, measure

from xgen.model import parameter_count
from xgen.parallel.program import ONE_DEVICE
from xgen.recipe.schema import Recipe
from xgen.training.optimizer import build
from xgen.training.state import abstract_state, new_state, new_weights
from xgen.training.step import Tokens, compile_step
from xgen.training.timing import Case


def main() -> None:
    work = Work.given()
    recipe = Recipe.model_validate_json(work.recipe)
    (stage,), spec, transformation = recipe.stages, Case("", recipe, work.steps).spec, build(recipe.optimizer)
    abstract = abstract_state(spec, transformation, ONE_DEVICE)
    compiled = compile_step(spec, stage, recipe.optimizer, transformation, abstract)
    state = new_state(new_weights(spec, 0, ONE_DEVICE), spec, transformation, ONE_DEVICE)
    ids, rate = work.tokens(), np.float32(work.rate)
    places = np.broadcast_to(np.arange(work.length, dtype=np.int32), (work.batch, work.length))
    batch = Tokens(*map(jnp.asarray, (ids[:, :-1], ids[:, 1:], np.zeros_like(places), places)))

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, batch, rate)
        jax.block_until_ready((state, metrics))
        return float(metrics.loss)

    measure(work, parameter_count(spec), step)


if __name__ == "__main__":
    main()
