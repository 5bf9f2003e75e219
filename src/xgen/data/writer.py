"""Writing token stores: beside their place, and put there by one rename when whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from xgen.data.store import MANIFEST, TOKENIZER, Manifest, SplitCounts, StoredFile, TokenizerMark, file_mark
from xgen.tokens.tokenizer import Tokenizer


class _HashedFile:
    """A file that is hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb")
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, data: NDArray[Any]) -> None:
        raw = np.ascontiguousarray(data).view(np.uint8).data
        self._stream.write(raw)
        self._hash.update(raw)
        self._bytes += len(raw)

    def close(self) -> StoredFile:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return StoredFile(bytes=self._bytes, sha256=self._hash.hexdigest())

    def abandon(self) -> None:
        self._stream.close()


class SplitWriter:
    """Writes one split, documents in the order they are added."""

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._dtype = dtype
        self._tokens = _HashedFile(folder / "tokens.bin")
        self._names = _HashedFile(folder / "names.utf8")
        self._lengths: list[NDArray[np.int64]] = []
        self._text_bytes: list[NDArray[np.int64]] = []
        self._name_lengths: list[NDArray[np.int64]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tokens.abandon()
        self._names.abandon()

    def add(
        self,
        tokens: NDArray[Any],
        lengths: NDArray[np.int64],
        text_bytes: NDArray[np.int64],
        names: NDArray[np.uint8],
        name_lengths: NDArray[np.int64],
    ) -> None:
        """Add documents: their ids one after the other, each with the end-of-text id at its head, and for
        each its count of ids, the bytes of its text and of its name; `names` are the names' bytes."""
        if tokens.dtype != self._dtype:
            raise ValueError(f"tokens are {tokens.dtype}, the store is {self._dtype}")
        self._tokens.write(tokens)
        self._names.write(names)
        self._lengths.append(np.asarray(lengths, np.int64))
        self._text_bytes.append(np.asarray(text_bytes, np.int64))
        self._name_lengths.append(np.asarray(name_lengths, np.int64))

    def close(self) -> tuple[SplitCounts, dict[str, StoredFile]]:
        """Finish the split: its counts, and the mark of each file by its name within the store."""
        offsets = _offsets(self._lengths)
        text_bytes = _joined(self._text_bytes)
        files = {"tokens.bin": self._tokens.close(), "names.utf8": self._names.close()}
        arrays = {"offsets": offsets, "bytes": text_bytes, "name_offsets": _offsets(self._name_lengths)}
        for name, array in arrays.items():
            np.save(self._folder / f"{name}.npy", array, allow_pickle=False)
            files[f"{name}.npy"] = file_mark(self._folder / f"{name}.npy")
        counts = SplitCounts(
            documents=len(text_bytes), tokens=int(offsets[-1]), text_bytes=int(text_bytes.sum(dtype=np.int64))
        )
        return counts, {f"{self._folder.name}/{name}": mark for name, mark in files.items()}


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest of the store's types that holds every id of the tokenizer."""
    return np.dtype(np.uint16 if tokenizer.size <= 1 << 16 else np.uint32)


def tokenizer_mark(tokenizer: Tokenizer) -> TokenizerMark:
    return TokenizerMark(
        name=tokenizer.name,
        fingerprint=tokenizer.fingerprint,
        size=tokenizer.size,
        end_of_text=tokenizer.decode([tokenizer.end_of_text]),
    )


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> dict[str, StoredFile]:
    """Put the tokenizer into the store: its file's mark by name."""
    tokenizer.save(folder / TOKENIZER)
    return {TOKENIZER: file_mark(folder / TOKENIZER)}


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, last of all files: a folder without one is no store."""
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))


def write_json(path: Path, value: object) -> None:
    """Write `value` so that the file is there whole or not at all."""
    beside = path.with_name(f"{path.name}.new")
    with beside.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)


def _joined(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *parts])


def _offsets(lengths: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(_joined(lengths))])
