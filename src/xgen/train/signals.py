"""SIGTERM and SIGINT: within a step they wait for its end, elsewhere they stop at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from xgen.errors import StoppedBySignal


class Signals:
    """Turns SIGTERM and SIGINT into `StoppedBySignal`. While `deferred`, the first is only noted in `received`;
    a second one is not waited for."""

    def __init__(self) -> None:
        self.received = ""
        self._deferring = False

    @contextmanager
    def installed(self) -> Iterator[Signals]:
        """Handle both signals until the end of the block; then what was there before is put back."""
        watched = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._handle) for number in watched}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Note a signal instead of stopping, until the end of the block."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - signal.signal's signature
        name = signal.Signals(number).name
        if self._deferring and not self.received:
            self.received = name
            return
        raise StoppedBySignal(f"{name}: stopped before the next checkpoint was written; what is on disk is whole")
