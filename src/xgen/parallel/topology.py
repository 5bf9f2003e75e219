"""Devices of a slice that is not here: the real TPU compiler takes programs for them on any machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from xgen.errors import RecipeError, XgenError
from xgen.parallel.slices import Slice


class CompilerMissingError(XgenError):
    """The TPU compiler (libtpu) is not installed, or does not start."""


@dataclass(frozen=True)
class Place:
    """Where a device stands: its slice's number from 0, and its chip's coordinates there."""

    slice: int
    coords: tuple[int, ...]


def available() -> bool:
    """Whether the TPU compiler is installed."""
    return find_spec("libtpu") is not None


def describe(slice_: Slice) -> tuple[Any, ...]:
    """One JAX device a chip, to lower and compile for; nothing can run on them.

    The process should hold JAX to the CPU (JAX_PLATFORMS=cpu, before JAX is imported): beside an installed libtpu JAX
    otherwise looks for a real TPU first. Raises RecipeError for chips whose compiler needs the chip, and
    CompilerMissingError without libtpu.
    """
    if slice_.chip.topology is None:
        raise RecipeError(f"slice {slice_.name}: no compiler for {slice_.kind} runs without one; plan it by arithmetic")
    if not available():
        raise CompilerMissingError(
            f"slice {slice_.name}: the TPU compiler is not installed; pip install 'xgen[tpu]', or plan by arithmetic"
        )
    _quiet()
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            f"{slice_.kind}:{'x'.join(map(str, slice_.shape))}",
            platform="tpu",
            chip_config_name=slice_.chip.topology,
            chips_per_host_bounds=host_bounds(slice_),
            num_slices=slice_.slices,
            wrap=(*slice_.wraps, False)[:3],
        )
    except JaxRuntimeError as wrong:
        raise CompilerMissingError(f"slice {slice_.name}: the TPU compiler does not describe it: {wrong}") from None
    return tuple(found.devices)


def host_bounds(slice_: Slice) -> tuple[int, int, int]:
    """Chips of one host along each dimension."""
    if slice_.chip.dimensions == 2 and slice_.hosts == slice_.slices:
        return (slice_.shape[0], slice_.shape[1], 1)
    return (2, 2, 1)


def places(devices: Sequence[Any]) -> tuple[Place, ...]:
    """Where each device of a program stands, in the program's order (`mesh.devices.flat`)."""
    return tuple(Place(getattr(device, "slice_index", 0) or 0, tuple(device.coords)) for device in devices)


def _quiet() -> None:
    """What libtpu reads of the environment when it is loaded; what the user has set stays."""
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),  # there is no metadata server to ask which TPU this is
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),  # compiling takes no chip: another process may do the same
        ("TPU_ACCELERATOR_TYPE", "v4-8"),  # any known one: else JAX prints that it knows none; the slice is named above
        ("TPU_WORKER_HOSTNAMES", "localhost"),
    ):
        os.environ.setdefault(name, value)
