"""The report of a run: one self-contained HTML page, made from the files of the run folder alone."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

from xgen.errors import StorageError
from xgen.report import figures, words
from xgen.report.continued import continued_section, continued_sentences
from xgen.report.figures import Figure, stage_index, tone, trained_length
from xgen.report.markup import details, escape, paragraph, section, table
from xgen.report.plots import NARROW, SMALL, WIDE, Interval, draw, draw_intervals
from xgen.report.read import Gain, Measured, Run, Strided, read_run
from xgen.report.story import Tile, sentences, tiles
from xgen.report.tables import log_section, recipe_section, run_section, samples_section, scale_section

# No address of any kind may be loaded: the page is whole, and a hostile text in it has nowhere to go.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(run: Path) -> Path:
    """Write report.html into the run folder `run` and return its path.

    A run that is not finished gives a page too, which says so. Raises DataError when `run` is no
    run folder and StorageError when the page cannot be written; a page from before is then whole.
    """
    page = render(read_run(run))
    target = run / "report.html"
    beside = run / "report.html.partial"
    try:
        beside.write_text(page, encoding="utf-8")
        os.replace(beside, target)
    except OSError as cause:
        raise StorageError.writing(target, cause) from cause
    return target


def render(run: Run) -> str:
    """The page as text. The same run gives the same bytes."""
    style = files("xgen.report").joinpath("style.css").read_text(encoding="utf-8")
    body = _header(run) + "".join(make(run) for make in SECTIONS.values())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light '
        'dark">'
        f'<link rel="icon" href="data:,"><title>{escape(run.recipe.name)} · XGen run report</title>\n<style>'
        f"\n{style}</style></head>\n"
        f"<body><main>{body}</main>"
        "<footer>Made by XGen from the files of the run folder alone; the page loads nothing.</footer></body></html>\n"
    )


def _header(run: Run) -> str:
    told = sentences(run)
    told[1:1] = continued_sentences(run)
    tile_row = "".join(tile_markup(one) for one in tiles(run))
    description = f'<p class="about">{escape(run.recipe.description)}</p>' if run.recipe.description else ""
    remarks = "".join(f'<p class="remark">{escape(text)}</p>' for text in run.remarks)
    lead = f'<p class="lead">{escape(told[0])}</p>' if told else ""
    rest = "".join(f"<li>{escape(text)}</li>" for text in told[1:])
    return (
        f'<header class="top"><p class="over">XGen run report</p><h1><bdi>{escape(run.recipe.name)}</bdi></h1>'
        f"{description}{remarks}"
        f'{lead}<dl class="tiles">{tile_row}</dl>'
        + (f'<h2 class="small">What the run shows</h2><ul class="told">{rest}</ul>' if rest else "")
        + "</header>\n"
    )


def tile_markup(tile: Tile) -> str:
    return (
        f"<div><dt>{escape(tile.name)}</dt><dd><b>{escape(tile.value)}</b> <span>{escape(tile.note)}</span></dd></div>"
    )


def figure(shown: Figure, numbers: str = "") -> str:
    """A plot drawn for wide and for narrow pages, its caption, its ruler, and its numbers as a table."""
    caption = f"<p>{escape(shown.caption)}</p>" if shown.caption else ""
    return (
        f'<figure id="figure-{shown.plot.id}">{draw(shown.plot, WIDE)}{draw(shown.plot, NARROW)}'
        f'<figcaption>{caption}<p class="ruler"><b>Ruler.</b> {escape(shown.ruler)}</p></figcaption>{numbers}</figure>'
    )


def _loss_section(run: Run) -> str:
    if not len(run.steps):
        return section("loss", "Loss", "Does it learn?", paragraph("No step has been finished yet."))
    rows = [(words.count(one.tokens), words.loss(one.loss)) for one in figures.even(run.evaluations(), 40)]
    total = len(run.evaluations())
    shown = (
        f"Held-out loss in numbers ({len(rows)} of {total} evaluations, evenly spaced)"
        if len(rows) < total
        else "Held-out loss in numbers"
    )
    numbers = details(shown, table(("tokens", "held-out loss, nats per token"), rows, shown)) if rows else ""
    return section("loss", "Loss", "Does it learn?", figure(figures.loss_figure(run), numbers))


def _absent(run: Run) -> str:
    """Why a measurement is not shown."""
    if run.measured is None:
        return paragraph("Measured after training; not there yet.")
    return paragraph("Not measured: the held-out documents do not allow it.") + _notes(run)


def _notes(run: Run) -> str:
    """What the measurement says of itself."""
    return "".join(f'<p class="note">{escape(note)}</p>' for note in (run.measured.notes if run.measured else ()))


def _context_section(run: Run) -> str:
    shown = figures.fixed_figure(run)
    if run.measured is None or shown is None:
        return section("context", "Use of context", "Does longer context help?", _absent(run))
    rows = sorted(
        run.measured.fixed_target, key=lambda row: (stage_index(run, row.checkpoint), row.checkpoint, row.context)
    )
    numbers = details(
        "In numbers",
        table(
            ("checkpoint", "context", "loss", f"{words.NINETY_FIVE} from", "to", "documents", "target tokens"),
            [
                (
                    escape(row.checkpoint),
                    words.count(row.context),
                    words.loss(row.loss),
                    words.loss(row.low),
                    words.loss(row.high),
                    words.count(row.documents),
                    words.count(row.tokens),
                )
                for row in rows
            ],
            "Fixed-target loss in nats per token",
        ),
    )
    return section(
        "context",
        "Use of context",
        "Does longer context help?",
        figure(shown, numbers) + _gains(run, run.measured) + _notes(run),
    )


def _gains(run: Run, measured: Measured) -> str:
    gains = sorted(
        measured.fixed_target_gain,
        key=lambda one: (stage_index(run, one.checkpoint), one.checkpoint, one.from_context, one.to_context),
    )
    if not gains:
        return paragraph("No paired differences were measured.")
    last = gains[-1].checkpoint
    rows = [
        Interval(
            f"{words.count(one.from_context)} → {words.count(one.to_context)}",
            one.difference,
            one.low,
            one.high,
            _gain_text(one),
        )
        for one in gains
        if one.checkpoint == last
    ]
    title = f"What more context changes, checkpoint {last}"
    drawing = "".join(
        draw_intervals("gain", title, "difference in loss, nats per token", rows, tone(stage_index(run, last)), size)
        for size in (WIDE, NARROW)
    )
    numbers = table(
        ("checkpoint", "context", "difference", "verdict", "documents"),
        [
            (
                escape(one.checkpoint),
                f"{words.count(one.from_context)} → {words.count(one.to_context)}"
                + (" †" if one.to_context > trained_length(run, one.checkpoint) else ""),
                f"{words.signed(one.difference)}<small>{words.signed(one.low)} to {words.signed(one.high)}</small>",
                f'<span class="verdict {words.verdict(one.low, one.high).replace(" ", "-")}">'
                f"{words.verdict(one.low, one.high)}</span>",
                words.count(one.documents),
            )
            for one in gains
        ],
        "Paired differences in fixed-target loss with intervals, nats per token",
    )
    return (
        f'<figure id="figure-gain">{drawing}<figcaption><p>What more context changes for the last checkpoint, '
        f"‘{escape(last)}’: loss with the longer context less loss with the shorter, "
        'of the same tokens of the same documents. Below 0 is a gain.</p><p class="ruler"><b>Ruler.</b> Whiskers: '
        + words.NINETY_FIVE
        + " interval, bootstrap over documents of the paired differences. "
        "An interval that includes 0 shows nothing either way.</p></figcaption></figure>"
        f'{numbers}<p class="note">Differences in nats per token, beneath them their {words.NINETY_FIVE} intervals. † '
        "past the length that the checkpoint was trained on.</p>"
    )


def _gain_text(one: Gain) -> str:
    return f"{words.signed(one.difference)}  [{words.signed(one.low)}, {words.signed(one.high)}]"


def _position_section(run: Run) -> str:
    body = ""
    shown = figures.position_figure(run)
    if shown is not None and run.measured is not None:
        rows = [
            (
                escape(row.checkpoint),
                words.count(row.length),
                f"{words.count(one.start)}–{words.count(one.stop)}",
                words.loss(one.loss),
                words.loss(one.low),
                words.loss(one.high),
                words.count(one.tokens),
            )
            for row in sorted(run.measured.by_position, key=lambda row: (stage_index(run, row.checkpoint), row.length))
            for one in row.bins
        ]
        head = ("checkpoint", "length", "position", "loss", f"{words.NINETY_FIVE} from", "to", "tokens")
        body += figure(shown, details("In numbers", table(head, rows, "Loss by position in nats per token")))
    growth = figures.growth_figure(run)
    if growth is not None:
        body += figure(growth)
    if not body:
        body = _absent(run)
    return section("position", "Loss by position", "How far back does it read?", body)


def _matrix_section(run: Run) -> str:
    question = "Which stage for which length?"
    if run.measured is None or not run.measured.strided:
        return section("matrix", "Stage × context", question, _absent(run))
    rows = run.measured.strided
    contexts = sorted({row.context for row in rows})
    best = {
        c: min((row.loss for row in rows if row.context == c and not math.isnan(row.loss)), default=math.nan)
        for c in contexts
    }
    names = sorted({row.checkpoint for row in rows}, key=lambda name: (stage_index(run, name), name))
    cells = {(row.checkpoint, row.context): row for row in rows}
    body = table(
        ("checkpoint", *(words.count(c) for c in contexts)),
        [
            (
                f'<span class="dot {tone(stage_index(run, name))}"></span>{escape(name)}',
                *(_cell(run, cells.get((name, c)), best[c]) for c in contexts),
            )
            for name in names
        ],
        "Strided loss by checkpoint and context",
    ).replace('<table class="numbers">', '<table class="numbers matrix">')
    text = run.measured.text
    strides = words.listed(sorted({f"1/{round(row.context / row.stride)}" for row in rows if row.stride}))
    return section(
        "matrix",
        "Stage × context",
        question,
        f"{body}<figcaption><p>Large: loss in nats per token; small: bits per byte. <b>Bold</b>: lowest of its "
        "column. Hatched: past the length that the checkpoint was trained on. "
        f"For comparison, xz -9e on the same text: {words.loss(text.xz_bits_per_byte)} bits per byte.</p><p "
        f'class="ruler"><b>Ruler.</b> Strided: each of {words.count(text.tokens)} tokens of '
        f"{words.count(text.documents)} held-out documents ({words.size(text.bytes)}) is scored once, in windows of "
        f"the column’s length that advance by {strides} of it, so that a token has "
        "nearly the whole context before it except at a document’s beginning. Bits per byte: the summed loss in bits "
        "over the text’s bytes. xz is run on the same documents joined; "
        "it begins knowing nothing, while the model has read the training text, and the model’s own size is not "
        "counted.</p></figcaption>",
    )


def _cell(run: Run, row: Strided | None, best: float) -> str:
    if row is None:
        return "–"
    kind = (
        "cell"
        + (" past" if row.context > trained_length(run, row.checkpoint) else "")
        + (" best" if row.loss == best else "")
    )
    interval = f"{words.NINETY_FIVE} interval {words.loss(row.low)} to {words.loss(row.high)}"
    title = f"{interval}; perplexity {words.short(row.perplexity)}"
    return (
        f'<span class="{kind}" title="{escape(title)}"><b>{words.loss(row.loss)}</b><small>'
        f"{words.loss(row.bits_per_byte)}</small></span>"
    )


def _health_section(run: Run) -> str:
    shown: Sequence[Figure] = figures.small_figures(run) if len(run.steps) else ()
    if not shown:
        return ""
    drawn = "".join(
        f'<figure id="figure-{one.plot.id}">{draw(one.plot, SMALL)}<figcaption><p class="ruler">'
        f"{escape(one.ruler)}</p></figcaption></figure>"
        for one in shown
    )
    return section("health", "Speed and health", "Was training sound?", f'<div class="multiples">{drawn}</div>')


SECTIONS: dict[str, Callable[[Run], str]] = {
    "loss": _loss_section,
    "continued": continued_section,
    "context": _context_section,
    "position": _position_section,
    "matrix": _matrix_section,
    "health": _health_section,
    "samples": samples_section,
    "scale": scale_section,
    "run": run_section,
    "log": log_section,
    "recipe": recipe_section,
}
"""The parts of the page after its head, in its order; each gives markup, none where the run has nothing of the kind."""
