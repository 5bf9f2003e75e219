"""The weights of a checkpoint, checked by SHA-256 when they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array

from xgen.checkpoints.manifest import require_whole
from xgen.checkpoints.trees import load_tree
from xgen.model import Spec, Weights, abstract, as_dict, from_dict


def read_weights(path: Path, spec: Spec) -> Weights:
    """The weights of the checkpoint at `path`, checked. Raises CheckpointError when damaged or of another shape."""
    manifest = require_whole(path)
    wanted = as_dict(abstract(spec))
    shapes = {name: list(array.shape) for name, array in wanted.items()}
    if manifest["shapes"] != shapes:
        from_dict({name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in manifest["shapes"].items()}, spec)
    return from_dict(load_tree(path / "weights", wanted), spec)


def weights_sha256(weights: Weights) -> str:
    """SHA-256 over all weights in table order: each name, shape and its float32 values, little-endian."""
    return _arrays_sha256(as_dict(weights))


def stored_weights_sha256(path: Path) -> str:
    """`weights_sha256` of the checkpoint at `path`, checked first; the model's shape need not be known."""
    shapes = require_whole(path)["shapes"]
    wanted = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    return _arrays_sha256(load_tree(path / "weights", wanted))


def _arrays_sha256(arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        values = np.asarray(array, dtype="<f4")
        digest.update(f"{name} {values.shape}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
