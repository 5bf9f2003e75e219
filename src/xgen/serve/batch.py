"""Files of requests in OpenAI's batch form: one JSON object a line in, one a line out, in the same order.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}
    {"id": "...", "custom_id": "a", "response": {"status_code": 200, "request_id": "...", "body": {...}}, "error": null}

A request that is refused has its status and error body as a server would give them. A line that is no request has no
response but an `error` that names the line. Blank lines are no lines.
"""

from __future__ import annotations

import json
import queue
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from xgen.errors import DataError, StorageError, XgenError
from xgen.infer.engine import Engine
from xgen.infer.request import Event, Failed, Finished, Job
from xgen.serve.bodies import parse_json, quoted
from xgen.serve.openai import METHODS, Asked, Progress, RequestError, Translator, Whole, refusal
from xgen.serve.schemas import MOST_CHOICES

AHEAD = 4
"""Requests that are under way, for each slot: enough to keep all of them busy while the next lines are read."""

KEYS = {"custom_id", "method", "url", "body"}
ANSWER = {"custom_id", "response", "error"}

Json = dict[str, Any]


@dataclass(frozen=True)
class Tally:
    """Of a batch: lines answered, those of them with an error, and those that an earlier start had answered."""

    answered: int
    failed: int
    earlier: int


@dataclass
class _Line:
    """One line on its way. `answer` is what will be written, once it is known."""

    number: int
    custom_id: str | None = None
    answer: Json | None = None
    whole: Whole | None = None
    jobs: list[Job] = field(default_factory=list)


class Batch:
    """Answers the lines of `source` into `target`."""

    def __init__(self, engine: Engine, translator: Translator, slots: int) -> None:
        """`engine` has so many `slots` and a queue as `queue_for` says."""
        self._engine, self._translator, self._slots = engine, translator, slots
        self._events: queue.SimpleQueue[tuple[_Line, int, Event]] = queue.SimpleQueue()
        self._under_way: deque[_Line] = deque()
        self._ids: set[str] = set()
        self._failed = self._open = 0

    def run(self, source: Path, target: Path, *, resume: bool, report: Callable[[int], None]) -> Tally:
        """`resume`: go on after the lines that `target` has already; else it must not be there. `report` is told how
        many lines have been answered.

        Raises DataError when `source` cannot be read or `target` is of another batch or no file of answers,
        StorageError when `target` cannot be written, Broken when the engine cannot go on.
        """
        check_target(source, target, resume=resume)
        earlier = self._earlier(source, target) if resume else 0
        try:
            with target.open("a" if resume else "x", encoding="utf-8") as file:
                answered = earlier
                for line in self._lines(source, earlier):
                    self._under_way.append(line)
                    while len(self._under_way) >= AHEAD * self._slots:
                        answered += self._write(file)
                        report(answered)
                while self._under_way:
                    answered += self._write(file)
                    report(answered)
        except OSError as cause:
            raise StorageError.writing(target, cause) from cause
        finally:
            for line in self._under_way:
                _cancel(line)
        return Tally(answered - earlier, self._failed, earlier)

    def _earlier(self, source: Path, target: Path) -> int:
        """How many lines `target` has answers to; half a line at its end is taken off."""
        names, size = answers_in(source, target)
        self._ids.update(name for name in names if name is not None)
        if target.exists() and size < target.stat().st_size:
            with target.open("r+b") as file:
                file.truncate(size)
        return len(names)

    def _lines(self, source: Path, skipped: int) -> Iterator[_Line]:
        """The lines after the first `skipped`, submitted to the engine."""
        for count, (number, data) in enumerate(_numbered(source)):
            if count >= skipped:
                line = _Line(number)
                try:
                    self._begin(line, parse_json(data))
                except RequestError as error:
                    self._refuse(line, error)
                yield line

    def _begin(self, line: _Line, value: Any) -> None:
        """Raises RequestError for a body that is refused; what is no request is answered at once."""
        try:
            method, body = self._request(line, value)
        except DataError as error:
            line.answer = _answer(line, None, {"code": "invalid_line", "message": f"line {line.number}: {error}"})
            return
        asked = method(self._translator, body)
        if asked.stream:
            raise RequestError("a batch is not streamed; leave it out", param="stream", code="unsupported_parameter")
        line.whole = Whole(Progress(asked, self._engine.description))
        self._submit(line, asked)

    def _request(self, line: _Line, value: Any) -> tuple[Callable[[Translator, Any], Asked], Any]:
        if not isinstance(value, dict):
            raise DataError(f"it is {quoted(value)}, no JSON object")
        custom_id, url = value.get("custom_id"), value.get("url")
        if not isinstance(custom_id, str):
            raise DataError(f"custom_id is {quoted(custom_id)}; give each request a text of its own")
        line.custom_id = custom_id
        if custom_id in self._ids:
            raise DataError(f"custom_id {quoted(custom_id)} was given to an earlier line; each needs its own")
        if unknown := sorted(value.keys() - KEYS):
            raise DataError(f"{quoted(unknown[0])} is no field of a request; leave it out")
        if value.get("method") != "POST" or not isinstance(url, str) or url not in METHODS:
            wanted = " or ".join(METHODS)
            raise DataError(f"it asks for {value.get('method')!r:.40} {url!r:.80}; it must be POST {wanted}")
        self._ids.add(custom_id)
        return METHODS[url], value.get("body")

    def _submit(self, line: _Line, asked: Asked) -> None:
        def hear(at: int, event: Event) -> None:
            self._events.put((line, at, event))

        while self._open and self._open + len(asked.requests) > AHEAD * self._slots:
            self._hear(*self._events.get())
        try:
            for at, request in enumerate(asked.requests):
                self._open += 1
                line.jobs.append(self._engine.submit(request, partial(hear, at)))
        except XgenError as error:
            self._open -= 1
            _cancel(line)
            raise refusal(error, asked.prompt_field) from error

    def _refuse(self, line: _Line, error: RequestError) -> None:
        """Raises Broken when the engine is: the lines that follow are not at fault."""
        if self._engine.broken is not None:
            raise self._engine.broken from error
        line.whole = None
        if line.custom_id is None:
            line.answer = _answer(line, None, {"code": error.code, "message": f"line {line.number}: {error}"})
        else:
            line.answer = _answer(line, _response(error.status, error.body()), None)

    def _write(self, file: IO[str]) -> int:
        """Wait for the first line's answer, write it, and all that follow and are known; how many."""
        while self._under_way[0].answer is None:
            self._hear(*self._events.get())
        written = 0
        while self._under_way and (answer := self._under_way[0].answer) is not None:
            file.write(json.dumps(answer, ensure_ascii=False, allow_nan=False) + "\n")
            self._failed += answer["error"] is not None or answer["response"]["status_code"] != 200
            self._under_way.popleft()
            written += 1
        file.flush()
        return written

    def _hear(self, line: _Line, at: int, event: Event) -> None:
        self._open -= isinstance(event, Finished | Failed)
        if line.whole is None:
            return  # what others of its answers say after one of them failed
        try:
            line.whole.take(at, event)
        except RequestError as error:
            _cancel(line)
            self._refuse(line, error)
            return
        if line.whole.progress.done:
            line.answer = _answer(line, _response(200, line.whole.body()), None)


def queue_for(slots: int) -> int:
    """What an engine's queue has to hold for a batch."""
    return AHEAD * slots + MOST_CHOICES


def check_target(source: Path, target: Path, *, resume: bool) -> None:
    """Raises DataError where the answers to `source` cannot go to `target`."""
    if target.exists():
        if source.exists() and target.samefile(source):
            raise DataError(f"{target} has the requests themselves; name another file for their answers")
        if not resume:
            raise DataError(f"{target} is there already; go on with it with --resume, or name another file")


def answers_in(source: Path, target: Path) -> tuple[list[str | None], int]:
    """The custom_id of each answer that `target` has, and their bytes, which half a line may follow.

    Raises DataError where `target` cannot be read, is no file of answers, or has those to other requests.
    """
    try:
        data = target.read_bytes() if target.exists() else b""
    except OSError as cause:
        raise DataError(f"cannot read {target}: {cause.strerror or cause}") from cause
    whole = data[: data.rfind(b"\n") + 1]
    names = []
    requests = _numbered(source)
    for at, answer in enumerate(whole.splitlines(), 1):
        _, asked = next(requests, (0, b""))
        if not _fields(answer).keys() >= ANSWER:
            raise DataError(f"{target} is no file of answers: its line {at} is none; name another file")
        found, wanted = _custom_id(answer), _custom_id(asked)
        if not asked or found != wanted:
            raise DataError(
                f"{target} is of another batch: its line {at} answers {found!r}, where {source} asks {wanted!r}; "
                "name another file"
            )
        names.append(wanted)
    return names, len(whole)


def count_lines(source: Path) -> int:
    """How many requests `source` has. Raises DataError when it cannot be read."""
    return sum(1 for _ in _numbered(source))


def _numbered(source: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1 on."""
    try:
        with source.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as cause:
        raise DataError(f"cannot read {source}: {cause.strerror or cause}") from cause


def _custom_id(data: bytes) -> str | None:
    """That of a line of either file; None where it has none."""
    found = _fields(data).get("custom_id")
    return found if isinstance(found, str) else None


def _fields(data: bytes) -> Json:
    """Those of a line; none where it is no JSON object."""
    try:
        value = parse_json(data)
    except RequestError:
        return {}
    return value if isinstance(value, dict) else {}


def _answer(line: _Line, response: Json | None, error: Json | None) -> Json:
    number = f"batch_req_{secrets.token_hex(12)}"
    return {"id": number, "custom_id": line.custom_id, "response": response, "error": error}


def _response(status: int, body: Json) -> Json:
    return {"status_code": status, "request_id": f"req-{secrets.token_hex(8)}", "body": body}


def _cancel(line: _Line) -> None:
    for job in line.jobs:
        job.cancel()
