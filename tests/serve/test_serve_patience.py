"""Those who take no answers and those who never end their bodies are not waited for; nobody waits for long answers."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from served import Running, listening, raw, until

import xgen.serve.app
import xgen.serve.run
from xgen.serve.doors import PIECE, Entrance
from xgen.serve.options import Options
from xgen.serve.told import CompletionLogprobs

LARGE = {"content": "x " * 100_000}
"""The answer has several times what SMALL and the system on the other side take in unread."""

SMALL = 4096

SCORED = {"prompt": "the fox", "max_tokens": 0, "echo": True, "logprobs": 2}


def ask(found: Running, receive_bytes: int = 1) -> socket.socket:
    """Ask for the long answer over a connection that takes in so little unread."""
    connection, body = raw(found), json.dumps(LARGE)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    head = "POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: "
    connection.sendall(f"{head}{len(body)}\r\n\r\n{body}".encode())
    return connection


def all_that_comes(connection: socket.socket) -> bytes:
    """What is read until the connection is closed, in whatever way."""
    found = b""
    try:
        while part := connection.recv(1 << 20):
            found += part
    except ConnectionResetError:
        pass
    return found


def test_a_whole_answer_that_nobody_reads_is_thrown_away() -> None:
    with listening(send_bytes=SMALL, options=Options(send_seconds=0.3)) as found, found.client() as client:
        whole = len(client.post("/tokenize", json=LARGE).content)
        client.close()
        until(lambda: found.connections() == 0)
        asked = ask(found)
        until(lambda: found.connections() == 1)
        until(lambda: found.server.under_way == 0 and found.connections() == 0)
        assert len(all_that_comes(asked)) < whole
        asked.close()


def test_requests_whose_answers_nobody_reads_are_given_up() -> None:
    many = b"GET /page/style.css HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 1000
    with listening(send_bytes=SMALL, options=Options(send_seconds=0.3)) as found:
        connection = raw(found)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.setblocking(False)
        connection.send(many)
        until(lambda: found.server.under_way == 1)
        until(lambda: found.server.under_way == 0 and found.connections() == 0)
        connection.close()


def test_the_rest_of_an_answer_is_not_kept_for_longer_than_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xgen.serve.run, "KEEP_ALIVE_SECONDS", 0.3)
    # All of it is what is left, since it is handed over in one piece.
    monkeypatch.setattr("xgen.serve.doors.PIECE", 1 << 30)
    with listening(send_bytes=SMALL, options=Options(send_seconds=60)) as found:
        asked = ask(found)
        until(lambda: found.connections() == 1)
        until(lambda: found.connections() == 0)
        asked.close()


def test_who_reads_slowly_but_on_gets_it_all() -> None:
    with listening(send_bytes=1 << 15, options=Options(send_seconds=1)) as found, found.client() as client:
        whole = client.post("/tokenize", json=LARGE).content
        asked = ask(found, 1 << 15)
        read, begin = b"", time.monotonic()
        while not read.endswith(whole):
            time.sleep(0.08)
            read += (part := asked.recv(1 << 15))
            assert part
        assert time.monotonic() - begin > 1, "it would have been in time as one piece"
        asked.close()


def test_a_body_goes_out_in_pieces() -> None:
    sent: list[Any] = []
    body = bytes(range(256)) * (PIECE // 128)

    async def app(_: Any, __: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body + b"x", "more_body": True})
        await send({"type": "http.response.body", "body": body})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    asyncio.run(Entrance(app, frozenset())(scope, lambda: None, send))
    pieces = sent[1:]
    assert b"".join(one["body"] for one in pieces) == body + b"x" + body
    assert max(len(one["body"]) for one in pieces) == PIECE
    assert [one.get("more_body", False) for one in pieces] == [True] * (len(pieces) - 1) + [False]


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [("/tokenize", "Content-Type: application/json", 413), ("/tokenize", "", 415), ("/props", "", 405)],
)
def test_the_rest_of_a_refused_body_is_not_waited_for(path: str, headers: str, status: int) -> None:
    with listening(options=Options(body_seconds=0.4)) as found:
        connection = raw(found)
        head = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Length: 900000000", *filter(None, [headers])]
        connection.sendall("\r\n".join([*head, "", ""]).encode())
        assert f" {status} ".encode() in connection.recv(4096).split(b"\r\n")[0]

        def drips() -> bool:
            try:
                connection.sendall(b" ")
            except OSError:
                return False
            return True

        until(lambda: not drips())
        assert found.connections() == 0
        connection.close()


def test_who_sends_a_refused_body_to_its_end_reads_why_and_may_go_on() -> None:
    body = b'{"content": "' + b"x" * 20_000_000 + b'"}'
    with listening(options=Options(body_seconds=5)) as found, found.client() as client:
        answer = client.post("/tokenize", content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert client.post("/tokenize", json={"content": "fox"}).status_code == 200


@pytest.mark.parametrize(("slow", "stream"), [("scores", False), ("scores", True), ("json", False)])
def test_others_are_answered_while_a_long_answer_is_put_together(
    monkeypatch: pytest.MonkeyPatch, slow: str, stream: bool
) -> None:
    begun, others_answered = threading.Event(), threading.Event()
    answers: list[int] = []

    def held(make: Callable[..., Any]) -> Callable[..., Any]:
        def wait_and_make(*given: Any, **named: Any) -> Any:
            begun.set()
            assert others_answered.wait(10), "the others wait too"
            return make(*given, **named)

        return wait_and_make

    with listening() as found, found.client() as client:

        def go() -> None:
            with found.client() as other:
                answers.append(other.post("/v1/completions", json=SCORED | {"stream": stream}).status_code)

        if slow == "json":
            monkeypatch.setattr(xgen.serve.app, "json_response", held(xgen.serve.app.json_response))
        else:
            monkeypatch.setattr(CompletionLogprobs, "add", held(CompletionLogprobs.add))
        thread = threading.Thread(target=go)
        thread.start()
        assert begun.wait(10)
        assert client.get("/page/style.css").status_code == 200
        others_answered.set()
        thread.join(10)
    assert answers == [200]
