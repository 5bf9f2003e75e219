"""llama.cpp and we give a text the same ids, from the fields we write into GGUF and from those we read out of it.

Where they differ, it is llama.cpp that differs from the tokenizer the model was trained with:

- Bytes that the vocabulary has no token for (SmolLM2 lacks 21, most of them no UTF-8): both drop the character, but the
  tokenizers library then joins its neighbours, llama.cpp does not. transformers reads the same document as we do.
- Characters newer than the Unicode tables of llama.cpp: it takes a letter of Unicode 16 for no letter. tiktoken takes
  it for one, as we do. Texts with characters that this Python does not know either are left out.
- White space beyond ASCII under "deepseek-coder": llama.cpp replaces it by a vertical tab before it looks for
  [ࠀ-一], which holds most of it.
- A ▁ after every control or user-defined token of a "llama" tokenizer; SentencePiece puts one at the text's start only.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from llama_server import LlamaServer
from packages import mistral_tokenizer
from sample_texts import CODE, LANGUAGES, random_texts

from xgen.tokens.bytelevel import ALPHABET, byte_level_document, to_bytes
from xgen.tokens.llama_cpp import PRE_TOKENIZERS, GgufTokens, from_gguf, to_gguf
from xgen.tokens.sentencepiece import document_of
from xgen.tokens.tokenizer import Tokenizer, train_bpe
from xgen.tokens.xgen import xgen_document

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

TEXTS = 10_000
WIDTH = 32
Serve = Callable[..., AbstractContextManager[LlamaServer]]
SPLITS = ("gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "deepseek-coder", "default")


def write_model(path: Path, fields: GgufTokens) -> None:
    """A LLaMA-shaped model of one layer, all zeros, with `fields` as its tokenizer."""
    rows = len(fields.tokens)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(rows)
    writer.add_tokenizer_model(fields.model)
    writer.add_tokenizer_pre(fields.pre)
    writer.add_token_list(fields.tokens)
    writer.add_token_types(fields.types)
    if fields.scores is not None:
        writer.add_token_scores(fields.scores)
    if fields.merges is not None:
        writer.add_token_merges(fields.merges)
    if fields.add_space_prefix is not None:
        writer.add_add_space_prefix(fields.add_space_prefix)
    writer.add_add_bos_token(False)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_gate", "ffn_down")
    shapes = {
        "token_embd": (rows, WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
    }
    for name, shape in (shapes | {f"blk.0.{name}": (WIDTH, WIDTH) for name in square}).items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def lines() -> Iterator[str]:
    """A little of many kinds of text to learn from."""
    for _ in range(20):
        yield from LANGUAGES.values()
        yield from CODE
    yield from (
        f"In {year} there were {year * 137} of them; they'd say 'WE'LL' {year % 100} times."
        for year in range(1500, 2000)
    )


def learnt(pre: str) -> dict[str, Any]:
    """A byte-level BPE learnt with llama.cpp's split `pre`, with Llama 3's names of control tokens."""
    control = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    letters = [*control, *ALPHABET.values()]
    empty = byte_level_document({token: place for place, token in enumerate(letters)}, [], control)
    document = from_gguf(GgufTokens(**{**vars(to_gguf(empty, 512)), "pre": pre}))
    learner = tokenizers.Tokenizer.from_str(json.dumps(document))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500, special_tokens=control, initial_alphabet=list(ALPHABET.values()), show_progress=False
    )
    learner.train_from_iterator(lines(), trainer)
    return document | {"model": json.loads(learner.to_str())["model"] | {"ignore_merges": PRE_TOKENIZERS[pre][1]}}


def fields_of(path: Path) -> GgufTokens:
    found = gguf.GGUFReader(path).fields
    read = {
        key: found[f"tokenizer.ggml.{key}"].contents() for key in ("model", "pre", "tokens", "token_type", "merges")
    }
    return GgufTokens(read["model"], read["pre"], read["tokens"], read["token_type"], None, read["merges"], None)


def newer(text: str) -> bool:
    """Whether `text` may hold characters that llama.cpp does not know yet."""
    assert unicodedata.unidata_version < "16", "this Python knows more characters than llama.cpp: name them here"
    return any(unicodedata.category(character) == "Cn" for character in text)


@pytest.fixture
def check(tmp_path: Path, llama_server: Serve) -> Callable[..., None]:
    def check(document: dict[str, Any], end_of_text: str, apart: Callable[[str], bool] = lambda _: False) -> None:
        """llama.cpp's ids are ours, but for texts that are set `apart`, and so are those of the fields read back."""
        ours = Tokenizer(document, "ours", end_of_text)
        fields = to_gguf(document, -(-ours.size // 128) * 128)
        back = Tokenizer(from_gguf(fields), "back", end_of_text)
        assert back.size == ours.size
        write_model(tmp_path / "tokens.gguf", fields)
        with llama_server(tmp_path / "tokens.gguf") as server:
            texts = filter(lambda text: not apart(text) and not newer(text), random_texts(3 * TEXTS, seed=41))
            for place, text in enumerate(itertools.islice(texts, TEXTS)):
                ids = ours.encode(text)
                assert server.tokenize(text) == ids, text
                assert back.encode(text) == ids, text
                if place % 20 == 0:
                    assert server.tokenize(text, control=True) == ours.encode(text, control=True), text
        assert place == TEXTS - 1

    return check


def test_xgens(check: Callable[..., None]) -> None:
    check(xgen_document(), "<|endoftext|>")


def test_our_own_training(check: Callable[..., None], tmp_path: Path) -> None:
    train_bpe(lines(), 1000).save(tmp_path)
    check(json.loads((tmp_path / "tokenizer.json").read_text()), "<|endoftext|>")


@pytest.mark.parametrize("pre", SPLITS)
def test_each_split(check: Callable[..., None], pre: str) -> None:
    wide = re.compile(r"[^\S\0-\x7f]")
    check(learnt(pre), "<|end_of_text|>", lambda text: pre == "deepseek-coder" and bool(wide.search(text)))


def test_smollm2s(check: Callable[..., None], smollm2: Path, tmp_path: Path) -> None:
    import transformers

    document = from_gguf(fields_of(smollm2))
    ours = Tokenizer(document, "SmolLM2", "<|endoftext|>")
    missing = {byte for byte, character in ALPHABET.items() if character not in document["model"]["vocab"]}
    assert 0x06 in missing
    assert len(missing) == 21
    check(document, "<|endoftext|>", lambda text: bool(missing.intersection(text.encode())))
    ours.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in random_texts(2000, seed=42):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, control=True)


@pytest.mark.parametrize("version", ["v1", "v7"])
def test_mistrals(check: Callable[..., None], version: str) -> None:
    spaced = ("[REF]",) if version == "v7" else ()
    control = ("<s>", "</s>", "<unk>", "[INST]", "[/INST]") if version == "v7" else ()
    check(document_of(mistral_tokenizer(version)), "</s>", lambda text: any(name in text for name in spaced + control))


def test_the_tiny_models(check: Callable[..., None]) -> None:
    folder = Path(__file__).parent.parent / "tokens" / "data"
    check(document_of(folder / "sentencepiece.model"), "</s>")


def test_llama_cpp_puts_a_space_after_user_defined_tokens_and_sentencepiece_does_not(
    tmp_path: Path, llama_server: Serve
) -> None:
    import sentencepiece

    path = mistral_tokenizer("v7")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = Tokenizer(document_of(path), "ours", "</s>")
    write_model(tmp_path / "tokens.gguf", to_gguf(document_of(path), ours.size))
    with llama_server(tmp_path / "tokens.gguf") as server:
        ids = server.tokenize("a[REF]b")
    assert ours.encode("a[REF]b") == theirs.encode("a[REF]b")
    assert theirs.id_to_piece(theirs.encode("a[REF]b")) == ["▁a", "[REF]", "b"]
    assert theirs.id_to_piece(ids) == ["▁a", "[REF]", "▁b"]


def telling(pre: str) -> dict[str, Any]:
    """A document that shows the split: a character before another is one token with its first byte, unless cut."""
    vocab = {character: place for place, character in enumerate(ALPHABET.values())}
    merges = [(ALPHABET[ord(first)], ALPHABET[byte]) for first in "a1!' \n\t" for byte in (*range(0xC2, 0xF5), *b"ast")]
    merges = [pair for pair in merges if pair != ("a", "a")] + [("a", "a")]
    vocab |= {token: 256 + place for place, token in enumerate([*map("".join, merges), "</s>"])}
    document = byte_level_document(vocab, merges, ["</s>"])
    return from_gguf(GgufTokens(**{**vars(to_gguf(document, 1024)), "pre": pre}))


def surroundings(character: str) -> str:
    return "".join(f"{before}{character}!a" for before in ("a", "1", "!", " ", "'", "\n", "\t"))


@pytest.mark.parametrize("pre", SPLITS)
def test_every_character_is_split_off_alike(pre: str, tmp_path: Path, llama_server: Serve) -> None:
    document = telling(pre)
    ours = Tokenizer(document, pre, "</s>")
    write_model(tmp_path / "tokens.gguf", to_gguf(document, 1024))
    assigned = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")]
    assert len(assigned) > 140_000
    with llama_server(tmp_path / "tokens.gguf") as server:
        for start in range(0, len(assigned), 1024):
            text = "".join(map(surroundings, assigned[start : start + 1024]))
            assert server.tokenize(text) == ours.encode(text), hex(ord(assigned[start]))


def test_tiktoken_knows_the_letters_that_llama_cpp_does_not(tmp_path: Path, llama_server: Serve) -> None:
    import tiktoken

    document = telling("gpt-2")
    vocab = {to_bytes(token): index for token, index in document["model"]["vocab"].items() if token != "</s>"}
    theirs = tiktoken.Encoding("split", pat_str=PRE_TOKENIZERS["gpt-2"][0][0], mergeable_ranks=vocab, special_tokens={})
    ours = Tokenizer(document, "gpt-2", "</s>")
    write_model(tmp_path / "tokens.gguf", to_gguf(document, 1024))
    with llama_server(tmp_path / "tokens.gguf") as server:
        for code in (0x1C89, 0xA7CB, 0x105C0, 0x1E5F1):
            text = surroundings(chr(code))
            assert ours.encode(text) == theirs.encode_ordinary(text)
            assert ours.encode(text) != server.tokenize(text)
