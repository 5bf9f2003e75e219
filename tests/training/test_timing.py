"""The training step against the clock: what is counted, what is told, and that one case's end is no other's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from statistics import median
from typing import Any

import jax
import numpy as np
import pytest

from xgen.errors import NonFiniteError, RecipeError
from xgen.model import initialise
from xgen.recipe.load import load_recipe
from xgen.training import timing
from xgen.training.timing import (
    Case,
    Choice,
    at_length,
    completed,
    how_it_ended,
    make_cases,
    measure_step,
    product_peak,
    random_batch,
    read_shape,
    sizes_of,
    time_training,
)

SHAPE = "d32 L2 h2 ff48 V64"
MACHINE = {
    "device": "cpu",
    "cores": 2,
    "matmul_peaks": {"bfloat16": 4e9, "float32": 1e9},
    "published_peak_flops": None,
}


def case_of(length: int = 16, steps: int = 3, **choice: Any) -> Case:
    (case,) = make_cases([SHAPE], (), [length], Choice(**choice), steps)
    return case


def test_a_measured_case_hangs_together() -> None:
    case = case_of(batch=4, microbatch=2, precision="float32", remat="none", attention="reference")
    measured = measure_step(case)
    found = completed(case, measured, MACHINE)
    seconds = median(measured["step_seconds"])
    assert len(measured["step_seconds"]) == 3
    assert found["seconds_per_step"] == seconds
    assert found["spread"][0] <= seconds <= found["spread"][1]
    assert found["tokens_per_second"] == pytest.approx(4 * 16 / seconds)
    # By hand: four square projections and SwiGLU's three matrices a layer, and the head; then attention's pairs.
    products = 2 * (4 * 32 * 32 + 3 * 32 * 48) + 32 * 64
    flops = 4 * 16 * (6 * products + 6 * 2 * 32 * 16)
    assert found["utilisation"] == pytest.approx(flops / seconds / 1e9)
    assert found["matmul_peak_flops"] == 1e9
    assert found["compile_seconds"] > 0
    arguments = 3 * 4 * found["parameters"]  # weights and AdamW's two moments in float32, at the least
    assert found["peak_memory_bytes"] > found["program_bytes"] > arguments
    assert found["error"] is None
    assert (found["batch"], found["microbatch"], found["remat"]) == (4, 2, "none")
    json.dumps(found, allow_nan=False)


def test_the_peak_is_that_of_the_precision_and_a_published_one_is_told_beside_it() -> None:
    machine = MACHINE | {"published_peak_flops": 8e9}
    measured = {"step_seconds": [0.5, 0.25, 4.0], "compile_seconds": 1.0, "peak_memory_bytes": 1, "program_bytes": 1}
    found = completed(case_of(precision="bfloat16"), measured, machine)
    assert found["matmul_peak_flops"] == 4e9
    assert found["utilisation"] == pytest.approx(2 * found["published_utilisation"])
    assert found["utilisation"] == pytest.approx(8192 * found["flops_per_token"] / 0.5 / 4e9)


def test_parameters_are_those_of_the_model() -> None:
    for shape, override in ((SHAPE, []), (SHAPE, ["model.tied_embeddings=true"]), ("tiny", [])):
        (case,) = make_cases([shape], override, [16], Choice(), 1)
        weights = jax.eval_shape(lambda spec=case.spec: initialise(spec, 0))
        assert case.facts["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(weights))


def test_the_shape_is_what_its_words_say_and_else_the_usual_recipe() -> None:
    recipe, usual = read_shape("V640 h4 d64 L3 ff96", ["optimizer.clip=0.5"]), load_recipe("xgen-125m").recipe
    model = recipe.model
    assert (model.hidden_size, model.layers, model.heads, model.mlp_size, model.vocab_size) == (64, 3, 4, 96, 640)
    assert (model.kv_heads, model.head_size) == (4, 16)
    assert recipe.optimizer == usual.optimizer.model_copy(update={"clip": 0.5})
    assert recipe.compute == usual.compute
    assert sizes_of(model) == "d64 L3 h4 ff96 V640"
    assert sizes_of(read_shape(sizes_of(usual.model)).model) == sizes_of(usual.model)


def test_a_recipe_is_timed_at_its_own_lengths_or_at_those_asked_for() -> None:
    usual = load_recipe("xgen-125m").recipe
    cases = list(make_cases(["xgen-125m"], (), None, Choice(), 1))
    assert [case.facts["length"] for case in cases] == [2048, 4096, 8192]
    assert [case.facts["batch"] for case in cases] == [4, 2, 1]
    assert {case.facts["remat"] for case in cases} == {"block"}
    assert {case.spec.real_vocab for case in cases} == {50_313}
    (long,) = at_length(usual, 16_384, Choice()).stages
    assert (long.sequences, long.microbatch_tokens) == (1, 16_384)
    overridden = read_shape("xgen-125m", ["stages.1.remat=dots"])
    kept = [at_length(overridden, length, Choice()).stages[0].remat for length in (512, 3000, 4096)]
    assert kept == ["block", "dots", "dots"]


def test_choices_come_before_the_recipe() -> None:
    recipe = at_length(read_shape("tiny"), 64, Choice(8, 2, "float32", "dots", "reference"))
    (stage,) = recipe.stages
    assert (stage.batch_tokens, stage.microbatch_tokens, stage.remat) == (512, 128, "dots")
    assert (recipe.compute.precision, recipe.compute.attention) == ("float32", "reference")


def test_every_row_is_one_document_of_tokens_that_follow_each_other() -> None:
    batch = random_batch(case_of(batch=3))
    assert batch.ids.shape == (3, 16)
    assert np.array_equal(batch.ids[:, 1:], batch.targets[:, :-1])
    assert not np.any(batch.segments)
    assert np.array_equal(batch.positions, np.tile(np.arange(16), (3, 1)))
    assert 0 <= int(batch.ids.min()) <= int(batch.ids.max()) < 64


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ("d512", "shape 'd512' is neither a recipe nor each of d (hidden_size), L (layers)"),
        ("d32 L2 h2 ff48 V64 V64", "write it as 'd512 L8 h8 ff1376 V8192'"),
        ("d32 L2 h2 ff48 X64", "write it as"),
        ("d32 L0 h2 ff48 V64", "write it as"),
        ("d32 L2 h3 ff48 V64", "3 does not divide model.hidden_size 32"),
        ("nope", "there is no recipe 'nope'"),
    ],
)
def test_shapes_that_cannot_be(shape: str, told: str) -> None:
    with pytest.raises(RecipeError) as error:
        read_shape(shape)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("length", "choice", "told"),
    [
        (4, Choice(), "length 4 is too short to train on; give 8 tokens or more"),
        (16, Choice(batch=0), "batch 0 holds no sequence"),
        (16, Choice(batch=4, microbatch=3), "microbatch 3 does not divide the batch of 4 sequences; use 1, 2 or 4"),
        (16, Choice(batch=4, microbatch=0), "use 1 or 2"),
    ],
)
def test_lengths_and_batches_that_cannot_be(length: int, choice: Choice, told: str) -> None:
    with pytest.raises(RecipeError) as error:
        at_length(read_shape(SHAPE), length, choice)
    assert told in str(error.value)


def test_no_steps_leave_nothing_to_measure() -> None:
    with pytest.raises(RecipeError, match="steps 0"):
        time_training([SHAPE], lengths=[16], steps=0)


def test_a_step_that_cannot_fit_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "memory_limit", lambda: 1000)
    with pytest.raises(RecipeError, match=r"a step needs .* GiB, and there are 0\.0; take a smaller batch \(now 512\)"):
        measure_step(case_of(steps=1, attention="reference"))


def test_a_loss_that_is_not_finite_makes_no_figures() -> None:
    (case,) = make_cases([SHAPE], ["optimizer.learning_rate=1e38"], [16], Choice(1, attention="reference"), 2)
    with pytest.raises(NonFiniteError, match=r"lower optimizer\.learning_rate"):
        measure_step(case)


def test_the_peak_is_the_fastest_of_all_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PRODUCT_SECONDS", 0.05)
    small, both = (product_peak("float32", sides) for sides in ((8,), (8, 256)))
    assert both > 10 * small > 0  # starting a product takes longer than so small a one


OTHERS = f"""
import json, os, sys
from xgen.training.timing import child
words = sys.argv[1:]
if words[0] == "products":
    print(json.dumps({MACHINE!r}))
elif '"length":16,' in words[1]:
    os.kill(os.getpid(), 9)
elif '"length":32,' in words[1]:
    sys.exit("it went wrong")
else:
    print(json.dumps({{"step_seconds": [0.5], "compile_seconds": 1.0, "peak_memory_bytes": 7, "program_bytes": 5}}))
"""


def test_a_case_that_is_killed_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_CHILD", OTHERS)
    told: list[str] = []
    found = time_training([SHAPE], lengths=[16, 32, 64], report=told.append)
    killed, failed, whole = found["cases"]
    assert "was killed (SIGKILL), as the system does when memory runs out" in killed["error"]
    assert failed["error"] == "its process ended with code 1: it went wrong"
    assert (whole["error"], whole["seconds_per_step"], whole["peak_memory_bytes"]) == (None, 0.5, 7)
    assert list(killed) == list(whole)
    assert killed["parameters"] == whole["parameters"]
    assert killed["tokens_per_second"] is killed["utilisation"] is killed["spread"] is None
    assert told[-1] == f"{SHAPE}, 128 x 64 tokens: case 3 of 3"


def test_how_a_process_ended_is_told_in_a_line() -> None:
    assert how_it_ended(-11, "many\nlines") == "its process was ended by SIGSEGV"
    assert how_it_ended(1, "Traceback\nValueError: no\n\n") == "its process ended with code 1: ValueError: no"
    assert how_it_ended(3, "") == "its process ended with code 3: "


def test_a_process_ends_with_the_one_that_started_it() -> None:
    waiting = "import time; from xgen.training import timing; timing.measure_products = lambda: time.sleep(300)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{waiting}; timing.child(['products'])"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=dict(os.environ),
    )
    try:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 1
    finally:
        process.kill()
        process.wait()
