"""Machine-readable output: one JSON object to a file or, for "-", to standard output."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from xgen.errors import StorageError


def check_target(target: str | None) -> None:
    """Raise StorageError, before long work, when `write_json` could not write to `target` after it."""
    if target is None or target == "-":
        return
    place = Path(target)
    if place.absolute().parent.is_dir() and not os.access(
        place if place.exists() else place.absolute().parent, os.W_OK
    ):
        raise StorageError(f"cannot write {target}: permission denied; choose a place that you may write to")
    if place.is_dir() or not place.absolute().parent.is_dir():
        what = "it is a folder" if place.is_dir() else f"there is no folder {place.absolute().parent}"
        raise StorageError(f"cannot write {target}: {what}; name a file for the result")


def write_json(value: Any, target: str | None) -> None:
    """Write `value` to the file `target`, to standard output for "-", nowhere for None."""
    if target is None:
        return
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as cause:
        raise StorageError.writing(Path(target), cause) from cause
