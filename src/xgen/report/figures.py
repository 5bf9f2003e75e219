"""The figures of a run: from what was read to plots, each with its words and its ruler."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from xgen.recipe.base import NEW_ROPE, START
from xgen.report import words
from xgen.report.plots import Axis, Hit, Plot, Rule, Series, data_bounds
from xgen.report.read import ByPosition, FixedTarget, Floats, Run
from xgen.report.scales import thin

Item = TypeVar("Item")

TONES = 6
MARKERS = ("circle", "square", "triangle", "diamond")
UNTRAINED = (START, NEW_ROPE)
"""The model that a run continues, as it was and with the run's rope."""
UNTRAINED_TONES = ("ink", "quiet")
MOST_DOTS = 60
POINTS = 160
"""Points a curve is thinned to."""

OPENING = 0.02
"""Share of the run whose steep first fall may rise above the frame of the loss curve."""


@dataclass(frozen=True)
class Figure:
    plot: Plot
    caption: str
    ruler: str
    """How it was measured."""


def even(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def tone(stage: int) -> str:
    """CSS class of a stage's colour; they come round again after six, where the labels tell lines apart."""
    return f"t{stage % TONES}" if stage >= 0 else UNTRAINED_TONES[stage]


def marker(stage: int) -> str:
    return MARKERS[stage % len(MARKERS)]


def stage_index(run: Run, checkpoint: str) -> int:
    """Which stage's end a measured checkpoint is. The model that the run continues comes before the stages, below 0,
    and checkpoints that are none of these after them, by name."""
    if run.start is not None and checkpoint in UNTRAINED:
        return UNTRAINED.index(checkpoint) - len(UNTRAINED)
    names = [stage.name for stage in run.recipe.stages]
    rows = (*run.measured.strided, *run.measured.by_position, *run.measured.fixed_target) if run.measured else ()
    others = sorted({row.checkpoint for row in rows}.difference(names))
    return [*names, *others, checkpoint].index(checkpoint)


def trained_length(run: Run, checkpoint: str) -> float:
    """Length of the sequences that a checkpoint was last trained on; infinite when it is no stage's."""
    index = stage_index(run, checkpoint)
    if run.start is not None and index < 0:
        return float(run.start.context_length)
    return float(run.recipe.stages[index].length) if index < len(run.recipe.stages) else math.inf


def checkpoints(rows: Iterable[ByPosition | FixedTarget], run: Run) -> list[str]:
    """The measured checkpoints in the order of the stages."""
    return sorted({row.checkpoint for row in rows}, key=lambda name: (stage_index(run, name), name))


def token_axis(run: Run) -> Axis:
    return Axis("tokens trained on", words.short, bounds=(0.0, float(max(run.tokens, 1))))


def stage_rules(run: Run, named: bool = True) -> tuple[Rule, ...]:
    """Where each stage that was reached begins."""
    starts = [run.recipe.stage_start(i) for i in range(len(run.recipe.stages) + 1)]
    return tuple(
        Rule(
            x=float(starts[i]),
            label=stage_label(stage.name, stage.length) if named else "",
            tone=tone(i),
            short=stage.name if named else "",
            until=float(min(starts[i + 1], max(run.tokens, 1))),
            line=i > 0,
        )
        for i, stage in enumerate(run.recipe.stages)
        if i == 0 or starts[i] < run.tokens
    )


def old_length(run: Run) -> tuple[Rule, ...]:
    """Where the model that the run continues was trained to."""
    if run.start is None:
        return ()
    length = run.start.context_length
    return (Rule(float(length), f"{words.count(length)}: old length", "quiet", short=words.count(length)),)


def _upright(run: Run) -> str:
    return " The upright line is the length that the model came with." if run.start is not None else ""


def stage_label(name: str, length: int) -> str:
    """A stage's name and length, the length once when it is the name."""
    said = f"length {words.count(length)}"
    return said if name == str(length) else f"{name} · {said}"


def by_stage(run: Run, column: Floats, points: int, label: str = "") -> tuple[list[Series], int]:
    """A curve over tokens, cut at the stages and thinned; and the steps in a point."""
    steps = run.steps
    per_point = 1
    series = []
    for stage in sorted(set(steps.stage.tolist())):
        here = steps.stage == stage
        share = max(2, round(points * int(here.sum()) / len(steps)))
        thinned = thin(steps.tokens[here].astype(np.float64), column[here], share)
        per_point = max(per_point, thinned.per_point)
        name = run.recipe.stages[stage].name if stage < len(run.recipe.stages) else str(stage)
        banded = thinned.per_point > 1
        series.append(
            Series(
                name=f"{label} in stage {name}",
                tone=tone(stage),
                x=thinned.x,
                y=thinned.mean,
                low=thinned.low if banded else None,
                high=thinned.high if banded else None,
            )
        )
    return series, per_point


def loss_figure(run: Run) -> Figure:
    """Training and held-out loss over tokens."""
    series, per_point = by_stage(run, run.steps.loss, POINTS, "training loss")
    evaluations = run.evaluations()
    points = np.asarray([one.tokens for one in evaluations], dtype=np.float64)
    held_out = np.asarray([one.loss for one in evaluations], dtype=np.float64)
    series[-1:] = [replace(one, label="training") for one in series[-1:]]
    hits = [_loss_hit(x, one, i) for one in series for i, x in enumerate(one.x.tolist())]
    hits += [
        Hit(float(x), f"{words.short(x)} tokens · held-out loss {words.loss(y)}")
        for x, y in zip(points, held_out, strict=True)
    ]
    if evaluations:
        series.append(
            Series(
                "held-out loss",
                "ink",
                points,
                held_out,
                label="held-out",
                line=len(points) > 1,
                marker="circle" if len(points) <= MOST_DOTS else "",
            )
        )
    bounds, hidden = _loss_bounds(run, series)
    group = (
        f"The line is the mean of {words.count(per_point)} steps and the band reaches from the lowest to the highest "
        "of them."
        if per_point > 1
        else "Every step is drawn."
    )
    above = (
        f" The first {words.short(OPENING * run.tokens)} tokens, with losses up to {words.loss(hidden, 2)}, begin "
        "above the frame."
        if hidden
        else ""
    )
    dots = (
        f" {'Dots' if len(points) <= MOST_DOTS else 'Thin line'}: held-out loss, measured in the loop."
        if evaluations
        else " No held-out loss was measured yet."
    )
    plot = Plot(
        id="loss",
        title="Loss over tokens",
        description=_loss_description(run),
        x=token_axis(run),
        y=Axis("loss, nats per token", lambda value: f"{value:.4g}", bounds=bounds),
        series=tuple(series),
        rules=stage_rules(run),
        hits=tuple(sorted(hits, key=lambda hit: hit.x)),
    )
    return Figure(
        plot,
        f"Training loss, coloured by stage. {group}{dots}{above}",
        "Mean cross entropy of the next token in nats, in float32, over all tokens of a batch, taken before the "
        "step's update. "
        "Held-out documents are never trained on; their loss is taken at the length of the stage.",
    )


def _loss_description(run: Run) -> str:
    first, last = (words.loss(float(run.steps.loss[at])) for at in (0, -1))
    return (
        f"Training loss from {first} at the first step to {last} at the last, after {words.short(run.tokens)} tokens."
    )


def _loss_hit(x: float, series: Series, i: int) -> Hit:
    said = f"{words.short(x)} tokens · training loss {words.loss(float(series.y[i]))}"
    if series.low is not None and series.high is not None:
        said += f" ({words.loss(float(series.low[i]), 2)} to {words.loss(float(series.high[i]), 2)})"
    return Hit(x, said)


def _loss_bounds(run: Run, series: Sequence[Series]) -> tuple[tuple[float, float] | None, float | None]:
    """The frame's losses, and the highest loss of the opening when that is left above the frame.

    Only the first fall may leave the frame; whatever rises later, a spike for example, is inside.
    """
    columns = [(one.x, column) for one in series for column in (one.y, one.low, one.high) if column is not None]
    low, high = data_bounds([column for _, column in columns])
    if len(run.steps) < 1 / OPENING:
        return None, None
    later = data_bounds([column[x > OPENING * run.tokens] for x, column in columns])[1]
    return (low, later), (high if high > later else None)


def fixed_figure(run: Run) -> Figure | None:
    """Loss of the same target tokens with more and more context, of every checkpoint."""
    rows = run.measured.fixed_target if run.measured else ()
    if not rows:
        return None
    contexts = sorted({row.context for row in rows})
    names = checkpoints(rows, run)
    series = []
    for at, name in enumerate(names):
        mine = sorted((row for row in rows if row.checkpoint == name), key=lambda row: row.context)
        series.append(
            Series(
                name=f"checkpoint {name}",
                tone=tone(stage_index(run, name)),
                x=_column(row.context for row in mine),
                y=_column(row.loss for row in mine),
                low=_column(row.low for row in mine),
                high=_column(row.high for row in mine),
                label=name,
                marker=marker(stage_index(run, name)),
                whiskers=True,
                solid_until=trained_length(run, name),
                dodge=5.0 * (at - (len(names) - 1) / 2),
            )
        )
    bounds, above = _focus(series)
    target = listed_counts({row.target for row in rows})
    documents = listed_counts({row.documents for row in rows})
    note = " Values above the frame stand at its edge, written out." if above else ""
    plot = Plot(
        id="fixed",
        title="Loss of the same target tokens by context",
        description="; ".join(
            f"checkpoint {one.name}: "
            + ", ".join(f"{words.loss(float(y))} at {words.count(int(x))}" for x, y in zip(one.x, one.y, strict=True))
            for one in series
        ),
        x=Axis(
            "tokens of context, the target included",
            lambda value: words.count(int(value)),
            kind="log",
            ticks=tuple(float(c) for c in contexts),
        ),
        y=Axis("loss, nats per token", lambda value: f"{value:.4g}", bounds=bounds),
        series=tuple(series),
        rules=old_length(run),
        hits=_column_hits(series, contexts, "context"),
    )
    return Figure(
        plot,
        f"The same {target} target tokens, scored with more and more text before them. Dashed, hollow: past the "
        f"length that the checkpoint was trained on.{_upright(run)}{note}",
        f"Mean loss of the last {target} tokens of a window inside one held-out document ({documents} documents), the "
        "same tokens at every context. "
        f"Whiskers: {words.NINETY_FIVE} bootstrap over documents of each mean alone. They overlap even where a "
        "difference is certain, because documents differ more than contexts do; the paired differences below decide.",
    )


def listed_counts(values: set[int]) -> str:
    return words.listed([words.count(value) for value in sorted(values)])


def _column(values: Iterable[float]) -> Floats:
    return np.asarray(list(values), dtype=np.float64)


def _focus(series: Sequence[Series]) -> tuple[tuple[float, float] | None, bool]:
    """Bounds that hold every mean within its trained length and half as much again above, so that a
    checkpoint failing past its length does not flatten the rest; and whether any mean lies above."""
    inside = [one.y[one.x <= one.solid_until] for one in series]
    # The frame also keeps the whiskers of what it is about.
    whiskers = [bound[one.x <= one.solid_until] for one in series for bound in (one.low, one.high) if bound is not None]
    low, high = data_bounds([*inside, *whiskers])
    least, greatest = data_bounds([one.y for one in series])
    if not high > low:
        return None, False
    room = (high - low) / 2
    return (min(low, least), min(max(high, greatest), high + room)), greatest > high + room


def _column_hits(series: Sequence[Series], xs: Sequence[int], word: str) -> tuple[Hit, ...]:
    hits = []
    for x in xs:
        said = [f"{one.label} {words.loss(float(one.y[i]))}" for one in series for i in np.flatnonzero(one.x == x)]
        hits.append(Hit(float(x), f"{word} {words.count(x)} · " + " · ".join(said)))
    return tuple(hits)


def position_figure(run: Run) -> Figure | None:
    """Loss by position in the sequence, of every checkpoint, at the greatest length measured."""
    rows = run.measured.by_position if run.measured else ()
    if not rows:
        return None
    length = max(row.length for row in rows)
    shown = {row.checkpoint: row for row in rows if row.length == length}
    series = []
    for name in checkpoints(shown.values(), run):
        bins = sorted(shown[name].bins, key=lambda one: one.start)
        series.append(
            Series(
                name=f"checkpoint {name}",
                tone=tone(stage_index(run, name)),
                x=_column(one.start for one in bins),
                y=_column(one.loss for one in bins),
                low=_column(one.low for one in bins),
                high=_column(one.high for one in bins),
                label=name,
                marker=marker(stage_index(run, name)),
                # A bin that begins at the trained length lies past it, all but its first position.
                solid_until=trained_length(run, name) - 0.5,
            )
        )
    starts = sorted({int(x) for one in series for x in one.x})
    documents = listed_counts({row.documents for row in shown.values()})
    plot = Plot(
        id="position",
        title="Loss by position",
        description="; ".join(
            f"{one.name}: from {words.loss(float(one.y[0]))} after {one.x[0]:.0f} to {words.loss(float(one.y[-1]))} "
            f"after {one.x[-1]:.0f} tokens"
            for one in series
        ),
        x=Axis("tokens read before (least of the bin)", lambda value: words.count(int(value)), kind="log"),
        y=Axis("loss, nats per token", lambda value: f"{value:.4g}"),
        series=tuple(series),
        rules=old_length(run),
        hits=_column_hits(series, starts, "after"),
    )
    return Figure(
        plot,
        f"How the loss falls as more text has been read, up to {words.count(length)} tokens. Dashed, hollow: past the "
        f"length that the checkpoint was trained on.{_upright(run)}",
        f"Sequences of {words.count(length)} tokens that begin at random places of held-out documents ({documents} "
        "documents); mean loss in bins of positions, a position being the tokens read before the predicted one; bins "
        f"double in width{' up to the upright line' if run.start is not None else ''}. "
        f"Bands: {words.NINETY_FIVE} bootstrap over documents. Different positions hold different tokens, so a fall "
        "within a line is about text as well as about context.",
    )


def growth_figure(run: Run) -> Figure | None:
    """Held-out loss by position, over training: when the model learned to use its context."""
    evaluations = [one for one in run.evaluations() if one.by_position]
    if len(evaluations) < 2:
        return None
    starts = sorted({start for one in evaluations for start in one.by_position})
    tokens = _column(one.tokens for one in evaluations)
    series = [
        Series(
            name=f"positions from {words.count(start)}",
            tone="ink" if start == starts[-1] else "quiet",
            x=tokens,
            y=_column(one.by_position.get(start, math.nan) for one in evaluations),
            label=f"from {words.count(start)}",
            marker="circle" if len(evaluations) < 4 else "",
        )
        for start in starts
    ]
    hits = [
        Hit(
            float(one.tokens),
            f"{words.short(one.tokens)} tokens · "
            + " · ".join(f"{start}: {words.loss(one.by_position[start], 2)}" for start in sorted(one.by_position)),
        )
        for one in evaluations
    ]
    bounds, hidden = _loss_bounds(run, series)
    above = f" The first {words.short(OPENING * run.tokens)} tokens begin above the frame." if hidden else ""
    plot = Plot(
        id="growth",
        title="Held-out loss by position during training",
        description=f"Held-out loss in {len(starts)} bins of positions at {len(evaluations)} moments of training.",
        x=token_axis(run),
        y=Axis("held-out loss, nats per token", lambda value: f"{value:.4g}", bounds=bounds),
        series=tuple(series),
        rules=stage_rules(run),
        hits=tuple(hits),
    )
    return Figure(
        plot,
        "One line for each bin of positions, named by its first position. Where the lines of late positions lie below "
        f"those of early ones, the model profits from the text further back.{above}",
        "Held-out loss in the loop at the length of the stage; a bin reaches up to the next one’s first position. "
        "Early bins hold few tokens, and the windows change with the stage, so small jumps mean nothing.",
    )


def small_figures(run: Run) -> list[Figure]:
    """Throughput and the health of the optimizer, as small multiples over tokens."""
    steps = run.steps
    wanted = (
        ("speed", "tokens per second", steps.tokens_per_second, "Training tokens over wall time of the step.", False),
        (
            "flops",
            "share of the devices' peak FLOP/s",
            steps.flops_utilisation,
            "Model FLOP per second, attention counted causally, over the devices' peak.",
            False,
        ),
        (
            "grad",
            "gradient norm, before clipping",
            steps.grad_norm,
            "Global norm over all weights, before clipping.",
            True,
        ),
        ("update", "update norm", steps.update_norm, "Global norm of what the optimizer adds to the weights.", True),
        ("param", "norm of the weights", steps.param_norm, "Global norm over all weights.", False),
        ("rate", "learning rate", steps.lr, "The schedule, in tokens.", False),
    )
    return [_small(run, *one) for one in wanted if np.isfinite(one[2]).any()]


def _small(run: Run, ident: str, title: str, column: Floats, ruler: str, may_log: bool) -> Figure:
    series, per_point = by_stage(run, column, POINTS // 2, title)
    finite = column[np.isfinite(column)]
    log = may_log and float(finite.min()) > 0 and float(finite.max()) > 8 * float(finite.min())
    hits = [
        Hit(
            x,
            f"{words.short(x)} tokens · "
            f"{words.short(float(one.y[i])) if abs(float(one.y[i])) >= 1000 else f'{float(one.y[i]):.3g}'}",
        )
        for one in series
        for i, x in enumerate(one.x.tolist())
        if math.isfinite(one.y[i])
    ]
    plot = Plot(
        id=ident,
        title=f"{title[0].upper()}{title[1:]} over tokens",
        description=f"From {finite[0]:.4g} at the first step to {finite[-1]:.4g} at the last; "
        f"between {finite.min():.4g} and {finite.max():.4g}.",
        x=token_axis(run),
        y=Axis(
            title,
            lambda value: words.short(value) if abs(value) >= 1000 else f"{value:.4g}",
            kind="log" if log else "linear",
        ),
        series=tuple(series),
        rules=stage_rules(run, named=False),
        hits=tuple(hits),
    )
    group = f" Mean and range of {words.count(per_point)} steps." if per_point > 1 else ""
    return Figure(plot, "", ruler + (" Logarithmic." if log else "") + group)
