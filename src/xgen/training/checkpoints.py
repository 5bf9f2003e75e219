"""Checkpoints of a run: saved in the background, whole or not at all, and read back for the next step.

The weights and the optimizer's state are two trees of one checkpoint. Every process copies and writes what its own
devices hold; process 0 begins a checkpoint and finishes it.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array

from xgen.checkpoints.local import DeviceParts, HostParts, extents, whole
from xgen.checkpoints.manifest import (
    PARTIAL,
    SHARED,
    Checkpoint,
    folder_name,
    list_checkpoints,
    read_manifest,
    sync,
    take_seals,
    write_manifest,
    write_seals,
)
from xgen.checkpoints.processes import ALONE, Processes, agree
from xgen.checkpoints.stored import placed
from xgen.checkpoints.trees import copied, join_tree, load_tree, save_tree
from xgen.checkpoints.weights import read_weights
from xgen.convert.pieces import Source, pieces
from xgen.errors import StorageError
from xgen.model import Spec, Weights, abstract, as_dict, from_dict
from xgen.recipe.schema import Checkpoints
from xgen.training.state import State

Trees = Mapping[str, Mapping[str, HostParts]]


def read_state(
    path: Path,
    spec: Spec,
    transformation: optax.GradientTransformation,
    shardings: State | None = None,
    world: Processes = ALONE,
) -> State:
    """Weights and optimizer state, ready for the next step, on this process's first device.

    With `shardings` (a tree of them, shaped as the state) every process reads what its devices hold, and no more,
    whatever mesh wrote it; all of `world` call this together.
    """
    weights = read_weights(path, spec, shardings.weights if shardings is not None else None, world)
    template = jax.eval_shape(transformation.init, abstract(spec))
    places = _named_leaves(shardings.optimizer) if shardings is not None else None
    leaves: dict[str, Array] = {}

    def read() -> None:
        leaves.update(load_tree(path / "optimizer", _named_leaves(template), places))

    agree(world, f"read optimizer {path.name}", read)
    return State(weights, jax.tree.unflatten(jax.tree.structure(template), list(leaves.values())))


def place_weights(
    source: Source, shardings: Weights | None = None, progress: Callable[[float], None] | None = None
) -> tuple[Weights, str]:
    """All weights of `source` in float32, on the devices of `shardings` (a tree of them, shaped as the weights; this
    process's first device), and their SHA-256 as `weights_sha256` gives it.

    Every process reads the pieces one after another, and holds one of them beside the parts of its own devices.
    """
    spec, places = source.spec, placed(as_dict(shardings) if shardings is not None else None)
    digest, found, done, count = hashlib.sha256(), {}, 0, len(list(pieces(spec)))
    for row, of_row in groupby(pieces(spec), lambda piece: piece[0]):
        shape = row.shape(spec)
        digest.update(f"{row.name} {shape}\n".encode())
        local = DeviceParts(shape, np.dtype(np.float32), places(row.name))
        for _, layer in of_row:
            piece = np.ascontiguousarray(source.read(row, layer), "<f4")
            digest.update(piece.reshape(-1).data)
            box = whole(shape) if layer is None else (slice(layer, layer + 1), *whole(shape)[1:])
            local.put(box, piece.reshape(extents(box)))
            done += 1
            if progress is not None:
                progress(done / count)
        found[row.name] = local.array()
    return from_dict(found, spec), digest.hexdigest()


class Saver:
    """Writes checkpoints of one run in one background thread, and keeps those the policy names.

    Every process of `world` has one and calls `save` and `wait` at the same steps. `saved` is called with each finished
    checkpoint on process 0, in the background thread.
    """

    def __init__(
        self, folder: Path, policy: Checkpoints, saved: Callable[[Checkpoint], None], world: Processes = ALONE
    ) -> None:
        self._folder, self._policy, self._saved, self._world = folder, policy, saved, world
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._writer = world.index == 0
        if self._writer:  # the others write nothing before process 0 has begun a checkpoint
            _clean(folder)

    def save(self, state: State, tokens: int, step: int, stage: str) -> None:
        """Copy the state to the host, then write it in the background. A failure of an earlier save is raised here.

        One that is there stays: what follows from the tokens is the same, and at no moment is there none.
        """
        self.wait()
        if self._world.count == 1 and self._there(tokens):
            return
        trees = {"weights": as_dict(state.weights), "optimizer": _named_leaves(state.optimizer)}
        # Not `jax.tree.map`, which would sort the names.
        host = {name: copied(tree, writer=self._writer) for name, tree in trees.items()}
        # A process that must end because another one died does not wait for it in this thread.
        self._thread = threading.Thread(
            target=self._run, args=(host, tokens, step, stage), name="checkpoint", daemon=self._world.count > 1
        )
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written. Raises StorageError when the last write failed, on any process."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise the StorageError of a write that has failed; one that still goes on is not waited for."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    @property
    def failing(self) -> bool:
        """Whether `check` would raise. All processes come to know it of one another, each in its own time: where they
        must stop at the same step, they agree on this and then call `wait`."""
        return self._failure is not None

    def _there(self, tokens: int) -> bool:
        return read_manifest(self._folder / folder_name(tokens)) is not None

    def _run(self, trees: Trees, tokens: int, step: int, stage: str) -> None:
        name, partial = f"checkpoint {tokens}", None
        try:
            begun = agree(self._world, f"begin {name}", lambda: self._begin(tokens))[0]
            if not begun:
                return
            partial = self._folder / begun
            agree(self._world, f"write {name}", lambda: self._write(partial, trees))
            facts = {"tokens": tokens, "step": step, "stage": stage}
            agree(self._world, f"finish {name}", lambda: self._finish(partial, trees, facts))
        # All of it: what ends a thread is lost with the thread. `check` raises it again where the run can stop.
        except BaseException as failure:  # noqa: BLE001
            self._failure = failure
            if partial is not None and self._writer:
                shutil.rmtree(partial, ignore_errors=True)

    def _begin(self, tokens: int) -> str:
        """The name of the folder that all write into, new so that no process of a run that was killed and is not yet
        dead writes into it; "" when the checkpoint is there. Process 0 decides."""
        if not self._writer or self._there(tokens):
            return ""
        partial = self._folder / f"{PARTIAL}{folder_name(tokens)}-{secrets.token_hex(4)}"
        try:
            partial.mkdir(parents=True)
        except OSError as cause:
            raise StorageError.writing(partial, cause) from cause
        return partial.name

    def _write(self, partial: Path, trees: Trees) -> None:
        """Write this process's parts, and what the manifest will tell of them."""
        if not partial.is_dir():
            raise StorageError(f"{partial}, which process 0 has made, is not seen by this one; {SHARED}")
        files: list[Path] = []
        try:
            for name, tree in trees.items():
                files += save_tree(partial / name, tree, self._world.index)
            write_seals(partial, self._world.index, files)
        except OSError as cause:
            raise StorageError.writing(partial, cause) from cause

    def _finish(self, partial: Path, trees: Trees, facts: dict[str, Any]) -> None:
        """Process 0 makes a checkpoint of what all have written."""
        if not self._writer:
            return
        path = self._folder / folder_name(facts["tokens"])
        try:
            sealed = take_seals(partial, self._world.count)
            for name, tree in trees.items():
                join_tree(partial / name, tree)
            shapes = {name: list(parts.shape) for name, parts in trees["weights"].items()}
            write_manifest(partial, {**facts, "shapes": shapes}, sealed)
        except OSError as cause:
            raise StorageError.writing(partial, cause) from cause
        try:
            shutil.rmtree(path, ignore_errors=True)  # what is left of one without a manifest
            partial.rename(path)
            sync(self._folder)
            self._retire()
        except OSError as cause:
            raise StorageError.writing(path, cause) from cause
        self._saved(next(c for c in list_checkpoints(self._folder) if c.path == path))

    def _retire(self) -> None:
        """Delete what the policy does not keep."""
        checkpoints = list_checkpoints(self._folder)
        every = self._policy.keep_every
        for checkpoint in checkpoints[: -self._policy.keep_last]:
            if checkpoint.stage or (every and checkpoint.tokens % every == 0):
                continue
            doomed = checkpoint.path.with_name(PARTIAL + checkpoint.path.name)  # never a half-deleted plain name
            checkpoint.path.rename(doomed)
            shutil.rmtree(doomed)


def _clean(folder: Path) -> None:
    """Remove what a run that was killed had not finished."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(PARTIAL + "*"):
            shutil.rmtree(leftover)
    except OSError as cause:
        raise StorageError.writing(folder, cause) from cause


def _named_leaves(tree: object) -> dict[str, Array]:
    """The leaves of any pytree by their path, in order."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
