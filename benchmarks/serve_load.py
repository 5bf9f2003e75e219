"""Five minutes of a heavy load on a server of its own, and a crash: what must hold, held or not.

    python benchmarks/serve_load.py MODEL [--seconds 300] [--clients 64] [-- OPTIONS OF xgen serve]

64 clients ask for mixed lengths and hang up on a third of the requests midway. It must be that

- no request ends in an error but 429;
- no page is lost: once idle, the rows hold none;
- memory is flat: what the server has resident at the end is at most 5 % more than after the first fifth;
- the server still answers, and answers the same as before;
- after kill -9 a new server on the same model answers /health with 200 within 10 seconds, programs from the cache.

Prints one JSON object, which ends with the list `broken` of what did not hold; it is empty, and the exit code 0, when
all did.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from typing import Any

from xgen.serve.ask import Address, ask_json, parse_address
from xgen.serve.load import Plan, Range
from xgen.serve.observe import measure
from xgen.serve.started import READY_SECONDS, Started, started

MOST_GROWTH = 1.05
RESTART_SECONDS = 10.0
QUESTION = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}


def answer_of(address: Address) -> str:
    """To a question whose answer never changes."""
    body = asyncio.run(ask_json(address, "/v1/completions", QUESTION))
    text: str = body["choices"][0]["text"]
    return text


def loaded(server: Started, plan: Plan) -> dict[str, Any]:
    """The figures of the load, and the answer to the question before and after it."""
    address = parse_address(server.url)
    before = answer_of(address)
    found = asyncio.run(measure(address, plan, pid=server.process.pid))
    return found | {"answer_before": before, "answer_after": answer_of(address)}


def broken(found: dict[str, Any]) -> list[str]:
    """What did not hold, in words."""
    resident, told = found["resident"], []
    if errors := set(found["requests"]["errors"]) - {"429"}:
        told.append(f"requests ended in {', '.join(sorted(errors))}")
    if not found["requests"]["finished"] or not found["requests"]["hung_up"]:
        told.append("the load was none: nothing finished, or nobody hung up")
    if any(found["after"].values()):
        told.append(f"something is still held when idle: {found['after']}")
    if resident["end_bytes"] > MOST_GROWTH * resident["begin_bytes"]:
        told.append(f"memory grew from {resident['begin_bytes']} to {resident['end_bytes']} bytes")
    for when in ("after", "restarted"):
        if found[f"answer_{when}"] != found["answer_before"]:
            told.append(f"{when}: the same question has another answer, {found[f'answer_{when}']!r}")
    if found["restart_seconds"] > RESTART_SECONDS:
        told.append(f"ready again only {found['restart_seconds']:.1f} s after kill -9")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--prompt", type=int, nargs=2, default=[16, 2048], help="shortest and longest, in tokens")
    parser.add_argument("--output", type=int, nargs=2, default=[8, 128])
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, for_server = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    plan = Plan(
        clients=options.clients,
        seconds=options.seconds,
        prompt=Range(*options.prompt),
        output=Range(*options.output),
        disconnect=1 / 3,
    )
    program = "from xgen.cli.app import main; main()"
    command = [sys.executable, "-c", program, "serve", options.model, *for_server]
    with started(command, seconds=READY_SECONDS) as server:
        found = loaded(server, plan)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    with started(command, seconds=READY_SECONDS) as again:
        found |= {"start_seconds": server.ready_seconds, "restart_seconds": again.ready_seconds}
        found["answer_restarted"] = answer_of(parse_address(again.url))
    found["broken"] = broken(found)
    sys.stdout.write(json.dumps(found) + "\n")
    sys.exit(bool(found["broken"]))


if __name__ == "__main__":
    main()
