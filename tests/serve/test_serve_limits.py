"""Askers that leave, stall, come in crowds or send nonsense hold nothing up."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from served import Running, listening, raw, running, until

import xgen.serve.run
from xgen.serve.options import Options

LONG = {"prompt": "the fox", "max_tokens": 200, "ignore_eos": True}
SHORT = {"prompt": "the fox", "max_tokens": 2}


def slowly(name: str) -> None:
    """The pace of a program whose 200 tokens take some seconds."""
    time.sleep(0.02 if name == "decode" else 0)


def value(found: Running, name: str) -> float:
    with found.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return next((float(line.split(" ")[-1]) for line in lines if line.startswith(name + " ")), 0.0)


def send(found: Running, body: Any, *, receive_bytes: int | None = None, keep_back: int = 0) -> socket.socket:
    """Ask, and do not read the answer; all but the last `keep_back` bytes."""
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: "
    connection = raw(found)
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.sendall(f"{head}{len(data)}\r\n\r\n".encode() + data[: len(data) - keep_back])
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_closing_the_connection_frees_the_slot(stream: bool) -> None:
    with listening(pace=slowly) as found:
        connections = [send(found, LONG | {"stream": stream, "n": 2, "seed": at}) for at in range(2)]
        until(lambda: value(found, "xgen_running") == 4)
        if stream:
            assert b"data: " in connections[0].recv(4096)
        for connection in connections:
            connection.close()
        begin = time.monotonic()
        until(lambda: found.model.engine.statistics().running == 0, 2)
        assert time.monotonic() - begin < 1.0, "the answers alone would take four seconds"
        assert value(found, 'xgen_requests_total{finished="cancelled"}') == 4
        until(lambda: value(found, "xgen_http_requests_under_way") == 1)


def test_what_still_waits_is_cancelled_too() -> None:
    with listening(pace=slowly, slots=1) as found:
        first, second = send(found, LONG), send(found, LONG)
        until(lambda: value(found, "xgen_waiting") == 1)
        second.close()
        until(lambda: value(found, "xgen_waiting") == 0)
        assert value(found, "xgen_running") == 1
        first.close()
        until(lambda: value(found, "xgen_running") == 0)


def test_one_too_many_is_told_when_to_come_again() -> None:
    with listening(pace=slowly, slots=1, queue=1) as found, found.client() as client:
        held = [send(found, LONG) for _ in range(2)]
        until(lambda: value(found, "xgen_running") + value(found, "xgen_waiting") == 2)
        for stream in (False, True):
            response = client.post("/v1/completions", json=SHORT | {"stream": stream})
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["type"] == "rate_limit_error"
        # Either all answers of a request are taken in, or none.
        held.pop().close()
        until(lambda: value(found, "xgen_waiting") == 0)
        assert client.post("/v1/completions", json=SHORT | {"n": 2}).status_code == 429
        until(lambda: value(found, 'xgen_requests_total{finished="cancelled"}') == 2)
        held.pop().close()
        assert client.post("/v1/completions", json=SHORT).status_code == 200


def test_silence_in_a_stream_is_filled_with_comments() -> None:
    gate = threading.Event()
    with listening(options=Options(ping_seconds=0.05), pace=lambda _: gate.wait(10) and None) as found:
        connection = send(found, SHORT | {"stream": True})
        seen = b""
        while seen.count(b": ping\n\n") < 3:
            seen += connection.recv(4096)
        assert b"finish_reason" not in seen
        gate.set()
        while b"data: [DONE]" not in seen:
            seen += connection.recv(4096)
        connection.close()


def test_a_head_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xgen.serve.run, "HEADER_SECONDS", 0.2)
    with listening() as found:
        nothing, half, again = raw(found), raw(found), raw(found)
        half.sendall(b"GET /health HTTP/1.1\r\nHost: 127")
        again.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert again.recv(4096).startswith(b"HTTP/1.1 200")
        again.sendall(b"GET /he")
        for connection in (nothing, half, again):
            connection.settimeout(5)
            assert connection.recv(4096) == b""
            connection.close()


def test_a_long_answer_outlives_the_wait_for_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xgen.serve.run, "HEADER_SECONDS", 0.2)
    with listening(pace=slowly) as found, found.client() as client:
        assert client.post("/v1/completions", json=LONG | {"max_tokens": 30}).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with listening(options=Options(body_seconds=0.2)) as found:
        connection = send(found, SHORT, keep_back=1)
        answer = b""
        while b"body_too_slow" not in answer:
            answer += (part := connection.recv(4096))
            assert part, answer
        assert b" 408 " in answer.split(b"\r\n")[0]
        connection.close()


def test_an_asker_that_takes_nothing_is_given_up() -> None:
    with listening(options=Options(send_seconds=0.2), alphabet=(1,)) as found:
        connection = send(found, LONG | {"stream": True, "n": 16, "logprobs": 20}, receive_bytes=1)
        until(lambda: found.server.under_way == 1)
        until(lambda: found.server.under_way == 0, 20)
        connection.close()


BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": SHORT,
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "fox"}], "max_tokens": 2},
    "/tokenize": {"content": "fox"},
    "/detokenize": {"tokens": [5]},
    "/apply-template": {"messages": [{"role": "user", "content": "fox"}]},
}


def nonsense(chance: random.Random, path: str) -> bytes:
    """A body for `path` that is wrong in one of many ways, or by chance in none."""
    values: list[Any] = [None, True, -1, 0, 1.5, 10**40, "x", "", "\x00", [], [[]], {}, {"a": 1}, [1, "x"], 1e308, "🦊"]
    names = "prompt messages max_tokens n stop logit_bias stream_options seed top_k truncation temperature logprobs"
    names = f"{names} echo model stop_token_ids role content min_tokens tools tokens é".split()
    made = {**BODIES[path]}
    if chance.random() < 0.2:
        del made[chance.choice(list(made))]
    for _ in range(chance.randrange(4)):
        made[chance.choice(names)] = chance.choice(values)
    if "messages" in made and chance.random() < 0.3:
        made["messages"] = [{chance.choice(["role", "content", "x"]): chance.choice(values) for _ in range(2)}]
    data = bytearray(json.dumps(made, ensure_ascii=chance.random() < 0.5).encode())
    damages: list[Callable[[bytearray], Any]] = [
        lambda _: None,
        lambda text: text.insert(chance.randrange(len(text)), chance.randrange(256)),
        lambda text: text.__delitem__(slice(chance.randrange(len(text)), None)),
        lambda text: text.extend(bytes(chance.randrange(256) for _ in range(8))),
        lambda text: text.__setitem__(chance.randrange(len(text)), chance.choice(b'{}[]",:\\\xff\x00')),
    ]
    chance.choice(damages)(data)
    return bytes(data)


def test_a_thousand_malformed_bodies_break_nothing() -> None:
    chance = random.Random(20240607)
    headers = {"content-type": "application/json"}
    statuses: Counter[int] = Counter()

    async def ask_all(found: Running) -> None:
        transport = httpx.ASGITransport(found.server)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            for _ in range(1000):
                path = chance.choice(list(BODIES))
                response = await client.post(path, content=nonsense(chance, path), headers=headers)
                statuses[response.status_code] += 1
                assert response.status_code in (200, 400, 404)
                if response.status_code != 200:
                    assert response.json()["error"]["message"]
            assert (await client.post("/v1/completions", json=SHORT)).status_code == 200

    with running() as found:
        asyncio.run(ask_all(found))
        assert found.model.engine.statistics().running == 0
    assert statuses[400] > 500
    assert statuses[200] > 20


def test_bytes_that_are_no_http_break_nothing() -> None:
    chance = random.Random(5)
    with listening() as found, found.client() as client:
        for _ in range(30):
            connection = raw(found)
            connection.sendall(chance.randbytes(200) + b"\r\n\r\n")
            connection.close()
        with pytest.raises(httpx.HTTPError):
            client.get("/health", headers={"x": "y" * 200_000}).raise_for_status()
        assert client.get("/health").status_code == 200
