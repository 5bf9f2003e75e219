"""A relay on this machine to JAX's coordination service, so that a broken connection is ours to tell.

JAX's client ends the whole process with a C++ fatal message the moment its connection to the service breaks, that is
whenever process 0 dies; its `missed_heartbeat_callback`, the only way to replace that, throws `std::bad_cast` when
it is a Python function (jaxlib 0.10.2). Behind the relay a service that is gone looks like one that is silent, for as
long as JAX's own heartbeat allows, and by then `peers` has stopped the process with its own message.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from xgen.parallel.wire import reach

_RETRY_SECONDS = 0.05
_CONNECT_SECONDS = 10
_PIECE_BYTES = 1 << 16


def relay(host: str, port: int) -> str:
    """Listen on the loopback address for as long as the process lives. Returns "127.0.0.1:PORT", which leads to
    `host`:`port`; a service that does not listen yet is waited for."""
    _keep_from_web_proxies()
    listener = socket.create_server(("127.0.0.1", 0))
    _start(_accept, listener, (host, port))
    return f"127.0.0.1:{listener.getsockname()[1]}"


def _keep_from_web_proxies() -> None:
    """gRPC would ask the proxy of http_proxy even for the loopback address."""
    if not any(name.lower() in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy") for name in os.environ):
        return
    name = "no_grpc_proxy"  # read in small letters only
    spared = [text for text in (os.environ.get(name) or os.environ.get("no_proxy"), "127.0.0.1") if text]
    os.environ[name] = ",".join(spared)


def _accept(listener: socket.socket, service: tuple[str, int]) -> None:
    while True:
        near, _ = listener.accept()
        _start(_join, near, service)


def _join(near: socket.socket, service: tuple[str, int]) -> None:
    """Carry what the client says to the service until the client closes; a service that is gone is not told."""
    far = _reach(service)
    _start(_answers, far, near)
    there = True
    with suppress(OSError):
        while data := near.recv(_PIECE_BYTES):
            if there:
                try:
                    far.sendall(data)
                except OSError:
                    there = False
    for end in (far, near):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _answers(far: socket.socket, near: socket.socket) -> None:
    with suppress(OSError):
        while data := far.recv(_PIECE_BYTES):
            near.sendall(data)


def _reach(service: tuple[str, int]) -> socket.socket:
    while True:
        with suppress(OSError):
            far = reach(*service, _CONNECT_SECONDS)
            far.settimeout(None)
            far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return far
        time.sleep(_RETRY_SECONDS)


def _start(function: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=function, args=arguments, daemon=True, name="xgen relay").start()
