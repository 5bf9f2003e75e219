"""A run folder, followed: of the two logs only what was added is read, whatever happens to them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from xgen.errors import DataError
from xgen.recipe.schema import Recipe
from xgen.report.read import (
    Event,
    Measured,
    Run,
    Start,
    StepLog,
    event_of,
    read_measured,
    read_recipe,
    read_start,
    torn_remark,
)

PIECE_BYTES = 8 * 2**20
"""Read at one go: a long log is taken in pieces, so that the page can say how far it is."""


class Tail:
    """A JSON Lines file that grows: each line is given to `take` once, when it is whole, with the place it stands at.

    A resume replaces the file by a shorter one: then `begin` is called, as before the first line, and all its lines
    are given again. The file is held open, so that its inode number cannot come back with another file. A line that
    `take` refuses with DataError is left out, and `problem` says the first reason.
    """

    def __init__(self, path: Path, begin: Callable[[], None], take: Callable[[dict[str, Any], str], None]) -> None:
        self.path = path
        self.problem = ""
        self.torn: list[int] = []
        """Numbers of whole lines that are no JSON; a kill while writing leaves one."""
        self._begin, self._take = begin, take
        self._file: BinaryIO | None = None
        self._offset = self._line = 0
        self._rest = b""

    @property
    def behind(self) -> int:
        """Bytes that were not read yet."""
        return max(os.fstat(self._file.fileno()).st_size - self._offset, 0) if self._file is not None else 0

    def read(self) -> bool:
        """Take the next piece. Returns whether there was anything new; a file that is missing has nothing."""
        try:
            replaced = self._follow_replacement()
            if self._file is None:
                return replaced
            self._file.seek(self._offset)
            piece = self._file.read(PIECE_BYTES)
        except OSError as cause:
            self.close()
            self.problem = f"cannot read {self.path}: {cause.strerror or cause}"
            return True
        self._offset += len(piece)
        *whole, self._rest = (self._rest + piece).split(b"\n")
        for line in whole:
            self._line += 1
            self._give(line)
        return replaced or bool(whole)

    def _give(self, text: bytes) -> None:
        where = f"{self.path}, line {self._line}"
        try:
            value = json.loads(text.decode("utf-8", errors="replace"))
        except json.JSONDecodeError:
            self.torn.append(self._line)
            return
        try:
            if not isinstance(value, dict):
                raise DataError(f"{where}: expected an object, got {value!r:.60}")
            self._take(value, where)
        except DataError as error:
            self.problem = self.problem or str(error)

    def _follow_replacement(self) -> bool:
        """Begin anew when another file stands at the path, or when the file is shorter than what was read of it."""
        try:
            now = self.path.stat()
        except FileNotFoundError:
            was_there = self._file is not None
            if was_there:
                self.close()
                self._begin()
            return was_there
        if self._file is not None:
            held = os.fstat(self._file.fileno())
            if (held.st_dev, held.st_ino) == (now.st_dev, now.st_ino) and now.st_size >= self._offset:
                return False
        self.close()
        self._file = self.path.open("rb")
        self._begin()
        return True

    def close(self) -> None:
        """Let go of the file; the next `read` begins anew."""
        if self._file is not None:
            self._file.close()
        self._file, self._offset, self._line, self._rest = None, 0, 0, b""
        self.problem, self.torn = "", []


@dataclass(frozen=True)
class Seen:
    """What was read so far."""

    run: Run | None = None
    """None before the folder has a recipe."""
    last_line: float | None = None
    """When a log was last written to, in seconds since 1970."""
    behind: int = 0
    """Bytes of the logs that are not read yet."""
    problem: str = ""
    """Why the folder, or a part of it, cannot be read."""


class Follower:
    """Reads a run folder bit by bit. `poll` takes what is new; `seen` is what there is, made when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError when `folder` can be no run's."""
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}; name the folder given to `xgen train --run`")
        if not (folder / "recipe.toml").is_file() and not _is_being_prepared(folder):
            raise DataError(
                f"{folder} is no run folder: it has no recipe.toml; name the folder given to `xgen train --run`"
            )
        self.folder = folder
        self._recipe: tuple[Recipe, str] | None = None
        self._small: dict[str, _Stamp] = {}
        self._steps: StepLog | None = None
        self._events: list[Event] = []
        self._measured: Measured | None = None
        self._start: Start | None = None
        self._problem = ""
        self._tails = (
            Tail(folder / "metrics.jsonl", self._begin_steps, self._take_step),
            Tail(folder / "events.jsonl", self._begin_events, self._take_event),
        )

    def poll(self) -> bool:
        """Take what is new, at most `PIECE_BYTES` of each log. Returns whether there was anything."""
        try:
            changed = self._poll_small()
        except DataError as error:
            changed, self._problem = self._problem != str(error), str(error)
            self._small = {}  # none of them counts as read
        if self._recipe is not None:
            changed = bool(sum([tail.read() for tail in self._tails])) or changed
        return changed

    def seen(self) -> Seen:
        """What was read so far."""
        empty = Seen(
            last_line=self.last_line(),
            behind=sum(tail.behind for tail in self._tails),
            problem=self._problem or next((tail.problem for tail in self._tails if tail.problem), ""),
        )
        if self._recipe is None or self._steps is None:
            return empty
        recipe, text = self._recipe
        remarks = tuple(torn_remark(tail.path, tail.torn) for tail in self._tails if tail.torn)
        steps = self._steps.steps()
        run = Run(self.folder, recipe, text, steps, tuple(self._events), self._measured, remarks, self._start)
        return replace(empty, run=run)

    def last_line(self) -> float | None:
        """When a log was last written to, in seconds since 1970; None while there is none."""
        written = [moment for tail in self._tails if (moment := _written(tail.path)) is not None]
        return max(written, default=None)

    def _poll_small(self) -> bool:
        """Read again the files that are written whole, where they changed."""
        changed = [name for name in ("recipe.toml", "start.json", "evals/after_training.json") if self._touched(name)]
        if "recipe.toml" in changed:
            there = (self.folder / "recipe.toml").is_file()
            recipe = read_recipe(self.folder) if there else None
            if recipe is None or self._recipe is None or recipe[1] != self._recipe[1]:
                self._recipe = recipe
                self._begin_anew()
        if "start.json" in changed:
            self._start = read_start(self.folder)
        if "evals/after_training.json" in changed:
            self._measured = read_measured(self.folder)
        if changed:
            self._problem = ""
        return bool(changed)

    def _begin_anew(self) -> None:
        """Forget the logs: another recipe gives their lines another meaning."""
        for tail in self._tails:
            tail.close()
        self._begin_steps()
        self._begin_events()

    def _begin_steps(self) -> None:
        self._steps = StepLog(self._recipe[0]) if self._recipe is not None else None

    def _take_step(self, line: dict[str, Any], where: str) -> None:
        if self._steps is not None:
            self._steps.add(line, where)

    def _begin_events(self) -> None:
        self._events = []

    def _take_event(self, line: dict[str, Any], where: str) -> None:
        self._events.append(event_of(line, where))

    def _touched(self, name: str) -> bool:
        """Whether a file is another one than at the last call; at the first, whether it is there."""
        stamp = _stamp(self.folder / name)
        before = self._small.get(name)
        self._small[name] = stamp
        return stamp != before and (before is not None or stamp is not None)


_Stamp = tuple[int, int, int] | None


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    except OSError as cause:
        raise DataError(f"cannot read {path}: {cause.strerror or cause}") from cause
    return found.st_ino, found.st_mtime_ns, found.st_size


def _written(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:  # missing; `Tail.read` tells of other reasons
        return None


def _is_being_prepared(folder: Path) -> bool:
    """Whether `xgen train` is at work in a folder: the recipe is the last that it writes before it trains."""
    return (folder / ".lock").exists() or (folder / "stores").is_dir()
