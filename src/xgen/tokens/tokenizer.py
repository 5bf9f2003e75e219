"""One tokenizer for every room: text to ids and back, with control tokens kept out of the reach of text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from xgen.errors import DataError, StorageError
from xgen.tokens.bytelevel import ALPHABET, END_OF_TEXT, byte_level_document, cut, is_gpt2_split, to_bytes
from xgen.tokens.document import (
    BARRED,
    control_tokens,
    decodes_bytes,
    is_byte_level,
    piece_bytes,
    read_document,
    strips_space,
    vocabulary,
    with_spelling,
    without_control,
)
from xgen.tokens.xgen import EMBEDDING_ROWS, xgen_document

UNKNOWN = "\ufffd"
"""What an id without a token decodes to, as does a byte that is not UTF-8."""

PART = 1 << 15
"""Characters of a part that long texts are cut into: many to a core, and few enough to keep all cores busy."""

GROUP = 1 << 21
"""Characters encoded at once: the tokenizers library holds about 120 bytes for each, so about 250 MB."""

LARGEST_ID = 1 << 24
"""Tables by id are held; a higher id could only come from a faulty file, and would fill the memory."""

LISTED = 12
"""Control tokens that an error lists; some vocabularies hold hundreds."""


class Tokenizer:
    """Text to ids and back, over a standard `tokenizer.json`.

    Two encoders are held: one that knows the control tokens, and one from whose vocabulary they are cut. Neither is
    ever changed, so threads may share a Tokenizer.
    """

    def __init__(self, document: dict[str, Any], name: str, end_of_text: str = END_OF_TEXT) -> None:
        """`document` is a parsed `tokenizer.json` as `read_document` gives it, `name` what errors call it.

        Raises DataError when `end_of_text` is not one of its control tokens, its ids contradict each other, or the
        tokenizers library finds the document broken.
        """
        self.name = name
        with _library(name):
            self._whole = tokenizers.Tokenizer.from_str(json.dumps(document))
        self._document = document
        self._control_ids = control_tokens(document)
        if end_of_text not in self._control_ids:
            raise DataError(_no_end_of_text(document, name, end_of_text))
        self.end_of_text: int = self._control_ids[end_of_text]
        self._vocabulary = vocabulary(document)
        self.size: int = max(self._vocabulary.values()) + 1
        """Count of real ids: the highest, plus one."""
        self._check_ids()
        plain = without_control(document)
        with _library(name):
            self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        self._guarded = document["model"]["type"] == "Unigram"
        self._cuttable = is_gpt2_split(plain)

    @property
    def document(self) -> dict[str, Any]:
        """The parsed `tokenizer.json`; not to be changed."""
        return self._document

    @property
    def control(self) -> Mapping[str, int]:
        """Name -> id of the control tokens."""
        return self._control_ids

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
            with _library(self.name):
                ids: list[int] = self._whole.encode(text, add_special_tokens=False).ids
            return ids
        return self.encode_batch([text])[0]

    def spelt(self, spelling: Mapping[str, str]) -> Callable[[str], list[int]]:
        """`encode` of texts in which some characters stand for control tokens: `spelling` has one for each name.

        Only those characters come out as control tokens, so they must be such as no text holds. Raises DataError for a
        name that is no control token, and where the tokenizer loses one.
        """
        if unknown := [name for name in spelling if name not in self._control_ids]:
            raise DataError(f"tokenizer {self.name} has no control token {unknown[0]!r}")
        with _library(self.name):
            encoder = tokenizers.Tokenizer.from_str(json.dumps(with_spelling(self._document, spelling)))
        ids = {encoder.token_to_id(character): self._control_ids[name] for name, character in spelling.items()}

        def encode(text: str) -> list[int]:
            _check_unicode(text)
            with _library(self.name):
                found: list[int] = encoder.encode(text, add_special_tokens=False).ids
            if self._guarded:
                self._check_barred([found])
            if sum(index in ids for index in found) != sum(map(text.count, spelling.values())):
                raise DataError(f"tokenizer {self.name} does not find its own control tokens {', '.join(spelling)}")
            return [ids.get(index, index) for index in found]

        return encode

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel on all cores; working memory does not grow with the texts."""
        rows: list[list[int]] = [[] for _ in texts]
        for group in _groups(self._parts(texts)):
            with _library(self.name):
                batch = self._plain.encode_batch_fast([part for _, part in group], add_special_tokens=False)
            for (row, _), encoding in zip(group, batch, strict=True):
                rows[row].extend(encoding.ids)
        if self._guarded:
            self._check_barred(rows)
        return rows

    def _parts(self, texts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Each text's number and, where that changes no id, its parts."""
        for row, text in enumerate(texts):
            _check_unicode(text)
            for part in cut(text, PART) if self._cuttable else (text,):
                yield row, part

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; control tokens by their names, ids without a token and broken UTF-8 as U+FFFD."""
        known = [int(index) for index in ids]
        if min(known, default=0) < 0:
            raise DataError(f"id {min(known)} is negative: it stands for no token; remove masked positions first")
        if is_byte_level(self._document):
            return b"".join(map(self.token_bytes, known)).decode("utf-8", errors="replace")
        if decodes_bytes(self._document):
            # The library gives up a whole run of bytes where one is wrong.
            text = b"".join(map(self.token_bytes, known)).decode("utf-8", errors="replace")
            return text.removeprefix(" " * strips_space(self._document))
        return "".join(
            self._whole.decode(list(run), skip_special_tokens=False) if real else UNKNOWN * len(list(run))
            for real, run in groupby(known, key=self._is_real)
        )

    def token_bytes(self, index: int) -> bytes:
        """The bytes that id `index` stands for: U+FFFD's for an id without a token, its name for a control token."""
        piece = self._pieces[index] if index < self.size else None
        return UNKNOWN.encode() if piece is None else piece

    def save(self, path: Path) -> None:
        """Write a `tokenizer.json` that stock `tokenizers` loads; into the folder when `path` is one.

        Raises StorageError when it cannot be written; a file that was there before is then whole.
        """
        target = path / "tokenizer.json" if path.is_dir() else path
        beside = target.with_name(target.name + ".partial")
        try:
            beside.write_text(json.dumps(self._document, ensure_ascii=False, indent=1), encoding="utf-8")
            beside.replace(target)
        except OSError as cause:
            beside.unlink(missing_ok=True)
            raise StorageError.writing(target, cause) from cause

    @cached_property
    def _pieces(self) -> list[bytes | None]:
        """Bytes by id; None where no token has the id."""
        pieces: list[bytes | None] = [None] * self.size
        added = {token["content"] for token in self._document["added_tokens"]}
        byte_level = is_byte_level(self._document)
        for token, index in self._vocabulary.items():
            if token in added:
                pieces[index] = token.encode()
            else:
                pieces[index] = to_bytes(token) if byte_level else piece_bytes(token, self._document["model"])
        return pieces

    def _is_real(self, index: int) -> bool:
        return index < self.size and self._pieces[index] is not None

    def _check_ids(self) -> None:
        if self.size > LARGEST_ID:
            raise DataError(f"tokenizer {self.name} has an id {self.size - 1}; at most {LARGEST_ID - 1} is read")
        if len(set(self._vocabulary.values())) != len(self._vocabulary):
            raise DataError(f"tokenizer {self.name} has two tokens with one id; correct the file")
        for token in self._document["added_tokens"]:
            content, stated, real = token["content"], token["id"], self._whole.token_to_id(token["content"])
            if real != stated:
                raise DataError(
                    f"tokenizer {self.name} says that {content!r} has id {stated}, but it comes out as {real}: ids of "
                    "added tokens must be those of the vocabulary or go on from its end; correct the file"
                )

    def _check_barred(self, rows: list[list[int]]) -> None:
        if found := next((index for row in rows for index in row if index in self._barred), None):
            raise DataError(f"the text holds U+10FFFF followed by {found}, which stands for no text; take it out")

    @cached_property
    def _barred(self) -> set[int]:
        """Ids of BARRED pieces, but for the one that unknown characters have."""
        model = without_control(self._document)["model"]
        barred = {index for index, (piece, _) in enumerate(model["vocab"]) if piece.startswith(BARRED)}
        return barred - {model["unk_id"]}


@contextmanager
def _library(name: str) -> Iterator[None]:
    """The tokenizers library's failures as DataError: it raises bare Exception, and where Rust panics a class of
    BaseException that cannot be imported."""
    try:
        yield
    except BaseException as cause:
        if type(cause) is not Exception and type(cause).__name__ != "PanicException":
            raise
        raise DataError(f"tokenizer {name} cannot be used: {cause}") from cause


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
    return _to_128(max(vocabulary(document).values()) + 1)


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


def _groups(parts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """`parts` in lists of about GROUP characters."""
    group: list[tuple[int, str]] = []
    characters = 0
    for row, part in parts:
        group.append((row, part))
        characters += len(part)
        if characters >= GROUP:
            yield group
            group, characters = [], 0
    if group:
        yield group


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
    # What vocabularies call such a token: </s>, <eos>, <|eot_id|>, <|end_of_text|>, [SEP]. Those are listed first.
    found = sorted(control_tokens(document), key=lambda token: not re.search(r"(?i)/s>|eos|eot|end|sep", token))
    shown = ", ".join(token if token.isprintable() else ascii(token) for token in found[:LISTED]) or "none"
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return (
        f"tokenizer {name} has no control token {end_of_text!r} to end documents with; "
        f"set tokenizer.end_of_text to one of its control tokens: {shown}{more}"
    )
