"""Which documents are trained on, which are held out, and which are copies of an earlier one.

Decided by the documents alone: by a hash of the text, so that neither the order of the files, nor their names, nor
documents added later move one from one side to the other; and a text that two sources share is on one side in both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from xgen.data.sources import Document, Faults, OnError, TextFile, read_file
from xgen.data.store import SPLITS

TRAIN, HELD_OUT, DUPLICATE = 0, 1, 2
_OURS = -1


@dataclass(frozen=True)
class Marks:
    """Per document: what its role is decided by."""

    digest: NDArray[np.uint64]
    """[documents, 2] of the text: equal texts are copies"""
    draw: NDArray[np.uint64]
    """[documents] of the text, uniform: small ones are held out"""
    given: NDArray[np.int8]
    """[documents] TRAIN or HELD_OUT where the source says so, or _OURS"""

    @classmethod
    def of(cls, documents: Iterable[Document]) -> Self:
        digests, draws, given = bytearray(), bytearray(), []
        for document in documents:
            digest = hashlib.sha256(document.text.encode()).digest()
            digests += digest[:16]
            draws += digest[16:24]
            given.append(_OURS if document.split is None else SPLITS.index(document.split))
        return cls(
            np.frombuffer(bytes(digests), "<u8").reshape(-1, 2), np.frombuffer(bytes(draws), "<u8"),
            np.array(given, np.int8),
        )  # fmt: skip

    @classmethod
    def joined(cls, parts: Iterable[Marks]) -> Self:
        parts = list(parts)
        return cls(
            np.concatenate([part.digest for part in parts]),
            np.concatenate([part.draw for part in parts]),
            np.concatenate([part.given for part in parts]),
        )


def roles(marks: Marks, held_out: float) -> NDArray[np.int8]:
    """TRAIN, HELD_OUT or DUPLICATE for each document; of equal texts the first is kept.

    A share `held_out` of the documents whose source does not say is held out. When it is above 0 and there
    are two documents or more, at least one is held out and at least one is trained on.
    """
    role = marks.given.copy()
    role[_copies(marks.digest)] = DUPLICATE
    free = np.flatnonzero(role == _OURS)
    role[free] = np.where(marks.draw[free] < np.uint64(int(held_out * 2.0**64)), HELD_OUT, TRAIN)
    if held_out > 0 and np.count_nonzero(role != DUPLICATE) >= 2 and free.size:
        ranked = free[np.argsort(marks.draw[free], kind="stable")]
        if not (role == HELD_OUT).any():
            role[ranked[0]] = HELD_OUT
        if not (role == TRAIN).any():
            role[ranked[-1]] = TRAIN
    return role


def training_texts(files: list[TextFile], held_out: float, on_error: OnError) -> Iterator[str]:
    """The texts of the documents that are trained on, as a store made of `files` will have them.

    Reads the files twice: who is held out is known only when all have been seen.
    """
    role = roles(Marks.of(_all(files, on_error)), held_out)
    for document, mine in zip(_all(files, on_error), role.tolist(), strict=True):
        if mine == TRAIN:
            yield document.text


def _all(files: list[TextFile], on_error: OnError) -> Iterator[Document]:
    faults = Faults(on_error)
    for file in files:
        yield from read_file(file, faults)


def _copies(digest: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The documents whose text an earlier document has."""
    order = np.lexsort((digest[:, 1], digest[:, 0]))
    ranked = digest[order]
    same: NDArray[np.bool_] = (ranked[1:] == ranked[:-1]).all(axis=1)
    return np.asarray(order[1:][same], np.int64)
