"""What checkpoints a folder holds, and whether they are whole.

A checkpoint is the folder `checkpoints/TOKENS` with its data and a `manifest.json` that lists every file with its size
and hash, and has a hash of its own. It is written beside its place and renamed into it last, so a folder with a plain
number for a name is complete unless it was damaged afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from xgen.checkpoints.processes import ALONE, Processes, agree
from xgen.errors import CheckpointError, StorageError
from xgen.recipe.schema import Section

PARTIAL = "partial-"
"""What the name of a checkpoint begins with while it is written or deleted."""

SHARED = "several processes need a run folder on storage that all of them share"

_MANIFEST = "manifest.json"
_SEALS = "seals-"
_FORMAT = 1

Storage = Literal["orbax", "safetensors"]
"""How the weights are stored: as an Orbax tree, which a run writes, or as one safetensors file a row of the table."""

Count = Annotated[int, Field(ge=0)]


class File(Section):
    """What the manifest tells of a file."""

    bytes: Count
    sha256: str


class Manifest(Section):
    """`manifest.json` without its own hash. `shapes` are those of the weights, in the weights table's order."""

    format: Literal[1]
    tokens: Count
    step: Count
    stage: str
    storage: Storage = "orbax"
    shapes: dict[str, tuple[Count, ...]]
    files: dict[str, File]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. `stage` names the stage it ends, "" for one within a stage."""

    path: Path
    tokens: int
    step: int
    stage: str
    bytes: int

    @classmethod
    def of(cls, path: Path, manifest: Manifest) -> Checkpoint:
        size = sum(entry.bytes for entry in manifest.files.values())
        return cls(path, manifest.tokens, manifest.step, manifest.stage, size)

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
        manifest = read_manifest(path)
        if manifest is not None:
            found.append(Checkpoint.of(path, manifest))
    return found


def damage(path: Path, *, contents: bool = True, world: Processes = ALONE) -> list[str]:
    """What is wrong with the checkpoint at `path`: every missing or altered file by name; [] when whole.

    Without `contents` no file is read: whether each is there and has its size is all that is looked at. All of `world`
    call this together, share the files among them, and come to one answer.
    """
    manifest = _inspect(path)
    if isinstance(manifest, str):
        wrong = [manifest]
    else:
        mine = _share(manifest.files, world) if contents else set(manifest.files)
        faults = (
            _fault(path / name, entry, contents=name in mine and contents) for name, entry in manifest.files.items()
        )
        wrong = [fault for fault in faults if fault]
    everyone = world.gather(f"damage {path.name}", wrong)
    return list(dict.fromkeys(fault for said in everyone for fault in said))


def _share(files: Mapping[str, File], world: Processes) -> set[str]:
    """The files that this process reads: each is read by one, and all read about as many bytes."""
    shares: list[set[str]] = [set() for _ in range(world.count)]
    loads = [0] * world.count
    for name, entry in sorted(files.items(), key=lambda item: (-item[1].bytes, item[0])):
        least = loads.index(min(loads))
        shares[least].add(name)
        loads[least] += entry.bytes
    return shares[world.index]


def _fault(file: Path, entry: File, *, contents: bool) -> str | None:
    try:
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != entry.bytes:
            return f"{file} has {file.stat().st_size} bytes, {entry.bytes} were written"
        return _altered(file) if contents and _sha256(file) != entry.sha256 else None
    except OSError as cause:
        return f"{file} cannot be read ({cause.strerror or cause})"


def _altered(file: Path) -> str:
    return f"{file} has changed since it was written (SHA-256 differs)"


def newest_whole(folder: Path, report: Callable[[str], None], world: Processes = ALONE) -> Checkpoint | None:
    """The newest undamaged checkpoint. Each damaged newer one is reported by name and set aside as `NAME.damaged`.

    All of `world` call this together: process 0 says which there are and sets aside, and all report the same.
    """
    there = world.gather("checkpoints", [path.name for path in _numbered(folder)])[0]
    numbered = [folder / name for name in there]
    for path in reversed(numbered):
        wrong = damage(path, world=world)
        manifest = read_manifest(path)
        if not wrong and manifest is not None:
            return Checkpoint.of(path, manifest)
        aside = path.with_suffix(".damaged")
        agree(world, "set aside", partial(_set_aside, path, aside, world))
        before = "the one before is used" if path != numbered[0] else "none is left: the run begins from the start"
        report(f"checkpoint {path} is damaged: {'; '.join(wrong)}; set aside as {aside.name}; {before}")
    return None


def _set_aside(path: Path, aside: Path, world: Processes) -> None:
    if world.index:
        return
    try:
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    except OSError as cause:
        raise StorageError.writing(aside, cause) from cause


def split_model(model: str) -> tuple[str, str]:
    """Folder and checkpoint of DIR@CHECKPOINT; a folder that has an @ in its own name is itself."""
    place, _, wanted = model.rpartition("@")
    return (model, "") if Path(model).exists() or not place else (place, wanted)


def choose(model: str) -> list[Path]:
    """The checkpoints that `model` names, oldest first: all of a run folder, or one as DIR@TOKENS or DIR@STAGE.

    Damaged ones are among them. Raises CheckpointError, naming what there is, when none fits.
    """
    place, wanted = split_model(model)
    folder = Path(place) / "checkpoints"
    if not folder.is_dir():
        raise CheckpointError(
            f"{model}: there is no {folder}; only a run folder, or one that `xgen convert from-hf` or "
            "from-gguf made, has checkpoints"
        )
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


def _numbered(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.name.isdecimal() and path.is_dir())


def require_whole(path: Path, *, contents: bool = True, world: Processes = ALONE) -> Manifest:
    """The manifest of the checkpoint at `path`. Raises CheckpointError when `damage` finds any."""
    wrong = damage(path, contents=contents, world=world)
    manifest = read_manifest(path)
    if wrong or manifest is None:
        raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(wrong)}; use another, or make it again")
    return manifest


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of the checkpoint at `path`; None when it is missing, altered or of another format."""
    found = _inspect(path)
    return None if isinstance(found, str) else found


def _inspect(path: Path) -> Manifest | str:
    """The manifest of the checkpoint at `path`, or what is wrong with it."""
    file = path / _MANIFEST
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{file} is missing"
    except (OSError, ValueError, RecursionError):
        return _altered(file)
    if not isinstance(facts, dict) or facts.pop("sha256", None) != _own_sha256(facts):
        return _altered(file)
    try:
        return Manifest.model_validate(facts)
    except ValidationError as cause:
        fault = cause.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        return f"{file} is of a kind that this XGen does not know ({where}: {fault['input']!r:.40}); use a newer XGen"


def write_seals(folder: Path, process: int, files: Iterable[Path]) -> None:
    """Put into `folder` what the manifest will tell of the `files` there that `process` wrote; all of them on the disk.

    A file, since together they can be more than the processes may tell each other.
    """
    seals = {name: entry.model_dump() for name, entry in _seal(folder, files).items()}
    (folder / f"{_SEALS}{process}.json").write_text(json.dumps(seals), encoding="utf-8")


def take_seals(folder: Path, processes: int) -> dict[str, File]:
    """What all processes have put there, which is removed. Raises StorageError when one did so somewhere else."""
    found: dict[str, File] = {}
    for process in range(processes):
        file = folder / f"{_SEALS}{process}.json"
        if not file.is_file():
            raise StorageError(f"{file}, which process {process} has written, is not seen by process 0; {SHARED}")
        found |= {name: File.model_validate(told) for name, told in json.loads(file.read_text("utf-8")).items()}
        file.unlink()
    return found


def _seal(folder: Path, files: Iterable[Path]) -> dict[str, File]:
    """What the manifest tells of `files` in `folder`, by their names in it; all of them on the disk."""
    entries = {}
    for file in files:
        entries[str(file.relative_to(folder))] = File(bytes=file.stat().st_size, sha256=_sha256(file))
        sync(file)
    return entries


def write_manifest(folder: Path, facts: dict[str, Any], sealed: Mapping[str, File] | None = None) -> None:
    """Finish the checkpoint in `folder`: a manifest of `facts` and of all files there, all of it on the disk.

    Those in `sealed` are as the processes that wrote them say. Raises StorageError when one of these is not there.
    """
    known = dict(sealed or {})
    unseen = sorted(name for name in known if not (folder / name).is_file())
    if unseen:
        raise StorageError(f"{folder / unseen[0]} is not seen by the process that finishes the checkpoint; {SHARED}")
    others = [
        file for file in sorted(folder.rglob("*")) if file.is_file() and str(file.relative_to(folder)) not in known
    ]
    files = {name: entry.model_dump() for name, entry in sorted({**known, **_seal(folder, others)}.items())}
    manifest = {"format": _FORMAT, **facts, "files": files}
    text = json.dumps({**manifest, "sha256": _own_sha256(manifest)}, indent=1)
    (folder / _MANIFEST).write_text(text, encoding="utf-8")
    for place in (folder / _MANIFEST, *(place for place in folder.rglob("*") if place.is_dir()), folder):
        sync(place)


def _own_sha256(manifest: dict[str, Any]) -> str:
    """Of a manifest without its own hash."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make a file's contents, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
