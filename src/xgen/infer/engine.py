"""The engine: one thread that asks the programs, and the requests of all other threads."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType

from xgen.convert.description import Description
from xgen.errors import XgenError
from xgen.infer.check import BadRequest, TooLong, check
from xgen.infer.protocol import Program
from xgen.infer.request import Emitted, Event, Failed, Finished, Job, Listener, PromptScores, Request, Token
from xgen.infer.scheduler import Scheduler
from xgen.infer.statistics import Statistics
from xgen.infer.task import Task
from xgen.infer.text import TextStream

_log = logging.getLogger(__name__)

MOST_FAILURES = 3
"""Program calls that raise one after the other before the engine gives up: one may be bad luck with memory, but where
the cache itself was lost no call works again."""

__all__ = ["BadRequest", "Broken", "Completion", "Draining", "Engine", "Overloaded", "TooLong"]


class Overloaded(XgenError):  # noqa: N818 - it says what is the matter
    """Too many requests wait already; try again later."""


class Draining(XgenError):  # noqa: N818 - it says what is the matter
    """The engine takes no new requests: it is being shut down."""


class Broken(XgenError):  # noqa: N818 - it says what is the matter
    """The engine cannot go on; its cause says why."""

    exit_code = 1


@dataclass(frozen=True)
class Completion:
    """The whole answer to a request. `tokens` are all that were drawn, the one that ended it included, of which `text`
    has nothing. `prompt_scores` are the prompt's tokens, where they were asked for."""

    text: str
    tokens: tuple[Token, ...]
    finished: Finished
    prompt_scores: tuple[Token, ...] | None = None


class Engine:
    """Threads may share an Engine. Used as a context, it is started, and closed at the end."""

    def __init__(self, program: Program, description: Description, *, queue: int = 256) -> None:
        """`queue`: most requests that wait besides those that have a slot.

        Raises RecipeError where the program's pool of pages cannot hold one row.
        """
        self.window = program.window
        self.description = description
        self.adapters = tuple(program.adapters)
        self._scheduler = Scheduler(program)
        self._most = queue + program.slots
        self._thread = threading.Thread(target=self._work, name="xgen-engine", daemon=True)
        self._change = threading.Condition()  # guards all that follows; told after every step
        self._arrived: list[Task] = []
        self._cancelled: list[int] = []
        self._open = 0
        self._jobs = 0
        self._rejected = 0
        self._draining = self._closing = False
        self._broken: Broken | None = None
        self._statistics = self._scheduler.statistics()

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def broken(self) -> Broken | None:
        """Why the engine cannot go on, if so; it is then of no use any more."""
        return self._broken

    def start(self) -> None:
        """Begin to work. The program is warm already, or the first requests wait for it to compile."""
        self._thread.start()

    def submit(self, request: Request, listener: Listener) -> Job:
        """Take in `request`; `listener` is told of it from the engine's thread.

        Raises TooLong when prompt and `max_tokens` exceed the window, BadRequest (a DataError) for anything else that
        cannot be, Overloaded when the queue is full, Draining after `drain` or `close`, Broken when the engine is.
        """
        return self._submit(request, listener, patient=False)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The answers to `requests`, in their order; waits for them, and for room in the queue.

        Raises what `submit` raises but Overloaded, before any is computed where one cannot be, and the error of the
        first of them that failed. The others are then cancelled.
        """
        for request in requests:
            check(request, self.description, self.window, self.adapters)
        if self._thread.ident is None:
            raise RuntimeError("start() the engine before it is asked to generate")
        answers = [_Answer() for _ in requests]
        jobs: list[Job] = []
        try:
            for request, answer in zip(requests, answers, strict=True):
                jobs.append(self._submit(request, answer, patient=True))
            return [answer.wait() for answer in answers]
        finally:
            for job, answer in zip(jobs, answers, strict=False):
                if not answer.ended.is_set():
                    job.cancel()

    def statistics(self) -> Statistics:
        """The state after the latest step, with what has come in since then."""
        with self._change:
            waiting = self._open - self._statistics.running
            return replace(self._statistics, waiting=waiting, rejected=self._rejected)

    def drain(self, seconds: float) -> bool:
        """Take in nothing new, and wait for what is under way for at most so long; whether all of it ended."""
        with self._change:
            self._draining = True
            self._change.notify_all()
            return self._change.wait_for(lambda: self._open == 0, seconds)

    def close(self) -> None:
        """Cancel all that is under way and end the thread."""
        with self._change:
            self._draining = self._closing = True
            self._change.notify_all()
        if self._thread.ident is None:
            self._end()
        else:
            self._thread.join()

    def _submit(self, request: Request, listener: Listener, *, patient: bool) -> Job:
        check(request, self.description, self.window, self.adapters)
        with self._change:
            if patient:
                self._change.wait_for(lambda: self._open < self._most or self._draining or self._broken is not None)
            if self._broken is not None:
                raise self._broken
            if self._draining:
                raise Draining("the server is shutting down and takes no new requests; ask another one")
            if self._open >= self._most:
                self._rejected += 1
                raise Overloaded(f"{self._open} requests are under way or wait already; try again later")
            self._jobs += 1
            task = self._task(self._jobs, request, listener)
            self._open += 1
            self._arrived.append(task)
            self._change.notify_all()
        return Job(task.number, request, partial(self._cancel, task.number))

    def _task(self, number: int, request: Request, listener: Listener) -> Task:
        tokenizer, ends = self.description.tokenizer, self.description.end_ids
        text = None if tokenizer is None else TextStream(tokenizer, request.stop)
        return Task(number, request, listener, ends, text, time.monotonic())

    def _cancel(self, number: int) -> None:
        with self._change:
            self._cancelled.append(number)
            self._change.notify_all()

    # The engine's thread

    def _work(self) -> None:
        try:
            while self._take():
                self._scheduler.step()
                if len(self._scheduler.failures) >= MOST_FAILURES:
                    raise self._scheduler.failures[0]
            self._end()
        except BaseException as cause:  # noqa: BLE001 - a thread that died silently would leave everybody waiting
            self._break(cause)

    def _take(self) -> bool:
        """Tell the others what the last step changed, wait for something to do and take it in; False at the end."""
        with self._change:
            self._publish()
            self._change.wait_for(lambda: self._scheduler.count or self._arrived or self._cancelled or self._closing)
            if self._closing:
                return False
            self._let_in()
            cancelled, self._cancelled = self._cancelled, []
        for number in cancelled:
            self._scheduler.cancel(number)
        return True

    def _let_in(self) -> None:
        for task in self._arrived:
            self._scheduler.add(task)
        self._arrived = []

    def _publish(self) -> None:
        self._open = self._scheduler.count + len(self._arrived)
        self._statistics = self._scheduler.statistics()
        self._change.notify_all()

    def _end(self) -> None:
        with self._change:
            self._let_in()
        self._scheduler.cancel_all()
        with self._change:
            self._publish()

    def _break(self, cause: BaseException) -> None:
        _log.critical("the engine stops", exc_info=cause)
        error = Broken(f"the engine stopped, and has to be started anew: {type(cause).__name__}: {cause}")
        error.__cause__ = cause
        with self._change:
            self._broken = error
            self._let_in()
        self._scheduler.fail_all(error)
        with self._change:
            self._publish()


@dataclass
class _Answer:
    """A listener that gathers a Completion."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    scores: tuple[Token, ...] | None = None
    last: Finished | Failed | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Emitted):
            self.text += event.text
            self.tokens.extend(event.tokens)
        elif isinstance(event, PromptScores):
            self.scores = event.tokens
        elif isinstance(event, Finished | Failed):
            self.last = event
            self.ended.set()

    def wait(self) -> Completion:
        self.ended.wait()
        assert self.last is not None
        if isinstance(self.last, Failed):
            raise self.last.error
        return Completion(self.text, tuple(self.tokens), self.last, self.scores)
