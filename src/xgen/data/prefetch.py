"""Batches computed in the background, ahead of the step that needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from xgen.data.reader import Batch, Reader


def prefetch(reader: Reader, positions: Iterable[int], depth: int = 2, rows: slice = slice(None)) -> Iterator[Batch]:
    """The batches at `positions`, in order, read by one thread up to `depth` batches ahead.

    An error met by the thread is raised here, in the place of the batch it concerns.
    """
    waiting: deque[Future[Batch]] = deque()
    ahead = iter(positions)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="xgen-reader") as thread:
        try:
            waiting.extend(thread.submit(reader.batch, position, rows) for position in islice(ahead, depth))
            while waiting:
                batch = waiting.popleft().result()
                waiting.extend(thread.submit(reader.batch, position, rows) for position in islice(ahead, 1))
                yield batch
        finally:
            for future in waiting:
                future.cancel()
