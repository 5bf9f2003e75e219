"""The engine against the clock: how fast prompts go in and tokens come out, and what share of the memory's speed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from threading import Event as Flag
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from xgen.convert.open import open_model
from xgen.errors import RecipeError
from xgen.infer.cache import token_bytes
from xgen.infer.engine import Engine
from xgen.infer.open import Opened, open_engine
from xgen.infer.program import Compiled, Settings
from xgen.infer.request import Emitted, Event, Failed, Finished, Request, Sampling
from xgen.model import Spec, parameter_count
from xgen.recipe.schema import Compute

USUAL_CONTEXTS = (128, 2048, 8192)
"""Measured where nothing is said, as far as the model's window goes."""

USUAL_BATCHES = (1, 8)

READ_BYTES = 1 << 29
"""Read at once to find the bandwidth: many times what a processor's caches hold."""

READ_TIMES = 8
"""The fastest counts: anything else that runs only slows a reading down."""


@dataclass(frozen=True)
class Case:
    """`batch` prompts of `context` tokens each; one as long as the window leaves room for its output."""

    context: int
    batch: int


@dataclass(frozen=True)
class Timed:
    """One repetition of a case. `prefill_seconds` run until the last of the prompts has its first token,
    `first_token_seconds` have each prompt's; `step_seconds` each decode step's in which all rows took part."""

    prefill_seconds: float
    first_token_seconds: tuple[float, ...]
    step_seconds: tuple[float, ...]


def time_model(
    model: str,
    *,
    contexts: Sequence[int] | None = None,
    batches: Sequence[int] = USUAL_BATCHES,
    tokens: int = 32,
    repeats: int = 3,
    window: int | None = None,
    precision: Literal["float32", "bfloat16"] = "bfloat16",
    int8_weights: bool = False,
    int8_cache: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The figures of MODEL (see `xgen.load`) for prompts of each length and number; one object of JSON values.

    `contexts`: None for the usual ones, as far as the `window` goes, which is the model's context length if None.
    `tokens`: decode steps of a repetition; `repeats`: how many of those count, after one that does not. `report` is
    told what goes on. Raises RecipeError for what does not fit, CheckpointError where there is no such model.
    """
    description, _ = open_model(model)
    longest = description.context_length if window is None else window
    lengths = contexts or [length for length in USUAL_CONTEXTS if length <= longest] or [longest]
    chunk = min(Settings.chunk, longest)
    settings = Settings(longest, max(batches), chunk=chunk, int8_weights=int8_weights, int8_cache=int8_cache)
    cases = [Case(length, batch) for length in lengths for batch in batches]
    for case in cases:
        prompt_tokens(case, settings, tokens)
    named: list[str] = []

    def compiled(name: str, _: float) -> None:
        named.append(name)
        report(f"compiled: {name}")

    report("loading")
    begin = time.perf_counter()
    opened = open_engine(model, settings, precision=precision, report=compiled)
    ready_seconds = time.perf_counter() - begin
    report("measuring the memory")
    bandwidth = read_bandwidth()
    timing = Timing(opened, settings, replace(description.spec, compute=Compute(precision=precision)), tokens)
    with counted_compilations() as late:
        found = [timing.measure(case, repeats, bandwidth, report) for case in cases]
    return timing.facts() | {
        "repeats": repeats,
        "ready_seconds": ready_seconds,
        "compilations": len(named),
        "compilations_after_ready": len(late),
        "bandwidth_bytes_per_second": bandwidth,
        "cases": found,
    }


def prompt_tokens(case: Case, settings: Settings, tokens: int) -> int:
    """Of each prompt, where `tokens` steps follow. Raises RecipeError for a case that does not fit."""
    room = settings.window - output_tokens(case, tokens)
    if case.batch < 1 or case.batch > settings.slots:
        raise RecipeError(f"batch {case.batch} does not fit the engine's {settings.slots} slots")
    if not 1 <= case.context <= settings.window:
        raise RecipeError(f"context {case.context} does not fit the window of {settings.window} tokens")
    if room < 1:
        raise RecipeError(
            f"{tokens} steps with batch {case.batch} leave no room for a prompt in a window of {settings.window} tokens"
        )
    return min(case.context, room)


def output_tokens(case: Case, tokens: int) -> int:
    """That each row draws, for `tokens` steps of all together: rows start up to `batch` steps one after another."""
    return tokens + case.batch


def weights_read(program: Compiled, spec: Spec, int8: bool) -> int:
    """Bytes of weights that a decode step reads: all, but of an embedding that is no head only a row a token."""
    row = spec.model.hidden_size + 4 if int8 else spec.model.hidden_size * spec.dtype.itemsize
    return program.weight_bytes - (0 if spec.model.tied_embeddings else spec.model.vocab_size * row)


class Timing:
    """Measures a program through an Engine: what a server could do at best."""

    def __init__(self, opened: Opened, settings: Settings, spec: Spec, tokens: int) -> None:
        """`tokens`: decode steps of a repetition."""
        self._opened, self._program, self._settings, self._spec = opened, opened.program, settings, spec
        self._tokens = tokens
        self._random = np.random.default_rng(0)

    def facts(self) -> dict[str, Any]:
        """What is measured, and on what."""
        return {
            "model": self._opened.description.name,
            "parameters": parameter_count(self._spec),
            "device": jax.local_devices()[0].device_kind,
            "precision": self._spec.compute.precision,
            "int8_weights": self._settings.int8_weights,
            "int8_cache": self._settings.int8_cache,
            "window": self._settings.window,
            "slots": self._settings.slots,
            "weight_bytes": self._program.weight_bytes,
            "token_bytes": token_bytes(self._spec, self._settings.int8_cache),
            "decode_steps": self._tokens,
        }

    def measure(self, case: Case, repeats: int, bandwidth: float, report: Callable[[str], None]) -> dict[str, Any]:
        """The case's figures: medians over its repetitions, of steps and first tokens over those of all repetitions.

        `bandwidth`: bytes a second that the device can read. Raises RecipeError where there is no memory for the case.
        """
        runs = []
        for number in range(repeats + 1):
            report(f"context {case.context}, batch {case.batch}: repetition {number + 1} of {repeats + 1}")
            runs.append(self.run(case))
        counted, prompt = runs[1:], prompt_tokens(case, self._settings, self._tokens)
        step = median(second for run in counted for second in run.step_seconds)
        held = case.batch * (prompt + self._tokens // 2) * token_bytes(self._spec, self._settings.int8_cache)
        read = weights_read(self._program, self._spec, self._settings.int8_weights) + held
        return {
            "context": case.context,
            "batch": case.batch,
            "prompt_tokens": prompt,
            "prefill_tokens_per_second": case.batch * prompt / median(run.prefill_seconds for run in counted),
            "first_token_seconds": median(second for run in counted for second in run.first_token_seconds),
            "decode_tokens_per_second": case.batch / step,
            "step_seconds": step,
            "step_bytes": read,
            "bandwidth_share": read / step / bandwidth,
        }

    def run(self, case: Case) -> Timed:
        """One repetition, with prompts that nothing was ever cached of."""
        shape = case.batch, prompt_tokens(case, self._settings, self._tokens)
        output = output_tokens(case, self._tokens)
        self._check_pages(case, shape[1] + output)
        prompts = [tuple(row) for row in self._random.integers(0, self._spec.real_vocab, shape).tolist()]
        engine = Engine(self._program, self._opened.description)
        first = [_listen(engine, ids, 1) for ids in prompts]
        begin = time.perf_counter()
        with engine:  # all prompts are there at its first step
            for clock in first:
                clock.wait()
            then = [_listen(engine, ids, output) for ids in prompts]  # found in the cache but for their last page
            for clock in then:
                clock.wait()
        starts = tuple(clock.times[0] - begin for clock in first)
        return Timed(max(starts), starts, tuple(_together(then)))

    def _check_pages(self, case: Case, row: int) -> None:
        needed, there = case.batch * -(-row // self._program.page), self._program.pages - 1
        if needed > there:
            raise RecipeError(
                f"batch {case.batch} at context {case.context} needs {needed} pages of keys and values and there is "
                f"memory for {there}; take a smaller batch or context"
            )


class _Clock:
    """A listener that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._last: Finished | Failed | None = None
        self._ended = Flag()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Emitted):
            self.times.extend([time.perf_counter()] * len(event.tokens))
        elif isinstance(event, Finished | Failed):
            self._last = event
            self._ended.set()

    def wait(self) -> None:
        self._ended.wait()
        if isinstance(self._last, Failed):
            raise self._last.error


def _together(clocks: Sequence[_Clock]) -> Iterator[float]:
    """Seconds of the steps from when the last row began until the first one ended."""
    last = max(clocks, key=lambda clock: clock.times[0])
    end = min(clock.times[-1] for clock in clocks)
    for before, after in zip(last.times, last.times[1:], strict=False):
        if after <= end:
            yield after - before


def _listen(engine: Engine, ids: tuple[int, ...], tokens: int) -> _Clock:
    clock = _Clock()
    engine.submit(Request(ids, tokens, Sampling(temperature=0), ignore_eos=True), clock)
    return clock


@contextmanager
def counted_compilations() -> Iterator[list[float]]:
    """The seconds of every program that JAX compiles, or takes from its cache on disk, inside."""
    found: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def read_bandwidth() -> float:
    """Bytes a second that the device reads of its memory, measured now."""
    if jax.default_backend() == "cpu":
        return host_bandwidth()
    array = jnp.ones((READ_BYTES // 16384, 4096), jnp.float32)
    rows = jax.jit(lambda matrix: matrix.sum(axis=1)).lower(array).compile()
    return _fastest(lambda: rows(array).block_until_ready())


def host_bandwidth() -> float:
    """The same of this machine's processors, all at once. JAX takes no device for it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = np.array_split(np.ones(READ_BYTES // 8, np.uint64), cores)
    with ThreadPoolExecutor(cores) as pool:
        return _fastest(lambda: list(pool.map(np.bitwise_or.reduce, parts)))


def _fastest(read: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(READ_TIMES):
        begin = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - begin)
    return READ_BYTES / min(seconds)
