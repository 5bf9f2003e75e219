"""Documents out of files: text, JSON lines and Parquet, in files and folders, and the embedded corpus.

A text file is one document, whatever its suffix; each line of a `.jsonl` (or `.ndjson`) and each row of a `.parquet`
file is one. All but Parquet may be compressed: `.gz`, `.xz`, `.zst`. Hidden files (".name") are passed over.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Literal, cast

from xgen.data.store import SPLITS, SplitName
from xgen.errors import DataError

EMBEDDED = "embedded:"
CORPUS = Path(__file__).parent / "corpus"
LINE_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst")

OnError = Literal["stop", "skip"]

_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What Python's decompressors raise on a damaged or truncated file."""


@dataclass(frozen=True)
class Document:
    """A text with the name it is reported by; `split` is None where the source leaves the choice to us."""

    name: str
    text: str
    split: SplitName | None = None


@dataclass(frozen=True)
class TextFile:
    """A file to read, the name its documents are reported by, and the fields of JSON lines or Parquet rows."""

    path: Path
    name: str
    text_field: str = "text"
    split_field: str | None = None
    name_field: str | None = None


@dataclass
class Faults:
    """What to do with a document that cannot be used: stop with an error, or leave it out and count it."""

    on_error: OnError = "stop"
    skipped: Counter[str] = field(default_factory=Counter)

    def met(self, kind: str, where: str, what: str) -> None:
        """Raise `DataError` for the fault, or count it under `kind`."""
        if self.on_error == "stop":
            raise DataError(
                f"{where}: {what}; mend it, or leave such documents out: "
                "`xgen prepare SOURCE --out STORE --on-error skip`, then `--data STORE`"
            )
        self.skipped[kind] += 1


def list_files(source: str | Path, text_field: str = "text", split_field: str | None = None) -> list[TextFile]:
    """The files of a source, in the order they are read: a file, a folder (with all below it), or "embedded:NAME".

    Raises `DataError` when there is nothing there, or nothing to read in it.
    """
    if str(source).startswith(EMBEDDED):
        return [_embedded(str(source).removeprefix(EMBEDDED))]
    path = Path(source)
    if path.is_file():
        return [TextFile(path, path.name, text_field, split_field)]
    if not path.exists():
        raise DataError(f"there is no file or folder {path} to read documents from")
    if not path.is_dir():
        raise DataError(
            f"{path} is neither a file nor a folder; name a file of text, JSON lines or Parquet, or a folder"
        )
    found = sorted(_walk(path), key=lambda file: file.relative_to(path).parts)
    if not found:
        raise DataError(f"folder {path} holds no files to read documents from")
    return [TextFile(file, file.relative_to(path).as_posix(), text_field, split_field) for file in found]


def read_documents(
    source: str | Path, on_error: OnError = "stop", text_field: str = "text", split_field: str | None = None
) -> Iterator[Document]:
    """All documents of a source (see `list_files`), in order.

    A fault raises `DataError` with file and line, or under "skip" leaves the document out.
    """
    faults = Faults(on_error)
    for file in list_files(source, text_field, split_field):
        yield from read_file(file, faults)


def read_file(file: TextFile, faults: Faults) -> Iterator[Document]:
    """The documents of one file."""
    suffix = _inner_suffix(file.path)
    if _bytes_of(file.path) == 0:
        faults.met("empty file", str(file.path), "the file is empty")
    elif suffix == ".parquet":
        yield from _read_parquet(file, faults)
    elif suffix in LINE_SUFFIXES:
        yield from _read_lines(file, faults)
    else:
        yield from _read_text(file, faults)


def is_packed(file: TextFile) -> bool:
    """Whether the file's bytes are other than its text's: compressed, or Parquet."""
    return file.path.suffix.lower() in (*COMPRESSED_SUFFIXES, ".parquet")


def _walk(folder: Path) -> Iterator[Path]:
    def stop(cause: OSError) -> None:
        raise DataError(f"cannot read folder {cause.filename}: {cause.strerror}") from cause

    for root, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in files if not name.startswith("."))


def _embedded(name: str) -> TextFile:
    path = CORPUS / f"{name}.jsonl.xz"
    if not path.is_file():
        there = ", ".join(EMBEDDED + file.name.removesuffix(".jsonl.xz") for file in sorted(CORPUS.glob("*.jsonl.xz")))
        raise DataError(f"there is no embedded corpus {name!r}; there are {there}")
    return TextFile(path, path.name, split_field="split", name_field="name")


def _inner_suffix(path: Path) -> str:
    """The suffix that says what is in the file, below that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _bytes_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as cause:
        raise DataError(f"cannot read {path}: {cause.strerror or cause}") from cause


def _opened(path: Path) -> IO[bytes]:
    """The file's content, decompressed."""
    match path.suffix.lower():
        case ".gz":
            return cast(IO[bytes], gzip.open(path, "rb"))
        case ".xz":
            return cast(IO[bytes], lzma.open(path, "rb"))
        case ".zst":
            return io.BufferedReader(_pyarrow(path).input_stream(str(path), compression="zstd"))
        case _:
            return path.open("rb")


def _pyarrow(path: Path) -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as cause:
        raise DataError(
            f"{path}: to read it pyarrow is needed; install it with `pip install 'xgen[prepare]'`"
        ) from cause
    return cast(ModuleType, pyarrow)


def _read_text(file: TextFile, faults: Faults) -> Iterator[Document]:
    where = str(file.path)
    try:
        with _opened(file.path) as stream:
            raw = stream.read()
    except _DAMAGE as cause:
        faults.met("unreadable file", where, f"cannot be read ({cause})")
        return
    text = _decode(raw, where, faults)
    if text is not None:
        yield from _document(file.name, text, None, where, faults)


def _read_lines(file: TextFile, faults: Faults) -> Iterator[Document]:
    number = 0
    try:
        with _opened(file.path) as stream:
            for number, raw in enumerate(stream, 1):
                yield from _read_line(file, number, raw, faults)
    except _DAMAGE as cause:
        faults.met("unreadable file", f"{file.path}, after line {number}", f"cannot be read further ({cause})")


def _read_line(file: TextFile, number: int, raw: bytes, faults: Faults) -> Iterator[Document]:
    if not raw.strip():
        return
    where = f"{file.path}, line {number}"
    line = _decode(raw, where, faults)
    if line is None:
        return
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as cause:
        faults.met("broken JSON", where, f"broken JSON ({cause})")
        return
    if isinstance(row, dict):
        yield from _read_row(file, number, row, where, faults)
    else:
        faults.met("not an object", where, f"the line is a JSON {type(row).__name__}, not an object with fields")


def _read_parquet(file: TextFile, faults: Faults) -> Iterator[Document]:
    pyarrow = _pyarrow(file.path)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            there = table.schema_arrow.names
            wanted = [name for name in (file.text_field, file.split_field, file.name_field) if name in there]
            if not wanted:
                raise DataError(f"{file.path} has no column {_absent(file.text_field, there)}")
            for group in table.iter_batches(batch_size=256, columns=wanted):
                for row in group.to_pylist():
                    number += 1
                    yield from _read_row(file, number, row, f"{file.path}, row {number}", faults)
    except (pyarrow.ArrowException, OSError) as cause:
        faults.met("unreadable file", f"{file.path}, after row {number}", f"cannot be read further ({cause})")


def _read_row(file: TextFile, number: int, row: dict[str, Any], where: str, faults: Faults) -> Iterator[Document]:
    if file.text_field not in row:
        faults.met("no text", where, f"there is no field {_absent(file.text_field, row)}")
        return
    text = row[file.text_field]
    if not isinstance(text, str):
        faults.met("no text", where, f"field {file.text_field!r} is {_shown(text)}, not text")
        return
    split = row.get(file.split_field) if file.split_field else None
    if split is not None and split not in SPLITS:
        faults.met("unknown split", where, f"field {file.split_field!r} is {_shown(split)}, not train or held_out")
        return
    name = str(row[file.name_field]) if file.name_field else f"{file.name}:{number}"
    yield from _document(name, text, split, where, faults)


def _document(name: str, text: str, split: SplitName | None, where: str, faults: Faults) -> Iterator[Document]:
    if not text.strip():
        faults.met("empty document", where, "the document is empty")
        return
    try:
        text.encode()
    except UnicodeEncodeError as cause:
        faults.met("not Unicode", where, f"character {cause.start} is {text[cause.start]!a}, half of a surrogate pair")
        return
    yield Document(name, text, split)


def _decode(raw: bytes, where: str, faults: Faults) -> str | None:
    """UTF-8 text without the byte-order mark that some editors put first; None after a fault."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        line = raw.count(b"\n", 0, cause.start) + 1
        place = where if ", line " in where else f"{where}, line {line}"
        wide = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
        guess = "it looks like UTF-16" if wide else "it may be in another encoding, or no text"
        faults.met("not UTF-8", place, f"byte {cause.start} (0x{raw[cause.start]:02x}) is not UTF-8: {guess}")
        return None


def _absent(wanted: str, there: Any) -> str:
    found = ", ".join(map(repr, there)) or "none"
    return f"{wanted!r}; there is {found}, so name the one to read with `xgen prepare --text-field`"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
