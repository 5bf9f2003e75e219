"""The command line: one thin function a verb; what it does lives in the rooms."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from xgen.cli.bench import bench
from xgen.cli.chat import chat
from xgen.cli.checkpoint import checkpoint_app
from xgen.cli.convert import convert_app
from xgen.cli.data import data_app
from xgen.cli.generate import generate
from xgen.cli.plan import plan
from xgen.cli.prepare import prepare
from xgen.cli.recipe import recipe_app
from xgen.cli.report import report
from xgen.cli.serve import serve
from xgen.cli.train import train
from xgen.cli.watch import watch
from xgen.errors import StoppedBySignal, XgenError

app = typer.Typer(
    name="xgen",
    help="Pre-train long-context language models in stages.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(prepare)
app.command()(plan)
app.command()(train)
app.command()(report)
app.command()(watch)
app.command()(generate)
app.command()(chat)
app.command()(serve)
app.add_typer(recipe_app, name="recipe")
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(convert_app, name="convert")
app.add_typer(bench, name="bench")

_DEBUG = "--debug"


def _print_version(wanted: bool) -> None:
    if wanted:
        from xgen import __version__

        typer.echo(f"xgen {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option(_DEBUG, help="Show the traceback of an error.")] = False,
) -> None:
    """Options before the verb."""


def main() -> None:
    """Run the command line. An error of ours is one message on standard error and its own exit code."""
    arguments = [argument for argument in sys.argv[1:] if argument != _DEBUG]
    sys.unraisablehook = _unraisable
    try:
        app(args=arguments, prog_name="xgen")
    except XgenError as error:
        if _DEBUG in sys.argv:
            traceback.print_exc()
        typer.echo(f"error: {error}", err=True)
        if isinstance(error, StoppedBySignal) or _among_others():
            # Whoever sends a second signal does not wait for a checkpoint being written; and JAX, on its way out,
            # would wait for processes that are gone.
            sys.stdout.flush()
            os._exit(error.exit_code)
        sys.exit(error.exit_code)


def _among_others() -> bool:
    """Whether this is one of several processes. Asked after any error, so it does not load JAX."""
    jax = sys.modules.get("jax")
    return jax is not None and bool(jax.distributed.is_initialized())


def _unraisable(found: sys.UnraisableHookArgs) -> None:
    """Keep quiet of TensorStore's threads, which report to an event loop that their failed write has closed: the
    failure itself is an error of ours."""
    if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(found)
