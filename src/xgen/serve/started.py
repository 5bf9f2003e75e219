"""A server of one's own for a while: started as a process, waited for, ended."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from xgen.serve.errors import ServeError

LOOK_SECONDS = 0.05
"""Between two looks whether it is ready."""

READY_SECONDS = 900.0
"""For a large model to be read and compiled for the first time."""

STOP_SECONDS = 60.0
"""For it to end after SIGTERM: more than it drains for."""

TOLD_LINES = 20
"""Of its output, when it fails."""


@dataclass(frozen=True)
class Started:
    """`ready_seconds`: from its start until /health was 200."""

    url: str
    process: subprocess.Popen[bytes]
    ready_seconds: float


@contextmanager
def started(command: Sequence[str], *, seconds: float) -> Iterator[Started]:
    """A server run by `command`, which is told the port as `--port`; ready, and ended with the context.

    Call it on the main thread: SIGTERM ends the server too. Raises ServeError with the end of its output when it ends
    by itself or is not ready within `seconds`.
    """
    port = _free_port()
    with tempfile.TemporaryFile() as output, _leaving_at_sigterm():
        begin = time.monotonic()
        process = subprocess.Popen([*command, "--port", str(port)], stdout=output, stderr=subprocess.STDOUT)
        try:
            while not is_ready(port):
                if process.poll() is not None:
                    raise ServeError(f"the server ended with code {process.returncode}:\n{_told(output.fileno())}")
                if time.monotonic() - begin > seconds:
                    raise ServeError(f"the server is not ready after {seconds:g} s:\n{_told(output.fileno())}")
                time.sleep(LOOK_SECONDS)
            yield Started(f"http://127.0.0.1:{port}", process, time.monotonic() - begin)
        finally:
            _end(process)


def is_ready(port: int) -> bool:
    """Whether /health of the server there is 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextmanager
def _leaving_at_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit inside: by itself it would leave the server behind."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _told(output: int) -> str:
    size = os.fstat(output).st_size
    lines = os.pread(output, size, 0).decode(errors="replace").splitlines()
    return "\n".join(lines[-TOLD_LINES:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
