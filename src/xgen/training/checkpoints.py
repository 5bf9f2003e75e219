"""Checkpoints: saved in the background, whole or not at all, and checked by SHA-256 when read.

A checkpoint is the folder `checkpoints/TOKENS` with the weights and the optimizer's state as two Orbax trees and a
`manifest.json` that lists every file with its size and hash, and has a hash of its own. It is written beside its place
and renamed into it last, so a folder with a plain number for a name is complete unless it was damaged afterwards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import optax
from jaxtyping import Array

from xgen.errors import CheckpointError, StorageError
from xgen.model import Spec, Weights, abstract, as_dict, from_dict
from xgen.recipe.schema import Checkpoints
from xgen.training.step import State

_PARTIAL = "partial-"
_MANIFEST = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. `stage` names the stage it ends, "" for one within a stage."""

    path: Path
    tokens: int
    step: int
    stage: str
    bytes: int

    @property
    def label(self) -> str:
        return f"{self.stage or 'checkpoint'} at {self.tokens:,} tokens"


def folder_name(tokens: int) -> str:
    """Zero-padded, so that names sort as the clock does."""
    return f"{tokens:015d}"


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints in `folder`, oldest first; those without a readable manifest are left for `damage` to name."""
    found = []
    for path in _numbered(folder):
        manifest = _manifest(path)
        if manifest is not None:
            size = sum(int(entry["bytes"]) for entry in manifest["files"].values())
            found.append(Checkpoint(path, manifest["tokens"], manifest["step"], manifest["stage"], size))
    return found


def damage(path: Path) -> list[str]:
    """What is wrong with the checkpoint at `path`: every missing or altered file by name; [] when whole."""
    manifest = _manifest(path)
    if manifest is None:
        return [f"{path / _MANIFEST} is missing" if not (path / _MANIFEST).is_file() else _altered(path / _MANIFEST)]
    wrong = []
    for name, entry in manifest["files"].items():
        file = path / name
        try:
            if not file.is_file():
                wrong.append(f"{file} is missing")
            elif file.stat().st_size != entry["bytes"]:
                wrong.append(f"{file} has {file.stat().st_size} bytes, {entry['bytes']} were written")
            elif _sha256(file) != entry["sha256"]:
                wrong.append(_altered(file))
        except OSError as cause:
            wrong.append(f"{file} cannot be read ({cause.strerror or cause})")
    return wrong


def _altered(file: Path) -> str:
    return f"{file} has changed since it was written (SHA-256 differs)"


def newest_whole(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest undamaged checkpoint. Each damaged newer one is reported by name and set aside as `NAME.damaged`."""
    by_path = {checkpoint.path: checkpoint for checkpoint in list_checkpoints(folder)}
    numbered = _numbered(folder)
    for path in reversed(numbered):
        wrong = damage(path)
        if not wrong:
            return by_path[path]
        aside = path.with_suffix(".damaged")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        except OSError as cause:
            raise StorageError.writing(aside, cause) from cause
        before = "the one before is used" if path != numbered[0] else "none is left: the run begins from the start"
        report(f"checkpoint {path} is damaged: {'; '.join(wrong)}; set aside as {aside.name}; {before}")
    return None


def choose(model: str) -> list[Path]:
    """The checkpoints that `model` names, oldest first: all of a run folder, or one as DIR@TOKENS or DIR@STAGE.

    Damaged ones are among them. Raises CheckpointError, naming what there is, when none fits.
    """
    place, _, wanted = model.partition("@")
    folder = Path(place) / "checkpoints"
    paths = _numbered(folder)
    stages = {checkpoint.stage: checkpoint.path for checkpoint in list_checkpoints(folder) if checkpoint.stage}
    if wanted in stages:
        return [stages[wanted]]
    if wanted:
        paths = [path for path in paths if wanted.isdecimal() and int(path.name) == int(wanted)]
    if not paths:
        tokens = ", ".join(str(int(path.name)) for path in _numbered(folder)) or "none"
        raise CheckpointError(
            f"{model}: no such checkpoint; {folder} has stages {', '.join(stages) or 'none'}, and tokens {tokens}"
        )
    return paths


def read_weights(path: Path, spec: Spec) -> Weights:
    """The weights of the checkpoint at `path`, checked. Raises CheckpointError when damaged or of another shape."""
    _require_whole(path)
    manifest = _manifest(path) or {}
    wanted = as_dict(abstract(spec))
    shapes = {name: list(array.shape) for name, array in wanted.items()}
    if manifest["shapes"] != shapes:
        from_dict({name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in manifest["shapes"].items()}, spec)
    return from_dict(_load(path / "weights", wanted), spec)


def read_state(path: Path, spec: Spec, transformation: optax.GradientTransformation) -> State:
    """Weights and optimizer state, ready for the next step."""
    weights = read_weights(path, spec)
    template = jax.eval_shape(transformation.init, weights)
    leaves = _load(path / "optimizer", _named_leaves(template))
    return State(weights, jax.tree.unflatten(jax.tree.structure(template), list(leaves.values())))


def weights_sha256(weights: Weights) -> str:
    """SHA-256 over all weights in table order: each name, shape and its float32 values, little-endian."""
    return _arrays_sha256(as_dict(weights))


def stored_weights_sha256(path: Path) -> str:
    """`weights_sha256` of the checkpoint at `path`, checked first; the model's shape need not be known."""
    _require_whole(path)
    shapes = (_manifest(path) or {})["shapes"]
    wanted = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    return _arrays_sha256(_load(path / "weights", wanted))


def _arrays_sha256(arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        values = np.asarray(array, dtype="<f4")
        digest.update(f"{name} {values.shape}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


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
            for leftover in folder.glob(_PARTIAL + "*"):
                shutil.rmtree(leftover)
        except OSError as cause:
            raise StorageError.writing(folder, cause) from cause

    def save(self, state: State, tokens: int, step: int, stage: str) -> None:
        """Copy the state to the host, then write it in the background. A failure of an earlier save is raised here.

        One that is there stays: what follows from the tokens is the same, and at no moment is there none.
        """
        self.wait()
        if _manifest(self._folder / folder_name(tokens)) is not None:
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
        partial = self._folder / (_PARTIAL + path.name)
        try:
            _write(partial, trees, {"format": _FORMAT, "tokens": tokens, "step": step, "stage": stage})
            try:
                shutil.rmtree(path, ignore_errors=True)  # what is left of one without a manifest
                partial.rename(path)
                _sync(self._folder)
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
            doomed = checkpoint.path.with_name(_PARTIAL + checkpoint.path.name)  # never a half-deleted plain name
            checkpoint.path.rename(doomed)
            shutil.rmtree(doomed)


def _write(partial: Path, trees: Mapping[str, Mapping[str, np.ndarray]], facts: dict[str, object]) -> None:
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, tree in trees.items():
            _orbax_save(partial / name, tree)
        shapes = {name: list(array.shape) for name, array in trees["weights"].items()}
        files = {str(file.relative_to(partial)): file for file in sorted(partial.rglob("*")) if file.is_file()}
        entries = {name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for name, file in files.items()}
        manifest = {**facts, "shapes": shapes, "files": entries}
        text = json.dumps({**manifest, "sha256": _own_sha256(manifest)}, indent=1)
        (partial / _MANIFEST).write_text(text, encoding="utf-8")
        folders = [folder for folder in partial.rglob("*") if folder.is_dir()]
        for place in (*files.values(), partial / _MANIFEST, *folders, partial):
            _sync(place)
    except OSError as cause:
        raise StorageError.writing(partial, cause) from cause


def _orbax_save(path: Path, tree: Mapping[str, np.ndarray]) -> None:
    from orbax.checkpoint import v1 as orbax

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # what Orbax logs as an error it also raises
    try:
        orbax.save(path.absolute(), dict(tree))
    except ValueError as cause:  # TensorStore's name for every storage error
        reason = "no space left on device" if "No space left" in str(cause) else str(cause)
        raise StorageError(f"cannot write {path}: {reason}; free some space or choose another folder") from cause


def _load(path: Path, wanted: Mapping[str, Array | jax.ShapeDtypeStruct]) -> dict[str, Array]:
    from orbax.checkpoint import v1 as orbax

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here) for name, a in wanted.items()}
    found = orbax.load(path.absolute(), template)
    return {name: found[name] for name in wanted}


def _named_leaves(tree: object) -> dict[str, Array]:
    """The leaves of any pytree by their path, in order."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _numbered(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.name.isdecimal() and path.is_dir())


def _require_whole(path: Path) -> None:
    wrong = damage(path)
    if wrong:
        raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(wrong)}; use another of the run's checkpoints")


def _manifest(path: Path) -> dict | None:  # type: ignore[type-arg]  # JSON
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        return None
    return manifest if manifest.pop("sha256", None) == _own_sha256(manifest) else None


def _own_sha256(manifest: dict[str, object]) -> str:
    """Of a manifest without its own hash."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Make a file's contents, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
