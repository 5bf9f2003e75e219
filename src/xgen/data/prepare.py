"""Text into a token store: streaming, resumable, and put in its place only when whole.

Files are tokenised in parts (`xgen.data.parts`) kept in `OUT.partial`, so that an interrupted run goes on where it was.
When all parts are there, documents are given their roles (`xgen.data.roles`) and the store is put together.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xgen.data.parts import MarkedFile, Part, groups, open_part, part_name, write_part
from xgen.data.roles import DUPLICATE, HELD_OUT, TRAIN, Marks, roles, training_texts
from xgen.data.sources import OnError, TextFile, list_files
from xgen.data.store import FORMAT, SPLITS, Manifest, Options, SourceFile, SplitCounts, StoredFile, file_mark
from xgen.data.writer import SplitWriter, save_manifest, save_tokenizer, token_dtype, tokenizer_mark
from xgen.errors import DataError, StorageError
from xgen.tokens.tokenizer import Tokenizer, load_tokenizer, train_bpe

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of it that is done, 0 to 1."""


def quietly(doing: str, fraction: float) -> None:
    """A `Progress` that says nothing."""


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
    check_place(out)
    check_held_out(held_out)
    options = Options(held_out=held_out, on_error=on_error, text_field=text_field, split_field=split_field)
    files = [file for source in sources for file in list_files(source, text_field, split_field)]
    report = quietly if progress is None else progress
    reads = [MarkedFile(file, file_mark(file.path)) for file in files]
    work = out.with_name(f"{out.name}.partial")
    try:
        (work / "parts").mkdir(parents=True, exist_ok=True)
        parts = _make_parts(reads, work / "parts", tokenizer, options, report)
        manifest = _assemble(reads, parts, work / "store", tokenizer, options)
        (work / "store").replace(out)
        shutil.rmtree(work)
    except OSError as cause:
        raise StorageError.writing(out, cause) from cause
    return manifest


def check_place(out: Path) -> None:
    """Raise `DataError` when `out` is taken; worth asking before a tokenizer is trained for it."""
    if out.exists():
        raise DataError(f"{out} exists already; remove it or choose another place for the store")


def check_held_out(held_out: float) -> None:
    """Raise `DataError` when `held_out` is no share that leaves something to train on."""
    if not 0 <= held_out < 1:
        raise DataError(f"held_out is {held_out:g}; it is a share of the documents, at least 0 and below 1, as in 0.05")


def choose_tokenizer(
    name: str, sources: Sequence[Sequence[TextFile]], held_out: float, on_error: OnError, end_of_text: str
) -> Tokenizer:
    """The tokenizer `name`; "bpe:N" is trained on the training documents of `sources`, each a store to be."""
    if not name.startswith("bpe:"):
        return load_tokenizer(name, end_of_text)
    size = name.removeprefix("bpe:")
    if not size.isdecimal():
        raise DataError(f"tokenizer {name!r}: after bpe: comes the number of ids, as in bpe:2048")
    check_held_out(held_out)
    texts = (text for files in sources for text in training_texts(list(files), held_out, on_error))
    return train_bpe(texts, int(size))


def _make_parts(
    reads: list[MarkedFile], folder: Path, tokenizer: Tokenizer, options: Options, report: Progress
) -> list[Part]:
    total = max(1, sum(read.mark.bytes for read in reads))
    parts: list[Part] = []
    done = documents = 0

    def advance(documents_of_part: int, bytes_of_part: int) -> None:
        report(f"tokenising ({documents + documents_of_part:,} documents)", (done + bytes_of_part) / total)

    for group in groups(reads):
        place = folder / part_name(group, tokenizer, options.on_error)
        if not place.is_dir():
            write_part(group, place, tokenizer, options.on_error, advance)
        parts.append(open_part(place, tokenizer))
        done += sum(read.mark.bytes for read in group)
        documents += len(parts[-1].lengths)
        advance(0, 0)
    return parts


def _assemble(
    reads: list[MarkedFile], parts: list[Part], place: Path, tokenizer: Tokenizer, options: Options
) -> Manifest:
    """Give the documents their roles and put the store together in the folder `place`."""
    skipped = sum((part.skipped for part in parts), Counter[str]())
    if not any(part.lengths.size for part in parts):
        left_out = ", ".join(f"{count} x {kind}" for kind, count in sorted(skipped.items()))
        raise DataError(f"there are no documents in the sources{f' (left out: {left_out})' if left_out else ''}")
    role = roles(Marks.joined(part.marks for part in parts), options.held_out)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    files = save_tokenizer(place, tokenizer)
    train, files_of_train = _write_split(parts, role == TRAIN, place / SPLITS[TRAIN], tokenizer)
    held_out, files_of_held_out = _write_split(parts, role == HELD_OUT, place / SPLITS[HELD_OUT], tokenizer)
    found = [count for part in parts for count in part.documents]
    manifest = Manifest(
        format=FORMAT,
        tokenizer=tokenizer_mark(tokenizer),
        dtype="uint16" if token_dtype(tokenizer) == np.uint16 else "uint32",
        options=options,
        train=train,
        held_out=held_out,
        duplicates=int(np.count_nonzero(role == DUPLICATE)),
        skipped=dict(sorted(skipped.items())),
        sources=tuple(
            SourceFile(name=read.file.name, bytes=read.mark.bytes, sha256=read.mark.sha256, documents=count)
            for read, count in zip(reads, found, strict=True)
        ),
        files=files | files_of_train | files_of_held_out,
    )
    save_manifest(place, manifest)
    return manifest


def _write_split(
    parts: list[Part], wanted: NDArray[np.bool_], folder: Path, tokenizer: Tokenizer
) -> tuple[SplitCounts, dict[str, StoredFile]]:
    with SplitWriter(folder, token_dtype(tokenizer)) as writer:
        first = 0
        for part in parts:
            last = first + len(part.lengths)
            _copy(part, wanted[first:last], writer)
            first = last
        return writer.close()


def _copy(part: Part, wanted: NDArray[np.bool_], writer: SplitWriter) -> None:
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
