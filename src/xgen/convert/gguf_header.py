"""The header of a GGUF file, read with every length checked before it is believed.

Layout: ggml's docs/gguf.md, versions 2 and 3, little-endian. The gguf library's reader makes an array of every string
(1.7 s and 200 MB for a vocabulary of 49,152), keeps the whole file mapped, and loops over a false count until memory
is gone; of the library only the block sizes are used here.
"""

from __future__ import annotations

import math
import os
import reprlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NoReturn, TypeVar

import numpy as np

from xgen.errors import CheckpointError, XgenError

T = TypeVar("T")

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Codes of the numeric types, those of `struct` and of numpy."""

# Far above any model's, and low enough that a false count costs little memory.
_MOST_BYTES = 1 << 27
_MOST_KEYS = 1 << 16
_MOST_TENSORS = 1 << 17
_MOST_ELEMENTS = 1 << 23
_MOST_AXES = 4
_LONGEST_NAME = 1 << 10


def library() -> ModuleType:
    """The gguf library. Raises XgenError when it is not installed."""
    try:
        import gguf
    except ImportError as cause:
        raise XgenError(
            "to read and write GGUF the gguf library is needed; install it with `pip install 'xgen[gguf]'`"
        ) from cause
    module: ModuleType = gguf
    return module


@dataclass(frozen=True)
class Tensor:
    """One tensor's place. `shape` has the slowest axis first, as numpy has it; `offset` counts from the file's begin;
    `kind` is ggml's name of the type it is stored in."""

    shape: tuple[int, ...]
    kind: str
    offset: int
    bytes: int


@dataclass(frozen=True)
class Header:
    path: Path
    fields: dict[str, Any]
    """Numbers, truths and texts as Python's own, arrays of texts as lists, other arrays as numpy's."""
    tensors: dict[str, Tensor]

    def get(self, key: str, kind: type[T]) -> T | None:
        """The value of `key`, None when the file has none. Raises CheckpointError when it is of another kind."""
        value = self.fields.get(key)
        if kind is float and type(value) is int:
            value = float(value)
        if value is not None and type(value) is not kind:
            self.refuse(f"{key} is of type {type(value).__name__}; it must be {kind.__name__}")
        found: T | None = value
        return found

    def need(self, key: str, kind: type[T]) -> T:
        """`get`, for a key that must be there."""
        value = self.get(key, kind)
        if value is None:
            self.refuse(f"{key} is missing from its header")
        return value

    def refuse(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {what}")


def read_header(path: Path) -> Header:
    """Fields and tensors' places of the file at `path`; no tensor is read.

    Raises CheckpointError when it is no GGUF file, cut off or contradicts itself.
    """
    sizes = {kind.value: (kind.name, *size) for kind, size in library().GGML_QUANT_SIZES.items()}
    try:
        with path.open("rb") as file:
            return _Reader(path, file).header(sizes)
    except OSError as cause:
        raise CheckpointError(f"cannot read {path}: {cause.strerror or cause}") from cause


class _Reader:
    """Reads a header front to back; `at` is the place in the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file, self._at = path, file, 0
        self._size = os.fstat(file.fileno()).st_size

    def header(self, sizes: dict[int, tuple[str, int, int]]) -> Header:
        if self._take(4, "the magic") != _MAGIC:
            self._refuse("it does not begin with 'GGUF', so it is no GGUF file")
        version = self._number("I", "the version")
        if version not in _VERSIONS:
            self._refuse(f"its GGUF version is {version}; 2 and 3, little-endian, can be read: convert the model again")
        tensor_count = self._count(_MOST_TENSORS, "tensors")
        fields = self._named(self._count(_MOST_KEYS, "keys"), "key", lambda key: self._value(f"key {key!r}"))
        places = self._named(tensor_count, "tensor", lambda name: self._place(name, sizes))
        alignment = fields.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self._refuse(f"general.alignment is {reprlib.repr(alignment)}; it must be a power of two")
        return Header(self._path, fields, self._tensors(places, alignment))

    def _named(self, count: int, what: str, read: Callable[[str], T]) -> dict[str, T]:
        """`count` entries, each a name and what `read` reads after it."""
        found: dict[str, T] = {}
        for _ in range(count):
            name = self._string(f"the name of {what} {len(found)}", _LONGEST_NAME)
            if not name.isprintable():  # errors name it, each on one line
                self._refuse(f"the name of {what} {len(found)} is {reprlib.repr(name)}, which cannot be printed")
            if name in found:
                self._refuse(f"{what} {name!r} is there twice")
            found[name] = read(name)
        return found

    def _value(self, what: str) -> Any:
        kind = self._number("I", f"the type of {what}")
        if kind == _STRING:
            return self._string(what)
        if kind != _ARRAY:
            return self._number(self._code(kind, what), what)
        kind = self._number("I", f"the type of {what}")
        if kind == _STRING:
            return [self._string(what) for _ in range(self._count(_MOST_ELEMENTS, f"texts in {what}"))]
        code = self._code(kind, what)
        count = self._count(_MOST_ELEMENTS, f"elements in {what}")
        return np.frombuffer(self._take(count * struct.calcsize("<" + code), what), "<" + code)

    def _place(self, name: str, sizes: dict[int, tuple[str, int, int]]) -> Tensor:
        """A tensor's entry, its offset still counted from where the tensors begin."""
        what = f"tensor {name!r}"
        axes = self._number("I", f"the axes of {what}")
        if not 1 <= axes <= _MOST_AXES:
            self._refuse(f"{what} has {axes} axes; 1 to {_MOST_AXES} can be")
        shape = tuple(self._number("Q", f"the shape of {what}") for _ in range(axes))[::-1]
        kind = self._number("I", f"the type of {what}")
        if kind not in sizes:
            self._refuse(f"{what} is of type {kind}, which the installed gguf library does not know")
        named, block, block_bytes = sizes[kind]
        if not all(shape) or shape[-1] % block:
            self._refuse(f"{what} of type {named} has shape {shape}; its rows must be multiples of {block}")
        offset = self._number("Q", f"the offset of {what}")
        return Tensor(shape, named, offset, math.prod(shape) // block * block_bytes)

    def _tensors(self, places: dict[str, Tensor], alignment: int) -> dict[str, Tensor]:
        """The tensors, their offsets counted from the file's begin."""
        begin = -(-self._at // alignment) * alignment
        found, expected = {}, 0
        for name, place in places.items():
            # ggml wants them one after another, so none can hide in another.
            if place.offset != expected:
                self._refuse(f"tensor {name!r} is at offset {place.offset} where {expected} is due")
            found[name] = Tensor(place.shape, place.kind, begin + expected, place.bytes)
            self._check_end(found[name].offset + place.bytes, self._size, f"tensor {name!r}")
            expected += -(-place.bytes // alignment) * alignment
        return found

    def _code(self, kind: int, what: str) -> str:
        if kind not in _SCALARS:
            self._refuse(f"{what} is of type {kind}, which GGUF does not have, or an array of arrays")
        return _SCALARS[kind]

    def _count(self, most: int, what: str) -> int:
        """How many of `what` follow, at most `most`."""
        count: int = self._number("Q", f"the count of {what}")
        if count > most:
            self._refuse(f"it claims {count:,} {what}; {most:,} are believed")
        return count

    def _number(self, code: str, what: str) -> Any:
        layout = "<" + code
        return struct.unpack(layout, self._take(struct.calcsize(layout), what))[0]

    def _string(self, what: str, longest: int = _MOST_BYTES) -> str:
        data = self._take(self._count(longest, f"bytes in {what}"), what)
        try:
            return data.decode()
        except UnicodeDecodeError as cause:
            raise CheckpointError(f"{self._path}: {what} is not UTF-8: it is damaged; fetch it again") from cause

    def _take(self, count: int, what: str) -> bytes:
        self._at += count
        self._check_end(self._at, min(self._size, _MOST_BYTES), what)
        return self._file.read(count)

    def _check_end(self, end: int, most: int, what: str) -> None:
        if end > most:
            limit = "the file has" if most == self._size else "a header may have"
            self._refuse(f"{what} would end at byte {end:,}, but {limit} {most:,}: it is cut off or damaged")

    def _refuse(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: {what}")
