"""A trained model, ready to be asked: what `xgen.load` gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from xgen.convert.description import Description
from xgen.convert.open import open_model
from xgen.convert.pieces import assemble
from xgen.errors import DataError
from xgen.infer.engine import Completion, Engine
from xgen.infer.program import Settings, build
from xgen.infer.request import Request, Sampling
from xgen.model import Spec, Weights, logits, nll, parameter_count
from xgen.recipe.schema import Compute
from xgen.tokens.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0.0)


class Likelihood(NamedTuple):
    """Of a continuation: its log-probability in nats, its tokens, and whether each was the likeliest."""

    logprob: float
    tokens: int
    greedy: bool


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

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        sampling: Sampling = GREEDY,
    ) -> list[Completion]:
        """What follows each prompt, up to an end token, one of `stop` or `max_tokens`; all are computed together.

        A prompt is ids as they are, or a text, before which goes the token that begins the model's texts, if any. Of a
        text what looks like a control token is text. The likeliest tokens when nothing is said; row i of others draws
        with seed `sampling.seed` + i. Raises DataError for a prompt that cannot be and XgenError for one that is too
        long: nothing is cut off.
        """
        rows = [self._prompt(prompt) for prompt in prompts]
        seeded = [replace(sampling, seed=sampling.seed + at) for at in range(len(rows))]
        requests = [Request(row, max_tokens, one, stop=tuple(stop)) for row, one in zip(rows, seeded, strict=True)]
        return self._engine.generate(requests)

    def loglikelihood(self, context: str, continuation: str) -> Likelihood:
        """The log-probability, in nats, of `continuation` after `context`.

        The two are encoded as one text, since a token may span where they meet: counted is all from the first token
        that `context` alone would not begin with. Where nothing goes before, the end of a text does. Raises DataError
        for an empty continuation.
        """
        begin = self._begin() or (self.tokenizer.end_of_text,)
        whole, alone = (self.tokenizer.encode(text) for text in (context + continuation, context))
        same = next(
            (at for at, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), min(len(whole), len(alone))
        )
        if same == len(whole):
            raise DataError(f"the continuation {continuation!r} adds no token to its context; give a text that does")
        before = self._begin() if same else begin
        ids = (*before, *whole)
        [answer] = self._engine.generate([Request(ids, 0, score_prompt=True, top_logprobs=1)])
        scored = (answer.prompt_scores or ())[len(before) + same :]
        greedy = all(token.id == token.top[0][0] for token in scored)
        return Likelihood(sum(token.logprob or 0.0 for token in scored), len(scored), greedy)

    @cached_property
    def _engine(self) -> Engine:
        """Holds the weights once more, layer by layer."""
        settings = Settings(window=self.description.context_length)
        engine = Engine(build(self.spec, {"": self.weights}, settings), self.description)
        engine.start()
        return engine

    def _begin(self) -> tuple[int, ...]:
        return () if self.description.begin_id is None else (self.description.begin_id,)

    def _prompt(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return tuple(prompt)
        return (*self._begin(), *self.tokenizer.encode(prompt)) or (self.tokenizer.end_of_text,)

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
