"""How a run is doing, from what it wrote: at work, finished, stopped, or silent for longer than it should be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np

from xgen.report.read import Event, Run
from xgen.serve.watch.follow import Seen

RECENT_STEPS = 50
"""Steps that the rate and the mean loss are taken over."""

SILENT_SECONDS = 60.0
"""Without a line, before a training run counts as silent; or so many times its longest recent
step, or its last evaluation."""

SILENT_STEPS, SILENT_PAUSES = 10, 4

SILENT_SECONDS_ELSEWHERE = 900.0
"""The same where no line is due: while the steps are compiled, and while the measurements are taken."""

TURNS = ("run_started", "resumed", "stopped", "finished")
"""Kinds of events after which a run is in another state."""


class State(Enum):
    """The values are what the page says."""

    PREPARING = "preparing"
    READING = "reading"
    STARTING = "starting"
    RUNNING = "running"
    MEASURING = "measuring"
    SILENT = "silent"
    STOPPED = "stopped"
    FINISHED = "finished"


@dataclass(frozen=True)
class Status:
    state: State
    since: float | None
    """When it began, in seconds since 1970: of a silent run when it wrote last. None where no file tells."""
    last_line: float | None
    reason: str = ""
    """Of a stopped run."""

    @property
    def at_work(self) -> bool:
        """Whether more is to come without anybody's doing."""
        return self.state not in (State.SILENT, State.STOPPED, State.FINISHED)


def status_of(seen: Seen, now: float) -> Status:
    """What the run is doing at `now`, in seconds since 1970."""
    run, last_line = seen.run, seen.last_line
    if run is None:
        return Status(State.PREPARING, None, last_line)
    if seen.behind:
        return Status(State.READING, None, last_line)
    turn = last_turn(run)
    if turn is not None and turn.kind == "finished":
        return Status(State.FINISHED, turn.time.timestamp(), last_line)
    if turn is not None and turn.kind == "stopped":
        return Status(State.STOPPED, turn.time.timestamp(), last_line, str(turn.fields.get("reason", "")))
    begun = turn.time.timestamp() if turn is not None else None
    stepped = run.tokens > (turn.tokens if turn is not None else 0)
    state = State.MEASURING if run.trained else State.RUNNING if stepped else State.STARTING
    if last_line is not None and now - last_line > patience(run, state):
        return Status(State.SILENT, last_line, last_line)
    return Status(state, begun, last_line)


def last_turn(run: Run) -> Event | None:
    """The event that the run's state comes from."""
    return next((event for event in reversed(run.events) if event.kind in TURNS), None)


def patience(run: Run, state: State) -> float:
    """Seconds without a line after which something may be wrong."""
    if state is not State.RUNNING:
        return SILENT_SECONDS_ELSEWHERE
    longest = float(np.max(step_seconds(run), initial=0.0))
    measured = run.last("evaluation")
    pause = measured.fields.get("seconds") if measured is not None else None
    pause = float(pause) if isinstance(pause, int | float) and math.isfinite(pause) else 0.0
    return max(SILENT_SECONDS, SILENT_STEPS * longest, SILENT_PAUSES * pause)


def step_seconds(run: Run) -> np.ndarray:
    """Seconds of each of the last steps, of those whose rate is known."""
    first = max(len(run.steps) - RECENT_STEPS, 0)
    batch = np.asarray([stage.batch_tokens for stage in run.recipe.stages])[run.steps.stage[first:]]
    rate = run.steps.tokens_per_second[first:]
    known = np.isfinite(rate) & (rate > 0)
    return np.asarray(batch[known] / rate[known], dtype=np.float64)


def rate_of(run: Run, stage: int) -> float:
    """Tokens a second of a stage's last steps, their median: without evaluation and saving. NaN where none is known."""
    here = run.steps.tokens_per_second[run.steps.stage == stage][-RECENT_STEPS:]
    here = here[np.isfinite(here) & (here > 0)]
    return float(np.median(here)) if here.size else math.nan


@dataclass(frozen=True)
class StageProgress:
    """How far a stage is. Times are those of the steps alone, without evaluation and saving."""

    name: str
    length: int
    done: int
    """Tokens."""
    tokens: int
    seconds_done: float
    seconds_left: float
    """NaN before any rate is known; a stage that is to come is reckoned at the rate of the last one that has one."""
    rate: float
    """Tokens a second, NaN before its first step."""


def stages_of(run: Run) -> list[StageProgress]:
    """The run's stages in order."""
    found = []
    rate = math.nan
    for index, stage in enumerate(run.recipe.stages):
        own = rate_of(run, index)
        rate = own if math.isfinite(own) else rate
        done = min(max(run.tokens - run.recipe.stage_start(index), 0), stage.spent)
        left = stage.spent - done
        speed = run.steps.tokens_per_second[run.steps.stage == index]
        speed = speed[np.isfinite(speed) & (speed > 0)]
        found.append(
            StageProgress(
                name=stage.name,
                length=stage.length,
                done=done,
                tokens=stage.spent,
                seconds_done=float(np.sum(stage.batch_tokens / speed)),
                seconds_left=left / rate if left else 0.0,
                rate=own,
            )
        )
    return found
