"""SIGTERM and SIGINT: within a step they wait for its end, elsewhere they stop at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from xgen.errors import StoppedAtOnce


class Signals:
    """Turns SIGTERM and SIGINT into `StoppedAtOnce`. While `deferred`, the first is only noted in `received`, so that
    all processes of a run can stop after the same step (`xgen.parallel.world`); a second one is not waited for:
    `at_once` tells that nothing more should be done."""

    def __init__(self) -> None:
        self.received = ""
        self.at_once = False
        self._deferring = False

    @contextmanager
    def installed(self) -> Iterator[Signals]:
        """Handle both signals until the end of the block; then what was there before is put back. Python takes
        signals in its main thread only: in any other nothing is changed."""
        mine = threading.current_thread() is threading.main_thread()
        watched = (signal.SIGTERM, signal.SIGINT) if mine else ()
        before = {number: signal.signal(number, self._handle) for number in watched}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Note a signal instead of stopping, until the end of the block; there one that was noted still stops."""
        self._check()  # raised before, it may have been swallowed by a library's own handler
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        self._check()

    def _check(self) -> None:
        if self.received:
            self._stop(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - signal.signal's signature
        name = signal.Signals(number).name
        if self._deferring and not self.received:
            self.received = name
            return
        self.received = name
        self._stop(name)

    def _stop(self, name: str) -> NoReturn:
        self.at_once = True
        raise StoppedAtOnce(
            f"{name}: stopped at once; what is on disk is whole, and the same command or `xgen train --resume` goes on"
        )
