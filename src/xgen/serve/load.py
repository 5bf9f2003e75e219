"""Load on a server: clients that ask as fast as they are answered, or requests that come at a rate whatever happens.

Seconds are measured at the client. A request's begin where it was due, so that a server which makes requests wait in
the network cannot hide that; its first token's where the first text arrives.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from math import exp, log
from typing import Any

from xgen.errors import RecipeError
from xgen.serve.ask import Address, ask, ask_json

TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it "
    "was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
    "Darkness, it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing "
    "before us, we were all going direct to Heaven, we were all going direct the other way."
)
"""Dickens 1859. Prompts are made of its tokens, in an order of their own each, so that none is in the prefix cache."""

AGAIN_SECONDS = 0.5
"""After an error that says nothing about it, before a client asks again."""


@dataclass(frozen=True)
class Range:
    """Whole numbers from `least` to `most`, short ones as often as long ones: evenly over the orders of magnitude."""

    least: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise RecipeError(f"{self.least}-{self.most} is no range of tokens; write it as 16-512, or as one number")

    def draw(self, source: random.Random) -> int:
        return min(int(exp(source.uniform(log(self.least), log(self.most + 1)))), self.most)


@dataclass(frozen=True)
class Plan:
    """What is asked. Either `clients` ask one request after another, or `rate` requests a second come at random, until
    `requests` are made or `seconds` over, when what is under way is given up. `prompt` and `output` are in tokens.

    The share `disconnect` of requests is hung up on after some of its output. An answer is good whose first token came
    within `slo_ttft` seconds and each other within `slo_tpot`; None sets no limit. Equal seeds make equal requests.
    """

    clients: int | None = None
    rate: float | None = None
    seconds: float | None = None
    requests: int | None = None
    prompt: Range = Range(16, 512)
    output: Range = Range(16, 128)
    disconnect: float = 0.0
    slo_ttft: float | None = None
    slo_tpot: float | None = None
    timeout: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises RecipeError for a plan that cannot be."""
        if (self.clients is None) == (self.rate is None):
            raise RecipeError("say how the load comes: either clients (--clients 8) or a rate (--rate 2.5)")
        if self.seconds is None and self.requests is None:
            raise RecipeError("say when it ends: give --seconds, --requests or both")
        for name in ("clients", "rate", "seconds", "requests", "slo_ttft", "slo_tpot", "timeout"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise RecipeError(f"{name} {value} must be more than 0")
        if not 0 <= self.disconnect <= 1:
            raise RecipeError(f"disconnect {self.disconnect} is no share; give 0 to 1")


@dataclass(frozen=True)
class Wanted:
    """One request of a plan. `hang_up` after so many pieces of text; None: never."""

    prompt: int
    output: int
    hang_up: int | None


def wanted(plan: Plan, number: int) -> Wanted:
    """Request `number` of the plan, the same whatever became of the others."""
    source = random.Random(f"{plan.seed}:{number}")
    prompt, output = plan.prompt.draw(source), plan.output.draw(source)
    leaves = source.random() < plan.disconnect
    return Wanted(prompt, output, source.randrange(output) if leaves else None)


@dataclass
class Outcome:
    """What became of a request. `pieces` of text came, the first and the last at these times; `tokens` is what the
    server says it was, where it came to that. `end` is "finished", "hung up", "unfinished" (given up when the time was
    over), or the error: the status, "connection", "timeout", or "stream CODE" for one after the answer had begun."""

    asked: Wanted
    begin: float
    end: str = "unfinished"
    first: float | None = None
    last: float | None = None
    pieces: int = 0
    tokens: int | None = None

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.begin

    @property
    def tpot(self) -> float | None:
        """Seconds from token to token, of a whole answer whose text did not come all at once."""
        if self.first is None or self.last is None or self.tokens is None or min(self.tokens, self.pieces) < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)


@dataclass
class Load:
    """A plan at work on the server at `address`. `ids` are what prompts are made of."""

    address: Address
    plan: Plan
    model: str
    ids: list[int]
    outcomes: list[Outcome] = field(default_factory=list)

    async def run(self) -> float:
        """Ask what is planned; returns the seconds it took. `outcomes` then has every request."""
        begin = time.perf_counter()
        try:
            async with asyncio.timeout(self.plan.seconds), asyncio.TaskGroup() as group:
                numbers = iter(range(self.plan.requests)) if self.plan.requests is not None else count()
                if self.plan.rate is not None:
                    await self._arrive(group, numbers, self.plan.rate)
                for _ in range(self.plan.clients or 0):
                    group.create_task(self._client(numbers))
        except TimeoutError:
            pass  # the time is over, as planned
        return time.perf_counter() - begin

    async def _client(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            await asyncio.sleep(await self._one(number, time.perf_counter()))

    async def _arrive(self, group: asyncio.TaskGroup, numbers: Iterator[int], rate: float) -> None:
        source, due = random.Random(f"{self.plan.seed}:arrivals"), time.perf_counter()
        for number in numbers:
            due += source.expovariate(rate)
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            group.create_task(self._one(number, due))

    async def _one(self, number: int, due: float) -> float:
        """Ask for request `number`; returns the seconds that a client should wait before its next."""
        outcome = Outcome(wanted(self.plan, number), due)
        self.outcomes.append(outcome)
        try:
            async with asyncio.timeout(self.plan.timeout):
                return await self._ask(outcome, number)
        except TimeoutError:
            outcome.end = "timeout"
        except OSError:
            outcome.end = "connection"
        return AGAIN_SECONDS

    async def _ask(self, outcome: Outcome, number: int) -> float:
        asked = outcome.asked
        prompt = random.Random(f"{self.plan.seed}:{number}:prompt").choices(self.ids, k=asked.prompt)
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": asked.output,
            "ignore_eos": True,
            "seed": number,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with ask(self.address, "/v1/completions", body) as answer:
            if answer.status != 200:
                outcome.end = str(answer.status)
                return float(answer.headers.get("retry-after", AGAIN_SECONDS))
            if asked.hang_up == 0:
                outcome.end = "hung up"
                return 0.0
            async for data in answer.events():
                if data != "[DONE]" and self._take(outcome, json.loads(data)):
                    return 0.0
        if outcome.end != "finished":
            outcome.end = "connection"
        return 0.0

    def _take(self, outcome: Outcome, event: dict[str, Any]) -> bool:
        """Note what an event brought; whether that is the end of it."""
        if "error" in event:
            outcome.end = f"stream {event['error']['code']}"
            return True
        if event.get("usage"):
            outcome.tokens = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            if choice["text"] or choice["finish_reason"]:
                outcome.last = time.perf_counter()
                outcome.first = outcome.first or outcome.last
                outcome.pieces += 1
            if choice["finish_reason"]:
                outcome.end = "finished"
        if outcome.pieces == outcome.asked.hang_up and outcome.end != "finished":
            outcome.end = "hung up"
            return True
        return False


async def prepare(address: Address, plan: Plan) -> tuple[dict[str, Any], Load]:
    """What the server says of itself (/props), and the load ready to run. Raises RecipeError when requests of the plan
    do not fit the server's window, ServeError when it is no server of ours."""
    props = await ask_json(address, "/props")
    found = await ask_json(address, "/tokenize", {"content": TEXT, "add_special": False})
    if plan.prompt.most + plan.output.most > props["context_length"]:
        raise RecipeError(
            f"prompts of up to {plan.prompt.most} tokens and outputs of up to {plan.output.most} do not fit the "
            f"server's window of {props['context_length']}; ask for less"
        )
    return props, Load(address, plan, props["model"], found["tokens"])


def percentiles(values: list[float]) -> dict[str, float] | None:
    """None of no values. A percentile is a value that so many hundredths of the values do not exceed."""
    if not values:
        return None
    ordered = sorted(values)
    at = {f"p{share}": ordered[max(-(-len(ordered) * share // 100) - 1, 0)] for share in (50, 95, 99)}
    return {"mean": sum(ordered) / len(ordered), **at}


def figures(plan: Plan, outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    """What the clients saw."""
    ends = Counter(outcome.end for outcome in outcomes)
    told = {"finished", "hung up", "unfinished"}
    whole = [outcome for outcome in outcomes if outcome.end == "finished"]
    good = [outcome for outcome in whole if _is_good(plan, outcome)]
    meant = sum(outcome.end not in ("hung up", "unfinished") for outcome in outcomes)
    return {
        "seconds": seconds,
        "requests": {
            "sent": len(outcomes),
            "finished": ends["finished"],
            "hung_up": ends["hung up"],
            "unfinished": ends["unfinished"],
            "errors": {end: number for end, number in sorted(ends.items()) if end not in told},
        },
        "ttft_seconds": percentiles([one.ttft for one in outcomes if one.ttft is not None]),
        "tpot_seconds": percentiles([one.tpot for one in whole if one.tpot is not None]),
        "request_seconds": percentiles([one.last - one.begin for one in whole if one.last is not None]),
        "requests_per_second": len(whole) / seconds,
        "goodput": {
            "slo_ttft": plan.slo_ttft,
            "slo_tpot": plan.slo_tpot,
            "requests_per_second": len(good) / seconds,
            "share": len(good) / meant if meant else None,
        },
    }


def _is_good(plan: Plan, outcome: Outcome) -> bool:
    late = plan.slo_ttft is not None and (outcome.ttft is None or outcome.ttft > plan.slo_ttft)
    slow = plan.slo_tpot is not None and outcome.tpot is not None and outcome.tpot > plan.slo_tpot
    return not late and not slow


def cached_tokens_read(outcomes: list[Outcome]) -> float:
    """Tokens whose keys and values were read to draw all that came: for each output token those before it."""
    drawn = ((one.asked.prompt, one.pieces if one.tokens is None else one.tokens) for one in outcomes)
    return sum(tokens * (prompt + tokens / 2) for prompt, tokens in drawn)
