"""What a resolved recipe looks like to its reader: every value, where it came from, what is to know of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from xgen.recipe.draft import Origin, leaves
from xgen.recipe.keys import field_at, join
from xgen.recipe.load import Resolved, load_recipe
from xgen.recipe.units import format_length, format_tokens
from xgen.recipe.write import recipe_hash, toml_value

_ORIGINS = {
    "given": "given in {}",
    "inherited": "inherited from {}",
    "override": "override on the {}",
    "derived": "derived from {}",
    "default": "default",
}


@dataclass(frozen=True)
class Row:
    """One value of a recipe: `value` as JSON would hold it, `text` as TOML in units."""

    path: str
    value: Any
    text: str
    origin: str
    detail: str
    note: str


def rows(resolved: Resolved) -> list[Row]:
    """Every value of a resolved recipe in the schema's order, its notes beside the values they speak of."""
    recipe = resolved.recipe
    tree = recipe.model_dump()
    tree["stages"] = list(tree["stages"])
    notes = tree.pop("notes")
    return [_row(path, tree, resolved.origins[join(path)], notes) for path in leaves(tree)]


def as_text(resolved: Resolved) -> str:
    """The rows as a plain table: path, value, origin and note."""
    table = rows(resolved)
    paths = max(len(row.path) for row in table)
    values = max(len(row.text) for row in table if len(row.text) <= _WIDEST_VALUE)
    return "\n".join(_line(row, paths, values) for row in table) + "\n"


def as_json(resolved: Resolved) -> dict[str, Any]:
    """The recipe, its hash, and for each value its origin and note, ready for `json.dumps`."""
    return {
        "recipe": resolved.recipe.model_dump(mode="json"),
        "hash": recipe_hash(resolved.recipe),
        "values": [{key: value for key, value in asdict(row).items() if key != "text"} for row in rows(resolved)],
    }


def summary(name: str) -> dict[str, Any]:
    """What a list of recipes says of the shipped recipe `name`, ready for `json.dumps`."""
    recipe = load_recipe(name).recipe
    return {
        "name": recipe.name,
        "description": recipe.description,
        "layers": recipe.model.layers,
        "hidden_size": recipe.model.hidden_size,
        "lengths": [stage.length for stage in recipe.stages],
        "tokens": sum(stage.tokens for stage in recipe.stages),
    }


def summaries_as_text(summaries: list[dict[str, Any]]) -> str:
    """One line for each of `summaries`, in columns."""
    lines = [
        (
            each["name"],
            f"{each['layers']} layers x {each['hidden_size']}",
            " > ".join(format_length(length) for length in each["lengths"]),
            f"{format_tokens(each['tokens'])} tokens",
            each["description"],
        )
        for each in summaries
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines
    )


_WIDEST_VALUE = 34
"""Longer values push their line to the right instead of widening the column for all."""


def _row(path: tuple[str, ...], tree: dict[str, Any], origin: Origin, notes: dict[str, str]) -> Row:
    value: Any = tree
    for part in path:
        value = value[int(part)] if isinstance(value, list) else value[part]
    note = "; ".join(notes[key] for key in _upwards(path) if key in notes)
    plain = list(value) if isinstance(value, tuple) else value
    return Row(join(path), plain, toml_value(field_at(path), value), origin.kind, origin.detail, note)


def _upwards(path: tuple[str, ...]) -> Iterator[str]:
    """The value's own path and those of the tables it stands in: a note may speak of any."""
    for end in range(len(path), 0, -1):
        yield join(path[:end])


def _line(row: Row, paths: int, values: int) -> str:
    note = f"  # {row.note}" if row.note else ""
    return f"{row.path:{paths}}  {row.text:{values}}  {_ORIGINS[row.origin].format(row.detail)}{note}"
