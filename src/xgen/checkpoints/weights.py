"""The weights of a checkpoint, checked by SHA-256 when they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np

from xgen.checkpoints.manifest import Manifest, require_whole
from xgen.checkpoints.processes import ALONE, Processes, agree
from xgen.checkpoints.stored import open_stored, parts, placed, read_parts
from xgen.model import Spec, Weights, as_dict, from_dict


def require_fit(manifest: Manifest, spec: Spec) -> None:
    """Raise CheckpointError when the checkpoint is not of a model of `spec`."""
    from_dict({name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in manifest.shapes.items()}, spec)


def read_weights(path: Path, spec: Spec, shardings: Weights | None = None, world: Processes = ALONE) -> Weights:
    """The weights of the checkpoint at `path` in float32, checked, on this process's first device.

    With `shardings` (a tree of them, shaped as the weights) every process reads what its devices hold of them, and no
    more; all of `world` call this together. Raises CheckpointError when they are damaged or of another shape.
    """
    manifest = require_whole(path, world=world)
    require_fit(manifest, spec)
    places = placed(as_dict(shardings) if shardings is not None else None)
    found: dict[str, jax.Array] = {}

    def read() -> None:
        for name, row in open_stored(path, manifest).items():
            found[name] = read_parts(row, np.dtype(np.float32), places(name))

    agree(world, f"read weights {path.name}", read)
    return from_dict(found, spec)


def weights_sha256(weights: Weights) -> str:
    """SHA-256 over all weights in table order: each name, shape and its float32 values, little-endian."""
    return _sha256((name, array.shape, iter([np.asarray(array)])) for name, array in as_dict(weights).items())


def stored_weights_sha256(path: Path) -> str:
    """`weights_sha256` of the checkpoint at `path`, checked first; the model's shape need not be known."""
    stored = open_stored(path, require_whole(path))
    return _sha256((name, row.shape, parts(row)) for name, row in stored.items())


def _sha256(arrays: Iterable[tuple[str, tuple[int, ...], Iterator[np.ndarray]]]) -> str:
    """Of arrays by name and shape, each in consecutive parts."""
    digest = hashlib.sha256()
    for name, shape, pieces in arrays:
        digest.update(f"{name} {shape}\n".encode())
        for piece in pieces:
            digest.update(np.ascontiguousarray(piece, "<f4").reshape(-1).data)
    return digest.hexdigest()
