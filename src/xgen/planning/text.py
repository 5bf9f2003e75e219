"""The plan on a terminal: a table of the stages, what it takes, what was assumed, what to change."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from xgen.planning.words import co2, count, dollars, flops, hours, mesh, number, percent, short, size
from xgen.recipe.units import format_length

BAR = 8


def as_table(plan: dict[str, Any]) -> RenderableType:
    """All of the plan, to be printed by a rich console."""
    total = plan["total"]
    head = Text(
        f"{plan['recipe']} on {plan['slice']} ({count(plan['chips'])} chips), {count(plan['parameters'])} parameters"
    )
    parts: list[RenderableType] = [
        head,
        "",
        _memory(plan),
        "",
        _policies(plan),
        "",
        _training(plan),
        "",
        _cost(plan),
        "",
        _assumptions(plan),
        "",
    ]
    verdict = "fits" if total["fits"] else "does not fit"
    parts.append(Text(f"It {verdict}.", style="bold green" if total["fits"] else "bold red"))
    parts += [Text(f"- {line}") for line in remarks(plan)]
    return Group(*parts)


def remarks(plan: dict[str, Any]) -> list[str]:
    """What to do about it, and what to know, in sentences."""
    said = list(dict.fromkeys(text for stage in plan["stages"] for text in stage["advice"]))
    said += _other_slices(plan)
    if plan["total"]["fits"]:
        for stage in plan["stages"]:
            if stage["chosen_by"] == "plan":
                said.append(f"Stage '{stage['name']}' as written {_as_written(stage)}; what stands above was chosen.")
    said += plan["notes"]
    if plan["command"]:
        said.append(f"Run it: {plan['command']}")
    return said


def _other_slices(plan: dict[str, Any]) -> list[str]:
    smallest, kind = plan["smallest_slice"], plan["slice"].rpartition("*")[2].partition(":")[0]
    if smallest is None:
        return [] if plan["total"]["fits"] else [f"No {kind} slice that is sold holds it."]
    told = f"{smallest['slice']} ({count(smallest['chips'])} chips)"
    if not plan["total"]["fits"]:
        return [f"The smallest {kind} slice that holds it is {told}, by arithmetic."]
    return [f"By arithmetic {told} would hold it too."] if smallest["chips"] < plan["chips"] else []


def _as_written(stage: dict[str, Any]) -> str:
    written = stage["as_written"]
    if written["fits"]:
        return "fits too, and is slower"
    return "does not fit: " + (written["reason"] or f"it needs {size(written['bytes_per_chip'])} a chip")


def _memory(plan: dict[str, Any]) -> Table:
    """Does it fit: a row a stage."""
    table = _table(False, 1)
    limit = size(plan["stages"][0]["limit_bytes_per_chip"])
    for name in ("stage", "length", "memory a chip", f"of {limit}", "mesh", "microbatch", "remat", "by"):
        table.add_column(name, no_wrap=name in ("stage", "length", "memory a chip"))
    for stage in plan["stages"]:
        share = stage["bytes_per_chip"] / stage["limit_bytes_per_chip"]
        style = "green" if stage["fits"] else "red"
        bar = Text("█" * min(BAR, round(BAR * share)), style=style)
        bar.append("░" * max(0, BAR - round(BAR * share)), style="dim")
        bar.append(f" {size(stage['bytes_per_chip'])}")
        used = Text(percent(share) + ("" if stage["fits"] else ", too much"), style=style)
        source = stage["source"]
        if stage["compile_seconds"] is not None:
            source += f", {number(stage['compile_seconds'])} s"
        choice = (mesh(stage["mesh"]), format_length(stage["microbatch_tokens"]), stage["rematerialisation"])
        table.add_row(escape(stage["name"]), count(stage["length"]), bar, used, *choice, source)
    return table


def _policies(plan: dict[str, Any]) -> Table:
    """What each rematerialisation would take by arithmetic, all else as planned: memory a chip, and the FLOPs that are
    computed over the model's."""
    table = _table(False)
    table.add_column("stage")
    for policy in plan["stages"][0]["policies"]:
        table.add_column(f"remat {policy['rematerialisation']}", no_wrap=True)
    for stage in plan["stages"]:
        cells = [
            Text(
                f"{size(policy['bytes_per_chip'])}, {policy['flops_over_model']:.2f} x FLOPs",
                style="" if policy["fits"] else "red",
            )
            for policy in stage["policies"]
        ]
        table.add_row(escape(stage["name"]), *cells)
    return table


def _training(plan: dict[str, Any]) -> Table:
    """How much work: a row a stage, and the sum."""
    stages, total = plan["stages"], plan["total"]
    return _columns(
        stages,
        ("tokens", short(total["tokens"]), [short(stage["tokens"]) for stage in stages]),
        ("tokens a step", "", [count(stage["tokens_per_step"]) for stage in stages]),
        ("steps", count(total["steps"]), [count(stage["steps"]) for stage in stages]),
        ("FLOPs a token", f"{total['flops']:.2e} in all", [flops(stage["flops_per_token"]) for stage in stages]),
    )


def _cost(plan: dict[str, Any]) -> Table:
    """How long and how much: a row a stage, and the sum."""
    kinds = (
        ("time", "hours", hours),
        ("chip-hours", "chip_hours", number),
        ("cost", "dollars", dollars),
        ("kWh", "kwh", number),
        ("CO2", "co2_kg", co2),
    )
    stages, total = plan["stages"], plan["total"]
    return _columns(
        stages, *((name, write(total[key]), [write(stage[key]) for stage in stages]) for name, key, write in kinds)
    )


def _columns(stages: list[dict[str, Any]], *columns: tuple[str, str, list[str]]) -> Table:
    """A table of (name, sum, a cell for each stage)."""
    table = _table(True)
    table.add_column("stage", footer="all")
    for name, footer, _ in columns:
        table.add_column(name, footer=footer, justify="right", no_wrap=True)
    for stage, *cells in zip(stages, *(cells for _, _, cells in columns), strict=True):
        table.add_row(escape(stage["name"]), *cells)
    return table


def _table(footer: bool, apart: int = 2) -> Table:
    return Table(box=None, padding=(0, apart, 0, 0), header_style="dim", show_footer=footer)


def _assumptions(plan: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for _ in range(3):
        table.add_column()
    for name, value in plan["assumptions"].items():
        source = plan["assumption_sources"][name]
        table.add_row(f"--{name} {value:g}", source["unit"], Text(source["source"], style="dim"))
    return table
