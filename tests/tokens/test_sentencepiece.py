"""`tokenizer.model` read as a `tokenizer.json` document gives SentencePiece's own ids and texts.

`data/sentencepiece.model` is a BPE of 520 pieces that SentencePiece 0.2.3 learnt from `sample_texts`, with one
user-defined piece; `data/sentencepiece_ids.jsonl` has its ids of some texts. By design texts differ in two things:
unknown characters and control tokens decode to their names (SentencePiece: " ⁇ " and nothing), and a text that is
nothing but a user-defined piece gets no ▁ before it.
"""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
from packages import mistral_tokenizer
from sample_texts import CODE, LANGUAGES, random_texts

from xgen.errors import DataError
from xgen.tokens.sentencepiece import LARGEST_FILE, LONGEST_PIECE, Kind, document_of
from xgen.tokens.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"
MODEL = DATA / "sentencepiece.model"
UNIGRAM, BPE, WORD = 1, 2, 3
BYTES = [(f"<0x{byte:02X}>", 0.0, Kind.BYTE) for byte in range(256)]
SPECIAL = [("<unk>", 0.0, Kind.UNKNOWN), ("<s>", 0.0, Kind.CONTROL), ("</s>", 0.0, Kind.CONTROL)]


def varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def field(number: int, value: int | float | bytes | str) -> bytes:
    """A field as protocol buffers write it."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def model(
    pieces: list[tuple[str, float, Kind]], kind: int = BPE, trainer: bytes = b"", normaliser: bytes = field(4, 0)
) -> bytes:
    """A SentencePiece model written by hand; extra spaces are kept unless `normaliser` says otherwise."""
    written = (field(1, field(1, text) + field(2, score) + field(3, int(of))) for text, score, of in pieces)
    return b"".join(written) + field(2, field(3, kind) + trainer) + field(3, normaliser)


def normal(*texts: str, score: float | None = None) -> list[tuple[str, float, Kind]]:
    """Normal pieces, each one worse than the one before unless all have one `score`."""
    return [(text, -1.0 - place if score is None else score, Kind.NORMAL) for place, text in enumerate(texts)]


def load(data: bytes, folder: Path) -> Tokenizer:
    path = folder / "tokenizer.model"
    path.write_bytes(data)
    return Tokenizer(document_of(path), "test", "</s>")


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.token_bytes(index).decode() for index in tokenizer.encode(text)]


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer(document_of(MODEL), "tiny", "</s>")


class TestTinyModel:
    def test_ids_are_sentencepieces(self, tiny: Tokenizer) -> None:
        rows = [json.loads(line) for line in (DATA / "sentencepiece_ids.jsonl").read_text().splitlines()]
        assert len(rows) > 40
        for row in rows:
            assert tiny.encode(row["text"]) == row["ids"], row["text"]

    def test_texts_come_back(self, tiny: Tokenizer) -> None:
        for text in random_texts(300, seed=1):
            # ▁ is how SentencePiece writes a space: both come back as one.
            assert tiny.decode(tiny.encode(text)) == text.replace("▁", " ")

    def test_joins_follow_scores_from_the_left(self, tiny: Tokenizer) -> None:
        """Against SentencePiece's rule word by word: the best piece two neighbours make, leftmost first."""
        scores = scores_of(MODEL)
        for text in random_texts(150, seed=2):
            text = text[:40].replace("[X]", "")
            assert tiny.encode(text) == joined(text, scores), text

    def test_control_tokens_are_out_of_reach_of_text(self, tiny: Tokenizer) -> None:
        assert {0, 1, 2}.isdisjoint(tiny.encode("<unk><s></s> </s>"))
        assert tiny.encode("</s>", control=True) == [2]
        assert tiny.decode(tiny.encode("<s></s>")) == "<s></s>"
        assert tiny.decode(tiny.encode("<0x0A>")) == "<0x0A>"

    def test_broken_bytes_spoil_nothing_beside_them(self, tiny: Tokenizer) -> None:
        byte = {tiny.token_bytes(index): index for index in range(4, 260)}
        spelt = [byte[bytes([value])] for value in "é".encode() + b"\xff" + "ü".encode()]
        assert tiny.decode(spelt) == "é\ufffdü"

    def test_only_a_texts_start_gets_a_space(self, tiny: Tokenizer) -> None:
        assert pieces_of(tiny, "a[X]a") == [" a", "[X]", "a"]
        assert pieces_of(tiny, "[X]a") == [" ", "[X]", "a"]


def scores_of(path: Path) -> dict[str, tuple[int, float]]:
    """Normal piece -> id and score."""
    document = document_of(path)
    vocab = document["model"]["vocab"]
    # The trainer scores merged pieces 0, -1, -2, ... in order of their ids.
    return {piece: (index, -float(index)) for piece, index in vocab.items() if index >= 260}


def joined(text: str, scores: dict[str, tuple[int, float]]) -> list[int]:
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        known = [
            (scores[pair][1], -place)
            for place in range(len(parts) - 1)
            if (pair := parts[place] + parts[place + 1]) in scores
        ]
        if not known:
            break
        place = -max(known)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return [
        index
        for part in parts
        for index in ([scores[part][0]] if part in scores else [4 + byte for byte in part.encode()])
    ]


class TestSettings:
    def test_runs_that_share_a_score_grow_from_the_left(self, tmp_path: Path) -> None:
        """As Mistral's spaces, all scored -1e9."""
        draw = random.Random(7)
        for _ in range(20):
            runs = ["▁" * length for length in sorted(draw.sample(range(2, 17), draw.randint(1, 12)))]
            words = normal("a", "▁", "▁a")
            tokenizer = load(model(SPECIAL + words + normal(*runs, score=-1e9)), tmp_path)
            scores = {piece: (3 + place, score) for place, (piece, score, _) in enumerate(words)}
            scores |= {run: (6 + place, -1e9) for place, run in enumerate(runs)}
            for text in [" " * spaces for spaces in range(40)] + ["a" + " " * spaces + "a" for spaces in range(40)]:
                assert tokenizer.encode(text) == joined(text, scores)

    def test_no_space_is_put_first(self, tmp_path: Path) -> None:
        tokenizer = load(model(SPECIAL + normal("a", "▁", "▁a"), normaliser=field(3, 0) + field(4, 0)), tmp_path)
        assert pieces_of(tokenizer, "a a") == ["a", " a"]
        assert tokenizer.decode(tokenizer.encode(" a")) == " a"

    def test_extra_spaces_are_taken_out(self, tmp_path: Path) -> None:
        tokenizer = load(model(SPECIAL + normal("a", "▁", "▁a"), normaliser=b""), tmp_path)
        assert pieces_of(tokenizer, "  a   a ▁ ") == [" a", " a"]
        assert tokenizer.encode("  ") == []

    def test_without_bytes_there_is_the_unknown_token(self, tmp_path: Path) -> None:
        tokenizer = load(model(SPECIAL + normal("a", "▁", "▁a")), tmp_path)
        assert tokenizer.encode("aéü") == [5, 0]
        assert tokenizer.decode([5, 0]) == "a<unk>"

    def test_unigram_takes_the_likeliest_pieces(self, tmp_path: Path) -> None:
        pieces = [*SPECIAL, *BYTES, *normal("▁", "a", "b", *"<0xA>/s", score=-3.0), *normal("ab", score=-4.0)]
        tokenizer = load(model(pieces, UNIGRAM, field(35, 1)), tmp_path)
        assert pieces_of(tokenizer, "abb") == [" ", "ab", "b"]
        assert tokenizer.decode(tokenizer.encode("<0x0A>é</s>")) == "<0x0A>é</s>"
        assert tokenizer.encode("\n") == [259, 3 + 10]

    def test_unigrams_unknown_token_is_out_of_reach_of_text(self, tmp_path: Path) -> None:
        pieces = [*SPECIAL, *normal("▁", "<", "u", "n", "k", ">", score=-3.0)]
        tokenizer = load(model(pieces, UNIGRAM), tmp_path)
        assert pieces_of(tokenizer, "<unk>") == [" ", "<", "u", "n", "k", ">"]
        assert tokenizer.encode("é") == [3, 0]


class TestRefusals:
    @pytest.mark.parametrize(
        ("data", "says"),
        [
            (b"", "no pieces"),
            (b"\x0b", "no protocol buffer"),
            (b"\x0a\x7f", "ends within a field"),
            (b"\x08", "ends within a number"),
            (b"\xff" * 12, "over ten bytes"),
            (b"PK\x03\x04 a zip file", "no protocol buffer"),
            (field(1, 7), "field 1 holds no messages"),
            (field(1, field(1, b"\xff")), "utf-8"),
            (field(1, field(1, "a") + field(2, float("nan"))), "not a number"),
            (field(1, field(1, "a") + field(3, 9)), "9 is not a valid Kind"),
            (field(1, field(1, "a") + field(3, "x")), "field 3 .* wrong type"),
            (model(normal("a", "a")), "the same piece twice"),
            (model(normal("a", "")), "empty piece"),
            (model(SPECIAL + normal("a"), WORD), "model type is 3"),
            (model(SPECIAL + normal("a"), trainer=field(35, 1)), "not all of <0x00>"),
            (model(SPECIAL + normal("a"), trainer=field(24, 1)), "after words"),
            (model(SPECIAL + normal("a"), normaliser=field(5, 0)), "leaves them as they are"),
            (model(SPECIAL + normal("a"), normaliser=field(1, "nmt_nfkc") + field(2, b"x")), "'nmt_nfkc' rewrites"),
            (model(SPECIAL + normal("a", "b", "c") + normal("ab", "bc", score=-9.0)), "2 pieces have the score -9"),
            (model([*SPECIAL, *normal("a"), ("aa", -9.0, Kind.UNUSED)]), "unused piece 'aa'"),
            (model([*SPECIAL, *normal("a"), ("b", -9.0, Kind.UNUSED)], UNIGRAM), "unused pieces"),
            (model(SPECIAL + normal("a" * (LONGEST_PIECE + 1))), "257 characters"),
        ],
    )
    def test_each_names_what_is_wrong(self, data: bytes, says: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=rf"tokenizer\.model is no SentencePiece model that can be used: .*{says}"):
            load(data, tmp_path)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"cannot read the tokenizer .*none\.model: No such file"):
            document_of(tmp_path / "none.model")

    def test_a_huge_file_is_not_read(self, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.model"
        with path.open("wb") as file:
            file.truncate(LARGEST_FILE * 1000)
        with pytest.raises(DataError, match="larger than"):
            document_of(path)

    def test_damage_anywhere_is_an_error_or_another_tokenizer(self, tmp_path: Path) -> None:
        draw = random.Random(3)
        whole = MODEL.read_bytes()
        for _ in range(150):
            data = bytearray(whole[: draw.choice((len(whole), draw.randrange(len(whole))))])
            for _ in range(draw.choice((0, 1, 30))):
                data[draw.randrange(len(data))] = draw.randrange(256)
            try:
                tokenizer = load(bytes(data), tmp_path)
            except DataError:
                continue
            tokenizer.decode(tokenizer.encode("a  [X]é</s>"))


def texts_and_runs(count: int) -> list[str]:
    """Random texts, and runs of every length that pieces can tile in many ways."""
    runs = [pattern * length for pattern in (" ", "a", "ab", "  b", "=", "\n", "▁") for length in range(60)]
    return [*random_texts(count, seed=4), *runs]


@pytest.mark.oracle
@pytest.mark.slow
class TestAgainstSentencePiece:
    @pytest.mark.parametrize("version", ["v1", "v7"])
    def test_mistrals(self, version: str) -> None:
        self.equal(mistral_tokenizer(version))

    @pytest.mark.parametrize("kind", ["bpe", "unigram"])
    @pytest.mark.parametrize("squeeze", [False, True])
    @pytest.mark.parametrize("bytes_fall_back", [False, True])
    def test_trained(self, kind: str, squeeze: bool, bytes_fall_back: bool, tmp_path: Path) -> None:
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*LANGUAGES.values(), *"".join(CODE).splitlines()] * 9),
            model_prefix=str(tmp_path / "trained"),
            model_type=kind,
            vocab_size=700,
            normalization_rule_name="identity",
            remove_extra_whitespaces=squeeze,
            add_dummy_prefix=squeeze == bytes_fall_back,
            byte_fallback=bytes_fall_back,
            user_defined_symbols=["[REF]", "<|im_start|>"] if kind == "bpe" else [],
            hard_vocab_limit=False,
            minloglevel=2,
        )
        self.equal(tmp_path / "trained.model", unigram=kind == "unigram")

    def equal(self, path: Path, unigram: bool = False) -> None:
        import sentencepiece

        theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
        ours = Tokenizer(document_of(path), "test", "</s>")
        texts = [text for text in texts_and_runs(10_000) if text.strip() not in ("[REF]", "<|im_start|>")]
        tied = 0
        for text, ids, got in zip(texts, theirs.encode(texts), ours.encode_batch(texts), strict=True):
            if got != ids:
                # SentencePiece sums Unigram's scores in float32: of the same pieces in two orders it may take another.
                assert unigram, text
                assert sorted(got) == sorted(ids), text
                tied += 1
            # Where extra spaces are taken out, SentencePiece takes a ▁ that the text itself had for one.
            if theirs.unk_id() not in ids and "▁" not in text:
                assert ours.decode(ids) == theirs.decode(ids), text
        assert tied < len(texts) / 20

    def test_transformers_too(self, tmp_path: Path) -> None:
        """AutoTokenizer reads our document alike. What transformers makes of the same file itself differs: no ▁ before
        a text that begins with a space, nor after a control token; and it orders merges by ids instead of scores, so
        that runs of spaces take the next word's from it, which SentencePiece's do not."""
        import transformers

        source = mistral_tokenizer("v1")
        ours = Tokenizer(document_of(source), "test", "</s>")
        ours.save(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        (tmp_path / "own").mkdir()
        (tmp_path / "own" / "tokenizer.model").write_bytes(source.read_bytes())
        alike = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
        own = transformers.LlamaTokenizer.from_pretrained(str(tmp_path / "own"))
        compared = 0
        for text in random_texts(2000, seed=5):
            ids = ours.encode(text, control=True)
            assert alike.encode(text, add_special_tokens=False) == ids
            if not text.startswith((" ", "▁")) and not {0, 1, 2}.intersection(ids) and "  " not in text:
                assert own.encode(text, add_special_tokens=False) == ids, text
                compared += 1
        assert compared > 1000
