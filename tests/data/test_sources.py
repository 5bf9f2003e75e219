"""Documents out of files; every fault named with file and line, or counted."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xgen.data.sources import Document, Faults, list_files, read_documents, read_file
from xgen.errors import DataError

ROWS = [{"text": "one"}, {"text": "two\n\nlines é 文"}, {"text": "three", "other": 3}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
TEXTS = [row["text"] for row in ROWS]


def texts(path: Path, **options: str) -> list[str]:
    return [document.text for document in read_documents(path, **options)]  # type: ignore[arg-type]


def skipped(path: Path, **options: str) -> tuple[list[str], dict[str, int]]:
    faults = Faults("skip")
    found = [document.text for file in list_files(path, **options) for document in read_file(file, faults)]
    return found, dict(faults.skipped)


def test_a_text_file_is_a_document_as_it_stands(tmp_path: Path) -> None:
    text = "First line\r\nsecond, é 文 \N{GRINNING FACE}\n\n\n"
    for name in ("a.txt", "b.md", "c.py", "d", "e.rst"):
        (tmp_path / name).write_bytes(text.encode())
    assert list(read_documents(tmp_path)) == [Document(name, text) for name in ("a.txt", "b.md", "c.py", "d", "e.rst")]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert texts(tmp_path / "a.txt") == ["hello"]


def test_folders_are_read_with_all_below_in_order_but_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a.txt", "b/c/d.txt", ".hidden", ".git/config", "b/.x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [document.name for document in read_documents(tmp_path)] == ["a.txt", "b/1.txt", "b/2.txt", "b/c/d.txt"]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".JSONL"])
def test_json_lines_plain_and_compressed(tmp_path: Path, suffix: str) -> None:
    import zstandard

    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}.get(Path(suffix).suffix, bytes)
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(pack(LINES))
    assert [(d.name, d.text, d.split) for d in read_documents(path)] == [
        (f"rows{suffix}:{line}", text, None) for line, text in enumerate(TEXTS, 1)
    ]


def test_zstandard_in_several_frames_and_truncated(tmp_path: Path) -> None:
    import zstandard

    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(zstandard.compress(LINES) + zstandard.compress(LINES))
    assert texts(path) == TEXTS * 2
    lines = b"".join(json.dumps({"text": os.urandom(40).hex()}).encode() + b"\n" for _ in range(20_000))
    packed = zstandard.compress(lines)
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"rows\.jsonl\.zst, (after )?line \d+"):
        texts(path)


def test_a_compressed_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"hello"))
    assert texts(tmp_path) == ["hello"]


def test_parquet_in_several_row_groups(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    many = [f"text {number}" for number in range(1000)]
    pyarrow.parquet.write_table(pyarrow.table({"id": range(1000), "body": many}), path, row_group_size=300)
    assert texts(path, text_field="body") == many
    with pytest.raises(
        DataError, match=r"no column 'text'; there is 'id', 'body', so name .* `xgen prepare --text-field`"
    ):
        texts(path)


def test_a_null_in_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "c"]}), path)
    with pytest.raises(DataError, match=r"rows.parquet, row 2: field 'text' is None, not text"):
        texts(path)
    assert skipped(path) == (["a", "c"], {"no text": 1})


def test_a_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 this is none")
    with pytest.raises(DataError, match=r"rows.parquet, after row 0: cannot be read further"):
        texts(path)
    assert skipped(path) == ([], {"unreadable file": 1})


FAULTS = [
    (b'{"text": "ok"}\n{"text": \n', "line 2: broken JSON", "broken JSON"),
    (
        b'{"text": "ok"}\n\n\n{"txt": "x", "id": 1}\n',
        r"line 4: there is no field 'text'; there is 'txt', 'id'",
        "no text",
    ),
    (b'{"text": "ok"}\n{"text": 17}\n', "line 2: field 'text' is 17, not text", "no text"),
    (b'{"text": "ok"}\n["text"]\n', "line 2: the line is a JSON list, not an object", "not an object"),
    (b'{"text": "ok"}\n{"text": " \\n "}\n', "line 2: the document is empty", "empty document"),
    (b'{"text": "ok"}\n{"text": "\xff"}\n', r"line 2: byte 10 \(0xff\) is not UTF-8", "not UTF-8"),
    (
        b'{"text": "ok"}\n{"text": "a\\ud800"}\n',
        r"line 2: character 1 is '\\ud800', half of a surrogate pair",
        "not Unicode",
    ),
    (b'{"text": "ok"}\n{"text": 1' + b"0" * 5000 + b"}\n", "line 2: broken JSON", "broken JSON"),
    (b'{"text": "ok"}\n' + b"[" * 100_000 + b"\n", "line 2: broken JSON", "broken JSON"),
]


@pytest.mark.parametrize(("content", "message", "kind"), FAULTS)
def test_a_faulty_line_is_named_or_counted(tmp_path: Path, content: bytes, message: str, kind: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content + b'{"text": "after"}\n')
    with pytest.raises(DataError, match=rf"rows\.jsonl, {message}") as caught:
        texts(path)
    assert "--on-error skip" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert skipped(path) == (["ok", "after"], {kind: 1})


def test_text_that_is_not_utf8_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("one\ntwo\nna\u00efve".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.txt, line 3: byte 10 \(0xef\) is not UTF-8: it may be in another"):
        texts(path)
    path.write_text("hello", encoding="utf-16")
    with pytest.raises(DataError, match="looks like UTF-16"):
        texts(path)
    assert skipped(path) == ([], {"not UTF-8": 1})


def test_empty_files_and_documents(tmp_path: Path) -> None:
    (tmp_path / "full.txt").write_text("full")
    (tmp_path / "none.txt").touch()
    (tmp_path / "white.txt").write_text(" \n\t\n")
    with pytest.raises(DataError, match=r"none.txt: the file is empty"):
        texts(tmp_path)
    with pytest.raises(DataError, match=r"white.txt: the document is empty"):
        texts(tmp_path / "white.txt")
    assert skipped(tmp_path) == (["full"], {"empty file": 1, "empty document": 1})


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
@pytest.mark.parametrize("cut", [0.5, 0.95])
def test_a_truncated_archive_keeps_what_came_before(tmp_path: Path, pack: object, cut: float) -> None:
    path = tmp_path / f"rows.jsonl.{'gz' if pack is gzip.compress else 'xz'}"
    lines = b"".join(
        json.dumps({"text": f"{number} {os.urandom(40).hex()}"}).encode() + b"\n" for number in range(5000)
    )
    packed = pack(lines)  # type: ignore[operator]
    path.write_bytes(packed[: int(len(packed) * cut)])
    with pytest.raises(DataError, match=r"after line \d+: cannot be read further"):
        texts(path)
    found, counts = skipped(path)
    assert found == [json.loads(line)["text"] for line in lines.splitlines()[: len(found)]]
    assert counts["unreadable file"] == 1


def test_there_is_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file or folder .*gone"):
        list_files(tmp_path / "gone")
    (tmp_path / "empty" / ".git").mkdir(parents=True)
    with pytest.raises(DataError, match=r"folder .*empty holds no files"):
        list_files(tmp_path / "empty")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe is neither a file nor a folder"):
        list_files(tmp_path / "pipe")
    with pytest.raises(DataError, match="no embedded corpus 'poems'; there are embedded:code, embedded:messages"):
        list_files("embedded:poems")


def test_unreadable_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not bind root, who may run the tests: the refusal is put in by hand."""
    (tmp_path / "a.txt").write_text("a")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(DataError, match=r"cannot read folder .*: Permission denied"):
            list_files(tmp_path)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a.txt: cannot be read \(.*Permission denied"):
        texts(tmp_path / "a.txt")


def test_the_source_may_say_the_split(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"text": "a", "kind": "train"},
        {"text": "b", "kind": "held_out"},
        {"text": "c"},
        {"text": "d", "kind": "x"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    splits = [document.split for document in read_documents(path, split_field="kind")]
    assert splits == ["train", "held_out", None]
    assert [document.split for document in read_documents(path)] == [None] * 3
    path.write_text(json.dumps(rows[3]))
    with pytest.raises(DataError, match=r"line 1: field 'kind' is 'x', not train or held_out"):
        list(read_documents(path, split_field="kind"))


@given(st.lists(st.text().filter(str.strip), min_size=1, max_size=5))
def test_any_text_comes_through_json_lines(tmp_path_factory: pytest.TempPathFactory, rows: list[str]) -> None:
    path = tmp_path_factory.mktemp("any") / "rows.jsonl"
    path.write_bytes(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in rows))
    assert texts(path) == rows


# The embedded corpus.


def words(text: str, run: int = 8) -> set[str]:
    tokens = text.split()
    return {" ".join(tokens[start : start + run]) for start in range(len(tokens) - run + 1)}


@pytest.mark.parametrize(("name", "documents", "least"), [("messages", 194, 18_000), ("code", 260, 12_000)])
def test_the_embedded_corpus_keeps_its_held_out_documents_apart(name: str, documents: int, least: int) -> None:
    found = list(read_documents(f"embedded:{name}"))
    assert len(found) == documents
    assert len({document.name for document in found}) == len({document.text for document in found}) == documents
    held_out = [document for document in found if document.split == "held_out"]
    trained = [document for document in found if document.split == "train"]
    assert (len(held_out), len(held_out) + len(trained)) == (24, documents)
    assert min(len(document.text) for document in held_out) >= least
    seen = set().union(*(words(document.text) for document in trained))
    for document in held_out:
        own = words(document.text)
        assert len(own & seen) < 0.03 * len(own), document.name


def test_the_embedded_corpus_carries_its_licences() -> None:
    from xgen.data.sources import CORPUS

    assert "CC0 1.0" in (CORPUS / "LICENSE-messages.txt").read_text()
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (CORPUS / "LICENSE-code.txt").read_text()
    assert sum(file.stat().st_size for file in CORPUS.iterdir()) < 4_000_000
