"""Who takes part in a run and how far each has come; decides when one of them is lost.

A process's place in the run is one number: 2s - 1 within step s, 2s once it has finished it. Since every step needs
every device, nobody gets further than one place ahead of the last, and whoever stays behind is what the others
wait for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Limits(NamedTuple):
    """Seconds."""

    start: float = 60.0
    """For all processes to come."""
    silence: float = 20.0
    """Without a word, after which a process counts as hung (each speaks once a second)."""
    behind: float = 40.0
    """That a process which still speaks may stay behind the others, unless it said that it is busy."""
    step: float = 600.0
    """That a step may take when nobody is behind; twenty times the longest one before it, if that is more."""
    grace: float = 3.0
    """From the news to the end of the process: time for its main thread to say so itself."""
    polite: float = 15.0
    """The same when the other one left with an error that it told: this one may be about to meet the same."""


_LONGER = 20
"""Times the longest step so far, before a step that all are in counts as stuck."""


@dataclass
class Peer:
    """One process, as the others know it. Times are of the watching process's monotonic clock."""

    index: int
    host: str
    pid: int
    heard: float
    since: float
    """When it reached its place."""
    place: int = 0
    busy: str = ""
    """The work, outside the steps, that the others may have to wait for."""

    def __str__(self) -> str:
        return f"process {self.index} ({self.host}, pid {self.pid})"

    @property
    def step(self) -> str:
        """The last step it is known to have finished."""
        return f"step {self.place // 2}" if self.place > 1 else "the start, before the first step was finished"


class Roster:
    """The processes that one process watches: process 0 watches all, the others watch process 0."""

    def __init__(self, peers: Iterable[Peer], limits: Limits, mine: int) -> None:
        self.peers = {peer.index: peer for peer in peers}
        self._limits, self._mine = limits, mine
        self._longest = 0.0
        self._judged = 0.0

    def heard(self, index: int, place: int, busy: str, now: float) -> None:
        """A process said where it stands."""
        peer = self.peers[index]
        if place != peer.place or busy != peer.busy:
            if peer.place % 2 and place == peer.place + 1:
                self._longest = max(self._longest, now - peer.since)
            peer.since = now
        peer.place, peer.busy, peer.heard = place, busy, now

    def left(self, index: int) -> None:
        """A process came to its end as it should."""
        self.peers.pop(index, None)

    def died(self, index: int) -> str:
        """What to say of a process whose connection closed without a word."""
        peer = self.peers[index]
        return f"{peer} died after {peer.step}: its connection closed without a word"

    def failed(self, index: int, reason: str) -> str:
        """What to say of a process that told why it stops."""
        peer = self.peers[index]
        return f"{peer} stopped after {peer.step}: {reason}"

    def judge(self, now: float) -> str | None:
        """What to say of a process that is lost; None while all is well."""
        if now - self._judged > self._limits.silence / 4:  # this process itself was stopped, or starved
            for peer in self.peers.values():
                peer.heard = peer.since = now
        self._judged = now
        return self._silent(now) or self._behind(now) or self._stuck(now)

    def _silent(self, now: float) -> str | None:
        for peer in self.peers.values():
            if peer.index != self._mine and now - peer.heard > self._limits.silence:
                return f"{peer} hangs after {peer.step}: not a word from it for {now - peer.heard:.0f} seconds"
        return None

    def _behind(self, now: float) -> str | None:
        for peer in sorted(self.peers.values(), key=lambda peer: peer.place):
            waited = now - min((other.since for other in self.peers.values() if other.place > peer.place), default=now)
            if not peer.busy and min(waited, now - peer.since) > self._limits.behind:
                doing = "within the next step" if peer.place % 2 else "before the next step"
                return f"{peer} hangs after {peer.step}, {doing}: the others have waited {waited:.0f} seconds for it"
        return None

    def _stuck(self, now: float) -> str | None:
        places = {peer.place for peer in self.peers.values()}
        if any(peer.busy for peer in self.peers.values()) or len(places) != 1 or not (place := places.pop()) % 2:
            return None
        taken = now - max(peer.since for peer in self.peers.values())
        if taken <= max(self._limits.step, _LONGER * self._longest):
            return None
        return f"step {place // 2 + 1} has taken {taken:.0f} seconds on all processes, {self._longest:.0f} before it"
