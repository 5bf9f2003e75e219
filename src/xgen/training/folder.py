"""The run folder: a line of metrics a step, a line an event, and how both are cut back at a resume."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from xgen.checkpoints.processes import ALONE, Processes, agree
from xgen.errors import DataError, RecipeError, StorageError

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
RECIPE = "recipe.toml"
RESULT = "result.json"
MEASUREMENTS = "evals/after_training.json"
CHECKPOINTS = "checkpoints"
STORES = "stores"
LOCK = ".lock"

STEP_KEYS = (
    "step", "tokens", "stage", "length", "loss", "grad_norm", "update_norm", "param_norm", "lr",
    "tokens_per_second", "seconds", "flops_utilisation", "loss_by_position",
)  # fmt: skip


class Recorder:
    """Appends to a run's `metrics.jsonl` and `events.jsonl`; each line reaches the system when it is written.

    One process of `world` writes; the recorders of the others take the same calls and write nothing. One run at a
    time: raises RecipeError while another one has the folder open. A kill frees it.
    """

    def __init__(self, run: Path, world: Processes = ALONE) -> None:
        self._run, self._world = run, world
        self._lock = threading.Lock()  # checkpoints are recorded by the thread that writes them
        self._streams: dict[str, TextIOWrapper] = {}
        self._claim: TextIOWrapper | None = None
        if self.writes:
            self._claim = _claimed(run)
            self._open()

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes what there is only one of."""
        return self._world.index == 0

    def step(self, **line: object) -> None:
        """One step's line; `STEP_KEYS` lists its names."""
        self._write(METRICS, line)

    def event(self, kind: str, *, tokens: int, step: int, **facts: object) -> None:
        """One event, with the wall-clock time in seconds since 1970."""
        self._write(EVENTS, {"kind": kind, "tokens": tokens, "step": step, "time": time.time(), **facts})

    def sync(self) -> None:
        """Make what was written survive a power cut; done before a checkpoint that counts on it."""
        for stream in self._streams.values():
            try:
                os.fsync(stream.fileno())
            except OSError as cause:
                raise StorageError.writing(Path(stream.name), cause) from cause

    def cut_back(self, tokens: int) -> float:
        """Drop the lines past `tokens`, which the resumed run writes again. Returns the seconds of the steps kept, on
        every process what the writer counted: all of them call this together."""
        return agree(self._world, "cut back", lambda: self._cut_back(tokens) if self.writes else 0.0)[0]

    def _cut_back(self, tokens: int) -> float:
        with self._lock:
            for stream in self._streams.values():
                stream.close()
            kept = [line for line in read_lines(self._run / METRICS) if line["tokens"] <= tokens]
            events = [line for line in read_lines(self._run / EVENTS) if not _comes_again(line, tokens)]
            replace_text(self._run / METRICS, "".join(_line(line) for line in kept))
            replace_text(self._run / EVENTS, "".join(_line(line) for line in events))
            self._open()
        return float(sum(line["seconds"] for line in kept))

    def _open(self) -> None:
        self._streams = {name: _append(self._run / name) for name in (METRICS, EVENTS)}

    def _write(self, name: str, line: dict[str, object]) -> None:
        with self._lock:
            if self.writes:
                _write_line(self._streams[name], line)

    def close(self) -> None:
        for stream in (*self._streams.values(), *([self._claim] if self._claim is not None else [])):
            with suppress(OSError):  # a line that could not be written was an error when it was written
                stream.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a JSON Lines file; a last line torn by a kill is left out."""
    if not path.exists():
        return
    number = 0
    try:
        with path.open(encoding="utf-8") as stream:
            for line in stream:
                number += 1
                if line.endswith("\n"):
                    yield json.loads(line)
    except OSError as cause:
        raise DataError(f"cannot read {path}: {cause.strerror or cause}") from cause
    except ValueError as cause:
        raise DataError(f"{path}, line {number} is damaged ({cause}); delete it and what follows") from cause


def replace_text(path: Path, text: str) -> None:
    """Write a whole file, atomically."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as cause:
        raise StorageError.writing(path, cause) from cause


def write_json(path: Path, value: object) -> None:
    """Write a whole JSON file, atomically; a value that is no number is an error."""
    replace_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _comes_again(event: dict[str, Any], tokens: int) -> bool:
    """Whether a run that goes on at `tokens` writes the event again."""
    return bool(event["tokens"] > tokens or (event["tokens"] == tokens and event["kind"] == "stage_started"))


def _claimed(run: Path) -> TextIOWrapper:
    """The run's lock file, locked for as long as it is open."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        claim = (run / LOCK).open("a", encoding="utf-8")
    except OSError as cause:
        raise StorageError.writing(run / LOCK, cause) from cause
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as cause:
        claim.close()
        raise RecipeError(f"another process is at work on {run}; wait until it ends, or stop it first") from cause
    except OSError:  # some network file systems have no locks; what they hold is not the less whole
        pass
    return claim


def _append(path: Path) -> TextIOWrapper:
    try:
        return path.open("a", encoding="utf-8")
    except OSError as cause:
        raise StorageError.writing(path, cause) from cause


def _line(value: dict[str, object]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def _write_line(stream: TextIOWrapper, value: dict[str, object]) -> None:
    try:
        stream.write(_line(value))
        stream.flush()
    except OSError as cause:
        raise StorageError.writing(Path(stream.name), cause) from cause
