"""How splash attention cuts a device's work into blocks, and what that computes beyond the causal triangle."""

from __future__ import annotations

import math
from dataclasses import dataclass

LANES = 128
"""The kernel's blocks are multiples of a TPU's lanes; shorter and odd lengths are filled up."""

BLOCK = 512
"""Queries, and keys, of a block. Every byte of keys that a block of queries fetches serves 512 operations, where a v4
can do 229 in the time its memory delivers one (275 TFLOP/s, 1.2 TB/s; v5e 240, v5p 166, v6e 560). 1,024 takes the
compiler nearly three times as long, and 2,048 does not fit the 16 MiB of a core's own memory."""

SHARES = 4
"""Most shares of the queries' gradient that the fused backward kernel may write, one for each of its blocks of keys, to
be summed after it. It takes five products where two kernels take seven, and as many copies of the queries."""

LONG = 65_536
"""Columns past which blocks are twice as large, since their tables lie in the scalar core's small memory."""


@dataclass(frozen=True)
class Blocks:
    """Of one device's work: its columns, the parts of a whole sequence, and both filled up to whole blocks."""

    columns: int
    parts: int
    queries: int
    keys: int
    block: int

    @classmethod
    def of(cls, columns: int, parts: int) -> Blocks:
        """Blocks of the size above, or the largest half of it that fits: whole blocks in a device's early and its late
        columns, so that a block is above the diagonal or is not."""
        queries = columns + -columns % LANES
        keys = columns * parts + -(columns * parts) % LANES
        halves = parts > 1 and columns % (2 * LANES) == 0
        both = math.gcd(keys, columns // 2 if halves else queries)
        most = BLOCK if keys <= LONG else 2 * BLOCK
        return cls(columns, parts, queries, keys, next(most // n for n in (1, 2, 4, 8) if both % (most // n) == 0))

    @property
    def fused(self) -> int | None:
        """Keys of a block of the fused backward kernel; None for two kernels, where the row is too long for few shares.

        The block is computed in parts of the size above, and 2,048 keys of it still fit a core's own memory.
        """
        sizes = (self.block, 2 * self.block, 4 * self.block)
        return next((size for size in sizes if self.keys % size == 0 and self.keys // size <= SHARES), None)

    def visible(self, block: int) -> float:
        """Share of the square of queries and keys that is computed in such blocks of keys: whole ones up to the
        diagonal."""
        return (self.keys + block) / (2 * self.keys)

    @property
    def products(self) -> dict[str, float]:
        """What each kernel computes, in products over the whole square of queries and keys: forward the scores and the
        mixing; backward the scores again, and the gradients of the weights, queries, keys and values, of which two
        kernels both need the first two."""
        forward = {"fwd": 2 * self.visible(self.block)}
        if self.fused is not None:
            return forward | {"dkv": 5 * self.visible(self.fused)}
        return forward | {"dq": 3 * self.visible(self.block), "dkv": 4 * self.visible(self.block)}
