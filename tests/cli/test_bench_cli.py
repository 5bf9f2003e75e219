"""`xgen bench`: its figures hang together, its JSON keeps its shape, and it ends when it was told to."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from micro_runs import Done, Micro, assert_one_error, command, start

sys.path.append(str(Path(__file__).parent.parent / "serve"))
from served import listening

GENERATE_KEYS = [
    "model",
    "parameters",
    "device",
    "precision",
    "int8_weights",
    "int8_cache",
    "window",
    "slots",
    "weight_bytes",
    "token_bytes",
    "decode_steps",
    "repeats",
    "ready_seconds",
    "compilations",
    "compilations_after_ready",
    "bandwidth_bytes_per_second",
    "cases",
]
CASE_KEYS = [
    "context",
    "batch",
    "prompt_tokens",
    "prefill_tokens_per_second",
    "first_token_seconds",
    "decode_tokens_per_second",
    "step_seconds",
    "step_bytes",
    "bandwidth_share",
]
SERVE_KEYS = [
    "url",
    "model",
    "parameters",
    "context_length",
    "slots",
    "loop",
    "clients",
    "rate",
    "prompt_tokens",
    "output_tokens",
    "disconnect",
    "seed",
    "seconds",
    "requests",
    "ttft_seconds",
    "tpot_seconds",
    "request_seconds",
    "requests_per_second",
    "goodput",
    "prompt_tokens_per_second",
    "output_tokens_per_second",
    "bandwidth_bytes_per_second",
    "bandwidth_share",
    "cache",
    "queue",
    "resident",
    "after",
]
SERVER = ("--precision", "float32", "--slots", "2")
"""The same programs as those of the engine alone, which then come from the cache."""

TINY = ("--prompt", "2-20", "--output", "4-8")


def last_line(done: Done) -> dict[str, Any]:
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out.splitlines()[-1])
    return found


@pytest.mark.slow
def test_the_figures_of_the_engine_hang_together(micro: Micro, tmp_path: Path) -> None:
    arguments = ("--precision", "float32", "--tokens", "4", "--repeats", "1")
    cases = ("--context", "16,64", "--batch", "1", "--batch", "2")
    done = command("bench", "generate", micro.straight, *arguments, *cases, "--json", "-")
    assert len(done.out.splitlines()) == 1
    found = last_line(done)
    assert list(found) == GENERATE_KEYS
    assert [(case["context"], case["batch"]) for case in found["cases"]] == [(16, 1), (16, 2), (64, 1), (64, 2)]
    assert found["compilations"] >= 5
    assert found["compilations_after_ready"] == 0
    assert (found["window"], found["slots"], found["precision"]) == (64, 2, "float32")
    # One layer with two heads of sixteen: keys and values in float32.
    assert found["token_bytes"] == 2 * 2 * 16 * 4
    for case in found["cases"]:
        assert list(case) == CASE_KEYS
        assert case["prompt_tokens"] == min(case["context"], 64 - 4 - case["batch"])
        assert case["decode_tokens_per_second"] == pytest.approx(case["batch"] / case["step_seconds"])
        assert 0 < case["first_token_seconds"] < 10
        prefill = case["batch"] * case["prompt_tokens"] / case["prefill_tokens_per_second"]
        assert case["first_token_seconds"] <= prefill * 1.001
        weights = case["step_bytes"] - case["batch"] * (case["prompt_tokens"] + 2) * found["token_bytes"]
        assert 0.5 * found["weight_bytes"] < weights < found["weight_bytes"]  # the embedding is not read
        share = case["step_bytes"] / case["step_seconds"] / found["bandwidth_bytes_per_second"]
        assert case["bandwidth_share"] == pytest.approx(share)
        assert 0 < share < 1
    target = tmp_path / "result.json"
    done = command("bench", "generate", micro.straight, *arguments, "--context", "16", "--batch", "2", "--json", target)
    assert list(json.loads(target.read_text())) == GENERATE_KEYS
    assert "decode" in done.out


def test_cases_that_do_not_fit_are_refused_before_anything_is_loaded(micro: Micro) -> None:
    for arguments, told in (
        (("--context", "65"), "context 65 does not fit the window of 64 tokens"),
        (("--batch", "0"), "batch '0' is no count"),
        (("--context", "2X"), "'2X' is not a length"),
        (("--tokens", "63"), "leave no room for a prompt"),
    ):
        assert_one_error(command("bench", "generate", micro.straight, *arguments), 2, told)


@pytest.mark.slow
def test_a_server_is_started_loaded_and_ended(micro: Micro) -> None:
    load = ("--clients", "4", "--requests", "12", "--disconnect", "0.3", "--slo-ttft", "60", "--slo-tpot", "60")
    found = last_line(command("bench", "serve", micro.straight, *TINY, *load, "--", *SERVER))
    assert list(found) == [*SERVE_KEYS, "ready_seconds"]
    counts = found["requests"]
    assert counts["sent"] == 12 == counts["finished"] + counts["hung_up"]
    assert counts["errors"] == {}
    assert found["goodput"]["requests_per_second"] == pytest.approx(found["requests_per_second"])
    assert found["after"] == {"running": 0, "waiting": 0, "pages_used": 0}
    assert found["resident"]["peak_bytes"] > 10**7
    assert 0 < found["bandwidth_share"] < 1
    assert 0 <= found["cache"]["used_peak"] <= 1
    port = int(found["url"].rpartition(":")[2])
    assert_one_error(command("bench", "serve", found["url"], "--requests", "1"), 2, f"{port} does not answer")


@pytest.mark.slow
def test_an_open_loop_on_a_running_server_ends_in_time(micro: Micro, tmp_path: Path) -> None:
    serving = start("serve", micro.straight, "--port", "0", *SERVER)
    try:
        assert serving.stdout is not None
        url = serving.stdout.readline().split()[0]
        target = tmp_path / "load.json"
        begin = time.monotonic()
        arguments = ("--rate", "20", "--seconds", "2", "--json", target, "--quiet")
        done = _when_ready(url, *arguments)
        assert time.monotonic() - begin < 120
        found = last_line(done)
        assert json.loads(target.read_text()) == found
        assert len(done.out.splitlines()) == 1
        assert (found["loop"], found["rate"], found["clients"]) == ("open", 20.0, None)
        assert found["seconds"] == pytest.approx(2, abs=1)
        assert 15 <= found["requests"]["sent"] <= 70
        error = command("bench", "serve", url, "--requests", "1", "--", "--slots", "2")
        assert_one_error(error, 2, "runs already; leave out its options --slots 2")
    finally:
        serving.terminate()
        serving.communicate(timeout=60)


def _when_ready(url: str, *arguments: object) -> Done:
    """The load on a server as soon as it is ready, which it is not at first."""
    while True:
        done = command("bench", "serve", url, *TINY, *arguments)
        if "still loading" not in done.err:
            return done
        time.sleep(0.2)


def test_loads_that_cannot_be(micro: Micro) -> None:
    for arguments, told in (
        (("--clients", "2", "--rate", "1"), "either clients"),
        (("--prompt", "9-3"), "9-3 is no range"),
        (("--disconnect", "2"), "disconnect 2.0 is no share"),
    ):
        assert_one_error(command("bench", "serve", micro.straight, *arguments), 2, told)
    assert_one_error(command("bench", "serve", "http://"), 2, "is no address")


@pytest.mark.parametrize(
    ("load", "told"),
    [
        (("--clients", "2", "--seconds", "1"), ("none of the 2 requests finished (2 unfinished)", "fewer --clients")),
        (("--rate", "20", "--seconds", "1"), ("unfinished)", "give more --seconds, or a lower --rate")),
        (("--rate", "1e-9", "--seconds", "0.1"), ("no request was due within 0.1 s", "higher --rate")),
        (("--clients", "2", "--requests", "2", "--timeout", "0.5"), ("(2 timeout)", "the server's log says why")),
    ],
)
def test_a_load_of_which_nothing_finished_is_an_error(load: tuple[str, ...], told: tuple[str, ...]) -> None:
    stuck = threading.Event()
    with listening(pace=lambda _: stuck.wait(10)) as found:
        threading.Timer(2.0, stuck.set).start()
        done = command("bench", "serve", found.address, *TINY, *load)
    assert_one_error(done, 2, *told)
    assert "first token s" not in done.out, "a table without figures"
    assert json.loads(done.out.splitlines()[-1])["requests"]["finished"] == 0


def test_a_load_that_is_all_hung_up_on_is_none() -> None:
    with listening() as found:
        done = command("bench", "serve", found.address, *TINY, "--requests", "3", "--disconnect", "1")
    assert last_line(done)["requests"]["hung_up"] > 0


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    done = command("bench", "serve", tmp_path / "none")
    assert done.code == 2
    assert "the server ended with code 2" in done.err
    assert str(tmp_path / "none") in done.err
