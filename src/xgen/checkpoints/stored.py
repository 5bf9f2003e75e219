"""Arrays as they lie on disk, read in parts: from an Orbax tree, or from one safetensors file each."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np

from xgen.checkpoints.local import Box, DeviceParts, Pending, cells, extents, whole
from xgen.checkpoints.manifest import Manifest, Storage
from xgen.errors import CheckpointError

PART_BYTES = 8 * 2**20
"""Of an array in a tree: stored and compressed as one, and the most that a reader on another mesh may read in vain at
either end of its part. Of an array in a file: read at once, where a layer is not larger."""

SAFETENSORS_TYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Our types by the names that safetensors gives them."""

_LARGEST_HEADER = 1 << 20
"""Of a file of one tensor; the real ones have a hundred bytes."""


class Stored(Protocol):
    """An array on disk. `grid` has the extents of the parts that are read at no more cost than an element of them."""

    shape: tuple[int, ...]
    dtype: np.dtype
    grid: tuple[int, ...]

    @property
    def step(self) -> int:
        """How many leading rows are read together at no more cost than one."""
        return self.grid[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` along the first axis. Raises CheckpointError when they cannot be read."""
        return self.fetch((slice(start, stop), *whole(self.shape)[1:]))()

    def fetch(self, box: Box) -> Callable[[], np.ndarray]:
        """Begin to read the part `box`; what is returned waits for it, and raises CheckpointError when it cannot."""
        ...


def open_stored(path: Path, manifest: Manifest) -> dict[str, Stored]:
    """The arrays of the weights in the checkpoint at `path`, in the manifest's order; no value is read yet."""
    found: dict[str, Stored] = {name: _KINDS[manifest.storage](path / "weights", name) for name in manifest.shapes}
    for name, shape in manifest.shapes.items():
        if found[name].shape != shape:
            raise CheckpointError(
                f"weight {name} in {path} has shape {found[name].shape}, its manifest says {shape}; "
                "use another checkpoint, or convert the model again"
            )
    return found


def read_parts(array: Stored, dtype: np.dtype, sharding: jax.sharding.Sharding) -> jax.Array:
    """`array` as `dtype` on the devices of `sharding`; of what they do not hold no more is read than shares a part of
    the grid with what they hold."""
    local, pending = DeviceParts(array.shape, dtype, sharding), Pending()

    def begin(box: Box) -> None:
        values = array.fetch(box)
        pending.add(math.prod(extents(box)) * array.dtype.itemsize, lambda: local.put(box, values()))

    for cell in cells(local.bounds, array.grid):
        box = local.needed(cell)
        if box is not None:
            begin(box)
    pending.finish()
    return local.array()


def placed(shardings: Mapping[str, Any] | None) -> Callable[[str], jax.sharding.Sharding]:
    """Where an array goes by its name: to its sharding, or without any to this process's first device."""
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return lambda _: here
    return lambda name: shardings[name]


def parts(array: Stored) -> Iterator[np.ndarray]:
    """The whole of `array` in order, in parts of `step` rows."""
    for start in range(0, array.shape[0], array.step):
        yield array.read(start, min(start + array.step, array.shape[0]))


def read_whole(array: Stored, dtype: np.dtype) -> np.ndarray:
    """All of `array` as `dtype`; beside it no more than a part is held."""
    if array.step >= array.shape[0]:
        return array.read(0, array.shape[0]).astype(dtype, copy=False)
    whole, place = np.empty(array.shape, dtype), 0
    for part in parts(array):
        whole[place : place + len(part)] = part
        place += len(part)
    return whole


class _InTree(Stored):
    """An array of an Orbax tree, through TensorStore: no more is decoded than the chunks that are asked for."""

    def __init__(self, tree: Path, name: str) -> None:
        self._what = f"{name} in {tree}"
        try:
            self._array = _tree_array(tree, name)
        except (ValueError, StopIteration) as cause:
            raise _unreadable(self._what, cause) from cause
        self.shape = tuple(self._array.shape)
        self.dtype = self._array.dtype.numpy_dtype
        self.grid = tuple(self._array.chunk_layout.read_chunk.shape or ())  # None for a number

    def fetch(self, box: Box) -> Callable[[], np.ndarray]:
        future = self._array[box].read()

        def part() -> np.ndarray:
            try:
                values: np.ndarray = future.result()
            except ValueError as cause:  # TensorStore's name for every storage error
                raise _unreadable(self._what, cause) from cause
            return values

        return part


class _InFile(Stored):
    """The only tensor of a safetensors file. Read, not mapped: mapped pages count as memory that is held."""

    def __init__(self, folder: Path, name: str) -> None:
        self._file = folder / f"{name}.safetensors"
        self._what = f"{name} in {self._file}"
        try:
            with self._file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if length > _LARGEST_HEADER:
                    raise ValueError(f"its header would have {length} bytes")
                entry = json.loads(stream.read(length))[name]
                size = os.fstat(stream.fileno()).st_size
            self.dtype, self.shape = SAFETENSORS_TYPES[entry["dtype"]], tuple(map(int, entry["shape"]))
            bytes_ = math.prod(self.shape) * self.dtype.itemsize
            if entry["data_offsets"] != [0, bytes_] or size != 8 + length + bytes_:
                raise ValueError(f"its header tells of {bytes_} bytes, the file has {size}")
        except (OSError, ValueError, KeyError, TypeError) as cause:
            raise _unreadable(self._what, cause) from cause
        self._begin = 8 + length
        self._row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        self.grid = (max(1, PART_BYTES // max(1, self._row_bytes)), *self.shape[1:])

    def fetch(self, box: Box) -> Callable[[], np.ndarray]:
        return lambda: self._rows(box[0].start, box[0].stop)[(slice(None), *box[1:])]

    def _rows(self, start: int, stop: int) -> np.ndarray:
        array = np.empty((stop - start, *self.shape[1:]), self.dtype)
        try:
            with self._file.open("rb") as stream:
                stream.seek(self._begin + start * self._row_bytes)
                if stream.readinto(array.view(np.uint8).reshape(-1).data) != array.nbytes:
                    raise EOFError("the file is shorter than it was")
        except (OSError, EOFError) as cause:
            raise _unreadable(self._what, cause) from cause
        return array


def _tree_array(tree: Path, name: str) -> Any:
    import tensorstore

    base = {"driver": "file", "path": f"{next(tree.absolute().glob('*/manifest.ocdbt')).parent}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True, open=True).result()


def open_in_tree(tree: Path, name: str) -> Stored:
    """The array `name` of the Orbax tree in `tree`. Raises CheckpointError when it has none."""
    return _InTree(tree, name)


_KINDS: dict[Storage, type[_InTree] | type[_InFile]] = {"orbax": _InTree, "safetensors": _InFile}


def _unreadable(what: str, cause: Exception) -> CheckpointError:
    return CheckpointError(f"cannot read {what} ({cause}); use another checkpoint, or convert the model again")
