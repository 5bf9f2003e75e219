"""The live page's application: one follower of one folder, and a few read-only addresses.

`/` is the whole page; `/state.json` names the parts' digests; `/part/NAME` is one part's markup; `/events` says when
anything changed. Nothing in an address is ever made into a path: the parts and files are looked up in tables.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from xgen.report.markup import escape
from xgen.serve.watch.follow import Follower, Seen
from xgen.serve.watch.parts import PARTS, make_parts, title
from xgen.serve.watch.status import State, status_of
from xgen.serve.web import file_routes, page_files, tagged

POLL_SECONDS = 1.0
"""Between two looks at the files."""

LISTEN_SECONDS = 0.2
"""Between two looks at what the follower found, for each open page."""

PING_SECONDS = 15.0

SHARE = 0.1
"""Of one processor's time, that making the page may take: a page that takes long to make changes less often."""

MOST_PAGES = 64
"""Open at a time; one more is told to come later."""

FILES = {**page_files("xgen.report", {"/report.css": "style.css"}),
         **page_files("xgen.serve.watch", {"/watch.css": "watch.css", "/watch.js": "watch.js"})}  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """The page at one moment."""

    token: str
    """Digest of all parts and of the title."""
    title: str
    state: State
    parts: dict[str, str]
    digests: dict[str, str]


class Watch:
    """Follows one run folder and answers with what it holds. Raises DataError when the folder can be no run's."""

    def __init__(self, folder: Path) -> None:
        self._follower = Follower(folder)
        self._lock = threading.Lock()
        self._seen = self._follower.seen()
        self._state = State.PREPARING
        self._version = 1
        self._shown: tuple[int, Shown] | None = None
        self._pause = POLL_SECONDS
        self._pages = 0
        self._stopping = False
        self._following: asyncio.Task[None] | None = None

    def application(self) -> Starlette:
        """To be wrapped in a `Guard`."""
        routes = [
            Route("/", self._page, methods=["GET"]),
            Route("/state.json", self._state_json, methods=["GET"]),
            Route("/part/{name}", self._part, methods=["GET"]),
            Route("/events", self._events, methods=["GET"]),
            *file_routes(FILES),
        ]
        return Starlette(routes=routes, lifespan=self._lifespan)

    def stop(self) -> None:
        """Let the open pages' streams end. May be called in a signal handler."""
        self._stopping = True

    def look(self) -> bool:
        """Take what is new in the folder. Returns whether there is more to read at once."""
        with self._lock:
            changed = self._follower.poll()
            self._seen = self._follower.seen() if changed else self._as_of_now()
            state = status_of(self._seen, time.time()).state
            if changed or state is not self._state:
                self._state = state
                self._version += 1
            return self._seen.behind > 0

    def _as_of_now(self) -> Seen:
        return replace(self._seen, last_line=self._follower.last_line())

    def shown(self) -> Shown:
        """The page as of the last look; made once for each change, by whoever asks first."""
        if self._following is not None and self._following.done():
            self._following.result()  # a page that is no longer kept up is an error, not an old page
        with self._lock:
            if self._shown is None or self._shown[0] != self._version:
                begin = time.thread_time()
                self._shown = self._version, self._make()
                self._pause = max(POLL_SECONDS, (time.thread_time() - begin) / SHARE)
            return self._shown[1]

    def _make(self) -> Shown:
        status = status_of(self._seen, time.time())
        parts = make_parts(self._seen, status)
        said = title(self._seen, status)
        digests = {name: _digest(markup) for name, markup in parts.items()}
        return Shown(_digest(said + "".join(digests.values())), said, status.state, parts, digests)

    def _page(self, request: Request) -> Response:
        body = _whole(self.shown()).encode()
        return tagged(request, body, "text/html", f'"{hashlib.sha256(body).hexdigest()[:32]}"')

    def _state_json(self, request: Request) -> Response:
        shown = self.shown()
        told = {"title": shown.title, "state": shown.state.value, "parts": shown.digests}
        return tagged(request, json.dumps(told).encode(), "application/json", f'"{shown.token}"')

    def _part(self, request: Request) -> Response:
        shown, name = self.shown(), request.path_params["name"]
        if name not in shown.parts:
            return PlainTextResponse(f"there is no such part; there are {', '.join(shown.parts)}\n", 404)
        return tagged(request, shown.parts[name].encode(), "text/html", f'"{shown.digests[name]}"')

    async def _events(self, request: Request) -> Response:
        if self._pages >= MOST_PAGES:
            return PlainTextResponse(f"{MOST_PAGES} pages are open; close one\n", 503, headers={"retry-after": "10"})
        headers = {"cache-control": "no-store"}
        if request.method == "HEAD":
            return Response(media_type="text/event-stream", headers=headers)
        return StreamingResponse(self._stream(), media_type="text/event-stream", headers=headers)

    async def _stream(self) -> AsyncIterator[str]:
        """A line for each change, at most one in each pause, until the page is closed or the server stops."""
        self._pages += 1
        try:
            told, due, spoke = 0, 0.0, time.monotonic()
            while not self._stopping:
                now = time.monotonic()
                if self._version != told and now >= due:
                    told, due, spoke = self._version, now + self._pause, now
                    yield f"event: changed\ndata: {told}\n\n"
                elif now - spoke > PING_SECONDS:
                    spoke = now
                    yield ": ping\n\n"
                await asyncio.sleep(LISTEN_SECONDS)
        finally:
            self._pages -= 1

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        await asyncio.to_thread(self.look)
        self._following = asyncio.create_task(self._follow())
        yield
        self._following.cancel()
        with suppress(asyncio.CancelledError):
            await self._following

    async def _follow(self) -> None:
        while True:
            more = await asyncio.to_thread(self.look)
            await asyncio.sleep(0.0 if more else POLL_SECONDS)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _whole(shown: Shown) -> str:
    """The page with all its parts; without its script it shows what was there when it was loaded."""
    parts = "".join(
        f'<div class="part" id="part-{name}" data-digest="{shown.digests[name]}">{shown.parts[name]}</div>\n'
        for name in PARTS
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(shown.title)}</title>"
        '<link rel="stylesheet" href="/report.css"><link rel="stylesheet" href="/watch.css">'
        '<script src="/watch.js" defer></script></head>\n'
        '<body><p id="link" role="alert" hidden></p><main>'
        "<noscript><p>Load the page again to see what is new: it keeps itself up to date by a script.</p></noscript>"
        f"{parts}</main>"
        "<footer>Made by <code>xgen watch</code> from the files of the run folder, which it only reads. "
        "Times are those of this computer.</footer></body></html>\n"
    )
