"""Text given piece by piece is the text given at once, whatever the tokens; and stops where it should.

The oracle is `Tokenizer.decode` of all ids and a search of the whole text for stop strings.
"""

from __future__ import annotations

import codecs
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sample_texts import EMOJI, LANGUAGES, random_texts

from xgen.errors import DataError
from xgen.infer.text import TextStream
from xgen.tokens.bytelevel import byte_level_document
from xgen.tokens.sentencepiece import document_of
from xgen.tokens.tokenizer import Tokenizer, load_tokenizer

SENTENCEPIECE = Path(__file__).parent.parent / "tokens" / "data" / "sentencepiece.model"
WORDS = {"</s>": 0, "##ing": 1, "do": 2, "▁the": 3, "▁": 4, "cat</w>": 5, ".": 6, "n't": 7, "▁▁a▁": 8, "é": 9, "'s": 10}
DECODERS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "WordPiece": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "Metaspace": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "BPEDecoder": {"type": "BPEDecoder", "suffix": "</w>"},
    "steps": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "WordPiece", "prefix": "##", "cleanup": False},
        ],
    },
    # The last two look at the whole text.
    "stripped": {
        "type": "Sequence",
        "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": ".", "start": 0, "stop": 1}],
    },
    "bytes": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
}


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "xgen":
        return load_tokenizer("xgen")
    document = document_of(SENTENCEPIECE)
    if kind == "unstripped":
        document["decoder"]["decoders"].pop()
    if kind in DECODERS:
        document = byte_level_document({"</s>": 0}, [], ["</s>"]) | {"pre_tokenizer": None, "post_processor": None}
        vocabulary = WORDS | {f"<0x{byte:02X}>": 20 + byte for byte in range(0x80, 0x100)}
        document |= {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "</s>"}}
        document |= {"decoder": DECODERS[kind]}
    return Tokenizer(document, kind, "<|endoftext|>" if kind == "xgen" else "</s>")


@cache
def byte_ids(kind: str) -> dict[int, int]:
    tokenizer = tokenizer_of(kind)
    pieces = {tokenizer.token_bytes(index): index for index in reversed(range(tokenizer.size))}
    return {byte: pieces[bytes([byte])] for byte in range(256)}


def streamed(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop)
    return [*(stream.push(index) for index in ids), stream.flush()], stream


def random_ids(kind: str, count: int, seed: int) -> list[list[int]]:
    """Sequences that are hard: texts of many scripts byte by byte or in the tokenizer's pieces, with bytes lost, added
    or swapped; any ids at all, control tokens and ids without a token among them."""
    draw = random.Random(seed)
    tokenizer = tokenizer_of(kind)
    fragments = [*EMOJI, *LANGUAGES.values(), *random_texts(200, seed)]
    sequences = []
    for _ in range(count):
        text = "".join(draw.choices(fragments, k=draw.randint(1, 3)))[: draw.randint(1, 60)]
        way = draw.randrange(4)
        if way == 0:
            ids = [byte_ids(kind)[byte] for byte in text.encode()]
        elif way == 1:
            data = bytearray(text.encode())
            for _ in range(draw.randint(1, 5)):
                data.insert(draw.randint(0, len(data)), draw.choice((0x80, 0xC3, 0xE2, 0xED, 0xF0, 0xFF, 0xC0, 0xA0)))
                del data[draw.randrange(len(data))]
            ids = [byte_ids(kind)[byte] for byte in data]
        elif way == 2:
            ids = tokenizer.encode(text.replace("\U0010ffff", ""))
        else:
            ids = [draw.randrange(tokenizer.size + 40) for _ in range(draw.randint(0, 30))]
        if way < 3 and draw.random() < 0.3:
            ids.insert(draw.randint(0, len(ids)), draw.randrange(tokenizer.size + 40))
        sequences.append(ids)
    return sequences


class TestJoined:
    @pytest.mark.parametrize("kind", ["xgen", "sentencepiece", "unstripped"])
    def test_pieces_make_the_full_text(self, kind: str) -> None:
        tokenizer = tokenizer_of(kind)
        for ids in random_ids(kind, 700, seed=1):
            pieces, stream = streamed(tokenizer, ids)
            assert "".join(pieces) == tokenizer.decode(ids)
            assert stream.stopped is None

    @pytest.mark.parametrize("kind", ["xgen", "sentencepiece"])
    def test_every_byte_beside_every_kind_of_byte(self, kind: str) -> None:
        tokenizer = tokenizer_of(kind)
        marks = b"\x20\x41\x80\x9f\xa0\xbf\xc1\xc3\xe0\xe2\xed\xef\xf0\xf4\xf5\xff"
        for first in range(256):
            for second in marks:
                for third in (0x41, 0x80, 0xBF):
                    ids = [byte_ids(kind)[byte] for byte in (first, second, third)]
                    assert "".join(streamed(tokenizer, ids)[0]) == tokenizer.decode(ids)

    @pytest.mark.parametrize("kind", DECODERS)
    def test_whatever_the_decoder(self, kind: str) -> None:
        tokenizer = tokenizer_of(kind)
        draw = random.Random(4)
        known = [*WORDS.values(), *WORDS.values(), 15, 999, *(20 + byte for byte in "€é".encode()), 20 + 0xFF]
        for _ in range(300):
            ids = draw.choices(known, k=draw.randint(0, 12))
            assert "".join(streamed(tokenizer, ids)[0]) == tokenizer.decode(ids)

    @pytest.mark.parametrize("kind", ["none", "WordPiece", "Metaspace", "BPEDecoder", "steps"])
    def test_words_do_not_wait_for_the_end(self, kind: str) -> None:
        pieces, _ = streamed(tokenizer_of(kind), [2, 1, 2, 6])
        assert all(pieces[:-1])
        assert pieces[-1] == ""

    @pytest.mark.parametrize("kind", ["xgen", "sentencepiece"])
    def test_a_character_comes_with_its_last_byte(self, kind: str) -> None:
        ids = [byte_ids(kind)[byte] for byte in "a😀é€".encode()]
        assert streamed(tokenizer_of(kind), ids)[0] == ["a", "", "", "", "😀", "", "é", "", "", "€", ""]

    def test_a_broken_character_is_given_up_as_soon_as_it_is_sure(self) -> None:
        ids = [byte_ids("xgen")[byte] for byte in b"\xe2\x82A\xf0\x9f\x98"]
        assert streamed(tokenizer_of("xgen"), ids)[0] == ["", "", "\ufffdA", "", "", "", "\ufffd"]

    @given(st.lists(st.binary(max_size=5), max_size=12))
    @example([b"\xf0\x9f", b"\x98\x80", b"\xed\xa0\x80"])
    def test_pythons_incremental_decoder_is_its_full_one(self, parts: list[bytes]) -> None:
        """What the stream is built on, for bytes that tokens hold in any portions."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        found = "".join(map(decoder.decode, parts)) + decoder.decode(b"", final=True)
        assert found == b"".join(parts).decode("utf-8", errors="replace")

    def test_control_tokens_are_their_names(self) -> None:
        tokenizer = tokenizer_of("xgen")
        assert "".join(streamed(tokenizer, [39, tokenizer.end_of_text, 72])[0]) == "H<|endoftext|>i"


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """`text` before the stop string that ends first, and which it is: by looking at every beginning of the text."""
    for end in range(1, len(text) + 1):
        met = [word for word in stop if text[:end].endswith(word)]
        if met:
            word = max(met, key=len)
            return text[: end - len(word)], word
    return text, None


class TestStops:
    @given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4), st.integers(0, 99))
    @example("aabaabaaab", ["aabaaa"], 0)
    def test_the_first_to_be_complete_cuts_the_text(self, text: str, stop: list[str], seed: int) -> None:
        """Strings that overlap themselves and each other, over tokens of one to three characters."""
        tokenizer, draw = tokenizer_of("xgen"), random.Random(seed)
        ids: list[int] = []
        place = 0
        while place < len(text):
            length = draw.randint(1, 3)
            ids += tokenizer.encode(text[place : place + length])
            place += length
        pieces, stream = streamed(tokenizer, ids, tuple(stop))
        assert ("".join(pieces), stream.stopped) == cut(text, tuple(stop))

    @pytest.mark.parametrize("kind", ["xgen", "sentencepiece", "WordPiece", "bytes"])
    def test_of_any_text(self, kind: str) -> None:
        """Stop strings out of the text itself and others, U+FFFD of broken bytes included."""
        tokenizer, draw = tokenizer_of(kind), random.Random(6)
        met = 0
        sequences = random_ids(kind, 500, 8) if kind in ("xgen", "sentencepiece") else word_ids()
        for ids in sequences:
            text = tokenizer.decode(ids)
            places = [draw.randint(0, len(text)) for _ in range(3)]
            stop = tuple(text[place : place + draw.randint(1, 6)] + draw.choice(("", "", "x")) for place in places)
            stop = tuple(filter(None, stop))
            pieces, stream = streamed(tokenizer, ids, stop)
            assert ("".join(pieces), stream.stopped) == cut(text, stop)
            met += stream.stopped is not None
        assert met > len(sequences) / 3

    def test_only_what_may_begin_one_is_held_back(self) -> None:
        tokenizer = tokenizer_of("xgen")
        stream = TextStream(tokenizer, ["\n\nUser:", "END"])
        text = ["Hi E", "N", "d\n", "\nUs", "ed\n\nUser", ":", " more"]
        given = ["".join(map(stream.push, tokenizer.encode(part))) for part in text]
        assert given == ["Hi ", "", "ENd", "", "\n\nUsed", "", ""]
        assert stream.stopped == "\n\nUser:"
        assert stream.flush() == ""

    def test_what_proved_no_stop_string_comes_at_the_end(self) -> None:
        tokenizer = tokenizer_of("xgen")
        pieces, stream = streamed(tokenizer, tokenizer.encode("so\n\nUse"), ("\n\nUser:",))
        assert "".join(pieces) == "so\n\nUse"
        assert pieces[-1] == "\n\nUse"
        assert stream.stopped is None

    def test_one_may_end_in_what_is_no_character(self) -> None:
        ids = [byte_ids("xgen")[byte] for byte in b"ab\xe2\x82"]
        pieces, stream = streamed(tokenizer_of("xgen"), ids, ("b\ufffd",))
        assert ("".join(pieces), stream.stopped) == ("a", "b\ufffd")

    def test_a_long_one_takes_no_longer_for_every_character(self) -> None:
        """A hundred thousand characters that nearly are the stop string: quadratic work would take minutes."""
        tokenizer = tokenizer_of("xgen")
        ids = tokenizer.encode("ab" * 50_000)
        pieces, stream = streamed(tokenizer, ids, ("ab" * 49_000 + "c", "a" * 60_000))
        assert "".join(pieces) == "ab" * 50_000
        assert stream.stopped is None

    def test_the_empty_one_is_refused(self) -> None:
        with pytest.raises(DataError, match="leave it out"):
            TextStream(tokenizer_of("xgen"), ["x", ""])


def word_ids() -> list[list[int]]:
    draw = random.Random(9)
    known = [*WORDS.values(), 999, *(20 + byte for byte in "€é".encode())]
    return [draw.choices(known, k=draw.randint(1, 12)) for _ in range(300)]
