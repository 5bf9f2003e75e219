"""JSON objects out of files that strangers wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from xgen.errors import CheckpointError

LARGEST = 4 << 20
"""Bytes of such a file: an index of 50 000 tensors. Python takes up to twenty times as much to hold it."""


def read_json(path: Path) -> dict[str, Any]:
    """The object that the file at `path` holds.

    Raises CheckpointError when it is missing, too large or too deep, is not strict JSON, or has a key twice.
    """
    require_size(path, LARGEST)
    try:
        found = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_without_doubles, parse_constant=_no_constant
        )
    except OSError as cause:
        raise CheckpointError(f"cannot read {path}: {cause.strerror or cause}") from cause
    except RecursionError as cause:
        raise CheckpointError(f"{path} is nested too deeply to be a model's; fetch it again") from cause
    except ValueError as cause:
        raise CheckpointError(f"{path} is not JSON: {cause}; fetch it again") from cause
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch it again")
    return found


def require_size(path: Path, most: int) -> None:
    """Raise CheckpointError unless `path` is a file of at most `most` bytes."""
    try:
        size = path.stat().st_size
    except OSError as cause:
        raise CheckpointError(f"cannot read {path}: {cause.strerror or cause}") from cause
    if not path.is_file():
        raise CheckpointError(f"{path} is no file; fetch it again")
    if size > most:
        raise CheckpointError(f"{path} is {size} bytes long; no model's is over {most}; fetch it again")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it has the key {double!a:.100} twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"it holds {text}")
