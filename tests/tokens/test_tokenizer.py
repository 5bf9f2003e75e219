"""What holds for every tokenizer: control tokens, decoding, batches, files."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import plain_bpe
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from sample_texts import LOOK_ALIKES, random_texts

from xgen.errors import DataError, StorageError
from xgen.tokens.bytelevel import ALPHABET, byte_level_document, cut
from xgen.tokens.tokenizer import PART, Tokenizer, embedding_rows, load_tokenizer

CONTROL_IDS = {50256, *range(50295, 50313)}
hostile = st.lists(st.one_of(st.sampled_from(LOOK_ALIKES), st.text(max_size=12)), max_size=8).map("".join)


class TestControlTokens:
    @given(hostile)
    def test_text_never_becomes_one(self, xgen_tokenizer: Tokenizer, text: str) -> None:
        ids = xgen_tokenizer.encode(text)
        assert CONTROL_IDS.isdisjoint(ids)
        assert all(0 <= index < 50313 for index in ids)
        assert xgen_tokenizer.decode(ids) == text

    @given(hostile)
    def test_parsing_them_loses_no_text(self, xgen_tokenizer: Tokenizer, text: str) -> None:
        assert xgen_tokenizer.decode(xgen_tokenizer.encode(text, control=True)) == text

    def test_threads_asking_for_both_do_not_disturb_each_other(self, xgen_tokenizer: Tokenizer) -> None:
        def both(_: int) -> tuple[list[int], list[int]]:
            text = "<|endoftext|>a"
            return xgen_tokenizer.encode(text), xgen_tokenizer.encode(text, control=True)

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(both, range(400)))
        assert results == [([27, 91, 437, 1659, 5239, 91, 29, 64], [50256, 64])] * 400

    @pytest.mark.parametrize("kind", ["whole pieces", "merged", "Unigram", "WordLevel", "with more text tokens"])
    def test_whatever_the_model(self, kind: str, tmp_path: Path) -> None:
        document = foreign(kind)
        tokenizer = load(document, tmp_path, end_of_text="</s>")
        # The premise: the library alone, told to treat control tokens as text, may still give the id away.
        library = tokenizers.Tokenizer.from_str(json.dumps(document))
        library.encode_special_tokens = True
        leaks = tokenizer.end_of_text in library.encode("</s>").ids
        assert leaks == (kind != "with more text tokens")
        for text in ("</s>", "a</s>a", "a</s></s> <s"):
            assert tokenizer.end_of_text not in tokenizer.encode(text)
        assert tokenizer.encode("</s>", control=True) == [tokenizer.end_of_text]

    def test_a_unigram_piece_that_was_barred_is_an_error(self, tmp_path: Path) -> None:
        tokenizer = load(foreign("Unigram"), tmp_path, end_of_text="</s>")
        with pytest.raises(DataError, match=r"U\+10FFFF followed by 1"):
            tokenizer.encode("a\U0010ffff1")

    def test_other_ids_stay_when_they_are_cut(self, tmp_path: Path) -> None:
        tokenizer = load(foreign("with more text tokens"), tmp_path, end_of_text="</s>")
        assert tokenizer.encode("a<think>a") == tokenizer.encode("a<think>a", control=True) == [64, 257, 64]


def foreign(kind: str) -> dict[str, Any]:
    """A small `tokenizer.json` as other projects write them, whose control token is </s>."""
    letters = {c: place for place, c in enumerate(ALPHABET.values())}
    if kind in ("whole pieces", "merged"):
        merges = [("<", "/"), ("</", "s"), ("</s", ">")] if kind == "merged" else []
        parts = {left + right: 257 + place for place, (left, right) in enumerate(merges[:-1])}
        document = byte_level_document(letters | {"</s>": 256} | parts, merges, ["</s>"])
        document["model"]["ignore_merges"] = kind == "whole pieces"
        document["pre_tokenizer"] = document["pre_tokenizer"] | {"use_regex": False}
        return document
    if kind == "with more text tokens":
        document = byte_level_document(letters | {"</s>": 256, "<think>": 257}, [], ["</s>", "<think>"])
        document["added_tokens"][1]["special"] = False
        for token in ("</s>", "<think>"):
            del document["model"]["vocab"][token]
        return document
    document = byte_level_document({"</s>": 1}, [], ["</s>"]) | {"pre_tokenizer": None, "post_processor": None}
    if kind == "WordLevel":
        document["model"] = {"type": "WordLevel", "vocab": {"<unk>": 0, "</s>": 1, "a": 2}, "unk_token": "<unk>"}
    else:
        pieces = [["<unk>", 0.0], ["</s>", 0.0], ["a", -1.0], ["<", -2.0], ["/", -2.0], ["s", -2.0], [">", -2.0]]
        document["model"] = {"type": "Unigram", "unk_id": 0, "byte_fallback": False, "vocab": pieces}
    return document | {"decoder": None}


def load(document: dict[str, Any], folder: Path, end_of_text: str = "<|endoftext|>") -> Tokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    return load_tokenizer(str(folder), end_of_text)


class TestDecoding:
    def test_random_bytes_come_back(self, xgen_tokenizer: Tokenizer) -> None:
        """Bytes as a latin-1 text, and bytes as ids of single bytes, whole or broken UTF-8."""
        draw = random.Random(6)
        single = {xgen_tokenizer.token_bytes(index): index for index in range(256)}
        for _ in range(300):
            data = draw.randbytes(draw.randrange(200))
            text = data.decode("latin-1")
            ids = xgen_tokenizer.encode(text)
            assert xgen_tokenizer.decode(ids) == text
            assert b"".join(map(xgen_tokenizer.token_bytes, ids)) == text.encode()
            spelled = [single[data[place : place + 1]] for place in range(len(data))]
            assert xgen_tokenizer.decode(spelled) == data.decode("utf-8", errors="replace")

    def test_every_row_of_the_embedding_decodes(self, xgen_tokenizer: Tokenizer) -> None:
        assert xgen_tokenizer.decode(range(50313, 51200)) == "\ufffd" * 887
        assert all(xgen_tokenizer.decode([index]) for index in range(51200))
        assert xgen_tokenizer.decode(np.array([39, 50313, 72], np.int32)) == "H\ufffdi"
        assert xgen_tokenizer.decode([]) == ""

    def test_a_negative_id_is_an_error(self, xgen_tokenizer: Tokenizer) -> None:
        with pytest.raises(DataError, match="-100 is negative"):
            xgen_tokenizer.decode([64, -100])

    def test_byte_lengths_add_up_to_the_text(self, xgen_tokenizer: Tokenizer) -> None:
        assert xgen_tokenizer.byte_lengths.dtype == np.int32
        assert xgen_tokenizer.byte_lengths.shape == (50313,)
        assert not xgen_tokenizer.byte_lengths[sorted(CONTROL_IDS)].any()
        for text in random_texts(300, seed=7):
            assert xgen_tokenizer.byte_lengths[xgen_tokenizer.encode(text)].sum() == len(text.encode())

    def test_sentencepiece_pieces(self, tmp_path: Path) -> None:
        vocab = {"<unk>": 0, "</s>": 1, "<0x0A>": 2, "▁": 3, "a": 4, "▁a": 5}
        document = byte_level_document(vocab, [("▁", "a")], ["</s>"])
        document["model"] |= {"byte_fallback": True, "unk_token": "<unk>"}
        document |= {"pre_tokenizer": None, "post_processor": None}
        document["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
        document["decoder"] = {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]}
        tokenizer = load(document, tmp_path, end_of_text="</s>")
        ids = tokenizer.encode("a a\n")
        assert ids == [4, 5, 2]
        assert tokenizer.byte_lengths.tolist() == [5, 0, 1, 1, 1, 2]
        assert tokenizer.decode([*ids, 6, 99, 4]) == "a a\n\ufffd\ufffda"


class TestBatches:
    def test_equal_one_by_one_and_all_at_once(self, xgen_tokenizer: Tokenizer) -> None:
        texts = list(random_texts(500, seed=8))
        assert xgen_tokenizer.encode_batch(texts) == [xgen_tokenizer.encode(text) for text in texts]
        assert xgen_tokenizer.encode_batch([]) == []
        assert xgen_tokenizer.encode("") == []

    def test_a_long_text_is_cut_without_a_trace(self, xgen_tokenizer: Tokenizer, tmp_path: Path) -> None:
        xgen_tokenizer.save(tmp_path)
        stock = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        stock.encode_special_tokens = True
        text = "".join(random_texts(20_000, seed=9))
        assert len(text) > 10 * PART
        assert xgen_tokenizer.encode(text) == stock.encode(text).ids
        assert xgen_tokenizer.encode_batch([text, "", text[:99]])[1:] == [[], stock.encode(text[:99]).ids]

    def test_cutting_anywhere_changes_no_id(self, xgen_tokenizer: Tokenizer) -> None:
        for text in random_texts(500, seed=10):
            parts = list(cut(text, 1))
            assert "".join(parts) == text
            assert [i for part in parts for i in xgen_tokenizer.encode(part)] == xgen_tokenizer.encode(text)

    def test_every_cut_lies_between_pieces(self) -> None:
        """Also where a vocabulary has merges that GPT-2's lacks. U+001C is whitespace to Python, not to the split."""
        for text in ("a!\x1c b.\x1f\nc \x1d", *random_texts(500, seed=13)):
            assert [piece for part in cut(text, 1) for piece in plain_bpe.split(part)] == plain_bpe.split(text)

    def test_half_a_surrogate_pair_is_an_error(self, xgen_tokenizer: Tokenizer) -> None:
        for control in (False, True):
            with pytest.raises(DataError, match=r"character 3 .*\\ud800"):
                xgen_tokenizer.encode("abc\ud800", control=control)


class TestFiles:
    def test_stock_tokenizers_loads_it_and_gives_equal_ids(self, xgen_tokenizer: Tokenizer, tmp_path: Path) -> None:
        xgen_tokenizer.save(tmp_path)
        stock = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert stock.get_vocab_size() == 50313
        for text in random_texts(1000, seed=11):
            parsed = stock.encode(text)
            assert parsed.ids == xgen_tokenizer.encode(text, control=True)
            assert stock.decode(parsed.ids, skip_special_tokens=False) == text
        stock.encode_special_tokens = True
        for text in random_texts(1000, seed=12):
            assert stock.encode(text).ids == xgen_tokenizer.encode(text)

    def test_saved_and_loaded_it_is_the_same(self, xgen_tokenizer: Tokenizer, tmp_path: Path) -> None:
        xgen_tokenizer.save(tmp_path / "mine.json")
        loaded = load_tokenizer(str(tmp_path / "mine.json"))
        assert loaded.fingerprint == xgen_tokenizer.fingerprint
        assert (loaded.size, loaded.end_of_text) == (50313, 50256)
        assert loaded.encode("    x<fim_pad>") == xgen_tokenizer.encode("    x<fim_pad>")
        assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]

    def test_the_fingerprint_tells_tokenizers_apart_and_ignores_layout(self, tmp_path: Path) -> None:
        document = foreign("merged")
        first = load(document, tmp_path, "</s>").fingerprint
        (tmp_path / "tokenizer.json").write_text(json.dumps(document, indent=4, sort_keys=True), encoding="utf-8")
        assert load_tokenizer(str(tmp_path), "</s>").fingerprint == first
        document["model"]["merges"].pop()
        assert load(document, tmp_path, "</s>").fingerprint != first

    def test_truncation_padding_and_dropout_are_switched_off(self, tmp_path: Path) -> None:
        document = foreign("merged")
        document["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
        document["padding"] = {
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        }
        document["model"]["dropout"] = 0.5
        tokenizer = load(document, tmp_path, "</s>")
        for control in (False, True):
            assert {len(tokenizer.encode("</</</</", control=control)) for _ in range(50)} == {4}

    def test_nothing_is_added_around_the_text(self, tmp_path: Path) -> None:
        document = foreign("merged")
        piece = {"Sequence": {"id": "A", "type_id": 0}}
        document["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}, piece],
            "pair": [piece, piece],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [256], "tokens": ["</s>"]}},
        }
        tokenizer = load(document, tmp_path, "</s>")
        assert tokenizer.encode("a") == tokenizer.encode("a", control=True) == [64]

    def test_a_file_that_cannot_be_written_is_an_error(self, xgen_tokenizer: Tokenizer, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match=r"nowhere/mine\.json"):
            xgen_tokenizer.save(tmp_path / "nowhere" / "mine.json")


class TestErrors:
    def test_no_end_of_text_names_the_candidates_and_the_key(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"'<\|endoftext\|>'.*tokenizer\.end_of_text.*</s>"):
            load(foreign("merged"), tmp_path)

    def test_of_many_control_tokens_the_likely_ones_come_first(self, tmp_path: Path) -> None:
        names = [*(f"<reserved_{place}>" for place in range(20)), "<|eot_id|>"]
        letters = {c: place for place, c in enumerate(ALPHABET.values())}
        vocab = letters | {token: 256 + place for place, token in enumerate(names)}
        with pytest.raises(DataError, match=r"tokens: <\|eot_id\|>, <reserved_0>, .* and 9 more"):
            load(byte_level_document(vocab, [], names), tmp_path)

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "{",
            "[]",
            "<html></html>",
            "null",
            '{"model_max_length": 8192}',
            '{"model": {"vocab": 3}, "added_tokens": []}',
        ],
    )
    def test_something_else_than_a_tokenizer(self, content: str, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.json"
        path.write_text(content)
        with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer\.json"):
            load_tokenizer(str(path))
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(DataError, match="is not a tokenizer"):
            load_tokenizer(str(path))

    def test_nothing_there(self, tmp_path: Path) -> None:
        for name in (tmp_path / "none.json", tmp_path):
            with pytest.raises(DataError, match=f"there is no tokenizer {name}"):
                load_tokenizer(str(name))

    def test_ids_that_contradict_each_other(self, tmp_path: Path) -> None:
        document = foreign("with more text tokens")
        document["added_tokens"][0]["id"] = 400
        with pytest.raises(DataError, match=r"'</s>' has id 400, but it comes out as 256"):
            load(document, tmp_path, "</s>")

    def test_a_model_of_another_type(self, tmp_path: Path) -> None:
        document = foreign("merged")
        document["model"]["type"] = "Morse"
        with pytest.raises(DataError, match="'Morse'; known are BPE"):
            load(document, tmp_path, "</s>")


class TestBrokenInside:
    """Files that parse as tokenizer.json and hold something that the tokenizers library stumbles over."""

    @pytest.mark.parametrize(
        ("place", "value", "says"),
        [
            (("model", "merges"), [["t", "zz"]], "out of vocabulary"),
            (("model", "merges"), [3], "cannot be used"),
            (("model", "vocab", "a"), -1, "cannot be used"),
            (("model", "vocab", "a"), 64.5, "cannot be used"),
            (("model", "vocab", "a"), 1 << 31, r"has an id 2147483648; at most 16777215"),
            (("model", "vocab", "a"), 5, "two tokens with one id"),
            (("model", "continuing_subword_prefix"), "#" * 40, "cannot be used"),  # the library panics
            (("pre_tokenizer",), {"type": "Nonesuch"}, "cannot be used"),
            (
                ("pre_tokenizer",),
                {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"},
                "cannot be used",
            ),
            (("pre_tokenizer",), 3, "in its pre_tokenizer is a step without a type"),
            (("decoder",), {"decoders": [{}]}, "in its decoder is a step without a type"),
            (("added_tokens", 0, "content"), None, "cannot be used"),
            (("added_tokens", 0, "single_word"), "x", "cannot be used"),
        ],
    )
    def test_is_an_error(self, place: tuple[str | int, ...], value: object, says: str, tmp_path: Path) -> None:
        document = part = foreign("merged")
        for step in place[:-1]:
            part = part[step]  # type: ignore[index]
        part[place[-1]] = value  # type: ignore[index]
        with pytest.raises(DataError, match=says):
            load(document, tmp_path, "</s>")

    def test_nesting_without_end(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text('{"model": ' + "[" * 200_000)
        with pytest.raises(DataError, match="is not a tokenizer"):
            load_tokenizer(str(tmp_path))

    def test_what_only_encoding_meets(self, tmp_path: Path) -> None:
        document = foreign("Unigram")
        document["model"]["unk_id"] = None
        with pytest.raises(DataError, match="cannot be used"):
            load(document, tmp_path, "</s>").encode("z")

    def test_anything_in_any_place_is_an_error_or_a_tokenizer(self, tmp_path: Path) -> None:
        draw = random.Random(14)
        kinds = ("merged", "Unigram", "with more text tokens", "WordLevel")
        values = (
            None,
            True,
            -1,
            3,
            1 << 40,
            1.5,
            "",
            "</s>",
            "\ud800",
            [],
            {},
            [[]],
            {"type": "X"},
            "ByteLevel",
            "BPE",
        )
        for _ in range(400):
            document = foreign(draw.choice(kinds))
            for _ in range(draw.randint(1, 2)):
                part: Any = document
                while isinstance(part, dict | list) and part:
                    key = draw.choice(list(part) if isinstance(part, dict) else range(len(part)))
                    if not isinstance(part[key], dict | list) or not part[key] or draw.random() < 0.3:
                        part[key] = draw.choice(values)
                        break
                    part = part[key]
            try:
                tokenizer = load(document, tmp_path, "</s>")
                tokenizer.decode(tokenizer.encode("a </s> ab", control=draw.random() < 0.5))
            except DataError:
                pass


def test_embedding_rows(tmp_path: Path) -> None:
    assert embedding_rows("xgen") == 51200
    assert [embedding_rows(f"bpe:{size}") for size in (1024, 1025)] == [1024, 1152]
    (tmp_path / "tokenizer.json").write_text(json.dumps(foreign("merged")))
    assert embedding_rows(str(tmp_path)) == 384
    with pytest.raises(DataError, match="there is no tokenizer store"):
        embedding_rows("store")
