"""Errors of a single request, in the shape that OpenAI's clients expect. This module loads without Starlette."""

from __future__ import annotations

from typing import Any

from xgen.errors import DataError, XgenError
from xgen.infer.check import BadRequest, TooLong
from xgen.infer.engine import Broken, Draining, Overloaded

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""What OpenAI calls an error of a status; the others below 500 are the asker's, those from 500 on the server's."""

PARAMETERS = {"adapter": "model", "top_logprobs": "logprobs"}
"""Fields of the engine's request that a body calls otherwise."""

RETRY_SECONDS = 1
"""After which an overloaded server may be asked again: a slot becomes free every few seconds at most."""

OR_SHORTEN = ', or ask for "truncation"'
"""The remedy of a prompt too long that only a body over HTTP has."""


class RequestError(XgenError):
    """A request that is refused.

    `param` is the field at fault, dotted (messages.0.content); `code` a word for programs; `retry_after` seconds after
    which it may go through; `remedy` ends the message in an answer over HTTP, where a body may have such a field;
    `numbers` stand beside the message in the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        remedy: str = "",
        **numbers: int,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after
        self.remedy, self.numbers = remedy, numbers

    @property
    def kind(self) -> str:
        return KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """The error object: {"error": {"message", "type", "param", "code", ...}}."""
        told = {"message": str(self) + self.remedy, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": told | self.numbers}


def refusal(error: XgenError, prompt: str = "prompt") -> RequestError:
    """What an asker is told of `error`; `prompt` is the field that the prompt came in."""
    if isinstance(error, RequestError):
        return error
    message = str(error)
    if isinstance(error, TooLong):
        return RequestError(
            message,
            param=prompt,
            code="context_length_exceeded",
            remedy=OR_SHORTEN,
            prompt_tokens=error.prompt_tokens,
            max_tokens=error.max_tokens,
            context_length=error.context_length,
        )
    if isinstance(error, BadRequest):
        param = prompt if error.parameter == "ids" else PARAMETERS.get(error.parameter, error.parameter)
        return RequestError(message, param=param, code="invalid_value")
    if isinstance(error, Overloaded):
        return RequestError(message, status=429, code="overloaded", retry_after=RETRY_SECONDS)
    if isinstance(error, Draining):
        return RequestError(message, status=503, code="draining", retry_after=RETRY_SECONDS)
    if isinstance(error, DataError):
        return RequestError(message, param=prompt, code="invalid_value")
    broken = isinstance(error, Broken)
    return RequestError(message, status=500, code="engine_broken" if broken else "engine_failed")


def failure(error: Exception) -> RequestError:
    """What an asker is told where the server or the engine failed: not the details, which the log has."""
    if isinstance(error, XgenError):
        return refusal(error)
    return RequestError("the server failed at this request; its log says why", status=500, code="internal_error")
