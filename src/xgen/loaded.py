"""A trained model, ready to be asked: what `xgen.load` gives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from xgen.errors import CheckpointError, DataError
from xgen.model import Spec, Weights, logits, nll, parameter_count
from xgen.recipe.load import load_recipe
from xgen.tokens.tokenizer import Tokenizer, load_tokenizer
from xgen.training.checkpoints import choose, read_weights


@dataclass(frozen=True)
class LoadedModel:
    """Weights with their tokenizer. Each row of ids is one document and is seen from its beginning; put
    `tokenizer.end_of_text` first, as training does."""

    tokenizer: Tokenizer
    spec: Spec
    weights: Weights

    @property
    def parameters(self) -> int:
        return parameter_count(self.spec)

    def logits(self, ids: Int[np.ndarray, "B S"]) -> Float[np.ndarray, "B S V"]:
        """Float32 logits of the token after each; rows past the tokenizer's ids are -1e30."""
        return np.asarray(_logits(self.weights, self.spec, self._checked(ids)))

    def loss(self, ids: Int[np.ndarray, "B S"]) -> Float[np.ndarray, "B S-1"]:
        """Negative log-likelihood, in nats, of each id but the first; no full logits are held."""
        checked = self._checked(ids)
        if checked.shape[1] < 2:
            raise DataError(f"loss needs at least two ids a row, got {checked.shape[1]}")
        return np.asarray(_loss(self.weights, self.spec, checked))

    def _checked(self, ids: Int[np.ndarray, "B S"]) -> jax.Array:
        try:
            array = np.asarray(ids)
        except ValueError as cause:
            raise DataError("the rows of ids have different lengths; score them one by one") from cause
        if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
            raise DataError(f"ids must be whole numbers of shape [batch, length], got {array.dtype} {array.shape}")
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < self.spec.real_vocab:
            raise DataError(
                f"ids run from {array.min()} to {array.max()}; the tokenizer has 0 to {self.spec.real_vocab - 1}"
            )
        return jnp.asarray(array, jnp.int32)


def load(model: str | Path) -> LoadedModel:
    """The model `model` names: a run folder (its newest checkpoint), or DIR@TOKENS or DIR@STAGE.

    Raises CheckpointError when there is no such checkpoint or it is damaged.
    """
    folder = Path(str(model).partition("@")[0])
    if not (folder / "recipe.toml").is_file():
        raise CheckpointError(
            f"{folder} is no run folder (no recipe.toml); name one, or one of its checkpoints as DIR@STAGE"
        )
    recipe = load_recipe(folder).recipe
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"), recipe.tokenizer.end_of_text)
    spec = Spec.of(recipe, tokenizer.size)
    return LoadedModel(tokenizer, spec, read_weights(choose(str(model))[-1], spec))


@partial(jax.jit, static_argnums=1)
def _logits(weights: Weights, spec: Spec, ids: jax.Array) -> jax.Array:
    return logits(weights, spec, ids, jnp.zeros_like(ids), _positions(ids))


@partial(jax.jit, static_argnums=1)
def _loss(weights: Weights, spec: Spec, ids: jax.Array) -> jax.Array:
    inputs = ids[:, :-1]
    return nll(weights, spec, inputs, ids[:, 1:], jnp.zeros_like(inputs), _positions(inputs))


def _positions(ids: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
