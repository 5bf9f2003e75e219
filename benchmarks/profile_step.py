"""Where the time of a training step goes on a CPU: seconds by operation of the compiled program, the longest first.

    python benchmarks/profile_step.py ["d512 L8 h8 ff1376 V8192"] [--length 512] [--batch 16] [--remat none] [--rows 25]

A kernel of ours stands with the shape of its result; all else by the name that XLA's compiler gave the operation
(`wrapped_convert`: nothing but a change of type). One step that came after two others, by JAX's profiler.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xgen.parallel.program import ONE_DEVICE
from xgen.training.optimizer import build
from xgen.training.state import abstract_state, new_state, new_weights
from xgen.training.step import compile_step
from xgen.training.timing import EXAMPLE, Case, Choice, make_cases, random_batch

CALL = re.compile(r'%?([\w.\-]+) = (.*?) custom-call\(.*?custom_call_target="(\w+)"')
LAYOUT = re.compile(r"{[^}]*}")
WHOLE = ("ThunkExecutor", "while", "call", "end: ", "Pjit", "CommonPjRt")
"""What other events are within, or nothing of the program."""


def traced(case: Case) -> tuple[str, list[dict[str, Any]]]:
    """The compiled program as text, and the events of a step."""
    (stage,), spec, transformation = case.recipe.stages, case.spec, build(case.recipe.optimizer)
    abstract = abstract_state(spec, transformation, ONE_DEVICE)
    step = compile_step(spec, stage, case.recipe.optimizer, transformation, abstract)
    state = new_state(new_weights(spec, 0, ONE_DEVICE), spec, transformation, ONE_DEVICE)
    batch, rate = random_batch(case), np.float32(case.recipe.optimizer.learning_rate)
    for _ in range(2):
        state, _ = jax.block_until_ready(step(state, batch, rate))
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level, options.python_tracer_level = 3, 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(step(state, batch, rate))
        (found,) = Path(folder).rglob("*.trace.json.gz")
        told = json.loads(gzip.decompress(found.read_bytes()))
    return step.as_text(), told["traceEvents"]  # type: ignore[attr-defined]  # of a compiled step


def operations(program: str, events: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Each operation's kind, and its seconds."""
    kernels = {match[1]: f"{match[3]} {LAYOUT.sub('', match[2])}" for match in CALL.finditer(program)}
    for event in events:
        if event.get("ph") == "X" and not event["name"].startswith(WHOLE):
            name = event["name"]
            yield kernels.get(name) or re.sub(r"\.\d+$", "", name), event["dur"] / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", default=EXAMPLE)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--remat", choices=("none", "dots", "block"), default="none")
    parser.add_argument("--rows", type=int, default=25)
    options = parser.parse_args()
    choice = Choice(batch=options.batch, remat=options.remat)
    (case,) = make_cases([options.shape], [], [options.length], choice, 1)
    seconds, times = Counter[str](), Counter[str]()
    for kind, each in operations(*traced(case)):
        seconds[kind] += each  # type: ignore[assignment]  # a Counter of seconds
        times[kind] += 1
    total = sum(seconds.values())
    sys.stdout.write(f"{total:.3f} s in all\n")
    for kind, each in seconds.most_common(options.rows):
        sys.stdout.write(f"{each:8.3f} s {each / total:6.1%} {times[kind]:5d} x {kind}\n")


if __name__ == "__main__":
    main()
