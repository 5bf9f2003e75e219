"""The bodies of requests. What is not said here is refused, and the OpenAPI document is made from it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

from xgen.infer.request import MOST_BIASES, MOST_STOPS, MOST_TOP_LOGPROBS

MOST_CHOICES = 128
"""Answers that one request may ask for: prompts times n."""

LONGEST_STOP = 1000
"""Characters of a stop string; a stream holds back as many."""

Id = Annotated[int, Field(ge=0, lt=1 << 31)]
# A list may be long, and each wrong item would take the memory of an error.
Ids = Annotated[list[Id], Field(fail_fast=True)]
IdLists = Annotated[list[Ids], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


def _only(nothing: Any) -> BeforeValidator:
    """Of a field that clients send as `nothing` where they have nothing for it; anything else is refused as unknown."""

    def check(value: Any, info: ValidationInfo) -> None:
        given = value is not None and (type(value) is not type(nothing) or value != nothing)
        if given and not (info.context and info.context["lenient"]):
            raise PydanticKnownError("extra_forbidden")

    return BeforeValidator(check)


Tools = Annotated[Annotated[list[Any], Field(max_length=0)] | None, _only([])]
Obfuscation = Annotated[Literal[False] | None, _only(False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Truncation(_Strict):
    """Shorten what is too long instead of refusing it."""

    rule: Literal["head", "tail", "middle"] = Field(description="The part that is left out.")


class StreamOptions(_Strict):
    include_usage: bool | None = Field(None, description="Send the token counts as a last chunk without choices.")
    include_obfuscation: Obfuscation = Field(None, description="Chunks are never padded, so it cannot be true.")


class _Generation(_Strict):
    """What both kinds of generation take."""

    model: str | None = Field(None, description="A name of /v1/models; left out, the model itself.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token. Default 1.")
    top_p: float | None = Field(None, gt=0, le=1, description="Default 1.")
    top_k: int | None = Field(None, ge=0, lt=1 << 31, description="0, the default: all tokens.")
    min_p: float | None = Field(None, ge=0, le=1, description="Relative to the likeliest token. Default 0.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, description="Default 1: none.")
    seed: int | None = Field(
        None, ge=-(1 << 63), lt=1 << 63, description="The same seed gives the same answer; left out, a random one."
    )
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description="Answers to each prompt. Default 1.")
    stop: (
        Annotated[str, Field(max_length=LONGEST_STOP)] | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None
    ) = Field(None, description="An empty text is none.")
    stop_token_ids: Annotated[list[Id], Field(max_length=MOST_STOPS)] | None = None
    min_tokens: int | None = Field(None, ge=0, lt=1 << 31)
    ignore_eos: bool | None = Field(None, description="Go on after the model's end tokens.")
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=MOST_BIASES, description="By token id."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_progress: bool | None = Field(None, description="In a stream, tell how much of the prompt has been read.")
    user: str | None = Field(None, description="Taken for compatibility; neither used nor logged.")
    truncation: Truncation | None = None


class CompletionBody(_Generation):
    """POST /v1/completions"""

    prompt: str | Texts | Ids | IdLists = Field(description="Text or token ids, one prompt or several.")
    max_tokens: int | None = Field(None, ge=0, lt=1 << 31, description="Default 16, or what the window still holds.")
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS, description="Alternatives to report a token.")
    echo: bool | None = Field(None, description="Put the prompt before the answer, log-probabilities too.")
    best_of: int | None = Field(None, ge=1, description="Must equal n: every answer is returned.")


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class MessageBody(_Strict):
    role: Literal["system", "developer", "user", "assistant"] = Field(description='"developer" counts as "system".')
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] | None = Field(
        description="Null counts as an empty text; only an assistant's may be."
    )
    type: Literal["text"] | None = None
    refusal: None = Field(None, description="Null, as in an answer that is handed back; so are those that follow.")
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @field_validator("content")
    @classmethod
    def _said(cls, content: Any, info: ValidationInfo) -> Any:
        if content is None and info.data.get("role", "assistant") != "assistant":
            raise PydanticCustomError("null_content", "Only an assistant's content may be null")
        return content

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())


Messages = Annotated[list[MessageBody], Field(min_length=1, fail_fast=True)]


class TextFormat(_Strict):
    type: Literal["text"]


class ChatBody(_Generation):
    """POST /v1/chat/completions"""

    messages: Messages
    max_completion_tokens: int | None = Field(
        None, ge=0, lt=1 << 31, description="Default: what the window still holds."
    )
    max_tokens: int | None = Field(None, ge=0, lt=1 << 31, description="The older name of max_completion_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    response_format: TextFormat | None = None
    tools: Tools = Field(None, description="None can be called, so the list must be empty.")


class TokenizeBody(_Strict):
    """POST /tokenize: one of `content` and `messages`."""

    content: str | None = None
    add_special: bool = Field(False, description="Put before `content` what a prompt of the model begins with.")
    messages: Messages | None = None


class DetokenizeBody(_Strict):
    """POST /detokenize"""

    tokens: Ids


class TemplateBody(_Strict):
    """POST /apply-template"""

    messages: Messages
