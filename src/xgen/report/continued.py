"""The part of the page about a continued model: what training did to it below and past the length it came with."""

from __future__ import annotations

from xgen.recipe.base import NEW_ROPE, START
from xgen.report import words
from xgen.report.figures import stage_index, tone
from xgen.report.markup import details, escape, paragraph, section, table
from xgen.report.plots import NARROW, WIDE, Interval, draw_intervals
from xgen.report.read import Change, Run, SinceStart, Start
from xgen.report.story import last_checkpoint

POSITIONS = "by_position"
TARGETS = "fixed_target"


def continued_sentences(run: Run) -> list[str]:
    """What became of the model, the most important first."""
    if run.start is None:
        return []
    told = []
    for row in reversed(_rows(run, last_checkpoint(run))):  # past the old length first
        where = _where(row, run.start)
        alone = next((one for one in _rows(run, NEW_ROPE) if one.start == row.start), None)
        found = [("the new rope and training together" if alone else "training", row, START)]
        if alone is not None and row.start >= run.start.context_length:
            found += [("the new rope alone", alone, START), ("training with that rope", row, NEW_ROPE)]
        for what, later, earlier in found:
            change = later.against(earlier)
            if change is not None:
                before, after = later.loss - change.difference, later.loss
                facts = (change.difference, change.low, change.high, before, after, later.documents)
                told.append(words.moved(where, what, *facts))
    return told


def continued_section(run: Run) -> str:
    """Nothing for a run that began with fresh weights."""
    if run.start is None:
        return ""
    length = words.count(run.start.context_length)
    body = paragraph(
        f"The run began with the weights of ‘{run.start.place}’ ({run.start.name}), trained on sequences of up to "
        f"{length} tokens (SHA-256 of its weights: {run.start.weights_sha256[:12]}…)." + _rope(run, run.start)
    )
    rows = [row for row in _all(run) if row.changes]
    if not rows:
        body += paragraph("What became of it is measured after training; there is no such measurement.")
    else:
        if not any(row.start >= run.start.context_length for row in rows):
            body += paragraph(
                f"No loss past {length} tokens was measured: evaluation.contexts go no further, or no held-out "
                "document is long enough."
            )
        body += _figure(run, run.start) + details("In numbers", _numbers(run))
    return section("continued", "The model continued", "Does it read further than before?", body)


def _rope(run: Run, start: Start) -> str:
    before, now = start.model, run.recipe.model
    changed = [
        f"{name} from {old:g} to {new:g}" if isinstance(old, float) else f"{name} from {old} to {new}"
        for name, old, new in (
            ("rope_theta", before.rope_theta, now.rope_theta),
            *(
                (f"rope_scaling.{key}", old, new)
                for (key, old), new in zip(
                    before.rope_scaling.model_dump().items(), now.rope_scaling.model_dump().values(), strict=True
                )
            ),
        )
        if old != new
    ]
    if not changed:
        return " Its rotary frequencies were kept, so what changed was learnt."
    return (
        f" Its rotary frequencies were changed: {words.listed(changed)}. ‘{START}’ is the model as it was, "
        f"‘{NEW_ROPE}’ the same weights with the new frequencies and nothing learnt: what lies between the two is the "
        "rope's doing, what comes after is training's."
    )


def _measure(run: Run) -> str:
    """What tells of both sides of the old length: the loss by position, or that of the same last tokens of every
    context when no held-out document is long enough for the former."""
    assert run.start is not None
    past = {row.measure for row in _all(run) if row.start >= run.start.context_length}
    return TARGETS if past == {TARGETS} else POSITIONS


def _all(run: Run) -> list[SinceStart]:
    return list(run.measured.since_start) if run.measured else []


def _rows(run: Run, checkpoint: str) -> list[SinceStart]:
    """The checkpoint's rows below and past the old length, by `_measure`."""
    measure = _measure(run)
    return [row for row in _all(run) if (row.checkpoint, row.measure) == (checkpoint, measure)]


def _where(row: SinceStart, start: Start) -> str:
    side = "Past" if row.start >= start.context_length else "Within"
    read = f"{words.count(row.start)} to {words.count(row.stop)}"
    positions = f"{'after reading' if row.measure == TARGETS else 'positions'} {read}"
    return f"{side} the {words.count(start.context_length)} tokens that ‘{start.name}’ was trained on ({positions})"


def _figure(run: Run, start: Start) -> str:
    """The paired differences of the last checkpoint, below and past the old length."""
    last = last_checkpoint(run)
    shown = [(row, change) for row in _rows(run, last) for change in row.changes if change.against in (START, NEW_ROPE)]
    shown += [(row, change) for row in _rows(run, NEW_ROPE) for change in row.changes]
    if not shown:
        return ""
    rows = [
        Interval(_label(row, change), change.difference, change.low, change.high, _signed(change))
        for row, change in sorted(shown, key=lambda one: (one[0].start, one[1].against != START))
    ]
    what = "loss by position" if _measure(run) == POSITIONS else "the same tokens’ loss by context"
    title = f"Change of {what}, checkpoint {last}"
    drawing = "".join(
        draw_intervals("since", title, "difference in loss, nats per token", rows, tone(stage_index(run, last)), size)
        for size in (WIDE, NARROW)
    )
    return (
        f'<figure id="figure-since">{drawing}<figcaption><p>What changed since ‘{escape(start.name)}’, below and past '
        f"its {words.count(start.context_length)} tokens, by the tokens read before the predicted one. What falls "
        "alike on both sides was learnt from the text, whatever its length; only what falls further past the old "
        'length tells of length.</p><p class="ruler"><b>Ruler.</b> Paired differences of the same tokens of the same '
        f"documents, whiskers: {words.NINETY_FIVE} bootstrap over documents. An interval that includes 0 shows nothing "
        "either way.</p></figcaption></figure>"
    )


def _label(row: SinceStart, change: Change) -> str:
    how = "rope alone" if row.checkpoint == NEW_ROPE else "training" if change.against == NEW_ROPE else ""
    return f"{words.count(row.start)}–{words.count(row.stop)}" + (f" {how}" if how else "")


def _signed(change: Change) -> str:
    return f"{words.signed(change.difference)}  [{words.signed(change.low)}, {words.signed(change.high)}]"


def _numbers(run: Run) -> str:
    """Every checkpoint on both sides of the old length and at every context, with what changed before it."""
    named = {POSITIONS: "by position", "fixed_target": "fixed target"}
    cells = [
        (
            escape(row.checkpoint),
            named.get(row.measure, escape(row.measure)),
            f"{words.count(row.start)}–{words.count(row.stop)}",
            f"{words.loss(row.loss)}<small>{words.loss(row.low)} to {words.loss(row.high)}</small>",
            "".join(f"{_signed(one)}<small>against {escape(one.against)}</small>" for one in row.changes) or "–",
            words.count(row.documents),
        )
        for row in sorted(_all(run), key=lambda row: (row.measure, row.start, stage_index(run, row.checkpoint)))
    ]
    head = ("checkpoint", "measure", "tokens read before", f"loss, {words.NINETY_FIVE}", "change", "documents")
    return table(head, cells, "Loss in nats per token before and after, with paired changes")
