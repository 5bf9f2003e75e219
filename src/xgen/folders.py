"""Where the package keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`xgen` in the folder that XGEN_CACHE names, else in the user's cache."""
    home = os.environ.get("XGEN_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "xgen"
