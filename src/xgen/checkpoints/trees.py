"""Trees of arrays on disk, as Orbax lays them out, so that it reads them too.

Written without it: its several processes meet in collectives of the devices, which must not run beside a step, and one
that fails leaves the others waiting. A tree is one database of chunks (OCDBT), into which those of the processes are
joined at the end. No two processes write into one chunk, so none waits for another and none can spoil another's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from xgen.checkpoints.local import HostParts, Pending, cells, grid_of, host_parts, within
from xgen.checkpoints.stored import PART_BYTES, open_in_tree, placed, read_parts
from xgen.errors import CheckpointError, StorageError

_STATE = "state"
_PROCESS = "ocdbt.process_"


def save_tree(path: Path, tree: Mapping[str, HostParts], process: int = 0) -> list[Path]:
    """Write this process's parts of `tree` below `path`; returns the files. `join_tree` follows once all have."""
    place = path / _STATE / f"{_PROCESS}{process}"
    # What is under way together ends in a file or two, and file systems that are shared dislike many.
    pending = Pending(sum(values.nbytes for parts in tree.values() for _, values in parts.pieces))
    context = _context()
    try:
        for name, parts in tree.items():
            if parts.pieces:
                _write(place, name, parts, context, pending)
        pending.finish()
    except ValueError as cause:  # TensorStore's name for every storage error
        raise _unwritable(path, cause) from cause
    return sorted(file for file in place.rglob("*") if file.is_file())


def join_tree(path: Path, names: Iterable[str]) -> None:
    """Make what all processes wrote below `path` one tree of the arrays `names`."""
    import tensorstore

    state, context = path / _STATE, _context()

    def database(place: Path) -> Any:
        return tensorstore.KvStore.open(_database(place), context=context).result()

    try:
        whole = database(state)
        with tensorstore.Transaction(atomic=True) as transaction:
            for place in sorted(state.glob(f"{_PROCESS}*")):
                database(place).experimental_copy_range_to(whole.with_transaction(transaction)).result()
    except ValueError as cause:
        raise _unwritable(path, cause) from cause
    _describe(path, names)


def load_tree(
    path: Path,
    wanted: Mapping[str, Array | np.ndarray | jax.ShapeDtypeStruct],
    shardings: Mapping[str, Any] | None = None,
) -> dict[str, Array]:
    """The arrays `wanted` of the tree at `path`, in that order, on the devices of their shardings (this process's first
    device). Raises CheckpointError when one is missing, of another shape or cannot be read."""
    places, found = placed(shardings), {}
    for name, leaf in wanted.items():
        stored = open_in_tree(path, name)
        if stored.shape != tuple(leaf.shape):
            raise CheckpointError(
                f"{name} in {path} has shape {stored.shape}, the run needs {tuple(leaf.shape)}; use another checkpoint"
            )
        found[name] = read_parts(stored, np.dtype(leaf.dtype), places(name))
    return found


def copied(tree: Mapping[str, Array | np.ndarray], *, writer: bool = True) -> dict[str, HostParts]:
    """What this process has to write of `tree`, copied to the host."""
    return {name: host_parts(leaf, writer=writer) for name, leaf in tree.items()}


def _write(place: Path, name: str, parts: HostParts, context: Any, pending: Pending) -> None:
    """Begin to write the pieces of one array, each chunk by itself so that few are held in their stored form."""
    import tensorstore

    grid = grid_of(parts, PART_BYTES)
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd", "configuration": {"level": 1}}]
    metadata = {
        "shape": parts.shape,
        "data_type": parts.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": grid}},
        "codecs": codecs,
    }
    spec = {
        "driver": "zarr3",
        "kvstore": {**_database(place), "path": f"{name}/"},
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,
    }
    array = tensorstore.open(spec, context=context, create=True, open=True).result()
    for box, values in parts.pieces:
        for cell in cells(box, grid):
            part = values[within(cell, box)]
            write = array[cell].write(part, can_reference_source_data_indefinitely=True)
            pending.add(part.nbytes, write.result)


def _database(place: Path) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{place.absolute()}/"}}


def _context() -> Any:
    """Files are made to survive a power cut once all are there, by whoever hashes them."""
    import tensorstore

    return tensorstore.Context({"file_io_sync": False})


def _describe(path: Path, names: Iterable[str]) -> None:
    """Orbax's own description of a tree, which we have no need of."""
    tree = {
        repr((name,)): {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for name in names
    }
    facts = {"use_ocdbt": True, "use_zarr3": True, "store_array_data_equal_to_fill_value": True}
    handler = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
    now = time.time_ns()
    checkpoint = {
        "item_handlers": {_STATE: handler},
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now,
        "custom_metadata": {},
    }
    _put(path / _STATE / "_METADATA", json.dumps({"tree_metadata": tree, **facts, "custom_metadata": None}))
    _put(path / "_CHECKPOINT_METADATA", json.dumps(checkpoint))
    _put(path / "orbax.checkpoint", "")


def _put(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as cause:
        raise StorageError.writing(file, cause) from cause


def _unwritable(path: Path, cause: ValueError) -> StorageError:
    reason = "no space left on device" if "No space left" in str(cause) else str(cause)
    return StorageError(f"cannot write {path}: {reason}; free some space or choose another folder")
