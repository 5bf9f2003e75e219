"""A real `xgen watch` for the tests, and a run that is written while it is watched."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from micro_runs import start
from synthetic_runs import MadeUp, write_run

LOGS = ("metrics.jsonl", "events.jsonl")
WAIT_SECONDS = 60.0


@dataclass
class Watched:
    """A running `xgen watch`."""

    address: str
    process: subprocess.Popen[str]

    def stop(self) -> int:
        """SIGTERM. Returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=WAIT_SECONDS)


@contextlib.contextmanager
def watched(folder: Path, *options: object) -> Iterator[Watched]:
    """`xgen watch FOLDER` on a free port, ended afterwards."""
    process = start("watch", folder, *(options or ("--port", 0)))
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], WAIT_SECONDS)
        line = process.stdout.readline() if ready else ""
        assert line.startswith("http://"), line or process.stderr.read()  # type: ignore[union-attr]
        yield Watched(line.split()[0], process)
    finally:
        process.kill()
        process.communicate()


class Writer:
    """Writes a made-up run bit by bit, as a training run does, with the moments of its events moved to now."""

    def __init__(self, folder: Path, run: MadeUp, lines: int) -> None:
        """The folder with the first `lines` steps and the events up to them."""
        self.folder = write_run(folder, replace(run, measured=False))
        self.left: dict[str, list[dict[str, Any]]] = {}
        for name in LOGS:
            path = self.folder / name
            self.left[name] = [json.loads(line) for line in path.read_text().splitlines()]
            path.write_text("")
        begin = self.left["events.jsonl"][0]["time"]
        for event in self.left["events.jsonl"]:
            event["time"] += time.time() - begin
        self.write(lines)

    def write(self, steps: int) -> int:
        """Append so many more steps and the events up to them. Returns the tokens trained on."""
        tokens = 0
        with (self.folder / "metrics.jsonl").open("a") as metrics:
            for _ in range(steps):
                line = self.left["metrics.jsonl"].pop(0)
                tokens = line["tokens"]
                metrics.write(json.dumps(line) + "\n")
        with (self.folder / "events.jsonl").open("a") as events:
            while self.left["events.jsonl"] and self.left["events.jsonl"][0]["tokens"] <= tokens:
                if self.left["events.jsonl"][0]["kind"] in ("stopped", "finished") and self.left["metrics.jsonl"]:
                    break
                events.write(json.dumps(self.left["events.jsonl"].pop(0)) + "\n")
        return tokens

    def say(self, kind: str, **facts: object) -> None:
        """Append an event of now."""
        last = json.loads((self.folder / "metrics.jsonl").read_text().splitlines()[-1])
        event = {"kind": kind, "tokens": last["tokens"], "step": last["step"], "time": time.time(), **facts}
        with (self.folder / "events.jsonl").open("a") as events:
            events.write(json.dumps(event) + "\n")

    def grow_old(self, seconds: float) -> None:
        """Make the logs as if they were last written so long ago."""
        for name in LOGS:
            os.utime(self.folder / name, (time.time() - seconds,) * 2)


def until(holds: Callable[[], object], what: str, seconds: float = WAIT_SECONDS) -> None:
    """Wait until `holds()`."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(0.1)
