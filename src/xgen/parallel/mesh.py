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


class Sizes(NamedTuple):
    """Devices along each axis."""

    replica: int
    fsdp: int
    context: int
    tensor: int

    @property
    def devices(self) -> int:
        return math.prod(self)

    @property
    def split(self) -> Split:
        """Axes of one device are left out, so that no collective is written for them."""
        used = [axis for axis, size in zip(AXES, self, strict=True) if size > 1]

        def of(*axes: str) -> tuple[str, ...]:
            return tuple(axis for axis in axes if axis in used)

        return Split(of("replica", "fsdp"), of("fsdp", "context"), of("context"), of("tensor"))


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


def build(wanted: Sizes, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh over `devices` (all there are), laid out by JAX so that the inner axes are neighbours."""
    found = list(devices) if devices is not None else jax.devices()
    if found[0].platform == "cpu":
        return jax.sharding.Mesh(np.array(found).reshape(wanted), AXES)
    from jax.experimental import mesh_utils

    return jax.sharding.Mesh(mesh_utils.create_device_mesh(wanted, found, allow_split_physical_axes=True), AXES)
