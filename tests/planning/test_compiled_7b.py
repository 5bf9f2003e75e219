"""The seven billion, by the TPU's own compiler: it fits, and no chip ever holds a whole model or all logits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from xgen.model import Spec
from xgen.model.flops import flops_per_token
from xgen.parallel.slices import parse_slice
from xgen.parallel.topology import available
from xgen.planning.compiled import CompiledFacts
from xgen.recipe.load import load_recipe

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

GIB, CHIPS, LENGTH = 2**30, 64, 8192
STORED = json.loads((Path(__file__).parent / "compiled_steps.json").read_text())["steps"]


@pytest.fixture(scope="module")
def facts() -> CompiledFacts:
    """A step of one sequence of 8,192 tokens a chip, on 64 chips of v4."""
    if not available():
        pytest.fail("needs the TPU compiler: pip install 'xgen[tpu]', or leave it out with -m \"not oracle\"")
    program = Path(__file__).with_name("compiled_7b.py")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return CompiledFacts(**json.loads(done.stdout))


def test_it_compiles_in_time_and_fits(facts: CompiledFacts) -> None:
    assert facts.compile_seconds < 240
    assert facts.bytes_per_chip < parse_slice("v4:4x4x4").chip.usable_memory
    (told,) = [
        step
        for step in STORED
        if (step["on"], step["stage"], step["rows"], step["remat"]) == ("v4:4x4x4", 2, 1, "block")
        and step["sizes"] == [1, CHIPS, 1, 1]
        and not step["overrides"]
    ]
    assert facts.bytes_per_chip == pytest.approx(told["bytes_per_chip"], rel=0.02)


def test_no_whole_model_and_no_whole_logits(facts: CompiledFacts) -> None:
    """The largest is what the layers' inputs take, 2 GiB; next the head's gradient, of which no more is there than of
    one matrix."""
    (shape, size), (head, _), *_ = facts.largest_temporaries
    assert (shape, size) == ("bf16[32,1,8192,4096]", 2 * GIB)
    assert head == "f32[4096,51200]"
    for shape, _ in facts.largest_temporaries:
        sides = [int(side) for side in re.findall(r"\d+", shape.partition("[")[2])]
        assert not (LENGTH in sides and 51200 in sides), shape


def test_it_computes_little_again_and_scatters_what_it_sums(facts: CompiledFacts) -> None:
    recipe = load_recipe("xgen-7b-8k").recipe
    spec = Spec(recipe.model, recipe.model.vocab_size, recipe.compute)
    assert facts.flops is not None
    assert facts.flops / (LENGTH * flops_per_token(spec, LENGTH)) <= 1.34
    assert facts.collectives is not None
    # Gathered twice in bfloat16 and scattered once in float32: each element but the embedding's.
    matrices = 6_895_702_016 - 51_200 * 4096
    assert facts.collectives["all-gather"]["bytes"] == pytest.approx(2 * 2 * matrices, rel=0.02)
    assert facts.collectives["reduce-scatter"]["bytes"] == pytest.approx(4 * matrices * (1 + 1 / 16), rel=0.01)
    assert facts.collectives["all-reduce"]["bytes"] < 2e6
