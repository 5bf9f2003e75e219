"""What the top of the page says: picks the numbers of a run and hands them to `words`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xgen.report import words
from xgen.report.read import Gain, Run, Strided, number

NEIGHBOURS = 50
"""Steps averaged on either side of a stage switch, and before an evaluation; at most a tenth of a stage, so that what
is learnt within the window does not pass for the switch."""

FEWEST = 5
"""Steps below which a mean says nothing."""


@dataclass(frozen=True)
class Tile:
    name: str
    value: str
    note: str


def scale_of(run: Run) -> words.Scale:
    """What of the run is compared with XGen-7B."""
    started = run.last("run_started")
    parameters = started.fields.get("parameters") if started else None
    return words.Scale(
        parameters=parameters if isinstance(parameters, int) else None,
        # As the recipe says them: whole steps may take a few more.
        tokens=sum(stage.tokens for stage in run.recipe.stages),
        lengths=tuple(stage.length for stage in run.recipe.stages),
        vocabulary=run.recipe.model.vocab_size,
        tokenizer=run.recipe.tokenizer.name,
        layers=run.recipe.model.layers,
        hidden_size=run.recipe.model.hidden_size,
    )


def last_checkpoint(run: Run) -> str:
    """The checkpoint that the run is judged by: the last stage's."""
    return run.recipe.stages[-1].name


def headline_gain(run: Run) -> Gain | None:
    """The last checkpoint's gain from a quarter of the longest context to the whole of it."""
    gains = [
        one
        for one in (run.measured.fixed_target_gain if run.measured else ())
        if one.checkpoint == last_checkpoint(run)
    ]
    longest = max((one.to_context for one in gains), default=0)
    gains = [one for one in gains if one.to_context == longest]
    return min(gains, key=lambda one: abs(math.log(one.from_context * 4 / longest)), default=None)


def headline_strided(run: Run) -> Strided | None:
    """The last checkpoint's strided loss at the longest context within its trained length."""
    rows = [row for row in (run.measured.strided if run.measured else ()) if row.checkpoint == last_checkpoint(run)]
    trained = [row for row in rows if row.context <= run.recipe.stages[-1].length]
    return max(trained or rows, key=lambda row: row.context, default=None)


def past_own_length(run: Run) -> Gain | None:
    """The first stage's checkpoint: its trained length against the longest context measured."""
    first = run.recipe.stages[0]
    rows = [
        one
        for one in (run.measured.fixed_target_gain if run.measured else ())
        if one.checkpoint == first.name and one.from_context == first.length and one.to_context > first.length
    ]
    return max(rows, key=lambda one: one.to_context, default=None)


def sentences(run: Run) -> list[str]:
    """What the run shows; the first is the most important."""
    progress = _progress(run)
    return findings(run) if progress is None else [progress, *findings(run)]


def findings(run: Run) -> list[str]:
    """The same without how far the run has come."""
    told: list[str | None] = []
    gain, strided, past = headline_gain(run), headline_strided(run), past_own_length(run)
    if gain is not None:
        told.append(
            words.context_gain(gain.difference, gain.low, gain.high, gain.from_context, gain.to_context, gain.documents)
        )
        told.append(_last_doubling(run, gain))
    if past is not None:
        told.append(
            words.past_length(
                past.checkpoint,
                past.from_context,
                past.to_context,
                past.difference,
                past.low,
                past.high,
                last_checkpoint(run),
            )
        )
    if strided is not None and run.measured is not None:
        told.append(
            words.compression(
                strided.bits_per_byte, run.measured.text.xz_bits_per_byte, strided.documents, strided.context
            )
        )
    told += [_generalisation(run), *_switches(run), _resumes(run), _spoiled(run), words.scale(scale_of(run))]
    return [text for text in told if text is not None]


def _last_doubling(run: Run, headline: Gain) -> str | None:
    """What the second half of the context adds, where the whole is said to help but this half does not."""
    halves = [
        one
        for one in (run.measured.fixed_target_gain if run.measured else ())
        if (one.checkpoint, one.from_context * 2, one.to_context)
        == (headline.checkpoint, headline.to_context, headline.to_context)
    ]
    if not halves or words.verdict(headline.low, headline.high) != "gain":
        return None
    half = halves[0]
    return words.last_doubling(half.difference, half.low, half.high, half.from_context, half.to_context)


def _progress(run: Run) -> str | None:
    stage = None
    if 0 < run.tokens < run.recipe.total_tokens:
        stage = run.recipe.stages[run.recipe.stage_at(run.tokens - 1)].name
    ends = [event for event in run.events if event.kind in ("stopped", "resumed", "run_started", "finished")]
    stopped = str(ends[-1].fields.get("reason", "")) if ends and ends[-1].kind == "stopped" else None
    return words.progress(run.tokens, run.recipe.total_tokens, stage, stopped, run.measured is not None)


def _generalisation(run: Run) -> str | None:
    evaluations = [one for one in run.evaluations() if one.tokens > 0]
    if not evaluations or not len(run.steps):
        return None
    last = evaluations[-1]
    at = run.recipe.stage_at(last.tokens - 1)
    stage = run.steps.loss[(run.steps.tokens <= last.tokens) & (run.steps.stage == at)]
    before = stage[-min(NEIGHBOURS, stage.size // 10) :]
    if stage.size // 10 < FEWEST:
        return None
    return words.generalisation(_mean(before), last.loss, before.size)


def _switches(run: Run) -> list[str]:
    told = []
    for i, stage in enumerate(run.recipe.stages[1:], start=1):
        start = run.recipe.stage_start(i)
        before = run.steps.loss[(run.steps.tokens <= start) & (run.steps.stage == i - 1)]
        after = run.steps.loss[run.steps.stage == i]
        steps = min(NEIGHBOURS, before.size // 10, after.size // 10)
        if steps >= FEWEST:
            told.append(words.switch(stage.name, _mean(before[-steps:]), _mean(after[:steps]), steps))
    return told


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values))


def _resumes(run: Run) -> str | None:
    return words.resumes([event.tokens for event in run.of_kind("resumed")], run.steps.repeated)


def _spoiled(run: Run) -> str | None:
    return words.spoiled(int((~np.isfinite(run.steps.loss)).sum()))


def tiles(run: Run) -> list[Tile]:
    """The headline figures."""
    scale = scale_of(run)
    shown = []
    gain, strided = headline_gain(run), headline_strided(run)
    if gain is not None:
        shown.append(
            Tile(
                "effect of context",
                words.signed(gain.difference),
                f"nats per token, with {words.count(gain.to_context)} tokens of context instead of "
                f"{words.count(gain.from_context)}; {words.NINETY_FIVE}: {words.signed(gain.low)} to "
                f"{words.signed(gain.high)}",
            )
        )
    if strided is not None and run.measured is not None:
        shown.append(
            Tile(
                "bits per byte",
                words.loss(strided.bits_per_byte, 2),
                f"held-out text; xz -9e needs {words.loss(run.measured.text.xz_bits_per_byte, 2)}",
            )
        )
    evaluations = run.evaluations()
    if strided is None and evaluations:
        shown.append(
            Tile(
                "held-out loss",
                words.loss(evaluations[-1].loss),
                f"nats per token, at {words.short(evaluations[-1].tokens)} tokens",
            )
        )
    shown.append(Tile("tokens", words.short(run.tokens), _tokens_note(run)))
    if scale.parameters is not None:
        shown.append(
            Tile(
                "parameters",
                words.short(scale.parameters),
                f"{scale.layers} layers of {words.count(scale.hidden_size)}",
            )
        )
    finished = run.last("finished")
    if finished is not None:
        seconds = number(finished.fields.get("seconds"), "events.jsonl: seconds of finished")
        memory = number(finished.fields.get("peak_memory_bytes"), "events.jsonl: peak_memory_bytes of finished")
        shown.append(
            Tile(
                "time",
                words.duration(seconds),
                f"peak memory {words.size(memory)}" if math.isfinite(memory) else "peak memory not known",
            )
        )
    return shown


def _tokens_note(run: Run) -> str:
    lengths = f"stages of length {words.lengths([stage.length for stage in run.recipe.stages])}"
    if len(run.recipe.stages) == 1:
        lengths = f"one stage of length {words.count(run.recipe.stages[0].length)}"
    return lengths if run.trained else f"of {words.short(run.recipe.total_tokens)}; {lengths}"
