"""`xgen recipe list|show`: which recipes there are, and one of them with the origin of every value."""

from __future__ import annotations

from typing import Annotated

import typer

from xgen.cli.output import write_json
from xgen.recipe.load import Base, load_recipe, shipped_recipes
from xgen.recipe.show import as_json, as_text, summaries_as_text, summary

recipe_app = typer.Typer(no_args_is_help=True, help="List recipes, or show one with the origin of every value.")

Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help='Write one JSON object to FILE, "-" for standard output.')
]


@recipe_app.command("list")
def list_recipes(json: Json = None) -> None:
    """List the recipes that come with XGen."""
    summaries = [summary(name) for name in shipped_recipes()]
    write_json({"recipes": summaries}, json)
    if json != "-":
        typer.echo(summaries_as_text(summaries), nl=False)


@recipe_app.command("show")
def show_recipe(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, a .toml file, or a run folder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, as in stages.0.tokens=120K.")
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="MODEL", help="The model that `xgen train --from` would continue.")
    ] = None,
    json: Json = None,
) -> None:
    """Show a recipe, resolved: every value, and whether it was given, derived (from what) or is a default."""
    resolved = load_recipe(recipe, overrides or (), vocabulary=_vocabulary, base=_base(start))
    write_json(as_json(resolved), json)
    if json != "-":
        typer.echo(as_text(resolved), nl=False)


def _base(start: str | None) -> Base | None:
    if start is None:
        return None
    from xgen.training.start import open_start  # opening models is slow to import and seldom needed

    return open_start(start).base


def _vocabulary(tokenizer: str) -> int:
    from xgen.tokens.tokenizer import embedding_rows  # reading tokenizers is slow to import and seldom needed

    return embedding_rows(tokenizer)
