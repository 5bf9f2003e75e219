"""From text to a store and back: every document in one split, whole, once; interruptions cost nothing."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from xgen.data import parts, prepare, writer
from xgen.data.prepare import choose_tokenizer
from xgen.data.prepare import prepare as make
from xgen.data.roles import DUPLICATE, HELD_OUT, TRAIN, Marks, roles, training_texts
from xgen.data.sources import Document, list_files
from xgen.data.store import Store, open_store, verify
from xgen.errors import DataError, StorageError
from xgen.tokens.tokenizer import Tokenizer, train_bpe

WORDS = ["the", "quick", "brown", "fox", "<|endoftext|>", "é", "文", "\n\n", "", "  def", "f(x):", "return"]


def some_texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"{number} " + " ".join(rng.choice(WORDS, rng.integers(1, 60))) for number in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(some_texts(200), 300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A newcomer's folder: some text files, one below another, and JSON lines."""
    texts = some_texts(40)
    source = tmp_path / "texts"
    (source / "below").mkdir(parents=True)
    for number, text in enumerate(texts[:25]):
        (source / f"{number:02}.txt").write_text(text)
    (source / "below" / "deep.md").write_text(texts[25])
    (source / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[26:]))
    return source


def contents(store: Store, tokenizer: Tokenizer) -> dict[str, dict[str, str]]:
    """Text of every document by split and name, decoded from the store's ids."""
    found = {}
    for name, split in (("train", store.train), ("held_out", store.held_out)):
        found[name] = {}
        for index in range(split.documents):
            ids = split.document(index).tolist()
            assert ids[0] == tokenizer.end_of_text
            assert tokenizer.end_of_text not in ids[1:]
            text = tokenizer.decode(ids[1:])
            assert split.text_bytes[index] == len(text.encode())
            found[name][split.name(index)] = text
    return found


def test_every_document_is_in_the_store_once_and_whole(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    manifest = make([folder], tmp_path / "store", tokenizer, held_out=0.2)
    store = open_store(tmp_path / "store")
    assert store.manifest == manifest
    found = contents(store, tokenizer)
    merged = found["train"] | found["held_out"]
    assert len(merged) == len(found["train"]) + len(found["held_out"]) == 40
    assert Counter(merged.values()) == Counter(some_texts(40))
    assert merged["below/deep.md"] == some_texts(40)[25]
    assert merged["rows.jsonl:3"] == some_texts(40)[28]
    for counts, split in ((manifest.train, store.train), (manifest.held_out, store.held_out)):
        assert (counts.documents, counts.tokens) == (split.documents, len(split.tokens))
        assert counts.text_bytes == split.text_bytes.sum()
    assert sum(source.documents for source in manifest.sources) == 40
    assert store.tokenizer().fingerprint == tokenizer.fingerprint == manifest.tokenizer.fingerprint
    assert not list(tmp_path.glob("*.partial"))


def test_the_same_text_makes_the_same_store(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("one", "two"):
        make([folder], tmp_path / name, tokenizer)
    assert open_store(tmp_path / "one").fingerprint == open_store(tmp_path / "two").fingerprint
    (folder / "new.txt").write_text("a new document")
    make([folder], tmp_path / "three", tokenizer)
    assert open_store(tmp_path / "three").fingerprint != open_store(tmp_path / "one").fingerprint


def test_parts_change_nothing(
    folder: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    make([folder], tmp_path / "one", tokenizer)
    monkeypatch.setattr(parts, "PART_BYTES", 500)
    monkeypatch.setattr(parts, "PART_FILES", 3)
    monkeypatch.setattr(parts, "_ENCODE_DOCUMENTS", 2)
    make([folder], tmp_path / "many", tokenizer)
    assert open_store(tmp_path / "one").fingerprint == open_store(tmp_path / "many").fingerprint


def test_an_interrupted_preparation_goes_on_where_it_was(
    folder: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off within every part in turn and while the store is put together; no part is tokenised twice."""
    make([folder], tmp_path / "whole", tokenizer)
    monkeypatch.setattr(parts, "PART_FILES", 4)
    first_part = ["00.txt", "01.txt", "02.txt", "03.txt"]
    tokenised: list[str] = []
    left = 0

    def interrupted(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return step(*arguments)

        return run

    def counted(documents: list[Document]) -> Marks:
        tokenised.extend(document.name for document in documents)
        return marks_of(documents)

    marks_of = Marks.of
    monkeypatch.setattr(Marks, "of", counted)
    monkeypatch.setattr(parts, "write_json", interrupted(parts.write_json))  # a part's last file
    monkeypatch.setattr(prepare, "_write_split", interrupted(prepare._write_split))
    out = tmp_path / "store"
    for _ in range(7):  # 27 files, 4 a part
        left = 1
        with pytest.raises(KeyboardInterrupt):
            make([folder], out, tokenizer)
        assert not out.exists()
    left = 2
    make([folder], out, tokenizer)
    assert open_store(out).fingerprint == open_store(tmp_path / "whole").fingerprint
    # Each run finishes a part and is broken off within the next, which alone is read twice; the seventh is broken
    # off after the seventh part, at the store.
    times = Counter(tokenised)
    assert len(times) == 40
    assert sorted(set(times.values())) == [1, 2]
    assert [name for name, count in times.items() if count == 1] == first_part


def test_a_file_mended_after_an_error_is_read_anew(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (folder / "z.jsonl").write_text('{"text": "good"}\n{"text": bad}\n')
    with pytest.raises(DataError, match=r"z\.jsonl, line 2: broken JSON"):
        make([folder], tmp_path / "store", tokenizer)
    (folder / "z.jsonl").write_text('{"text": "good"}\n{"text": "mended"}\n')
    make([folder], tmp_path / "store", tokenizer, held_out=0)
    assert "mended" in contents(open_store(tmp_path / "store"), tokenizer)["train"].values()


def test_faults_are_counted_under_skip(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (folder / "bad.jsonl").write_bytes(b'{"text": \n{"txt": 1}\n{"text": "kept"}\n{"text": ""}\n')
    (folder / "none.txt").touch()
    (folder / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    manifest = make([folder], tmp_path / "store", tokenizer, on_error="skip")
    assert manifest.skipped == {"broken JSON": 1, "empty document": 1, "empty file": 1, "no text": 1, "not UTF-8": 1}
    assert manifest.train.documents + manifest.held_out.documents == 41


def test_exact_duplicates_are_left_out_and_counted(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (folder / "copies.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some_texts(40)[::2]))
    manifest = make([folder, folder], tmp_path / "store", tokenizer)
    assert manifest.duplicates == 80  # 60 documents, twice
    assert manifest.train.documents + manifest.held_out.documents == 40


def test_the_embedded_split_is_kept(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"text": text, "split": "held_out" if number % 3 else "train"} for number, text in enumerate(some_texts(9))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make([tmp_path / "rows.jsonl"], tmp_path / "store", tokenizer, held_out=0.9, split_field="split")
    found = contents(open_store(tmp_path / "store"), tokenizer)
    assert set(found["train"].values()) == set(some_texts(9)[::3])
    assert len(found["held_out"]) == 6


@pytest.mark.parametrize("held_out", [-0.1, 1.0, 1.5])
def test_an_impossible_share(folder: Path, tmp_path: Path, tokenizer: Tokenizer, held_out: float) -> None:
    with pytest.raises(DataError, match=f"held_out is {held_out:g}; it is a share"):
        make([folder], tmp_path / "store", tokenizer, held_out=held_out)


def test_nothing_there_and_something_there_already(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "none.txt").touch()
    with pytest.raises(DataError, match=r"there are no documents in the sources \(left out: 1 x empty file\)"):
        make([tmp_path / "none.txt"], tmp_path / "store", tokenizer, on_error="skip")
    with pytest.raises(DataError, match="exists already"):
        make([tmp_path / "none.txt"], tmp_path, tokenizer)


def test_a_full_disk_leaves_no_store(
    folder: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer._HashedFile, "write", full)
        with pytest.raises(StorageError, match=r"cannot write .*store: No space left on device"):
            make([folder], tmp_path / "store", tokenizer)
    assert not (tmp_path / "store").exists()
    make([folder], tmp_path / "store", tokenizer)


def test_progress_never_goes_back_and_ends_at_the_end(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    told: list[tuple[str, float]] = []
    make([folder], tmp_path / "store", tokenizer, progress=lambda doing, fraction: told.append((doing, fraction)))
    tokenising = [fraction for doing, fraction in told if doing.startswith("tokenising")]
    assert tokenising == sorted(tokenising)
    assert tokenising[-1] == 1.0
    assert told[-1][0] == "tokenising (40 documents)"


# Roles.


@given(
    draws=hnp.arrays(np.uint64, st.integers(1, 40), elements=st.integers(0, 2**64 - 1)),
    held_out=st.floats(0, 0.999),
    data=st.data(),
)
def test_roles(draws: np.ndarray, held_out: float, data: st.DataObject) -> None:
    count = len(draws)
    texts = np.array(data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)), np.uint64)
    given_roles = np.array(data.draw(st.lists(st.sampled_from([-1, 0, 1]), min_size=count, max_size=count)), np.int8)
    role = roles(Marks(np.stack([texts, texts], axis=1), draws, given_roles), held_out)
    first = {text: index for index, text in reversed(list(enumerate(texts.tolist())))}
    kept = sorted(first.values())
    assert np.flatnonzero(role != DUPLICATE).tolist() == kept
    for index in kept:
        if given_roles[index] >= 0:
            assert role[index] == given_roles[index]
    ours = [index for index in kept if given_roles[index] < 0]
    if held_out > 0 and len(kept) >= 2 and len(ours) == len(kept):
        assert {TRAIN, HELD_OUT} <= set(role.tolist())
    if held_out == 0:
        assert all(role[index] == TRAIN for index in ours)


@given(
    draws=st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=20, unique=True),
    held_out=st.floats(0, 0.999, exclude_min=True),
)
def test_neither_side_is_empty_where_the_choice_is_ours(draws: list[int], held_out: float) -> None:
    count = len(draws)
    texts = np.stack([np.arange(count, dtype=np.uint64)] * 2, axis=1)
    role = roles(Marks(texts, np.array(draws, np.uint64), np.full(count, -1, np.int8)), held_out)
    assert {TRAIN, HELD_OUT} == set(role.tolist())
    assert max(np.array(draws)[role == HELD_OUT].tolist()) < min(np.array(draws)[role == TRAIN].tolist())


def test_the_share_held_out_is_the_share_asked_for() -> None:
    documents = [Document(f"{number}", f"text {number}") for number in range(20_000)]
    role = roles(Marks.of(documents), 0.05)
    # Binomial with deviation sqrt(0.05 * 0.95 / 20000) = 0.0015.
    assert (role == HELD_OUT).mean() == pytest.approx(0.05, abs=0.006)


def test_a_document_keeps_its_side_when_others_come() -> None:
    documents = [Document(f"{number}", f"text {number}") for number in range(1000)]
    few, many = roles(Marks.of(documents[::2]), 0.1), roles(Marks.of(documents), 0.1)
    np.testing.assert_array_equal(few, many[::2])


def test_the_tokenizer_is_trained_on_what_is_trained_on(folder: Path, tmp_path: Path) -> None:
    files = list_files(folder)
    chosen = choose_tokenizer("bpe:300", [files], 0.3, "stop", "<|endoftext|>")
    make([folder], tmp_path / "store", chosen, held_out=0.3)
    found = contents(open_store(tmp_path / "store"), chosen)
    assert sorted(training_texts(files, 0.3, "stop")) == sorted(found["train"].values())
    assert chosen.fingerprint == train_bpe(list(training_texts(files, 0.3, "stop")), 300).fingerprint
    assert found["held_out"]


def test_a_misspelt_bpe() -> None:
    with pytest.raises(DataError, match="'bpe:2K': after bpe: comes the number of ids"):
        choose_tokenizer("bpe:2K", [], 0.1, "stop", "<|endoftext|>")


# Stores.


def test_a_damaged_store_is_found_out(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    make([folder], tmp_path / "store", tokenizer)
    assert all(whole for _, whole in verify(tmp_path / "store"))
    names = [name for name, _ in verify(tmp_path / "store")]
    assert len(names) == 11
    for name in names:
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "store", copy)
        raw = bytearray((copy / name).read_bytes())
        if raw:
            raw[len(raw) // 2] ^= 1
            (copy / name).write_bytes(raw)
            assert dict(verify(copy)) == {each: each != name for each in names}
        (copy / name).write_bytes(bytes(raw) + b"x")
        with pytest.raises(DataError, match="the store is damaged or its copy incomplete"):
            open_store(copy)
        (copy / name).unlink()
        assert not dict(verify(copy))[name]
        with pytest.raises(DataError, match="No such file"):
            open_store(copy)
        shutil.rmtree(copy)


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no token store at .*gone; make one with `xgen prepare"):
        open_store(tmp_path / "gone")
    with pytest.raises(DataError, match=r"is not a token store: it has no manifest\.json"):
        open_store(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match=r"manifest of format 1: format: "):
        open_store(tmp_path)
    (tmp_path / "manifest.json").write_text("not JSON")
    with pytest.raises(DataError, match=r"manifest.json cannot be read as a store's manifest"):
        open_store(tmp_path)


@pytest.mark.parametrize(("size", "dtype"), [(257, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_every_id_fits_the_stores_type(size: int, dtype: type) -> None:
    assert writer.token_dtype(SimpleNamespace(size=size)) == dtype  # type: ignore[arg-type]
    assert np.iinfo(dtype).max >= size - 1


def test_a_store_of_wide_ids(
    folder: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (parts, prepare):
        monkeypatch.setattr(module, "token_dtype", lambda _: np.dtype(np.uint32))
    assert make([folder], tmp_path / "store", tokenizer).dtype == "uint32"
    store = open_store(tmp_path / "store")
    assert store.train.tokens.dtype == np.uint32
    found = contents(store, tokenizer)
    assert Counter((found["train"] | found["held_out"]).values()) == Counter(some_texts(40))


def test_a_store_is_read_only(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    make([folder], tmp_path / "store", tokenizer)
    with pytest.raises(ValueError, match="read-only"):
        open_store(tmp_path / "store").train.tokens[0] = 1


@pytest.mark.parametrize("held_out", [-0.1, 1.5])
def test_an_impossible_share_is_told_before_a_tokenizer_is_trained(folder: Path, held_out: float) -> None:
    with pytest.raises(DataError, match=f"held_out is {held_out:g}"):
        choose_tokenizer("bpe:300", [list_files(folder)], held_out, "stop", "<|endoftext|>")


def test_a_text_of_two_sources_is_on_one_side_in_both(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [f"document {number} says {number * number}" for number in range(60)]
    for place, prefix in (("a", "x"), ("b/deeper", "y")):
        (tmp_path / place).mkdir(parents=True)
        for number, text in enumerate(texts):
            (tmp_path / place / f"{prefix}{number}.txt").write_text(text, encoding="utf-8")
    sides = []
    for source in ("a", "b"):
        make([tmp_path / source], tmp_path / f"store_{source}", tokenizer, held_out=0.3)
        split = open_store(tmp_path / f"store_{source}").held_out
        sides.append({tuple(split.document(index).tolist()) for index in range(split.documents)})
    assert sides[0] == sides[1]
    assert sides[0]
