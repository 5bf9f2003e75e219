"""The real trained model as GGUF computes what transformers computed from it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xgen.convert.description import Description
from xgen.convert.gguf_read import open_gguf
from xgen.convert.pieces import assemble
from xgen.model import Spec, Weights, logits, nll
from xgen.recipe.schema import Compute

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

REFERENCE = json.loads((Path(__file__).parent / "data" / "smollm2" / "reference.json").read_text(encoding="utf-8"))
NEAR_TIE = 1e-2


@cache
def loaded(path: Path) -> tuple[Description, Spec, Weights]:
    description, source = open_gguf(path)
    return description, Spec(description.model, description.real_vocab, Compute(precision="float32")), assemble(source)


@partial(jax.jit, static_argnums=1)
def losses(weights: Weights, spec: Spec, ids: jax.Array) -> jax.Array:
    inputs = ids[None, :-1]
    places = jnp.arange(inputs.shape[1])[None]
    return nll(weights, spec, inputs, ids[None, 1:], jnp.zeros_like(inputs), places)[0]


@partial(jax.jit, static_argnums=1)
def every_logit(weights: Weights, spec: Spec, ids: jax.Array) -> jax.Array:
    places = jnp.arange(ids.size)[None]
    return logits(weights, spec, ids[None], jnp.zeros_like(places), places)[0]


def logits_with_answer(path: Path, ids: list[int], answer: list[int]) -> np.ndarray:
    """Logits after each of `ids`; our likeliest tokens then are `answer`, each after those before it, but for ties."""
    _, spec, weights = loaded(path)
    found = np.asarray(every_logit(weights, spec, jnp.asarray(ids + answer)))
    for place, token in enumerate(answer, len(ids) - 1):
        assert found[place].max() - found[place, token] < NEAR_TIE, (place, token, int(found[place].argmax()))
    return found[: len(ids)]


def test_it_is_described(smollm2: Path) -> None:
    description, _, _ = loaded(smollm2)
    model = description.model
    assert (model.layers, model.hidden_size, model.heads, model.kv_heads, model.head_size) == (30, 576, 9, 3, 64)
    assert (model.mlp_size, model.vocab_size, model.rope_theta, model.norm_epsilon) == (1536, 49152, 1e5, 1e-5)
    assert model.tied_embeddings
    assert (description.context_length, description.real_vocab, description.dtype) == (8192, 49152, "float32")
    assert (description.begin_id, description.end_ids, description.pad_id) == (None, (2,), 2)
    assert "<|im_start|>" in description.chat_template
    assert description.origin["quantisation"] == {"Q8_0": 1, "F32": 61, "Q4_1": 210}
    assert description.origin["license"] == "apache-2.0"


@pytest.mark.parametrize("case", REFERENCE["short"], ids=lambda case: case["name"])
def test_short_texts(case: dict, smollm2: Path) -> None:
    description, spec, weights = loaded(smollm2)
    assert description.tokenizer.encode(case["text"]) == case["ids"]
    found = losses(weights, spec, jnp.asarray(case["ids"]))
    np.testing.assert_allclose(found, case["nll"], atol=1e-3)
    last = logits_with_answer(smollm2, case["ids"], case["greedy_ids"])[-1]
    likeliest = case["last_top10_ids"]
    np.testing.assert_allclose(last[likeliest], case["last_top10_logits"], atol=2e-3)
    assert set(np.argsort(-last)[:10].tolist()) == set(likeliest)


@pytest.mark.parametrize("case", REFERENCE["chat"], ids=lambda case: case["question"])
def test_chat(case: dict, smollm2: Path) -> None:
    description, _, _ = loaded(smollm2)
    assert description.tokenizer.encode(case["prompt"], control=True) == case["ids"]
    logits_with_answer(smollm2, case["ids"], case["greedy_ids"])
    assert description.tokenizer.decode(case["greedy_ids"]) == case["greedy_text"]


def test_a_long_text(smollm2: Path) -> None:
    _, spec, weights = loaded(smollm2)
    case = REFERENCE["long"][0]
    found = np.asarray(losses(weights, spec, jnp.asarray(case["ids"])))
    assert found.mean() == pytest.approx(case["mean_nll"], abs=1e-3)
    parts = [found[start : start + 512].mean() for start in range(0, len(found), 512)]
    np.testing.assert_allclose(parts, case["mean_nll_by_512"], atol=1e-3)


def test_it_is_opened_quickly_and_read_in_little_memory(smollm2: Path) -> None:
    """No more than a few copies of its largest piece, the embedding of 113 MB in float32, at any time."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from xgen.convert.gguf_read import open_gguf\n"
        "from xgen.convert.gguf_header import read_header\n"
        "from xgen.convert.pieces import pieces\n"
        "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "begin = time.perf_counter()\n"
        "read_header(Path(sys.argv[1]))\n"
        "seconds = time.perf_counter() - begin\n"
        "description, source = open_gguf(Path(sys.argv[1]))\n"
        "before = peak()\n"
        "for row, layer in pieces(source.spec):\n    source.read(row, layer)\n"
        "print(seconds, (peak() - before) / 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, smollm2], capture_output=True, text=True, check=True)
    seconds, grown = map(float, done.stdout.split())
    assert seconds < 2
    assert grown < 2.5 * 113
