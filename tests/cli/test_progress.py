"""The display says what was measured and nothing else."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from xgen.cli.progress import ENOUGH_SECONDS, EVERY_SECONDS, Progress, duration, short


class Clock:
    """A clock that stands still until told to go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def watched(total: int, *, terminal: bool = False, quiet: bool = False) -> tuple[Progress, Clock, io.StringIO]:
    written, clock = io.StringIO(), Clock()
    console = Console(file=written, force_terminal=terminal, width=100, color_system=None)
    return Progress(total, quiet=quiet, console=console, clock=clock), clock, written


def train(
    progress: Progress, clock: Clock, steps: int, *, batch: int = 100, seconds: float = 1.0, start: int = 0
) -> None:
    for i in range(1, steps + 1):
        clock.now += seconds
        progress.step(start + i * batch, 3.0 - i / 1000, batch / seconds)


def test_time_left_is_what_the_rest_takes_at_the_stages_rate():
    progress, clock, _ = watched(10_000)
    with progress:
        progress.stage("64", 64)
        clock.now += 60.0  # the first step compiles; it must not count
        train(progress, clock, 11)
        assert progress.seconds_left() == pytest.approx((10_000 - 1_100) / 100)
        progress.stage("128", 128)
        assert progress.seconds_left() is None
        train(progress, clock, 5, seconds=4.0, start=1_100)
        assert progress.seconds_left() == pytest.approx((10_000 - 1_600) / 25)


def test_evaluations_between_steps_count_in_the_time_left():
    progress, clock, _ = watched(10_000)
    with progress:
        progress.stage("64", 64)
        train(progress, clock, 6)
        clock.now += 5.0
        assert progress.seconds_left() == pytest.approx((10_000 - 600) * (5 + 5) / 500)


def test_a_resumed_run_measures_its_own_rate():
    progress, clock, _ = watched(10_000)
    with progress:
        progress.stage("64", 64)
        train(progress, clock, 4, start=8_000)
        assert progress.seconds_left() == pytest.approx((10_000 - 8_400) / 100)


def test_no_time_is_told_before_it_was_measured_nor_after_the_end():
    progress, clock, written = watched(1_000)
    with progress:
        assert progress.seconds_left() is None
        progress.stage("64", 64)
        train(progress, clock, 1)
        assert progress.seconds_left() is None
        clock.now += ENOUGH_SECONDS / 2
        assert progress.seconds_left() is None
        train(progress, clock, 9, start=100)
        assert progress.seconds_left() is None
    assert "left" not in written.getvalue().splitlines()[-1]


def test_plain_lines_come_every_few_seconds_and_tell_the_last_state():
    progress, clock, written = watched(100_000)
    with progress:
        progress.stage("2k", 2048)
        train(progress, clock, 33)
    lines = written.getvalue().splitlines()
    steps = [line for line in lines if "tokens (" in line]
    assert lines[0] == "stage 2k, length 2,048"
    assert len(steps) == 1 + 32 // EVERY_SECONDS + 1
    assert steps[-1].startswith(
        "3.3K of 100K tokens (3 %) · stage 2k, length 2,048 · loss 2.967 · 100 tokens/s · 16 min 7 s left"
    )


def test_a_hundred_percent_is_said_of_nothing_that_is_not_done():
    progress, clock, written = watched(1_000_000)
    with progress:
        progress.stage("64", 64)
        clock.now += 1
        progress.step(999_999, 2.0, 10.0)
        assert "100 %" not in written.getvalue()
        progress.step(1_000_000, 2.0, 10.0)
    assert "100 %" in written.getvalue().splitlines()[-1]


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_writes_nothing(terminal):
    progress, clock, written = watched(1_000, terminal=terminal, quiet=True)
    with progress:
        progress.stage("64", 64)
        train(progress, clock, 10)
        progress.evaluation(2.5)
        progress.note("note")
        with progress.task("measuring") as task:
            clock.now += 60
            task.advance(0.5)
    assert written.getvalue() == ""


def test_the_terminal_shows_the_stage_the_losses_the_speed_and_the_time_left():
    progress, clock, written = watched(10_000, terminal=True)
    with progress:
        progress.stage("64", 64)
        train(progress, clock, 11)
        progress.evaluation(2.345)
        progress.note("a note")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())
    assert "a note" in shown
    assert re.search(r"stage 64 +━+.*11 % 1.1K of 10K tokens", shown)
    assert "loss 2.989 · held-out 2.345 · 100 tokens/s · 1 min 29 s left" in shown


@pytest.mark.parametrize("terminal", [False, True])
def test_text_of_others_is_never_markup(terminal):
    progress, clock, written = watched(1_000, terminal=terminal)
    with progress:
        progress.stage("[red]x[/red]", 64)
        train(progress, clock, 1)
        progress.note("[/] :smile: [bold]n")
        with progress.task("[blink]t"):
            pass
    shown = written.getvalue()
    assert "[red]x[/red]" in shown
    assert "[/] :smile: [bold]n" in shown
    assert "[blink]t: done" in shown


def test_a_task_tells_its_share_and_how_it_ended():
    progress, clock, written = watched(1_000)
    with progress:
        with progress.task("measuring") as task:
            task.advance(0.1)
            clock.now += EVERY_SECONDS
            task.advance(0.479)
        preparing = progress.task("preparing")
        preparing.__enter__()
        clock.now += 3
        assert not preparing.__exit__(KeyError, KeyError(), None), "an error must go on its way"
    assert written.getvalue().splitlines() == [
        "measuring ...",
        "measuring: 47 %",
        "measuring: done after 5 s",
        "preparing ...",
        "preparing: broke off after 3 s",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (3.25, "3.2"),
        (999, "999"),
        (999.9, "1K"),
        (1_234_567, "1.23M"),
        (14_249, "14.2K"),
        (999_950, "1M"),
        (12_000_000, "12M"),
        (8e11, "800B"),
        (1.5e12, "1.5T"),
    ],
)
def test_short_numbers(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (48, "48 s"),
        (59.6, "1 min 0 s"),
        (163, "2 min 43 s"),
        (11_100, "3 h 5 min"),
        (1_400_000, "16 d 4 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
