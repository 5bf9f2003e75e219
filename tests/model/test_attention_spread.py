"""Attention with its columns spread over devices is attention: results, gradients, masks, work and memory.

The cases run in one process with eight emulated devices (attention_cases.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from xgen.errors import RecipeError
from xgen.model.attention import BACKENDS, attention

FLOAT32 = 1e-5
FLOAT64 = 1e-10
BFLOAT16 = 2.0**-6
"""The bound of bfloat16 in test_gradients.py, of one device's result; its unit is 2^-8."""

BOUNDS = {"float32": FLOAT32, "float64": FLOAT64, "bfloat16": BFLOAT16}
EXCHANGES = ("gather", "ring")


@pytest.fixture(scope="module")
def found():
    here = Path(__file__).parent
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, here / "attention_cases.py"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_any_number_of_devices_is_one(found):
    """Result, dq, dk and dv: of rows of one document and of several, and of grouped heads."""
    assert len(found["equality"]) == 18
    for case, against in found["equality"].items():
        bound = BOUNDS[case.split()[0]]
        assert max(against["one"]) < bound, case
        assert max(against["exact"]) < bound, case
    assert max(found["reference"]) < FLOAT32


@pytest.mark.slow
def test_splash_computes_the_same(found):
    assert len(found["interpreted"]) == 7
    for case, errors in found["interpreted"].items():
        assert max(errors) < BOUNDS[case.split()[0]], case


@pytest.mark.slow
def test_nothing_leaks_between_devices(found):
    assert found["leaks"] == {exchange: [] for exchange in EXCHANGES}


@pytest.mark.slow
def test_the_probe_detects_a_broken_mask(found):
    assert any(other > place for place, other in found["broken"]["causal only"]), "another document was not seen"
    assert any(other < place for place, other in found["broken"]["documents only"]), "what came before was not seen"


@pytest.mark.slow
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_every_device_computes_its_share_of_the_triangle(found, exchange):
    """64 tiles: 64 x 65 / 2 pairs up to the diagonal, in both passes; not one above it."""
    counts = found["visits"][exchange]
    assert len(counts) == 8
    assert set(counts.values()) == {2 * (64 * 65 // 2) // 8}


@pytest.mark.slow
def test_a_ring_takes_no_more_memory_with_more_devices(found):
    memory = found["memory"]
    assert memory["ring"]["8"] < 1.01 * memory["ring"]["4"]
    assert memory["gather"]["8"] > 1.5 * memory["gather"]["4"], "the measure sees the keys of all devices"


ARRAYS = (*[jnp.zeros((1, 4, 2, 8))] * 3, jnp.zeros((1, 4), jnp.int32))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"backend": "splash"}, "splash is for TPUs, and this is cpu"),
        ({"backend": "cudnn"}, "cudnn is for GPUs, and this is cpu"),
        ({"backend": "cudnn", "context": ("context",)}, "'cudnn' wants whole sequences on a device"),
        ({"backend": "reference", "context": ("context",), "exchange": "ring"}, "not by 'reference'"),
        ({"context": ("context",), "exchange": "post"}, "'post' is not known; use 'gather' or 'ring'"),
    ],
)
def test_what_cannot_be_had_is_refused(choice, message):
    with pytest.raises(RecipeError, match=message):
        attention(*ARRAYS, **choice)


@pytest.mark.parametrize(
    ("columns", "size", "precision", "chosen"),
    [
        (8192, 128, "bfloat16", "cudnn"),
        (8193, 128, "bfloat16", "blockwise"),
        (64, 132, "bfloat16", "blockwise"),
        (64, 64, "float32", "blockwise"),
    ],
)
def test_a_gpu_takes_cudnn_where_it_fits(monkeypatch, columns, size, precision, chosen):
    taken = []
    monkeypatch.setattr("xgen.model.attention.platform", lambda: "gpu")
    for name in ("cudnn", "blockwise", "splash"):
        monkeypatch.setitem(BACKENDS, name, lambda q, *_, name=name: taken.append(name) or q)
    jax.eval_shape(attention, *[jax.ShapeDtypeStruct((1, columns, 2, size), precision)] * 3, segments_of(columns))
    assert taken == [chosen]


def segments_of(columns):
    return jax.ShapeDtypeStruct((1, columns), jnp.int32)
