"""Lines of JSON over TCP between the processes of a run."""

from __future__ import annotations

import errno
import json
import socket
from typing import Any

Message = dict[str, Any]

LONGEST_BYTES = 1 << 20
"""Of a line: whoever sends more is none of ours."""


class Gone(Exception):  # noqa: N818 - the other end, not an error of this one
    """The other end closed the connection, or never spoke our language."""


class Connection:
    """One end of a connection; nothing here ever waits for the other."""

    def __init__(self, link: socket.socket) -> None:
        link.setblocking(False)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._link, self._rest = link, b""

    def fileno(self) -> int:
        """For `selectors`."""
        return self._link.fileno()

    def send(self, message: Message) -> None:
        """Hand `message` to the system. To a process that does not read it is lost: that one is stopped, and judged
        by its silence; one that is gone is noticed by `read`."""
        try:
            self._link.send(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def read(self) -> list[Message]:
        """The messages that have arrived. Raises Gone once the other end has closed and all is read."""
        closed = False
        try:
            while piece := self._link.recv(1 << 16):
                self._rest += piece
            closed = True
        except BlockingIOError:
            pass
        except OSError:
            closed = True
        *lines, self._rest = self._rest.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError as cause:
            raise Gone from cause
        if (closed and not messages) or len(self._rest) > LONGEST_BYTES:
            raise Gone
        if not all(isinstance(message, dict) for message in messages):
            raise Gone
        return messages

    def close(self) -> None:
        self._link.close()


def listen(port: int) -> socket.socket:
    """Listen on every address of this machine. Raises OSError."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def reach(host: str, port: int, seconds: float) -> socket.socket:
    """Connect. Raises OSError."""
    link = socket.create_connection((host, port), timeout=seconds)
    if link.getsockname() == link.getpeername():  # TCP lets a socket meet itself where nobody listens yet
        link.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    return link
