"""A server under load, seen from beside it: its metrics and its memory second by second, and the figures they make."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xgen.infer.timing import host_bandwidth
from xgen.serve.ask import Address, ask_whole
from xgen.serve.errors import ServeError
from xgen.serve.load import Load, Plan, cached_tokens_read, figures, prepare

EVERY_SECONDS = 0.25
"""Between two looks at the server."""

IDLE_SECONDS = 30.0
"""For the server to end what the load left behind: the longest prefill under way, and its cancelled rows."""

BUSY = ("running", "waiting", "pages_used")
"""Metrics that are all zero when nothing is under way."""

Metrics = dict[str, float]


def parse_metrics(text: str) -> Metrics:
    """The values without labels of Prometheus' text format, by their names without "xgen_". Raises ServeError when they
    are not ours."""
    lines = (line.split(" ") for line in text.splitlines() if line.startswith("xgen_") and "{" not in line)
    found = {name.removeprefix("xgen_"): float(value) for name, value in lines}
    if "pages_total" not in found:
        raise ServeError("the server's /metrics are not those of a loaded `xgen serve`; nothing is known of its cache")
    return found


async def read_metrics(address: Address) -> Metrics:
    """The server's metrics now. Raises ServeError, and OSError when it does not answer."""
    return parse_metrics((await ask_whole(address, "/metrics")).decode())


def resident_bytes(pid: int) -> int | None:
    """Of the memory of process `pid`; None where the system does not tell, or the process is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("VmRSS:")), None)
    return None if line is None else int(line.split()[1]) * 1024


@dataclass
class Observer:
    """Looks at the server again and again until its task is cancelled. `pid`: of its process on this machine."""

    address: Address
    pid: int | None = None
    metrics: list[Metrics] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    async def watch(self) -> None:
        while True:
            # A server that is too busy to answer this once is still measured by its clients.
            with suppress(OSError, ServeError):
                self.metrics.append(await read_metrics(self.address))
            if self.pid is not None and (size := resident_bytes(self.pid)) is not None:
                self.memory.append(size)
            await asyncio.sleep(EVERY_SECONDS)

    def cache(self, since: Metrics, until: Metrics) -> dict[str, Any]:
        """The use of keys and values: shares of the pages, and of the prompts' tokens those that were there."""
        used = [one["pages_used"] / one["pages_total"] for one in self.metrics]
        prompts = _more("prompt_tokens_total", since, until)
        return {
            "pages": round(until["pages_total"]),
            "used_mean": sum(used) / len(used) if used else None,
            "used_peak": max(used, default=None),
            "prefix_peak": max((one["pages_cached"] / one["pages_total"] for one in self.metrics), default=None),
            "hit_share": _more("cached_tokens_total", since, until) / prompts if prompts else None,
        }

    def queue(self) -> dict[str, int]:
        """Most requests at once."""
        return {
            f"{name}_peak": max((round(one[name]) for one in self.metrics), default=0)
            for name in ("running", "waiting")
        }

    def resident(self) -> dict[str, int] | None:
        """The process's memory over the time: of the first fifth, of the last, and at most."""
        if not self.memory:
            return None
        part = max(len(self.memory) // 5, 1)
        first, last = sorted(self.memory[:part]), sorted(self.memory[-part:])
        return {
            "begin_bytes": first[len(first) // 2],
            "end_bytes": last[len(last) // 2],
            "peak_bytes": max(self.memory),
        }


async def measure(
    address: Address,
    plan: Plan,
    *,
    pid: int | None = None,
    bandwidth: float | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Put the load of `plan` on the server; the result as one object of JSON values.

    `bandwidth`: bytes a second that the server's device reads; None measures this machine's processors if that is what
    the server says it runs on. `pid` is the server's process here, whose memory is then told. Raises RecipeError where
    the plan does not fit the server, ServeError for a server that is not ours, cannot be reached or dies.
    """
    try:
        props, load = await prepare(address, plan)
        memory = props.get("memory")
        if bandwidth is None and memory is not None and memory["device"] == "cpu":
            report("measuring the memory")
            bandwidth = host_bandwidth()
        since, observer = await read_metrics(address), Observer(address, pid)
        report("under load")
        watching = asyncio.create_task(observer.watch())
        try:
            seconds = await load.run()
        finally:
            watching.cancel()
            await asyncio.wait({watching})
        if not watching.cancelled():
            watching.result()  # raises what ended it: figures of a part of the time would say nothing of the whole
        until = await read_metrics(address)
        report("waiting for the server to be idle")
        after = await _idle(address)
    except OSError as cause:
        raise ServeError(f"{address.url} does not answer: {cause}; is the server running?") from cause
    read = None if memory is None else _bytes_read(load, memory, since, until)
    return {
        "url": address.url,
        **{name: props[name] for name in ("model", "parameters", "context_length", "slots")},
        **_planned(plan),
        **figures(plan, load.outcomes, seconds),
        "prompt_tokens_per_second": _more("prompt_tokens_total", since, until) / seconds,
        "output_tokens_per_second": _more("output_tokens_total", since, until) / seconds,
        "bandwidth_bytes_per_second": bandwidth,
        "bandwidth_share": None if read is None or bandwidth is None else read / bandwidth,
        "cache": observer.cache(since, until),
        "queue": observer.queue() | {"preemptions": round(_more("preemptions_total", since, until))},
        "resident": observer.resident(),
        "after": {name: round(after[name]) for name in BUSY},
    }


def _planned(plan: Plan) -> dict[str, Any]:
    return {
        "loop": "closed" if plan.rate is None else "open",
        "clients": plan.clients,
        "rate": plan.rate,
        "prompt_tokens": [plan.prompt.least, plan.prompt.most],
        "output_tokens": [plan.output.least, plan.output.most],
        "disconnect": plan.disconnect,
        "seed": plan.seed,
    }


def _more(name: str, since: Metrics, until: Metrics) -> float:
    return until[name] - since[name]


def _bytes_read(load: Load, memory: dict[str, Any], since: Metrics, until: Metrics) -> float | None:
    """A second, of weights and of keys and values, while tokens were decoded; None if none were."""
    seconds = _more("decode_seconds_total", since, until)
    weights = _more("decode_calls_total", since, until) * memory["weight_bytes"]
    read: float = weights + cached_tokens_read(load.outcomes) * memory["token_bytes"]
    return read / seconds if seconds else None


async def _idle(address: Address) -> Metrics:
    """The metrics once nothing is under way, or those after IDLE_SECONDS if something still is."""
    end = time.monotonic() + IDLE_SECONDS
    while True:
        found = await read_metrics(address)
        if not any(found[name] for name in BUSY) or time.monotonic() > end:
            return found
        await asyncio.sleep(0.1)
