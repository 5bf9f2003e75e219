"""`xgen plan`: fits, how long, how much, per stage, before anything is rented."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xgen.cli.output import check_target, write_json
from xgen.errors import RecipeError

_WHERE = "a slice of accelerators, as v4:8x8x8, v5e:16x16, 2*v5e:16x16 (two slices) or h100:64"


Compiler = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Ask the real TPU compiler (pip install 'xgen\\[tpu]'), or keep to arithmetic. Left out: ask it when it "
        "is installed.",
    ),
]


def plan(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (see `xgen recipe list`), a .toml file, or a run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, as in stages.0.remat=block.")
    ] = None,
    on: Annotated[str | None, typer.Option(metavar="SLICE", help=f"Where: {_WHERE}.")] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="MODEL", help="The model that `xgen train --from` would continue.")
    ] = None,
    compiler: Compiler = None,
    utilisation: Annotated[float | None, typer.Option(help="Share of the chips' peak, in the model's FLOPs.")] = None,
    price: Annotated[float | None, typer.Option(help="Dollars a chip-hour.")] = None,
    power: Annotated[float | None, typer.Option(help="Watts a chip.")] = None,
    pue: Annotated[float | None, typer.Option(help="Energy of the building over that of its machines.")] = None,
    grid: Annotated[float | None, typer.Option(help="kg CO2 a kWh.")] = None,
    page: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plan as one HTML page.")] = None,
    json: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help='Write one JSON object to FILE, "-" for standard output.'),
    ] = None,
) -> None:
    """Say for each stage of RECIPE whether it fits the chips of a slice, how long it takes there and what it costs.

    What the recipe leaves out (mesh, microbatch_tokens, remat) the plan chooses: the cheapest that fits. Every
    assumption is printed and can be changed. Nothing is rented and nothing is run.
    """
    from rich.console import Console

    from xgen.planning import plan as make_plan
    from xgen.planning.page import write_page
    from xgen.planning.text import as_table

    if on is None:
        raise RecipeError(f"say where: add --on SLICE, {_WHERE}")
    check_target(json)
    check_target(None if page is None else str(page))
    assumed = {"utilisation": utilisation, "price": price, "power": power, "pue": pue, "grid": grid}
    with Console(stderr=True).status("planning") as status:
        found = make_plan(
            recipe, on=on, overrides=overrides or (), start=start, compiler=compiler, report=status.update, **assumed
        )
    write_json(found, json)
    if page is not None:
        write_page(found, page)
    if json != "-":
        console = Console(width=None if Console().is_terminal else 160, highlight=False)
        console.print(as_table(found))
        if page is not None:
            console.print(f"page: {page}", soft_wrap=True)
