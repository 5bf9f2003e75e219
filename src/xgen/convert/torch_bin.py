"""Weights in torch's zip files (`pytorch_model.bin`), found without unpickling anything.

A pickle is a program. This reads the few instructions that `torch.save` of named tensors consists of, makes records of
what they would build, and refuses the first that is anything else: no class is looked up and nothing is called. The
tensors' bytes lie uncompressed in the zip file and are read from there, part by part.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib.stride_tricks import as_strided

from xgen.convert.pieces import TYPES
from xgen.errors import CheckpointError

LARGEST_PICKLE = 1 << 20
"""Bytes of a file's names and shapes; a model of 80 layers takes 200 KB."""

LARGEST_DIRECTORY = 4 << 20
"""Bytes of the zip file's list of members."""

_STORAGES = {
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
}
_TENSOR, _PARAMETER, _ORDERED = (
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
)

_FIRST_OF_A_PICKLE = b"\x80"
"""What torch wrote before 1.6 is pickles one after another, not a zip file."""


@dataclass(frozen=True)
class _Name:
    """What a pickle asks to be looked up; nothing is."""

    text: str


@dataclass(frozen=True)
class _Storage:
    """A member of the zip file and what it holds."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class _View:
    """A tensor as the pickle builds it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark:
    """Where on the stack a group begins."""


_MARK = _Mark()


@dataclass(frozen=True)
class BinTensor:
    """A tensor in a file; `start` is its first element's place in bytes. `strides` count elements."""

    path: Path
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        count = math.prod(self.shape)
        found = np.fromfile(self.path, self.dtype, count, offset=self.start)
        if found.size != count:
            raise CheckpointError(f"{self.path} ends too early: it was cut short; fetch it again")
        in_bytes = [stride * self.dtype.itemsize for stride in self.strides]
        return as_strided(found, self.shape, in_bytes)


def tensors_of(path: Path) -> dict[str, BinTensor]:
    """The tensors of the file at `path` by name; none of their values is read.

    Raises CheckpointError when the file is damaged, is of before torch 1.6, or holds anything but named tensors.
    """
    try:
        with path.open("rb") as stream:
            if stream.read(1) == _FIRST_OF_A_PICKLE:
                remedy = "load and save it once with torch 1.6 or later, or get the model as safetensors"
                raise CheckpointError(
                    f"{path} is in the format of before torch 1.6, which only a pickle's code reads; {remedy}"
                )
            _check_directory(stream, path)
            with zipfile.ZipFile(stream) as archive:
                return _Archive(path, stream, archive).tensors()
    except OSError as cause:
        raise CheckpointError(f"cannot read {path}: {cause.strerror or cause}") from cause
    # RuntimeError: of an encrypted member, or a zip version that it does not know. ValueError: of a name in no UTF-8.
    except (zipfile.BadZipFile, zipfile.LargeZipFile, struct.error, RuntimeError, ValueError) as cause:
        raise CheckpointError(f"{path} is no whole file of torch's: {cause!s:.200}; fetch it again") from cause


def _check_directory(stream: BinaryIO, path: Path) -> None:
    """Refuse a list of members that would fill the memory, before the zip library reads it whole."""
    end = stream.seek(0, 2)
    stream.seek(max(0, end - (1 << 16) - 22))
    tail = stream.read()
    place = tail.rfind(b"PK\x05\x06")
    if place < 0 or len(tail) - place < 22:
        raise CheckpointError(f"{path} is no zip file, or its end is missing; fetch it again")
    size = int.from_bytes(tail[place + 12 : place + 16], "little")
    if tail[max(0, place - 20) : place].startswith(
        b"PK\x06\x07"
    ):  # zip64: the size is in a record of its own before it
        stated = int.from_bytes(tail[place - 12 : place - 4], "little")
        if stated != end - len(tail) + place - 76 or not tail[max(0, place - 76) : place].startswith(b"PK\x06\x06"):
            raise CheckpointError(f"{path} has no whole list of members; fetch it again")
        size = int.from_bytes(tail[place - 36 : place - 28], "little")
    if size > LARGEST_DIRECTORY:
        raise CheckpointError(f"{path} lists {size} bytes of members, more than any model has; fetch it again")


class _Archive:
    """An open file of torch's."""

    def __init__(self, path: Path, stream: BinaryIO, archive: zipfile.ZipFile) -> None:
        self._path, self._stream, self._archive = path, stream, archive
        self._size = path.stat().st_size
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in archive.infolist():
            if member.filename in self._members:
                raise self._fault(f"has {member.filename!a:.100} twice")
            self._members[member.filename] = member
        pickles = [name for name in self._members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise self._fault("has no data.pkl, so torch.save did not write it")
        self._prefix = pickles[0].removesuffix("data.pkl")

    def tensors(self) -> dict[str, BinTensor]:
        order = self._prefix + "byteorder"
        if order in self._members and self._small(order, 16) != b"little":
            raise self._fault("was written on a big-endian machine; save it again on a little-endian one")
        found = _Reader(self._path).read(self._small(self._prefix + "data.pkl", LARGEST_PICKLE))
        return {name: self._tensor(name, view) for name, view in found.items()}

    def _small(self, name: str, most: int) -> bytes:
        member = self._members[name]
        if member.file_size > most:
            raise self._fault(f"holds {name!a:.100} of {member.file_size} bytes; at most {most} are known to be needed")
        self._check_stored(member)
        return self._archive.read(member)

    def _check_stored(self, member: zipfile.ZipInfo) -> None:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise self._fault(f"holds {member.filename!a:.100} compressed, which torch never does")

    def _tensor(self, name: str, view: _View) -> BinTensor:
        storage = view.storage
        dtype = TYPES[storage.dtype]
        member = self._members.get(f"{self._prefix}data/{storage.key}")
        if member is None:
            raise self._fault(f"has no values for {name!a:.100}")
        self._check_stored(member)
        if member.file_size != storage.count * dtype.itemsize:
            raise self._fault(
                f"holds {member.file_size} bytes for {name!a:.100}, which takes {storage.count} of {storage.dtype}"
            )
        size = math.prod(view.shape)
        last = sum((length - 1) * stride for length, stride in zip(view.shape, view.strides, strict=True))
        if size == 0 or view.offset + last >= storage.count:
            raise self._fault(
                f"states a shape {view.shape} for {name!a:.100} that its {storage.count} values cannot have"
            )
        strides = view.strides
        # The stride of an axis of one element has no meaning, and torch stores any.
        if all(
            length == 1 or stride == plain
            for length, stride, plain in zip(view.shape, strides, _row_major(view.shape), strict=True)
        ):
            strides = _row_major(view.shape)
        elif last + 1 != size:
            remedy = "save it again with .contiguous()"
            raise CheckpointError(f"{self._path} holds {name!a:.100} in pieces (strides {strides}); {remedy}")
        start = self._data_start(member) + view.offset * dtype.itemsize
        return BinTensor(self._path, start, view.shape, strides, dtype)

    def _data_start(self, member: zipfile.ZipInfo) -> int:
        """Where a member's bytes begin: after its own header, whose padding aligns them."""
        self._stream.seek(member.header_offset)
        header = self._stream.read(30)
        if header[:4] != b"PK\x03\x04" or len(header) < 30:
            raise self._fault(f"has no header for {member.filename!a:.100}")
        names, extra = struct.unpack("<HH", header[26:30])
        start = member.header_offset + 30 + int(names) + int(extra)
        if start + member.file_size > self._size:
            raise self._fault(f"ends within {member.filename!a:.100}")
        return start

    def _fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path} {what}; fetch it again or get the model as safetensors")


class _Reader:
    """The pickle of named tensors, instruction by instruction."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def read(self, pickle: bytes) -> dict[str, _View]:
        try:
            for operation, argument, _ in pickletools.genops(BytesIO(pickle)):
                self._step(operation.name, argument)
        except (ValueError, IndexError, KeyError, TypeError, UnicodeError) as cause:
            raise self._refusal(f"its list of tensors is damaged ({type(cause).__name__}: {cause})") from cause
        [found] = self._stack[-1:] or [None]
        if not isinstance(found, dict):
            raise self._refusal("it holds no table of named tensors")
        for name, value in found.items():
            if not isinstance(value, _View):
                raise self._refusal(f"{name!a:.100} is not a tensor but {_kind(value)}")
        return found

    def _step(self, operation: str, argument: Any) -> None:
        if operation in _CONSTANTS:
            self._stack.append(_CONSTANTS[operation](argument))
        elif operation in _PUTS:
            self._memo[len(self._memo) if operation == "MEMOIZE" else argument] = self._stack[-1]
        elif operation in _GETS:
            self._stack.append(self._memo[argument])
        elif operation in _TUPLES:
            count = _TUPLES[operation]
            items = self._popped(count) if count else self._group()
            self._stack.append(tuple(items))
        elif operation in ("SETITEM", "SETITEMS"):
            items = self._popped(2) if operation == "SETITEM" else self._group()
            self._set_items(items)
        elif operation == "GLOBAL":
            self._stack.append(self._name(argument))
        elif operation == "STACK_GLOBAL":
            module, name = self._popped(2)
            self._stack.append(self._name(f"{module} {name}"))
        elif operation == "BINPERSID":
            self._stack.append(self._storage(*self._popped(1)))
        elif operation == "REDUCE":
            called, arguments = self._popped(2)
            self._stack.append(self._built(called, arguments))
        elif operation == "BUILD":
            _, target = self._popped(1), self._stack[-1]  # the state of a table of tensors: torch's own version numbers
            if not isinstance(target, dict):
                raise self._refusal(f"its pickle sets the state of {_kind(target)}")
        elif operation not in _NOTHING:
            raise self._refusal(f"its pickle holds {operation}, which no table of tensors needs")

    def _popped(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise IndexError("the stack is empty")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _group(self) -> list[Any]:
        """What lies above the topmost mark."""
        place = len(self._stack) - 1
        while self._stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise IndexError("a group has no beginning")
        items = self._stack[place + 1 :]
        del self._stack[place:]
        return items

    def _set_items(self, items: list[Any]) -> None:
        table = self._stack[-1]
        if not isinstance(table, dict) or len(items) % 2 or not all(isinstance(key, str) for key in items[::2]):
            raise self._refusal("its pickle fills something other than a table by name")
        table.update(zip(items[::2], items[1::2], strict=True))

    def _name(self, text: str) -> _Name:
        if text not in (_ORDERED, _TENSOR, _PARAMETER, *_STORAGES):
            name = ".".join(text.split(" "))
            raise self._refusal(
                f"its pickle asks for {name!a:.100}, which no table of float32, float16 or bfloat16 tensors needs"
            )
        return _Name(text)

    def _storage(self, identity: Any) -> _Storage:
        match identity:
            case ("storage", _Name(text), str(key), str(), int(count)) if text in _STORAGES and 0 <= count < 1 << 63:
                return _Storage(key, _STORAGES[text], count)
        raise self._refusal("its pickle refers to something other than a tensor's values")

    def _built(self, called: Any, arguments: Any) -> Any:
        match called, arguments:
            case _Name(text), () if text == _ORDERED:
                return {}
            case _Name(text), (_View() as view, *_) if text == _PARAMETER:
                return view
            case _Name(text), (_Storage() as storage, int(offset), tuple(shape), tuple(strides), *_) if text == _TENSOR:
                whole = all(type(n) is int and 0 <= n < 1 << 63 for n in (offset, *shape, *strides))
                if whole and len(shape) == len(strides) <= 8:
                    return _View(storage, offset, shape, strides)
                raise self._refusal("a tensor's shape in its pickle is no shape")
        raise self._refusal(f"its pickle calls {_kind(called)} in a way that torch.save does not")

    def _refusal(self, why: str) -> CheckpointError:
        remedy = "nothing was run; get the model as safetensors"
        return CheckpointError(f"{self._path} is refused: {why}; {remedy}")


_CONSTANTS: dict[str, Callable[[Any], Any]] = {
    "MARK": lambda _: _MARK,
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_DICT": lambda _: {},
} | dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"), lambda value: value)
_PUTS = ("BINPUT", "LONG_BINPUT", "MEMOIZE")
_GETS = ("BINGET", "LONG_BINGET")
_TUPLES = {"TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING = ("PROTO", "FRAME", "STOP")


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _kind(value: object) -> str:
    return repr(value.text) if isinstance(value, _Name) else type(value).__name__.lstrip("_").lower()
