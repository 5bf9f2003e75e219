"""Checkpoints of a run: saved in the background, whole or not at all, and read back for the next step.

The weights and the optimizer's state are two trees of one checkpoint.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array

from xgen.checkpoints.manifest import (
    PARTIAL,
    Checkpoint,
    folder_name,
    list_checkpoints,
    read_manifest,
    sync,
    write_manifest,
)
from xgen.checkpoints.trees import load_tree, save_tree
from xgen.checkpoints.weights import read_weights
from xgen.errors import StorageError
from xgen.model import Spec, as_dict
from xgen.recipe.schema import Checkpoints
from xgen.training.step import State


def read_state(path: Path, spec: Spec, transformation: optax.GradientTransformation) -> State:
    """Weights and optimizer state, ready for the next step."""
    weights = read_weights(path, spec)
    template = jax.eval_shape(transformation.init, weights)
    leaves = load_tree(path / "optimizer", _named_leaves(template))
    return State(weights, jax.tree.unflatten(jax.tree.structure(template), list(leaves.values())))


class Saver:
    """Writes checkpoints of one run in one background thread, and keeps those the policy names.

    `saved` is called with each finished checkpoint, in the background thread.
    """

    def __init__(self, folder: Path, policy: Checkpoints, saved: Callable[[Checkpoint], None]) -> None:
        self._folder, self._policy, self._saved = folder, policy, saved
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(PARTIAL + "*"):
                shutil.rmtree(leftover)
        except OSError as cause:
            raise StorageError.writing(folder, cause) from cause

    def save(self, state: State, tokens: int, step: int, stage: str) -> None:
        """Copy the state to the host, then write it in the background. A failure of an earlier save is raised here.

        One that is there stays: what follows from the tokens is the same, and at no moment is there none.
        """
        self.wait()
        if read_manifest(self._folder / folder_name(tokens)) is not None:
            return
        trees = {"weights": as_dict(state.weights), "optimizer": _named_leaves(state.optimizer)}
        # A real copy: the step that runs meanwhile reuses the device's buffers. `jax.tree.map` would sort the names.
        host = {
            tree: {name: np.array(leaf, copy=True) for name, leaf in named.items()} for tree, named in trees.items()
        }
        self._thread = threading.Thread(target=self._run, args=(host, tokens, step, stage), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written. Raises StorageError when the last write failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise the StorageError of a write that has failed; one that still goes on is not waited for."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self, trees: Mapping[str, Mapping[str, np.ndarray]], tokens: int, step: int, stage: str) -> None:
        path = self._folder / folder_name(tokens)
        partial = self._folder / (PARTIAL + path.name)
        try:
            _write(partial, trees, {"tokens": tokens, "step": step, "stage": stage})
            try:
                shutil.rmtree(path, ignore_errors=True)  # what is left of one without a manifest
                partial.rename(path)
                sync(self._folder)
                self._retire()
            except OSError as cause:
                raise StorageError.writing(path, cause) from cause
            self._saved(next(c for c in list_checkpoints(self._folder) if c.path == path))
        # All of it: what ends a thread is lost with the thread. `check` raises it again where the run can stop.
        except BaseException as failure:  # noqa: BLE001
            self._failure = failure
            shutil.rmtree(partial, ignore_errors=True)

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


def _write(partial: Path, trees: Mapping[str, Mapping[str, np.ndarray]], facts: dict[str, Any]) -> None:
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, tree in trees.items():
            save_tree(partial / name, tree)
        shapes = {name: list(array.shape) for name, array in trees["weights"].items()}
        write_manifest(partial, {**facts, "shapes": shapes})
    except OSError as cause:
        raise StorageError.writing(partial, cause) from cause


def _named_leaves(tree: object) -> dict[str, Array]:
    """The leaves of any pytree by their path, in order."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
