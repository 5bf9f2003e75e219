"""`xgen train`: from a recipe to a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xgen.cli.output import check_target, write_json
from xgen.errors import RecipeError


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A shipped recipe (see `xgen recipe list`) or a .toml file.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Values to change: key=value, as optimizer.clip=0.5.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Folder of the run; must not hold one yet.")] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            help="Begin with this model's weights, shape and tokenizer: a run folder, DIR@STAGE, a converted or "
            "Hugging Face folder, or a GGUF file.",
        ),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Train on this instead of the recipe's sources: a token store, or a file or folder of text; "
            "NAME=PATH to name it. May be repeated."
        ),
    ] = None,
    json: Annotated[str | None, typer.Option(help='Write the result as JSON to this file; "-" prints it.')] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Pre-train RECIPE in the folder RUN, measure every stage's checkpoint on held-out text, and write report.html.

    Exit codes: 0 done; 2 bad input; 3 the loss was not finite; 4 a file could not be written; 75 stopped by SIGTERM or
    SIGINT with everything saved.
    """
    from xgen import api
    from xgen.cli.progress import Progress

    check_target(json)
    if resume is not None:
        if run is not None or data:
            raise RecipeError("--resume takes the run's own folder and sources: leave out --run and --data")
        if start is not None:
            raise RecipeError(f"--resume goes on with the run's own weights: leave out --from {start}")
        if recipe is not None and "=" not in recipe:
            raise RecipeError(f"--resume takes no recipe, the run has its own: `xgen train --resume {resume}`")
        wanted = [text for text in (recipe, *(overrides or ())) if text is not None]
        with Progress(api.resolve_run(resume, wanted).total_tokens, quiet=quiet or json == "-") as display:
            found = api.resume(resume, overrides=wanted, display=display)
    else:
        if recipe is None:
            raise RecipeError("say what to train: `xgen train RECIPE --run DIR` (see `xgen recipe list`)")
        if run is None:
            raise RecipeError(f"say where the run goes: add --run DIR, as in `xgen train {recipe} --run runs/mine`")
        loaded = api.resolve(recipe, [*api.sources_override(data or []), *(overrides or [])], start)
        with Progress(loaded.total_tokens, quiet=quiet or json == "-") as display:
            found = api.train(loaded, run=run, start=start, display=display)
    write_json(found, json)
    if not quiet and json != "-":
        if found["bits_per_byte"] is not None:
            typer.echo(f"{found['bits_per_byte']:.3f} bits per byte (xz -9e: {found['xz_bits_per_byte']:.3f})")
        typer.echo(f"report: {found['report']}")
