"""One tokenizer for every room: text to ids and back, with control tokens kept out of the reach of text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from xgen.errors import DataError, StorageError
from xgen.tokens.bytelevel import ALPHABET, END_OF_TEXT, byte_level_document, to_bytes
from xgen.tokens.document import control_tokens, is_byte_level, piece_bytes, read_document, without_control
from xgen.tokens.xgen import EMBEDDING_ROWS, xgen_document

UNKNOWN = "\ufffd"
"""What an id without a token decodes to, as does a byte that is not UTF-8."""


class Tokenizer:
    """Text to ids and back, over a standard `tokenizer.json`.

    Two encoders are held: one that knows the control tokens, and one from whose vocabulary they are cut. Neither is
    ever changed, so threads may share a Tokenizer.
    """

    def __init__(self, document: dict[str, Any], name: str, end_of_text: str = END_OF_TEXT) -> None:
        """`document` is a parsed `tokenizer.json`; its truncation and padding are switched off.

        Raises DataError when `end_of_text` is not one of its control tokens.
        """
        self.name = name
        self._document = document | {"truncation": None, "padding": None}
        self._control_ids = control_tokens(self._document)
        if end_of_text not in self._control_ids:
            raise DataError(_no_end_of_text(document, name, end_of_text))
        self.end_of_text: int = self._control_ids[end_of_text]
        self._whole = tokenizers.Tokenizer.from_str(json.dumps(self._document))
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(without_control(self._document)))
        self._plain.encode_special_tokens = True
        # Unigram keeps its vocabulary as a list by id, from which nothing can be cut.
        self._guarded = self._document["model"]["type"] == "Unigram"

    @cached_property
    def size(self) -> int:
        """Count of real ids: the highest, plus one."""
        return max(self._whole.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the `tokenizer.json` in canonical form, in hex."""
        return hashlib.sha256(_canonical(self._document)).hexdigest()

    @cached_property
    def byte_lengths(self) -> NDArray[np.int32]:
        """int32 [size]: the bytes of text each id stands for; 0 for control tokens and for ids without a token."""
        lengths = np.array([len(piece or b"") for piece in self._pieces], np.int32)
        lengths[list(self._control_ids.values())] = 0
        return lengths

    def encode(self, text: str, *, control: bool = False) -> list[int]:
        """Ids of `text`; nothing is added before or after.

        What looks like a control token is text, so ids of control tokens never come out; with `control` it is parsed.
        Raises DataError when `text` holds a lone surrogate, which is no Unicode text.
        """
        if control:
            _check_unicode(text)
            ids: list[int] = self._whole.encode(text, add_special_tokens=False).ids
            return ids
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel on all cores."""
        for text in texts:
            _check_unicode(text)
        batch = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        rows: list[list[int]] = [encoding.ids for encoding in batch]
        if self._guarded:
            self._check_no_control(rows)
        return rows

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; control tokens by their names, ids without a token and broken UTF-8 as U+FFFD."""
        known = [int(index) for index in ids]
        if min(known, default=0) < 0:
            raise DataError(f"id {min(known)} is negative: it stands for no token; remove masked positions first")
        if is_byte_level(self._document):
            return b"".join(map(self.token_bytes, known)).decode("utf-8", errors="replace")
        return "".join(
            self._whole.decode(list(run), skip_special_tokens=False) if real else UNKNOWN * len(list(run))
            for real, run in groupby(known, key=self._is_real)
        )

    def token_bytes(self, index: int) -> bytes:
        """The bytes that id `index` stands for: U+FFFD's for an id without a token, its name for a control token."""
        piece = self._pieces[index] if index < self.size else None
        return UNKNOWN.encode() if piece is None else piece

    def save(self, path: Path) -> None:
        """Write a `tokenizer.json` that stock `tokenizers` loads; into the folder when `path` is one."""
        target = path / "tokenizer.json" if path.is_dir() else path
        try:
            target.write_text(json.dumps(self._document, ensure_ascii=False, indent=1), encoding="utf-8")
        except OSError as cause:
            raise StorageError.writing(target, cause) from cause

    @cached_property
    def _pieces(self) -> list[bytes | None]:
        """Bytes by id; None where no token has the id."""
        pieces: list[bytes | None] = [None] * self.size
        added = {token["content"] for token in self._document["added_tokens"]}
        as_bytes = to_bytes if is_byte_level(self._document) else piece_bytes
        for token, index in self._whole.get_vocab(with_added_tokens=True).items():
            pieces[index] = token.encode() if token in added else as_bytes(token)
        return pieces

    def _is_real(self, index: int) -> bool:
        return index < self.size and self._pieces[index] is not None

    def _check_no_control(self, rows: list[list[int]]) -> None:
        control = {index: token for token, index in self._control_ids.items()}
        for row in rows:
            if found := next((index for index in row if index in control), None):
                raise DataError(
                    f"the text holds {control[found]!r}, which the Unigram model of tokenizer {self.name} reads as "
                    "its control token; take it out of the text"
                )


def load_tokenizer(name: str, end_of_text: str = END_OF_TEXT) -> Tokenizer:
    """The tokenizer called `name`: "xgen", a `tokenizer.json`, or a folder that holds one.

    Raises DataError when the file is missing, is no `tokenizer.json`, or has no control token `end_of_text`.
    """
    document, path = _load_document(name)
    return Tokenizer(document, path, end_of_text)


def embedding_rows(name: str) -> int:
    """Rows an embedding for the tokenizer `name` should have: "xgen" 51,200, a file its size, "bpe:N" N,
    the latter two rounded up to a multiple of 128."""
    if name == "xgen":
        return EMBEDDING_ROWS
    if name.startswith("bpe:") and name[4:].isdecimal():
        return _to_128(int(name[4:]))
    document, _ = _load_document(name)
    whole = tokenizers.Tokenizer.from_str(json.dumps(document))
    return _to_128(max(whole.get_vocab(with_added_tokens=True).values()) + 1)


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE of `size` ids learnt from `texts`: id 0 is <|endoftext|>, 1 to 256 are the bytes.

    Same texts, same tokenizer, on any number of cores. Raises DataError when `texts` hold too few different pairs.
    """
    least = 1 + len(ALPHABET)
    if size < least:
        raise DataError(f"a byte-level tokenizer of {size} ids is too small: 256 bytes and {END_OF_TEXT} take {least}")
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=list(ALPHABET.values()),
    )
    learner.train_from_iterator(_checked(texts), trainer)
    model = json.loads(learner.to_str())["model"]
    reached = len(model["vocab"])
    if reached != size:
        raise DataError(
            f"the text is too small for a tokenizer of {size} ids: it holds pairs for {reached}; "
            f'give more text or ask for at most "bpe:{reached}"'
        )
    document = byte_level_document(model["vocab"], [(left, right) for left, right in model["merges"]], [END_OF_TEXT])
    return Tokenizer(document, f"bpe:{size}")


def _load_document(name: str) -> tuple[dict[str, Any], str]:
    """The parsed `tokenizer.json` of `name`, and the name it goes by."""
    if name == "xgen":
        return xgen_document(), name
    path = Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    return read_document(path), str(path)


def _checked(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        _check_unicode(text)
        yield text


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as cause:
        raise DataError(
            f"character {cause.start} of the text is {text[cause.start]!a}, half of a surrogate pair; "
            "it comes from a faulty decoding: read the file as UTF-8"
        ) from cause


def _canonical(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _to_128(rows: int) -> int:
    return -(-rows // 128) * 128


def _no_end_of_text(document: dict[str, Any], name: str, end_of_text: str) -> str:
    candidates = ", ".join(control_tokens(document)) or "none"
    return (
        f"tokenizer {name} has no control token {end_of_text!r} to end documents with; "
        f"set tokenizer.end_of_text to one of its control tokens: {candidates}"
    )
