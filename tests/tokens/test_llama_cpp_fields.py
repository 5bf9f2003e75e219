"""Tokenizers written into GGUF's fields and read back are the same; what llama.cpp would do otherwise is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sample_texts import random_texts

from xgen.errors import DataError
from xgen.tokens.bytelevel import ALPHABET, byte_level_document
from xgen.tokens.document import added_token
from xgen.tokens.llama_cpp import PRE_TOKENIZERS, GgufTokens, from_gguf, to_gguf
from xgen.tokens.sentencepiece import document_of
from xgen.tokens.tokenizer import Tokenizer
from xgen.tokens.xgen import xgen_document

MODEL = Path(__file__).parent / "data" / "sentencepiece.model"
SPLITS = [name for name in PRE_TOKENIZERS if name not in ("starcoder", "refact", "llama3", "llama-v3", "smaug-bpe")]


def bytes_document(pre: str = "gpt-2") -> dict[str, Any]:
    """A document over bytes with a user-defined token, split as llama.cpp splits under the name `pre`."""
    vocab = {character: place for place, character in enumerate(ALPHABET.values())}
    merges = [("1", "2"), ("12", "3"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ċ", "Ċ"), ("'", "L")]
    for token in (*map("".join, merges), "</s>", "<think>"):
        vocab[token] = len(vocab)
    document = byte_level_document(vocab, merges, ["</s>"])
    document["added_tokens"].append(added_token(vocab["<think>"], "<think>", special=False))
    fields = to_gguf(document, 512)
    return from_gguf(replace(fields, pre=pre))


def pieces_document() -> dict[str, Any]:
    return document_of(MODEL)


def same(first: dict[str, Any], second: dict[str, Any], end_of_text: str) -> None:
    one, two = Tokenizer(first, "one", end_of_text), Tokenizer(second, "two", end_of_text)
    assert (one.size, one.end_of_text) == (two.size, two.end_of_text)
    assert one.byte_lengths.tolist() == two.byte_lengths.tolist()
    for text in random_texts(200, seed=31):
        # llama.cpp puts a ▁ after a user-defined token too.
        text = text.replace("[X]", "")
        ids = one.encode(text)
        assert two.encode(text) == ids, text
        assert two.decode(ids) == one.decode(ids)


class TestBothWays:
    def test_xgens(self) -> None:
        fields = to_gguf(xgen_document(), 51_200)
        assert (fields.model, fields.pre, fields.scores, fields.add_space_prefix) == ("gpt2", "gpt-2", None, None)
        assert Counter(fields.types) == {1: 50_313 - 19, 3: 19, 5: 887}
        assert fields.tokens[50_312:50_314] == ["<reponame>", "[PAD50313]"]
        same(xgen_document(), from_gguf(fields), "<|endoftext|>")

    @pytest.mark.parametrize("pre", SPLITS)
    def test_each_split(self, pre: str) -> None:
        document = bytes_document(pre)
        fields = to_gguf(document, 384)
        assert fields.pre == pre
        assert (fields.types[263], fields.types[264], fields.types[265]) == (3, 4, 5)
        assert from_gguf(fields) == document

    def test_names_of_equal_splits_are_read_alike(self) -> None:
        for name, twin in (
            ("starcoder", "smollm"),
            ("refact", "smollm"),
            ("llama3", "llama-bpe"),
            ("smaug-bpe", "dbrx"),
        ):
            assert bytes_document(name) == bytes_document(twin)

    def test_splits_differ_where_they_should(self) -> None:
        """The digit trap: smollm takes digits one by one, Llama 3 by three, GPT-2 takes all."""
        pieces = {
            name: [tokenizer.token_bytes(index) for index in tokenizer.encode("1234 the'LL")]
            for name in SPLITS
            if (tokenizer := Tokenizer(bytes_document(name), name, "</s>"))
        }
        assert pieces["gpt-2"] == [b"123", b"4", b" the", b"'", b"L", b"L"]
        assert pieces["smollm"] == [b"1", b"2", b"3", b"4", b" the", b"'", b"L", b"L"]
        assert pieces["llama-bpe"] == [b"123", b"4", b" the", b"'L", b"L"]
        assert pieces["qwen2"] == [b"1", b"2", b"3", b"4", b" the", b"'L", b"L"]
        assert pieces["default"] == [b"123", b"4", b" the", b"'", b"L", b"L"]

    def test_ignore_merges_goes_by_the_name(self) -> None:
        document = bytes_document("llama-bpe")
        vocab = document["model"]["vocab"]
        vocab["hut"] = 265
        for ignore, ids in ((True, [265]), (False, [vocab["h"], vocab["u"], vocab["t"]])):
            document["model"]["ignore_merges"] = ignore
            fields = to_gguf(document, 384)
            assert fields.pre == ("llama-bpe" if ignore else "dbrx")
            assert Tokenizer(from_gguf(fields), "test", "</s>").encode("hut") == ids

    def test_sentencepieces(self) -> None:
        fields = to_gguf(pieces_document(), 640)
        assert (fields.model, fields.merges, fields.add_space_prefix) == ("llama", None, True)
        assert Counter(fields.types) == {1: 260, 2: 1, 3: 2, 4: 1, 5: 120, 6: 256}
        same(pieces_document(), from_gguf(fields), "</s>")

    def test_sentencepieces_as_transformers_writes_them(self) -> None:
        """Metaspace for the normalizer, merges as strings, no ▁ before a text."""
        document = pieces_document()
        plain = from_gguf(to_gguf(document, 640))
        document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
        space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
        for scheme, prefix in (("first", True), ("always", True), ("never", False)):
            space["prepend_scheme"] = scheme
            fields = to_gguf(document | {"normalizer": None, "pre_tokenizer": space}, 640)
            assert fields.add_space_prefix is prefix
        assert from_gguf(fields)["model"] == plain["model"]
        assert Tokenizer(from_gguf(fields), "test", "</s>").encode("é") != Tokenizer(plain, "test", "</s>").encode("é")

    def test_holes_and_the_name_of_a_pad_that_is_taken(self) -> None:
        document = bytes_document()
        document["model"]["vocab"] |= {"[PAD266]": 267}
        fields = to_gguf(document, 384)
        assert len(set(fields.tokens)) == 384
        assert (fields.types[265], fields.types[266], fields.types[267], fields.types[268]) == (5, 5, 1, 5)
        back = Tokenizer(from_gguf(fields), "test", "</s>")
        assert back.size == 268
        assert back.decode([266, 267]) == "\ufffd[PAD266]"


def changed(document: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return document | parts


class TestExportRefusals:
    @pytest.mark.parametrize(
        ("parts", "says"),
        [
            ({"normalizer": {"type": "NFC"}}, r'normalises no text .*\{"type": "NFC"\}'),
            ({"pre_tokenizer": {"type": "Whitespace"}}, r'no name for this pre-tokenizer .*\{"type": "Whitespace"\}'),
            ({"pre_tokenizer": None}, "no name for this pre-tokenizer .*null"),
            (
                {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
                '"add_prefix_space": true',
            ),
            ({"added_tokens": [added_token(263, "</s>", True) | {"lstrip": True}]}, "'</s>' takes in spaces"),
        ],
    )
    def test_over_bytes(self, parts: dict[str, Any], says: str) -> None:
        with pytest.raises(DataError, match=says):
            to_gguf(changed(bytes_document(), **parts), 384)

    def test_gpt2s_split_with_merges_ignored(self) -> None:
        document = bytes_document()
        document["model"]["ignore_merges"] = True
        with pytest.raises(DataError, match="no name for this pre-tokenizer with ignore_merges True"):
            to_gguf(document, 384)

    def test_rows_that_do_not_suffice(self) -> None:
        with pytest.raises(DataError, match="265 tokens with ids up to 264 does not fit 264 rows"):
            to_gguf(bytes_document(), 264)

    @pytest.mark.parametrize(
        ("parts", "says"),
        [
            ({"normalizer": {"type": "Lowercase"}}, '"type": "Lowercase"'),
            ({"normalizer": None}, "something else: normalizer null, pre_tokenizer null"),
            (
                {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "split": True}},
                '"split": true',
            ),
        ],
    )
    def test_sentencepieces_text(self, parts: dict[str, Any], says: str) -> None:
        with pytest.raises(DataError, match=says):
            to_gguf(changed(pieces_document(), **parts), 640)

    def test_sentencepieces_merges_that_are_not_all_splits_in_order(self) -> None:
        document = pieces_document()
        merges = document["model"]["merges"]
        texts = ["".join(pair) for pair in merges]
        twice = next(place for place, text in enumerate(texts) if text in texts[:place])
        document["model"]["merges"] = merges[:twice] + merges[twice + 1 :]
        with pytest.raises(DataError, match="is none of them"):
            to_gguf(document, 640)
        document["model"]["merges"] = [merges[twice], *merges[:twice], *merges[twice + 1 :]]
        with pytest.raises(DataError, match="in another: those of"):
            to_gguf(document, 640)

    def test_other_models(self) -> None:
        document = pieces_document()
        with pytest.raises(DataError, match="of type Unigram"):
            to_gguf(changed(document, model={"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}), 640)
        document["model"]["byte_fallback"] = False
        with pytest.raises(DataError, match="no pieces <0x00> to <0xFF>, does not fall back"):
            to_gguf(document, 640)


class TestImportRefusals:
    @pytest.mark.parametrize(
        ("parts", "says"),
        [
            ({"model": "t5"}, "of model 't5'; known are"),
            ({"merges": None}, "'gpt2' without merges"),
            ({"pre": "chatglm-bpe"}, "'chatglm-bpe', which is not known here; known are gpt-2, smollm"),
            ({"types": [1]}, "4 tokens, 1 types, 4 scores"),
            ({"types": [1, 1, 1, 9]}, "type 9; known are 1 to 6"),
            ({"tokens": ["a", "a", "b", "</s>"]}, "the same token twice"),
            ({"types": [5, 5, 5, 5]}, "no token"),
            ({"merges": ["a b c"]}, "a merge of 3 parts: 'a b c'"),
            ({"model": "llama"}, "without scores"),
            ({"model": "llama", "scores": [0.0]}, "4 tokens, 4 types, 1 scores"),
            ({"model": "llama", "scores": [0.0] * 4, "types": [1, 1, 6, 3]}, "not all of <0x00>"),
        ],
    )
    def test_each_names_what_is_wrong(self, parts: dict[str, Any], says: str) -> None:
        fields = GgufTokens("gpt2", "gpt-2", ["a", "b", "ab", "</s>"], [1, 1, 1, 3], None, ["a b"], None)
        assert from_gguf(fields)["model"]["vocab"] == {"a": 0, "b": 1, "ab": 2, "</s>": 3}
        with pytest.raises(DataError, match=says):
            from_gguf(replace(fields, **parts))

    def test_scores_that_do_not_order_the_pieces(self) -> None:
        fields = to_gguf(pieces_document(), 640)
        with pytest.raises(DataError, match="pieces have the score 0, as"):
            from_gguf(replace(fields, scores=[0.0] * 640))

    def test_merges_of_what_is_no_token(self) -> None:
        fields = GgufTokens("gpt2", "gpt-2", ["a", "b", "</s>"], [1, 1, 3], None, ["a b"], None)
        with pytest.raises(DataError, match="out of vocabulary"):
            Tokenizer(from_gguf(fields), "test", "</s>")
