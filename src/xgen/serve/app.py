"""The server as an ASGI application: a model's interface, and the chat page."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from xgen.infer.engine import Engine
from xgen.infer.request import Sampling
from xgen.serve.answer import Json
from xgen.serve.bodies import parse_json, quoted
from xgen.serve.calls import Call, stream_answer, whole_answer
from xgen.serve.doors import Entrance, Key, Origins, error_response, json_response, read_body
from xgen.serve.metrics import CONTENT_TYPE, exposition
from xgen.serve.openapi import document
from xgen.serve.options import Options
from xgen.serve.refusals import RETRY_SECONDS, RequestError
from xgen.serve.replies import Memory
from xgen.serve.translate import DEFAULT_COMPLETION_TOKENS, Asked, Translator
from xgen.serve.web import Guard, file_routes, page_files

OWNER = "xgen"
PAGE_KINDS = (".html", ".css", ".js", ".svg")


@dataclass(frozen=True)
class Model:
    """What is served: the engine, started and warm, the model's side of the interface, the count of its weights, and
    what a decode step reads of the memory, where that is known."""

    engine: Engine
    translator: Translator
    parameters: int
    created: int
    memory: Memory | None = None


@dataclass(frozen=True)
class _Raw:
    """An ASGI application of a function."""

    function: Callable[[Scope, Receive, Send], Awaitable[None]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.function(scope, receive, send)


class Server:
    """The application. It answers /health from the start, and everything once `model` is set, which any thread may
    do; after `draining` is set it takes nothing new."""

    def __init__(self, options: Options, model: Model | None = None) -> None:
        self.options, self.model = options, model
        self.draining = False
        self._calls: set[Call] = set()
        routes = self._routes()
        inside = Key(Router(routes, redirect_slashes=False), options.api_key)
        self._entrance = Entrance(inside, frozenset(route.path for route in routes))
        self._outside = Guard(
            Origins(self._entrance, options.allow_origins),
            options.host,
            foreign_pages=bool(options.allow_origins),
            any_name=options.api_key is not None,
            refuse=_refuse,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # With an app in the scope the router raises what it does not find.
            await self._outside({**scope, "app": self}, receive, send)

    @property
    def under_way(self) -> int:
        """Requests that have not been answered to their end."""
        return self._entrance.under_way

    def cancel(self) -> None:
        """End all answers under way; their askers are told that the server stops. Call it in the loop."""
        for call in self._calls:
            call.cancel()

    def _routes(self) -> list[Route]:
        def post(path: str, answer: Callable[[Translator], Callable[[Any], Json]]) -> Route:
            async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
                method = answer(self._ready().translator)
                data = await read_body(scope, receive, self.options)
                # Long texts take their time to encode, and the others do not wait for it.
                response = await asyncio.to_thread(lambda: json_response(method(parse_json(data))))
                await response(scope, receive, send)

            return Route(path, _Raw(endpoint), methods=["POST"])

        def generate(path: str, translate: Callable[[Translator], Callable[[Any], Asked]]) -> Route:
            async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
                await self._generate(translate, scope, receive, send)

            return Route(path, _Raw(endpoint), methods=["POST"])

        return [
            generate("/v1/completions", lambda translator: translator.completion),
            generate("/v1/chat/completions", lambda translator: translator.chat),
            post("/tokenize", lambda translator: translator.tokenize),
            post("/detokenize", lambda translator: translator.detokenize),
            post("/apply-template", lambda translator: translator.apply_template),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._one_model, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/props", self._props, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            Route("/openapi.json", self._openapi, methods=["GET"]),
            *file_routes(page_files("xgen.serve.page", _page_names())),
        ]

    def _ready(self) -> Model:
        """Raises RequestError before the model is loaded and once the server stops."""
        if self.draining:
            raise RequestError("the server is shutting down", status=503, code="draining", retry_after=RETRY_SECONDS)
        if self.model is None:
            raise RequestError(
                "the model is still loading; /health says when it is ready",
                status=503,
                code="loading",
                retry_after=RETRY_SECONDS,
            )
        return self.model

    async def _generate(
        self,
        translate: Callable[[Translator], Callable[[Any], Asked]],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        model, options, fields = self._ready(), self.options, scope["xgen.log"]
        method = translate(model.translator)
        data = await read_body(scope, receive, options)
        asked = await asyncio.to_thread(lambda: method(parse_json(data)))
        self._ready()
        fields |= {"model": asked.model, "stream": asked.stream, "choices": len(asked.requests)}
        if options.log_prompts:
            fields["body"] = data.decode()
        call = Call(model.engine, asked)
        self._calls.add(call)
        try:
            if asked.stream:
                said: list[str] = []
                error = await stream_answer(
                    call,
                    receive,
                    send,
                    ping_seconds=options.ping_seconds,
                    heard=said.append if options.log_prompts else _ignore,
                )
                fields |= {"answer": said} if options.log_prompts else {}
                fields |= {} if error is None else {"error": error.code}
            else:
                found = await whole_answer(call, receive)
                fields |= {"answer": found["choices"]} if options.log_prompts else {}
                response = await asyncio.to_thread(json_response, found)
                await response(scope, receive, send)
        finally:
            self._calls.discard(call)
            fields |= {"finished": call.progress.finish_reasons} | call.progress.usage()

    async def _models(self, _: Request) -> Response:
        model = self._ready()
        return json_response({"object": "list", "data": [_listed(model, name) for name in model.translator.names]})

    async def _one_model(self, request: Request) -> Response:
        model, name = self._ready(), request.path_params["name"]
        if name not in model.translator.names:
            raise RequestError(
                f"there is no model {quoted(name)} here", status=404, code="model_not_found", param="model"
            )
        return json_response(_listed(model, name))

    async def _health(self, _: Request) -> Response:
        if self.model is not None and self.model.engine.broken is not None:
            return json_response({"status": "broken"}, 503)
        state = "draining" if self.draining else "loading" if self.model is None else "ok"
        return json_response({"status": state}, 200 if state == "ok" else 503)

    async def _props(self, _: Request) -> Response:
        model, standard = self._ready(), Sampling()
        defaults = {
            "temperature": standard.temperature,
            "top_p": standard.top_p,
            "top_k": standard.top_k,
            "min_p": standard.min_p,
            "presence_penalty": standard.presence_penalty,
            "frequency_penalty": standard.frequency_penalty,
            "repetition_penalty": standard.repetition_penalty,
            "completion_max_tokens": DEFAULT_COMPLETION_TOKENS,
        }
        return json_response(
            {
                "model": model.translator.name,
                "context_length": model.translator.window,
                "chat": model.translator.template is not None,
                "parameters": model.parameters,
                "slots": model.engine.statistics().slots,
                "defaults": defaults,
                "memory": None if model.memory is None else model.memory.model_dump(),
            }
        )

    async def _metrics(self, _: Request) -> Response:
        model = self.model
        text = exposition(None if model is None else model.engine.statistics(), self._entrance.answered, self.under_way)
        return Response(text, media_type=CONTENT_TYPE, headers={"cache-control": "no-store"})

    async def _openapi(self, _: Request) -> Response:
        return json_response(document(keyed=self.options.api_key is not None))


def _ignore(_: str) -> None:
    """For whom nothing is to be kept."""


def _listed(model: Model, name: str) -> Json:
    own = {"id": name, "object": "model", "created": model.created, "owned_by": OWNER}
    base = {} if name == model.translator.name else {"parent": model.translator.name}
    return own | {"max_model_len": model.translator.window} | base


def _refuse(message: str, status: int) -> Response:
    return error_response(RequestError(message.strip(), status=status, code="refused"))


def _page_names() -> dict[str, str]:
    """The files of the page by their addresses: a table made once, so that no path of a request reaches the disk."""
    names = sorted(one.name for one in files("xgen.serve.page").iterdir() if one.name.endswith(PAGE_KINDS))
    return {"/" if name == "index.html" else f"/page/{name}": name for name in names}
