"""`tokenizer.json` as a document: reading it, its control tokens, its pieces."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from xgen.errors import DataError

MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
METASPACE = "▁"
"""SentencePiece's sign for a space."""


def read_document(path: Path) -> dict[str, Any]:
    """The parsed `tokenizer.json` at `path`. Raises DataError when it is missing or is something else."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as cause:
        raise DataError(f'there is no tokenizer {path}; use "xgen" or the path of a tokenizer.json') from cause
    except OSError as cause:
        raise DataError(f"cannot read the tokenizer {path}: {cause.strerror or cause}") from cause
    except ValueError as cause:
        raise DataError(f"{path} is not a tokenizer.json: {cause}") from cause
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, dict) or "vocab" not in model or not isinstance(document.get("added_tokens"), list):
        raise DataError(f"{path} is not a tokenizer.json: it has no model with a vocabulary and no added_tokens")
    # Files of before tokenizers 0.10 leave the type out where the fields tell it.
    if model.setdefault("type", "BPE" if "merges" in model else None) not in MODELS:
        raise DataError(f"{path} has a model of type {model['type']!r}; known are {', '.join(MODELS)}")
    return document


def control_tokens(document: dict[str, Any]) -> dict[str, int]:
    """Name -> id of the tokens marked special, apart from the model's own token for unknown characters."""
    unknown = document["model"].get("unk_token")
    return {
        token["content"]: token["id"]
        for token in document["added_tokens"]
        if token["special"] and token["content"] != unknown
    }


def without_control(document: dict[str, Any]) -> dict[str, Any]:
    """`document` with its control tokens cut out of added tokens, vocabulary and merges, all other ids as they were.

    A Unigram vocabulary is a list by id and stays whole.
    """
    model = document["model"]
    if model["type"] == "Unigram":
        return document | {"post_processor": None}
    control = control_tokens(document)
    kept = [token for token in document["added_tokens"] if token["content"] not in control]
    vocab = {token: index for token, index in model["vocab"].items() if token not in control}
    # In the vocabulary a token keeps its id; otherwise ids of added tokens are counted on from the vocabulary's end.
    vocab |= {token["content"]: token["id"] for token in kept}
    model = model | {"vocab": vocab}
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not _forms(pair, control)]
    return document | {"added_tokens": kept, "post_processor": None, "model": model}


def _forms(pair: str | list[str], control: dict[str, int]) -> bool:
    """Whether merging `pair` forms or uses a control token."""
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return left + right in control or left in control or right in control


def is_byte_level(document: dict[str, Any]) -> bool:
    """Whether the vocabulary is written in the byte-level alphabet, which the decoder tells."""
    decoder = document.get("decoder") or {}
    return any(step["type"] == "ByteLevel" for step in (decoder, *decoder.get("decoders", ())) if step)


def piece_bytes(piece: str) -> bytes:
    """The bytes of a SentencePiece piece: <0xNN> is a byte, ▁ a space."""
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return bytes.fromhex(byte[1])
    return piece.replace(METASPACE, " ").encode()
