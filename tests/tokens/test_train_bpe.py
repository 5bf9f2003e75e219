"""Byte-level BPE learnt from one's own text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from sample_texts import CODE, LANGUAGES, random_texts

from xgen.errors import DataError
from xgen.tokens.tokenizer import Tokenizer, load_tokenizer, train_bpe

PROGRAM = """
from sample_texts import random_texts
from xgen.tokens.tokenizer import train_bpe
print(train_bpe(random_texts(1500, seed=20), 600).fingerprint)
"""


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_bpe(random_texts(1500, seed=20), 600)


def test_it_has_the_size_asked_for_and_every_byte(trained: Tokenizer) -> None:
    assert (trained.size, trained.name, trained.end_of_text) == (600, "bpe:600", 0)
    assert {bytes((byte,)) for byte in range(256)} <= {trained.token_bytes(index) for index in range(1, 600)}


def test_text_it_never_saw_comes_back(trained: Tokenizer) -> None:
    for text in random_texts(500, seed=21):
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert trained.end_of_text not in ids
        assert trained.byte_lengths[ids].sum() == len(text.encode())


def test_it_shortens_text_like_the_one_it_learnt_from(trained: Tokenizer) -> None:
    text = "".join((*LANGUAGES.values(), *CODE))
    assert len(trained.encode(text)) < 0.7 * len(text.encode())


def test_each_merge_is_of_the_most_frequent_pair() -> None:
    """By hand: in "aab aab aab cd cd" ab is frequent in 3 pieces, as is aa: the pair of lower ids comes first."""
    tokenizer = train_bpe(["aab"] * 3 + ["cd"] * 2, 260)
    assert [tokenizer.token_bytes(index) for index in (257, 258, 259)] == [b"aa", b"aab", b"cd"]


@pytest.mark.parametrize("cores", ["1", "4"])
def test_the_same_on_any_number_of_cores_and_in_any_process(trained: Tokenizer, cores: str) -> None:
    path = os.pathsep.join((str(Path(__file__).parent), *sys.path))
    environment = os.environ | {"RAYON_NUM_THREADS": cores, "PYTHONPATH": path, "PYTHONHASHSEED": cores}
    found = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == trained.fingerprint


def test_saved_it_is_a_standard_file_that_llama_cpps_gpt_2_split_serves(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    assert load_tokenizer(str(tmp_path)).fingerprint == trained.fingerprint
    stock = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in random_texts(300, seed=22):
        assert stock.encode(text).ids == trained.encode(text, control=True)
    document = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert document["pre_tokenizer"]["type"] == "ByteLevel"
    assert document["pre_tokenizer"]["use_regex"] is True
    assert document["pre_tokenizer"]["add_prefix_space"] is False


def test_too_little_text_says_how_far_it_reaches() -> None:
    with pytest.raises(DataError, match=r'600 ids: it holds pairs for 259.*"bpe:259"'):
        train_bpe(["abc abc"], 600)
    assert train_bpe(["abc abc"], 259).size == 259
    with pytest.raises(DataError, match="257"):
        train_bpe([], 600)


def test_fewer_ids_than_bytes_is_an_error() -> None:
    with pytest.raises(DataError, match=r"256 ids is too small.*257"):
        train_bpe(["abc"], 256)
