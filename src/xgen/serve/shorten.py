"""Prompts that are too long, shortened by a named rule because the asker said so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from xgen.serve.refusals import RequestError
from xgen.tokens.chat import Message, Rendered
from xgen.tokens.tokenizer import Tokenizer

Rule = Literal["head", "tail", "middle"]
"""The part that is left out."""


@dataclass(frozen=True)
class Dropped:
    """What was left out of a prompt, in tokens; both counts are of the whole prompt as the model sees it."""

    original_tokens: int
    used_tokens: int

    def told(self) -> dict[str, Any]:
        return {
            "original_tokens": self.original_tokens,
            "used_tokens": self.used_tokens,
            "dropped_tokens": self.original_tokens - self.used_tokens,
        }


def cut(ids: tuple[int, ...], fixed: int, room: int, rule: Rule) -> tuple[tuple[int, ...], Dropped]:
    """`ids` in at most `room`; the first `fixed`, which the model's prompts begin with, stay."""
    excess = len(ids) - room
    if excess <= 0:
        return ids, Dropped(len(ids), len(ids))
    if excess > len(ids) - fixed - 1:
        raise _no_room(len(ids), room, "prompt")
    kept = ids[:fixed] + _without(ids[fixed:], excess, rule)
    return kept, Dropped(len(ids), len(kept))


def shorten_chat(
    render: Callable[[Sequence[Message]], Rendered],
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    room: int,
    rule: Rule,
) -> tuple[Sequence[Message], Dropped]:
    """`messages` that render to at most `room` tokens: of the longest of the user's, some is left out."""
    original = used = len(render(messages).ids)
    if used <= room:
        return messages, Dropped(original, original)
    texts = [tokenizer.encode(one.content) if one.role == "user" else [] for one in messages]
    at = max(range(len(messages)), key=lambda index: len(texts[index]))
    shortened, excess = list(messages), used - room
    # A text that is cut and encoded anew may take a few tokens more than it was cut to.
    while used > room:
        if excess >= len(texts[at]):
            raise _no_room(original, room, "messages")
        kept = _text(tokenizer, _halves(texts[at], excess, rule))
        # SentencePiece puts a space before a text, which is none of its own.
        kept = kept if messages[at].content.startswith(" ") else kept.removeprefix(" ")
        shortened[at] = Message(messages[at].role, kept)
        used = len(render(shortened).ids)
        excess += max(used - room, 1)
    return shortened, Dropped(original, used)


def _halves(ids: Sequence[int], excess: int, rule: Rule) -> tuple[Sequence[int], Sequence[int]]:
    """What stays before and after the part of `excess` ids that is left out."""
    kept = len(ids) - excess
    before = {"head": 0, "tail": kept, "middle": (kept + 1) // 2}[rule]
    return ids[:before], ids[before + excess :]


def _without(ids: tuple[int, ...], excess: int, rule: Rule) -> tuple[int, ...]:
    before, after = _halves(ids, excess, rule)
    return (*before, *after)


def _text(tokenizer: Tokenizer, halves: tuple[Sequence[int], Sequence[int]]) -> str:
    # A cut may run through a character, whose other bytes are then left out too.
    parts = (b"".join(map(tokenizer.token_bytes, half)).decode("utf-8", errors="ignore") for half in halves)
    return "".join(parts)


def _no_room(tokens: int, room: int, param: str) -> RequestError:
    return RequestError(
        f"the prompt has {tokens} tokens, and max_tokens leaves {max(room, 0)} for it: no shortening makes it fit; "
        "lower max_tokens",
        param=param,
        code="context_length_exceeded",
    )
