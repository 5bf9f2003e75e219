"""A request on its way through the scheduler: its tokens, its place in the cache, and what its listener was told."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from xgen.infer.pages import page_key, root_key
from xgen.infer.protocol import Choice, Part, Row, Scores
from xgen.infer.request import Emitted, Event, Finished, FinishReason, Listener, Prefilled, PromptScores, Request, Token
from xgen.infer.text import TextStream

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Task:
    """`ids` are the prompt and the output so far; the first `computed` of them are in `pages`.

    `slot` is None while it waits. `farthest` is the most that `computed` ever was: what lies before it was told to the
    listener and counted, however often it is computed again. `cached` prompt tokens were not computed for this request.
    """

    number: int
    request: Request
    listener: Listener
    end_ids: Sequence[int]
    text: TextStream | None
    arrived: float
    ids: list[int] = field(init=False)
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    farthest: int = 0
    cached: int = 0
    scores: list[Token] = field(default_factory=list)
    first_token: float | None = None
    deaf: bool = False
    _keys: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ids = list(self.request.ids)

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.ids)

    @property
    def output(self) -> int:
        """Tokens drawn so far."""
        return len(self.ids) - self.prompt

    @property
    def left(self) -> int:
        """Tokens to be computed before the next one can be drawn."""
        return len(self.ids) - self.computed

    @property
    def decoding(self) -> bool:
        """Only the newest token, which was drawn, is not in the cache."""
        return self.output > 0 and self.left == 1

    @property
    def places(self) -> int:
        """Places needed to compute all its tokens and, if one more will be drawn, to go on from that one."""
        return min(len(self.ids) + 1, self.prompt + self.request.max_tokens)

    @property
    def enders(self) -> tuple[int, ...]:
        """Tokens that end it."""
        ends = () if self.request.ignore_eos else self.end_ids
        return tuple(dict.fromkeys((*ends, *self.request.stop_token_ids)))

    @property
    def top(self) -> bool:
        """Alternatives are to be reported."""
        return bool(self.request.top_logprobs)

    def keys(self, page: int) -> list[bytes]:
        """The names of the pages that its tokens fill, `page` tokens each."""
        for start in range(len(self._keys) * page, len(self.ids) - page + 1, page):
            parent = self._keys[-1] if self._keys else root_key(self.request.adapter)
            self._keys.append(page_key(parent, self.ids[start : start + page]))
        return self._keys

    def part(self, end: int) -> Part:
        """The stretch from what is computed to `end`."""
        assert self.slot is not None
        wanted = end == len(self.ids) and self.output < self.request.max_tokens
        return Part(self.slot, tuple(self.pages), self.ids[self.computed : end], self.computed, wanted, self.top)

    def row(self) -> Row:
        """The newest token, to be decoded."""
        assert self.slot is not None
        return Row(self.slot, tuple(self.pages), self.ids[-1], self.computed, self.top)

    def tell(self, event: Event) -> None:
        """Pass `event` on. A listener that raises is told nothing more."""
        if self.deaf:
            return
        try:
            self.listener(event)
        except Exception:  # noqa: BLE001 - whatever somebody else's code raises: the other requests go on
            _log.exception("the listener of request %d raised; the request is ended", self.number)
            self.deaf = True

    def reach(self, adopted: bool) -> int:
        """Tell how far it is. Gives the tokens of the prompt that were never in the cache before; when `adopted`, they
        were there for another request."""
        new = max(min(self.computed, self.prompt) - self.farthest, 0)
        self.farthest = max(self.farthest, self.computed)
        self.cached += new if adopted else 0
        if new:
            self.tell(Prefilled(min(self.computed, self.prompt), self.prompt, self.cached))
            if self.request.score_prompt and self.computed >= self.prompt:
                self.tell(PromptScores((Token(self.ids[0]), *self.scores)))
        return new

    def keep_scores(self, scores: Scores, end: int) -> None:
        """Take in the `scores` of the places from `computed` to `end`; those known from before it was put back stay."""
        top = self.request.top_logprobs or 0
        for place in range(len(self.scores) + 1, min(end + 1, self.prompt)):
            at = place - 1 - self.computed
            likeliest = _pairs(scores.top_ids[at], scores.top_logprobs[at], top)
            self.scores.append(Token(self.ids[place], float(scores.logprobs[at]), likeliest))

    def accept(self, choice: Choice, at: int) -> Finished | None:
        """Take in what was drawn and tell its text; what to finish with, if it was the last."""
        token = self._token(choice, at)
        self.ids.append(token.id)
        text, end = self._read(token.id)
        if end is None and self.output == self.request.max_tokens:
            end = self.finished("length")
        if end is not None:
            text += self.rest()
            if self.text is not None and self.text.stopped is not None:
                end = self.finished("stop", self.text.stopped)
        self.tell(Emitted(text, (token,)))
        return end

    def _token(self, choice: Choice, at: int) -> Token:
        drawn, top = int(choice.ids[at]), self.request.top_logprobs
        if top is None:
            return Token(drawn)
        return Token(drawn, float(choice.logprobs[at]), _pairs(choice.top_ids[at], choice.top_logprobs[at], top))

    def _read(self, token: int) -> tuple[str, Finished | None]:
        """The text that is certain after `token`, and the end if it is one. What ends a text is not in it."""
        if token in self.enders:
            own = token in self.end_ids and not self.request.ignore_eos
            return "", self.finished("stop", None if own else token)
        if self.text is None or token in self.end_ids:
            return "", None
        if self.output <= self.request.min_tokens:
            return self.text.early(token), None
        text = self.text.push(token)
        return text, None if self.text.stopped is None else self.finished("stop", self.text.stopped)

    def rest(self) -> str:
        """Text that was held back, once nothing can follow."""
        return "" if self.text is None else self.text.flush()

    def finished(self, reason: FinishReason, stopped_by: str | int | None = None) -> Finished:
        return Finished(reason, self.prompt, self.output, self.cached, stopped_by)


def _pairs(ids: Int[np.ndarray, " N"], logprobs: Float[np.ndarray, " N"], count: int) -> tuple[tuple[int, float], ...]:
    return tuple(zip(ids[:count].tolist(), logprobs[:count].tolist(), strict=True))
