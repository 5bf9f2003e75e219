"""Trees of arrays on disk, stored by Orbax."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array

from xgen.checkpoints.stored import PART_BYTES
from xgen.errors import StorageError


def save_tree(path: Path, tree: Mapping[str, np.ndarray]) -> None:
    """Write `tree` to the new folder `path`, in chunks of at most one layer of a stacked matrix."""
    from orbax.checkpoint import v1 as orbax

    # Stacked matrices are the arrays of three axes and more; a vector's layers are not worth a chunk each.
    storage = orbax.options.ArrayOptions.Saving.StorageOptions
    whole, layers = storage(chunk_byte_size=PART_BYTES), storage(chunk_byte_size=PART_BYTES, shard_axes=(0,))
    context = orbax.Context()
    context.array.saving.scoped_storage_options_creator = lambda _, array: layers if array.ndim > 2 else whole
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # what Orbax logs as an error it also raises
    try:
        with context:
            orbax.save(path.absolute(), dict(tree))
    except ValueError as cause:  # TensorStore's name for every storage error
        reason = "no space left on device" if "No space left" in str(cause) else str(cause)
        raise StorageError(f"cannot write {path}: {reason}; free some space or choose another folder") from cause


def load_tree(path: Path, wanted: Mapping[str, Array | jax.ShapeDtypeStruct]) -> dict[str, Array]:
    from orbax.checkpoint import v1 as orbax

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here) for name, a in wanted.items()}
    found = orbax.load(path.absolute(), template)
    return {name: found[name] for name in wanted}
