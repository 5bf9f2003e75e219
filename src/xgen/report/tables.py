"""The parts of the page that are not plots: samples, comparison with XGen-7B, the run, its log, its recipe."""

from __future__ import annotations

import json
import math
from datetime import datetime
from typing import Any

import numpy as np

from xgen.report import words
from xgen.report.figures import even, tone
from xgen.report.markup import clipped, details, escape, paragraph, section, table, whole_or_counted
from xgen.report.read import Event, Run, Sample, whole
from xgen.report.story import scale_of
from xgen.report.words import XGEN_7B, against

OLDER_SAMPLES = 12
LOG_ROWS = 200
LOGGED_CHARACTERS = 160
ELSEWHERE = ("evaluation", "sample")
"""Kinds of events that have a part of the page to themselves and are left out of the log."""


def samples_section(run: Run) -> str:
    samples = run.samples()
    if not samples:
        return ""
    moments = sorted({one.tokens for one in samples})
    latest = "".join(_sample(one) for one in samples if one.tokens == moments[-1])
    older = even(moments[:-1], OLDER_SAMPLES)
    note = f"After {words.short(moments[-1])} tokens. The prompt is pale; what the model wrote is in full ink."
    body = f'<p class="note">{note}</p>{latest}'
    if older:
        count = (
            f"{len(older)} of {len(moments) - 1}, evenly spaced; all are in events.jsonl"
            if len(older) < len(moments) - 1
            else f"{len(older)}"
        )
        earlier = "".join(
            f'<p class="note">After {words.short(tokens)} tokens.</p>'
            + "".join(_sample(one) for one in samples if one.tokens == tokens)
            for tokens in reversed(older)
        )
        body += details(f"Earlier in training ({count})", earlier)
    return section("samples", "Samples", "What does it write?", body)


def _sample(sample: Sample) -> str:
    # dir=auto and isolation by CSS: a text written from right to left turns nothing but itself.
    return (
        '<p class="source">Prompt: the beginning of the held-out document <bdi>'
        f"{escape(clipped(sample.document, LOGGED_CHARACTERS))}</bdi></p>"
        f'<pre class="sample" dir="auto"><span class="prompt">{whole_or_counted(sample.prompt, "events.jsonl")}</span>'
        f"{whole_or_counted(sample.text, 'events.jsonl')}</pre>"
    )


def scale_section(run: Run) -> str:
    scale = scale_of(run)
    rows = [
        (
            "training tokens",
            words.count(scale.tokens),
            words.count(XGEN_7B.tokens),
            against(scale.tokens, XGEN_7B.tokens),
        ),
        (
            "stage lengths",
            words.lengths(scale.lengths),
            words.lengths(XGEN_7B.lengths),
            against(scale.lengths[-1], XGEN_7B.lengths[-1]),
        ),
        ("layers", words.count(scale.layers), words.count(XGEN_7B.layers), against(scale.layers, XGEN_7B.layers)),
        (
            "hidden size",
            words.count(scale.hidden_size),
            words.count(XGEN_7B.hidden_size),
            against(scale.hidden_size, XGEN_7B.hidden_size),
        ),
        (
            "rows of the embedding",
            words.count(scale.vocabulary),
            words.count(XGEN_7B.vocabulary),
            against(scale.vocabulary, XGEN_7B.vocabulary),
        ),
        (
            "tokenizer",
            escape(scale.tokenizer),
            XGEN_7B.tokenizer,
            "the same" if scale.tokenizer == XGEN_7B.tokenizer else "another",
        ),
    ]
    if scale.parameters is not None and XGEN_7B.parameters is not None:
        rows.insert(
            0,
            (
                "parameters",
                words.count(scale.parameters),
                words.count(XGEN_7B.parameters),
                against(scale.parameters, XGEN_7B.parameters),
            ),
        )
    note = (
        "XGen-7B-8k by its public record: configuration and stages as published. Lengths are compared by the longest."
    )
    return section(
        "scale",
        "Beside XGen-7B",
        "What was scaled down?",
        table(("", "this run", "XGen-7B-8k", "against it"), rows, "This run beside XGen-7B")
        + f'<p class="note">{note}</p>',
    )


def run_section(run: Run) -> str:
    recipe = run.recipe
    rows = []
    for i, stage in enumerate(recipe.stages):
        speed = run.steps.tokens_per_second[run.steps.stage == i]
        speed = speed[np.isfinite(speed)]
        mixture = ", ".join(
            f"{escape(name)} {words.percent(share / sum(stage.mixture.values()))}"
            for name, share in stage.mixture.items()
        )
        rows.append(
            (
                f'<span class="dot {tone(i)}"></span>{escape(stage.name)}',
                words.count(stage.length),
                words.short(stage.spent),
                words.count(stage.steps),
                f"{words.count(stage.batch_tokens)}",
                words.short(float(np.median(speed))) if speed.size else "–",
                mixture,
            )
        )
    stages = table(
        ("stage", "length", "tokens", "steps", "tokens per step", "tokens per second (median)", "mixture"),
        rows,
        "The stages",
    )
    started = run.last("run_started")
    if started is None:
        return section(
            "run", "The run", "On what, with what?", stages + paragraph("The log has no beginning of the run.")
        )
    sources = _sources(run, started)
    told = {
        name: value for name, value in started.fields.items() if not sources or name not in ("sources", "train_tokens")
    }
    facts = [(escape(name.replace("_", " ")), _value(value)) for name, value in told.items()]
    return section(
        "run",
        "The run",
        "On what, with what?",
        stages + sources + table(("fact", "value"), facts, "What the run said at its start", "words"),
    )


def _sources(run: Run, started: Event) -> str:
    """How often each source was read, where the run told how many tokens each has."""
    there = started.fields.get("train_tokens")
    if not isinstance(there, dict) or set(there) != set(run.recipe.data.sources):
        return ""
    read = dict.fromkeys(there, 0.0)
    for i, stage in enumerate(run.recipe.stages):
        spent = min(max(run.tokens - run.recipe.stage_start(i), 0), stage.spent)
        for name, share in stage.mixture.items():
            read[name] += spent * share / sum(stage.mixture.values())
    rows = [
        (
            escape(name),
            f"<bdi>{escape(clipped(run.recipe.data.sources[name], LOGGED_CHARACTERS))}</bdi>",
            words.short(tokens),
            words.short(read[name]),
            f"{words.short(read[name] / tokens)} times" if tokens else "–",
        )
        for name, tokens in ((name, whole(tokens, f"train_tokens of {name}")) for name, tokens in there.items())
    ]
    return table(("source", "where", "tokens to train on", "tokens read", "read over"), rows, "The sources")


def _value(value: Any) -> str:
    """A value of an event as markup."""
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else words.UNKNOWN
    if isinstance(value, int):
        return words.count(value)
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else words.UNKNOWN
    return f"<bdi>{whole_or_counted(_plain(value), 'events.jsonl')}</bdi>"


def _plain(value: Any) -> str:
    """A text as it is, a list or table as items after one another."""
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def log_section(run: Run) -> str:
    events = [event for event in run.events if event.kind not in ELSEWHERE]
    if not events:
        return ""
    first = events[0].time
    routine = [event for event in events if _routine(event)]
    telling = [event for event in events if not _routine(event)]
    shown = even(telling, LOG_ROWS)
    body = _log_table(shown, first, "Events") + _left_out(len(shown), len(telling))
    if routine:
        some = even(routine, LOG_ROWS)
        summary = f"{words.many(len(routine), 'checkpoint')} between the stages’ ends"
        body += details(summary, _log_table(some, first, summary) + _left_out(len(some), len(routine)))
    return section("log", "Log", "What happened?", body)


def _routine(event: Event) -> bool:
    """Whether an event is a checkpoint like many others."""
    return event.kind == "checkpoint" and event.fields.get("stage") == ""


def _left_out(shown: int, of: int) -> str:
    return (
        ""
        if shown == of
        else f'<p class="note">{words.count(shown)} of {words.count(of)}, evenly spaced; all are in events.jsonl.</p>'
    )


def _log_table(events: list[Event], first: datetime, caption: str) -> str:
    rows = []
    for event in events:
        passed = (event.time - first).total_seconds()
        shown = f"+{words.duration(passed)}" if passed > 0 else f"{event.time:%Y-%m-%d %H:%M} UTC"
        clock = f'<time title="{event.time:%Y-%m-%d %H:%M:%S} UTC">{shown}</time>'
        fields = {} if event.kind == "run_started" else event.fields  # its facts are shown with the run
        said = ", ".join(_field(key, value) for key, value in fields.items() if value != "")
        rows.append((clock, words.short(event.tokens), escape(event.kind.replace("_", " ")), said))
    return table(("time", "tokens", "event", "details"), rows, caption, "log")


def _field(key: str, value: Any) -> str:
    """A name and a value of a logged event, with the unit where the name tells it."""
    name = escape(key.replace("_", " "))
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        if key.endswith("bytes"):
            return f"{name.removesuffix('bytes')}{words.size(value)}"
        if key.endswith("seconds"):
            return f"{name.removesuffix('seconds') or 'after '}{words.duration(value)}"
    if value is None or isinstance(value, int | float):
        return f"{name} {_value(value)}"
    return f"{name} <bdi>{escape(clipped(_plain(value), LOGGED_CHARACTERS))}</bdi>"


def recipe_section(run: Run) -> str:
    notes = "".join(f"<li><code>{escape(path)}</code>: {escape(text)}</li>" for path, text in run.recipe.notes.items())
    body = (f'<ul class="told">{notes}</ul>' if notes else "") + details(
        "The resolved recipe (recipe.toml)", f"<pre>{escape(run.recipe_text)}</pre>"
    )
    return section("recipe", "Recipe", "How to run it again?", body)
