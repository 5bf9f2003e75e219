"""The processes of a run watch each other, so that none waits in a collective for one that is gone.

Process 0 listens at the coordinator's address; every other process holds one connection to it, over which they meet
at the start and then tell, about once a second, where they stand. Process 0 judges them and passes the news on; the
others judge process 0. This does not go through JAX's coordination service, which dies with process 0.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from xgen.errors import ProcessesError, StoppedByPeer, XgenError
from xgen.parallel.roster import Limits, Peer, Roster
from xgen.parallel.wire import Connection, Gone, Message, listen, reach

_TICK_SECONDS = 0.1
_BEAT_SECONDS = 1.0
_FEW = 8
"""Processes that are told of a step at once; more are told at the next tick, off the main thread."""

_CALLBACK_SECONDS = 5.0
_LEAVING_SECONDS = 20.0
_REMEDY = "start all processes again with `xgen train --resume RUN`"


@dataclass(frozen=True)
class Place:
    """Where the processes meet, and which of them this one is."""

    host: str
    port: int
    processes: int
    process: int
    facts: Mapping[str, str]
    """What must be the same on all, by name: versions."""

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


def meet(place: Place, limits: Limits, service_port: Callable[[], int]) -> tuple[Watch, int]:
    """Wait until all processes are there. Returns the watch over them, running, and the port on `place.host` of JAX's
    coordination service, which process 0 is to start: the result of its `service_port`.

    Raises ProcessesError, on every process that is there, within `limits.start` seconds.
    """
    deadline = time.monotonic() + limits.start
    if place.process == 0:
        found = _gather(place, limits, deadline)
        port = service_port()
        for connection, _ in found.values():
            connection.send({"go": {"port": port, **_about(place)}})
    else:
        connection, answer = _join(place, limits, deadline)
        found, port = {0: (connection, answer)}, int(answer["port"])
    return Watch(place, limits, found), port


def _about(place: Place) -> Message:
    facts = {"processes": str(place.processes), **place.facts}
    return {"process": place.process, "host": socket.gethostname(), "pid": os.getpid(), "facts": facts}


def _gather(place: Place, limits: Limits, deadline: float) -> dict[int, tuple[Connection, Message]]:
    """Process 0: everybody's connection and what they said of themselves."""
    try:
        listener = listen(place.port)
    except OSError as cause:
        raise ProcessesError(
            f"process 0 cannot listen at port {place.port} of this machine ({cause.strerror or cause}): another run or "
            "another process 0 may be using it; stop that one or name another port with --coordinator HOST:PORT"
        ) from cause
    found: dict[int, tuple[Connection, Message]] = {}
    strangers: list[Connection] = []
    with listener, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while len(found) < place.processes - 1:
            if time.monotonic() > deadline:
                _refuse([*strangers, *(link for link, _ in found.values())], _missing(place, found, limits))
            for key, _ in selector.select(_TICK_SECONDS):
                if key.fileobj is listener:
                    strangers.append(Connection(listener.accept()[0]))
                    selector.register(strangers[-1], selectors.EVENT_READ)
                else:
                    assert isinstance(key.fileobj, Connection)
                    _greet(key.fileobj, place, found, strangers, selector)
    return found


def _greet(
    caller: Connection,
    place: Place,
    found: dict[int, tuple[Connection, Message]],
    strangers: list[Connection],
    selector: selectors.BaseSelector,
) -> None:
    """Read what a connection says: a newcomer's name, or the end of one."""
    try:
        messages = caller.read()
    except Gone:
        selector.unregister(caller)
        caller.close()
        if caller in strangers:
            strangers.remove(caller)
        for index in [index for index, (link, _) in found.items() if link is caller]:
            del found[index]
        return
    for about in [message["hello"] for message in messages if _is_hello(message)]:
        if caller not in strangers:
            continue
        if wrong := _wrong(about, place, found):
            _refuse([*strangers, *(link for link, _ in found.values())], wrong)
        strangers.remove(caller)
        found[about["process"]] = (caller, about)


def _is_hello(message: Message) -> bool:
    """Whether it is one of ours that speaks: anybody may find the port."""
    about = message.get("hello")
    return (
        isinstance(about, dict)
        and {"process", "host", "pid", "facts"} <= about.keys()
        and isinstance(about["process"], int)
        and isinstance(about["facts"], dict)
    )


def _named(about: Message) -> str:
    return f"process {about['process']} ({about['host']}, pid {about['pid']})"


def _wrong(about: Message, place: Place, found: Mapping[int, tuple[Connection, Message]]) -> str:
    """What keeps a newcomer from taking part; "" when nothing does."""
    mine, index = _about(place), about["process"]
    for name, value in mine["facts"].items():
        other = about["facts"].get(name, "none")
        if other != value:
            return f"{_named(about)} was started with {name} {other}, and {_named(mine)} with {value}; start all alike"
    if index == 0 or index in found:
        first = mine if index == 0 else found[index][1]
        return (
            f"two processes call themselves process {index}: the one on {first['host']}, pid {first['pid']}, and the "
            f"one on {about['host']}, pid {about['pid']}; give every process its own --process"
        )
    return ""


def _missing(place: Place, found: Mapping[int, tuple[Connection, Message]], limits: Limits) -> str:
    absent = sorted(set(range(1, place.processes)) - set(found))
    present = ", ".join(f"{index} ({about['host']})" for index, (_, about) in sorted(found.items()))
    return (
        f"of {place.processes} processes, {_listed(absent)} did not come to {place.address} within {limits.start:g} "
        f"seconds; there are 0 ({socket.gethostname()}){', ' if present else ''}{present}. Look at the missing ones' "
        "logs, or wait longer with --wait SECONDS"
    )


def _listed(indices: list[int], most: int = 12) -> str:
    shown = ", ".join(map(str, indices[:most])) + (f" and {len(indices) - most} more" if len(indices) > most else "")
    return f"process{'es' if len(indices) > 1 else ''} {shown}"


def _refuse(links: list[Connection], why: str) -> None:
    for link in links:
        link.send({"refused": why})
        link.close()
    raise ProcessesError(why)


def _join(place: Place, limits: Limits, deadline: float) -> tuple[Connection, Message]:
    """Any other process: its connection to process 0 and what that said."""
    connection = Connection(_reach(place, limits, deadline))
    connection.send({"hello": _about(place)})
    # Process 0 may have begun its own wait later, and knows who is missing: leave it the time to say so.
    while time.monotonic() < deadline + limits.grace:
        time.sleep(_TICK_SECONDS / 2)
        try:
            messages = connection.read()
        except Gone:
            raise ProcessesError(
                f"process 0 at {place.address} closed the connection before all processes were there; see its own log"
            ) from None
        for message in messages:
            if "refused" in message:
                raise ProcessesError(message["refused"])
            if "go" in message:
                return connection, message["go"]
    raise ProcessesError(
        f"process 0 at {place.address} answers, but not all of the {place.processes} processes came within "
        f"{limits.start:g} seconds; see its own log, or wait longer with --wait SECONDS"
    )


def _reach(place: Place, limits: Limits, deadline: float) -> socket.socket:
    while True:
        try:
            return reach(place.host, place.port, max(0.1, deadline - time.monotonic()))
        except OSError as cause:
            if time.monotonic() + _TICK_SECONDS > deadline:
                raise ProcessesError(
                    f"process {place.process} cannot reach process 0 at {place.address} for {limits.start:g} seconds "
                    f"({cause.strerror or cause}): see that it was started, that the address is its own and that the "
                    "port is open between the machines, or wait longer with --wait SECONDS"
                ) from cause
        time.sleep(_TICK_SECONDS)


class Watch:
    """This process's watch over the others; a thread of its own.

    When another one is lost, the main thread learns it from `finished`, `begins` or `news`; if it does not leave by
    itself within the limits, for it hangs in a collective, the process is ended with the same message and exit code.
    """

    def __init__(self, place: Place, limits: Limits, found: Mapping[int, tuple[Connection, Message]]) -> None:
        now = time.monotonic()
        self._place, self._limits = place, limits
        self._links = {index: link for index, (link, _) in found.items()}
        abouts = [about for _, about in found.values()] + ([_about(place)] if place.process == 0 else [])
        peers = [Peer(about["process"], about["host"], about["pid"], now, now) for about in abouts]
        self._roster = Roster(peers, limits, place.process)
        self._at, self._busy = 0, ""
        self._said: tuple[int, str, float] = (0, "", 0.0)
        self._news = ""
        self._noticed, self._leaving, self._bye = threading.Event(), threading.Event(), threading.Event()
        self._alone, self._ended = threading.Event(), threading.Event()
        self._callbacks: list[Callable[[str], None]] = []
        threading.Thread(target=self._run, daemon=True, name="xgen peers").start()

    def begins(self, step: int) -> None:
        """All that the step needs is at hand, and it is about to run. Raises StoppedByPeer."""
        self._at = 2 * step - 1
        self.check()

    def finished(self, step: int) -> None:
        """The step's result is there. Raises StoppedByPeer."""
        self._at = 2 * step
        if len(self._links) <= _FEW:
            self._beat()
        self.check()

    @contextmanager
    def busy(self, work: str) -> Iterator[None]:
        """The others may have to wait for this process while it does `work`."""
        before, self._busy = self._busy, work
        try:
            yield
        finally:
            self._busy = before

    def check(self) -> None:
        """Raise StoppedByPeer when another process is lost."""
        if self._noticed.is_set():
            self._leaving.set()
            raise StoppedByPeer(self._news)

    def news(self, seconds: float) -> str:
        """What is known of a lost process; waits so long for it. "" when there is none."""
        if self._noticed.wait(seconds):
            self._leaving.set()
        return self._news

    def before_exit(self, callback: Callable[[str], None]) -> None:
        """Have `callback` called with the message before the process is ended while its main thread hangs."""
        self._callbacks.append(callback)

    def leave(self, reason: str = "") -> None:
        """Tell the others that this process ends: as it should, or for a `reason` that stops them as well.

        Process 0 then waits a while for them, since JAX's service, in which they may still look up why, ends with it.
        """
        if self._bye.is_set():
            return
        self._leaving.set()
        self._bye.set()
        for link in self._links.values():
            link.send({"bye": reason})
        if self._place.process == 0 and not self._noticed.is_set():
            self._alone.wait(self._limits.grace if reason else self._limits.polite)
        self._ended.set()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for index, link in self._links.items():
                selector.register(link, selectors.EVENT_READ, index)
            while not self._ended.is_set() and not self._noticed.is_set():
                for key, _ in selector.select(_TICK_SECONDS):
                    self._read(key.data, selector)
                self._beat()
                if not self._noticed.is_set() and (lost := self._roster.judge(time.monotonic())):
                    self._stop(lost, self._limits.grace)
                if self._roster.peers.keys() <= {self._place.process}:
                    self._alone.set()

    def _read(self, index: int, selector: selectors.BaseSelector) -> None:
        now, link = time.monotonic(), self._links[index]
        try:
            messages = link.read()
        except Gone:
            selector.unregister(link)
            if index in self._roster.peers:
                self._stop(self._roster.died(index), self._limits.grace)
                self._roster.left(index)
            return
        for message in messages:
            if index not in self._roster.peers:  # its end was told; what its thread said after that does not matter
                return
            if "at" in message:
                self._roster.heard(index, message["at"], message["busy"], now)
            elif message.get("bye") == "":
                self._roster.left(index)
            elif "bye" in message:
                self._stop(self._roster.failed(index, message["bye"]), self._limits.polite)
            elif "lost" in message:
                self._stop(message["lost"], message["grace"])

    def _beat(self) -> None:
        now, (at, busy) = time.monotonic(), (self._at, self._busy)
        if self._place.process == 0 and 0 in self._roster.peers:
            self._roster.heard(0, at, busy, now)
        if (at, busy) != self._said[:2] or now - self._said[2] > _BEAT_SECONDS:
            self._said = (at, busy, now)
            for link in self._links.values():
                link.send({"at": at, "busy": busy})

    def _stop(self, lost: str, grace: float) -> None:
        """Note the news, pass it on, and see that this process ends."""
        if self._noticed.is_set() or self._bye.is_set():
            return
        if self._place.process == 0:
            for link in self._links.values():
                link.send({"lost": lost, "grace": grace})
        stopped = f"process {self._place.process} stops after step {self._at // 2}"
        self._news = f"{lost}; so {stopped}; {_REMEDY}"
        self._noticed.set()
        threading.Thread(target=self._enforce, args=(grace,), daemon=True, name="xgen stop").start()

    def _enforce(self, grace: float) -> None:
        if self._leaving.wait(grace):
            if self._ended.wait(_LEAVING_SECONDS):
                return  # whoever called has the error now
        else:
            thread = threading.Thread(target=self._call_back, daemon=True)
            thread.start()
            thread.join(_CALLBACK_SECONDS)
        os.write(2, f"error: {self._news}\n".encode())
        os._exit(StoppedByPeer.exit_code)

    def _call_back(self) -> None:
        for callback in self._callbacks:
            with suppress(OSError, ValueError, XgenError):
                callback(self._news)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
