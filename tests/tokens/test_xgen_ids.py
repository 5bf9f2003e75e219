"""XGen's ids are those of its tiktoken construction."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from importlib.resources import files
from pathlib import Path

import plain_bpe
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_texts import random_texts

from xgen.tokens.tokenizer import Tokenizer
from xgen.tokens.xgen import CONTROL

DATA = Path(__file__).parent / "data"
RANKS = plain_bpe.xgen_ranks()
PINNED = {  # the hashes that tiktoken checks for its encoding "gpt2"
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def lines(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", PINNED)
def test_the_shipped_vocabulary_is_the_one_openai_published(name: str) -> None:
    assert hashlib.sha256((files("xgen.tokens") / "gpt2" / name).read_bytes()).hexdigest() == PINNED[name]


def test_its_licence_and_hashes_travel_beside_it() -> None:
    folder = files("xgen.tokens") / "gpt2"
    assert "MIT License" in (folder / "LICENSE-tiktoken.txt").read_text(encoding="utf-8")
    assert all(digest in (folder / "README.md").read_text(encoding="utf-8") for digest in PINNED.values())


def test_every_id_stands_for_what_xgen_published(xgen_tokenizer: Tokenizer) -> None:
    assert xgen_tokenizer.size == 50313
    assert xgen_tokenizer.end_of_text == 50256
    expected = {rank: token for token, rank in RANKS.items()}
    expected |= {50256: b"<|endoftext|>"} | {50295 + place: name.encode() for place, name in enumerate(CONTROL)}
    assert [xgen_tokenizer.token_bytes(index) for index in range(50313)] == [expected[i] for i in range(50313)]
    assert xgen_tokenizer.token_bytes(50257) == b" " * 31
    assert xgen_tokenizer.token_bytes(50286) == b" " * 2
    assert xgen_tokenizer.token_bytes(50287) == b"\t" * 9
    assert xgen_tokenizer.token_bytes(50294) == b"\t" * 2
    assert xgen_tokenizer.decode([50295, 50312]) == "<fim_prefix><reponame>"


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("    return", [50285, 1441]),
        (" " * 32 + "x", [50257, 2124]),
        (" " * 40 + "x", [50257, 50280, 2124]),
        ("\n    x", [198, 50285, 2124]),
        ("\t\tx", [197, 197, 87]),
        ("\t\t\tx", [50294, 197, 87]),
    ],
)
def test_runs_of_whitespace(xgen_tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert xgen_tokenizer.encode(text) == ids


def without_runs(ids: list[int]) -> list[int]:
    """`ids` with XGen's runs written as GPT-2 would: character by character."""
    runs = {50257 + place: [220] * n for place, n in enumerate(range(31, 1, -1))}
    runs |= {50287 + place: [197] * n for place, n in enumerate(range(9, 1, -1))}
    return [index for run in ids for index in runs.get(run, [run])]


def test_ids_of_published_gpt2_texts(xgen_tokenizer: Tokenizer) -> None:
    """Ids that tiktoken gave under GPT-2's own vocabulary, from which XGen's differ by the runs only."""
    rows = lines("reference_ids.jsonl")
    assert len(rows) == 300
    for row in rows:
        assert without_runs(xgen_tokenizer.encode(str(row["text"]))) == row["ids"]


def test_control_tokens_are_parsed_when_asked(xgen_tokenizer: Tokenizer) -> None:
    for row in lines("reference_special.jsonl"):
        assert xgen_tokenizer.encode(str(row["text"]), control=True) == row["ids_allow_special"]
    for place, token in enumerate(CONTROL):
        assert xgen_tokenizer.encode(f"a{token} b", control=True) == [64, 50295 + place, 275]


def test_equal_to_tiktokens_merging_in_plain_python(xgen_tokenizer: Tokenizer) -> None:
    # Python's own character table is older than the tokenizers library's: only characters it knows are compared.
    texts = [t for t in random_texts(2000, seed=1) if not any(unicodedata.category(c) == "Cn" for c in t)]
    assert len(texts) > 1000
    for text, ids in zip(texts, xgen_tokenizer.encode_batch(texts), strict=True):
        assert ids == plain_bpe.encode(text, RANKS), ascii(text)


@given(st.text(alphabet=" \t\n\r\xa0\u2003ax'.1", max_size=120))
def test_mixed_whitespace_equals_tiktokens_merging(xgen_tokenizer: Tokenizer, text: str) -> None:
    assert xgen_tokenizer.encode(text) == plain_bpe.encode(text, RANKS)


def test_pieces_are_those_of_the_split_that_llama_cpp_calls_gpt_2(xgen_tokenizer: Tokenizer, tmp_path: Path) -> None:
    import tokenizers

    xgen_tokenizer.save(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert document["normalizer"] is None
    assert document["model"]["ignore_merges"] is False
    # tokenizers' ByteLevel holds the regular expression built in under `use_regex`.
    assert document["pre_tokenizer"] | {"trim_offsets": None} == {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": None,
        "use_regex": True,
    }
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    written = tokenizers.pre_tokenizers.Split(tokenizers.Regex(plain_split_regex()), "isolated")
    for text in random_texts(1000, seed=2):
        pieces = [text[start:stop] for _, (start, stop) in written.pre_tokenize_str(text)]
        assert [text[start:stop] for _, (start, stop) in level.pre_tokenize_str(text)] == pieces
        if not any(unicodedata.category(c) == "Cn" for c in text):
            assert pieces == plain_bpe.split(text)


def plain_split_regex() -> str:
    from xgen.tokens.bytelevel import SPLIT

    assert SPLIT == r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return SPLIT


class TestPremises:
    """What `xgen.tokens.xgen` builds on when it writes tiktoken's ranks as a list of pairs."""

    def test_lower_ranks_leave_the_two_parts_that_vocab_bpe_lists(self) -> None:
        ranks = plain_bpe.gpt2_ranks()
        table = plain_bpe.byte_characters()
        listed = (files("xgen.tokens") / "gpt2" / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
        assert len(listed) == 50_000
        for place, line in enumerate(listed):
            parts = [bytes(table[c] for c in part) for part in line.split(" ")]
            assert ranks[b"".join(parts)] == 256 + place
            assert plain_bpe.merge(b"".join(parts), ranks, below=256 + place) == parts

    def test_no_gpt2_token_holds_a_run(self) -> None:
        assert not [token for token in plain_bpe.gpt2_ranks() if b"  " in token or b"\t\t" in token]

    def test_merging_a_run_that_is_a_token_ends_at_that_token(self) -> None:
        for run in [b" " * n for n in range(2, 32)] + [b"\t" * n for n in range(2, 10)]:
            assert plain_bpe.merge(run, RANKS) == [run]
