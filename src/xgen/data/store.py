"""Token stores: a folder of tokenised documents, memory-mapped, with a manifest of what is in it.

manifest.json       what was read, with which tokenizer, counts, and the SHA-256 of every file
tokenizer.json
train/ held_out/
    tokens.bin          uint16 or uint32: each document is the end-of-text id and then its ids
    offsets.npy         int64 [documents + 1]: where each document starts in tokens.bin
    bytes.npy           int64 [documents]: bytes of each document's text
    names.utf8          the documents' names, one after the other
    name_offsets.npy    int64 [documents + 1]
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from xgen.errors import DataError
from xgen.tokens.tokenizer import Tokenizer, load_tokenizer

FORMAT: Final = 1
SplitName = Literal["train", "held_out"]
SPLITS: tuple[SplitName, ...] = ("train", "held_out")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"

Ids = NDArray[np.unsignedinteger[Any]]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredFile(_Section):
    bytes: int
    sha256: str


class SourceFile(StoredFile):
    """A file that was read; `documents` counts those found in it, before duplicates are left out."""

    name: str
    documents: int


class SplitCounts(_Section):
    documents: int
    tokens: int
    text_bytes: int


class TokenizerMark(_Section):
    """The tokenizer a store was made with; `end_of_text` is the id at the head of every document."""

    name: str
    fingerprint: str
    size: int
    end_of_text: str


class Options(_Section):
    """What decided the store's contents beside its sources."""

    held_out: float
    on_error: Literal["stop", "skip"]
    text_field: str
    split_field: str | None


class Manifest(_Section):
    """`manifest.json`. `skipped` counts what was left out under `on_error = "skip"`, by kind."""

    format: Literal[1]
    tokenizer: TokenizerMark
    dtype: Literal["uint16", "uint32"]
    options: Options
    train: SplitCounts
    held_out: SplitCounts
    duplicates: int
    skipped: dict[str, int]
    sources: tuple[SourceFile, ...]
    files: dict[str, StoredFile]


@dataclass(frozen=True)
class Split:
    """The documents of one split. Arrays are read-only and, in an opened store, memory-mapped."""

    tokens: Ids
    """[tokens] the ids of all documents, one after the other"""
    offsets: NDArray[np.int64]
    """[documents + 1]"""
    text_bytes: NDArray[np.int64]
    """[documents] bytes of UTF-8 text of each document"""
    name_bytes: NDArray[np.uint8]
    name_offsets: NDArray[np.int64]

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def token_count(self) -> int:
        return int(self.offsets[-1])

    def document(self, index: int) -> Ids:
        """The ids of a document, the end-of-text id at its head included: [tokens]."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def name(self, index: int) -> str:
        return self.name_bytes[self.name_offsets[index] : self.name_offsets[index + 1]].tobytes().decode()


@dataclass(frozen=True)
class Store:
    """An opened token store."""

    path: Path
    manifest: Manifest
    train: Split
    held_out: Split

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the hashes of all files: equal stores, and only those, have the same."""
        lines = "".join(f"{name} {file.sha256}\n" for name, file in sorted(self.manifest.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(str(self.path / TOKENIZER), self.manifest.tokenizer.end_of_text)


def open_store(path: Path) -> Store:
    """Map the store at `path`. Takes milliseconds whatever its size: sizes are checked, hashes are not (`verify`).

    Raises `DataError` when it is no store, or a file is missing or not of the size it was written with.
    """
    manifest = read_manifest(path)
    for name, file in manifest.files.items():
        found = _size(path / name)
        if found != file.bytes:
            raise DataError(
                f"{path / name} has {found} bytes where the manifest says {file.bytes}: the store is damaged or "
                "its copy incomplete; copy it again or make it anew with `xgen prepare`"
            )
    splits = {split: _open_split(path / split, manifest) for split in SPLITS}
    return Store(path, manifest, splits["train"], splits["held_out"])


def is_store(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def read_manifest(path: Path) -> Manifest:
    """The manifest of the store at `path`; `DataError` when there is none or it is not of this format."""
    if not path.is_dir():
        raise DataError(f"there is no token store at {path}; make one with `xgen prepare TEXTS --out {path}`")
    if not is_store(path):
        raise DataError(
            f"{path} is not a token store: it has no {MANIFEST}; make one with `xgen prepare TEXTS --out STORE`"
        )
    try:
        return Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except (ValidationError, OSError) as cause:
        raise DataError(
            f"{path / MANIFEST} cannot be read as a store's manifest of format {FORMAT}: "
            f"{_first_line(cause)}; make the store anew with `xgen prepare`"
        ) from cause


def verify(path: Path) -> Iterator[tuple[str, bool]]:
    """Compare every file of the store with the hash it was written with: pairs (file name, is it whole)."""
    for name, file in read_manifest(path).files.items():
        whole = (path / name).is_file() and file_mark(path / name) == file
        yield name, whole


def file_mark(path: Path) -> StoredFile:
    """Size and SHA-256 of a file; `DataError` when it cannot be read."""
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
            return StoredFile(bytes=stream.tell(), sha256=digest.hexdigest())
    except OSError as cause:
        raise DataError(f"cannot read {path}: {cause.strerror or cause}") from cause


def _open_split(folder: Path, manifest: Manifest) -> Split:
    split = Split(
        tokens=_map(folder / "tokens.bin", np.dtype(manifest.dtype)),
        offsets=_load(folder / "offsets.npy"),
        text_bytes=_load(folder / "bytes.npy"),
        name_bytes=_map(folder / "names.utf8", np.dtype(np.uint8)),
        name_offsets=_load(folder / "name_offsets.npy"),
    )
    if split.token_count != len(split.tokens):
        raise DataError(
            f"{folder}: offsets.npy ends at {split.token_count} and tokens.bin at {len(split.tokens)}: "
            "the store is damaged; make it anew with `xgen prepare`"
        )
    return split


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The file as a read-only array; an empty file cannot be mapped and needs no map."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))


def _load(path: Path) -> NDArray[np.int64]:
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, OSError) as cause:
        raise DataError(f"{path} is damaged ({cause}); make the store anew with `xgen prepare`") from cause


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as cause:
        raise DataError(
            f"cannot read {path}: {cause.strerror or cause}; make the store anew with `xgen prepare`"
        ) from cause


def _first_line(cause: Exception) -> str:
    if isinstance(cause, ValidationError):
        problem = cause.errors()[0]
        return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    return str(cause)
