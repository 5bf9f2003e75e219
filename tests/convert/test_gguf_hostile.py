"""GGUF files that are damaged or made to harm: one clear line, and no more memory than the file is worth."""

from __future__ import annotations

import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from gguf_files import gguf_spec, rewritten, small_file
from memory_source import model_in_memory

from xgen.convert.gguf_header import read_header
from xgen.convert.gguf_read import open_gguf
from xgen.convert.gguf_write import write_gguf
from xgen.convert.pieces import pieces
from xgen.errors import CheckpointError
from xgen.tokens.tokenizer import train_bpe

HUGE = 2**63 - 1
STRING, ARRAY, UINT32 = 8, 9, 4
FLIPS = 300


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


ARCHITECTURE = key("general.architecture", STRING, text("llama"))


def tensor(name: str, shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return (
        text(name)
        + struct.pack("<I", len(shape))
        + struct.pack(f"<{len(shape)}Q", *shape)
        + struct.pack("<IQ", kind, offset)
    )


def header(*entries: bytes, tensors: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None) -> bytes:
    """A file of these entries, with two kilobytes of zeros after them."""
    tensor_count, key_count = counts or (len(tensors), len(entries))
    start = b"GGUF" + struct.pack("<IQQ", 3, tensor_count, key_count)
    return start + b"".join(entries) + b"".join(tensors) + bytes(2048)


HOSTILE = {
    "empty": (b"", "cut off"),
    "not gguf": (b"PK\x03\x04" + bytes(100), "no GGUF file"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version is 1"),
    "version 99": (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version is 99"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version is 50331648"),
    "tensors": (header(ARCHITECTURE, counts=(HUGE, 1)), "tensors; "),
    "keys": (header(ARCHITECTURE, counts=(0, HUGE)), "keys; "),
    "keys that are not there": (header(ARCHITECTURE, counts=(0, 60_000)), "key"),
    "long name": (header(struct.pack("<Q", HUGE)), "bytes in the name of key 0"),
    "long text": (header(key("a", STRING, struct.pack("<Q", HUGE))), "bytes in key 'a'"),
    "text past the end": (header(key("a", STRING, struct.pack("<Q", 5000))), "key 'a' would end at byte"),
    "long array": (header(key("a", ARRAY, struct.pack("<IQ", UINT32, HUGE))), "elements in key 'a'"),
    "long list": (header(key("a", ARRAY, struct.pack("<IQ", STRING, HUGE))), "texts in key 'a'"),
    "array past the end": (header(key("a", ARRAY, struct.pack("<IQ", UINT32, 4000))), "key 'a' would end"),
    "nested arrays": (header(key("a", ARRAY, struct.pack("<IQIQ", ARRAY, 1, ARRAY, 1))), "array of arrays"),
    "unknown type": (header(key("a", 77, b"")), "type 77"),
    "not utf-8": (header(key("a", STRING, text(b"\xff\xfe"))), "not UTF-8"),
    "name of two lines": (header(key("a\nb", UINT32, struct.pack("<I", 1))), r"'a\nb', which cannot be printed"),
    "key twice": (header(ARCHITECTURE, ARCHITECTURE), "'general.architecture' is there twice"),
    "tensor twice": (header(ARCHITECTURE, tensors=(tensor("t"), tensor("t", offset=32))), "'t' is there twice"),
    "alignment 0": (header(ARCHITECTURE, key("general.alignment", UINT32, struct.pack("<I", 0))), "alignment is 0"),
    "alignment 33": (header(ARCHITECTURE, key("general.alignment", UINT32, struct.pack("<I", 33))), "alignment is 33"),
    "alignment text": (header(ARCHITECTURE, key("general.alignment", STRING, text("x" * 900))), "alignment is 'xxx"),
    "no axes": (header(ARCHITECTURE, tensors=(tensor("t", ()),)), "has 0 axes"),
    "many axes": (header(ARCHITECTURE, tensors=(text("t") + struct.pack("<I", 2**31),)), "axes"),
    "empty axis": (header(ARCHITECTURE, tensors=(tensor("t", (4, 0)),)), "shape (0, 4)"),
    "vast shape": (header(ARCHITECTURE, tensors=(tensor("t", (HUGE, HUGE)),)), "'t' would end at byte"),
    "tensor type": (header(ARCHITECTURE, tensors=(tensor("t", kind=9999),)), "type 9999"),
    "broken block": (header(ARCHITECTURE, tensors=(tensor("t", (33,), kind=8),)), "multiples of 32"),
    "offset": (header(ARCHITECTURE, tensors=(tensor("t", offset=HUGE),)), "offset"),
    "overlap": (header(ARCHITECTURE, tensors=(tensor("t"), tensor("u"))), "at offset 0 where 32 is due"),
    "no architecture": (header(key("a", UINT32, struct.pack("<I", 1))), "general.architecture is missing"),
    "no tensors": (header(ARCHITECTURE), "llama.block_count is missing"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    data, told = HOSTILE[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        open_gguf(path)
    assert told in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(CheckpointError, match="cannot read"):
            open_gguf(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a tokenizer, quantised."""
    path = tmp_path_factory.mktemp("whole") / "m.gguf"
    tokenizer = train_bpe(["the cat sat on the mat, and the dog lay down by the log " * 20], 280)
    told = {"tokenizer": tokenizer, "end_ids": (0,), "pad_id": 0, "chat_template": "{{ messages }}"}
    description, source = model_in_memory(gguf_spec(rope="llama3", vocab_size=280), **told)
    write_gguf(description, source, path, "q8_0")
    return path


def read_all(path: Path) -> None:
    description, source = open_gguf(path)
    for row, layer in pieces(description.spec):
        source.read(row, layer)


def test_every_truncation_is_refused(whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    read_all(whole)
    begin = min(tensor.offset for tensor in read_header(whole).tensors.values())
    last = max(tensor.offset + tensor.bytes for tensor in read_header(whole).tensors.values())
    path = tmp_path / "m.gguf"
    for end in (*range(0, begin, 97), begin - 1, begin, (begin + last) // 2, last - 1):
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError):
            open_gguf(path)


@pytest.mark.parametrize("part", ["anywhere", "fields", "tokens", "tensors"])
def test_flipped_bytes_raise_no_other_error(part: str, whole: Path, tmp_path: Path) -> None:
    data = np.frombuffer(whole.read_bytes(), np.uint8)
    at = whole.read_bytes().index
    ends = {
        "anywhere": (0, len(data)),
        "fields": (0, at(b"tokenizer.ggml.tokens")),
        "tokens": (at(b"tokenizer.ggml.tokens"), at(b"tokenizer.chat_template")),
        "tensors": (at(b"rope_freqs.weight") - 8, min(t.offset for t in read_header(whole).tensors.values())),
    }
    random = np.random.default_rng(20_261_123)
    refused, told = 0, ""
    for _ in range(FLIPS // 4):
        damaged = data.copy()
        damaged[random.integers(*ends[part], random.integers(1, 4))] ^= np.uint8(random.integers(1, 256))
        path = tmp_path / "m.gguf"
        path.write_bytes(damaged.tobytes())
        try:
            read_all(path)
        except CheckpointError as error:
            refused += 1
            told += str(error)
    assert "\n" not in told
    assert part == "anywhere" or refused > FLIPS // 10


def test_a_file_cut_after_opening_is_told(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(whole.read_bytes())
    description, source = open_gguf(path)
    path.write_bytes(whole.read_bytes()[:-4096])
    *_, (row, layer) = pieces(description.spec)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        source.read(row, layer)


def test_false_counts_take_no_memory(tmp_path: Path) -> None:
    """Every hostile header, and shapes of terabytes in a model that fits otherwise, within a quarter of a gibibyte."""
    for number, (data, _) in enumerate(HOSTILE.values()):
        (tmp_path / f"{number}.gguf").write_bytes(data)
    small_file(tmp_path / "plain.gguf")
    fields = {"llama.embedding_length": 2**31, "llama.feed_forward_length": 2**31, "llama.attention.head_count": 2**31}
    rewritten(tmp_path / "plain.gguf", fields).rename(tmp_path / "vast.gguf")
    code = textwrap.dedent("""
        import resource, sys
        from pathlib import Path
        from xgen.convert.gguf_read import open_gguf
        from xgen.errors import CheckpointError
        try:
            open_gguf(Path(sys.argv[1]) / "none.gguf")  # so that what is imported late is there
        except CheckpointError:
            pass
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), resource.RLIM_INFINITY))
        for path in sorted(Path(sys.argv[1]).glob("*.gguf")):
            try:
                open_gguf(path)
                print(path.name)
            except CheckpointError:
                print("refused")
        """)
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert sorted(set(run.stdout.split())) == ["plain.gguf", "refused"]
