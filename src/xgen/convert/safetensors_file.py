"""A safetensors file written front to back, so that its tensors need never be in memory together.

The format: eight bytes that say how long the header is, the header as JSON, the tensors' bytes one after another.
The safetensors library writes only tensors that are all in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from xgen.checkpoints.stored import SAFETENSORS_TYPES
from xgen.errors import CheckpointError

_NAMES = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
_PART = 1 << 22
"""Elements turned round or cast at once: 16 MiB in float32."""


class SafetensorsFile:
    """Tensors are declared first, then written in that order, each whole or in consecutive parts.

    Types wider than those that follow must come first: readers that map the file need tensors at multiples of their
    elements' size.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._left = [(name, dtype, math.prod(shape)) for name, (dtype, shape) in tensors.items()]
        self._left.reverse()
        self._file = path.open("wb")
        self._file.write(_header(tensors, metadata or {}))

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._left:
            raise ValueError(f"{len(self._left)} tensors were declared but not written, next is {self._left[-1][0]}")

    def write(self, array: np.ndarray) -> None:
        """Append `array`, the next tensor or the next part of it, as its declared type.

        Raises CheckpointError when a value is too large for that type.
        """
        name, dtype, size = self._left.pop()
        if array.size > size:
            raise ValueError(f"{name} has room for {size} elements, got {array.size}")
        rows = max(1, _PART // max(1, math.prod(array.shape[1:])))
        for start in range(0, len(array), rows):
            self._file.write(cast(array[start : start + rows], dtype, name).tobytes())
        if array.size < size:
            self._left.append((name, dtype, size - array.size))


def _header(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, (dtype, shape) in tensors.items():
        if place % dtype.itemsize:
            raise ValueError(f"{name} would begin at byte {place}; declare wider types first")
        end = place + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def cast(part: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`part` of the weight `name` as `dtype`. Raises CheckpointError when a value is too large for it."""
    if part.dtype == dtype:
        return part
    with np.errstate(over="ignore"):  # told below, by name
        cast = part.astype(dtype)
    if not np.isfinite(cast).all():
        largest = np.abs(part).max()
        raise CheckpointError(f"{name} holds {largest:g}, too large for {dtype.name}; choose bfloat16 or float32")
    return cast
