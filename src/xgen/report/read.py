"""A run folder, read into typed values: the only thing the report knows of a run.

A folder is read as it lies, also while the run is going on or after it was killed. What cannot be
read is never left out in silence: it becomes a remark that the page prints.
"""

from __future__ import annotations

import json
import math
import tomllib
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
    recipe_text = _text(folder / "recipe.toml")
    recipe = _recipe(folder / "recipe.toml", recipe_text)
    remarks: list[str] = []
    return Run(
        folder=folder,
        recipe=recipe,
        recipe_text=recipe_text,
        steps=_steps(folder / "metrics.jsonl", recipe, remarks),
        events=_events(folder / "events.jsonl", remarks),
        measured=_measured(folder / "evals" / "after_training.json"),
        remarks=tuple(remarks),
        start=_start(folder / "start.json"),
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


def _recipe(path: Path, text: str) -> Recipe:
    try:
        return Recipe.model_validate(tomllib.loads(text))
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
        first = ", ".join(str(at) for at in torn[:5]) + (", ..." if len(torn) > 5 else "")
        lines = "line" if len(torn) == 1 else f"{len(torn)} lines"
        remarks.append(f"{path.name}: {lines} cut short and left out (line {first}); a kill while writing does this.")


def _steps(path: Path, recipe: Recipe, remarks: list[str]) -> Steps:
    stages = {stage.name: index for index, stage in enumerate(recipe.stages)}
    counts: dict[str, list[int]] = {name: [] for name in (*COUNTS, "stage")}
    measures: dict[str, list[float]] = {name: [] for name in MEASURES}
    repeated = 0
    for at, line in _lines(path, remarks):
        where = f"{path}, line {at}"
        missing = [name for name in (*counts, *measures) if name not in line]
        if missing:
            raise DataError(f"{where}: no {', '.join(missing)}; {FOREIGN}")
        if line["stage"] not in stages:
            raise DataError(f"{where}: stage {line['stage']!r} is not in the recipe, which has {', '.join(stages)}")
        step = whole(line["step"], f"{where}: step")
        # A resume goes back to a checkpoint: steps after it that still stand here are replaced by their second taking.
        while counts["step"] and counts["step"][-1] >= step:
            repeated += 1
            for column in counts.values():
                column.pop()
            for measure in measures.values():
                measure.pop()
        counts["stage"].append(stages[line["stage"]])
        for name in COUNTS:
            counts[name].append(whole(line[name], f"{where}: {name}"))
        for name in MEASURES:
            measures[name].append(number(line[name], f"{where}: {name}"))
    return Steps(
        step=_ints(counts["step"]),
        tokens=_ints(counts["tokens"]),
        stage=_ints(counts["stage"]),
        length=_ints(counts["length"]),
        loss=_floats(measures["loss"]),
        grad_norm=_floats(measures["grad_norm"]),
        update_norm=_floats(measures["update_norm"]),
        param_norm=_floats(measures["param_norm"]),
        lr=_floats(measures["lr"]),
        tokens_per_second=_floats(measures["tokens_per_second"]),
        flops_utilisation=_floats(measures["flops_utilisation"]),
        repeated=repeated,
    )


def _ints(values: list[int]) -> Ints:
    return np.asarray(values, dtype=np.int64)


def _floats(values: list[float]) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _events(path: Path, remarks: list[str]) -> tuple[Event, ...]:
    events = []
    for at, line in _lines(path, remarks):
        kind = line.get("kind")
        if not isinstance(kind, str):
            raise DataError(f"{path}, line {at}: kind is {kind!r}, not a text")
        events.append(
            Event(
                kind=kind,
                tokens=whole(line.get("tokens"), f"{path}, line {at}: tokens"),
                step=whole(line.get("step"), f"{path}, line {at}: step"),
                time=_time(line.get("time"), f"{path}, line {at}: time"),
                fields={key: value for key, value in line.items() if key not in ("kind", "tokens", "step", "time")},
            )
        )
    return tuple(events)


def _time(value: Any, where: str) -> datetime:
    """A moment, from seconds since 1970."""
    try:
        return datetime.fromtimestamp(number(value, where), tz=UTC)
    except (ValueError, OverflowError, OSError) as cause:
        raise DataError(f"{where} is {value!r}, not a moment; {FOREIGN}") from cause


def _start(path: Path) -> Start | None:
    if not path.is_file():
        return None
    try:
        return Start.model_validate_json(_text(path))
    except ValidationError as cause:
        raise DataError(f"{path} is not what a run writes: {_first_problem(cause)}; put it back") from cause


def _measured(path: Path) -> Measured | None:
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
