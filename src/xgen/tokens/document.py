"""`tokenizer.json` as a document: reading it, its control tokens, its pieces."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xgen.errors import DataError

MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
STEPS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
"""The parts of a document that are a step or a sequence of steps, and what holds the latter."""

METASPACE = "▁"
"""SentencePiece's sign for a space."""

BARRED = "\U0010ffff"
"""Begins the pieces that fill a Unigram list where nothing may be read: a noncharacter, which no real text holds."""


def read_document(path: Path) -> dict[str, Any]:
    """The parsed `tokenizer.json` at `path`, its truncation, padding and dropout switched off: ids are of whole texts,
    and always the same.

    Raises DataError when it is missing or is something else.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as cause:
        raise DataError(
            f'there is no tokenizer {path}; use "xgen", the path of a tokenizer.json, or "bpe:N" (as bpe:8192)'
        ) from cause
    except OSError as cause:
        raise DataError(f"cannot read the tokenizer {path}: {cause.strerror or cause}") from cause
    except (ValueError, RecursionError) as cause:
        raise DataError(f"{path} is not a tokenizer.json: {cause}") from cause
    if not _is_tokenizer(document):
        raise DataError(f"{path} is not a tokenizer.json: it has no model with a vocabulary, or no added_tokens")
    if wrong := next((part for part, inner in STEPS.items() if not _is_step(document.get(part), inner)), None):
        raise DataError(f"{path} is not a tokenizer.json: in its {wrong} is a step without a type")
    model = document["model"]
    # Files of before tokenizers 0.10 leave the type out where the fields tell it.
    if model.setdefault("type", "BPE" if "merges" in model else None) not in MODELS:
        raise DataError(f"{path} has a model of type {model['type']!r}; known are {', '.join(MODELS)}")
    return document | {
        "truncation": None,
        "padding": None,
        "model": model | ({"dropout": None} if "dropout" in model else {}),
    }


def _is_tokenizer(document: object) -> bool:
    return (
        isinstance(document, dict)
        and isinstance(model := document.get("model"), dict)
        and isinstance(model.get("vocab"), list if "unk_id" in model else dict)
        and isinstance(added := document.get("added_tokens"), list)
        and all(isinstance(token, dict) and {"id", "content", "special"} <= token.keys() for token in added)
    )


def _is_step(step: object, inner: str) -> bool:
    """Whether `step` and all in it say of what type they are; the library guesses otherwise."""
    return step is None or (
        isinstance(step, dict)
        and isinstance(step.get("type"), str)
        and isinstance(steps := step.get(inner, []), list)
        and all(_is_step(part, inner) for part in steps)
    )


def added_token(index: int, content: str, special: bool, normalized: bool = False) -> dict[str, Any]:
    """An entry of `added_tokens`, looked for everywhere in a text; in the normalised one if `normalized`."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"id": index, "content": content, **plain, "normalized": normalized, "special": special}


def control_tokens(document: dict[str, Any]) -> dict[str, int]:
    """Name -> id of the tokens marked special."""
    return {token["content"]: token["id"] for token in document["added_tokens"] if token["special"]}


def vocabulary(document: dict[str, Any]) -> dict[str, int]:
    """Token -> id of every token, added ones included."""
    return _model_vocabulary(document["model"]) | {token["content"]: token["id"] for token in document["added_tokens"]}


def without_control(document: dict[str, Any]) -> dict[str, Any]:
    """`document` with its control tokens cut out of added tokens, vocabulary and merges, all other ids as they were.

    `encode_special_tokens` of the tokenizers library is not enough: it stops the search for control tokens, but the
    model itself still gives their ids to a whole piece (`ignore_merges`, WordLevel, WordPiece) or to any text
    (Unigram). Of them only the model's token for unknown characters stays, unless bytes make all characters known; in
    Unigram its id stays, but no text spells it.
    """
    control = control_tokens(document)
    model = document["model"]
    if is_byte_level(document) and "unk_token" in model:
        model = model | {"unk_token": None}
    unknown = model.get("unk_token")
    # In the vocabulary a token keeps its id; otherwise ids of added tokens are counted on from the vocabulary's end.
    vocab = {token: index for token, index in vocabulary(document).items() if token not in control or token == unknown}
    model = model | {"vocab": _scored(vocab, model["vocab"]) if model["type"] == "Unigram" else vocab}
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not _forms(pair, control)]
    kept = [token for token in document["added_tokens"] if token["content"] not in control]
    return document | {"added_tokens": kept, "post_processor": None, "model": model}


def with_spelling(document: dict[str, Any], spelling: Mapping[str, str]) -> dict[str, Any]:
    """`without_control` of `document`, with characters that stand for control tokens: `spelling` has the character for
    each name. Their ids go on from the highest of `document`, in the order of `spelling`.

    A character is looked for as its token was: it takes the space before or after it where the token did.
    """
    plain = without_control(document)
    model = plain["model"]
    known = {token["content"]: token for token in document["added_tokens"]}
    first = max(vocabulary(document).values()) + 1
    ids = {character: first + at for at, character in enumerate(spelling.values())}
    # In the vocabulary they have the ids that are meant: the library would count on from the count of tokens.
    scored = model["type"] == "Unigram"
    vocab = [*model["vocab"], *((character, 0.0) for character in ids)] if scored else model["vocab"] | ids
    added = [known[name] | {"content": character, "id": ids[character]} for name, character in spelling.items()]
    return plain | {"added_tokens": [*plain["added_tokens"], *added], "model": model | {"vocab": vocab}}


def _model_vocabulary(model: dict[str, Any]) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {piece: index for index, (piece, _) in enumerate(model["vocab"])}
    vocab: dict[str, int] = model["vocab"]
    return vocab


def _scored(vocab: dict[str, int], scored: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Unigram's list by id of piece and score for `vocab`; ids not in it are BARRED pieces."""
    scores = dict(scored)
    barred = [(f"{BARRED}{index}", 0.0) for index in range(max(vocab.values()) + 1)]
    for piece, index in vocab.items():
        barred[index] = (piece, scores.get(piece, 0.0))
    return barred


def _forms(pair: str | list[str], control: dict[str, int]) -> bool:
    """Whether merging `pair` forms or uses a control token."""
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return left + right in control or left in control or right in control


def is_byte_level(document: dict[str, Any]) -> bool:
    """Whether the vocabulary is written in the byte-level alphabet, which the decoder tells."""
    return any(step["type"] == "ByteLevel" for step in _decoders(document))


def decodes_bytes(document: dict[str, Any]) -> bool:
    """Whether the decoder joins SentencePiece's pieces: ▁ to spaces, <0xNN> to bytes, a space off the front perhaps."""
    steps = _decoders(document)
    kinds = [step["type"] for step in steps]
    spaces = {"type": "Replace", "pattern": {"String": METASPACE}, "content": " "}
    return kinds[1:] in (["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"]) and steps[0] == spaces


def strips_space(document: dict[str, Any]) -> bool:
    """Whether decoding takes a space off the front."""
    return any(step["type"] == "Strip" and step["start"] == 1 for step in _decoders(document))


def _decoders(document: dict[str, Any]) -> list[dict[str, Any]]:
    decoder = document.get("decoder") or {}
    return [step for step in decoder.get("decoders", [decoder]) if step]


def piece_bytes(piece: str, model: dict[str, Any]) -> bytes:
    """The bytes of a piece that is not byte-level: <0xNN> is a byte, ▁ a space, marks of word parts are taken off.

    WordPiece and WordLevel leave spaces out of their pieces, so these count for none.
    """
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return bytes.fromhex(byte[1])
    piece = piece.removeprefix(model.get("continuing_subword_prefix") or "")
    if suffix := model.get("end_of_word_suffix"):
        piece = re.sub(re.escape(suffix) + "$", " ", piece)
    return piece.replace(METASPACE, " ").encode()
