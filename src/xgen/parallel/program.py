"""One program on every device of a mesh: where its arrays lie, and what its parts add up to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from xgen.model import Spec, Weights
from xgen.model.split import Split, total, zigzag
from xgen.model.weights import Weight, map_rows
from xgen.parallel.mesh import NAMES, Sizes, build, split_of
from xgen.parallel.rules import TOKENS, partition, weight_partitions

EVERYWHERE = PartitionSpec()


@dataclass(frozen=True)
class Layout:
    """A mesh of `sizes` over `devices`, or over all there are."""

    sizes: Sizes
    devices: tuple[Any, ...] | None = None
    line: int | None = None
    """Devices of the inner part of fsdp, where `build` is not to settle that."""

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return build(self.sizes, self.devices, self.line)

    @property
    def single(self) -> bool:
        """One device: programs are what they are without a mesh."""
        return self.sizes.devices == 1

    def sharding(self, partition: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, partition)

    def spec(self, spec: Spec) -> Spec:
        """The spec of each device's part of a program."""
        return replace(spec, split=split_of(self.mesh))

    def spread(self, function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
        """`function`, which each device runs on its parts, as a function of whole arrays."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)

    @property
    def tokens(self) -> NamedSharding:
        """Of a batch [N, S]."""
        return self.sharding(TOKENS)

    def rows(self, sequences: int) -> slice:
        """The rows of a batch that this process's devices need: one stretch that holds them all."""
        if self.single:
            return slice(0, sequences)
        shape = (sequences, 2 * self.sizes.context)
        found = [index[0] for index in self.tokens.addressable_devices_indices_map(shape).values() if index]
        ends = [part.indices(sequences) for part in found]
        return slice(min(start for start, _, _ in ends), max(stop for _, stop, _ in ends))

    def place(self, local: np.ndarray, sequences: int, rows: slice) -> Array:
        """A batch's array [N, S] on the devices, from the `rows` of it that this process has read."""
        if self.single:
            return jnp.asarray(local)
        columns = zigzag(local.shape[1], self.sizes.context)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # an array of two axes
            start, stop, _ = index[0].indices(sequences)
            return local[start - rows.start : stop - rows.start, columns[index[1]]]

        return jax.make_array_from_callback((sequences, local.shape[1]), self.tokens, part)

    def constant(self, value: np.ndarray | np.generic) -> Any:
        """A value that every process knows, on every device."""
        if self.single:
            return value
        whole = np.asarray(value)
        return jax.make_array_from_callback(whole.shape, self.sharding(EVERYWHERE), lambda index: whole[index or ()])


ONE_DEVICE = Layout(Sizes(1, 1, 1, 1))


def whole_gradients(gradients: Weights, split: Split) -> Weights:
    """Each weight's gradient summed over the devices that saw other tokens.

    What is stored in parts was summed over their axes where it was used; what is left are the replicas, and for the few
    biases that are not, all data axes.
    """

    def missing(row: Weight) -> tuple[str, ...]:
        stored = {axis for axes in partition(row) if axes for axis in axes}
        return tuple(axis for axis in NAMES if axis in {*split.batch, *split.context} - stored)

    return cast("Weights", jax.tree.map(total, gradients, map_rows(gradients, missing)))


def weight_shardings(spec: Spec, layout: Layout) -> Weights:
    """Where the weights lie: a tree shaped as they are."""
    return cast("Weights", jax.tree.map(layout.sharding, weight_partitions(spec)))
