"""The bodies of answers, for the OpenAPI document; the answers themselves are made in `answer.py`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Told(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorObject(_Told):
    message: str
    type: str
    param: str | None
    code: str | None
    prompt_tokens: int = 0
    max_tokens: int = 0
    context_length: int = 0


class Error(_Told):
    error: ErrorObject


class CachedTokens(_Told):
    cached_tokens: int


class Usage(_Told):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class DroppedTokens(_Told):
    original_tokens: int
    used_tokens: int
    dropped_tokens: int


class TruncationDone(_Told):
    """What was left out of each prompt."""

    rule: Literal["head", "tail", "middle"]
    prompts: list[DroppedTokens]


class LogprobLists(_Told):
    """A place for each token; a prompt's first token has null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Told):
    index: int
    text: str
    logprobs: LogprobLists | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None


class Completion(_Told):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    truncation: TruncationDone | None = None


class TokenLogprob(_Told):
    token: str
    logprob: float
    bytes: list[int]


class TopTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(_Told):
    content: list[TopTokenLogprob]
    refusal: None


class Reply(_Told):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Told):
    index: int
    message: Reply
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None


class ChatCompletion(_Told):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    truncation: TruncationDone | None = None


class ModelEntry(_Told):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    parent: str = ""


class ModelList(_Told):
    object: Literal["list"]
    data: list[ModelEntry]


class Tokenized(_Told):
    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(_Told):
    content: str


class Templated(_Told):
    prompt: str
    tokens: list[int]
    count: int


class Health(_Told):
    status: Literal["ok", "loading", "draining", "broken"]


class Memory(_Told):
    """What a decode step reads: bytes of weights, and of keys and values for each token that a row has."""

    device: str
    weight_bytes: int
    token_bytes: int


class Props(_Told):
    model: str
    context_length: int
    chat: bool
    parameters: int
    slots: int
    defaults: dict[str, Any]
    memory: Memory | None = None
