"""Trees of arrays on disk, stored by Orbax."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array

from xgen.errors import StorageError


def save_tree(path: Path, tree: Mapping[str, np.ndarray]) -> None:
    from orbax.checkpoint import v1 as orbax

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # what Orbax logs as an error it also raises
    try:
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
