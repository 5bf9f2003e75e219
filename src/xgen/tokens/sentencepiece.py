"""SentencePiece's `tokenizer.model` as a `tokenizer.json` document."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def document_of(path: Path) -> dict[str, Any]:
    """The `tokenizer.json` document of the SentencePiece model (BPE or Unigram) at `path`.

    Raises DataError when it is missing, broken or of a kind that no such document expresses.
    """
    raise NotImplementedError
