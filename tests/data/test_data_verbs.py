"""`xgen prepare` and `xgen data` as a newcomer types them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from xgen.cli.data import data_app
from xgen.cli.prepare import prepare
from xgen.data.store import open_store
from xgen.errors import DataError, RecipeError, XgenError

STORY = "Once upon a time there was a quick brown fox. It lived in a wood, and it slept under a tree. "

RECIPE = """
name = "mine"
[model]
layers = 1
hidden_size = 8
heads = 1
[tokenizer]
name = "{tokenizer}"
[data]
sources = {{ mine = "{source}" }}
[optimizer]
learning_rate = 1e-3
[[stages]]
name = "short"
length = 16
tokens = 64
batch_tokens = 32
[[stages]]
name = "long"
length = 32
tokens = 64
"""


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / f"texts/{number}.txt").write_text(f"Chapter {number}. " + STORY * (number + 2))
    return tmp_path / "texts"


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(prepare)
    app.add_typer(data_app, name="data")
    return CliRunner().invoke(app, arguments, catch_exceptions=True)


def error_of(*arguments: str) -> XgenError:
    result = run(*arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, XgenError), result.output
    assert result.exception.exit_code == 2
    return result.exception


def test_a_folder_of_text_files_just_works(texts: Path) -> None:
    result = run("prepare", "texts/", "--out", "stores/mine", "--tokenizer", "bpe:270")
    assert result.exit_code == 0, result.output
    assert "stores/mine: 3 documents to train on" in result.stdout
    assert "1 held out" in result.stdout
    store = open_store(Path("stores/mine"))
    tokenizer = store.tokenizer()
    split = store.train
    found = {split.name(index): tokenizer.decode(split.document(index)[1:].tolist()) for index in range(3)}
    for name, text in found.items():
        assert text == (texts / name).read_text()


@pytest.mark.usefixtures("texts")
def test_json_to_standard_output_is_the_manifest_alone() -> None:
    result = run("prepare", "texts", "--out", "mine", "--tokenizer", "bpe:270", "--json", "-", "--quiet")
    assert result.stderr == ""
    assert json.loads(result.stdout) == json.loads(Path("mine/manifest.json").read_text())


def test_skipped_documents_are_said(texts: Path) -> None:
    (texts / "bad.txt").write_bytes(b"\xff\xfe")
    (texts / "copy.txt").write_text((texts / "0.txt").read_text())
    assert "texts/bad.txt, line 1: byte 0 (0xff) is not UTF-8" in str(
        error_of("prepare", "texts", "--out", "mine", "--tokenizer", "bpe:270")
    )
    result = run("prepare", "texts", "--out", "mine", "--tokenizer", "bpe:270", "--on-error", "skip")
    assert "left out: 1 exact duplicates" in result.stdout
    assert "skipped: 1 x not UTF-8" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone", "--out", "mine"], "there is no file or folder gone"),
        (["texts", "--out", "texts"], "texts exists already"),
        (["texts", "--out", "mine", "--tokenizer", "bpe:9000"], "the text is too small for a tokenizer of 9000 ids"),
        (["texts", "--out", "mine", "--tokenizer", "bpe:many"], "after bpe: comes the number of ids"),
        (["texts", "--out", "mine", "--held-out", "2"], "held_out is 2"),
    ],
)
@pytest.mark.usefixtures("texts")
def test_what_cannot_be_prepared(arguments: list[str], message: str) -> None:
    assert message in str(error_of("prepare", *arguments))
    assert not Path("mine").exists()


def test_show_a_batch_with_its_documents(texts: Path) -> None:
    Path("mine.toml").write_text(RECIPE.format(tokenizer="bpe:270", source="texts"))
    result = run("data", "show", "mine.toml", "--step", "3", "--json", "shown.json")
    assert result.exit_code == 0, result.output
    assert "step 3, token position 64, stage long: 1 sequences of 32 tokens" in result.stdout
    shown = json.loads(Path("shown.json").read_text())
    ids, targets = np.array(shown["ids"]), np.array(shown["targets"])
    assert ids.shape == targets.shape == (1, 32)
    np.testing.assert_array_equal(ids[:, 1:], targets[:, :-1])
    for span in shown["documents"]:
        text = span["text"].removeprefix("<|endoftext|>")
        assert text in (texts / span["name"]).read_text()
        assert repr(text[:10])[1:-1] in result.stdout
    same = run("data", "show", "mine.toml", "--position", "95", "--json", "-")
    assert json.loads(same.stdout) == shown


def test_which_batch_must_be_said_and_be_there(texts: Path) -> None:
    Path("mine.toml").write_text(RECIPE.format(tokenizer="bpe:270", source="texts"))
    with pytest.raises(RecipeError, match="either --step N or --position P"):
        raise error_of("data", "show", "mine.toml")
    assert "there is no step 5: the run's steps are 1 to 4" in str(error_of("data", "show", "mine.toml", "--step", "5"))
    assert "there is no step 0" in str(error_of("data", "show", "mine.toml", "--step", "0"))
    assert "there is no token position 128: the run's are 0 to 127" in str(
        error_of("data", "show", "mine.toml", "--position", "128")
    )
    assert texts.is_dir()


def test_verify_names_the_damaged_file(texts: Path) -> None:
    run("prepare", str(texts), "--out", "mine", "--tokenizer", "bpe:270")
    assert "mine is whole: 11 files as written" in run("data", "verify", "mine").stdout
    damaged = Path("mine/train/tokens.bin")
    raw = bytearray(damaged.read_bytes())
    raw[7] ^= 4
    damaged.write_bytes(raw)
    with pytest.raises(DataError, match=r"mine is damaged: train/tokens\.bin not as written"):
        raise error_of("data", "verify", "mine", "--json", "whole.json")
    assert json.loads(Path("whole.json").read_text())["whole"] is False
