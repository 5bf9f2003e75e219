"""A Server on a socket: it answers while the model loads, and when told to stop it lets what is under way end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from xgen.serve.app import Model, Server
from xgen.serve.logs import note

HEADER_SECONDS = 10.0
"""For the head of a request to come in; the library itself waits for ever."""

KEEP_ALIVE_SECONDS = 60
"""An idle connection is kept for so long."""

CANCEL_SECONDS = 2.0
"""For answers that were cancelled to tell their askers so."""

LOOK_SECONDS = 0.05
"""Between two looks whether all has ended."""

Awaited = Literal["head", "body", "reader"]
"""What a connection may be kept waiting for."""


def run(server: Server, listening: socket.socket, load: Callable[[], Model]) -> None:
    """Answer until SIGTERM or SIGINT, then drain and return; a second signal does not wait.

    `load` is called in a thread of its own, and the model's engine is closed at the end. Call it on the main thread.

    Raises what `load` raises.
    """
    http = Http(server)
    failed: list[Exception] = []

    def loading() -> None:
        try:
            server.model = load()
        except Exception as error:  # noqa: BLE001 - it is raised again in the main thread
            failed.append(error)
            http.should_exit = True
        else:
            note("ready", model=server.model.translator.name)

    loader = threading.Thread(target=loading, name="xgen-load", daemon=True)
    loader.start()
    http.run(sockets=[listening])
    if failed:
        raise failed[0]
    if loader.is_alive():
        # Nothing interrupts a compilation, and the end of the interpreter beneath it would be a crash.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class Http(uvicorn.Server):
    """Ends when what is under way has ended, not as soon as it is told to."""

    def __init__(self, server: Server) -> None:
        config = uvicorn.Config(
            server,
            http=Patient,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=round(CANCEL_SECONDS),
        )
        super().__init__(config)
        self._server = server
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the library gives it
        """The signal handler. The library's own would refuse connections from now on, and raise the signal again."""
        if self._server.draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._server.draining = True
        self._loop.call_soon_threadsafe(self._begin, signal.Signals(sig).name)

    def _begin(self, name: str) -> None:
        self._draining = asyncio.create_task(self._drain(name))

    async def _drain(self, name: str) -> None:
        begun, server = self._server.under_way, self._server
        note("draining", signal=name, under_way=begun, seconds=server.options.drain_seconds)
        if not await self._ended(server.options.drain_seconds):
            note("cancelling", level=logging.WARNING, under_way=server.under_way)
            server.cancel()
            await self._ended(CANCEL_SECONDS)
        self.should_exit = True

    async def _ended(self, seconds: float) -> bool:
        """Wait for so long until no request is under way."""
        try:
            async with asyncio.timeout(seconds):
                while self._server.under_way:
                    await asyncio.sleep(LOOK_SECONDS)
        except TimeoutError:
            return False
        return True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self._server.model is not None:
            # While the loop still takes what the engine tells of the requests that it ends.
            await asyncio.to_thread(self._server.model.engine.close)
        note("stopped")


class Patient(H11Protocol):
    """Closes a connection that is kept waiting: for the head of a request (HEADER_SECONDS), for the rest of a body that
    is already answered (`body_seconds`), or for its answer to be taken (`send_seconds`).

    A refused body is read on for a while, since a connection that is closed in the middle of it takes the answer along.
    What nobody takes is thrown away: a transport that is told to close waits for ever until all was read.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config.app, Server)
        self._options = config.app.options
        self._timers: dict[Awaited, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait("head", HEADER_SECONDS)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._wait("head", HEADER_SECONDS)
        else:
            self._stop_waiting("head")
        if not self._answered_early():
            self._stop_waiting("body")

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._wait("reader", self._options.send_seconds)
        elif self._answered_early():
            self._wait("body", self._options.body_seconds)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait("reader", self._options.send_seconds)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_waiting("reader")
        if self.transport.is_closing():
            self._wait("reader", self._options.send_seconds)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._abandon()

    def connection_lost(self, exc: Exception | None) -> None:
        for what in tuple(self._timers):
            self._stop_waiting(what)
        super().connection_lost(exc)

    def _answered_early(self) -> bool:
        return self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY

    def _wait(self, what: Awaited, seconds: float) -> None:
        if what not in self._timers:
            self._timers[what] = self.loop.call_later(seconds, self._late, what)

    def _stop_waiting(self, what: Awaited) -> None:
        if what in self._timers:
            self._timers.pop(what).cancel()

    def _late(self, what: Awaited) -> None:
        del self._timers[what]
        self.transport.close()
        self._abandon()

    def _abandon(self) -> None:
        """Let go of what was written and not read."""
        if unread := self.transport.get_write_buffer_size():
            note("abandoned", client=self.client[0] if self.client else None, unread_bytes=unread)
            self.transport.abort()
