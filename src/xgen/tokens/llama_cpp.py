"""`tokenizer.json` documents and the fields in which GGUF stores a tokenizer for llama.cpp.

llama.cpp knows two kinds that LLaMA-shaped models use: "gpt2", BPE over bytes after a split of the text that goes by a
name; and "llama", SentencePiece's BPE, where scores stand for merges. Where llama.cpp's "llama" differs from
SentencePiece, nothing written into a file can help: it puts a ▁ after every control or user-defined token, not only
at the text's start; and it joins pieces to a control token's or a byte's name when their parts are pieces too.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xgen.errors import DataError
from xgen.tokens.bytelevel import SPLIT, byte_level_document
from xgen.tokens.document import METASPACE, added_token, control_tokens, is_byte_level, vocabulary
from xgen.tokens.sentencepiece import (
    BYTES,
    ESCAPE,
    PREPEND,
    Kind,
    Piece,
    bpe_model,
    is_run_of_one,
    piece_document,
    splits,
)

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGIT = r"\p{N}"

PRE_TOKENIZERS: Mapping[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((SPLIT,), False),
    "smollm": ((_DIGIT, SPLIT), False),
    "starcoder": ((_DIGIT, SPLIT), False),
    "refact": ((_DIGIT, SPLIT), False),
    "llama-bpe": ((_LLAMA3,), True),
    "llama3": ((_LLAMA3,), True),
    "llama-v3": ((_LLAMA3,), True),
    "dbrx": ((_LLAMA3,), False),
    "smaug-bpe": ((_LLAMA3,), False),
    "qwen2": ((_LLAMA3.replace(r"\p{N}{1,3}", _DIGIT),), False),
    "deepseek-coder": ((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", _DIGIT), False),
    "default": ((r"[\p{P}\$\+<=>\^~\|]+", SPLIT, r"\p{N}+", "[0-9][0-9][0-9]"), False),
}
"""llama.cpp's name -> the patterns that cut a text, one after another, matches and what lies between them; and whether
a part that is a token is taken without merging. Of equal rows the first is written.

From the table of pre-tokenizers in llama.cpp's src/llama-vocab.cpp, with the patterns as the models' own
tokenizer.json has them. llama.cpp normalises nothing, so neither do documents made from these names (Qwen's own does,
to NFC)."""

PAD = "[PAD{}]"
"""What rows that are no token are called, as llama.cpp's own converter does."""


@dataclass(frozen=True)
class GgufTokens:
    """`tokenizer.ggml.model`, `.pre`, `.tokens`, `.token_type`, `.scores`, `.merges` and `.add_space_prefix`.

    None is a key that is left out. `model` is "gpt2" (BPE over bytes) or "llama" (SentencePiece's BPE).
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    add_space_prefix: bool | None


def to_gguf(document: dict[str, Any], rows: int) -> GgufTokens:
    """The fields for `document`, padded to an embedding of `rows` rows with unused tokens [PAD{id}].

    Raises DataError when llama.cpp would not split or merge text as `document` says.
    """
    model = document["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise DataError(
            f"llama.cpp reads no tokenizer as this one, of type {model['type']}, with a LLaMA-shaped model; only BPE "
            "without marks for parts of words"
        )
    for token in document["added_tokens"]:
        if any(token.get(key) for key in ("single_word", "lstrip", "rstrip")):
            raise DataError(
                f"added token {token['content']!r} takes in spaces around it or stands for whole words only, which "
                "llama.cpp does not know; set single_word, lstrip and rstrip to false in tokenizer.json"
            )
    if is_byte_level(document):
        tokens, types = _rows(document, rows, {})
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        return GgufTokens("gpt2", _pre_tokenizer(document), tokens, types, None, merges, None)
    if model.get("ignore_merges") or not model.get("byte_fallback") or not model["vocab"].keys() >= set(BYTES):
        raise DataError(
            "llama.cpp spells unknown characters in bytes and merges every word; this tokenizer has no pieces <0x00> "
            "to <0xFF>, does not fall back to them, or ignores merges"
        )
    kinds = dict.fromkeys(BYTES, Kind.BYTE) | {model["unk_token"]: Kind.UNKNOWN}
    prefix = _space_prefix(document)
    tokens, types = _rows(document, rows, kinds)
    ranks = _ranks(model, {token for token, kind in zip(tokens, types, strict=True) if kind == Kind.NORMAL})
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    return GgufTokens("llama", "default", tokens, types, scores, None, prefix)


def _rows(document: dict[str, Any], rows: int, kinds: Mapping[str, Kind]) -> tuple[list[str], list[int]]:
    """A token and its type for each of `rows` rows."""
    vocab = vocabulary(document)
    tokens = {index: token for token, index in vocab.items()}
    if len(tokens) != len(vocab) or max(tokens, default=rows) >= rows:
        raise DataError(
            f"a tokenizer of {len(vocab)} tokens with ids up to {max(tokens, default=0)} does not fit {rows} rows; "
            "llama.cpp needs a row for each"
        )
    added = {token["content"]: Kind.USER_DEFINED for token in document["added_tokens"]}
    kinds = {**added, **dict.fromkeys(control_tokens(document), Kind.CONTROL), **kinds}
    types = [int(kinds.get(tokens[index], Kind.NORMAL) if index in tokens else Kind.UNUSED) for index in range(rows)]
    for index in range(rows):
        pad = PAD.format(index)
        while index not in tokens and pad in vocab:
            pad = f"[{pad}]"
        tokens.setdefault(index, pad)
    return [tokens[index] for index in range(rows)], types


def _pre_tokenizer(document: dict[str, Any]) -> str:
    """The name under which llama.cpp splits text as `document` does."""
    patterns = _patterns(document.get("pre_tokenizer"))
    normalizer = document.get("normalizer")
    rule = (patterns, bool(document["model"].get("ignore_merges")))
    if normalizer and normalizer.get("normalizers") != []:
        raise DataError(
            f"llama.cpp normalises no text before byte-level BPE, this tokenizer does: {_shown(normalizer)}"
        )
    for name, known in PRE_TOKENIZERS.items():
        if known == rule:
            return name
    raise DataError(
        f"llama.cpp has no name for this pre-tokenizer with ignore_merges {rule[1]}: "
        f"{_shown(document.get('pre_tokenizer'))}"
    )


def _patterns(step: dict[str, Any] | None) -> tuple[str, ...] | None:
    """What a byte-level pre-tokenizer cuts at, as in PRE_TOKENIZERS; None if it does something else as well."""
    steps = [step] if step and step["type"] != "Sequence" else (step or {}).get("pretokenizers", [])
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    patterns: list[str | None] = [SPLIT] if steps[-1].get("use_regex", True) else []
    return tuple(filter(None, found)) if all(found := [*map(_pattern, steps[:-1]), *patterns]) else None


def _pattern(step: dict[str, Any]) -> str | None:
    if step["type"] == "Digits" and step["individual_digits"]:
        return _DIGIT
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        regex: str | None = step["pattern"].get("Regex")
        return regex
    return None


def _pre_tokenizer_of(patterns: Sequence[str]) -> dict[str, Any]:
    """The inverse of `_patterns`, with the library's built-in forms where there are."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": patterns[-1] == SPLIT}
    steps: list[dict[str, Any]] = [
        {"type": "Digits", "individual_digits": True}
        if pattern == _DIGIT
        else {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in (patterns[:-1] if level["use_regex"] else patterns)
    ]
    return {"type": "Sequence", "pretokenizers": [*steps, level]} if steps else level


def _space_prefix(document: dict[str, Any]) -> bool:
    """Whether `document` puts a ▁ before a text; it must make the text's spaces ▁ and do nothing more to it.

    Metaspace spares a text that begins with a space the ▁, which llama.cpp, as SentencePiece, does not.
    """
    normalizer, split = document.get("normalizer"), document.get("pre_tokenizer")
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer or {}]
    if split is None and steps[-1] == ESCAPE:
        match steps[:-1]:
            case []:
                return False
            case [step] if step == PREPEND or _prepends_once(step):
                return True
    if not normalizer and split and split["type"] == "Metaspace" and split["replacement"] == METASPACE:
        scheme = split.get("prepend_scheme", "always")
        if not split.get("split", True) and scheme in ("always", "first", "never"):
            return bool(scheme != "never")
    raise DataError(
        "llama.cpp only makes spaces ▁ and puts one before a text; this tokenizer does something else: "
        f"normalizer {_shown(normalizer)}, pre_tokenizer {_shown(split)}"
    )


def _prepends_once(step: dict[str, Any]) -> bool:
    """Whether `step` is the ▁ before a text of a SentencePiece model with user-defined pieces."""
    return bool(
        step["type"] == "Replace"
        and step["content"] == METASPACE
        and step["pattern"].get("Regex", "").startswith(r"\A(?!(?:")
        and step["pattern"]["Regex"].endswith(r")?\z)")
    )


def _ranks(model: dict[str, Any], normal: set[str]) -> dict[str, int]:
    """Piece -> the rank at which all its merges stand, equal only for runs of one character.

    llama.cpp joins any two pieces that make a piece, at that piece's score. So all of a piece's splits must be merges,
    and no other piece's may stand between them.
    """
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    merges = [(left, right) for left, right in pairs if left + right in normal]
    last = {left + right: place for place, (left, right) in enumerate(merges)}
    listed = set(merges)
    ranks: dict[str, int] = {}
    end = -1
    for place, (left, right) in enumerate(merges):
        if place > end:
            rank = place
        end = max(end, last[left + right])
        ranks[left + right] = rank
    groups = itertools.groupby(ranks, key=lambda piece: ranks[piece])
    mixed = next((texts for _, group in groups if len(texts := set(group)) > 1 and not is_run_of_one(texts)), None)
    missing = next((pair for piece in sorted(normal) for pair in splits(piece, normal) if pair not in listed), None)
    if missing or mixed:
        raise DataError(
            "llama.cpp joins pieces in the order of the piece they make; these merges are in another: "
            + (f"{missing[0]!r} + {missing[1]!r} is none of them" if missing else f"those of {sorted(mixed or ())[:3]}")
        )
    return ranks


def from_gguf(fields: GgufTokens) -> dict[str, Any]:
    """The `tokenizer.json` document that gives the ids llama.cpp gives; unused tokens at the end are dropped.

    Raises DataError when the fields contradict each other or name a pre-tokenizer that is not known here.
    """
    pieces = _pieces(fields)
    if fields.model == "llama":
        if fields.scores is None:
            raise DataError("the GGUF's tokenizer is a SentencePiece one without scores; convert the model again")
        has_bytes = any(piece.kind is Kind.BYTE for piece in pieces)
        prefix = fields.add_space_prefix is not False
        steps = [PREPEND, ESCAPE] if prefix else [ESCAPE]
        return piece_document(pieces, bpe_model(pieces, has_bytes), steps, prefix, normalized=False)
    if fields.model != "gpt2" or fields.merges is None:
        raise DataError(
            f"the GGUF's tokenizer is of model {fields.model!r}{' without merges' * (fields.merges is None)}; "
            'known are "gpt2" with merges and "llama"'
        )
    if fields.pre not in PRE_TOKENIZERS:
        raise DataError(
            f"the GGUF names pre-tokenizer {fields.pre!r}, which is not known here; known are "
            f"{', '.join(PRE_TOKENIZERS)}: take the model's own tokenizer.json"
        )
    patterns, ignore_merges = PRE_TOKENIZERS[fields.pre]
    vocab = {piece.text: index for index, piece in enumerate(pieces) if not _is_pad(index, piece)}
    control = [piece.text for piece in pieces if piece.kind in (Kind.CONTROL, Kind.UNKNOWN)]
    document = byte_level_document(vocab, _merges(fields.merges), control)
    document["model"]["ignore_merges"] = ignore_merges
    document["pre_tokenizer"] = _pre_tokenizer_of(patterns)
    document["added_tokens"] += [
        added_token(vocab[piece.text], piece.text, special=False) for piece in pieces if piece.kind is Kind.USER_DEFINED
    ]
    return document


def _pieces(fields: GgufTokens) -> list[Piece]:
    """The tokens up to the last that is used."""
    scores = fields.scores or [0.0] * len(fields.tokens)
    if not len(fields.tokens) == len(fields.types) == len(scores):
        raise DataError(
            f"the GGUF's tokenizer has {len(fields.tokens)} tokens, {len(fields.types)} types, {len(scores)} scores"
        )
    if unknown := set(fields.types).difference(Kind):
        raise DataError(f"the GGUF's tokenizer has tokens of type {min(unknown)}; known are 1 to 6")
    pieces = [Piece(*fields_of) for fields_of in zip(fields.tokens, scores, map(Kind, fields.types), strict=True)]
    while pieces and pieces[-1].kind is Kind.UNUSED:
        pieces.pop()
    if not pieces or len({piece.text for piece in pieces}) != len(pieces):
        raise DataError("the GGUF's tokenizer has no token, or the same token twice")
    return pieces


def _is_pad(index: int, piece: Piece) -> bool:
    return piece.kind is Kind.UNUSED and piece.text.strip("[]") == PAD.format(index).strip("[]")


def _merges(merges: Iterable[str]) -> list[tuple[str, str]]:
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if wrong := next((pair for pair in pairs if len(pair) != 2), None):
        raise DataError(f"the GGUF's tokenizer has a merge of {len(wrong)} parts: {' '.join(wrong)!r}")
    return [(left, right) for left, right in pairs]


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
