"""The learning rate as a function of the token clock."""

from __future__ import annotations

import math

from xgen.recipe.schema import Recipe


def learning_rate(recipe: Recipe, tokens: int) -> float:
    """Rate at `tokens` of the run: linear from 0 to the peak over `optimizer.warmup` tokens, then half a cosine down
    to `final_fraction` of the peak at the run's last token.

    A step takes the rate at its end: the first one already learns, and the last one has the final rate. Length, batch
    and stage do not enter.
    """
    optimizer = recipe.optimizer
    if tokens < optimizer.warmup:
        return optimizer.learning_rate * tokens / optimizer.warmup
    # The stages' tokens as the recipe gives them: what a batch rounds them up to would let the batch enter.
    planned = sum(stage.tokens for stage in recipe.stages)
    done = (tokens - optimizer.warmup) / max(planned - optimizer.warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return optimizer.learning_rate * (optimizer.final_fraction + (1 - optimizer.final_fraction) * cosine)
