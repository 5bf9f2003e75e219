"""The mesh: how many devices along each axis, and in what order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from xgen.errors import RecipeError
from xgen.model.split import Split
from xgen.recipe.schema import Mesh as MeshChoice

AXES = ("replica", "fsdp", "context", "tensor")
"""Outermost first: replicas meet once a step, tensor parts twice a layer, so the latter lie on neighbouring chips."""

LINE = "fsdp_line"
"""The inner part of the fsdp axis where that is cut in two, see `line_of`."""

NAMES = ("replica", "fsdp", LINE, "context", "tensor")
"""The axes of the mesh as it is laid out."""


class Sizes(NamedTuple):
    """Devices along each axis."""

    replica: int
    fsdp: int
    context: int
    tensor: int

    @property
    def devices(self) -> int:
        return math.prod(self)


def split_of(mesh: jax.sharding.Mesh) -> Split:
    """Axes of one device are left out, so that no collective is written for them."""

    def of(*axes: str) -> tuple[str, ...]:
        return tuple(axis for axis in axes if mesh.shape[axis] > 1)

    stored = of("fsdp", LINE, "context")
    at_once = all(_takes_whole_sides(mesh, axis) for axis in stored)
    shards = tuple((axis,) for axis in stored) if not at_once else (stored,) if stored else ()
    return Split(of("replica", "fsdp", LINE), shards, of("context"), of("tensor"))


def _takes_whole_sides(mesh: jax.sharding.Mesh, axis: str) -> bool:
    """Whether `axis` takes in whole sides of the torus. Of several axes that do a TPU's compiler gathers over all links
    at once; where one takes in part of a side it would instead sum up an array of zeros and parts."""
    if mesh.devices.flat[0].platform != "tpu":
        return True
    line = np.moveaxis(mesh.devices, NAMES.index(axis), 0).reshape(mesh.shape[axis], -1)[:, 0]
    every = list(mesh.devices.flat)
    along, sides = ([len({chip.coords[side] for chip in chips}) for side in range(3)] for chips in (line, every))
    return all(length in (1, side) for length, side in zip(along, sides, strict=True))


def sizes(choice: MeshChoice, devices: int, place: str = "mesh") -> Sizes:
    """The recipe's mesh on so many devices. Raises RecipeError when it needs more, or leaves some unused.

    `place` is the recipe's key, for the error.
    """
    given = choice.model_dump()
    fixed = math.prod(size for size in given.values() if size != "rest")
    told = " x ".join(f"{axis} {given[axis]}" for axis in AXES)
    rest = [axis for axis in AXES if given[axis] == "rest"]
    if devices % fixed or (not rest and fixed != devices):
        have = f"{devices} device{'s are' if devices > 1 else ' is'} there"
        wanted = f"a multiple of {fixed}" if rest else f"{fixed}"
        raise RecipeError(
            f"{place}: {told} needs {wanted} devices, and {have}; change {place}, or emulate devices on a CPU with "
            f"--devices {fixed}"
        )
    return Sizes(**{axis: devices // fixed if given[axis] == "rest" else given[axis] for axis in AXES})


def build(wanted: Sizes, devices: Sequence[Any] | None = None, line: int | None = None) -> jax.sharding.Mesh:
    """The mesh over `devices` (all there are), laid out by JAX so that the inner axes are neighbours. `line`: devices
    along `LINE`; `line_of` these devices when it is left out.

    Of several slices each holds whole replicas: the network between them should only be crossed once a step. Raises
    RecipeError when the replicas cannot be dealt out so.
    """
    found = list(devices) if devices is not None else jax.devices()
    inner = line_of(wanted, found) if line is None else line
    shape = (wanted.replica, wanted.fsdp // inner, inner, wanted.context, wanted.tensor)
    if found[0].platform == "cpu":
        return jax.sharding.Mesh(np.array(found).reshape(shape), NAMES)
    from jax.experimental import mesh_utils

    slices: dict[int, list[Any]] = {}
    for device in found:
        slices.setdefault(getattr(device, "slice_index", 0) or 0, []).append(device)
    if wanted.replica % len(slices):
        raise RecipeError(
            f"mesh.replica: {wanted.replica} replicas cannot be dealt out to {len(slices)} slices; use a multiple of "
            f"{len(slices)}, and less fsdp, context or tensor: weights are not gathered from another slice"
        )
    part = (wanted.replica // len(slices), *shape[1:])
    laid = [mesh_utils.create_device_mesh(part, one, allow_split_physical_axes=True) for one in slices.values()]
    return jax.sharding.Mesh(np.concatenate(laid), NAMES)


def line_of(wanted: Sizes, devices: Sequence[Any]) -> int:
    """Chips along the inner part of fsdp: 1 unless fsdp takes in more TPUs than their compiler can scatter over.

    Over more than 32 chips at once that compiler has no reduce-scatter: it reduces to every chip and cuts, which takes
    the bytes and the memory of the whole. Over 16 or 32, and then over an inner part of up to 32, it scatters. For
    128 chips and more 32 come first: all then passes fewer links (seen on slices of v4, v5e and v6e with libtpu 0.0.52;
    tests/parallel/test_mesh_tpu.py).
    """
    if devices[0].platform != "tpu" or wanted.fsdp <= 32:
        return 1
    outer = 32 if wanted.fsdp >= 128 and wanted.fsdp % 32 == 0 else 16
    return wanted.fsdp // outer if wanted.fsdp % outer == 0 else 1
