"""The plan on a terminal: a table of the stages, what it takes, what was assumed, what to change."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from xgen.planning.words import co2, count, dollars, flops, hours, mesh, number, percent, short, size
from xgen.recipe.units import format_length

BAR = 14


def as_table(plan: dict[str, Any]) -> RenderableType:
    """All of the plan, to be printed by a rich console."""
    total = plan["total"]
    head = Text(
        f"{plan['recipe']} on {plan['slice']} ({count(plan['chips'])} chips), {count(plan['parameters'])} parameters"
    )
    parts: list[RenderableType] = [head, "", _memory(plan), "", _cost(plan), "", _assumptions(plan), ""]
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
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("stage", "length"):
        table.add_column(name)
    table.add_column("memory a chip", no_wrap=True)
    for name in ("of the limit", "mesh", "microbatch", "remat", "from"):
        table.add_column(name)
    for stage in plan["stages"]:
        share = stage["bytes_per_chip"] / stage["limit_bytes_per_chip"]
        style = "green" if stage["fits"] else "red"
        bar = Text("█" * min(BAR, round(BAR * share)), style=style)
        bar.append("░" * max(0, BAR - round(BAR * share)), style="dim")
        bar.append(f" {size(stage['bytes_per_chip'])}")
        limit = f"{percent(share)} of {size(stage['limit_bytes_per_chip'])}"
        if not stage["fits"]:
            limit += ", too much"
        source = stage["source"]
        if stage["compile_seconds"] is not None:
            source += f" ({number(stage['compile_seconds'])} s)"
        cells = (
            limit,
            mesh(stage["mesh"]),
            format_length(stage["microbatch_tokens"]),
            stage["rematerialisation"],
            source,
        )
        table.add_row(escape(stage["name"]), count(stage["length"]), bar, *cells)
    return table


def _cost(plan: dict[str, Any]) -> Table:
    """How long and how much: a row a stage, and the sum."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_footer=True)
    total = plan["total"]
    columns = (
        ("stage", "all", [escape(stage["name"]) for stage in plan["stages"]]),
        ("FLOPs a token", f"{total['flops']:.2e} in all", [flops(s["flops_per_token"]) for s in plan["stages"]]),
        ("tokens", short(total["tokens"]), [short(s["tokens"]) for s in plan["stages"]]),
        ("a step", "", [count(s["tokens_per_step"]) for s in plan["stages"]]),
        ("steps", count(total["steps"]), [count(s["steps"]) for s in plan["stages"]]),
        ("time", hours(total["hours"]), [hours(s["hours"]) for s in plan["stages"]]),
        ("chip-hours", number(total["chip_hours"]), [number(s["chip_hours"]) for s in plan["stages"]]),
        ("cost", dollars(total["dollars"]), [dollars(s["dollars"]) for s in plan["stages"]]),
        ("kWh", number(total["kwh"]), [number(s["kwh"]) for s in plan["stages"]]),
        ("CO2", co2(total["co2_kg"]), [co2(s["co2_kg"]) for s in plan["stages"]]),
    )
    for name, footer, _ in columns:
        table.add_column(name, footer=footer, justify="left" if name == "stage" else "right", no_wrap=True)
    for row in zip(*(cells for _, _, cells in columns), strict=True):
        table.add_row(*row)
    return table


def _assumptions(plan: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for _ in range(3):
        table.add_column()
    for name, value in plan["assumptions"].items():
        source = plan["assumption_sources"][name]
        table.add_row(f"--{name} {value:g}", source["unit"], Text(source["source"], style="dim"))
    return table
