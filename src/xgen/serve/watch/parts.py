"""The parts of the live page: how the run is doing, and the sections of its report."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import ParamSpec

import numpy as np

from xgen.errors import DataError
from xgen.report import words
from xgen.report.continued import continued_sentences
from xgen.report.figures import tone
from xgen.report.markup import escape, section, table
from xgen.report.page import SECTIONS, tile_markup
from xgen.report.read import Run
from xgen.report.story import Tile, findings, tiles
from xgen.serve.watch.follow import Seen
from xgen.serve.watch.status import RECENT_STEPS, StageProgress, State, Status, rate_of, stages_of

P = ParamSpec("P")

MEASURED = ("continued", "context", "matrix")
"""Sections about what is measured after training, left out until it is."""

ORDER = ("loss", *MEASURED, "health", "position", "samples", "shown", "log", "run", "scale", "recipe")
"""What changes while the run trains comes first, which is not the order of the report."""

PARTS = ("top", *ORDER)

SAID = {
    State.PREPARING: "Text is made into tokens; the folder has no recipe yet.",
    State.READING: "What the run has written so far is being read.",
    State.STARTING: "The steps are being compiled.",
    State.RUNNING: "",
    State.MEASURING: "Trained to the last token; the checkpoint of every stage is being measured.",
    State.SILENT: "Nothing was written for longer than is usual: the run may have been killed, or it hangs.",
    State.STOPPED: "It can be resumed.",
    State.FINISHED: "Trained to the last token.",
}


def title(seen: Seen, status: Status) -> str:
    """What the browser's tab says, as text."""
    if seen.run is None:
        return f"{status.state.value} · XGen"
    share = words.percent(seen.run.tokens / seen.run.recipe.total_tokens)
    at = share if status.state in (State.RUNNING, State.STARTING) else status.state.value
    return f"{at} · {seen.run.recipe.name} · XGen"


def make_parts(seen: Seen, status: Status) -> dict[str, str]:
    """Markup of every part of `PARTS`; empty where the run has nothing of the kind."""
    run = seen.run
    if run is None or seen.behind:
        return {name: _top(seen, status) if name == "top" else "" for name in PARTS}
    found = {"top": _top(seen, status)}
    for name in ORDER:
        left_out = name in MEASURED and run.measured is None
        found[name] = "" if left_out else _told(_findings_section if name == "shown" else SECTIONS[name], run)
    return found


def _told(make: Callable[P, str], *of: P.args, **more: P.kwargs) -> str:
    """What `make` makes or, where the folder holds what no run writes, what is wrong with it."""
    try:
        return make(*of, **more)
    except DataError as error:
        return f'<p class="remark">{escape(str(error))}</p>'


def _top(seen: Seen, status: Status) -> str:
    run = seen.run
    name = escape(run.recipe.name) if run is not None else "A run"
    about = f'<p class="about">{escape(run.recipe.description)}</p>' if run and run.recipe.description else ""
    remarks = (seen.problem, *(run.remarks if run is not None and not seen.behind else ()))
    body = _state(status, seen) + "".join(f'<p class="remark">{escape(text)}</p>' for text in remarks if text)
    if run is not None and not seen.behind:
        body += _bar(run) + _told(_tiles, run, status) + _stages(run, status)
        if run.measured is not None:
            body += f'<h2 class="small">What the run shows</h2>{_told(_findings, run)}'
    return (
        f'<header class="top live"><p class="over">XGen run, live</p><h1><bdi>{name}</bdi></h1>{about}{body}</header>\n'
    )


def _findings(run: Run) -> str:
    told = "".join(f"<li>{escape(text)}</li>" for text in (*continued_sentences(run), *findings(run)))
    return f'<ul class="told">{told}</ul>'


def _findings_section(run: Run) -> str:
    """What is known before the measurements, which put it at the top."""
    return "" if run.measured is not None else section("shown", "So far", "What does it show?", _findings(run))


def _state(status: Status, seen: Seen) -> str:
    said = SAID[status.state]
    if status.state is State.RUNNING and seen.run is not None:
        stage = seen.run.recipe.stages[int(seen.run.steps.stage[-1])]
        said = f"Stage ‘{stage.name}’, length {words.count(stage.length)}."
    if status.reason:
        # What is resumed after a loss that was not finite comes upon the same step again.
        said = f"Reason: {status.reason}." + (f" {said}" if status.reason != "non-finite" else "")
    if seen.behind:
        said += f" {words.size(seen.behind)} to go."
    moments = []
    if status.since is not None and status.state is not State.SILENT:
        moments.append(f"since {_moment(status.since)}")
    if status.last_line is not None:
        moments.append(f"last line {_moment(status.last_line)}")
    times = f'<span class="moments">{" · ".join(moments)}</span>' if moments else ""
    return (
        f'<p class="state {status.state.value}"><b role="status">{status.state.value.capitalize()}</b>'
        f"<span>{escape(said)}</span>{times}</p>"
    )


def _moment(seconds: float) -> str:
    """A moment that the page's script makes into local time and an age."""
    moment = datetime.fromtimestamp(seconds, tz=UTC)
    return f'<time data-at="{seconds:.0f}" datetime="{moment:%Y-%m-%dT%H:%M:%SZ}">{moment:%Y-%m-%d %H:%M:%S} UTC</time>'


def _bar(run: Run) -> str:
    """The run as a bar, one piece a stage, filled as far as it has come."""
    total = run.recipe.total_tokens
    pieces = ""
    stages = stages_of(run)
    for index, stage in enumerate(stages):
        gap = 3 if index < len(stages) - 1 else 0
        x = 1000 * run.recipe.stage_start(index) / total
        width = max(1000 * stage.tokens / total - gap, 1)
        filled = width * stage.done / stage.tokens
        pieces += (
            f'<rect class="empty" x="{x:.2f}" y="0" width="{width:.2f}" height="10"/>'
            f'<rect class="full {tone(index)}" x="{x:.2f}" y="0" width="{filled:.2f}" height="10"/>'
        )
    said = f"{words.percent(run.tokens / total)} of the tokens"
    return (
        '<svg class="progress" viewBox="0 0 1000 10" preserveAspectRatio="none" role="img" '
        f'aria-label="{said}">{pieces}</svg>'
    )


def _tiles(run: Run, status: Status) -> str:
    shown = tiles(run) if run.measured is not None else [*_counts(run), *_losses(run), *_rates(run, status)]
    return f'<dl class="tiles">{"".join(tile_markup(one) for one in shown)}</dl>'


def _counts(run: Run) -> list[Tile]:
    total = run.recipe.total_tokens
    steps = sum(stage.steps for stage in run.recipe.stages)
    step = int(run.steps.step[-1]) if len(run.steps) else 0
    return [
        Tile(
            "tokens",
            words.short(run.tokens),
            f"of {words.short(total)}, {words.percent(run.tokens / total)}",
        ),
        Tile("step", words.count(step), f"of {words.count(steps)}"),
    ]


def _losses(run: Run) -> list[Tile]:
    found = []
    recent = run.steps.loss[-RECENT_STEPS:]
    if recent.size:
        note = f"nats per token, mean of the last {words.many(recent.size, 'step')}"
        found.append(Tile("training loss", words.loss(float(np.mean(recent))), note))
    evaluations = run.evaluations()
    if evaluations:
        last = evaluations[-1]
        note = f"nats per token, at {words.short(last.tokens)} tokens"
        found.append(Tile("held-out loss", words.loss(last.loss), note))
    return found


def _rates(run: Run, status: Status) -> list[Tile]:
    if not len(run.steps):
        return []
    found = []
    rate = rate_of(run, int(run.steps.stage[-1]))
    if math.isfinite(rate):
        found.append(Tile("tokens per second", words.short(rate), f"median of the stage’s last {RECENT_STEPS} steps"))
    left = sum(stage.seconds_left for stage in stages_of(run))
    if status.state is State.RUNNING and left > 0 and math.isfinite(left):
        last = run.recipe.stage_at(run.tokens - 1) == len(run.recipe.stages) - 1
        note = "of steps alone, at the present rate" + ("" if last else "; later stages are slower")
        found.append(Tile("time left", words.duration(left), note))
    return found


def _stages(run: Run, status: Status) -> str:
    rows = [
        (
            f'<span class="dot {tone(index)}"></span>{escape(stage.name)}',
            words.count(stage.length),
            f"{words.short(stage.done)} of {words.short(stage.tokens)}",
            words.percent(stage.done / stage.tokens),
            words.short(stage.rate) if math.isfinite(stage.rate) else "–",
            words.duration(stage.seconds_done) if stage.done else "–",
            _left(stage, status),
        )
        for index, stage in enumerate(stages_of(run))
    ]
    head = ("stage", "length", "tokens", "done", "tokens per second", "time in steps", "left")
    return table(head, rows, "Progress of the stages")


def _left(stage: StageProgress, status: Status) -> str:
    if stage.done == stage.tokens:
        return "done"
    if not status.at_work or not math.isfinite(stage.seconds_left):
        return "–"
    return words.duration(stage.seconds_left)
