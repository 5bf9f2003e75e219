"""An environment of its own for every peer: made once, and anew when its requirements change."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
MADE = "requirements.txt"
"""In an environment, the requirements that it was made of; written last."""

OLDEST = {"levanter": (3, 12)}
"""Python that a peer needs, where that is more than ours."""


def python_of(peer: str, folder: Path, python: str | None) -> Path:
    """The interpreter of the peer's environment in `folder`, which is made if need be, with `python` or the first that
    fits. Raises SystemExit when none does."""
    place, wanted = folder / peer, (HERE / "requirements" / f"{peer}.txt").read_text(encoding="utf-8")
    found = place / "bin" / "python"
    made = place / MADE
    if made.is_file() and made.read_text(encoding="utf-8") == wanted:
        return found
    sys.stderr.write(f"making {place}\n")
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([python or _fitting(peer), "-m", "venv", place], check=True)
    install = [found, "-m", "pip", "install", "--quiet", "--requirement", HERE / "requirements" / f"{peer}.txt"]
    subprocess.run(install, check=True, stdout=sys.stderr)
    made.write_text(wanted, encoding="utf-8")
    return found


def _fitting(peer: str) -> str:
    oldest = OLDEST.get(peer, (3, 11))
    names = [sys.executable, *(f"python3.{minor}" for minor in range(oldest[1], 14))]
    for name in names:
        if (place := shutil.which(name)) and _version(place) >= oldest:
            return place
    wanted = ".".join(map(str, oldest))
    raise SystemExit(f"{peer} needs Python {wanted} or newer, and there is none; name one with --python {peer}=PATH")


def _version(python: str) -> tuple[int, ...]:
    """(0,) for one that does not run, such as a version manager's stand-in for what is not switched on."""
    ran = subprocess.run([python, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True)
    return tuple(map(int, ran.stdout.split())) if ran.returncode == 0 else (0,)
