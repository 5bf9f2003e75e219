"""Load a recipe: read its layers, check every value, derive what is left out, check the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xgen.errors import RecipeError
from xgen.recipe.derive import Vocabulary, derive
from xgen.recipe.draft import Origin
from xgen.recipe.layers import read_layers
from xgen.recipe.schema import Recipe
from xgen.recipe.values import Problem, missing_values, parse_values


@dataclass(frozen=True)
class Resolved:
    """A complete recipe and, by dotted path, where each of its values came from."""

    recipe: Recipe
    origins: Mapping[str, Origin]


def load_recipe(
    source: str | Path, overrides: Sequence[str] = (), *, vocabulary: Vocabulary | None = None
) -> Resolved:
    """The recipe `source`: a shipped name, a .toml file, or a run folder; `overrides` are "key=value".

    `vocabulary` gives the embedding rows for a tokenizer's file or folder; it is called only when
    model.vocab_size is not given and the tokenizer is neither "xgen" nor "bpe:N".
    Raises RecipeError with one line for everything that is wrong.
    """
    draft = read_layers(source, overrides)
    problems = parse_values(draft)
    derive(draft, vocabulary)
    problems += missing_values(draft)
    if problems:
        raise RecipeError(_report(source, problems))
    return Resolved(Recipe.model_validate(draft.tree), draft.origins)


def _report(source: str | Path, problems: list[Problem]) -> str:
    if len(problems) == 1:
        return f"recipe {source}: {problems[0]}"
    return "\n  ".join([f"recipe {source} has {len(problems)} problems:", *map(str, problems)])
