"""What can keep a server from starting. This module loads without Starlette and uvicorn."""

from __future__ import annotations

from importlib.util import find_spec

from xgen.errors import XgenError


class ServeError(XgenError):
    """A server that cannot start: a library is missing, or its port is taken."""


def check_installed(*needed: str) -> None:
    """Raise ServeError unless the modules `needed`, such as "starlette" and "uvicorn", are installed."""
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ServeError(f"to serve pages {' and '.join(missing)} must be installed; pip install 'xgen[serve]'")
