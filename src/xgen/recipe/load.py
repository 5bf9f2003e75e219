"""Load a recipe: read its layers, check every value, derive what is left out, check the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xgen.errors import RecipeError
from xgen.recipe.base import Base, check_base, fit_rope
from xgen.recipe.check import check_recipe
from xgen.recipe.derive import DERIVED_KEYS, Vocabulary, derive, derive_vocabulary
from xgen.recipe.draft import Draft, Origin
from xgen.recipe.keys import numberless
from xgen.recipe.layers import read_layers, shipped_recipes
from xgen.recipe.schema import Recipe
from xgen.recipe.values import Problem, missing_values, parse_values
from xgen.recipe.write import changed_keys, dump_toml, recipe_hash

__all__ = [
    "Base",
    "Origin",
    "Resolved",
    "Vocabulary",
    "changed_keys",
    "dump_toml",
    "load_recipe",
    "recipe_hash",
    "require_base",
    "shipped_recipes",
]


@dataclass(frozen=True)
class Resolved:
    """A complete recipe and, by dotted path, where each of its values came from."""

    recipe: Recipe
    origins: Mapping[str, Origin]


def load_recipe(
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    vocabulary: Vocabulary | None = None,
    base: Base | None = None,
) -> Resolved:
    """The recipe `source`: a shipped name, a .toml file, or a run folder; `overrides` are "key=value".

    `base` is the model that is continued: it gives all of [model] that the recipe leaves out.

    `vocabulary` gives the embedding rows for a tokenizer's file, or for a token store's folder when the
    tokenizer is "store"; it is called only when model.vocab_size is not given and the tokenizer is neither
    "xgen" nor "bpe:N". Raises RecipeError with a line for everything that is wrong.
    """
    draft = read_layers(source, overrides, base)
    problems = parse_values(draft)
    if base is not None:
        fit_rope(draft, base)
    derive(draft)
    problems += _missing(draft, problems)
    if all(problem.unknown_key for problem in problems):
        problems += derive_vocabulary(draft, vocabulary)
    if not all(problem.unknown_key for problem in problems):
        raise RecipeError(_report(source, problems))
    recipe = Recipe.model_validate(draft.tree)
    problems += check_recipe(recipe, draft.origins, continued=base is not None)
    problems += check_base(recipe, base) if base is not None else ()
    if problems:
        raise RecipeError(_report(source, problems))
    return Resolved(recipe, draft.origins)


def require_base(recipe: Recipe, base: Base) -> None:
    """Raise RecipeError when `recipe` cannot continue the model `base`."""
    if problems := list(check_base(recipe, base)):
        raise RecipeError(_report(recipe.name, problems))


def _missing(draft: Draft, problems: list[Problem]) -> list[Problem]:
    """What is missing, without the keys that a problem already names or that only follow from a missing one."""
    named = [f"{problem.path}." for problem in problems]
    missing = [problem for problem in missing_values(draft) if not f"{problem.path}.".startswith(tuple(named))]
    return [problem for problem in missing if numberless(problem.path) not in DERIVED_KEYS]


def _report(source: str | Path, problems: list[Problem]) -> str:
    if len(problems) == 1:
        return f"recipe {source}: {problems[0]}"
    return "\n  ".join([f"recipe {source} has {len(problems)} problems:", *map(str, problems)])
