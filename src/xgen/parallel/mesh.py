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

    return Split(of("replica", "fsdp", LINE), of("fsdp", LINE, "context"), of("context"), of("tensor"))


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
    along `LINE`; `line_of` these devices when it is left out."""
    found = list(devices) if devices is not None else jax.devices()
    inner = line_of(wanted, found) if line is None else line
    shape = (wanted.replica, wanted.fsdp // inner, inner, wanted.context, wanted.tensor)
    if found[0].platform == "cpu":
        return jax.sharding.Mesh(np.array(found).reshape(shape), NAMES)
    from jax.experimental import mesh_utils

    return jax.sharding.Mesh(mesh_utils.create_device_mesh(shape, found, allow_split_physical_axes=True), NAMES)


def line_of(wanted: Sizes, devices: Sequence[Any]) -> int:
    """Chips along the inner part of fsdp: a side of the torus where fsdp takes in all three of its dimensions, else 1.

    The TPU's compiler has no reduce-scatter over a whole three-dimensional torus: it reduces to every chip and cuts,
    which takes the bytes and the memory of the whole. Over a plane, and then what is left over a line, it scatters.
    """
    sides = [len({chip.coords[axis] for chip in devices}) for axis in range(3)] if hasattr(devices[0], "coords") else []
    plane = math.prod(sorted(sides)[1:])
    shortest = min(sides, default=1)
    return shortest if shortest > 1 and wanted.fsdp > plane and wanted.fsdp % shortest == 0 else 1
