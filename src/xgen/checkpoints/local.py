"""Arrays that lie over the devices of several processes: the parts of this process, in host memory and out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np

Box = tuple[slice, ...]
"""A part of an array: a slice with both ends for every axis."""

_PENDING_BYTES = 32 * 2**20
"""Read or written at the same time, at least one part; beside the arrays themselves no more is held, but where these
are large a sixteenth of them."""


def whole(shape: tuple[int, ...]) -> Box:
    return tuple(slice(0, size) for size in shape)


def extents(box: Box) -> tuple[int, ...]:
    return tuple(axis.stop - axis.start for axis in box)


def meet(one: Box, other: Box) -> Box | None:
    """What two boxes share."""
    both = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
    return both if all(axis.start < axis.stop for axis in both) else None


def within(box: Box, origin: Box) -> Box:
    """`box` as seen from the beginning of `origin`."""
    return tuple(slice(a.start - o.start, a.stop - o.start) for a, o in zip(box, origin, strict=True))


def cells(box: Box, grid: tuple[int, ...]) -> Iterator[Box]:
    """The parts of `box` that lie in one cell each of the grid with cells of these extents, in order."""
    if not box:
        yield ()
        return
    first, size = box[0], grid[0]
    for cell in range(first.start // size, -(-first.stop // size)):
        begin, end = max(first.start, cell * size), min(first.stop, (cell + 1) * size)
        yield from ((slice(begin, end), *rest) for rest in cells(box[1:], grid[1:]))


@dataclass(frozen=True)
class HostParts:
    """What this process writes of an array: copies in host memory, by where they belong.

    `part` has the extents of every device's part: whoever writes, no two processes write into one part.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    part: tuple[int, ...]
    pieces: tuple[tuple[Box, np.ndarray], ...]


def host_parts(array: jax.Array | np.ndarray, *, writer: bool) -> HostParts:
    """Copy what this process has to write of `array`: of equal parts on several devices the first device's.

    An array that is not spread over processes is there on each: the `writer` writes it.
    """
    if not isinstance(array, jax.Array):
        array = np.asarray(array)
        there = ((whole(array.shape), np.array(array, copy=True)),) if writer else ()
        return HostParts(array.shape, array.dtype, array.shape, there)
    mine = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    if array.is_fully_addressable and not writer:
        mine = []
    for shard in mine:
        shard.data.copy_to_host_async()  # from all devices at once
    pieces = tuple((_box(shard.index, array.shape), _copied(shard.data)) for shard in mine)
    return HostParts(array.shape, np.dtype(array.dtype), array.sharding.shard_shape(array.shape), pieces)


def _copied(data: jax.Array) -> np.ndarray:
    """A real copy: on a CPU NumPy would see the device's own buffer, which the step that runs meanwhile reuses."""
    seen = np.asarray(data)
    return seen.copy() if next(iter(data.devices())).platform == "cpu" else seen


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(slice(*axis.indices(size)[:2]) for axis, size in zip(index, shape, strict=True))


def _around(boxes: list[Box]) -> Box:
    return tuple(slice(min(a.start for a in axis), max(a.stop for a in axis)) for axis in zip(*boxes, strict=True))


class DeviceParts:
    """An array being put together from host memory: only the parts that this process's devices hold are held."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding) -> None:
        self._shape, self._sharding = shape, sharding
        indices = sharding.addressable_devices_indices_map(shape)
        boxes = {device: _box(index or (), shape) for device, index in indices.items()}
        self._places = {device: str(box) for device, box in boxes.items()}  # slices cannot be keys in Python 3.11
        self._parts = {str(box): (box, np.empty(extents(box), dtype)) for box in boxes.values()}

    @property
    def bounds(self) -> Box:
        """The smallest box around all that is needed."""
        return _around([box for box, _ in self._parts.values()])

    def needed(self, box: Box) -> Box | None:
        """The smallest part of `box` around what is needed of it; None for nothing."""
        shared = [both for part, _ in self._parts.values() if (both := meet(part, box)) is not None]
        return _around(shared) if shared else None

    def put(self, box: Box, values: np.ndarray) -> None:
        """Keep what is needed of `values`, which fill `box`."""
        for part, array in self._parts.values():
            both = meet(part, box)
            if both is not None:
                array[within(both, part)] = values[within(both, box)]

    def array(self) -> jax.Array:
        """On the devices; what was held here is let go."""
        parts = [jax.device_put(self._parts[place][1], device) for device, place in self._places.items()]
        found = jax.make_array_from_single_device_arrays(self._shape, self._sharding, parts)
        found.block_until_ready()
        self._parts.clear()
        return found


class Pending:
    """Reads or writes under way, few enough that what they hold stays small: beside a `whole` of so many bytes."""

    def __init__(self, whole: int = 0) -> None:
        self._most = max(_PENDING_BYTES, whole // 16)
        self._waiting: list[tuple[int, Callable[[], None]]] = []
        self._bytes = 0

    def add(self, bytes_: int, finish: Callable[[], None]) -> None:
        """Remember one that holds so many bytes until `finish` has returned; wait for older ones if they are many."""
        self._waiting.append((bytes_, finish))
        self._bytes += bytes_
        while self._bytes > self._most and len(self._waiting) > 1:
            self._finish_first()

    def finish(self) -> None:
        while self._waiting:
            self._finish_first()

    def _finish_first(self) -> None:
        bytes_, finish = self._waiting.pop(0)
        finish()
        self._bytes -= bytes_


def grid_of(parts: HostParts, limit: int) -> tuple[int, ...]:
    """Extents of the chunks that an array is stored in: at most `limit` bytes each, no chunk in two devices' parts.

    A stacked matrix has no chunk of two layers, and rows that are stored together take `limit` bytes at their full
    width, so that whoever reads whole rows needs no more.
    """
    shape, bytes_ = parts.shape, parts.dtype.itemsize
    grid = list(parts.part)
    if not all(grid):
        return tuple(max(1, size) for size in grid)
    if len(shape) > 2:
        grid[0] = 1  # stacked matrices have three axes and more; a vector's layers are not worth a chunk each
    elif shape:
        grid[0] = _cut(grid[0], shape[0], max(1, limit // (bytes_ * math.prod(shape[1:]))))
    for axis in range(1, len(shape)):
        others = math.prod(grid) // grid[axis]
        grid[axis] = _cut(grid[axis], shape[axis], max(1, limit // (bytes_ * others)))
    return tuple(grid)


def _cut(part: int, size: int, most: int) -> int:
    """At most `most` of a part of an axis: equal cuts, and where there are several parts, such that none is in two."""
    if part <= most:
        return part
    if part == size:
        return -(-part // -(-part // most))
    return max(divisor for divisor in range(1, most + 1) if part % divisor == 0)
