"""What every request passes on its way in: errors in one shape, the log, origins, the key, and the size of its body."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xgen.errors import XgenError
from xgen.serve.logs import note
from xgen.serve.options import Options
from xgen.serve.refusals import RequestError, failure

OPEN = ("/", "/health", "/openapi.json")
"""Answered without the key: the page asks its reader for it, and who watches over the server needs none."""

WATCHED = ("/health", "/metrics")
"""Asked every few seconds by those who watch over the server; the log has them at DEBUG only."""

MOST_OPEN = 1024
"""Requests under way at once, those that still come in included: each may hold a body of the largest size."""

CLOSED_REQUEST = 499
"""What the log says of a request whose asker went away; nobody reads it as an answer."""

LONGEST_PATH = 200
"""Characters of a path that are logged."""

PIECE = 1 << 16
"""Bytes of an answer that are handed over at once. What is handed over counts as sent, though it may lie unread."""


class Gone(Exception):  # noqa: N818 - it says what happened
    """The asker has closed the connection, or it was closed because nothing was taken of the answer."""


def json_bytes(value: Any) -> bytes:
    """Compact UTF-8. Raises ValueError for numbers that JSON does not have."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json_bytes(value), status, {"cache-control": "no-store", **(headers or {})}, "application/json")


def error_response(error: RequestError, more: Mapping[str, str] | None = None) -> Response:
    """The answer that tells of `error`; `more` are further headers."""
    headers = dict(more or {})
    headers |= {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return json_response(error.body(), error.status, headers)


class Entrance:
    """Logs each request with a number of its own, and answers its errors, if nothing was answered yet.

    `under_way` counts requests that have not ended; `answered` how many did, by path and status.
    """

    def __init__(self, app: ASGIApp, paths: frozenset[str]) -> None:
        """`paths` are those that are counted by name."""
        self._app, self._paths = app, paths
        self.under_way = 0
        self.answered: dict[tuple[str, int], int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begin, status = time.perf_counter(), 0
        fields: dict[str, Any] = {"id": f"req-{secrets.token_hex(8)}"}
        scope["xgen.log"] = fields

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = fields["id"]
            for piece in _pieces(message):
                await send(piece)

        self.under_way += 1
        try:
            if self.under_way > MOST_OPEN:
                raise RequestError("too many requests at once", status=429, code="overloaded", retry_after=1)
            await self._app(scope, receive, counted)
        except Gone:
            status = status or CLOSED_REQUEST
            fields["gone"] = True
        except Exception as error:  # noqa: BLE001 - a fault of ours ends this request alone, and is logged
            refused = _refused(error, scope, fields["id"])
            if not status:
                more = error.headers if isinstance(error, HTTPException) else None
                await error_response(refused, more)(scope, receive, counted)
            fields["error"] = refused.code
        finally:
            self.under_way -= 1
            path = scope["path"] if scope["path"] in self._paths else "other"
            self.answered[path, status] = self.answered.get((path, status), 0) + 1
            _note(scope, status, time.perf_counter() - begin, fields)


def _pieces(message: Message) -> Iterator[Message]:
    """`message`, a body of more than PIECE bytes as several."""
    body = message.get("body", b"")
    last = max(len(body) - 1, 0) // PIECE * PIECE
    for begin in range(0, last, PIECE):
        yield {**message, "body": body[begin : begin + PIECE], "more_body": True}
    yield {**message, "body": body[last:]} if last else message


def _refused(error: Exception, scope: Scope, number: str) -> RequestError:
    if isinstance(error, HTTPException):
        asked = f"{scope['method'][:LONGEST_PATH]} {scope['path'][:LONGEST_PATH]}"
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return RequestError(f"there is no {asked} here; see /openapi.json", status=error.status_code, code=code)
    if not isinstance(error, XgenError):
        note("a request failed", level=logging.ERROR, cause=error, id=number)
    return failure(error)


def _note(scope: Scope, status: int, seconds: float, fields: dict[str, Any]) -> None:
    client = scope.get("client")
    note(
        "request",
        level=logging.DEBUG if scope["path"] in WATCHED else logging.INFO,
        method=scope["method"],
        path=scope["path"][:LONGEST_PATH],
        status=status,
        seconds=round(seconds, 4),
        client=client[0] if client else None,
        **fields,
    )


class Origins:
    """Scripts of other sites may ask only where they are let in: `allowed` lists their origins, "*" is all."""

    def __init__(self, app: ASGIApp, allowed: tuple[str, ...]) -> None:
        self._app, self._allowed = app, frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower():
            await self._app(scope, receive, send)
            return
        if not self._allowed & {origin, "*"}:
            message = f"pages of {origin[:100]} may not ask this server; let them in with --allow-origin"
            refused = RequestError(message, status=403, code="origin_not_allowed")
            await error_response(refused)(scope, receive, send)
            return

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer["access-control-allow-origin"] = origin
                answer["access-control-expose-headers"] = "retry-after, x-request-id"
                answer.add_vary_header("Origin")
            await send(message)

        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            allowed = {
                "access-control-allow-methods": "GET, POST",
                # The star does not stand for Authorization. OpenAI's own client in a browser sends a dozen of its own.
                "access-control-allow-headers": headers.get("access-control-request-headers", "authorization"),
                "access-control-max-age": "600",
            }
            await Response(status_code=204, headers=allowed)(scope, receive, told)
        else:
            await self._app(scope, receive, told)


class Key:
    """Everything but OPEN and the page's files needs the key, if there is one."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._digest = None if key is None else _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._digest is not None and not is_open(scope["path"]):
            kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            # No other space than HTTP's: a byte of a key in UTF-8 may look like one.
            fits = hmac.compare_digest(_digest(given.strip(" \t").encode("latin-1")), self._digest)
            if kind.lower() != "bearer" or not fits:
                shown = kind.lower() == "bearer" and given.strip(" \t")
                why = "this is not the server's API key" if shown else "this server needs its API key"
                raise RequestError(
                    f"{why}: send the header Authorization: Bearer KEY",
                    status=401,
                    code="invalid_api_key",
                )
        await self._app(scope, receive, send)


def is_open(path: str) -> bool:
    return path in OPEN or path.startswith("/page/")


def _digest(key: bytes) -> bytes:
    # Of equal length whatever was given, so that the comparison tells nothing of the key's.
    return hashlib.sha256(key).digest()


async def read_body(scope: Scope, receive: Receive, options: Options) -> bytes:
    """The whole body. Raises RequestError for one that is no JSON by its headers, too large, or too slow to come; and
    Gone."""
    headers = Headers(scope=scope)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            f"the body is {kind[:80] or 'of no stated type'}; send JSON with Content-Type: application/json",
            status=415,
            code="unsupported_media_type",
        )
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError("the body must not be compressed", status=415, code="unsupported_media_type")
    too_large = RequestError(
        f"the body exceeds {options.max_body} bytes, the most that this server takes (--max-body)",
        status=413,
        code="body_too_large",
    )
    if int(headers.get("content-length", "0")) > options.max_body:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(options.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > options.max_body:
                    raise too_large
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError as cause:
        raise RequestError(
            f"the body did not come within {options.body_seconds:g} seconds", status=408, code="body_too_slow"
        ) from cause
