"""Whose the pages of the pool are, and which of them hold text that another prompt may begin with."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np


def root_key(adapter: str) -> bytes:
    """What precedes the first page of every text under the weights called `adapter`."""
    return hashlib.sha256(adapter.encode()).digest()


def page_key(parent: bytes, ids: Sequence[int]) -> bytes:
    """The name of a page full of `ids` that follows the page named `parent`: it stands for the whole text so far.

    SHA-256, because a collision, which somebody might construct, would show one caller's text to another.
    """
    return hashlib.sha256(parent + np.asarray(ids, np.uint32).tobytes()).digest()


class Pages:
    """A page is free, held by rows (a shared one by several), or idle: full of named text and held by nobody.

    Idle pages are what the prefix cache is made of: they are given away when no free one is left, the one that was
    longest unused first. So the cache takes all the room that rows leave, and never more. Page 0 is scratch.
    """

    def __init__(self, pages: int) -> None:
        self.total = pages - 1
        """Pages that rows can hold."""
        self._free = deque(range(1, pages))
        self._holders = [0] * pages
        self._keys: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that `take` could give."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages that rows hold."""
        return self.total - self.available

    @property
    def cached(self) -> int:
        """Idle pages."""
        return len(self._idle)

    def take(self, count: int) -> list[int]:
        """`count` pages, which must be `available`, for one row to write to."""
        taken = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages that hold the text of the first of `keys`, as far as it is there."""
        found: list[int] = []
        for key in keys:
            if key not in self._named:
                break
            found.append(self._named[key])
        return found

    def share(self, pages: Sequence[int]) -> None:
        """One row more reads `pages`, which `find` gave."""
        for page in pages:
            self._idle.pop(page, None)
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """A row lets go of its `pages`, given in the order of its text."""
        # The last page first: it is then evicted before those it follows, without which it cannot be found.
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._keys:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def name(self, page: int, key: bytes) -> None:
        """`page`, which a row holds, is now full of the text that `key` stands for, and can be found."""
        if key not in self._named:
            self._named[key] = page
            self._keys[page] = key

    def idle_among(self, pages: Sequence[int]) -> int:
        """How many of `pages` nobody holds."""
        return sum(page in self._idle for page in pages)

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._named[self._keys.pop(page)]
        return page
