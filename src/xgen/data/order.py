"""The order of documents, sequences and sources: pure functions of integers.

Nothing here keeps a state or draws a random number. Whatever comes "at random" is a keyed hash of
what it is asked about, so any process can compute any part of the order by itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from xgen.errors import DataError

Integers = NDArray[np.int64]
_Words = NDArray[np.uint64]

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_ROUNDS = 6
"""Luby and Rackoff need four rounds for a permutation that looks random; two more cost little."""

_SHARE_BITS = 32


def derive_key(*parts: str | int) -> int:
    """A 64-bit key that depends on every one of `parts` and on their order."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(words: _Words) -> _Words:
    """The output function of splitmix64 (Steele, Lea and Flood, 2014): a bijection of 64-bit words."""
    words = words + np.uint64(_GAMMA)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def document_order(seed: int, source: str, epoch: int, documents: int) -> Integers:
    """The documents of a source in the order one epoch reads them: a permutation of 0..documents-1.

    Sorting by `_mix` needs no rule for ties, as a bijection has none.
    """
    key = derive_key("documents", seed, source, epoch)
    return np.argsort(_mix(np.arange(documents, dtype=np.uint64) ^ np.uint64(key))).astype(np.int64)


def permute(index: Integers, count: int, key: int) -> Integers:
    """Where a keyed permutation of 0..count-1 sends each of `index`, without listing the permutation.

    A Feistel network on the smallest square grid of at least `count` cells; what lands outside
    0..count-1 walks on until it is inside, which keeps the map a bijection.
    """
    if count < 1 or (index.size and (int(index.min()) < 0 or int(index.max()) >= count)):
        raise ValueError(f"index outside 0..{count - 1}")
    side = np.uint64(math.isqrt(count - 1) + 1)
    moved = _feistel(index.astype(np.uint64), side, key)
    outside = np.flatnonzero(moved >= count)
    while outside.size:
        moved[outside] = _feistel(moved[outside], side, key)
        outside = outside[moved[outside] >= count]
    return moved.astype(np.int64)


def _feistel(cells: _Words, side: np.uint64, key: int) -> _Words:
    left, right = np.divmod(cells, side)
    for turn in range(_ROUNDS):
        word = np.uint64((key + turn * _GAMMA) & _MASK)
        left, right = right, (left + _mix(right ^ word) % side) % side
    return left * side + right


def _fractions(weights: Sequence[float]) -> list[int]:
    """For each source its share of what the sources before it leave, in units of 2**-32."""
    total = math.fsum(weights)
    for weight in weights:
        if weight * (1 << _SHARE_BITS) < total:
            raise DataError(f"mixture weight {weight:g} is less than 2**-32 of the mixture; leave the source out")
    return [
        round(weight / math.fsum(weights[position:]) * (1 << _SHARE_BITS)) for position, weight in enumerate(weights)
    ]


def _taken(index: _Words, fraction: int) -> _Words:
    """round(index * fraction / 2**32), exactly, for any index below 2**63."""
    high, low = index >> np.uint64(_SHARE_BITS), index & np.uint64((1 << _SHARE_BITS) - 1)
    half = np.uint64(1 << (_SHARE_BITS - 1))
    return high * np.uint64(fraction) + ((low * np.uint64(fraction) + half) >> np.uint64(_SHARE_BITS))


def source_of(index: Integers, weights: Sequence[float]) -> tuple[Integers, Integers]:
    """Which source the `index`-th sequence of a mixture comes from, and its number within that source.

    Bresenham's line splits the sequences between the first source and the rest, again the rest, and so on:
    any run of sequences holds each source's share to within one or two sequences.
    """
    rest = index.astype(np.uint64)
    source = np.full(index.shape, -1, np.int64)
    within = np.zeros(index.shape, np.int64)
    for number, fraction in enumerate(_fractions(weights)):
        before = _taken(rest, fraction)
        mine = (source < 0) & (_taken(rest + np.uint64(1), fraction) > before)
        source[mine] = number
        within[mine] = before[mine].astype(np.int64)
        rest = rest - before
    return source, within


def source_counts(sequences: int, weights: Sequence[float]) -> list[int]:
    """How many of the first `sequences` of a mixture come from each source; they add up to `sequences`."""
    rest = np.asarray([sequences], np.uint64)
    counts = []
    for fraction in _fractions(weights):
        taken = _taken(rest, fraction)
        counts.append(int(taken[0]))
        rest = rest - taken
    return counts
