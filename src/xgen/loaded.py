"""A trained model, ready to be asked: what `xgen.load` gives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from xgen.convert.description import Description
from xgen.convert.open import open_model
from xgen.convert.pieces import assemble
from xgen.errors import DataError
from xgen.model import Spec, Weights, logits, nll, parameter_count
from xgen.recipe.schema import Compute
from xgen.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """Weights with their description. Each row of ids is one document and is seen from its beginning; put
    `tokenizer.end_of_text` first for a model trained here, `description.begin_id` for one that has it."""

    description: Description
    spec: Spec
    weights: Weights

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises DataError when the model came without one."""
        if self.description.tokenizer is None:
            raise DataError(
                f"model {self.description.name} has no tokenizer; put its tokenizer.json into its folder and load again"
            )
        return self.description.tokenizer

    @property
    def parameters(self) -> int:
        return parameter_count(self.spec)

    def logits(self, ids: Int[np.ndarray, "B S"]) -> Float[np.ndarray, "B S V"]:
        """Float32 logits of the token after each; rows of the vocabulary that are no tokens are -1e30."""
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
                f"ids run from {array.min()} to {array.max()}; the model's tokens are 0 to {self.spec.real_vocab - 1}"
            )
        return jnp.asarray(array, jnp.int32)


def load(model: str | Path, precision: Literal["float32", "bfloat16"] = "float32") -> LoadedModel:
    """The model `model` names: a run folder (its newest checkpoint), DIR@TOKENS or DIR@STAGE, a converted folder, a
    Hugging Face folder or a GGUF file. `precision` is the type of activations and of the weights in products.

    Raises CheckpointError when there is no such model, it is damaged, or it is of another architecture.
    """
    description, source = open_model(model)
    spec = replace(description.spec, compute=Compute(precision=precision))
    return LoadedModel(description, spec, assemble(source))


@partial(jax.jit, static_argnums=1)
def _logits(weights: Weights, spec: Spec, ids: jax.Array) -> jax.Array:
    return logits(weights, spec, ids, jnp.zeros_like(ids), _positions(ids))


@partial(jax.jit, static_argnums=1)
def _loss(weights: Weights, spec: Spec, ids: jax.Array) -> jax.Array:
    inputs = ids[:, :-1]
    return nll(weights, spec, inputs, ids[:, 1:], jnp.zeros_like(inputs), _positions(inputs))


def _positions(ids: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
