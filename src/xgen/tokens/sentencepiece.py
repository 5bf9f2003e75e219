"""SentencePiece's `tokenizer.model` as a `tokenizer.json` document.

The file is a protocol buffer (sentencepiece_model.proto): a list of pieces with score and kind, and the settings of
the trainer and of the normaliser. SentencePiece's BPE joins whichever two neighbours make the piece of the highest
score, the leftmost first among equals. A `tokenizer.json` lists pairs in order instead, so every split of a piece
into two known pieces is listed at the piece's score.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from xgen.errors import DataError
from xgen.tokens.document import METASPACE, added_token

LARGEST_FILE = 1 << 25
"""Bytes; the largest vocabulary in use, of 262,144 pieces, takes 5 MB."""

MOST_PIECES = 1 << 20

LONGEST_PIECE = 256
"""Characters of a piece that merges make; SentencePiece's trainer stops at 16 unless told otherwise."""

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


class Kind(IntEnum):
    """A piece's type; GGUF took over the numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: Kind


Message = dict[int, list[Any]]
"""Field number -> its values in order: integers, or bytes of strings, messages and fixed-width numbers."""


def document_of(path: Path) -> dict[str, Any]:
    """The `tokenizer.json` document of the SentencePiece model (BPE or Unigram) at `path`.

    Raises DataError when it is missing, broken or of a kind that no such document expresses.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as cause:
        raise DataError(f"cannot read the tokenizer {path}: {cause.strerror or cause}") from cause
    try:
        if len(data) > LARGEST_FILE:
            raise DataError(f"it is larger than {LARGEST_FILE:,} bytes")
        proto = _message(data)
        if len(_inner(proto, 1)) > MOST_PIECES:
            raise DataError(f"it has over {MOST_PIECES:,} pieces")
        return _document(proto)
    except (DataError, ValueError, struct.error) as cause:
        raise DataError(f"{path} is no SentencePiece model that can be used: {cause}") from cause


def _document(proto: Message) -> dict[str, Any]:
    pieces = [_piece(_message(data)) for data in _inner(proto, 1)]
    trainer, normaliser = (_message(b"".join(_inner(proto, number))) for number in (2, 3))
    bytes_fall_back = bool(_last(trainer, 35, 0))
    match _last(trainer, 3, 1):
        case 1:
            model = _unigram_model(pieces, bytes_fall_back)
        case 2:
            model = bpe_model(pieces, bytes_fall_back)
        case other:
            raise DataError(f"its model type is {other}; BPE (2) and Unigram (1) are known")
    if _last(trainer, 24, 0) or not _last(normaliser, 5, 1):
        raise DataError("it puts spaces after words, or leaves them as they are; only ▁ before words is known")
    prefix = bool(_last(normaliser, 3, 1))
    if _last(normaliser, 2, b""):
        # tokenizers' Precompiled looks characters up a cluster at a time, and loses marks and line ends by it.
        name = _last(normaliser, 1, b"").decode("utf-8")
        raise DataError(
            f"its normaliser {name!r} rewrites characters, and only 'identity' gives SentencePiece's ids here; "
            "use the tokenizer.json that the model came with"
        )
    whole = [piece.text for piece in pieces if piece.kind is Kind.USER_DEFINED]
    steps = _normalizers(prefix, bool(_last(normaliser, 4, 1)), whole)
    return piece_document(pieces, model, steps, prefix, normalized=True)


def _normalizers(prefix: bool, squeeze: bool, whole: Sequence[str]) -> list[dict[str, Any]]:
    """What SentencePiece does to a text before it looks for pieces.

    `squeeze` takes out spaces at both ends and all but one of a run. Pieces that are cut `whole` out of the text are
    looked for after this, so that only the text's start gets a ▁. The tokenizers library sends the pieces themselves
    through the same steps, hence the exception: a text that is nothing but such a piece gets no ▁.
    """
    steps: list[dict[str, Any]] = []
    if squeeze:
        steps.append(_replace(r"\A +| +(?= |\z)", ""))
    if prefix and whole:
        names = "|".join(re.escape(text) for text in whole)
        steps.append(_replace(rf"\A(?!(?:{names})?\z)", METASPACE))
    elif prefix:
        steps.append(PREPEND)
    steps.append(ESCAPE)
    if squeeze:
        steps.append(_replace(rf"{METASPACE}+\z", ""))
    return steps


def _replace(regex: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": regex}, "content": content}


PREPEND: dict[str, Any] = {"type": "Prepend", "prepend": METASPACE}
ESCAPE: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": METASPACE}


def piece_document(
    pieces: Sequence[Piece], model: dict[str, Any], steps: list[dict[str, Any]], prefix: bool, *, normalized: bool
) -> dict[str, Any]:
    """The document of `pieces` and `model` with the normalizers `steps`; decoding takes a space off if `prefix`.

    User-defined pieces are looked for in the text before it is normalised, or after it if `normalized`.
    """
    special = (Kind.CONTROL, Kind.UNKNOWN)
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": METASPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(
                index, piece.text, piece.kind in special, normalized=normalized and piece.kind is Kind.USER_DEFINED
            )
            for index, piece in enumerate(pieces)
            if piece.kind in (*special, Kind.USER_DEFINED)
        ],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders if prefix else decoders[:-1]},
        "model": model,
    }


def bpe_model(pieces: Sequence[Piece], bytes_fall_back: bool) -> dict[str, Any]:
    """The BPE model of `pieces`, its merges rebuilt from their scores."""
    _check(pieces, bytes_fall_back)
    unknown = next((piece.text for piece in pieces if piece.kind is Kind.UNKNOWN), None)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": bytes_fall_back,
        "ignore_merges": False,
        "vocab": {piece.text: index for index, piece in enumerate(pieces)},
        "merges": _merges(pieces),
    }


def _unigram_model(pieces: Sequence[Piece], bytes_fall_back: bool) -> dict[str, Any]:
    _check(pieces, bytes_fall_back)
    if any(piece.kind is Kind.UNUSED for piece in pieces):
        raise DataError("it has unused pieces, which only SentencePiece can keep out of a Unigram segmentation")
    # SentencePiece never reads a byte's piece in a text that spells it, the tokenizers library does. At this score six
    # single characters are always better.
    never = 6 * min((piece.score for piece in pieces if piece.kind is Kind.NORMAL), default=0.0) - 1
    return {
        "type": "Unigram",
        "unk_id": next((index for index, piece in enumerate(pieces) if piece.kind is Kind.UNKNOWN), None),
        "byte_fallback": bytes_fall_back,
        "vocab": [[piece.text, never if piece.kind is Kind.BYTE else piece.score] for piece in pieces],
    }


def _check(pieces: Sequence[Piece], bytes_fall_back: bool) -> None:
    texts = {piece.text for piece in pieces}
    if not pieces or "" in texts or len(texts) != len(pieces):
        raise DataError("it has no pieces, an empty piece, or the same piece twice")
    if bytes_fall_back and not texts.issuperset(BYTES):
        raise DataError("unknown characters are to be spelt in bytes, but not all of <0x00> to <0xFF> are pieces")


def _merges(pieces: Sequence[Piece]) -> list[list[str]]:
    """Every split of a normal piece into two, best score first; equals as transformers orders them."""
    usable = (Kind.NORMAL, Kind.UNUSED)
    known = {piece.text for piece in pieces if piece.kind in usable}
    tied: dict[float, set[str]] = {}
    found: list[tuple[float, str, str]] = []
    for piece in pieces:
        if piece.kind not in usable:
            continue
        pairs = list(splits(piece.text, known))
        if pairs and piece.kind is Kind.UNUSED:
            raise DataError(f"its unused piece {piece.text!r} can be formed from text, which no tokenizer.json forbids")
        if pairs:
            tied.setdefault(piece.score, set()).add(piece.text)
            found.extend((piece.score, left, right) for left, right in pairs)
    for score, texts in tied.items():
        if len(texts) > 1 and not is_run_of_one(texts):
            some = ", ".join(map(repr, sorted(texts)[:3]))
            raise DataError(
                f"{len(texts)} pieces have the score {score:g}, as {some}: which is joined first then depends on the "
                "place in the text, which no tokenizer.json expresses"
            )
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [[left, right] for _, left, right in found]


def is_run_of_one(texts: set[str]) -> bool:
    """Whether all `texts` repeat one character. Mistral's runs of spaces share a score; joined from the left, a run
    grows to the longest before another begins, and that is the order "longest left part first" gives too."""
    return len(set(itertools.chain.from_iterable(texts))) == 1


def splits(text: str, known: set[str] | dict[str, int]) -> Iterator[tuple[str, str]]:
    """The ways to put `text` together from two `known` pieces."""
    if len(text) > LONGEST_PIECE:
        raise DataError(f"a piece has {len(text):,} characters; at most {LONGEST_PIECE} are read")
    for place in range(1, len(text)):
        if (left := text[:place]) in known and (right := text[place:]) in known:
            yield left, right


def _piece(fields: Message) -> Piece:
    score = struct.unpack("<f", _last(fields, 2, bytes(4)))[0]
    if score != score:
        raise DataError("a piece's score is not a number")
    return Piece(_last(fields, 1, b"").decode("utf-8"), score, Kind(_last(fields, 3, 1)))


def _inner(fields: Message, number: int) -> list[bytes]:
    """The values of a field that holds messages."""
    values = fields.get(number, [])
    if not all(isinstance(value, bytes) for value in values):
        raise DataError(f"field {number} holds no messages")
    return values


def _last(fields: Message, number: int, default: Any) -> Any:
    """The value of a field that occurs once; the last one counts, and its type must be the default's."""
    value = fields.get(number, [default])[-1]
    if type(value) is not type(default):
        raise DataError(f"field {number} of a message is of the wrong type")
    return value


def _message(data: bytes) -> Message:
    """The fields of a protocol buffer, one level deep."""
    fields: Message = {}
    place = 0
    value: int | bytes
    while place < len(data):
        tag, place = _varint(data, place)
        if tag & 7 == 0:
            value, place = _varint(data, place)
        elif (length := {1: 8, 5: 4}.get(tag & 7)) or tag & 7 == 2:
            if length is None:
                length, place = _varint(data, place)
            value, place = data[place : place + length], place + length
            if place > len(data):
                raise DataError("it ends within a field; copy the file again")
        else:
            raise DataError(f"it is no protocol buffer: byte {place - 1} begins a field of type {tag & 7}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """The number at `place`, seven bits a byte, the last byte below 128; and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if place == len(data):
            raise DataError("it ends within a number; copy the file again")
        value |= (data[place] & 127) << shift
        place += 1
        if data[place - 1] < 128:
            return value, place
    raise DataError(f"it is no protocol buffer: the number before byte {place} has over ten bytes")
