"""Oracle: tiktoken itself, with the ranks that XGen adds to its "gpt2" encoding."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any

import pytest
from sample_texts import LOOK_ALIKES, random_texts

from xgen.tokens.tokenizer import Tokenizer
from xgen.tokens.xgen import CONTROL

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def encoding(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """XGen's construction, as its tokenizer's source has it: GPT-2's ranks, runs longest first, control tokens."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    with (
        pytest.MonkeyPatch.context() as patch,
        as_file(files("xgen.tokens") / "gpt2" / "vocab.bpe") as merges,
        as_file(files("xgen.tokens") / "gpt2" / "encoder.json") as encoder,
    ):
        patch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path_factory.mktemp("tiktoken")))
        ranks = data_gym_to_mergeable_bpe_ranks(vocab_bpe_file=str(merges), encoder_json_file=str(encoder))
    special = {"<|endoftext|>": 50256}
    for character, longest in ((b" ", 31), (b"\t", 9)):
        for length in range(longest, 1, -1):
            ranks[character * length] = len(ranks) + len(special)
    special |= {token: len(ranks) + 1 + place for place, token in enumerate(CONTROL)}
    return tiktoken.Encoding(
        "xgen",
        pat_str=r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        mergeable_ranks=ranks,
        special_tokens=special,
        explicit_n_vocab=50313,
    )


def assert_equal(tokenizer: Tokenizer, encoding: Any, count: int, seed: int) -> None:
    texts = list(random_texts(count, seed))
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        expected = encoding.encode_ordinary(text)
        assert ids == expected, ascii(text)
        assert tokenizer.decode(ids) == text


def test_equal_on_3_000_random_texts(xgen_tokenizer: Tokenizer, encoding: Any) -> None:
    assert_equal(xgen_tokenizer, encoding, 3_000, seed=3)


@pytest.mark.slow
def test_equal_on_100_000_random_texts(xgen_tokenizer: Tokenizer, encoding: Any) -> None:
    assert_equal(xgen_tokenizer, encoding, 100_000, seed=4)


@pytest.mark.slow
def test_equal_around_every_character(xgen_tokenizer: Tokenizer, encoding: Any) -> None:
    """Each beside a letter, a digit, a mark, itself and whitespace: both split with the same version of Unicode.

    Planes 4 to 13 are left out: nothing is assigned there.
    """
    codes = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000), 0xF0000, 0x10FFFF]
    texts = [f"a{c}b {c}1{c}{c}. {c}! {c}  {c}a" for c in map(chr, codes)]
    for text, ids in zip(texts, xgen_tokenizer.encode_batch(texts), strict=True):
        assert ids == encoding.encode_ordinary(text), ascii(text)


def test_equal_when_control_tokens_are_parsed(xgen_tokenizer: Tokenizer, encoding: Any) -> None:
    for text in random_texts(2_000, seed=5):
        text = text + LOOK_ALIKES[len(text) % len(LOOK_ALIKES)] + text
        assert xgen_tokenizer.encode(text, control=True) == encoding.encode(text, allowed_special="all"), ascii(text)


def test_every_id_decodes_as_in_tiktoken(xgen_tokenizer: Tokenizer, encoding: Any) -> None:
    assert encoding.n_vocab == xgen_tokenizer.size
    for index in range(encoding.n_vocab):
        assert xgen_tokenizer.token_bytes(index) == encoding.decode_single_token_bytes(index)
        assert xgen_tokenizer.decode([index]) == encoding.decode([index])
