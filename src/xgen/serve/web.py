"""What every server of this package shares: who may ask, what a page may do, its own files, starting and stopping.

An application is built of three parts:

    files = page_files("xgen.serve.watch", {"/page.css": "page.css"})     # a closed table: no path reaches the disk
    routes = [Route("/", index), *file_routes(files)]
    serve(Guard(Starlette(routes=routes), host), open_socket(host, port), on_stop=application.stop)

Call `xgen.serve.errors.check_installed` before importing this module: Starlette and uvicorn are an optional part of the
package.
"""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import mimetypes
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import FrameType

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xgen.serve.errors import ServeError

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Pages run their own files and ask their own server, and nothing else: a hostile text in one has nowhere to go."""

HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}

STOP_SECONDS = 5.0
"""How long requests under way may take to end once the server is told to stop."""

EVERYWHERE = ("0.0.0.0", "::", "")
"""The hosts that stand for all addresses of the machine."""


class Guard:
    """Wraps an ASGI application: refuses requests that come by a foreign name or from a foreign page, and puts
    `HEADERS` on every answer that does not set them itself.

    A page of another site can let its own name point to 127.0.0.1 and then read from here as if it were its own
    (DNS rebinding), so the Host header must be a loopback name, the host that the server is bound to, or, when it is
    bound to all addresses, an address or this machine's name: 421 otherwise. `any_name`: answer to all names, for an
    application that asks for a key, which no other site has. `foreign_pages`: also answer what scripts and pictures of
    other sites ask for, for an application that decides about origins itself; else 403. `refuse` makes the answer of a
    message and a status.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        *,
        any_name: bool = False,
        foreign_pages: bool = False,
        refuse: Callable[[str, int], Response] = PlainTextResponse,
    ) -> None:
        self._app, self._host, self._any_name, self._foreign_pages = app, host, any_name, foreign_pages
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        headers = Headers(scope=scope)
        refusal = self._refusal(headers)
        await (refusal or self._app)(scope, receive, send_with_headers)

    def _refusal(self, headers: Headers) -> Response | None:
        name = host_name(headers.get("host", ""))
        if not (self._any_name or is_own_name(name, self._host)):
            return self._refuse(
                f"this server is not called {name!r:.100}; open it by the address that it printed, or start it with "
                "--host and that name\n",
                421,
            )
        site = headers.get("sec-fetch-site", "none")
        # A link on another site may lead here: the reader sees the page, the other site does not.
        led = headers.get("sec-fetch-mode") == "navigate"
        if site in ("cross-site", "same-site") and not led and not self._foreign_pages:
            return self._refuse("pages of other sites may not ask this server\n", 403)
        return None


def host_name(header: str) -> str:
    """The name or address of a Host header, without its port and brackets, in small letters."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].removesuffix(".")


def is_own_name(name: str, bound: str) -> bool:
    """Whether a request for `name` can be meant for a server that listens on the host `bound`."""
    if name == "localhost" or name == bound.lower() or is_loopback(name):
        return True
    return bound in EVERYWHERE and (_address(name) is not None or name == socket.gethostname().lower())


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server on `host`."""
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


@dataclass(frozen=True)
class PageFile:
    """A file of a page, read once when the server starts."""

    body: bytes
    media_type: str
    etag: str


def page_files(package: str, names: Mapping[str, str]) -> dict[str, PageFile]:
    """Files that are part of `package`, by the address they are served at: `names` maps addresses to file names."""
    found = {}
    for address, name in names.items():
        body = files(package).joinpath(name).read_bytes()
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        found[address] = PageFile(body, kind, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
    return found


def file_routes(table: Mapping[str, PageFile]) -> list[Route]:
    """One route for GET and HEAD for each file of the table."""

    def route(address: str, file: PageFile) -> Route:
        def answer(request: Request) -> Response:
            return tagged(request, file.body, file.media_type, file.etag)

        return Route(address, answer, methods=["GET"])

    return [route(address, file) for address, file in table.items()]


def tagged(request: Request, body: bytes, media_type: str, etag: str) -> Response:
    """`body` with its ETag, or 304 without it when the asker has it already."""
    headers = {"etag": etag, "cache-control": "no-cache"}
    known = [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]
    if etag in known:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=media_type, headers=headers)


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. From here on askers wait instead of being refused.

    Raises ServeError when the port is taken or the host is none of this machine's.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as cause:
        raise ServeError(f"--host {host}: {cause.strerror}; name an address of this machine, as 127.0.0.1") from cause
    listening = socket.socket(kind, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as cause:
        listening.close()
        raise ServeError(_why_not(cause, host, port)) from cause
    return listening


def _why_not(cause: OSError, host: str, port: int) -> str:
    remedies = {
        errno.EADDRINUSE: "another program listens there; choose another with --port, 0 for any free one",
        errno.EACCES: "permission denied; choose a port from 1024 on with --port",
        errno.EADDRNOTAVAIL: "the host is none of this machine's; name one that is with --host, as 127.0.0.1",
    }
    remedy = remedies.get(cause.errno or 0, f"{cause.strerror or cause}; choose others with --host and --port")
    return f"cannot listen on {host} port {port}: {remedy}"


def address_of(listening: socket.socket) -> str:
    """Where to point a browser on this machine."""
    host, port = listening.getsockname()[:2]
    if host in EVERYWHERE:
        host = "127.0.0.1"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def serve(app: ASGIApp, listening: socket.socket, *, on_stop: Callable[[], None] = lambda: None) -> None:
    """Answer until SIGTERM or SIGINT, then let the requests under way end (`STOP_SECONDS`) and return.

    `on_stop` is called in the signal handler, first: whatever answers without end must end then. A second signal
    does not wait. Call it on the main thread.
    """
    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=round(STOP_SECONDS),
        ws="none",
    )
    # uvicorn sends the signal again once it has stopped, to whoever handled it before; for us it has done its work.
    before = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        _Server(config, on_stop).run(sockets=[listening])
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_stop()
        super().handle_exit(sig, frame)
