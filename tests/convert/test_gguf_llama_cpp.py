"""llama.cpp loads our files and computes what we compute."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import ROPES, SHAPES, gguf_spec
from memory_source import model_in_memory

from xgen.convert.gguf_read import open_gguf
from xgen.convert.gguf_write import write_gguf
from xgen.convert.pieces import assemble
from xgen.model import Spec, Weights, logits
from xgen.recipe.schema import Compute
from xgen.tokens.tokenizer import load_tokenizer, train_bpe

pytestmark = pytest.mark.oracle

PROMPT, ANSWER = 100, 64

# How far log-probabilities may lie apart. llama.cpp rounds the activations too: to float16, bfloat16 or eight bits.
APART = {"f32": 2e-5, "f16": 5e-3, "bf16": 5e-2, "q8_0": 0.1}


@partial(jax.jit, static_argnums=1)
def all_log_probabilities(weights: Weights, spec: Spec, ids: jax.Array) -> jax.Array:
    """[position, vocabulary], rows of padding included: llama.cpp does not mask them."""
    whole = Spec(spec.model, spec.model.vocab_size, Compute(precision="float32"))
    places = jnp.arange(ids.size)[None]
    return jax.nn.log_softmax(logits(weights, whole, ids[None], jnp.zeros_like(places), places)[0])


def compare(server, weights: Weights, spec: Spec, prompt: list[int], apart: float) -> tuple[int, float]:
    """How many of llama.cpp's greedy tokens are not our likeliest, and how far the last log-probabilities lie apart.

    A token that is not our likeliest must be a near tie: less likely to us by no more than both roundings.
    """
    found = server.greedy(prompt, ANSWER)
    ours = np.asarray(all_log_probabilities(weights, spec, jnp.asarray(prompt + found)))
    ties = 0
    for place, token in enumerate(found, len(prompt) - 1):
        gap = ours[place].max() - ours[place, token]
        assert gap <= 2 * apart, f"token {place - len(prompt) + 1} is {token}, less likely to us by {gap:g}"
        ties += gap > 0
    theirs = server.next(prompt + found, spec.model.vocab_size)
    return ties, max(abs(ours[-1, token] - value) for token, value in theirs.items())


def small_model(spec: Spec):
    tokenizer = train_bpe(["the cat sat on the mat, and the dog lay down by the log " * 20], 280)
    return model_in_memory(spec, tokenizer=tokenizer, end_ids=(0,), pad_id=0)


def random_prompt(spec: Spec) -> list[int]:
    return np.random.default_rng(1).integers(0, spec.real_vocab, PROMPT).tolist()


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_gives_the_same_tokens(shape: str, rope: str, llama_server, tmp_path: Path) -> None:
    spec = gguf_spec(shape, rope)
    description, source = small_model(spec)
    write_gguf(description, source, tmp_path / "m.gguf", "f32")
    weights = assemble(source)
    with llama_server(tmp_path / "m.gguf") as server:
        ties, apart = compare(server, weights, spec, random_prompt(spec), APART["f32"])
        assert ties == 0
        assert apart < APART["f32"]
        # The comparison sees the scaling: without it we are far off.
        if rope != "none":
            plain = Spec(gguf_spec(shape).model, spec.real_vocab, spec.compute)
            ids = jnp.asarray(random_prompt(spec))
            theirs = server.next(ids.tolist(), spec.model.vocab_size)
            ours = np.asarray(all_log_probabilities(weights, plain, ids))[-1]
            assert max(abs(ours[token] - value) for token, value in theirs.items()) > 100 * APART["f32"]


@pytest.mark.parametrize("quantisation", APART)
def test_stored_types_give_the_same_tokens(quantisation: str, llama_server, tmp_path: Path) -> None:
    spec = gguf_spec("biased", "llama3")
    write_gguf(*small_model(spec), tmp_path / "m.gguf", quantisation)
    description, source = open_gguf(tmp_path / "m.gguf")
    with llama_server(tmp_path / "m.gguf") as server:
        ties, apart = compare(server, assemble(source), description.spec, random_prompt(spec), APART[quantisation])
    assert apart < APART[quantisation]
    assert ties <= ANSWER // 8


@pytest.mark.parametrize("quantisation", APART)
def test_xgens_vocabulary_gives_the_same_tokens(quantisation: str, llama_server, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("xgen")
    small = gguf_spec(vocab_size=51_200)
    spec = Spec(small.model, tokenizer.size, small.compute)
    told = {"tokenizer": tokenizer, "end_ids": (50_256,), "pad_id": 50_256}
    write_gguf(*model_in_memory(spec, **told), tmp_path / "m.gguf", quantisation)
    description, source = open_gguf(tmp_path / "m.gguf")
    assert description.real_vocab == 50_313
    assert description.tokenizer.encode("    return x\t\t\tand 1905") == tokenizer.encode("    return x\t\t\tand 1905")
    text = "def f(x):\n        return x  # <|endoftext|>"
    with llama_server(tmp_path / "m.gguf") as server:
        assert server.tokenize(text) == tokenizer.encode(text)
        assert server.tokenize(text, control=True) == tokenizer.encode(text, control=True)
        ties, apart = compare(server, assemble(source), description.spec, random_prompt(spec), APART[quantisation])
    assert apart < APART[quantisation]
    assert ties <= ANSWER // 8


@pytest.mark.slow
def test_the_real_model_again_as_float32(smollm2: Path, llama_server, tmp_path: Path) -> None:
    """Its own file, written as float32: the same tokens as ours, and for text as for ids."""
    written, source = open_gguf(smollm2)
    write_gguf(written, source, tmp_path / "m.gguf", "f32")
    description, again = open_gguf(tmp_path / "m.gguf")
    for key in ("model", "context_length", "begin_id", "end_ids", "pad_id", "chat_template", "real_vocab", "name"):
        assert vars(description)[key] == vars(written)[key]
    prompt = written.tokenizer.encode("The three most important inventions of the nineteenth century were")
    with llama_server(tmp_path / "m.gguf") as server:
        assert server.tokenize("In 1905 there were 1234567 people.") == written.tokenizer.encode(
            "In 1905 there were 1234567 people."
        )
        ties, apart = compare(server, assemble(again), description.spec, prompt, 1e-3)
    assert ties == 0
    assert apart < 1e-3
