"""What the compiled functions need to know of a run: hashable, so that it can be a static argument."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from xgen.errors import RecipeError
from xgen.model.split import ONE, Split
from xgen.recipe.schema import Compute, Model, Recipe

_DEFAULT = Compute()


@dataclass(frozen=True)
class Spec:
    """A decoder's shape, how it is computed, how many rows of the vocabulary are real tokens, and over which axes of a
    mesh the program around it spreads the work."""

    model: Model
    real_vocab: int
    compute: Compute = _DEFAULT
    split: Split = ONE

    def __post_init__(self) -> None:
        if not 0 < self.real_vocab <= self.model.vocab_size:
            raise RecipeError(
                f"model.vocab_size: {self.model.vocab_size} rows cannot hold the tokenizer's {self.real_vocab} ids; "
                f"leave model.vocab_size out, or give at least {self.real_vocab}"
            )

    @classmethod
    def of(cls, recipe: Recipe, real_vocab: int) -> Spec:
        """The spec of a recipe whose tokenizer has `real_vocab` ids."""
        return cls(recipe.model, real_vocab, recipe.compute)

    @property
    def dtype(self) -> jnp.dtype:
        """Type of activations and of the weights' copies that enter products."""
        return jnp.dtype(self.compute.precision)
