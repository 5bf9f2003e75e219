"""The learning rate as a function of the token clock."""

from __future__ import annotations

import math

from xgen.recipe.schema import Recipe


def learning_rate(recipe: Recipe, tokens: int) -> float:
    """Rate of the step that starts after `tokens` tokens: linear warm-up to the peak over `optimizer.warmup`
    tokens, then half a cosine down to `final_fraction` of it at the run's last token.

    The warm-up is counted to the step's end, so that the first step already learns.
    """
    optimizer = recipe.optimizer
    batch = recipe.stages[recipe.stage_at(tokens)].batch_tokens
    if tokens + batch <= optimizer.warmup:
        return optimizer.learning_rate * (tokens + batch) / optimizer.warmup
    done = (tokens - optimizer.warmup) / max(recipe.total_tokens - optimizer.warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))
    floor = optimizer.final_fraction
    return optimizer.learning_rate * (floor + (1 - floor) * cosine)
