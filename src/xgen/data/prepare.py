"""Text into a token store: streaming, resumable, and put in its place only when whole.

Files are tokenised in parts of some megabytes, each kept in `OUT.partial` under a name derived from all that decides
its content. What an interrupted run has tokenised is therefore found again, and what has changed since is not.
When all parts are there, documents are given their roles (`xgen.data.roles`) and the store is put together.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xgen.data.roles import DUPLICATE, HELD_OUT, TRAIN, Marks, roles, training_texts
from xgen.data.sources import Document, Faults, OnError, TextFile, list_files, read_file
from xgen.data.store import FORMAT, SPLITS, Manifest, Options, SourceFile, SplitCounts, StoredFile, file_mark
from xgen.data.writer import SplitWriter, save_manifest, save_tokenizer, token_dtype, tokenizer_mark, write_json
from xgen.errors import DataError, StorageError
from xgen.tokens.tokenizer import Tokenizer, load_tokenizer, train_bpe

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of it that is done, 0 to 1."""

PART_BYTES = 64_000_000
PART_FILES = 4096
_ENCODE_BYTES = 4_000_000
_ENCODE_DOCUMENTS = 1024


@dataclass(frozen=True)
class _Read:
    """A file to read and what it was when this run began."""

    file: TextFile
    mark: StoredFile


@dataclass(frozen=True)
class _Part:
    """A tokenised part on disk: columns by document, in the order of the files."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    text_bytes: NDArray[np.int64]
    names: NDArray[np.uint8]
    name_lengths: NDArray[np.int64]
    marks: Marks
    documents: list[int]
    """by file"""
    skipped: Counter[str]


def prepare(
    sources: Sequence[str | Path],
    out: Path,
    tokenizer: Tokenizer,
    *,
    held_out: float = 0.05,
    on_error: OnError = "stop",
    text_field: str = "text",
    split_field: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Make the token store `out` of all documents of `sources` (see `xgen.data.sources`).

    `held_out` is the share of documents kept out of training. Called again after an interruption it goes on
    where it was. Raises `DataError` for a fault in the text (with file and line; counted in the manifest instead under
    `on_error = "skip"`), when `out` exists, or when there are no documents; `StorageError` when the disk is full.
    """
    if out.exists():
        raise DataError(f"{out} exists already; remove it or choose another place for the store")
    if not 0 <= held_out < 1:
        raise DataError(f"held_out is {held_out:g}; it is a share of the documents, at least 0 and below 1")
    options = Options(held_out=held_out, on_error=on_error, text_field=text_field, split_field=split_field)
    files = [file for source in sources for file in list_files(source, text_field, split_field)]
    reads = [_Read(file, file_mark(file.path)) for file in files]
    work = out.with_name(f"{out.name}.partial")
    try:
        (work / "parts").mkdir(parents=True, exist_ok=True)
        parts = _make_parts(reads, work / "parts", tokenizer, options, progress)
        manifest = _assemble(reads, parts, work / "store", tokenizer, options)
        (work / "store").replace(out)
        shutil.rmtree(work)
    except OSError as cause:
        raise StorageError.writing(out, cause) from cause
    return manifest


def choose_tokenizer(
    name: str, sources: Sequence[Sequence[TextFile]], held_out: float, on_error: OnError, end_of_text: str
) -> Tokenizer:
    """The tokenizer `name`; "bpe:N" is trained on the training documents of `sources`, each a store to be."""
    if not name.startswith("bpe:"):
        return load_tokenizer(name, end_of_text)
    size = name.removeprefix("bpe:")
    if not size.isdecimal():
        raise DataError(f"tokenizer {name!r}: after bpe: comes the number of ids, as in bpe:2048")
    texts = (text for files in sources for text in training_texts(list(files), held_out, on_error))
    return train_bpe(texts, int(size))


def _make_parts(
    reads: list[_Read], folder: Path, tokenizer: Tokenizer, options: Options, progress: Progress | None
) -> list[_Part]:
    total = sum(read.mark.bytes for read in reads)
    done = 0
    parts = []
    for group in _groups(reads):
        place = folder / _part_name(group, tokenizer, options)
        if not place.is_dir():
            _write_part(group, place, tokenizer, options)
        parts.append(_open_part(place, tokenizer))
        done += sum(read.mark.bytes for read in group)
        if progress is not None:
            progress("tokenising", done / max(total, 1))
    return parts


def _groups(reads: list[_Read]) -> Iterator[list[_Read]]:
    group: list[_Read] = []
    size = 0
    for read in reads:
        if group and (size + read.mark.bytes > PART_BYTES or len(group) == PART_FILES):
            yield group
            group, size = [], 0
        group.append(read)
        size += read.mark.bytes
    if group:
        yield group


def _part_name(group: list[_Read], tokenizer: Tokenizer, options: Options) -> str:
    """All that decides a part's content, hashed."""
    files = [
        (read.file.name, read.mark.sha256, read.file.text_field, read.file.split_field, read.file.name_field)
        for read in group
    ]
    decided_by = json.dumps([FORMAT, tokenizer.fingerprint, tokenizer.end_of_text, options.on_error, files])
    return hashlib.sha256(decided_by.encode()).hexdigest()[:32]


def _write_part(group: list[_Read], place: Path, tokenizer: Tokenizer, options: Options) -> None:
    beside = place.with_name(f"{place.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    faults = Faults(options.on_error)
    marks: list[Marks] = []
    names = bytearray()
    lengths: list[int] = []
    text_bytes: list[int] = []
    name_lengths: list[int] = []
    documents: list[int] = []
    with (beside / "tokens.bin").open("wb") as stream:
        for read in group:
            before = len(lengths)
            for batch in _batches(read_file(read.file, faults)):
                marks.append(Marks.of(batch))
                for document, ids in zip(batch, tokenizer.encode_batch([each.text for each in batch]), strict=True):
                    stream.write(np.array([tokenizer.end_of_text, *ids], token_dtype(tokenizer)).data)
                    name = document.name.encode()
                    names += name
                    lengths.append(len(ids) + 1)
                    text_bytes.append(len(document.text.encode()))
                    name_lengths.append(len(name))
            documents.append(len(lengths) - before)
    joined = Marks.joined([Marks.of([]), *marks])
    np.savez(
        beside / "index.npz",
        names=np.frombuffer(bytes(names), np.uint8),
        digest=joined.digest,
        draw=joined.draw,
        given=joined.given,
        lengths=np.array(lengths, np.int64),
        text_bytes=np.array(text_bytes, np.int64),
        name_lengths=np.array(name_lengths, np.int64),
    )
    write_json(beside / "part.json", {"documents": documents, "skipped": dict(faults.skipped)})
    beside.replace(place)


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


def _open_part(place: Path, tokenizer: Tokenizer) -> _Part:
    facts = json.loads((place / "part.json").read_text(encoding="utf-8"))
    with np.load(place / "index.npz", allow_pickle=False) as index:
        lengths = index["lengths"]
        return _Part(
            tokens=np.memmap(place / "tokens.bin", token_dtype(tokenizer), mode="r") if lengths.size
            else np.empty(0, token_dtype(tokenizer)),
            lengths=lengths,
            text_bytes=index["text_bytes"],
            names=index["names"],
            name_lengths=index["name_lengths"],
            marks=Marks(index["digest"], index["draw"], index["given"]),
            documents=facts["documents"],
            skipped=Counter(facts["skipped"]),
        )  # fmt: skip


def _assemble(reads: list[_Read], parts: list[_Part], place: Path, tokenizer: Tokenizer, options: Options) -> Manifest:
    skipped = sum((part.skipped for part in parts), Counter[str]())
    if not any(part.lengths.size for part in parts):
        left_out = ", ".join(f"{count} x {kind}" for kind, count in sorted(skipped.items()))
        raise DataError(f"there are no documents in the sources{f' ({left_out} skipped)' if left_out else ''}")
    role = roles(Marks.joined(part.marks for part in parts), options.held_out)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    files = save_tokenizer(place, tokenizer)
    counts: dict[str, SplitCounts] = {}
    for split, wanted in zip(SPLITS, (TRAIN, HELD_OUT), strict=True):
        with SplitWriter(place / split, token_dtype(tokenizer)) as writer:
            first = 0
            for part in parts:
                last = first + len(part.lengths)
                _copy(part, role[first:last] == wanted, writer)
                first = last
            counts[split], written = writer.close()
        files |= written
    found = [count for part in parts for count in part.documents]
    manifest = Manifest(
        format=FORMAT,
        tokenizer=tokenizer_mark(tokenizer),
        dtype="uint16" if token_dtype(tokenizer) == np.uint16 else "uint32",
        options=options,
        train=counts["train"],
        held_out=counts["held_out"],
        duplicates=int(np.count_nonzero(role == DUPLICATE)),
        skipped=dict(sorted(skipped.items())),
        sources=tuple(
            SourceFile(name=read.file.name, bytes=read.mark.bytes, sha256=read.mark.sha256, documents=count)
            for read, count in zip(reads, found, strict=True)
        ),
        files=files,
    )
    save_manifest(place, manifest)
    return manifest


def _copy(part: _Part, wanted: NDArray[np.bool_], writer: SplitWriter) -> None:
    """Add the wanted documents of a part, neighbours together."""
    token_ends = np.concatenate([[0], np.cumsum(part.lengths)])
    name_ends = np.concatenate([[0], np.cumsum(part.name_lengths)])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], wanted, [False]]).astype(np.int8))).tolist()
    for first, last in list(pairwise(edges))[::2]:
        writer.add(
            part.tokens[token_ends[first] : token_ends[last]],
            part.lengths[first:last],
            part.text_bytes[first:last],
            part.names[name_ends[first] : name_ends[last]],
            part.name_lengths[first:last],
        )
