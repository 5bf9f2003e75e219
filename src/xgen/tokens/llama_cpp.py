"""`tokenizer.json` documents and the fields in which GGUF stores a tokenizer for llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
    raise NotImplementedError


def from_gguf(fields: GgufTokens) -> dict[str, Any]:
    """The `tokenizer.json` document that gives the ids llama.cpp gives; unused tokens at the end are dropped.

    Raises DataError when the fields contradict each other or name a pre-tokenizer that is not known here.
    """
    raise NotImplementedError
