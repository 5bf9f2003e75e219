"""The sources of a recipe, opened: stores as they are, texts prepared once, every mismatch refused."""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest
from synthetic import recipe_of, stage

from xgen.data import corpora, sources
from xgen.data.corpora import open_sources, reopen_sources
from xgen.data.prepare import prepare
from xgen.data.reader import Reader
from xgen.data.roles import training_texts
from xgen.data.sources import list_files, read_documents
from xgen.data.store import open_store
from xgen.errors import DataError
from xgen.recipe.schema import Recipe, TokenizerChoice
from xgen.tokens.tokenizer import train_bpe


def write_texts(folder: Path, seed: int, count: int = 30) -> None:
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(30)]
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.txt").write_text(f"{seed} {number} " + " ".join(rng.choice(words, 100)))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_texts(tmp_path / "one", 1)
    write_texts(tmp_path / "two", 2)
    return tmp_path


def recipe(tokenizer: str = "bpe:300", rows: int = 384, end_of_text: str = "<|endoftext|>", **named: str) -> Recipe:
    made = recipe_of(stage(16, 800, dict.fromkeys(named, 1.0)), sources=named, rows=rows)
    return made.model_copy(update={"tokenizer": TokenizerChoice(name=tokenizer, end_of_text=end_of_text)})


def test_a_folder_of_texts_is_prepared_once(base: Path) -> None:
    doings: list[str] = []
    stores, tokenizer = open_sources(recipe(one="one"), base, base / "work", lambda doing, _: doings.append(doing))
    assert doings
    assert tokenizer.size == 300
    assert stores["one"].train.documents + stores["one"].held_out.documents == 30
    assert stores["one"].held_out.documents >= 1
    doings.clear()
    made = (base / "work/one/manifest.json").stat().st_mtime_ns
    again, same = open_sources(recipe(one="one"), base, base / "work", lambda doing, _: doings.append(doing))
    assert doings == []
    assert (base / "work/one/manifest.json").stat().st_mtime_ns == made
    assert again["one"].fingerprint == stores["one"].fingerprint
    assert same.fingerprint == tokenizer.fingerprint


def made_otherwise(base: Path, wanted: Recipe, change: str) -> Recipe:
    """The recipe after a change to it, or to its texts."""
    match change:
        case "text":
            (base / "one/3.txt").write_text("another text altogether")
        case "new file":
            (base / "one/new.txt").write_text("another text altogether")
        case "tokenizer":
            return recipe("bpe:290", one="one")
        case "held_out":
            return wanted.model_copy(update={"data": wanted.data.model_copy(update={"held_out": 0.5})})
    return wanted


@pytest.mark.parametrize("change", ["text", "new file", "tokenizer", "held_out"])
def test_what_has_changed_is_prepared_anew(base: Path, change: str) -> None:
    # A tokenizer of its own file, where one trained on the text would change with the text.
    train_bpe(training_texts(list_files(base / "one"), 0.1, "stop"), 280).save(base / "tokenizer.json")
    before, _ = open_sources(recipe("tokenizer.json", one="one"), base, base / "work")
    changed = made_otherwise(base, recipe("tokenizer.json", one="one"), change)
    after, tokenizer = open_sources(changed, base, base / "work")
    assert after["one"].fingerprint != before["one"].fingerprint
    assert after["one"].manifest.tokenizer.fingerprint == tokenizer.fingerprint
    fresh, _ = open_sources(changed, base, base / "fresh")
    assert after["one"].fingerprint == fresh["one"].fingerprint


def test_the_tokenizer_is_trained_on_the_training_documents_of_all_sources(base: Path) -> None:
    stores, tokenizer = open_sources(recipe(one="one", two="two"), base, base / "work")
    texts = [text for name in ("one", "two") for text in training_texts(list_files(base / name), 0.05, "stop")]
    assert tokenizer.fingerprint == train_bpe(texts, 300).fingerprint
    names = {
        (name, store.train.name(index)) for name, store in stores.items() for index in range(store.train.documents)
    }
    assert len(names) == len(texts)


def refuse(*_: object) -> None:
    raise AssertionError("a tokenizer is learnt that was learnt before")


def test_another_run_does_not_learn_the_tokenizer_again(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores, first = open_sources(recipe(one="one"), base, base / "work")
    monkeypatch.setattr(corpora, "choose_tokenizer", refuse)
    others, second = open_sources(recipe(one="one"), base, base / "other")
    assert second.name == first.name == "bpe:300"
    assert second.fingerprint == first.fingerprint
    assert others["one"].fingerprint == stores["one"].fingerprint
    assert (base / "work/tokenizer.json").read_bytes() == (base / "other/tokenizer.json").read_bytes()


@pytest.mark.parametrize("change", ["text", "new file", "tokenizer", "held_out", "library"])
def test_a_tokenizer_that_would_be_another_is_learnt(base: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    open_sources(recipe(one="one"), base, base / "work")
    if change == "library":
        monkeypatch.setattr(corpora.tokenizers, "__version__", "another")
    changed = made_otherwise(base, recipe(one="one"), change)
    monkeypatch.setattr(corpora, "choose_tokenizer", refuse)
    with pytest.raises(AssertionError, match="learnt before"):
        open_sources(changed, base, base / "other")


def test_a_damaged_cache_or_none_costs_time_only(base: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = open_sources(recipe(one="one"), base, base / "work")
    (kept,) = (own_cache / "xgen/tokenizers").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    _, second = open_sources(recipe(one="one"), base, base / "second")
    assert kept.read_bytes() == whole
    (base / "file").touch()
    monkeypatch.setenv("XGEN_CACHE", str(base / "file"))
    _, third = open_sources(recipe(one="one"), base, base / "third")
    assert first.fingerprint == second.fingerprint == third.fingerprint


def test_embedded_held_out_documents_never_reach_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the embedded documents' names and splits, and the head of each text to be quick."""
    rows = [
        {"name": document.name, "split": document.split, "text": document.text[:300]}
        for document in read_documents("embedded:messages")
    ]
    (tmp_path / "messages.jsonl.xz").write_bytes(
        lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    )
    monkeypatch.setattr(sources, "CORPUS", tmp_path)
    stores, tokenizer = open_sources(recipe("bpe:280", m="embedded:messages"), tmp_path, tmp_path / "work")
    for split, name in ((stores["m"].train, "train"), (stores["m"].held_out, "held_out")):
        assert {
            split.name(index): tokenizer.decode(split.document(index)[1:].tolist()) for index in range(split.documents)
        } == {row["name"]: row["text"] for row in rows if row["split"] == name}
    assert stores["m"].held_out.documents == 24


def test_stores_are_used_as_they_are(base: Path) -> None:
    tokenizer = train_bpe(training_texts(list_files(base / "one"), 0.1, "stop"), 280)
    for name in ("one", "two"):
        prepare([base / name], base / "stores" / name, tokenizer)
    tokenizer.save(base / "tokenizer.json")
    for choice in ("store", "tokenizer.json"):
        stores, found = open_sources(recipe(choice, a="stores/one", b="stores/two"), base, base / "work")
        assert {name: store.path for name, store in stores.items()} == {
            "a": base / "stores/one",
            "b": base / "stores/two",
        }
        assert found.fingerprint == tokenizer.fingerprint
    assert not (base / "work").exists()
    mixed, _ = open_sources(recipe("store", a="stores/one", b="two"), base, base / "work")
    assert mixed["b"].fingerprint == open_store(base / "stores/two").fingerprint


def test_a_store_of_another_tokenizer(base: Path) -> None:
    texts = list(training_texts(list_files(base / "one"), 0.1, "stop"))
    prepare([base / "one"], base / "stores/one", train_bpe(texts, 280))
    prepare([base / "two"], base / "stores/two", train_bpe(texts, 290))
    with pytest.raises(DataError, match=r"source 'b' .*bpe:290 \(290 ids.*the run uses .*\(280 ids.*xgen prepare"):
        open_sources(recipe("store", a="stores/one", b="stores/two"), base, base / "work")
    with pytest.raises(DataError, match=r"source 'a' .*made with tokenizer bpe:280 .*the run uses xgen \(50313 ids"):
        open_sources(recipe("xgen", 51200, a="stores/one"), base, base / "work")
    with pytest.raises(DataError, match=r"'bpe:300', to be trained now, but source 'a' is a token store.*=store"):
        open_sources(recipe("bpe:300", a="stores/one", b="two"), base, base / "work")


def test_what_cannot_be_opened(base: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_sources(recipe("xgen", 51200, natural="stores/natural"), base, base / "work")
    assert str(caught.value) == (
        "source 'natural': there is no 'stores/natural'; make it with `xgen prepare TEXTS --out stores/natural`, "
        "or name yours with --data natural=PATH"
    )
    with pytest.raises(DataError, match="no source is a token store to take it from"):
        open_sources(recipe("store", one="one"), base, base / "work")
    with pytest.raises(DataError, match=r"has 300 ids and model.vocab_size is 256"):
        open_sources(recipe("bpe:300", 256, one="one"), base, base / "work")
    (base / "empty").mkdir()
    with pytest.raises(DataError, match=r"folder .*empty holds no files"):
        open_sources(recipe(one="empty"), base, base / "work")


def test_reopening_needs_no_texts(base: Path) -> None:
    """A run goes on, and shows its batches, when the texts it was made of have moved or changed."""
    made = recipe(one="one", two="two")
    stores, tokenizer = open_sources(made, base, base / "work")
    batch = Reader(made, stores).batch(0)
    shutil.rmtree(base / "one")
    (base / "two/0.txt").write_text("changed")
    again, same = reopen_sources(made, base, base / "work")
    assert same.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(Reader(made, again).batch(0).ids, batch.ids)
    shutil.rmtree(base / "work/two")
    with pytest.raises(DataError, match=r"no token store at .*two"):
        reopen_sources(made, base, base / "work")
