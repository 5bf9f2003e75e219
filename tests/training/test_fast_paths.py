"""The fast paths train as the plain ones do: 300 steps with kernels in bfloat16 beside float32 without any."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from xgen.model import native

STEPS, WINDOW = 300, 20

PROGRAM = """
import json, sys
import numpy as np
from xgen.data.sources import read_documents
from xgen.model import native
from xgen.parallel.program import ONE_DEVICE
from xgen.training.optimizer import build
from xgen.training.state import abstract_state, new_state, new_weights
from xgen.training.step import Tokens, compile_step
from xgen.training.timing import Choice, make_cases

precision, attention, seed, steps, kernels = json.loads(sys.argv[1])
assert (native.library() is not None) == kernels
choice = Choice(batch=4, precision=precision, attention=attention)
[case] = make_cases(["d64 L3 h2 ff176 V512"], ["optimizer.learning_rate=3e-3"], [256], choice, 1)
(stage,), spec, optimizer = case.recipe.stages, case.spec, case.recipe.optimizer
transformation = build(optimizer)
step = compile_step(spec, stage, optimizer, transformation, abstract_state(spec, transformation, ONE_DEVICE))
state = new_state(new_weights(spec, seed, ONE_DEVICE), spec, transformation, ONE_DEVICE)
text = b"".join(document.text.encode() for document in read_documents("embedded:messages"))
rows = np.frombuffer(text[: steps * 4 * 257], np.uint8).reshape(steps, 4, 257).astype(np.int32)
segments, places = np.zeros((4, 256), np.int32), np.tile(np.arange(256, dtype=np.int32), (4, 1))
losses = []
for row in rows:
    rate = np.float32(3e-3 * min(1, (len(losses) + 1) / 20))
    state, metrics = step(state, Tokens(row[:, :-1], row[:, 1:], segments, places), rate)
    losses.append(float(metrics.loss))
print(json.dumps(losses))
"""


def curve(precision: str, attention: str, seed: int, kernels: bool) -> np.ndarray:
    """Mean loss of each `WINDOW` steps; the same tokens for every seed."""
    told = json.dumps([precision, attention, seed, STEPS, kernels])
    environment = os.environ | ({} if kernels else {"XGEN_NATIVE": "off"})
    command = [sys.executable, "-c", PROGRAM, told]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return np.array(json.loads(done.stdout)).reshape(-1, WINDOW).mean(axis=1)


@pytest.mark.slow
def test_three_hundred_steps_stay_within_the_noise_of_two_seeds() -> None:
    here = native.library() is not None
    plain, other = (curve("float32", "reference", seed, False) for seed in (0, 1))
    assert plain[0] > 4 > 2.9 > plain[-1], "it learns"
    noise = np.abs(plain - other)
    fast = {
        "float32": curve("float32", "blockwise", 0, here),
        "bfloat16": curve("bfloat16", "auto", 0, here),
    }
    for name, losses in fast.items():
        apart = np.abs(losses - plain)
        print(f"{name}: mean {apart.mean():.5f}, most {apart.max():.5f}; seeds {noise.mean():.5f}, {noise.max():.5f}")
        assert apart.mean() <= noise.mean()
        assert apart.max() <= noise.max()
