"""The plan as one self-contained HTML page: it loads nothing and runs no script."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from xgen.errors import StorageError
from xgen.planning import words
from xgen.planning.bars import Bar, draw_bars
from xgen.planning.memory import KINDS
from xgen.planning.text import remarks
from xgen.recipe.units import format_length
from xgen.report.markup import escape, paragraph, section, table
from xgen.report.page import POLICY
from xgen.report.plots import NARROW, WIDE

TONES = dict(zip(KINDS, ("t2", "t3", "t1", "t0", "quiet"), strict=True))
MEANING = {
    "parameters": "float32 weights",
    "optimizer": "its moments",
    "gradients": "float32, those of earlier microbatches among them",
    "activations": "kept by the forward pass for the backward pass",
    "temporaries": "all else: gathered weights, one layer’s working set, logits, the batch",
}
STYLE = """
.plot .part { fill: var(--tone); }
.plot .room { fill: var(--raised); stroke: var(--rule); }
.plot .limit { stroke: var(--ink); stroke-width: 1.4; }
.plot .strong { font-weight: 600; }
.plot .over { fill: var(--t0); font-weight: 600; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 20px; margin-top: 6px; font-size: 13px; }
.legend .dot { border-radius: 2px; margin-right: 6px; }
.told + h2 { margin-top: 24px; }
.option { white-space: nowrap; }
.verdict.yes { color: var(--t1); font-weight: 600; } .verdict.no { color: var(--t0); font-weight: 600; }
pre.run { background: var(--raised); border-radius: 6px; padding: 12px 14px; white-space: pre-wrap; }
"""


def write_page(plan: dict[str, Any], target: Path) -> None:
    """Write the page of `plan` to `target`; a page from before is whole until then. Raises StorageError."""
    beside = target.with_name(target.name + ".partial")
    try:
        beside.write_text(render(plan), encoding="utf-8")
        os.replace(beside, target)
    except OSError as cause:
        raise StorageError.writing(target, cause) from cause


def render(plan: dict[str, Any]) -> str:
    """The page as text. The same plan gives the same bytes."""
    style = files("xgen.report").joinpath("style.css").read_text(encoding="utf-8") + STYLE
    title = f"{plan['recipe']} on {plan['slice']}"
    body = "".join((_header(plan), _memory(plan), _cost(plan), _choices(plan), _program(plan), _assumptions(plan)))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><title>{escape(title)} · XGen plan</title>\n<style>\n{style}</style></head>\n'
        f"<body><main>{body}</main><footer>Made by XGen; nothing was rented or run, and the page loads nothing."
        "</footer></body></html>\n"
    )


def _header(plan: dict[str, Any]) -> str:
    total, last = plan["total"], max(plan["stages"], key=lambda stage: stage["bytes_per_chip"])
    verdict = "Every stage fits." if total["fits"] else "It does not fit."
    share = words.percent(last["bytes_per_chip"] / last["limit_bytes_per_chip"])
    tiles = (
        ("Time", words.hours(total["hours"]), f"on {words.count(plan['chips'])} chips"),
        ("Cost", words.dollars(total["dollars"]), f"{words.number(total['chip_hours'])} chip-hours"),
        ("Energy", f"{words.number(total['kwh'])} kWh", f"{words.co2(total['co2_kg'])} of CO2"),
        ("Memory", share, f"of the limit, at most (stage {last['name']})"),
        ("Training", words.short(total["tokens"]), f"tokens, {total['flops']:.2e} FLOPs"),
    )
    shown = "".join(
        f"<div><dt>{escape(name)}</dt><dd><b>{escape(value)}</b> <span>{escape(note)}</span></dd></div>"
        for name, value, note in tiles
    )
    said = [line for line in remarks(plan) if not line.startswith("Run it:")]
    told = "".join(f"<li>{escape(line)}</li>" for line in said)
    run = f'<h2 class="small">Run it</h2><pre class="run">{escape(plan["command"])}</pre>' if plan["command"] else ""
    return (
        f'<header class="top"><p class="over">XGen plan</p><h1><bdi>{escape(plan["recipe"])}</bdi> on '
        f'{escape(plan["slice"])}</h1><p class="about">{words.count(plan["parameters"])} parameters</p>'
        f'<p class="lead">{verdict}</p><dl class="tiles">{shown}</dl>'
        + (f'<h2 class="small">What to know</h2><ul class="told">{told}</ul>' if told else "")
        + f"{run}</header>\n"
    )


def _bar(stage: dict[str, Any]) -> Bar:
    parts = tuple((kind, TONES[kind], stage["bytes_by_kind"][kind]) for kind in KINDS)
    name = f"{stage['name']} · {words.count(stage['length'])} tokens"
    return Bar(name, parts, stage["limit_bytes_per_chip"], stage["fits"])


def _memory(plan: dict[str, Any]) -> str:
    bars = [_bar(stage) for stage in plan["stages"]]
    title = "Memory of one chip at the step’s worst moment, by stage"
    drawn = "".join(draw_bars("memory", title, bars, drawing) for drawing in (WIDE, NARROW))
    legend = "".join(
        f'<li><span class="dot {TONES[kind]}"></span>{kind} <span class="note">{MEANING[kind]}</span></li>'
        for kind in KINDS
    )
    sources = {stage["source"] for stage in plan["stages"]}
    ruler = {
        "compiler": "Totals by the TPU compiler; how gradients and activations share its temporaries, by arithmetic.",
        "arithmetic": "By arithmetic: what lies there always is exact, what comes and goes is estimated.",
    }
    said = " ".join(ruler[source] for source in sorted(sources))
    rows = [
        (
            escape(stage["name"]),
            *(words.size(stage["bytes_by_kind"][kind]) for kind in KINDS),
            words.size(stage["bytes_per_chip"]),
            _yes(stage["fits"]),
            stage["source"],
        )
        for stage in plan["stages"]
    ]
    numbers = table(("stage", *KINDS, "in all", "fits", "by"), rows, "Memory of one chip in numbers")
    figure = (
        f'<figure id="figure-memory">{drawn}<ul class="legend">{legend}</ul><figcaption><p class="ruler"><b>Ruler.'
        f"</b> {said}</p></figcaption></figure>"
    )
    return section("memory", "Memory", "Does it fit?", figure + numbers)


def _yes(fits: bool) -> str:
    return f'<span class="verdict {"yes" if fits else "no"}">{"yes" if fits else "no"}</span>'


def _cost(plan: dict[str, Any]) -> str:
    def row(name: str, one: dict[str, Any], each: str) -> tuple[str, ...]:
        return (
            escape(name),
            words.short(one["tokens"]),
            each,
            words.count(one["steps"]),
            words.hours(one["hours"]),
            words.number(one["chip_hours"]),
            words.dollars(one["dollars"]),
            words.number(one["kwh"]),
            words.co2(one["co2_kg"]),
        )

    rows = [row(stage["name"], stage, words.flops(stage["flops_per_token"])) for stage in plan["stages"]]
    rows.append(row("all", plan["total"], f"{plan['total']['flops']:.2e} in all"))
    head = ("stage", "tokens", "FLOPs a token", "steps", "time", "chip-hours", "cost", "kWh", "CO2")
    step = ", ".join(sorted({words.count(stage["tokens_per_step"]) for stage in plan["stages"]}))
    ruler = (
        f"Tokens a step: {step}. FLOPs are the model’s, forward and backward, attention counted causally; "
        "recomputation is not counted."
    )
    body = table(head, rows, "Time, money and energy by stage") + f'<p class="ruler"><b>Ruler.</b> {ruler}</p>'
    return section("cost", "Time and money", "How long, how much?", body)


def _choices(plan: dict[str, Any]) -> str:
    rows = []
    for stage in plan["stages"]:
        for policy in stage["policies"]:
            chosen = policy["rematerialisation"] == stage["rematerialisation"]
            name = f"{stage['name']}: {policy['rematerialisation']}"
            rows.append(
                (
                    f"<b>{escape(name)}</b>" if chosen else escape(name),
                    words.mesh(stage["mesh"]),
                    format_length(stage["microbatch_tokens"]),
                    words.size(policy["bytes_per_chip"]),
                    _yes(policy["fits"]),
                    f"{policy['flops_over_model']:.3f}",
                    stage["chosen_by"] if chosen else "–",
                )
            )
    head = ("stage: remat", "mesh", "microbatch", "memory a chip", "fits", "FLOPs over the model’s", "chosen by")
    ruler = paragraph("What each rematerialisation costs in memory and in FLOPs, by arithmetic. Bold: the plan’s.")
    return section(
        "choices", "Choices", "What else would fit?", ruler + table(head, rows, "Rematerialisation by stage")
    )


def _program(plan: dict[str, Any]) -> str:
    """What the compiler said beyond memory; nothing without one."""
    body = ""
    for stage in plan["stages"]:
        if stage["collectives"] is None:
            continue
        line = stage["roofline"]
        told = [f"compiled in {words.number(stage['compile_seconds'])} s"]
        if line is not None:
            told.append(f"at least {line['seconds']:.3g} s a step by the roofline, bound by {line['bound']}")
            told.append(f"{line['flops_over_model']:.2f} times the model’s FLOPs")
        body += paragraph(f"Stage {stage['name']}: {', '.join(told)}.")
        rows = [
            (escape(kind), f"{each['count']:,.0f}", words.size(each["bytes"]))
            for kind, each in stage["collectives"].items()
        ]
        body += table(("collective", "count", "bytes a chip"), rows, f"Collectives of one step, stage {stage['name']}")
        largest = [(escape(one["shape"]), words.size(one["bytes"])) for one in stage["largest_temporaries"]]
        body += table(("largest temporaries", "bytes"), largest, f"Largest temporaries, stage {stage['name']}")
    return section("program", "Compiled program", "What does a step do?", body) if body else ""


def _assumptions(plan: dict[str, Any]) -> str:
    rows = [
        (f'<span class="option">--{name} {value:g}</span>', escape(source["unit"]), escape(source["source"]))
        for name, value in plan["assumptions"].items()
        for source in (plan["assumption_sources"][name],)
    ]
    body = table(("option", "unit", "where it is from"), rows, "Assumptions", "words")
    return section("assumptions", "Assumptions", "What was not computed?", body)
