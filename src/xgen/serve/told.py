"""Tokens with their log-probabilities, in the two shapes that OpenAI tells them."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from xgen.infer.request import Token
from xgen.tokens.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""What OpenAI tells of tokens that are as good as impossible; JSON has no minus infinity."""


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[Token]) -> list[dict[str, Any]]:
    """The shape of chats: {"token", "logprob", "bytes", "top_logprobs"} for each of `tokens`."""
    return [
        _chat_token(tokenizer, token.id, token.logprob)
        | {"top_logprobs": [_chat_token(tokenizer, index, logprob) for index, logprob in token.top]}
        for token in tokens
    ]


def _chat_token(tokenizer: Tokenizer, index: int, logprob: float | None) -> dict[str, Any]:
    data = tokenizer.token_bytes(index)
    return {"token": data.decode("utf-8", errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float | None) -> float | None:
    if logprob is None:
        return None
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB  # also where it is NaN


class CompletionLogprobs:
    """The shape of completions: four lists, a place for each token. `text_offset` counts characters of the answer's
    text, the echoed prompt included, and goes on from call to call."""

    def __init__(self, tokenizer: Tokenizer, silent: Collection[int]) -> None:
        """`silent` are tokens of which the text has nothing."""
        self._tokenizer, self._silent = tokenizer, silent
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._characters = 0
        self._names: dict[int, str] = {}

    def add(self, tokens: Sequence[Token], *, unseen: int = 0, text: str | None = None) -> dict[str, list[Any]]:
        """The lists for `tokens`, of which the text has nothing of the first `unseen`. `text`, where it is known, is
        that of these tokens: some tokenizers put a space before it, which is then no part of it."""
        offsets = []
        lead = None
        for place, token in enumerate(tokens):
            data = self._tokenizer.token_bytes(token.id)
            shown = place >= unseen and token.id not in self._silent
            if shown and lead is None and text is not None:
                lead = data.startswith(b" ") and not text.startswith(" ")
                data = data[1:] if lead else data
            offsets.append(self._characters + (shown and self._breaks_off(data)))
            self._characters += len(self._decoder.decode(data)) if shown else 0
        if text is not None:
            # What follows is another text: it does not complete a character that this one breaks off in.
            self._characters += len(self._decoder.decode(b"", final=True))
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _breaks_off(self, data: bytes) -> bool:
        """Whether `data` leaves a character before it incomplete, which then stands in the text as U+FFFD."""
        pending = self._decoder.getstate()[0]
        if not pending:
            return False
        trial = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return trial.decode(pending + data[:1]).startswith("\ufffd")

    def _top(self, token: Token) -> dict[str, float] | None:
        """The likeliest, and the token itself where it is none of them; of two with one name, the likelier."""
        if token.logprob is None:
            return None
        found: dict[str, float] = {}
        for index, logprob in (*token.top, (token.id, token.logprob)):
            found.setdefault(self._name(index), _finite(logprob) or 0.0)
        return found

    def _name(self, index: int) -> str:
        # The same few tokens are likely again and again.
        if index not in self._names:
            self._names[index] = _name(self._tokenizer.token_bytes(index))
        return self._names[index]


def _name(data: bytes) -> str:
    """A token as text; where it is part of a character, its bytes, written as OpenAI does."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
