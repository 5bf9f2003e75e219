"""The load generator: it asks what was planned, counts what came, and ends when it should, whatever the server does."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import Running, listening

from xgen.errors import RecipeError
from xgen.serve.ask import Address, Answer, Lost, ask, parse_address
from xgen.serve.errors import ServeError
from xgen.serve.load import Outcome, Plan, Range, Wanted, cached_tokens_read, figures, percentiles, wanted
from xgen.serve.observe import Metrics, Observer, measure, read_metrics, resident_bytes
from xgen.serve.started import started

SMALL = Plan(clients=3, requests=12, prompt=Range(1, 40), output=Range(2, 12), timeout=20)


def put_on(found: Running, plan: Plan, **settings: Any) -> dict[str, Any]:
    return asyncio.run(measure(parse_address(found.address), plan, **settings))


@contextmanager
def answering(*pieces: bytes, pause: float = 0.0) -> Iterator[Address]:
    """A server that says the same to one asker, whatever was asked."""
    with socket.create_server(("127.0.0.1", 0)) as door:

        def answer() -> None:
            connection, _ = door.accept()
            with connection:
                connection.recv(65536)
                for piece in pieces or (b"",):
                    connection.sendall(piece)
                    time.sleep(pause)

        thread = threading.Thread(target=answer)
        thread.start()
        yield Address("127.0.0.1", door.getsockname()[1])
        thread.join(10)


async def body_of(address: Address) -> tuple[int, bytes]:
    async with ask(address, "/") as answer:
        return answer.status, await answer.body()


@pytest.mark.parametrize("form", ["chunked", "counted", "closed"])
def test_a_body_is_whole_however_it_comes(form: str) -> None:
    draw = random.Random(form)
    body = draw.randbytes(3000)
    head = {"chunked": b"Transfer-Encoding: chunked\r\n", "counted": b"content-length: 3000\r\n", "closed": b""}[form]
    sent = body
    if form == "chunked":
        cuts = [0, *sorted(draw.sample(range(1, 3000), 9)), 3000]
        parts = [body[a:b] for a, b in pairwise(cuts)]
        sent = b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in [*parts, b""])
    whole = b"HTTP/1.1 201 Created\r\n" + head + b"\r\n" + sent
    pieces = [whole[at : at + 700] for at in range(0, len(whole), 700)]
    with answering(*pieces, pause=0.005) as address:
        assert asyncio.run(body_of(address)) == (201, body)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"SSH-2.0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhal",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nwhole\r\n",
    ],
)
def test_an_answer_that_breaks_off_is_no_answer(sent: bytes) -> None:
    with answering(sent) as address, pytest.raises(Lost):
        asyncio.run(body_of(address))


def test_events_are_whole_however_they_come() -> None:
    text = b": ping\n\ndata: one\n\ndata: two\n\ndata: [DONE]\n\n"

    async def events(address: Address) -> list[str]:
        async with ask(address, "/") as answer:
            return [event async for event in answer.events()]

    for cut in range(1, len(text), 7):
        with answering(b"HTTP/1.1 200 OK\r\n\r\n" + text[:cut], text[cut:], pause=0.005) as address:
            assert asyncio.run(events(address)) == ["one", "two", "[DONE]"]


def test_addresses() -> None:
    assert parse_address("http://[::1]:8000/", "k") == Address("::1", 8000, key="k")
    assert parse_address("https://example.org/model") == Address("example.org", 443, secure=True, path="/model")
    assert parse_address("http://[::1]:8000/a").url == "http://[::1]:8000/a"
    for wrong in ("example.org", "ftp://example.org", "http://", "http://a:port"):
        with pytest.raises(ServeError, match="is no address"):
            parse_address(wrong)


def test_a_plan_draws_the_same_requests_every_time_and_of_all_lengths() -> None:
    plan = Plan(clients=1, requests=1, prompt=Range(1, 1000), output=Range(7, 7), disconnect=0.3, seed=5)
    drawn = [wanted(plan, number) for number in range(4000)]
    assert drawn == [wanted(plan, number) for number in range(4000)]
    assert drawn[:50] != [wanted(replace(plan, seed=6), number) for number in range(50)]
    prompts = np.array([one.prompt for one in drawn])
    assert prompts.min() == 1
    assert prompts.max() > 950
    # Evenly over the orders of magnitude: a third of each.
    shares = np.histogram(prompts, [1, 10, 100, 1001])[0] / len(prompts)
    np.testing.assert_allclose(shares, 1 / 3, atol=0.03)
    hung_up = [one.hang_up for one in drawn if one.hang_up is not None]
    assert len(hung_up) / len(drawn) == pytest.approx(0.3, abs=0.03)
    assert set(hung_up) == set(range(7))
    assert {one.output for one in drawn} == {7}


@pytest.mark.parametrize("size", [1, 2, 19, 20, 21, 100, 1000])
def test_percentiles_are_those_of_numpy(size: int) -> None:
    values = random.Random(size).choices(range(1000), k=size)
    found = percentiles([float(value) for value in values])
    assert found is not None
    for share in (50, 95, 99):
        assert found[f"p{share}"] == np.percentile(values, share, method="inverted_cdf")
    assert found["mean"] == pytest.approx(np.mean(values))
    assert percentiles([]) is None


def test_a_good_answer_is_whole_and_in_time() -> None:
    asked = Wanted(10, 5, None)

    def answer(first: float, last: float, end: str = "finished") -> Outcome:
        return Outcome(asked, 0.0, end, first, last, 5, 5)

    outcomes = [
        answer(0.5, 0.9),  # the only one that is good: a tenth of a second from token to token
        answer(1.5, 1.9),
        answer(0.5, 2.5),
        answer(0.5, 0.9, "stream failed"),
        Outcome(asked, 0.0, "429"),
        answer(0.5, 0.9, "hung up"),
        answer(0.5, 0.9, "unfinished"),
    ]
    found = figures(replace(SMALL, slo_ttft=1.0, slo_tpot=0.2), outcomes, 10.0)
    assert found["goodput"]["requests_per_second"] == pytest.approx(0.1)
    assert found["goodput"]["share"] == pytest.approx(1 / 5)
    assert found["requests"] == {
        "sent": 7,
        "finished": 3,
        "hung_up": 1,
        "unfinished": 1,
        "errors": {"429": 1, "stream failed": 1},
    }
    assert found["tpot_seconds"]["p50"] == pytest.approx(0.1)
    assert found["request_seconds"]["p99"] == pytest.approx(2.5)
    assert figures(SMALL, outcomes, 10.0)["goodput"]["requests_per_second"] == pytest.approx(0.3)
    # Of each answer that came: what stood before its five tokens, twelve and a half on average.
    assert cached_tokens_read(outcomes) == pytest.approx(6 * 5 * 12.5)


def test_a_closed_loop_asks_all_and_counts_what_the_server_counts() -> None:
    with listening(slots=2) as found:
        told = put_on(found, SMALL)
        assert told["requests"] == {"sent": 12, "finished": 12, "hung_up": 0, "unfinished": 0, "errors": {}}
        drawn = [wanted(SMALL, number) for number in range(12)]
        statistics = found.model.engine.statistics()
        assert statistics.prompt_tokens == sum(one.prompt for one in drawn)
        assert statistics.output_tokens == sum(one.output for one in drawn)
        assert told["output_tokens_per_second"] * told["seconds"] == pytest.approx(statistics.output_tokens)
        assert told["prompt_tokens_per_second"] * told["seconds"] == pytest.approx(statistics.prompt_tokens)
        assert (told["loop"], told["model"], told["slots"]) == ("closed", "fake", 2)
        assert told["after"] == {"running": 0, "waiting": 0, "pages_used": 0}


def test_there_are_never_more_at_once_than_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    now = most = 0

    @asynccontextmanager
    async def counted(address: Address, path: str, body: Any) -> AsyncIterator[Answer]:
        nonlocal now, most
        now += 1
        most = max(most, now)
        async with ask(address, path, body) as answer:
            yield answer
        now -= 1

    monkeypatch.setattr("xgen.serve.load.ask", counted)
    with listening(slots=8, pace=lambda _: time.sleep(0.001)) as found:
        assert put_on(found, replace(SMALL, clients=5, requests=30))["requests"]["finished"] == 30
    assert (now, most) == (0, 5)


def test_a_late_first_token_and_slow_tokens_are_seen_as_such() -> None:
    words = tuple(range(257, 300))  # of which each is a text by itself
    with listening(slots=4, pace=lambda _: time.sleep(0.02), alphabet=words) as found:
        told = put_on(found, replace(SMALL, clients=1, requests=8, output=Range(8, 12), slo_ttft=0.001))
        assert told["tpot_seconds"]["p50"] >= 0.02
        assert told["ttft_seconds"]["p50"] >= 0.02
        assert told["goodput"]["requests_per_second"] == 0
        assert 0 < told["cache"]["used_mean"] <= told["cache"]["used_peak"] <= 1
        assert (told["queue"]["running_peak"], told["queue"]["preemptions"]) == (1, 0)
        for name in ("ttft", "tpot", "request"):
            values = told[f"{name}_seconds"]
            assert values["p50"] <= values["p95"] <= values["p99"]
        generous = put_on(found, replace(SMALL, clients=1, requests=4, slo_ttft=10, slo_tpot=10, seed=1))
        assert generous["goodput"]["share"] == 1


def test_an_open_loop_comes_at_its_rate_and_ends_in_time_before_a_stuck_server() -> None:
    stuck = threading.Event()
    plan = Plan(rate=40, seconds=1.5, prompt=Range(4, 4), output=Range(4, 4))
    with listening(slots=2, pace=lambda _: stuck.wait(10)) as found:
        threading.Timer(6.0, stuck.set).start()
        told = put_on(found, plan)
        assert 1.5 <= told["seconds"] < 5.5
        assert told["requests"]["unfinished"] == told["requests"]["sent"]
        assert 40 * 1.5 / 2 < told["requests"]["sent"] < 40 * told["seconds"] * 2
        assert told["ttft_seconds"] is None
        assert told["after"] == {"running": 0, "waiting": 0, "pages_used": 0}


def test_those_who_hang_up_leave_nothing_behind() -> None:
    plan = replace(SMALL, clients=4, requests=40, disconnect=0.5, output=Range(10, 20))
    with listening(slots=4, pace=lambda _: time.sleep(0.002)) as found:
        told = put_on(found, plan)
        leaving = sum(wanted(plan, number).hang_up is not None for number in range(40))
        assert told["requests"]["hung_up"] == pytest.approx(leaving, abs=2)  # text of two tokens may come in one piece
        assert told["requests"]["finished"] == 40 - told["requests"]["hung_up"]
        statistics = found.model.engine.statistics()
        assert sum(statistics.finished.values()) == 40
        assert statistics.finished["cancelled"] > 0
        assert told["after"] == {"running": 0, "waiting": 0, "pages_used": 0}
        assert put_on(found, SMALL)["requests"]["finished"] == 12


def test_what_the_server_refuses_is_counted_by_status() -> None:
    plan = replace(SMALL, clients=6, requests=None, seconds=1.0)
    with listening(slots=1, queue=1, pace=lambda _: time.sleep(0.01)) as found:
        told = put_on(found, plan)
        assert set(told["requests"]["errors"]) == {"429"}
        assert told["requests"]["errors"]["429"] == found.model.engine.statistics().rejected
        assert told["requests"]["finished"] > 0


def test_a_failure_within_an_answer_is_an_error() -> None:
    calls = 0

    def fail(_: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("the device is lost")

    with listening(slots=1, pace=fail) as found:
        told = put_on(found, replace(SMALL, clients=1, requests=3, output=Range(8, 8)))
        assert told["requests"]["finished"] == 2
        [(name, number)] = told["requests"]["errors"].items()
        assert (name.split()[0], number) == ("stream", 1)


def test_a_server_without_an_answer_in_time_is_a_timeout() -> None:
    stuck = threading.Event()
    with listening(slots=1, pace=lambda _: stuck.wait(10)) as found:
        threading.Timer(1.0, stuck.set).start()
        told = put_on(found, replace(SMALL, clients=2, requests=2, timeout=0.3))
        assert told["requests"]["errors"] == {"timeout": 2}


def test_the_memory_of_a_process_is_told() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    assert resident_bytes(os.getpid()) == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE"), rel=0.1)
    assert resident_bytes(2**22 + 1) is None
    with listening() as found:
        told = put_on(found, SMALL, pid=os.getpid())
        assert told["resident"]["peak_bytes"] >= told["resident"]["end_bytes"] > 10**7


def test_a_server_too_busy_to_tell_of_itself_is_observed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    async def refused_at_times(address: Address) -> Metrics:
        nonlocal looks
        looks += 1
        if looks % 3 == 2:
            raise ServeError("/metrics answered 429")
        return await read_metrics(address)

    monkeypatch.setattr("xgen.serve.observe.EVERY_SECONDS", 0.001)
    with listening() as found:
        observer = Observer(parse_address(found.address))

        async def watch() -> None:
            with suppress(TimeoutError):
                await asyncio.wait_for(observer.watch(), 0.5)

        with monkeypatch.context() as patch:
            patch.setattr("xgen.serve.observe.read_metrics", refused_at_times)
            asyncio.run(watch())
    assert len(observer.metrics) > 4


def test_an_observer_that_ends_early_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_: Observer) -> None:
        raise ValueError("no number")

    monkeypatch.setattr(Observer, "watch", fail)
    with listening() as found, pytest.raises(ValueError, match="no number"):
        put_on(found, SMALL)


def test_servers_that_are_not_ours_or_not_there() -> None:
    said = b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnone"
    with answering(said) as address, pytest.raises(ServeError, match="/props answered 404: none"):
        asyncio.run(measure(address, SMALL))
    with pytest.raises(ServeError, match="is the server running"):
        asyncio.run(measure(address, SMALL))


def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xgen.serve.ask.ANSWER_SECONDS", 0.3)
    with answering(pause=1) as address, pytest.raises(ServeError, match=r"/props was not answered within 0\.3 s"):
        asyncio.run(measure(address, SMALL))


def test_plans_that_cannot_be() -> None:
    with listening() as found, pytest.raises(RecipeError, match="do not fit the server's window of 256"):
        put_on(found, replace(SMALL, prompt=Range(1, 250)))
    for change, told in (
        ({"clients": None}, "either clients"),
        ({"rate": 2.0}, "either clients"),
        ({"requests": None}, "say when it ends"),
        ({"clients": 0}, "clients 0 must be more than 0"),
        ({"disconnect": 1.5}, "disconnect 1.5 is no share"),
    ):
        with pytest.raises(RecipeError, match=told):
            replace(SMALL, **change)
    for least, most in ((0, 3), (4, 3)):
        with pytest.raises(RecipeError, match=f"{least}-{most} is no range"):
            Range(least, most)


STAND_IN = """
import http.server, sys
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Healthy).serve_forever()
"""


def test_a_server_of_ones_own_ends_with_the_context_and_with_sigterm() -> None:
    with started([sys.executable, "-c", STAND_IN], seconds=60) as server:
        assert server.process.poll() is None
        assert 0 < server.ready_seconds < 60
    assert server.process.poll() is not None
    with (
        pytest.raises(SystemExit, match="143"),
        started([sys.executable, "-c", STAND_IN], seconds=60) as server,
    ):
        signal.raise_signal(signal.SIGTERM)
    assert server.process.poll() is not None


def test_a_server_that_does_not_become_ready_says_what_it_said() -> None:
    with (
        pytest.raises(ServeError, match="ended with code 3:\nno port"),
        started([sys.executable, "-c", "print('no port'); raise SystemExit(3)"], seconds=60),
    ):
        pass
    with (
        pytest.raises(ServeError, match=r"not ready after 0\.5 s"),
        started([sys.executable, "-c", "import time; time.sleep(60)"], seconds=0.5),
    ):
        pass
