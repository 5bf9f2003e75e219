"""Seconds from `xgen train` to its first step: with an empty cache, and again with what the start before left there.

    python benchmarks/first_step.py [RECIPE] [--starts 3]

One JSON object a line: `start` (0 finds nothing), `seconds` until the first step stands in the run's metrics,
`new_files` that the start added to the cache. Every start is a new run in a folder of its own, prepared from the texts.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from xgen.training.folder import METRICS


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("-atime")}


def until_first_step(recipe: str, run: Path, cache: Path) -> float:
    """Start, wait for the first step, and end the run. Raises SystemExit when it ends by itself before."""
    environment = os.environ | {"XGEN_CACHE": str(cache)}
    begin = time.perf_counter()
    with (run.parent / f"{run.name}.log").open("wb") as log:
        started = subprocess.Popen(["xgen", "train", recipe, "--run", run], stdout=log, stderr=log, env=environment)
    metrics = run / METRICS
    try:
        while not (metrics.is_file() and metrics.stat().st_size):
            if started.poll() is not None:
                raise SystemExit((run.parent / f"{run.name}.log").read_text())
            time.sleep(0.01)
        return time.perf_counter() - begin
    finally:
        started.send_signal(signal.SIGTERM)
        started.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="tiny")
    parser.add_argument("--starts", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        for start in range(options.starts):
            before = files(cache)
            seconds = until_first_step(options.recipe, Path(folder) / f"run{start}", cache)
            found = {"start": start, "seconds": round(seconds, 2), "new_files": len(files(cache) - before)}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
