"""GPT-2's byte-level alphabet, and `tokenizer.json` documents that split text as GPT-2 does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from xgen.tokens.document import added_token

END_OF_TEXT = "<|endoftext|>"

SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's split of text into pieces, inside which pairs merge. tokenizers' ByteLevel holds it built in
(`use_regex`), llama.cpp under the name `gpt-2`; here it is written out for readers and for tests."""


def _alphabet() -> dict[int, str]:
    """The printable character that stands for each byte: itself where it prints, else U+0100 and on, in byte order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + place) for place, byte in enumerate(rest)}


ALPHABET: Mapping[int, str] = _alphabet()
"""Byte -> character, in the order of GPT-2's first 256 ids."""

BYTES: Mapping[str, int] = {character: byte for byte, character in ALPHABET.items()}
"""Character -> byte."""


def to_characters(data: bytes) -> str:
    """`data` in the byte-level alphabet, as vocabulary files write it."""
    return "".join(ALPHABET[byte] for byte in data)


def to_bytes(characters: str) -> bytes:
    """The bytes a vocabulary entry stands for. A character outside the alphabet stands for its own UTF-8 bytes."""
    return b"".join(bytes((BYTES[c],)) if c in BYTES else c.encode() for c in characters)


def byte_level_document(
    vocab: Mapping[str, int], merges: Iterable[tuple[str, str]], control: Iterable[str]
) -> dict[str, Any]:
    """A standard `tokenizer.json` document: BPE over bytes, GPT-2's split, `control` marked special.

    Every control token must have its id in `vocab`; with no merge that forms it, text cannot produce it.
    """
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(vocab[token], token, special=True) for token in control],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(vocab),
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def is_gpt2_split(document: Mapping[str, Any]) -> bool:
    """Whether the text of `document` is split by SPLIT and by nothing else, so that `cut` changes no id."""
    split = document.get("pre_tokenizer") or {}
    return (
        split.get("type") == "ByteLevel"
        and split.get("use_regex", True)
        and not split["add_prefix_space"]
        and not document["added_tokens"]
        and document.get("normalizer") is None
    )


# Before a space or a line's end that follows no whitespace, SPLIT always ends a piece and starts afresh. Python's
# whitespace includes all of SPLIT's \s and four controls more, so the character before is surely no \s.
_SEAM = re.compile(r"(?<=\S)(?=[ \n])")


def cut(text: str, length: int) -> Iterator[str]:
    """`text` in parts of at least `length` characters whose ids, one part after another, are those of the whole."""
    start = 0
    while seam := _SEAM.search(text, start + length):
        yield text[start : seam.start()]
        start = seam.start()
    yield text[start:]
