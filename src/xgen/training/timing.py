"""The training step against the clock: its rate, its memory, and what share of the machine's own products it reaches.

Every case runs in a process of its own, so that the peak of its memory is its own and one that the system kills takes
no other with it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median
from threading import Thread
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from xgen.errors import NonFiniteError, RecipeError, XgenError
from xgen.model import Spec, flops_per_token, parameter_count
from xgen.parallel.hardware import memory_limit, peak_flops, peak_memory
from xgen.parallel.program import ONE_DEVICE
from xgen.recipe.check import XGEN_IDS
from xgen.recipe.load import load_recipe
from xgen.recipe.near import divisors, near
from xgen.recipe.schema import SHORTEST_LENGTH, Model, Recipe
from xgen.training.optimizer import build
from xgen.training.state import abstract_state, new_state, new_weights
from xgen.training.step import Metrics, StepFunction, Tokens, compile_step

USUAL_RECIPE = "xgen-125m"
"""Timed where nothing is named; and what a shape of five sizes takes all else from."""

USUAL_TOKENS = 8192
"""Of a batch where nothing is said, or one sequence if that is longer: a step then takes seconds, not minutes."""

SIDES = (1024, 2048, 4096)
"""Of the square products that find the machine's peak: smaller ones leave processors waiting."""

PRODUCT_SECONDS = 0.5
"""Each product is repeated for so long. The fastest counts: anything else that runs only slows one down."""

RULER = (
    "causal, forward and backward: 6 FLOPs for each token and weight of a matrix product, and 6 x layers x heads x "
    "head_size x length a token for attention, where only pairs that see each other count; looking embeddings up, "
    "recomputation (remat) and all else are free"
)

SIZES = {
    "d": "hidden_size",
    "L": "layers",
    "h": "heads",
    "ff": "mlp_size",
    "V": "vocab_size",
}
"""The words of a shape, each before its number, and the key of [model] that each one gives."""

EXAMPLE = "d512 L8 h8 ff1376 V8192"

Precision = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "block"]
Attention = Literal["auto", "reference", "blockwise", "splash", "cudnn"]

_SIZE = re.compile(rf"({'|'.join(SIZES)})([1-9][0-9]*)")
_CHILD = "import sys; from xgen.training.timing import child; child(sys.argv[1:])"


@dataclass(frozen=True)
class Choice:
    """How a step is taken; None: as the recipe says. `batch` and `microbatch` are sequences; a batch left out has
    `USUAL_TOKENS`, a microbatch left out all of the batch."""

    batch: int | None = None
    microbatch: int | None = None
    precision: Precision | None = None
    remat: Remat | None = None
    attention: Attention | None = None


@dataclass(frozen=True)
class Case:
    """The step of `recipe`'s only stage, taken `steps` times; `shape` is what the user called it."""

    shape: str
    recipe: Recipe
    steps: int

    @property
    def spec(self) -> Spec:
        """With the ids that the recipe's tokenizer would have; all rows where that is not known."""
        name, rows = self.recipe.tokenizer.name, self.recipe.model.vocab_size
        ids = XGEN_IDS if name == "xgen" else int(name.removeprefix("bpe:")) if name.startswith("bpe:") else rows
        return Spec.of(self.recipe, ids)

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of the case before it runs."""
        (stage,), compute = self.recipe.stages, self.recipe.compute
        return {
            "shape": self.shape,
            "sizes": sizes_of(self.recipe.model),
            "parameters": parameter_count(self.spec),
            "length": stage.length,
            "batch": stage.sequences,
            "microbatch": stage.microbatch_tokens // stage.length,
            "precision": compute.precision,
            "remat": stage.remat,
            "attention": compute.attention,
            "optimizer": self.recipe.optimizer.name,
            "steps": self.steps,
            "flops_per_token": flops_per_token(self.spec, stage.length),
        }


def time_training(
    shapes: Sequence[str] = (USUAL_RECIPE,),
    overrides: Sequence[str] = (),
    *,
    lengths: Sequence[int] | None = None,
    choice: Choice | None = None,
    steps: int = 5,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The figures of a training step on one device, for each shape and length; one object of JSON values.

    `shapes`: recipes, as `xgen train` takes them, or five sizes as in "d512 L8 h8 ff1376 V8192"; `overrides` change
    each, as "key=value". `lengths` in tokens; None: those of the recipe's stages. The medians are over `steps`, after
    one that warms up. A case that fails has its `error` and no figures. `report` is told what goes on. Raises
    RecipeError for what cannot be timed, before anything runs.
    """
    cases = list(make_cases(shapes, overrides, lengths, choice or Choice(), steps))
    report("measuring the machine's matrix products")
    machine = _run("products")
    if "error" in machine:
        raise XgenError(f"the machine's matrix products cannot be measured: {machine['error']}")
    found = []
    for number, case in enumerate(cases, 1):
        (stage,) = case.recipe.stages
        report(f"{case.shape}, {stage.sequences} x {stage.length} tokens: case {number} of {len(cases)}")
        found.append(completed(case, _run("step", case.recipe.model_dump_json(), str(case.steps)), machine))
    return {**machine, "ruler": RULER, "cases": found}


def make_cases(
    shapes: Sequence[str], overrides: Sequence[str], lengths: Sequence[int] | None, choice: Choice, steps: int
) -> Iterator[Case]:
    """Each shape at each length. Raises RecipeError for a shape, a length, a batch or a microbatch that cannot be."""
    if steps < 1:
        raise RecipeError(f"steps {steps} leave nothing to measure; give 1 or more")
    for shape in shapes:
        recipe = read_shape(shape, overrides)
        for length in dict.fromkeys(stage.length for stage in recipe.stages) if lengths is None else lengths:
            yield Case(" ".join(shape.split()), at_length(recipe, length, choice), steps)


def read_shape(shape: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that `shape` names, or `USUAL_RECIPE` with the five sizes that it gives. Raises RecipeError."""
    from xgen.tokens.tokenizer import embedding_rows  # reading tokenizers is slow to import

    words = shape.split()
    sizes = [match for match in map(_SIZE.fullmatch, words) if match is not None]
    if not sizes and len(words) <= 1:
        return load_recipe(shape, overrides, vocabulary=embedding_rows).recipe
    if sorted(size[1] for size in sizes) != sorted(SIZES) or len(words) != len(SIZES):
        names = ", ".join(f"{word} ({key})" for word, key in SIZES.items())
        raise RecipeError(f"shape {shape!r} is neither a recipe nor each of {names} once; write it as {EXAMPLE!r}")
    given = [f"model.{SIZES[size[1]]}={size[2]}" for size in sizes]
    # The recipe's own tokenizer would want rows for its own ids; the ids here are drawn, of all rows.
    return load_recipe(USUAL_RECIPE, [*given, "tokenizer.name=store", *overrides], vocabulary=embedding_rows).recipe


def sizes_of(model: Model) -> str:
    """The model's shape in the words that `read_shape` takes."""
    return " ".join(f"{word}{getattr(model, key)}" for word, key in SIZES.items())


def at_length(recipe: Recipe, length: int, choice: Choice) -> Recipe:
    """`recipe` with one stage, of `length`: else as its own first stage of that length or more, or its last, and as
    `choice` says. Raises RecipeError for a length, a batch or a microbatch that cannot be."""
    if length < SHORTEST_LENGTH:
        raise RecipeError(f"length {length} is too short to train on; give {SHORTEST_LENGTH} tokens or more")
    batch = max(1, USUAL_TOKENS // length) if choice.batch is None else choice.batch
    if batch < 1:
        raise RecipeError(f"batch {batch} holds no sequence; give 1 or more")
    microbatch = batch if choice.microbatch is None else choice.microbatch
    if microbatch < 1 or batch % microbatch:
        fitting = near(microbatch, divisors(batch))
        raise RecipeError(f"microbatch {microbatch} does not divide the batch of {batch} sequences; use {fitting}")
    stage = next((stage for stage in recipe.stages if stage.length >= length), recipe.stages[-1])
    changes = {
        "length": length,
        "tokens": batch * length,
        "batch_tokens": batch * length,
        "microbatch_tokens": microbatch * length,
        "remat": choice.remat or stage.remat,
    }
    compute = {
        "precision": choice.precision or recipe.compute.precision,
        "attention": choice.attention or recipe.compute.attention,
    }
    stages = (stage.model_copy(update=changes),)
    return recipe.model_copy(update={"stages": stages, "compute": recipe.compute.model_copy(update=compute)})


def completed(case: Case, measured: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """All that is told of a case: its facts, what `measure_step` found, and what share of the machine that is. Figures
    of one that failed are None."""
    peak, published = machine["matmul_peaks"][case.recipe.compute.precision], machine["published_peak_flops"]
    (stage,) = case.recipe.stages
    seconds = None if "error" in measured else median(measured["step_seconds"])
    rate = None if seconds is None else stage.batch_tokens / seconds
    flops = None if rate is None else rate * flops_per_token(case.spec, stage.length)
    return case.facts | {
        "tokens_per_second": rate,
        "seconds_per_step": seconds,
        "spread": None if seconds is None else [min(measured["step_seconds"]), max(measured["step_seconds"])],
        "compile_seconds": measured.get("compile_seconds"),
        "peak_memory_bytes": measured.get("peak_memory_bytes"),
        "program_bytes": measured.get("program_bytes"),
        "matmul_peak_flops": peak,
        "matmul_peaks": machine["matmul_peaks"],
        "utilisation": None if flops is None else flops / peak,
        "published_peak_flops": published,
        "published_utilisation": None if flops is None or published is None else flops / published,
        "ruler": RULER,
        "error": measured.get("error"),
    }


def measure_step(case: Case) -> dict[str, Any]:
    """Compile the trainer's step and take it: `compile_seconds`, the `step_seconds` of each step but the first,
    `peak_memory_bytes` of this process (an accelerator's own, where it tells it), and `program_bytes`, the compiler's
    sum of arguments and temporaries.

    Weights and tokens are random, and every row is one document. Raises RecipeError when the step cannot fit in memory,
    NonFiniteError when it has no finite loss.
    """
    (stage,), spec, transformation = case.recipe.stages, case.spec, build(case.recipe.optimizer)
    begin = time.perf_counter()
    abstract = abstract_state(spec, transformation, ONE_DEVICE)
    step: StepFunction = compile_step(spec, stage, case.recipe.optimizer, transformation, abstract)
    compile_seconds = time.perf_counter() - begin
    memory = step.memory_analysis()  # type: ignore[attr-defined]  # of a compiled step
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else None
    if needed is not None and needed > memory_limit():
        raise RecipeError(
            f"a step needs {needed / 2**30:.1f} GiB, and there are {memory_limit() / 2**30:.1f}; {_less(case)}"
        )
    state = new_state(new_weights(spec, 0, ONE_DEVICE), spec, transformation, ONE_DEVICE)
    batch, rate, seconds = random_batch(case), np.float32(case.recipe.optimizer.learning_rate), []
    for _ in range(case.steps + 1):
        begin = time.perf_counter()
        state, metrics = step(state, batch, rate)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - begin)
    _require_finite(metrics)
    return {
        "compile_seconds": compile_seconds,
        "step_seconds": seconds[1:],
        "peak_memory_bytes": peak_memory(),
        "program_bytes": needed,
    }


def random_batch(case: Case) -> Tokens:
    """Tokens drawn of all ids, of one document a row."""
    (stage,) = case.recipe.stages
    shape = stage.sequences, stage.length
    ids = np.random.default_rng(0).integers(0, case.spec.real_vocab, (shape[0], shape[1] + 1), np.int32)
    places = np.broadcast_to(np.arange(stage.length, dtype=np.int32), shape)
    arrays = ids[:, :-1], ids[:, 1:], np.zeros(shape, np.int32), places
    return Tokens(*map(jnp.asarray, arrays))


def _require_finite(metrics: Metrics) -> None:
    if not metrics.finite:
        raise NonFiniteError(
            f"the loss after the last step is {float(metrics.loss)}, and such numbers take another time than a run's; "
            "lower optimizer.learning_rate"
        )


def _less(case: Case) -> str:
    """What would take less memory than the case does."""
    (stage,) = case.recipe.stages
    changes = []
    if stage.sequences > 1:
        changes.append(f"a smaller batch (now {stage.sequences}) or microbatch")
    if stage.remat != "block":
        changes.append(f'remat "block" (now "{stage.remat}")')
    return f"take {' or '.join([*changes, f'a shorter length than {stage.length}'])}"


def measure_products(sides: Sequence[int] = SIDES) -> dict[str, Any]:
    """The device, and the FLOP/s of its fastest matrix product for each precision; the published peak where there is
    one."""
    return {
        "device": jax.local_devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "matmul_peaks": {name: product_peak(name, sides) for name in ("bfloat16", "float32")},
        "published_peak_flops": peak_flops(),
    }


def product_peak(precision: str, sides: Sequence[int] = SIDES) -> float:
    """FLOP/s of the fastest of the square products of `sides`, the second matrix as it lies or transposed (which of
    them suits a machine differs), added up in float32."""
    fastest = 0.0
    for side, axis in product(sides, (0, 1)):
        multiply = partial(
            jax.lax.dot_general,
            dimension_numbers=(((1,), (axis,)), ((), ())),
            # An accelerator would else take float32's products from bfloat16's units.
            precision="highest" if precision == "float32" else None,
            preferred_element_type=jnp.float32,
        )
        one, other = (jax.random.normal(jax.random.key(seed), (side, side)).astype(precision) for seed in (0, 1))
        compiled = jax.jit(multiply).lower(one, other).compile()
        jax.block_until_ready((one, other))
        now = begin = time.perf_counter()
        while now < begin + PRODUCT_SECONDS:
            before = now
            compiled(one, other).block_until_ready()
            now = time.perf_counter()
            fastest = max(fastest, 2 * side**3 / (now - before))
    return fastest


def child(arguments: Sequence[str]) -> None:
    """What a process of its own does, and its one line of standard output: the figures, or the error."""
    Thread(target=_leave_with_the_parent, daemon=True).start()
    try:
        if arguments[0] == "products":
            found = measure_products()
        else:
            found = measure_step(Case("", Recipe.model_validate_json(arguments[1]), int(arguments[2])))
    except XgenError as error:
        found = {"error": str(error)}
    print(json.dumps(found))


def _leave_with_the_parent() -> None:
    """The other end of standard input closes when the parent ends, however it does."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _run(*arguments: str) -> dict[str, Any]:
    """What `child` finds in a process of its own, which compiles everything anew; "error" where it fails or ends."""
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    with tempfile.TemporaryFile() as told:
        with subprocess.Popen(
            [sys.executable, "-c", _CHILD, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=told,
            env=environment,
        ) as process:
            assert process.stdout is not None
            out = process.stdout.read().decode().splitlines()
            process.wait()  # with its standard input open, which it watches
        if process.returncode == 0:
            found: dict[str, Any] = json.loads(out[-1])
            return found
        told.seek(0)
        return {"error": how_it_ended(process.returncode, told.read().decode(errors="replace"))}


def how_it_ended(code: int, told: str) -> str:
    """In a line, why a process failed: the signal that ended it, or the last line of standard error."""
    if code == -signal.SIGKILL:
        return (
            "its process was killed (SIGKILL), as the system does when memory runs out; take fewer tokens at once, "
            'or remat "block"'
        )
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    lines = told.split("\n")
    return f"its process ended with code {code}: {next((line for line in reversed(lines) if line.strip()), '')}"
