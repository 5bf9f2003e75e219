"""The model card: what is known is in it, and what is not is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from array_source import llama, small_tokenizer

from xgen.convert.description import Description
from xgen.convert.hf_card import card
from xgen.model import parameter_count

RUN = {
    "kind": "run",
    "recipe": "tiny",
    "stages": [{"name": "64", "length": 64, "tokens": 300_000}, {"name": "256", "length": 256, "tokens": 40_000}],
    "data": {"books": "/home/somebody/secret/stores/books", "words": "embedded:words"},
    "tokens": 340_000,
    "bits_per_byte": 1.23456,
}


def described(origin: dict | None = None, **facts) -> Description:
    return replace(llama(tokenizer=small_tokenizer())[0], origin=origin or {}, **facts)


def front_matter(text: str) -> str:
    begin, matter, _ = text.split("---\n", 2)
    assert begin == ""
    return matter


def test_of_a_run() -> None:
    description = described(RUN)
    text = card(description)
    assert front_matter(text) == ("library_name: transformers\npipeline_tag: text-generation\ntags:\n- xgen\n- llama\n")
    for wanted in (
        "# small\n",
        f"{parameter_count(description.spec):,} parameters",
        "recipe `tiny` on 340,000 tokens",
        "| 256 | 256 | 40,000 |",
        "| books | books |",
        "| words | embedded:words |",
        "1.2346 bits per byte",
        "Context: 256 tokens",
        "Ids 280 to 299 are padding rows",
        "no chat template",
        "licence is not known",
        "AutoTokenizer",
        "vllm serve",
        "xgen convert gguf",
    ):
        assert wanted in text
    assert "somebody" not in text
    assert "conversational" not in text
    assert "Repairs" not in text
    assert "None" not in text


def test_of_a_read_model() -> None:
    origin = {"kind": "hugging_face", "name": "xgen-7b-8k-inst", "model_type": "llama", "license": "apache-2.0"}
    repairs = ("the pad token was '!'; it is <|endoftext|> now", "rows 280 to 299 are masked")
    text = card(described(origin, repairs=repairs, chat_template="{{ messages }}"))
    assert 'license: "apache-2.0"\n' in front_matter(text)
    assert "- conversational\n" in front_matter(text)
    assert "Read by XGen from a Hugging Face folder; not trained here." in text
    assert "- name: xgen-7b-8k-inst\n- model type: llama\n" in text
    for repair in repairs:
        assert f"- {repair}\n" in text
    assert "Nothing that is on record here." in text
    assert "apply_chat_template" in text
    for absent in ("bits per byte", "licence is not known", "no chat template", "Trained by XGen"):
        assert absent not in text


def test_of_a_continued_run() -> None:
    text = card(described({**RUN, "continued_from": "SmolLM2", "bits_per_byte": None}))
    assert "continued from the model `SmolLM2`" in text
    assert "Nothing that is on record here." in text


def test_of_a_model_of_which_nothing_is_known() -> None:
    text = card(replace(described(), tokenizer=None))
    assert "## Origin\n\nUnknown." in text
    assert "no tokenizer in this folder" in text
    assert "AutoTokenizer" not in text
    assert "vllm serve FOLDER --skip-tokenizer-init" in text


def test_without_padding_rows_none_are_warned_of() -> None:
    description = described()
    assert "padding" not in card(replace(description, real_vocab=description.model.vocab_size))


def test_foreign_words_stay_in_their_place() -> None:
    hostile = "x\n---\nlicense: mit\n# Heading | cell"
    text = card(described({**RUN, "recipe": hostile, "data": {"a": hostile}, "note": hostile}, name=hostile))
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# x --- license: mit # Heading | cell"]
    assert "license" not in front_matter(text)
    assert "| a | x --- license: mit # Heading \\| cell |" in text
    assert front_matter(card(described({"license": 'mit"\nx: "y'}))).endswith('license: "mit\\"\\nx: \\"y"\n')


@pytest.mark.oracle
def test_a_hub_can_read_it(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    (tmp_path / "README.md").write_text(card(described({**RUN, "license": "apache-2.0"})), encoding="utf-8")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert data.tags == ["xgen", "llama"]
