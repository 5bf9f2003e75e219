"""Text out of tokens one at a time: never half a character, never the beginning of what may prove a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Protocol

from xgen.errors import DataError
from xgen.tokens.document import decodes_bytes, is_byte_level, strips_space
from xgen.tokens.tokenizer import Tokenizer

LOCAL = ("WordPiece", "Metaspace", "BPEDecoder", "Replace")
"""Steps of decoders that give a token's text by itself, but for whether it is the first or the last one."""


class TextStream:
    """The text of tokens that come one by one, up to a stop string.

    All that `push` returns, and then `flush`, joined, is `tokenizer.decode` of all ids, cut before the stop string that
    is the first to be complete; of several that end together, before the longest. What has been returned stays so. A
    tokenizer whose decoder needs the whole text (neither bytes nor LOCAL steps) gives it at `flush`.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """Raises DataError for an empty stop string."""
        if "" in stop:
            raise DataError('stop holds "", which is found in every text at once; leave it out')
        self._characters = _assembler(tokenizer)
        self._matches = [_Match(text) for text in sorted(stop, key=len, reverse=True)]
        self._held = ""
        self.stopped: str | None = None
        """The stop string that was met, after which no more text comes."""

    def early(self, index: int) -> str:
        """`push`, but no stop string is seen that begins in the token's text."""
        return self._characters.push(index)

    def push(self, index: int) -> str:
        """Text that is certain now that the token `index` is known."""
        return "" if self.stopped is not None else self._certain(self._characters.push(index))

    def flush(self) -> str:
        """The rest of the text, as no token follows; a stop string may still be met in it."""
        if self.stopped is not None:
            return ""
        text = self._certain(self._characters.flush())
        if self.stopped is None:
            text, self._held = text + self._held, ""
        return text

    def _certain(self, text: str) -> str:
        """What of the text held back and `text` begins no stop string."""
        for place, character in enumerate(text):
            met = [match for match in self._matches if match.meets(character)]
            if met:
                self.stopped = met[0].text
                seen, self._held = self._held + text[: place + 1], ""
                return seen.removesuffix(self.stopped)
        seen = self._held + text
        sure = len(seen) - max((match.length for match in self._matches), default=0)
        self._held = seen[sure:]
        return seen[:sure]


class _Match:
    """How much of a stop string the text ends with. (By Knuth, Morris and Pratt: a step or two a character.)"""

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = 0
        self._shorter = [0]
        """By length less one: the next shorter beginning that a beginning ends with."""
        for character in text[1:]:
            self._shorter.append(self._after(self._shorter[-1], character))

    def meets(self, character: str) -> bool:
        """Whether the stop string is complete with `character`."""
        self.length = self._after(self.length, character)
        return self.length == len(self.text)

    def _after(self, length: int, character: str) -> int:
        while length and self.text[length] != character:
            length = self._shorter[length - 1]
        return length + (self.text[length] == character)


class _Assembler(Protocol):
    def push(self, index: int) -> str: ...

    def flush(self) -> str: ...


def _assembler(tokenizer: Tokenizer) -> _Assembler:
    document = tokenizer.document
    if is_byte_level(document) or decodes_bytes(document):
        return _Bytes(tokenizer, strip=not is_byte_level(document) and strips_space(document))
    return _Local(tokenizer) if _is_local(document) else _Whole(tokenizer)


def _is_local(document: dict[str, Any]) -> bool:
    """Whether what a token adds to the text follows from it and the token before."""
    decoder = document.get("decoder") or {"type": "Sequence", "decoders": []}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return all(step["type"] in LOCAL for step in steps)


class _Bytes:
    """Of tokens that are bytes."""

    def __init__(self, tokenizer: Tokenizer, strip: bool) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = strip

    def push(self, index: int) -> str:
        return self._stripped(self._decoder.decode(self._tokenizer.token_bytes(index)))

    def flush(self) -> str:
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class _Local:
    """Of tokens that are words or parts of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []

    def push(self, index: int) -> str:
        both = self._tokenizer.decode([*self._before, index])
        added = both[len(self._tokenizer.decode(self._before)) :]
        self._before = [index]
        return added

    def flush(self) -> str:
        return ""


class _Whole:
    """Where later tokens may change any text before."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []

    def push(self, index: int) -> str:
        self._ids.append(index)
        return ""

    def flush(self) -> str:
        text = self._tokenizer.decode(self._ids)
        self._ids = []
        return text
