"""A listener that keeps what it is told, and holds the engine to the order of events."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Event as Flag

from xgen.infer.request import Emitted, Event, Failed, Finished, Prefilled, PromptScores, Token


@dataclass
class Told:
    """What became of one request."""

    prefilled: list[Prefilled] = field(default_factory=list)
    scores: tuple[Token, ...] | None = None
    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    last: Finished | Failed | None = None
    begun: Flag = field(default_factory=Flag)
    ended: Flag = field(default_factory=Flag)

    def __call__(self, event: Event) -> None:
        assert self.last is None, "something was told after the end"
        if isinstance(event, Prefilled):
            assert not self.tokens
            assert event.done > (self.prefilled[-1].done if self.prefilled else 0)
            assert event.cached <= event.done <= event.total
            self.prefilled.append(event)
        elif isinstance(event, PromptScores):
            assert self.scores is None
            assert not self.tokens
            self.scores = event.tokens
        elif isinstance(event, Emitted):
            assert event.text or event.tokens, "nothing is new"
            self.text += event.text
            self.tokens.extend(event.tokens)
            self.begun.set()
        else:
            self.last = event
            self.ended.set()

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def finished(self) -> Finished:
        assert isinstance(self.last, Finished), self.last
        return self.last
