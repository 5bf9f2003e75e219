"""Machine-readable output: one JSON object to a file or, for "-", to standard output."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from xgen.errors import StorageError


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
