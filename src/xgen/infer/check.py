"""What can be asked of a model at all; found out before a request waits for its turn."""

from __future__ import annotations

import math
from collections.abc import Sequence

from xgen.convert.description import Description
from xgen.errors import DataError, XgenError
from xgen.infer.request import MOST_BIASES, MOST_STOPS, MOST_TOP_LOGPROBS, Request, Sampling
from xgen.infer.sampling import MOST_BANNED

LEAST_REPETITION = 0.01
"""Of repetition_penalty. The logits are divided by it, and have to stay numbers."""

LARGEST_CHANGE = 1e6
"""Of penalties and biases: far more than decides any draw, and float32 holds its products with counts and logits."""


class BadRequest(DataError):  # noqa: N818 - it says what is the matter
    """A request that no engine could answer. `parameter` is the field of Request or Sampling that is wrong."""

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class TooLong(XgenError):  # noqa: N818 - it says what is the matter
    """Prompt and output would exceed the window, all three of them counted in tokens."""

    def __init__(self, prompt_tokens: int, max_tokens: int, context_length: int) -> None:
        room = context_length - prompt_tokens
        remedy = f"ask for at most {room} tokens" if room > 0 else "shorten the prompt"
        super().__init__(
            f"the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, together "
            f"{prompt_tokens + max_tokens}, but the context holds {context_length}; {remedy}"
        )
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.context_length = context_length


def check(request: Request, description: Description, window: int, adapters: Sequence[str]) -> None:
    """Raises BadRequest for values that mean nothing, and TooLong where `window` tokens are not enough."""
    _check_ids("ids", request.ids, description.real_vocab)
    _check_ids("stop_token_ids", request.stop_token_ids, description.real_vocab)
    if not request.ids:
        raise BadRequest("ids", "the prompt is empty; give at least one token, such as the one that begins a text")
    if request.adapter not in adapters:
        named = ", ".join(repr(name) for name in adapters)
        raise BadRequest("adapter", f"there are no weights named {request.adapter!r}; choose one of {named}")
    for name in ("max_tokens", "min_tokens"):
        if getattr(request, name) < 0:
            raise BadRequest(name, f"{name} is {getattr(request, name)}; give 0 or more")
    if request.min_tokens > request.max_tokens:
        counts = f"min_tokens is {request.min_tokens} and max_tokens {request.max_tokens}"
        raise BadRequest("min_tokens", f"{counts}; give at most {request.max_tokens} min_tokens")
    if not 0 <= (request.top_logprobs or 0) <= MOST_TOP_LOGPROBS:
        raise BadRequest("top_logprobs", f"top_logprobs is {request.top_logprobs}; give 0 to {MOST_TOP_LOGPROBS}")
    held_back = {*(() if request.ignore_eos else description.end_ids), *request.stop_token_ids}
    if request.min_tokens and len(held_back) > MOST_BANNED:
        counts = f"{len(held_back)} tokens would end the text, and are to be held back for min_tokens"
        raise BadRequest("stop_token_ids", f"{counts}; at most {MOST_BANNED} can be")
    _check_stops(request.stop, description)
    _check_sampling(request.sampling, description.real_vocab)
    if len(request.ids) + request.max_tokens > window:
        raise TooLong(len(request.ids), request.max_tokens, window)


def _check_ids(parameter: str, ids: Sequence[int], real_vocab: int) -> None:
    for index in ids:
        if not 0 <= index < real_vocab:
            raise BadRequest(parameter, f"{parameter} has {index}, which is no token; ids are 0 to {real_vocab - 1}")


def _check_stops(stops: Sequence[str], description: Description) -> None:
    if stops and description.tokenizer is None:
        raise BadRequest("stop", f"model {description.name} has no tokenizer to find stop strings with; use token ids")
    if len(stops) > MOST_STOPS:
        raise BadRequest("stop", f"there are {len(stops)} stop strings; give at most {MOST_STOPS}")
    if "" in stops:
        raise BadRequest("stop", "a stop string is empty, which every text contains; leave it out")


def _check_sampling(sampling: Sampling, real_vocab: int) -> None:
    ranges = {
        "temperature": (0.0, math.inf),
        "top_p": (0.0, 1.0),
        "top_k": (0.0, math.inf),
        "min_p": (0.0, 1.0),
        "presence_penalty": (-LARGEST_CHANGE, LARGEST_CHANGE),
        "frequency_penalty": (-LARGEST_CHANGE, LARGEST_CHANGE),
        "repetition_penalty": (LEAST_REPETITION, LARGEST_CHANGE),
    }
    for name, (least, most) in ranges.items():
        value = getattr(sampling, name)
        if not (math.isfinite(value) and least <= value <= most) or (name == "top_p" and value == 0):
            above = "more than 0" if name == "top_p" else f"at least {least:g}"
            below = "" if most == math.inf else f" and at most {most:g}"
            raise BadRequest(name, f"{name} is {value}; give {above}{below}")
    if len(sampling.logit_bias) > MOST_BIASES:
        raise BadRequest("logit_bias", f"logit_bias has {len(sampling.logit_bias)} tokens; give at most {MOST_BIASES}")
    _check_ids("logit_bias", [index for index, _ in sampling.logit_bias], real_vocab)
    for index, bias in sampling.logit_bias:
        if not abs(bias) <= LARGEST_CHANGE:
            remedy = f"give at least {-LARGEST_CHANGE:g} and at most {LARGEST_CHANGE:g}"
            raise BadRequest("logit_bias", f"logit_bias of token {index} is {bias}; {remedy}")
