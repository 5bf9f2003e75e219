"""Written Hugging Face folders as transformers loads them: weights, logits, greedy tokens, tokenizers."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_source import SHAPES, ArraySource, assert_same_pieces, llama, small_tokenizer, xgen_tokenizer
from sample_texts import CODE, LANGUAGES, LOOK_ALIKES, WHITESPACE

from xgen.convert.hf_read import open_hugging_face
from xgen.convert.hf_write import write_hugging_face
from xgen.model import logits
from xgen.model.decoder import last_logits
from xgen.tokens.tokenizer import Tokenizer

pytestmark = pytest.mark.oracle

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is first imported


@pytest.fixture(autouse=True)
def no_warnings(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """transformers tells what it doubts by logging."""
    from transformers.utils import logging as theirs

    theirs.enable_propagation()
    yield
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [text for text in found if "jax" not in text.lower()]


def load(folder: Path):
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=False, attn_implementation="eager"
    )
    assert not any(told.values()), told
    return model.eval()


def theirs_of(model, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()


def ours_of(source: ArraySource, ids: np.ndarray) -> np.ndarray:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    function = jax.jit(logits, static_argnums=1)
    return np.asarray(function(source.weights, source.spec, jnp.asarray(ids), jnp.zeros_like(positions), positions))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_every_shape(shape: str, tmp_path: Path) -> None:
    description, source = llama(shape)
    write_hugging_face(description, source, tmp_path / "out", shard_bytes=60_000)
    model = load(tmp_path / "out")
    for length in (16, 200):
        ids = np.random.default_rng(length).integers(0, description.real_vocab, (1, length))
        found, wanted = ours_of(source, ids), theirs_of(model, ids)
        real = np.s_[..., : description.real_vocab]
        assert np.abs(found[real] - wanted[real]).max() <= 2e-4
        assert np.std(found[real]) > 0.1


@pytest.mark.parametrize("shape", ["xgen", "tied", "biased", "llama3", "yarn", "dynamic"])
def test_greedy_tokens(shape: str, tmp_path: Path) -> None:
    """Padding rows, whose logits are no smaller than others', come out of neither."""
    import torch

    description, source = llama(shape)
    write_hugging_face(description, source, tmp_path / "out")
    model = load(tmp_path / "out")
    ids = np.random.default_rng(3).integers(0, description.real_vocab, (1, 16))
    begin = torch.tensor(ids)
    options = {"attention_mask": torch.ones_like(begin), "max_new_tokens": 64, "do_sample": False}
    # Dynamic scaling turns all keys anew as the text grows; those in transformers' cache stay as they were turned.
    theirs = model.generate(begin, use_cache=shape != "dynamic", **options)
    padded = jnp.zeros((1, 80), jnp.int32).at[:, :16].set(ids)
    step = jax.jit(last_logits, static_argnums=1)
    for length in range(16, 80):
        padded = padded.at[0, length].set(step(source.weights, source.spec, padded, jnp.int32(length))[0].argmax())
    assert theirs[0].tolist() == padded[0].tolist()


def test_without_the_list_padding_rows_would_come_out(tmp_path: Path) -> None:
    """What `suppress_tokens` is for: the test above could fail."""
    import torch

    description, source = llama()
    write_hugging_face(description, source, tmp_path / "out")
    model = load(tmp_path / "out")
    begin = torch.tensor(np.random.default_rng(3).integers(0, description.real_vocab, (64, 16)))
    options = {"attention_mask": torch.ones_like(begin), "max_new_tokens": 16, "do_sample": True, "pad_token_id": 0}
    torch.manual_seed(0)
    assert model.generate(begin, **options).max() < description.real_vocab
    model.generation_config.suppress_tokens = None
    assert model.generate(begin, **options).max() >= description.real_vocab


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_types(dtype: str, tmp_path: Path) -> None:
    import torch

    description, source = llama()
    write_hugging_face(description, source, tmp_path / "out", dtype)
    model = load(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def odd_texts(count: int) -> list[str]:
    """Texts without the name of a control token in them."""
    picker = random.Random(5)
    parts = [
        *LANGUAGES.values(),
        *CODE,
        *(space * 7 for space in WHITESPACE),
        *WHITESPACE,
        "🤖👩‍👩‍👧",
        "e\u0301",
        "\x00",
    ]
    return ["", " ", *("".join(picker.choices(parts, k=picker.randint(1, 5))) for _ in range(count))]


@pytest.mark.parametrize("make", [small_tokenizer, xgen_tokenizer], ids=["bpe", "xgen"])
def test_tokenizers(make, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours: Tokenizer = make()
    ids = {"end_ids": (ours.end_of_text,), "pad_id": ours.end_of_text}
    description, source = llama(tokenizer=ours, **ids)
    write_hugging_face(description, source, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (*ids["end_ids"], ids["pad_id"], None)
    assert theirs.model_max_length == 256
    assert len(theirs) == ours.size
    texts = odd_texts(300)
    for text in texts:
        found = theirs(text)["input_ids"]
        assert found == ours.encode(text)
        assert theirs.decode(found) == ours.decode(found) == text
    # Names of control tokens in a text: transformers reads them as the tokens, unless it is told to split them. Then
    # they are text, as they are to us; but it may still give a piece that is one by itself its id.
    for name in LOOK_ALIKES:
        text = f"x{name} y"
        assert theirs(text)["input_ids"] == ours.encode(text, control=True)
        split = AutoTokenizer.from_pretrained(tmp_path / "out", split_special_tokens=True)
        assert split(text)["input_ids"] == ours.encode(text)


def test_a_token_before_texts(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = small_tokenizer()
    description, source = llama(tokenizer=ours, begin_id=0, end_ids=(0,))
    write_hugging_face(description, source, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert theirs.bos_token == "<|endoftext|>"
    assert theirs("the cat")["input_ids"] == [0, *ours.encode("the cat")]
    assert theirs("the cat", add_special_tokens=False)["input_ids"] == ours.encode("the cat")


def test_a_dialogue(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    ours = small_tokenizer()
    description, source = llama(tokenizer=ours, end_ids=(0,), chat_template=template)
    write_hugging_face(description, source, tmp_path / "out")
    for jinja in (True, False):  # older releases read the key of tokenizer_config.json alone
        if not jinja:
            (tmp_path / "out" / "chat_template.jinja").unlink()
        theirs = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
        text = theirs.apply_chat_template([{"role": "user", "content": "the cat"}], tokenize=False)
        assert text == "<user>the cat\n"


@pytest.mark.parametrize("shape", SHAPES)
def test_read_again(shape: str, tmp_path: Path) -> None:
    ours = small_tokenizer()
    facts = {"end_ids": (0,), "pad_id": 0, "begin_id": 0, "chat_template": "{{ messages }}"}
    description, source = llama(shape, tokenizer=ours, **facts)
    write_hugging_face(description, source, tmp_path / "out", shard_bytes=60_000)
    found, again = open_hugging_face(tmp_path / "out")
    assert_same_pieces(again, source)
    same = ("model", "real_vocab", "end_ids", "pad_id", "begin_id", "chat_template", "dtype")
    assert {name: getattr(found, name) for name in same} == {name: getattr(description, name) for name in same}
    assert found.tokenizer is not None
    assert found.tokenizer.encode("the cat sat") == ours.encode("the cat sat")
    assert all("masked" in repair for repair in found.repairs)


def test_types_side_by_side_are_read_again(tmp_path: Path) -> None:
    description, full = llama()
    source = ArraySource(full.spec, full.weights, {"block.query": "bfloat16", "block.up": "float16"})
    write_hugging_face(description, source, tmp_path / "out")
    assert_same_pieces(open_hugging_face(tmp_path / "out")[1], source)


def test_transformers_writes_it_again(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    description, source = llama("biased", tokenizer=small_tokenizer(), end_ids=(0,), pad_id=0)
    write_hugging_face(replace(description, context_length=512), source, tmp_path / "out")
    load(tmp_path / "out").save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "theirs")
    found, again = open_hugging_face(tmp_path / "theirs")
    assert found.model == description.model
    assert found.context_length == 512
    assert_same_pieces(again, source)
    ids = np.arange(32)[None]
    assert np.array_equal(theirs_of(load(tmp_path / "theirs"), ids), theirs_of(load(tmp_path / "out"), ids))
