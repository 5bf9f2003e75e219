"""A complete recipe written down again: as TOML, as a hash, as the keys in which two recipes differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from xgen.recipe.draft import leaves
from xgen.recipe.keys import Shape, formatter_of, join, quote_key, quote_text, shape_of
from xgen.recipe.schema import Recipe


def dump_toml(recipe: Recipe) -> str:
    """Every value of `recipe` as TOML that `load_recipe` reads back to an equal recipe. A stage's mesh that is [mesh]'s
    is left out: so it goes on following that, also when a resume changes it."""
    top: list[str] = []
    tables: list[str] = []
    for name, field in Recipe.model_fields.items():
        value = getattr(recipe, name)
        match shape_of(field):
            case Shape.SECTION:
                tables += ["", f"[{name}]", *_lines(value)]
            case Shape.SECTIONS:
                for section in value:
                    left_out = {"mesh"} if getattr(section, "mesh", None) == recipe.mesh else set()
                    tables += ["", f"[[{name}]]", *_lines(section, left_out)]
            case Shape.TABLE if value:
                pairs = (f"{quote_key(key)} = {toml_value(field, part)}" for key, part in value.items())
                tables += ["", f"[{name}]", *pairs]
            case Shape.VALUE:
                top.append(f"{name} = {toml_value(field, value)}")
    return "\n".join([*top, *tables]) + "\n"


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256, in hex, of the recipe's values as canonical JSON."""
    values = recipe.model_dump(mode="json")
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def changed_keys(old: Recipe, new: Recipe) -> list[str]:
    """Dotted paths of the values that differ between two recipes or that only one of them has, in schema order."""
    before, after = _flat(old), _flat(new)
    absent = object()
    return [path for path in {**before, **after} if before.get(path, absent) != after.get(path, absent)]


def toml_value(field: FieldInfo, value: Any) -> str:
    """`value` of `field` as TOML on one line; quantities in their units, exactly."""
    if isinstance(value, BaseModel):
        return "{ " + ", ".join(_lines(value)) + " }"
    if isinstance(value, dict):
        pairs = (f"{quote_key(key)} = {toml_value(field, part)}" for key, part in value.items())
        return "{ " + ", ".join(pairs) + " }"
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(field, part) for part in value) + "]"
    if isinstance(value, str):
        return quote_text(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    formatter = formatter_of(field)
    if formatter is None or isinstance(value, float):
        return repr(value)
    text = formatter(value)
    return quote_text(text) if text[-1].isalpha() else text


def _lines(section: BaseModel, left_out: Collection[str] = ()) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        if name not in left_out:
            yield f"{name} = {toml_value(field, getattr(section, name))}"


def _flat(recipe: Recipe) -> dict[str, Any]:
    tree = recipe.model_dump(mode="json")
    flat: dict[str, Any] = {}
    for path in leaves(tree):
        node: Any = tree
        for part in path:
            node = node[int(part)] if isinstance(node, list) else node[part]
        flat[join(path)] = node
    return flat
