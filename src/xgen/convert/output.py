"""Output that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from xgen.checkpoints.manifest import sync
from xgen.errors import DataError, StorageError

Progress = Callable[[float], None]
"""Told the share of the work that is done, from 0 to 1, never falling."""


def require_free(out: Path) -> None:
    """Raise DataError when there is something at `out` that writing would destroy."""
    try:
        taken = out.is_symlink() or (any(out.iterdir()) if out.is_dir() else out.exists())
    except OSError as cause:
        raise StorageError.writing(out, cause) from cause
    if taken:
        raise DataError(f"{out} exists already; remove it or choose another place")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A place beside `out` for a file or a folder: it becomes `out` when the block ends, and goes when that fails.

    Raises DataError when `out` exists (a folder that is empty may), StorageError when writing fails.
    """
    out = Path(os.path.abspath(out))  # "." has no name, and ".." no folder beside it
    require_free(out)
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)  # what a killed process left
        try:
            yield partial
            for place in (*partial.rglob("*"), partial):
                sync(place)
            if out.is_dir() and not partial.is_dir():
                out.rmdir()  # an empty one: only a folder can take its place
            partial.rename(out)
            sync(out.parent)
        finally:
            _remove(partial)
    except OSError as cause:
        raise StorageError.writing(out, cause) from cause


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
