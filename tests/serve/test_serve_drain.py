"""A server that is told to stop finishes what it has begun, in a real process with real signals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import until

LONG = {"prompt": "the fox", "max_tokens": 60, "ignore_eos": True}


@dataclass
class Process:
    """The process, and what is asked of it in other threads."""

    process: subprocess.Popen[str]
    port: int
    answers: list[Any] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=20)

    def ask(self, body: Any) -> None:
        def go() -> None:
            with self.client() as client:
                self.answers.append(client.post("/v1/completions", json=body))

        self.threads.append(threading.Thread(target=go))
        self.threads[-1].start()

    def join(self) -> list[Any]:
        for thread in self.threads:
            thread.join(20)
        return self.answers

    def running(self) -> float:
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        return next((float(line.split(" ")[-1]) for line in lines if line.startswith("xgen_running ")), -1.0)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started = []

    def begin(*, seconds: float = 0.0, drain_seconds: float = 20.0) -> Process:
        file = tmp_path / "port"
        script = [
            sys.executable,
            str(Path(__file__).parent / "serving.py"),
            str(file),
            str(seconds),
            str(drain_seconds),
        ]
        process = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        until(lambda: file.exists() and file.read_text(), 60)
        return Process(process, int(file.read_text()))

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def health(found: Process) -> str:
    with found.client() as client:
        return str(client.get("/health").json()["status"])


def test_what_is_under_way_ends_and_what_comes_is_refused(start: Callable[..., Process]) -> None:
    found = start()
    until(lambda: health(found) == "ok")
    found.ask(LONG)
    found.ask(LONG | {"stream": True})
    until(lambda: found.running() == 2)
    found.process.send_signal(signal.SIGTERM)
    until(lambda: health(found) == "draining")
    with found.client() as client:
        refused = client.post("/v1/completions", json=LONG)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "draining"
    answers = found.join()
    assert [answer.status_code for answer in answers] == [200, 200]
    assert {answer.text.rstrip().endswith("data: [DONE]") for answer in answers} == {True, False}
    out, log = found.process.communicate(timeout=20)
    assert found.process.returncode == 0
    assert out == "ended\n"
    events = [json.loads(line)["event"] for line in log.splitlines()]
    assert events[0] == "ready"
    assert events[-1] == "stopped"


def test_what_does_not_end_in_time_is_told_so(start: Callable[..., Process]) -> None:
    found = start(drain_seconds=0.2)
    until(lambda: health(found) == "ok")
    long = LONG | {"max_tokens": 240}
    found.ask(long)
    found.ask(long | {"stream": True})
    until(lambda: found.running() == 2)
    begin = time.monotonic()
    found.process.send_signal(signal.SIGINT)
    answers = sorted(found.join(), key=lambda answer: int(answer.status_code))
    assert time.monotonic() - begin < 3, "the answers alone would take five seconds"
    assert [answer.status_code for answer in answers] == [200, 503]
    last = answers[0].text.rstrip().splitlines()[-1].removeprefix("data: ")
    assert json.loads(last)["error"]["code"] == answers[1].json()["error"]["code"] == "cancelled"
    assert found.process.wait(10) == 0


def test_it_answers_while_it_loads_and_stops_at_once_then(start: Callable[..., Process]) -> None:
    found = start(seconds=60)
    assert health(found) == "loading"
    with found.client() as client:
        assert client.post("/v1/completions", json=LONG).status_code == 503
        assert client.get("/").status_code == 200
    found.process.send_signal(signal.SIGTERM)
    assert found.process.wait(10) == 0
