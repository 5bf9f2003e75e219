"""`xgen data show|verify`: what a run reads at a step, and whether a token store is whole."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from xgen.cli.output import write_json
from xgen.errors import DataError, RecipeError

data_app = typer.Typer(no_args_is_help=True, help="Show the batch of a step with its documents; verify a token store.")

STORES = "stores"
"""Where in a run folder the stores made for it lie."""

Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help='Write one JSON object to FILE, "-" for standard output.')
]


@data_app.command("show")
def show(
    run: Annotated[
        str, typer.Argument(metavar="RUN_OR_RECIPE", help="A run folder, a recipe's name, or a .toml file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, as in stages.0.tokens=120K.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="The step, as metrics.jsonl counts them: from 1.")] = None,
    position: Annotated[int | None, typer.Option(help="A token position of the run, from 0.")] = None,
    width: Annotated[int, typer.Option(help="Characters of text to show at the head of each span.")] = 60,
    json: Json = None,
) -> None:
    """Show the batch of a step, or around a token position, with the documents it came from."""
    from xgen.data.corpora import open_sources, reopen_sources
    from xgen.data.reader import Reader
    from xgen.data.show import as_json, as_text, batch_position, step_position
    from xgen.data.show import show as show_batch
    from xgen.recipe.load import load_recipe
    from xgen.tokens.tokenizer import embedding_rows

    if (step is None) == (position is None):
        raise RecipeError("say which batch to show: either --step N or --position P")
    recipe = load_recipe(run, overrides or (), vocabulary=embedding_rows).recipe
    at = step_position(recipe, step) if step is not None else batch_position(recipe, position or 0)
    if Path(run).is_dir():
        stores, tokenizer = reopen_sources(recipe, Path(run), Path(run) / STORES)
        shown = show_batch(Reader(recipe, stores), at, tokenizer)
    else:
        with tempfile.TemporaryDirectory(prefix="xgen-") as work:
            stores, tokenizer = open_sources(recipe, Path.cwd(), Path(work))
            shown = show_batch(Reader(recipe, stores), at, tokenizer)
    write_json(as_json(shown), json)
    if json != "-":
        typer.echo(as_text(shown, width))


@data_app.command("verify")
def verify(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A token store.")],
    json: Json = None,
) -> None:
    """Compare every file of a token store with the hash it was written with."""
    from xgen.data.store import verify as verify_store

    files: list[dict[str, Any]] = [{"file": name, "whole": whole} for name, whole in verify_store(store)]
    damaged = [file["file"] for file in files if not file["whole"]]
    write_json({"store": str(store), "whole": not damaged, "files": files}, json)
    if damaged:
        raise DataError(
            f"{store} is damaged: {', '.join(damaged)} not as written; copy the store again, or make it anew "
            "with `xgen prepare`"
        )
    if json != "-":
        typer.echo(f"{store} is whole: {len(files)} files as written")
