"""A run folder, read into typed values: the only thing the report knows of a run.

A folder is read as it lies, also while the run is going on or after it was killed. What cannot be
read is never left out in silence: it becomes a remark that the page prints.
"""

from __future__ import annotations

import json
import math
import tomllib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from xgen.errors import DataError
from xgen.recipe.schema import Model, Recipe

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

COUNTS = ("step", "tokens", "length")
MEASURES = ("loss", "grad_norm", "update_norm", "param_norm", "lr", "tokens_per_second", "flops_utilisation")


@dataclass(frozen=True)
class Steps:
    """The run's steps in order, one array a column, all of one length; unknown values are NaN."""

    step: Ints
    tokens: Ints
    """Tokens trained on when the step was done."""
    stage: Ints
    """Index of the stage in the recipe."""
    length: Ints
    loss: Floats
    grad_norm: Floats
    update_norm: Floats
    param_norm: Floats
    lr: Floats
    tokens_per_second: Floats
    flops_utilisation: Floats
    repeated: int
    """Steps that were taken again after a resume; only the last taking is kept."""

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True)
class Event:
    kind: str
    tokens: int
    step: int
    time: datetime
    fields: dict[str, Any]
    """Everything the line says beside kind, tokens, step and time."""


FOREIGN = "the folder was not written by this version of xgen"

Bound = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""An end of a 95 % interval; NaN where too few documents bear on a figure to have one."""


class Row(BaseModel):
    """One row of the measurements after training. Losses are nats a token."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    checkpoint: str


class Text(BaseModel):
    """The held-out text that all checkpoints were measured on."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    documents: int
    tokens: int
    bytes: int
    xz_bits_per_byte: float


class Strided(Row):
    context: int
    stride: int
    loss: float
    low: Bound
    high: Bound
    perplexity: float
    bits_per_byte: float
    documents: int
    tokens: int


class Bin(BaseModel):
    """Mean loss of tokens predicted from `start` to `stop` ids, both included."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    start: int
    stop: int
    loss: float
    low: Bound
    high: Bound
    tokens: int


class ByPosition(Row):
    length: int
    bins: tuple[Bin, ...]
    documents: int


class FixedTarget(Row):
    context: int
    target: int
    loss: float
    low: Bound
    high: Bound
    documents: int
    tokens: int


class Gain(Row):
    """Loss at `to_context` less loss at `from_context` of the same target tokens: negative is a gain."""

    from_context: int
    to_context: int
    difference: float
    low: Bound
    high: Bound
    documents: int


class Change(BaseModel):
    """Loss less that of an earlier checkpoint on the same tokens: negative is a gain."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    against: str
    difference: float
    low: Bound
    high: Bound


class SinceStart(Row):
    """Tokens predicted from `start` to `stop` ids, both included, and what changed since the checkpoints before."""

    measure: str
    start: int
    stop: int
    loss: float
    low: Bound
    high: Bound
    documents: int
    tokens: int
    changes: tuple[Change, ...]

    def against(self, checkpoint: str) -> Change | None:
        return next((one for one in self.changes if one.against == checkpoint), None)


class Start(BaseModel):
    """What is shown of the model that the run continues."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    place: Annotated[str, Field(alias="from")]
    name: str
    model: Model
    context_length: int
    weights_sha256: str


class Measured(BaseModel):
    """The measurements taken after training, of every stage's checkpoint."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    text: Text
    strided: tuple[Strided, ...]
    by_position: tuple[ByPosition, ...]
    fixed_target: tuple[FixedTarget, ...]
    fixed_target_gain: tuple[Gain, ...]
    since_start: tuple[SinceStart, ...] = ()
    """Empty unless the run continues a model."""
    notes: tuple[str, ...]
    """What could not be measured, and why."""


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss taken in the loop, in nats a token, and its mean in each bin of positions by the bin's start."""

    tokens: int
    loss: float
    by_position: dict[int, float]


@dataclass(frozen=True)
class Sample:
    tokens: int
    prompt: str
    text: str
    document: str


@dataclass(frozen=True)
class Run:
    folder: Path
    recipe: Recipe
    recipe_text: str
    steps: Steps
    events: tuple[Event, ...]
    measured: Measured | None
    remarks: tuple[str, ...]
    """What could not be read, in words."""
    start: Start | None = None
    """The model that the run continues."""

    def of_kind(self, kind: str) -> tuple[Event, ...]:
        return tuple(event for event in self.events if event.kind == kind)

    def last(self, kind: str) -> Event | None:
        found = self.of_kind(kind)
        return found[-1] if found else None

    def evaluations(self) -> tuple[Evaluation, ...]:
        """The evaluations in the loop by tokens; of what a resume took again only the last taking."""
        return tuple(
            Evaluation(
                tokens=event.tokens,
                loss=number(event.fields.get("loss"), f"the loss of the evaluation at {event.tokens} tokens"),
                by_position=_bins(event),
            )
            for event in self._kept("evaluation")
        )

    def samples(self) -> tuple[Sample, ...]:
        """The texts written in the loop by tokens; of what a resume took again only the last taking."""
        return tuple(
            Sample(event.tokens, *(_field(event, name) for name in ("prompt", "text", "document")))
            for event in self._kept("sample")
        )

    def _kept(self, kind: str) -> list[Event]:
        kept: list[Event] = []
        for event in self.events:
            if event.kind == "resumed":
                kept = [earlier for earlier in kept if earlier.tokens <= event.tokens]
            elif event.kind == kind:
                kept.append(event)
        return kept

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return int(self.steps.tokens[-1]) if len(self.steps) else 0

    @property
    def trained(self) -> bool:
        """Whether every token of the recipe was trained on."""
        return self.tokens >= self.recipe.total_tokens


def read_run(folder: Path) -> Run:
    """Read the run folder `folder`.

    Raises DataError when it is no run folder or a file in it is not what a run writes.
    """
    if not (folder / "recipe.toml").is_file():
        raise DataError(
            f"{folder} is no run folder: it has no recipe.toml; name the folder given to `xgen train --run`"
        )
    recipe, recipe_text = read_recipe(folder)
    remarks: list[str] = []
    return Run(
        folder=folder,
        recipe=recipe,
        recipe_text=recipe_text,
        steps=_steps(folder / "metrics.jsonl", recipe, remarks),
        events=_events(folder / "events.jsonl", remarks),
        measured=read_measured(folder),
        remarks=tuple(remarks),
        start=read_start(folder),
    )


def number(value: Any, where: str) -> float:
    """`value` as a float; None, which stands for not known, is NaN."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where} is {value!r}, not a number; {FOREIGN}")
    return float(value)


def whole(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{where} is {value!r}, not a whole number; {FOREIGN}")
    return value


def _field(event: Event, name: str) -> str:
    value = event.fields.get(name)
    if not isinstance(value, str):
        raise DataError(f"events.jsonl: the {event.kind} at {event.tokens} tokens has {name} {value!r:.60}, not a text")
    return value


def _bins(event: Event) -> dict[int, float]:
    bins = event.fields.get("loss_by_position")
    if not isinstance(bins, dict):
        raise DataError(
            f"events.jsonl: the evaluation at {event.tokens} tokens has loss_by_position {bins!r:.60}, not a table"
        )
    return {int(start): number(value, f"loss at position {start}") for start, value in bins.items()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as cause:
        raise DataError(f"cannot read {path}: {cause.strerror or cause}") from cause
    except UnicodeDecodeError as cause:
        raise DataError(f"{path} is not UTF-8 text (byte {cause.start}); it was not written by xgen") from cause


def read_recipe(folder: Path) -> tuple[Recipe, str]:
    """The resolved recipe of a run folder, and its text."""
    path = folder / "recipe.toml"
    text = _text(path)
    try:
        return Recipe.model_validate(tomllib.loads(text)), text
    except tomllib.TOMLDecodeError as cause:
        raise DataError(f"{path} is not TOML: {cause}; a run writes it whole, so it was changed afterwards") from cause
    except ValidationError as cause:
        raise DataError(f"{path} is no resolved recipe: {_first_problem(cause)}") from cause


def _first_problem(cause: ValidationError) -> str:
    problem = cause.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"{where}: {problem['msg']} (got {problem['input']!r:.80})"


def _lines(path: Path, remarks: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file with their line numbers; torn lines go to `remarks`.

    A kill in the middle of a write tears a line, which is no reason to refuse the rest.
    """
    if not path.is_file():
        remarks.append(f"{path.name} is missing, so nothing that comes from it is shown.")
        return
    torn: list[int] = []
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for at, line in enumerate(file, start=1):
                try:
                    value = json.loads(line)
                except json.JSONDecodeError:
                    torn.append(at)
                    continue
                if not isinstance(value, dict):
                    raise DataError(f"{path}, line {at}: expected an object, got {value!r:.60}")
                yield at, value
    except OSError as cause:
        raise DataError(f"cannot read {path}: {cause.strerror or cause}") from cause
    if torn:
        remarks.append(torn_remark(path, torn))


def torn_remark(path: Path, torn: list[int]) -> str:
    """What the page says of the lines, by their numbers, that could not be read."""
    first = ", ".join(str(at) for at in torn[:5]) + (", ..." if len(torn) > 5 else "")
    lines = "line" if len(torn) == 1 else f"{len(torn)} lines"
    return f"{path.name}: {lines} cut short and left out (line {first}); a kill while writing does this."


class StepLog:
    """The steps of a run by the lines of its metrics.jsonl, which are added one after the other."""

    def __init__(self, recipe: Recipe) -> None:
        self._stages = {stage.name: index for index, stage in enumerate(recipe.stages)}
        self._counts = {name: array("q") for name in (*COUNTS, "stage")}
        self._measures = {name: array("d") for name in MEASURES}
        self._repeated = 0

    def add(self, line: dict[str, Any], where: str) -> None:
        """Take one line; `where` names it in an error. Raises DataError, and takes nothing of it, when it is not what
        a run writes."""
        missing = [name for name in (*COUNTS, "stage", *MEASURES) if name not in line]
        if missing:
            raise DataError(f"{where}: no {', '.join(missing)}; {FOREIGN}")
        if line["stage"] not in self._stages:
            raise DataError(
                f"{where}: stage {line['stage']!r} is not in the recipe, which has {', '.join(self._stages)}"
            )
        counts = {name: whole(line[name], f"{where}: {name}") for name in COUNTS}
        measures = {name: number(line[name], f"{where}: {name}") for name in MEASURES}
        # A resume goes back to a checkpoint: steps after it that still stand here are replaced by their second taking.
        while self._counts["step"] and self._counts["step"][-1] >= counts["step"]:
            self._repeated += 1
            for column in self._counts.values():
                column.pop()
            for measure in self._measures.values():
                measure.pop()
        self._counts["stage"].append(self._stages[line["stage"]])
        for name in COUNTS:
            self._counts[name].append(counts[name])
        for name in MEASURES:
            self._measures[name].append(measures[name])

    def steps(self) -> Steps:
        """What the lines say so far."""
        columns: dict[str, Any] = {
            **{name: np.array(column, dtype=np.int64) for name, column in self._counts.items()},
            **{name: np.array(column, dtype=np.float64) for name, column in self._measures.items()},
        }
        return Steps(**columns, repeated=self._repeated)


def _steps(path: Path, recipe: Recipe, remarks: list[str]) -> Steps:
    log = StepLog(recipe)
    for at, line in _lines(path, remarks):
        log.add(line, f"{path}, line {at}")
    return log.steps()


def _events(path: Path, remarks: list[str]) -> tuple[Event, ...]:
    return tuple(event_of(line, f"{path}, line {at}") for at, line in _lines(path, remarks))


def event_of(line: dict[str, Any], where: str) -> Event:
    """The event of a line of events.jsonl; `where` names the line in an error."""
    kind = line.get("kind")
    if not isinstance(kind, str):
        raise DataError(f"{where}: kind is {kind!r}, not a text")
    return Event(
        kind=kind,
        tokens=whole(line.get("tokens"), f"{where}: tokens"),
        step=whole(line.get("step"), f"{where}: step"),
        time=_time(line.get("time"), f"{where}: time"),
        fields={key: value for key, value in line.items() if key not in ("kind", "tokens", "step", "time")},
    )


def _time(value: Any, where: str) -> datetime:
    """A moment, from seconds since 1970."""
    try:
        return datetime.fromtimestamp(number(value, where), tz=UTC)
    except (ValueError, OverflowError, OSError) as cause:
        raise DataError(f"{where} is {value!r}, not a moment; {FOREIGN}") from cause


def read_start(folder: Path) -> Start | None:
    """What start.json says; None for a run that begins with fresh weights."""
    path = folder / "start.json"
    if not path.is_file():
        return None
    try:
        return Start.model_validate_json(_text(path))
    except ValidationError as cause:
        raise DataError(f"{path} is not what a run writes: {_first_problem(cause)}; put it back") from cause


def read_measured(folder: Path) -> Measured | None:
    """The measurements after training; None before they were taken."""
    path = folder / "evals" / "after_training.json"
    if not path.is_file():
        return None
    try:
        value = json.loads(_text(path))
        for row in value["by_position"]:
            row["bins"] = [{"start": one["from"], "stop": one["to"], **one} for one in row["bins"]]
        for row in value.get("since_start", ()):
            row |= {"start": row["from"], "stop": row["to"] - 1}
        return Measured.model_validate(value)
    except (json.JSONDecodeError, KeyError, TypeError) as cause:
        raise DataError(f"{path} is not what a run writes ({cause}); take the measurement again") from cause
    except ValidationError as cause:
        raise DataError(
            f"{path} is not what a run writes: {_first_problem(cause)}; take the measurement again"
        ) from cause
