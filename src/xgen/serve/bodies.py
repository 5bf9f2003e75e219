"""Bytes or values to checked bodies; what is wrong with one is told by the name of its field."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from xgen.serve.refusals import RequestError

Body = TypeVar("Body", bound=BaseModel)

LONGEST_QUOTE = 80
"""Characters of a wrong value that an error repeats."""

MOST_ERRORS = 1000
"""A body of millions of wrong values would take the memory of as many errors."""

UNIONS = {
    "prompt": "must be a text, a list of texts, a list of token ids, or a list of such lists; ids are whole numbers",
    "stop": "must be a text of at most 1000 characters, or a list of at most 16 texts of 1 to 1000 characters each",
}
"""Fields of several types, where the library's own message would list what each type finds wrong."""

TEXT_ALONE = "this server generates text alone"
REFUSED = {
    "tools": TEXT_ALONE,
    "tool_choice": TEXT_ALONE,
    "functions": TEXT_ALONE,
    "function_call": TEXT_ALONE,
    "tool_calls": TEXT_ALONE,
    "parallel_tool_calls": TEXT_ALONE,
    "modalities": TEXT_ALONE,
    "audio": TEXT_ALONE,
    "web_search_options": TEXT_ALONE,
    "suffix": "the model continues a text and cannot fill a gap",
    "prediction": "answers are never predicted",
    "reasoning_effort": "the model has no reasoning mode",
    "verbosity": "say it in the prompt",
    "name": "the model's template has no place for names; put it into the content",
    "include_obfuscation": "the chunks of a stream are never padded",
    "store": "nothing is stored",
    "metadata": "nothing is stored",
    "service_tier": "all requests are served alike",
    "moderation": "nothing is moderated",
    "prompt_cache_key": "prompts are cached by what they hold",
    "prompt_cache_options": "prompts are cached by what they hold",
    "prompt_cache_retention": "prompts are cached by what they hold",
    "safety_identifier": "nothing is reported",
    "guided_json": "output is not constrained",
    "continue_final_message": "use /v1/completions with the text of /apply-template",
}
"""Parameters that other servers take, and why they make no sense here."""


def parse_json(data: bytes) -> Any:
    """The value of a body. Raises RequestError for what is no JSON: bad syntax or UTF-8, NaN, nesting too deep."""
    try:
        return from_json(data, allow_inf_nan=False)
    except ValueError as cause:
        raise RequestError(f"the body is not JSON: {cause}", code="invalid_json") from cause


def check(kind: type[Body], value: Any, *, lenient: bool = False) -> Body:
    """`value` as a body of `kind`. `lenient`: leave out unknown fields instead of refusing them.

    Raises RequestError that names the field.
    """
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, not {_json_name(value)}", code="invalid_type")
    try:
        return kind.model_validate(value, extra="ignore" if lenient else None, context={"lenient": lenient})
    except ValidationError as cause:
        if cause.error_count() > MOST_ERRORS:
            raise RequestError(f"{cause.error_count()} things are wrong with the body", code="invalid_value") from cause
        raise _refusal(cause.errors(include_url=False, include_context=False)) from cause


def _refusal(errors: list[ErrorDetails]) -> RequestError:
    # Of a field of several types, what fits best fails deepest.
    error = max(errors, key=lambda one: (one["type"] == "extra_forbidden", len(one["loc"])))
    path = [str(part)[:LONGEST_QUOTE] for part in error["loc"] if not _is_type(part)]
    param, last = ".".join(path), path[-1]
    if error["type"] == "extra_forbidden":
        why = f"{REFUSED[last]}; leave it out" if last in REFUSED else "leave it out"
        kind = "unsupported" if last in REFUSED else "unknown"
        return RequestError(f"{kind} parameter '{param}': {why}", param=param, code=f"{kind}_parameter")
    if error["type"] == "missing":
        return RequestError(f"'{param}' is missing", param=param, code="missing_required_parameter")
    if path[0] in UNIONS:
        return RequestError(f"'{path[0]}' {UNIONS[path[0]]}", param=path[0], code="invalid_value")
    message = error["msg"][0].lower() + error["msg"][1:]
    return RequestError(f"'{param}': {message}; got {quoted(error['input'])}", param=param, code="invalid_value")


def _is_type(part: int | str) -> bool:
    """Whether it is the name of a type, which stands in a path where a field has several."""
    return isinstance(part, str) and (part in ("str", "constrained-str") or part.startswith("list["))


def quoted(value: Any) -> str:
    """A short form of a wrong value."""
    if isinstance(value, str | list | dict) and len(value) > LONGEST_QUOTE:
        return f"{_json_name(value)} of length {len(value)}"
    text = repr(value)
    return text if len(text) <= LONGEST_QUOTE else text[:LONGEST_QUOTE] + "..."


def _json_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
