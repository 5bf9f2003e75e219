"""The OpenAPI document, made from the schemas that check the requests."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from xgen import __version__
from xgen.serve import replies, schemas

Json = dict[str, Any]

ERRORS = {
    400: "The body is no JSON, or a field is wrong: `param` names it. `context_length_exceeded` has the counts.",
    401: "The API key is missing or wrong.",
    403: "A page of another site may not ask.",
    404: "There is no such model or address.",
    405: "The address does not take this method.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body's type is not application/json.",
    421: "The server is not called by this name.",
    429: "Overloaded; try again after Retry-After seconds.",
    500: "The server failed.",
    503: "The model is loading, or the server is shutting down.",
}
PLAIN_ERRORS = (401, 403, 404, 405, 421, 429, 500, 503)
"""Those of a request without a body."""

POSTS: dict[str, tuple[type[BaseModel], type[BaseModel], str]] = {
    "/v1/completions": (schemas.CompletionBody, replies.Completion, "Continue prompts."),
    "/v1/chat/completions": (schemas.ChatBody, replies.ChatCompletion, "Answer a conversation."),
    "/tokenize": (schemas.TokenizeBody, replies.Tokenized, "Token ids of a text, or of messages by the template."),
    "/detokenize": (schemas.DetokenizeBody, replies.Detokenized, "The text of token ids."),
    "/apply-template": (schemas.TemplateBody, replies.Templated, "The prompt that messages make."),
}
GETS: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/models": (replies.ModelList, "The model and its adapters."),
    "/v1/models/{name}": (replies.ModelEntry, "One of them."),
    "/props": (replies.Props, "What the page has to know of the model."),
}
STREAMED = ("/v1/completions", "/v1/chat/completions")


@cache
def document(*, keyed: bool) -> Json:
    """The document; `keyed`: the server asks for its API key. Not to be changed."""
    bodies = [kind for row in POSTS.values() for kind in (row[0], row[1])]
    kinds: list[type[BaseModel]] = [*bodies, *(row[0] for row in GETS.values()), replies.Error, replies.Health]
    _, definitions = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}"
    )
    paths: Json = {path: {"post": _post(path, *row)} for path, row in POSTS.items()}
    paths |= {path: {"get": _get(path, *row)} for path, row in GETS.items()}
    paths["/health"] = {
        "get": {
            "summary": "Whether the model is ready.",
            "security": [],
            "responses": {
                "200": _answer("Ready.", _ref(replies.Health)),
                "503": _answer("Loading, or shutting down.", _ref(replies.Health)),
                **_errors(405, 421),
            },
        }
    }
    metrics = {"description": "Metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    paths["/metrics"] = {"get": {"summary": "For Prometheus.", "responses": {"200": metrics, **_errors(*PLAIN_ERRORS)}}}
    found: Json = {
        "openapi": "3.1.0",
        "info": {"title": "XGen", "version": __version__, "description": "An OpenAI-compatible server of one model."},
        "paths": paths,
        "components": {"schemas": definitions["$defs"]},
    }
    if keyed:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found


def _post(path: str, body: type[BaseModel], reply: type[BaseModel], summary: str) -> Json:
    answer = _answer("The answer.", _ref(reply))
    if path in STREAMED:
        answer["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(body)}}},
        "responses": {"200": answer, **_errors(*ERRORS)},
    }


def _get(path: str, reply: type[BaseModel], summary: str) -> Json:
    found: Json = {
        "summary": summary,
        "responses": {"200": _answer("The answer.", _ref(reply)), **_errors(*PLAIN_ERRORS)},
    }
    if "{name}" in path:
        found["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    return found


def _errors(*statuses: int) -> Json:
    return {str(status): _answer(ERRORS[status], _ref(replies.Error)) for status in statuses}


def _answer(description: str, schema: Json) -> Json:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _ref(kind: type[BaseModel]) -> Json:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
