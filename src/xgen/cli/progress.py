"""What a long run says while it runs: a live display on a terminal, plain lines in a log, or nothing.

Everything said was measured. Time left is the tokens that are left over the rate of the present
stage, and says so, since later stages are slower; before there is a rate it says nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

EVERY_SECONDS = 5.0
"""Between plain lines."""

ENOUGH_SECONDS = 2.0
"""Of a stage, after its first step, before a rate is told: the first step loads and warms up."""

BAR_CHARACTERS = 32

Clock = Callable[[], float]


class Task(Protocol):
    """A piece of work outside the steps, such as preparing text or measuring."""

    def advance(self, fraction: float) -> None:
        """Say that the share `fraction`, 0 to 1, of the work is done."""


class Progress:
    """Shows a run of `total_tokens` as it goes; a context manager.

    Writes to standard error unless `console` says otherwise, so that `--json -` keeps standard
    output to itself. `quiet` writes nothing at all.
    """

    def __init__(
        self, total_tokens: int, quiet: bool = False, console: Console | None = None, clock: Clock = time.monotonic
    ) -> None:
        self.total_tokens = total_tokens
        self.clock = clock
        self._console = console or Console(stderr=True)
        self._quiet = quiet
        self._stage = ""
        self._tokens = 0
        self._loss: float | None = None
        self._held_out: float | None = None
        self._speed: float | None = None
        self._stage_start: tuple[float, int] | None = None
        """Time and tokens after the stage's first step in this process."""
        self._last_line: float | None = None
        self._unsaid = False
        self._tasks: list[_Shown] = []
        self._live: Live | None = None
        if self._console.is_terminal and not quiet:
            self._live = Live(console=self._console, get_renderable=self._display, refresh_per_second=4)

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._unsaid:
            self._say(self._line())

    def stage(self, name: str, length: int) -> None:
        """A stage begins or goes on; the rate is measured afresh."""
        self._stage = f"stage {name}" if name == str(length) else f"stage {name}, length {length:,}"
        self._stage_start = self._speed = None
        if self._live is None:
            self._say(self._stage)

    def step(self, tokens: int, loss: float, tokens_per_second: float) -> None:
        """A step is done: `tokens` trained on so far, the step's loss in nats a token and its own speed."""
        now = self.clock()
        if self._stage_start is None:
            self._stage_start = (now, tokens)
        self._tokens, self._loss, self._speed = tokens, loss, tokens_per_second
        due = self._last_line is None or now - self._last_line >= EVERY_SECONDS or tokens >= self.total_tokens
        self._unsaid = self._live is None and not due
        if self._live is None and due:
            self._last_line = now
            self._say(self._line())

    def evaluation(self, loss: float) -> None:
        """Held-out loss, in nats a token, was measured in the loop."""
        self._held_out = loss
        if self._live is None:
            self._say(f"held-out loss {loss:.3f} at {short(self._tokens)} tokens")

    def note(self, text: str) -> None:
        """Say something once, beside the rest."""
        self._say(text)

    @contextmanager
    def task(self, description: str) -> Iterator[Task]:
        """Show a piece of work outside the steps for as long as the context lasts."""
        shown = _Shown(description, self)
        begin = self.clock()
        self._tasks.append(shown)
        how = "broke off"
        if self._live is None:
            self._say(f"{description} ...")
        try:
            yield shown
            how = "done"
        finally:
            self._tasks.remove(shown)
            self._say(f"{description}: {how} after {duration(self.clock() - begin)}")

    def seconds_left(self) -> float | None:
        """Seconds to the last token at the rate of the present stage, evaluations and checkpoints
        included, but not its first step; None when the run is done or no rate was measured yet."""
        if self._stage_start is None or self._tokens >= self.total_tokens:
            return None
        since, tokens = self._stage_start
        passed = self.clock() - since
        if passed < ENOUGH_SECONDS or self._tokens <= tokens:
            return None
        return (self.total_tokens - self._tokens) / (self._tokens - tokens) * passed

    def say_task(self, description: str, fraction: float) -> None:
        """A plain line about a task under way; the live display shows it by itself."""
        if self._live is None:
            self._say(f"{description}: {_percent(fraction)}")

    def _line(self) -> str:
        parts = [f"{self._counted()} ({_percent(self._share())})", self._stage, *self._measures()]
        return " · ".join(part for part in parts if part)

    def _counted(self) -> str:
        return f"{short(self._tokens)} of {short(self.total_tokens)} tokens"

    def _measures(self) -> list[str]:
        parts = []
        if self._loss is not None:
            parts.append(f"loss {self._loss:.3f}")
        if self._held_out is not None and self._live is not None:
            parts.append(f"held-out {self._held_out:.3f}")
        if self._speed is not None:
            parts.append(f"{short(self._speed)} tokens/s")
        left = self.seconds_left()
        if left is not None:
            parts.append(f"{duration(left)} left at this stage's rate")
        return parts

    def _share(self) -> float:
        return self._tokens / self.total_tokens if self.total_tokens else 1.0

    def _display(self) -> RenderableType:
        lines: list[RenderableType] = []
        if self._stage:
            lines += [_bar(self._stage, self._share(), self._counted()), Text(" · ".join(self._measures()))]
        lines += [_bar(task.description, task.fraction, "") for task in self._tasks]
        return Group(*lines)

    def _say(self, text: str) -> None:
        if not self._quiet:
            # Text, not markup: a stage called "[red]" stays that. One line stays one line in a log.
            self._console.print(Text(text), soft_wrap=True)


class _Shown:
    """A `Task` on the display of a `Progress`."""

    def __init__(self, description: str, progress: Progress) -> None:
        self.description = description
        self.fraction = 0.0
        self._progress = progress
        self._last_line = progress.clock()

    def advance(self, fraction: float) -> None:
        self.fraction = min(max(fraction, 0.0), 1.0)
        now = self._progress.clock()
        if now - self._last_line >= EVERY_SECONDS:
            self._last_line = now
            self._progress.say_task(self.description, self.fraction)


def _bar(name: str, share: float, note: str) -> Table:
    row = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=1.0, completed=share, width=BAR_CHARACTERS)
    row.add_row(Text(name), bar, Text(_percent(share)), Text(note))
    return row


def _percent(share: float) -> str:
    """Cut off, not rounded: 100 % is said of nothing that is not done."""
    return f"{int(100 * share)} %"


def short(value: float) -> str:
    """Three digits and a decimal unit: 1.23M, 14.2K, 800B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            decimals = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            text = f"{scaled:.{decimals}f}"
            return (text.rstrip("0").rstrip(".") if "." in text else text) + unit
    return f"{value:.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.1f}"


def duration(seconds: float) -> str:
    """The two largest units: "48 s", "2 min 43 s", "3 h 5 min", "16 d 4 h"."""
    whole = round(seconds)
    for unit, size, lower, lower_size in (("d", 86_400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // lower_size} {lower}"
    return f"{whole} s"
