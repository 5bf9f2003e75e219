"""A body's requests at the engine: events come from the engine's thread into the loop's, and end with the asker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

from starlette.types import Receive, Send

from xgen.errors import XgenError
from xgen.infer.engine import Engine
from xgen.infer.request import Event, Job, PromptScores
from xgen.serve.answer import Chunks, Progress, Whole
from xgen.serve.doors import Gone, json_bytes
from xgen.serve.refusals import RequestError, refusal
from xgen.serve.translate import Asked

Result = TypeVar("Result")

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    # A proxy that gathers the answer would turn the stream into a pause.
    (b"x-accel-buffering", b"no"),
]
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


class Call:
    """The jobs of one body. `cancel` frees what they hold; it may be called at any time, also when all have ended."""

    def __init__(self, engine: Engine, asked: Asked) -> None:
        """Submits all of them, or none. Raises RequestError. Call it in the loop."""
        self.progress = Progress(asked, engine.description)
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._jobs: list[Job] = []
        try:
            for at, request in enumerate(asked.requests):
                self._jobs.append(engine.submit(request, partial(self._hear, at)))
        except XgenError as error:
            self.cancel()
            raise refusal(error, asked.prompt_field) from error

    def cancel(self) -> None:
        for job in self._jobs:
            job.cancel()

    async def next(self) -> list[tuple[int, Event]]:
        """The events that have come since the last time, at least one."""
        found = [await self._events.get()]
        while not self._events.empty():
            found.append(self._events.get_nowait())
        return found

    def _hear(self, at: int, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, (at, event))


async def whole_answer(call: Call, receive: Receive) -> dict[str, Any]:
    """The answer that is not streamed. Raises RequestError, and Gone when nobody waits for it any more."""

    async def gather() -> dict[str, Any]:
        whole = Whole(call.progress)
        while not call.progress.done:
            await _taken(whole.take, await call.next())
        return await asyncio.to_thread(whole.body)

    try:
        return await unless_gone(gather(), receive)
    finally:
        call.cancel()


async def stream_answer(
    call: Call, receive: Receive, send: Send, *, ping_seconds: float, heard: Callable[[str], None]
) -> RequestError | None:
    """Send the answer as server-sent events, to `[DONE]` or to the error that is given back; `heard` is told the JSON
    of every event. Raises Gone when nobody listens any more."""

    async def write(data: bytes, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": more})

    def written(chunks: list[dict[str, Any]]) -> bytes:
        texts = [json_bytes(chunk) for chunk in chunks]
        for text in texts:
            heard(text.decode())
        return b"".join(b"data: " + text + b"\n\n" for text in texts)

    async def tell() -> RequestError | None:
        await send({"type": "http.response.start", "status": 200, "headers": list(STREAM_HEADERS)})
        chunks = Chunks(call.progress)

        def taken(at: int, event: Event) -> bytes:
            return written(chunks.take(at, event))

        await write(written(chunks.begin()))
        try:
            while not call.progress.done:
                try:
                    async with asyncio.timeout(ping_seconds):
                        events = await call.next()
                except TimeoutError:
                    await write(PING)
                    continue
                if data := b"".join(await _taken(taken, events)):
                    await write(data)
        except RequestError as error:
            await write(written([error.body()]), more=False)
            return error
        await write(written(chunks.end()) + DONE, more=False)
        return None

    try:
        return await unless_gone(tell(), receive)
    finally:
        call.cancel()


async def _taken(take: Callable[[int, Event], Result], events: Sequence[tuple[int, Event]]) -> list[Result]:
    """What `take` makes of each event. The scores of a long prompt take their time to tell, and the others do not wait
    for it; a thread for each token would cost more than the token."""

    def all_of_them() -> list[Result]:
        return [take(at, event) for at, event in events]

    if any(isinstance(event, PromptScores) for _, event in events):
        return await asyncio.to_thread(all_of_them)
    return all_of_them()


async def unless_gone(work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """The result of `work`, which is given up as soon as the asker closes the connection: Gone is then raised."""
    working, watching = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
