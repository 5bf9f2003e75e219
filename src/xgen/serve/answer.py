"""From the engine's events to the answers of the interface, whole or as a stream's chunks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from xgen.convert.description import Description
from xgen.infer.request import Emitted, Event, Failed, Finished, Prefilled, PromptScores, Token
from xgen.serve.refusals import RequestError, failure
from xgen.serve.told import CompletionLogprobs, chat_logprobs
from xgen.serve.translate import Asked, Echo
from xgen.tokens.tokenizer import Tokenizer

Json = dict[str, Any]


@dataclass
class _Answer:
    """One answer as far as it is known; `told` makes its log-probabilities."""

    echo: Echo | None
    told: CompletionLogprobs
    started: bool = False
    scores: tuple[Token, ...] | None = None
    finished: Finished | None = None


@dataclass
class Piece:
    """What an event adds to an answer: `logprobs` is in the shape that was asked for, None where it was not."""

    text: str
    logprobs: Any
    finished: Finished | None = None


class Progress:
    """The answers to one body, fed with the engine's events."""

    def __init__(self, asked: Asked, description: Description) -> None:
        assert description.tokenizer is not None
        self.asked = asked
        self._tokenizer: Tokenizer = description.tokenizer
        self._ends: tuple[int, ...] = description.end_ids
        self._answers = [
            _Answer(echo, CompletionLogprobs(self._tokenizer, self._silent(at))) for at, echo in enumerate(asked.echoes)
        ]

    @property
    def done(self) -> bool:
        return all(answer.finished for answer in self._answers)

    @property
    def finish_reasons(self) -> list[str]:
        """Of the answers that have ended."""
        return [answer.finished.reason for answer in self._answers if answer.finished]

    def take(self, at: int, event: Event) -> Piece | None:
        """What `event` adds to answer `at`, if anything. Raises RequestError where the engine failed or gave up."""
        answer = self._answers[at]
        if isinstance(event, Failed):
            raise failure(event.error) from event.error
        if isinstance(event, PromptScores):
            answer.scores = event.tokens
            return self._begin(answer)
        if isinstance(event, Emitted):
            begun = None if answer.started else self._begin(answer)
            logprobs = self._logprobs(answer, at, event.tokens)
            if begun is not None:
                return Piece(begun.text + event.text, _joined(begun.logprobs, logprobs))
            return Piece(event.text, logprobs)
        if isinstance(event, Finished):
            if event.reason == "cancelled":
                raise RequestError(
                    "the server is shutting down and could not finish this answer", status=503, code="cancelled"
                )
            answer.finished = event
            begun = None if answer.started else self._begin(answer)
            return Piece(begun.text if begun else "", begun.logprobs if begun else None, event)
        return None

    def ending(self, at: int) -> Json:
        """How answer `at` ended."""
        finished = self._answers[at].finished
        assert finished is not None
        own = finished.stopped_by in self.asked.turn_ends
        return {"finish_reason": finished.reason, "stop_reason": None if own else finished.stopped_by}

    def usage(self) -> Json:
        """The token counts; those of a prompt count once, however many answers it has."""
        counts = [answer.finished for answer in self._answers if answer.finished]
        firsts = [answer.finished for answer in self._answers[:: self.asked.n] if answer.finished]
        prompt, output = sum(one.prompt_tokens for one in firsts), sum(one.output_tokens for one in counts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in firsts)},
        }

    def head(self, kind: str) -> Json:
        """What every object of the answer begins with."""
        asked = self.asked
        return {"id": asked.id, "object": kind, "created": asked.created, "model": asked.model}

    def _begin(self, answer: _Answer) -> Piece | None:
        """The echoed prompt, which comes once and first."""
        answer.started = True
        if answer.echo is None:
            return None
        logprobs = None
        if answer.scores is not None:
            logprobs = answer.told.add(answer.scores, unseen=answer.echo.unseen, text=answer.echo.text)
        return Piece(answer.echo.text, logprobs)

    def _logprobs(self, answer: _Answer, at: int, tokens: tuple[Token, ...]) -> Any:
        if self.asked.logprobs is None:
            return None
        if self.asked.kind == "completion":
            return answer.told.add(tokens)
        shown = [token for token in tokens if token.id not in self._silent(at)]
        return {"content": chat_logprobs(self._tokenizer, shown), "refusal": None}

    def _silent(self, at: int) -> Collection[int]:
        """Tokens of which answer `at` has no text."""
        request = self.asked.requests[at]
        return (*(() if request.ignore_eos else self._ends), *request.stop_token_ids)


@dataclass
class Whole:
    """Gathers the answers to a body that is not streamed."""

    progress: Progress
    _texts: dict[int, list[str]] = field(default_factory=dict)
    _logprobs: dict[int, list[Any]] = field(default_factory=dict)

    def take(self, at: int, event: Event) -> None:
        """Take in what the engine says of answer `at`. Raises RequestError where it failed."""
        piece = self.progress.take(at, event)
        if piece is not None:
            self._texts.setdefault(at, []).append(piece.text)
            self._logprobs.setdefault(at, []).append(piece.logprobs)

    def body(self) -> Json:
        """The whole answer, once all have finished."""
        progress, asked = self.progress, self.progress.asked
        chat = asked.kind == "chat"
        choices = [self._choice(at) for at in range(len(asked.requests))]
        found = progress.head("chat.completion" if chat else "text_completion")
        found |= {"choices": choices, "usage": progress.usage()}
        if asked.truncation is not None:
            found["truncation"] = asked.truncation
        return found

    def _choice(self, at: int) -> Json:
        text = "".join(self._texts[at])
        chat = self.progress.asked.kind == "chat"
        said: Json = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
        return {"index": at} | said | {"logprobs": _joined(*self._logprobs[at])} | self.progress.ending(at)


class Chunks:
    """Makes the chunks of a streamed answer, each of them a JSON object."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._asked = progress, progress.asked
        self._chat = self._asked.kind == "chat"
        self._head = progress.head("chat.completion.chunk" if self._chat else "text_completion")
        if self._asked.include_usage:
            self._head["usage"] = None

    def begin(self) -> list[Json]:
        """Before anything else: who speaks, and what was left out of the prompt."""
        chunks = []
        if self._chat:
            role = {"role": "assistant", "content": ""}
            chunks = [self._chunk(at, role, None) for at in range(len(self._asked.requests))]
        elif self._asked.truncation is not None:
            chunks = [self._head | {"choices": []}]
        if self._asked.truncation is not None:
            chunks[0]["truncation"] = self._asked.truncation
        return chunks

    def take(self, at: int, event: Event) -> list[Json]:
        """The chunks that an event makes. Raises RequestError where the engine failed."""
        if isinstance(event, Prefilled):
            if not self._asked.progress:
                return []
            told = {"index": at, "done": event.done, "total": event.total, "cached": event.cached}
            return [self._head | {"choices": [], "prompt_progress": told}]
        piece = self._progress.take(at, event)
        if piece is None:
            return []
        chunks = []
        if piece.text or _tokens_in(piece.logprobs):
            said = {"content": piece.text} if self._chat else piece.text
            chunks.append(self._chunk(at, said, piece.logprobs))
        if piece.finished is not None:
            chunks.append(self._chunk(at, {} if self._chat else "", None, **self._progress.ending(at)))
        return chunks

    def end(self) -> list[Json]:
        """After everything else: the token counts, where they were asked for."""
        return [self._head | {"choices": [], "usage": self._progress.usage()}] if self._asked.include_usage else []

    def _chunk(self, at: int, said: Any, logprobs: Any, **ending: Any) -> Json:
        choice = {"index": at, "delta" if self._chat else "text": said, "logprobs": logprobs, "finish_reason": None}
        return self._head | {"choices": [choice | ending]}


def _tokens_in(logprobs: Any) -> bool:
    return logprobs is not None and bool(logprobs["content"] if "content" in logprobs else logprobs["tokens"])


def _joined(*parts: Any) -> Any:
    """Log-probabilities of an answer's beginning and of what follows."""
    told = [part for part in parts if part is not None]
    if len(told) < 2:
        return told[0] if told else None
    return {
        key: None if first is None else list(chain.from_iterable(part[key] for part in told))
        for key, first in told[0].items()
    }
