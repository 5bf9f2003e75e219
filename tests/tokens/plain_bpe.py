"""Oracle: GPT-2's split and tiktoken's merging, written from their definitions in plain Python, without our code."""

from __future__ import annotations

import json
import unicodedata
from importlib.resources import files
from itertools import pairwise

# The White_Space property of Unicode, which is what \s means in the split's regular expression.
WHITE = {*range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def kind(character: str) -> str:
    """ "space", "L", "N" or "other"."""
    if ord(character) in WHITE:
        return "space"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "other"


def split(text: str) -> list[str]:
    """Pieces of `text` under GPT-2's regular expression."""
    pieces = []
    start = 0
    while start < len(text):
        stop = _piece_end(text, start)
        pieces.append(text[start:stop])
        start = stop
    return pieces


def _piece_end(text: str, start: int) -> int:
    for contraction in CONTRACTIONS:
        if text.startswith(contraction, start):
            return start + len(contraction)
    body = start + (text[start] == " ")
    if body < len(text) and (what := kind(text[body])) != "space":
        while body < len(text) and kind(text[body]) == what:
            body += 1
        return body
    stop = start
    while stop < len(text) and kind(text[stop]) == "space":
        stop += 1
    # A run leaves its last character to what follows, unless the text ends or the run is that one character.
    return stop if stop == len(text) or stop == start + 1 else stop - 1


def byte_characters() -> dict[str, int]:
    """Character -> byte of GPT-2's files: bytes that print stand for themselves, the others count on from U+0100."""
    printable = [byte for byte in range(256) if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255]
    table = {chr(byte): byte for byte in printable}
    for byte in range(256):
        if byte not in printable:
            table[chr(256 + len(table) - len(printable))] = byte
    return table


def gpt2_ranks() -> dict[bytes, int]:
    """Bytes -> id of GPT-2's vocabulary without <|endoftext|>, from the shipped encoder.json."""
    table = byte_characters()
    encoder = json.loads((files("xgen.tokens") / "gpt2" / "encoder.json").read_text(encoding="utf-8"))
    del encoder["<|endoftext|>"]
    return {bytes(table[c] for c in token): rank for token, rank in encoder.items()}


def xgen_ranks() -> dict[bytes, int]:
    """GPT-2's ranks and XGen's runs: 31 to 2 spaces from 50257 on, then 9 to 2 tabs."""
    runs = [b" " * n for n in range(31, 1, -1)] + [b"\t" * n for n in range(9, 1, -1)]
    return gpt2_ranks() | {run: 50257 + place for place, run in enumerate(runs)}


def merge(piece: bytes, ranks: dict[bytes, int], below: int | None = None) -> list[bytes]:
    """Join the neighbours of lowest rank, leftmost first, until none is in `ranks` (with a rank under `below`)."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        joined = [ranks.get(left + right) for left, right in pairwise(parts)]
        found = [(rank, place) for place, rank in enumerate(joined) if rank is not None]
        if not found or (below is not None and min(found)[0] >= below):
            break
        _, place = min(found)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def encode(text: str, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's ids: a piece that is a token gives its id at once, any other is merged."""
    ids: list[int] = []
    for piece in split(text):
        data = piece.encode()
        ids += [ranks[data]] if data in ranks else [ranks[part] for part in merge(data, ranks)]
    return ids
