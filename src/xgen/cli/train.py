"""`xgen train`: from a recipe to a report."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xgen.cli.output import check_target, write_json
from xgen.errors import RecipeError

if TYPE_CHECKING:
    from xgen.parallel.world import World

_PROCESSES = "Several processes"

RecipeName = Annotated[str | None, typer.Argument(help="A shipped recipe (see `xgen recipe list`) or a .toml file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Values to change: key=value, as optimizer.clip=0.5.")]
From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="MODEL",
        help="Begin with this model's weights, shape and tokenizer: a run folder, DIR@STAGE, a converted or "
        "Hugging Face folder, or a GGUF file.",
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Train on this instead of the recipe's sources: a token store, or a file or folder of text; "
        "NAME=PATH to name it. May be repeated."
    ),
]
Devices = Annotated[
    int | None, typer.Option(metavar="N", help="Emulate N devices on the CPU of this process, to try a mesh.")
]
Coordinator = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        rich_help_panel=_PROCESSES,
        help="Where process 0 listens. Cloud TPU, GKE, Slurm and Open MPI tell this and the next two by themselves.",
    ),
]
Processes = Annotated[int | None, typer.Option(metavar="N", rich_help_panel=_PROCESSES, help="How many there are.")]
Process = Annotated[
    int | None, typer.Option(metavar="I", rich_help_panel=_PROCESSES, help="Which one this is, from 0.")
]
Wait = Annotated[
    float, typer.Option(metavar="SECONDS", rich_help_panel=_PROCESSES, help="How long to wait for all to come.")
]


def train(
    recipe: RecipeName = None,
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option(help="Folder of the run; must not hold one yet.")] = None,
    start: From = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    data: Data = None,
    json: Annotated[str | None, typer.Option(help='Write the result as JSON to this file; "-" prints it.')] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    devices: Devices = None,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process: Process = None,
    wait: Wait = 60.0,
) -> None:
    """Pre-train RECIPE in the folder RUN, measure every stage's checkpoint on held-out text, and write report.html.

    Exit codes: 0 done; 2 bad input; 3 the loss was not finite; 4 a file could not be written; 75 stopped by SIGTERM or
    SIGINT with everything saved; 76 stopped because another process of the run died or hung.
    """
    from xgen.parallel.roster import Limits
    from xgen.parallel.start import Settings, connect, emulate

    check_target(json)
    _check_words(recipe, run, start, resume, data)
    if devices is not None:
        emulate(devices)
    with connect(Settings(coordinator, processes, process, Limits(start=wait))).watched() as world:
        if world.count > 1:
            _python_only_stdout()
        silent = quiet or json == "-" or not world.is_writer
        if resume is not None:
            found = _go_on(world, resume, [text for text in (recipe, *(overrides or ())) if text is not None], silent)
        else:
            assert recipe is not None
            assert run is not None
            found = _begin(world, recipe, overrides or [], run, start, data or [], silent)
    if not world.is_writer:
        return
    write_json(found, json)
    if not silent:
        if found["bits_per_byte"] is not None:
            typer.echo(f"{found['bits_per_byte']:.3f} bits per byte (xz -9e: {found['xz_bits_per_byte']:.3f})")
        typer.echo(f"report: {found['report']}")


def _check_words(
    recipe: str | None, run: Path | None, start: str | None, resume: Path | None, data: list[str] | None
) -> None:
    """Raise RecipeError for words that do not go together."""
    if resume is None:
        if recipe is None:
            raise RecipeError("say what to train: `xgen train RECIPE --run DIR` (see `xgen recipe list`)")
        if run is None:
            raise RecipeError(f"say where the run goes: add --run DIR, as in `xgen train {recipe} --run runs/mine`")
        return
    if run is not None or data:
        raise RecipeError("--resume takes the run's own folder and sources: leave out --run and --data")
    if start is not None:
        raise RecipeError(f"--resume goes on with the run's own weights: leave out --from {start}")
    if recipe is not None and "=" not in recipe:
        raise RecipeError(f"--resume takes no recipe, the run has its own: `xgen train --resume {resume}`")


def _go_on(world: World, folder: Path, overrides: list[str], silent: bool) -> dict[str, Any]:
    from xgen import api
    from xgen.cli.progress import Progress

    with Progress(api.resolve_run(folder, overrides).total_tokens, quiet=silent) as display:
        return api.resume(folder, overrides=overrides, display=display, world=world)


def _begin(
    world: World, recipe: str, overrides: list[str], run: Path, start: str | None, data: list[str], silent: bool
) -> dict[str, Any]:
    from xgen import api
    from xgen.cli.progress import Progress

    loaded = api.resolve(recipe, [*api.sources_override(data), *overrides], start)
    with Progress(loaded.total_tokens, quiet=silent) as display:
        return api.train(loaded, run=run, start=start, display=display, world=world)


def _python_only_stdout() -> None:
    """From here on only Python writes to standard output: gloo, in C++, tells its connections there, and would spoil
    the JSON."""
    sys.stdout.flush()
    ours = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    sys.stdout = ours
