"""The processes of a run, as the loop sees them: who writes, what all agree on, when all stop."""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import jax

from xgen.errors import NonFiniteError, ProcessesError, StoppedAtOnce, StoppedByPeer, XgenError
from xgen.parallel.peers import Watch

_FOREVER_SECONDS = 7 * 86400
"""For what may take as long as the others' work: not time but the watch ends the wait for a process that is lost."""

_PATIENCE_SECONDS = 5
"""For the news after an error that may come of it: a closed connection is known within a tenth of a second."""

_TOGETHER_SECONDS = 60
"""From the first process that stops, after all agreed to, to the last: what is saved was saved before."""

_STOP = "xgen processes/stop/"


class World:
    """All processes of the run and this one among them; a single process needs no argument and waits for nobody.

    All methods but `watched`, `busy`, `before_exit` and `is_writer` are called by all processes, in the same order.
    Whatever waits for others raises StoppedByPeer when one of them is lost.
    """

    def __init__(self, watch: Watch | None = None, index: int = 0, count: int = 1) -> None:
        self.index, self.count = index, count
        self._watch = watch
        self._used: Counter[str] = Counter()
        self._program: str | None = None
        self._stopping = False

    @property
    def is_writer(self) -> bool:
        """Whether this process writes logs, events and reports, and speaks to the user."""
        return self.index == 0

    @contextmanager
    def watched(self, *, closing: bool = True) -> Iterator[World]:
        """The block in which the processes work together. What ends it early in one stops the others; an error that
        another one's end caused here becomes StoppedByPeer. At its end, with `closing`, all wait for each other."""
        try:
            yield self
        # All of it: whatever ends this process, an interrupt too, the others wait for it and are to be told.
        except BaseException as error:
            self._leave(error)
            raise
        if closing and not self._close():
            raise ProcessesError("the processes could not end together, though all of them had done their work")

    def begins(self, step: int, program: str = "") -> None:
        """The step's batch is there and its `program` is about to run. Tells hung processes from waiting ones.

        A program that is not the one of the step before is `ready`.
        """
        if self._watch is None:
            return
        if program != self._program:
            self.ready(f"step of {program}")
            self._program = program
        self._watch.begins(step)

    def ready(self, program: str) -> None:
        """`program`, which may be new to a group of devices, is compiled here, what it needs is there: wait for all.

        They may take long to compile, each in its own time, and gloo gives up after 30 seconds when the others come
        later than that to a group's first collective (to later ones they may come when they like).
        """
        self.barrier(f"ready: {program}")

    def stop_wanted(self, step: int, local_signal: str | None) -> str | None:
        """The signal for which all processes stop after this step, the same answer on all; None to go on.

        To be called once after every step, when its loss has arrived. Exact, since no process can finish a step
        that another has not begun: who has a signal after step s publishes "stop after s + 1" before it begins s + 1,
        so nobody can finish s + 1 without seeing it.
        """
        if self._watch is None:
            return local_signal
        self._watch.finished(step)
        with self.blaming():
            if not (asked := self._client.key_value_dir_get(_STOP)) and local_signal:
                self._client.key_value_set(f"{_STOP}{self.index}", json.dumps([step + 1, self.index, local_signal]))
        found = min((json.loads(value) for _, value in asked), default=None)
        if found is None or step < found[0]:
            return None
        self._stopping = True
        return f"{found[2]} on process {found[1]}"

    def barrier(self, name: str) -> None:
        """Wait until all are here. Not a collective of the devices: any thread may call it."""
        if self._watch is not None:
            with self.blaming():
                self._client.wait_at_barrier(self._key(name), _FOREVER_SECONDS * 1000)

    def broadcast(self, name: str, value: Any = None) -> Any:
        """The writer's `value` on every process; it must be JSON. A few kilobytes: it goes through the coordinator."""
        return json.loads(self._from_writer(name, json.dumps(value)))

    def gather(self, name: str, value: Any) -> list[Any]:
        """Everybody's `value`, in the order of the processes, on every process; each must be JSON."""
        if self._watch is None:
            return [value]
        key = self._key(name)
        with self.blaming():
            self._client.key_value_set(f"{key}/{self.index}", json.dumps(value))
        self.barrier(f"{name} said")
        said = ""
        if self.is_writer:  # every process reading all of them would load the coordinator with their square
            with self.blaming():
                found = list(self._client.key_value_dir_get(f"{key}/"))
                self._client.key_value_delete(f"{key}/")
            values = {int(at.rpartition("/")[2]): json.loads(text) for at, text in found}
            said = json.dumps([values[index] for index in range(self.count)])
        everything = json.loads(self._from_writer(f"{name} all", said))
        assert isinstance(everything, list)
        return everything

    def agree(self, what: str, facts: Mapping[str, Any]) -> None:
        """Raise ProcessesError on all processes when `facts`, nested JSON, differ; the message names where."""
        if self._watch is None:
            return
        all_facts = [_flat(facts) for facts in self.gather(what, facts)]
        for index, other in enumerate(all_facts):
            names = sorted(name for name in {*other, *all_facts[0]} if other.get(name) != all_facts[0].get(name))
            if names:
                self._stopping = True  # all find the same
                name = names[0]
                more = f" ({len(names) - 1} more differ)" if len(names) > 1 else ""
                raise ProcessesError(
                    f"the processes differ in {what}: {name} is {all_facts[0].get(name)} on process 0 and "
                    f"{other.get(name)} on process {index}{more}; start all alike"
                )

    def busy(self, work: str) -> AbstractContextManager[None]:
        """The others may wait for this process for as long as it does `work`: it is not taken for hung."""
        return self._watch.busy(work) if self._watch is not None else nullcontext()

    def before_exit(self, callback: Callable[[str], None]) -> None:
        """Have `callback` called with the message if this process must be ended while it hangs; from a thread."""
        if self._watch is not None:
            self._watch.before_exit(callback)

    @property
    def _client(self) -> Any:
        from jax._src.distributed import global_state  # the public module has no way to its key-value store

        return global_state.client

    def _key(self, name: str) -> str:
        """A key that was not used before."""
        self._used[name] += 1
        return f"xgen processes/{name}/{self._used[name]}"

    def _from_writer(self, name: str, text: str) -> str:
        if self._watch is None:
            return text
        key = self._key(name)
        with self.blaming():
            if self.is_writer:
                self._client.key_value_set(key, text)
                return text
            return str(self._client.blocking_key_value_get(key, _FOREVER_SECONDS * 1000))

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """Turn an error of JAX's, in talking to the others or in a program over all, into the news of who is lost."""
        try:
            yield
        except (ValueError, RuntimeError) as error:
            self._blame(error)
            raise

    def _blame(self, error: BaseException) -> None:
        """Raise StoppedByPeer if `error` came of a process that is lost. JAX says neither who nor why: gloo's errors
        are ValueErrors, the service's are RuntimeErrors, and both may come before the news."""
        if self._watch is None or isinstance(error, XgenError) or "RESOURCE_EXHAUSTED" in str(error):
            return
        if news := self._watch.news(_PATIENCE_SECONDS if isinstance(error, ValueError | RuntimeError) else 0):
            raise StoppedByPeer(news) from error

    def _leave(self, error: BaseException) -> None:
        """Tell the others that and why this process ends. Raises StoppedByPeer when one of them is the cause."""
        if self._watch is None:
            return
        agreed = self._stopping or isinstance(error, NonFiniteError)  # of figures that all have alike
        together = agreed and not isinstance(error, StoppedByPeer | StoppedAtOnce)
        if together and self._close(_TOGETHER_SECONDS):
            return
        atexit.register(_end_at_once)
        try:
            if isinstance(error, Exception):
                self._blame(error)
        finally:
            self._watch.leave(str(error).splitlines()[0] if str(error) else type(error).__name__)

    def _close(self, seconds: float = _FOREVER_SECONDS) -> bool:
        """End JAX's part on all processes; process 0, whose service the others need for that, comes last. Returns
        whether all came to it in time."""
        if self._watch is None:
            return True
        from jax._src.distributed import global_state

        try:
            self._client.wait_at_barrier(self._key("end"), round(seconds * 1000))
        except RuntimeError as error:
            self._blame(error)
            return False
        if self.is_writer:
            self._client.shutdown()
            self._watch.leave()
            global_state.client = None
            jax.distributed.shutdown()  # of the service
        else:
            jax.distributed.shutdown()
            self._watch.leave()
        return True


def _end_at_once() -> None:
    """At the end of a program whose run failed: JAX would wait for processes that are gone, and abort. The command
    line leaves before this, with the error's own exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _flat(facts: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Nested values by dotted name."""
    found: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{name}.")
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            found |= _flat({str(number): item for number, item in enumerate(value)}, f"{above}{name}.")
        else:
            found[f"{above}{name}"] = json.dumps(value)
    return found
