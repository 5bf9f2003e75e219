"""Tokenised parts: what is kept of a preparation that is interrupted.

A part is a few megabytes of source files, tokenised into a folder named after the hash of all that decides its content.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from xgen.data.roles import Marks
from xgen.data.sources import Document, Faults, OnError, TextFile, is_packed, read_file
from xgen.data.store import FORMAT, StoredFile
from xgen.data.writer import token_dtype, write_json
from xgen.tokens.tokenizer import Tokenizer

PART_BYTES = 64_000_000
PART_FILES = 4096
_ENCODE_BYTES = 4_000_000
_ENCODE_DOCUMENTS = 1024

Advance = Callable[[int, int], None]
"""Called with the documents and the bytes of source files that are done."""


@dataclass(frozen=True)
class MarkedFile:
    """A file to read and what it was when the preparation began."""

    file: TextFile
    mark: StoredFile


@dataclass(frozen=True)
class Part:
    """A tokenised part: columns by document, in the order of the files."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    text_bytes: NDArray[np.int64]
    names: NDArray[np.uint8]
    name_lengths: NDArray[np.int64]
    marks: Marks
    documents: list[int]
    """by file"""
    skipped: Counter[str]


def groups(files: list[MarkedFile]) -> Iterator[list[MarkedFile]]:
    """The files of each part, in order."""
    group: list[MarkedFile] = []
    size = 0
    for each in files:
        if group and (size + each.mark.bytes > PART_BYTES or len(group) == PART_FILES):
            yield group
            group, size = [], 0
        group.append(each)
        size += each.mark.bytes
    if group:
        yield group


def part_name(group: list[MarkedFile], tokenizer: Tokenizer, on_error: OnError) -> str:
    """The name of the part made of `group`: a hash of all that decides its content."""
    files = [
        (each.file.name, each.mark.sha256, each.file.text_field, each.file.split_field, each.file.name_field)
        for each in group
    ]
    decided_by = json.dumps([FORMAT, tokenizer.fingerprint, tokenizer.end_of_text, on_error, files])
    return hashlib.sha256(decided_by.encode()).hexdigest()[:32]


def write_part(group: list[MarkedFile], place: Path, tokenizer: Tokenizer, on_error: OnError, advance: Advance) -> None:
    """Tokenise the files of `group` into the folder `place`, which is there only when whole."""
    beside = place.with_name(f"{place.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    faults = Faults(on_error)
    columns = _Columns()
    documents: list[int] = []
    done = 0
    with (beside / "tokens.bin").open("wb") as stream:
        for each in group:
            before, read = columns.documents, 0
            for batch in _batches(read_file(each.file, faults)):
                read += columns.add(batch, tokenizer, stream)
                # How far a compressed file is read says little about how far it goes.
                advance(columns.documents, done + (0 if is_packed(each.file) else min(read, each.mark.bytes)))
            documents.append(columns.documents - before)
            done += each.mark.bytes
    columns.save(beside / "index.npz")
    write_json(beside / "part.json", {"documents": documents, "skipped": dict(faults.skipped)})
    beside.replace(place)


def open_part(place: Path, tokenizer: Tokenizer) -> Part:
    """Map the part in the folder `place`."""
    facts = json.loads((place / "part.json").read_text(encoding="utf-8"))
    dtype = token_dtype(tokenizer)
    with np.load(place / "index.npz", allow_pickle=False) as index:
        lengths = index["lengths"]
        return Part(
            tokens=np.memmap(place / "tokens.bin", dtype, mode="r") if lengths.size else np.empty(0, dtype),
            lengths=lengths,
            text_bytes=index["text_bytes"],
            names=index["names"],
            name_lengths=index["name_lengths"],
            marks=Marks(index["digest"], index["draw"], index["given"]),
            documents=facts["documents"],
            skipped=Counter(facts["skipped"]),
        )


@dataclass
class _Columns:
    """What a part holds beside the tokens, as it grows."""

    marks: list[Marks] = field(default_factory=list)
    names: bytearray = field(default_factory=bytearray)
    lengths: list[int] = field(default_factory=list)
    text_bytes: list[int] = field(default_factory=list)
    name_lengths: list[int] = field(default_factory=list)

    @property
    def documents(self) -> int:
        return len(self.lengths)

    def add(self, batch: list[Document], tokenizer: Tokenizer, stream: IO[bytes]) -> int:
        """Tokenise documents onto `stream`; the bytes of their text."""
        self.marks.append(Marks.of(batch))
        ids = tokenizer.encode_batch([document.text for document in batch])
        for document, row in zip(batch, ids, strict=True):
            stream.write(np.array([tokenizer.end_of_text, *row], token_dtype(tokenizer)).data)
            name = document.name.encode()
            self.names += name
            self.name_lengths.append(len(name))
            self.lengths.append(len(row) + 1)
            self.text_bytes.append(len(document.text.encode()))
        return sum(self.text_bytes[-len(batch) :])

    def save(self, path: Path) -> None:
        marks = Marks.joined([Marks.of([]), *self.marks])
        np.savez(
            path,
            names=np.frombuffer(bytes(self.names), np.uint8),
            digest=marks.digest,
            draw=marks.draw,
            given=marks.given,
            lengths=np.array(self.lengths, np.int64),
            text_bytes=np.array(self.text_bytes, np.int64),
            name_lengths=np.array(self.name_lengths, np.int64),
        )


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lots that keep the cores busy and the memory small."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _ENCODE_BYTES or len(batch) == _ENCODE_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
