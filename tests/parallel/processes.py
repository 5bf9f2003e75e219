"""Starts the processes of `one_process.py` and waits for their end; all are reaped whatever happens."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from xgen.errors import StoppedByPeer

PROGRAM = Path(__file__).parent / "one_process.py"
AT_MOST_SECONDS = 150
"""For anything that is waited for here, on a machine that does other things as well."""

STOPPED = StoppedByPeer.exit_code
_CLUSTER = ("SLURM_", "OMPI_", "JAX_", "TPU_", "MEGASCALE_", "XLA_FLAGS", "KUBERNETES_")


@dataclass
class Process:
    """One process under test and where it writes."""

    child: subprocess.Popen[bytes]
    folder: Path

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events it told so far."""
        text = (self.folder / "out").read_text()
        lines = text[: text.rfind("\n") + 1].splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    @property
    def errors(self) -> list[str]:
        """The lines it wrote to standard error."""
        return (self.folder / "err").read_text().splitlines()

    @property
    def steps(self) -> list[int]:
        return [event["step"] for event in self.events if event["kind"] == "step"]

    def end(self, seconds: float = AT_MOST_SECONDS) -> int:
        """Wait for its end. Returns the exit code."""
        return self.child.wait(seconds)

    def one_error(self, *wanted: str) -> str:
        """The only line on standard error, which holds all of `wanted`."""
        assert len(self.errors) == 1, self.errors
        assert self.errors[0].startswith("error: ")
        for text in wanted:
            assert text in self.errors[0]
        return self.errors[0]


@contextmanager
def started(
    folder: Path, plans: list[Mapping[str, Any]], environments: list[Mapping[str, str]] | None = None
) -> Iterator[list[Process]]:
    """A process for every plan, with these environments beside the machine's own."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(_CLUSTER)}
    found: list[Process] = []
    try:
        for number, plan in enumerate(plans):
            place = folder / str(len(list(folder.iterdir())))
            place.mkdir()
            extra = environments[number] if environments else {}
            with (place / "out").open("wb") as out, (place / "err").open("wb") as err:
                command = [sys.executable, str(PROGRAM), json.dumps(plan)]
                environment = {**own, "JAX_PLATFORMS": "cpu", **extra}
                child = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
            found.append(Process(child, place))
        yield found
    finally:
        for process in found:
            process.child.kill()  # a stopped one dies as well
            process.child.wait()


def plans(count: int, **common: Any) -> list[dict[str, Any]]:
    """The same plan for `count` processes that meet at a free port."""
    address = f"127.0.0.1:{free_port()}"
    return [
        {**common, "settings": {"coordinator": address, "processes": count, "process": index}} for index in range(count)
    ]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def wait_until(condition: Callable[[], bool], processes: list[Process]) -> None:
    """Wait until `condition` holds while all processes run."""
    deadline = time.monotonic() + AT_MOST_SECONDS
    while not condition():
        ended = [(number, process.child.returncode) for number, process in enumerate(processes) if process.child.poll()]
        if ended or time.monotonic() > deadline:
            pytest.fail(f"ended: {ended}; errors: {[process.errors for process in processes]}")
        time.sleep(0.01)


def stop_and_look(process: Process) -> None:
    """Send SIGSTOP and wait until the system has stopped it."""
    process.child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
