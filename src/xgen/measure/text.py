"""The held-out text that all checkpoints are measured on, and what a general compressor makes of it."""

from __future__ import annotations

import lzma
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Protocol

import numpy as np
import numpy.typing as npt

from xgen.errors import DataError, RecipeError
from xgen.measure.losses import Ids

WINDOWS_PER_DOCUMENT = 3
"""Windows of text wanted of a document: loss by position can score what lies a window away from its ends."""


class DocumentSplit(Protocol):
    """What is needed of a token store's split."""

    @property
    def documents(self) -> int: ...

    @property
    def offsets(self) -> npt.NDArray[np.int64]: ...

    def name(self, index: int) -> str: ...

    def document(self, index: int) -> npt.NDArray[np.generic]: ...


@dataclass(frozen=True)
class HeldOut:
    """A held-out document, or its beginning: `ids` has the leading end-of-text."""

    source: str
    name: str
    ids: Ids
    whole: bool


@dataclass(frozen=True)
class Sample:
    """The documents measured on, and in words what was left out."""

    documents: tuple[HeldOut, ...]
    notes: tuple[str, ...] = ()

    @property
    def ids(self) -> list[Ids]:
        return [document.ids for document in self.documents]

    def text(self, token_bytes: Callable[[int], bytes]) -> bytes:
        """The bytes of all tokens but the leading end-of-texts, in order."""
        known = {token: token_bytes(token) for token in np.unique(np.concatenate(self.ids)).tolist()}
        return b"".join(known[token] for document in self.documents for token in document.ids[1:].tolist())


def sample_documents(splits: Mapping[str, DocumentSplit], tokens: int, at_least: int, seed: int = 1) -> Sample:
    """About `tokens` ids of held-out text: the beginnings of documents of `at_least` ids or more.

    Sources take turns, documents within one come in a seeded random order, and as many are taken as
    leave each about three times `at_least` ids. They then share the budget evenly, what short ones
    leave over going to the long. When no document has `at_least` ids all are eligible, with a note.

    Raises:
        DataError: no held-out document at all.
        RecipeError: `tokens` do not hold one window of `at_least` ids.
    """
    if tokens < at_least:
        raise RecipeError(
            f"evaluation.tokens: {tokens} are less than the {at_least} that the largest context needs; "
            f"take {10 * WINDOWS_PER_DOCUMENT * at_least} or more, for ten documents"
        )
    sizes = {name: np.diff(split.offsets) for name, split in splits.items()}
    total = sum(len(lengths) for lengths in sizes.values())
    if total == 0:
        raise DataError(
            f"none of the sources {', '.join(splits)} has held-out documents to measure on; "
            "set data.held_out above 0 and prepare the text again"
        )
    longest = max(int(lengths.max()) for lengths in sizes.values() if len(lengths))
    enough = at_least if longest >= at_least else 2
    notes = []
    eligible = sum(int((lengths >= enough).sum()) for lengths in sizes.values())
    if enough < at_least:
        notes.append(
            f"No held-out document has the {at_least} tokens that the largest context needs (the longest has "
            f"{longest}): loss by position and fixed-target loss are not measured. "
            "Hold out longer documents or lower evaluation.contexts."
        )
    elif eligible < total:
        left_out = total - eligible
        notes.append(f"{left_out} of {total} held-out documents are shorter than {at_least} tokens and left out.")
    wanted = max(1, tokens // (WINDOWS_PER_DOCUMENT * min(at_least, longest)))
    chosen = _take_turns(sizes, enough, seed)[:wanted]
    if len(chosen) < eligible:
        notes.append(f"{len(chosen)} of {eligible} held-out documents are measured on (evaluation.tokens is {tokens}).")
    cap = _cap([int(sizes[source][index]) for source, index in chosen], tokens)
    return Sample(tuple(_excerpt(source, splits[source], index, cap) for source, index in sorted(chosen)), tuple(notes))


def xz_bits_per_byte(text: bytes) -> float:
    """Bits a byte of `xz -9e` on the whole text at once, container included."""
    if not text:
        raise DataError("the held-out text is empty; hold out some documents (data.held_out)")
    return 8 * len(lzma.compress(text, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def _take_turns(sizes: Mapping[str, npt.NDArray[np.int64]], enough: int, seed: int) -> list[tuple[str, int]]:
    """(source, document) of all documents of `enough` ids: one of each source, then the next of each."""
    queues = []
    for number, (source, lengths) in enumerate(sizes.items()):
        found = np.flatnonzero(lengths >= enough)
        order = np.random.default_rng([seed, number]).permutation(found)
        queues.append([(source, index) for index in order.tolist()])
    return [item for item in chain.from_iterable(zip_longest(*queues)) if item is not None]


def _cap(sizes: Sequence[int], tokens: int) -> int:
    """The cap c for which the sum of min(size, c) comes nearest below `tokens`, at least 2."""
    left, waiting = tokens, sorted(sizes)
    while waiting and waiting[0] * len(waiting) <= left:
        left -= waiting.pop(0)
    return max(2, left // len(waiting)) if waiting else max(sizes, default=2)


def _excerpt(source: str, split: DocumentSplit, index: int, cap: int) -> HeldOut:
    ids = np.asarray(split.document(index))
    return HeldOut(source, split.name(index), ids[:cap].astype(np.int32), len(ids) <= cap)
