"""What the engine tells of a body's requests, taken in the thread that asks."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from xgen.errors import XgenError
from xgen.infer.engine import Engine
from xgen.infer.request import Event, Failed, Finished, Job
from xgen.serve.refusals import refusal
from xgen.serve.translate import Asked

Told = tuple[int, Event]
"""Which of the requests, and what became of it."""


@contextmanager
def listening(engine: Engine, asked: Asked) -> Iterator[Iterator[Told]]:
    """Submit the requests of `asked`; gives what is told of them, to the last one's end. Whatever is still under way
    when the context is left is cancelled. Raises RequestError."""
    events: queue.SimpleQueue[Told] = queue.SimpleQueue()
    jobs: list[Job] = []

    def hear(at: int, event: Event) -> None:
        events.put((at, event))

    def told() -> Iterator[Told]:
        ended = 0
        while ended < len(jobs):
            at, event = events.get()
            ended += isinstance(event, Finished | Failed)
            yield at, event

    try:
        for at, request in enumerate(asked.requests):
            jobs.append(engine.submit(request, partial(hear, at)))
        yield told()
    except XgenError as error:
        raise refusal(error, asked.prompt_field) from error
    finally:
        for job in jobs:
            job.cancel()
