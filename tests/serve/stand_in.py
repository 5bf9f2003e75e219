"""A server with the interface of `xgen serve` and scripted replies, for tests of the chat page.

Its tokens are words: "a b" has two. `python tests/serve/stand_in.py` serves the page on port 8123 to look at.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from xgen.serve.web import Guard, file_routes, page_files

OVERHEAD = 4
"""Tokens that a message takes beside its words."""

TOKEN = re.compile(r"\s*\S+|\s+")


@dataclass
class Script:
    """How the server answers from now on. `reply` is sent piece by piece, `delay` seconds apart.

    `tokens` are (name, probability, alternatives) for completions, made of `reply` where there are none. `progress`
    are (done, total) told before the first piece. `refusals` are answered first, one to a request: (status, error,
    headers). `breaks` after so many pieces: the connection is cut there.
    """

    reply: list[str] = field(default_factory=lambda: ["Hello", " there", "."])
    delay: float = 0.0
    tokens: list[tuple[str, float, dict[str, float]]] = field(default_factory=list)
    progress: list[tuple[int, int]] = field(default_factory=list)
    refusals: list[tuple[int, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    breaks: int | None = None
    fails: str | None = None
    finish: str = "stop"
    hold: threading.Event | None = None


@dataclass
class StandIn:
    """The server's state, which tests set and read from another thread."""

    window: int = 2000
    chat: bool = True
    key: str | None = None
    loading: bool = False
    models: list[str] = field(default_factory=lambda: ["stand-in"])
    script: Script = field(default_factory=Script)
    asked: list[dict[str, Any]] = field(default_factory=list)
    counted: list[dict[str, Any]] = field(default_factory=list)
    gone: int = 0
    address: str = ""

    def reset(self) -> None:
        fresh = StandIn()
        for name in ("window", "chat", "key", "loading", "models", "script", "asked", "counted", "gone"):
            setattr(self, name, getattr(fresh, name))

    def refuse(self, request: Request) -> Response | None:
        """The key first, as the real server does, then whether the model is there."""
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return error(401, {"message": "this server asks for an API key"})
        return error(503, {"message": "the model is still loading"}) if self.loading else None


def words(text: str) -> int:
    return len(TOKEN.findall(text))


def error(status: int, fields: dict[str, Any], headers: dict[str, str] | None = None) -> JSONResponse:
    whole = {"message": "", "type": "invalid_request_error", "param": None, "code": None} | fields
    return JSONResponse({"error": whole}, status, headers)


def count(body: dict[str, Any]) -> int:
    if "messages" in body:
        return sum(words(one["content"]) + OVERHEAD for one in body["messages"])
    return words(body.get("content", body.get("prompt", "")))


def logprobs_of(state: StandIn, at: int) -> dict[str, Any] | None:
    script = state.script
    if not script.tokens:
        tops = {script.reply[at]: -0.5, " other": -1.2}
        return {"tokens": [script.reply[at]], "token_logprobs": [-0.5], "top_logprobs": [tops], "text_offset": [0]}
    name, probability, others = script.tokens[at]
    tops = {name: probability, **others}
    return {
        "tokens": [name],
        "token_logprobs": [math.log(probability)],
        "top_logprobs": [{text: math.log(share) for text, share in tops.items()}],
        "text_offset": [0],
    }


async def pieces(state: StandIn, body: dict[str, Any]) -> AsyncIterator[str]:
    """The stream's lines."""
    script, chat = state.script, "messages" in body

    def event(value: dict[str, Any]) -> str:
        return f"data: {json.dumps(value)}\n\n"

    def chunk(text: str, at: int | None = None, finish: str | None = None) -> str:
        said = {"delta": {"content": text} if text else {}} if chat else {"text": text}
        told = logprobs_of(state, at) if at is not None and body.get("logprobs") else None
        return event({"choices": [{"index": 0, **said, "logprobs": told, "finish_reason": finish}]})

    yield ": ping\n\n"
    for done, total in script.progress:
        yield event({"choices": [], "prompt_progress": {"done": done, "total": total, "cached": 0}})
        await asyncio.sleep(max(script.delay, 0.01))
    for at, text in enumerate(script.reply):
        if at == script.breaks:
            raise ConnectionResetError
        while at and script.hold is not None and not script.hold.is_set():
            await asyncio.sleep(0.01)
        yield chunk(text, at)
        await asyncio.sleep(script.delay)
    if script.fails is not None:
        yield event({"error": {"message": script.fails, "type": "server_error", "param": None, "code": None}})
        return
    yield chunk("", finish=script.finish)
    tokens = len(script.reply)
    details = {"prompt_tokens_details": {"cached_tokens": 3}}
    yield event({"choices": [], "usage": {"prompt_tokens": count(body), "completion_tokens": tokens, **details}})
    yield "data: [DONE]\n\n"


def application(state: StandIn) -> Starlette:
    async def generate(request: Request) -> Response:
        refused = state.refuse(request)
        if refused is not None:
            return refused
        body = await request.json()
        if state.script.refusals:
            return error(*state.script.refusals.pop(0))
        state.asked.append(body)

        async def watched() -> AsyncIterator[str]:
            try:
                async for line in pieces(state, body):
                    yield line
            except asyncio.CancelledError:
                state.gone += 1
                raise

        return StreamingResponse(watched(), media_type="text/event-stream")

    async def tokenize(request: Request) -> Response:
        refused = state.refuse(request)
        if refused is not None:
            return refused
        body = await request.json()
        state.counted.append(body)
        return JSONResponse({"tokens": [], "count": count(body), "max_model_len": state.window})

    async def props(request: Request) -> Response:
        told = {"model": state.models[0], "context_length": state.window, "chat": state.chat, "parameters": 134515008}
        return state.refuse(request) or JSONResponse(told | {"slots": 4, "defaults": {"temperature": 0.8}})

    async def models(request: Request) -> Response:
        return state.refuse(request) or JSONResponse({"data": [{"id": name} for name in state.models]})

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "loading" if state.loading else "ok"}, 503 if state.loading else 200)

    names = {one.name for one in files("xgen.serve.page").iterdir() if one.name.endswith((".html", ".css", ".js"))}
    table = {"/" if name == "index.html" else f"/page/{name}": name for name in names}
    return Starlette(
        routes=[
            Route("/v1/chat/completions", generate, methods=["POST"]),
            Route("/v1/completions", generate, methods=["POST"]),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/props", props),
            Route("/v1/models", models),
            Route("/health", health),
            *file_routes(page_files("xgen.serve.page", table)),
        ]
    )


@contextlib.contextmanager
def standing_in(port: int = 0) -> Iterator[StandIn]:
    """The server on a thread of its own, with the real one's headers, ended afterwards."""
    state = StandIn()
    # A cut connection is part of some scripts; uvicorn would write its traceback.
    config = uvicorn.Config(Guard(application(state), "127.0.0.1"), "127.0.0.1", port, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    state.address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    try:
        yield state
    finally:
        server.force_exit = server.should_exit = True
        thread.join()


if __name__ == "__main__":
    with standing_in(8123) as state:
        state.script.delay = 0.05
        print(state.address)
        threading.Event().wait()
