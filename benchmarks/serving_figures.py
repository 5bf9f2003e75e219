"""What a server adds to its engine, and what continuous batching gains: a few figures of one model.

    python benchmarks/serving_figures.py MODEL [--precision bfloat16] [--requests 128]

- `batching`: tokens a second of requests of mixed lengths when the engine takes them as places become free, over those
  when it takes eight at a time, as static batching does: all of them with the longest prompt and the longest output of
  the eight, of which only what was asked for counts. Prompts of 16 to 512 tokens, outputs of 8 to 512, their
  logarithms even.
- `first_byte_seconds`: from the engine's first token to the asker's first byte of text, both since the request came:
  median and largest of 20 requests one after another.
- `cancel_seconds`: from hanging up in the middle of an answer until /metrics tells of no running request; median and
  largest of 20. /metrics itself takes part of it.
- `overhead`: share of the engine's tokens a second that is lost through HTTP, eight streams at a time.

Prints one JSON object. Nothing is asserted: what a machine does beside it would decide.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from xgen.infer.engine import Engine
from xgen.infer.open import open_engine
from xgen.infer.program import Settings
from xgen.infer.request import Request, Sampling
from xgen.serve.started import READY_SECONDS, Started, started

SLOTS = 8
TIMES = 20
PROMPT, OUTPUT = 128, 128


def request_of(prompt: int, output: int) -> Request:
    """Of random tokens that no other request has: nothing of it is in the cache."""
    ids = tuple(random.randrange(100, 1000) for _ in range(prompt))
    return Request(ids, output, Sampling(temperature=0.0), ignore_eos=True)


def mixed(count: int) -> list[tuple[int, int]]:
    """Prompt and output lengths, of every order of magnitude alike."""
    drawn = random.Random(0)
    return [(int(16 * 32 ** drawn.random()), int(8 * 64 ** drawn.random())) for _ in range(count)]


def rate(engine: Engine, groups: list[list[tuple[int, int]]], wanted: int) -> float:
    """Of the `wanted` tokens, a second."""
    begin = time.perf_counter()
    for group in groups:
        engine.generate([request_of(*lengths) for lengths in group])
    return wanted / (time.perf_counter() - begin)


def batching(engine: Engine, count: int) -> dict[str, float]:
    trace = mixed(count)
    wanted = sum(output for _, output in trace)
    eights = [trace[at : at + SLOTS] for at in range(0, count, SLOTS)]
    padded = [[(max(p for p, _ in eight), max(o for _, o in eight))] * len(eight) for eight in eights]
    continuous, static = rate(engine, [trace], wanted), rate(engine, padded, wanted)
    return {"continuous": continuous, "static": static, "ratio": continuous / static}


def connect(server: Started) -> http.client.HTTPConnection:
    address = urlsplit(server.url)
    return http.client.HTTPConnection(str(address.hostname), address.port, timeout=60)


def ask(server: Started, output: int) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """A stream, of which nothing is read yet."""
    connection = connect(server)
    body = {"prompt": list(request_of(PROMPT, output).ids), "max_tokens": output, "temperature": 0}
    given = json.dumps(body | {"stream": True, "ignore_eos": True})
    connection.request("POST", "/v1/completions", given, {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def metric(server: Started, name: str) -> float:
    connection = connect(server)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def first_bytes(server: Started) -> list[float]:
    late, name = [], "xgen_first_token_seconds"
    for _ in range(TIMES):
        before, told = metric(server, f"{name}_sum"), metric(server, f"{name}_count")
        begin = time.perf_counter()
        connection, answer = ask(server, 2)
        answer.readline()
        seen = time.perf_counter() - begin
        answer.read()
        connection.close()
        # The metrics tell of a step once it is over, which may be after its last token was read.
        while metric(server, f"{name}_count") == told:
            time.sleep(0.001)
        late.append(seen - (metric(server, f"{name}_sum") - before))
    return late


def cancels(server: Started) -> list[float]:
    taken = []
    for _ in range(TIMES):
        connection, answer = ask(server, 512)
        answer.readline()
        begin = time.perf_counter()
        answer.close()
        connection.close()
        while metric(server, "xgen_running"):
            time.sleep(0.001)
        taken.append(time.perf_counter() - begin)
    return taken


def streamed(server: Started, count: int) -> float:
    """Tokens a second of `count` requests, as many at a time as there are slots."""

    def one(_: int) -> None:
        connection, answer = ask(server, OUTPUT)
        answer.read()
        connection.close()

    begin = time.perf_counter()
    with ThreadPoolExecutor(SLOTS) as pool:
        list(pool.map(one, range(count)))
    return count * OUTPUT / (time.perf_counter() - begin)


def told(seconds: list[float]) -> dict[str, float]:
    return {"median": median(seconds), "largest": max(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--requests", type=int, default=128)
    options = parser.parse_args()
    random.seed(0)
    opened = open_engine(options.model, Settings(window=2048, slots=SLOTS), precision=options.precision)
    with opened.engine as engine:
        engine.generate([request_of(PROMPT, 8) for _ in range(SLOTS)])
        found: dict[str, Any] = {"batching": batching(engine, options.requests)}
        alone = rate(engine, [[(PROMPT, OUTPUT)] * options.requests], OUTPUT * options.requests)
    program = "from xgen.cli.app import main; main()"
    serve = ["serve", options.model, "--precision", options.precision, "--window", "2048", "--slots", str(SLOTS)]
    with started([sys.executable, "-c", program, *serve], seconds=READY_SECONDS) as server:
        streamed(server, SLOTS)
        found |= {"first_byte_seconds": told(first_bytes(server)), "cancel_seconds": told(cancels(server))}
        through = streamed(server, options.requests)
    found["overhead"] = {"engine": alone, "server": through, "share": 1 - through / alone}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
