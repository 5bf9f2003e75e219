"""Asking a server over HTTP with the standard library alone: what a load generator needs of a client."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from xgen.serve.errors import ServeError

ANSWER_SECONDS = 30.0
"""For an answer that takes no generation: a server that is busy may be late with it."""

LONGEST_LINE = 1 << 20
"""Bytes of a line of an answer, events included."""


class Lost(ConnectionError):  # noqa: N818 - it says what happened
    """The connection ended before the answer did."""


@dataclass(frozen=True)
class Address:
    """Where a server is. `key` is its API key, if it has one."""

    host: str
    port: int
    secure: bool = False
    path: str = ""
    key: str | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' * self.secure}://{host}:{self.port}{self.path}"


def parse_address(url: str, key: str | None = None) -> Address:
    """The server at `url`. Raises ServeError for what is no address of one."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as cause:
        raise ServeError(f"{url!r} is no address; write it as http://127.0.0.1:8000") from cause
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ServeError(f"{url!r} is no address; write it as http://127.0.0.1:8000")
    secure = parts.scheme == "https"
    return Address(parts.hostname, port or (443 if secure else 80), secure, parts.path.rstrip("/"), key)


class Answer:
    """The head of an answer, and its body as it comes. What it raises when the connection ends early is Lost."""

    def __init__(self, status: int, headers: dict[str, str], reader: asyncio.StreamReader) -> None:
        """`headers` by their names in small letters."""
        self.status, self.headers, self._reader = status, headers, reader

    async def body(self) -> bytes:
        return b"".join([piece async for piece in self._pieces()])

    async def events(self) -> AsyncIterator[str]:
        """The data of each server-sent event; comments are left out."""
        rest = b""
        async for piece in self._pieces():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data: "):
                    yield line[6:].decode()

    async def _pieces(self) -> AsyncIterator[bytes]:
        reader = self._reader
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int(await _line(reader), 16):
                yield await _exactly(reader, size)
                await _exactly(reader, 2)
        elif "content-length" in self.headers:
            yield await _exactly(reader, int(self.headers["content-length"]))
        else:
            while piece := await reader.read(65536):
                yield piece


@asynccontextmanager
async def ask(address: Address, path: str, body: Any = None) -> AsyncIterator[Answer]:
    """The answer to a GET of `path`, or to a POST of `body` as JSON, on a connection of its own, which is closed at the
    end of the context however much of the answer was read. Raises OSError (Lost is one)."""
    reader, writer = await asyncio.open_connection(
        address.host, address.port, ssl=address.secure or None, limit=LONGEST_LINE
    )
    try:
        writer.write(_request(address, path, body))
        await writer.drain()
        status = _status(await _line(reader))
        headers = {}
        while line := await _line(reader):
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        yield Answer(status, headers, reader)
    finally:
        # Nothing is left to be sent, and a server is to see at once that nobody listens any more.
        writer.transport.abort()


async def ask_whole(address: Address, path: str, body: Any = None) -> bytes:
    """The body of an answer that comes within ANSWER_SECONDS. Raises ServeError for one that is not 200, OSError as
    `ask` and when none comes."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS), ask(address, path, body) as answer:
            data = await answer.body()
    except TimeoutError as cause:
        raise TimeoutError(f"{path} was not answered within {ANSWER_SECONDS:g} s") from cause
    if answer.status != 200:
        raise ServeError(f"{address.url}{path} answered {answer.status}: {data[:200].decode(errors='replace')}")
    return data


async def ask_json(address: Address, path: str, body: Any = None) -> Any:
    """The JSON of `ask_whole`. Raises ServeError also where it is none."""
    data = await ask_whole(address, path, body)
    try:
        return json.loads(data)
    except ValueError as cause:
        raise ServeError(f"{address.url}{path} answered no JSON; is it a server of `xgen serve`?") from cause


def _request(address: Address, path: str, body: Any) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    name = address.url.partition("://")[2].removesuffix(address.path)
    lines = [f"{'GET' if body is None else 'POST'} {address.path}{path} HTTP/1.1", f"Host: {name}", "Connection: close"]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    if address.key is not None:
        lines.append(f"Authorization: Bearer {address.key}")
    return "\r\n".join([*lines, "", ""]).encode() + data


def _status(line: str) -> int:
    found = re.fullmatch(r"HTTP/1\.[01] ([0-9]{3})( .*)?", line)
    if found is None:
        raise Lost("what answers there does not speak HTTP/1.1")
    return int(found[1])


async def _line(reader: asyncio.StreamReader) -> str:
    line = await reader.readline()
    if not line.endswith(b"\n"):
        raise Lost("the server closed the connection in the middle of an answer")
    return line.decode("latin-1").rstrip("\r\n")


async def _exactly(reader: asyncio.StreamReader, size: int) -> bytes:
    try:
        return await reader.readexactly(size)
    except asyncio.IncompleteReadError as cause:
        raise Lost("the server closed the connection in the middle of an answer") from cause
