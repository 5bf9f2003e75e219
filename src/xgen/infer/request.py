"""What is asked of the engine, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

MOST_TOP_LOGPROBS = 20
MOST_STOPS = 16
MOST_BIASES = 300

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the defaults draw from the model's own distribution.

    Order: `logit_bias` is added; repetition penalty (of tokens of the prompt or output), then presence and frequency
    penalties (of the output alone); `temperature`, 0 taking the likeliest (the lowest id of equals); `top_k` (0: all),
    `top_p`, `min_p` (relative to the likeliest) cut the distribution; one token is drawn. `seed` and the place of the
    token decide the draw, whatever else is in the batch.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """One prompt, and how far to go on from it.

    `ids` is the whole prompt as the model sees it. Generation ends after an end token of the model (`ignore_eos`: not),
    after one of `stop_token_ids`, where one of `stop` appears in the text (which is then cut before it), or after
    `max_tokens`; not before `min_tokens`, until when the tokens that would end it are not drawn. `top_logprobs`: how
    many alternatives to report for each token (None: no log-probabilities at all). `score_prompt`: report the
    log-probability of each prompt token too; such a prompt is computed whole, by itself, whatever is cached.
    `adapter`: the name of the weights to use; "" for the model's own.
    """

    ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    top_logprobs: int | None = None
    score_prompt: bool = False
    adapter: str = ""


@dataclass(frozen=True)
class Token:
    """One token with its natural-log probability under the model itself, before temperature, penalties and cuts.

    `top` are the likeliest alternatives, (id, log-probability) from the likeliest on. For the first token of a prompt,
    which nothing precedes, `logprob` is None.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Prefilled:
    """`done` of `total` prompt tokens are in the cache, `cached` of them from an earlier request."""

    done: int
    total: int
    cached: int


@dataclass(frozen=True)
class PromptScores:
    """The prompt's tokens with their log-probabilities; before any output, when asked for."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Emitted:
    """Text that will not change any more, and the tokens accepted since the last time; either may be empty."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Finished:
    """The end. `stopped_by` is the stop string or stop token id that ended it, None for an end token of the model or
    otherwise."""

    reason: FinishReason
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    stopped_by: str | int | None = None


@dataclass(frozen=True)
class Failed:
    """The engine could not go on with this request; `error` says why."""

    error: Exception


Event = Prefilled | PromptScores | Emitted | Finished | Failed

Listener = Callable[[Event], None]
"""Called from the engine's thread, in order; must return at once. `Finished` or `Failed` comes last and once."""


@dataclass
class Job:
    """What `Engine.submit` gives: a request under way. `cancel()` frees its place within one step."""

    number: int
    request: Request
    cancel: Callable[[], None] = field(repr=False)
