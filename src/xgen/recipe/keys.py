"""The recipe's keys, read off the schema: which there are, what each holds, which unit it takes.

Everything that walks a recipe (merging, validating, writing, comparing) asks here, so a key added to
the schema is at once known everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cache
from typing import Any, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from xgen.recipe.schema import Recipe, Section
from xgen.recipe.units import format_length, format_tokens, parse_length, parse_tokens

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_FORMATTERS: dict[Any, Callable[[int], str]] = {parse_tokens: format_tokens, parse_length: format_length}


class Shape(Enum):
    """What a key of a section holds."""

    SECTION = "section"
    SECTIONS = "list of sections"
    TABLE = "table of the user's own names"
    VALUE = "value"


def shape_of(field: FieldInfo) -> Shape:
    """The shape of what `field` holds."""
    if _is_section(field.annotation):
        return Shape.SECTION
    if get_origin(field.annotation) is dict:
        return Shape.TABLE
    if get_origin(field.annotation) is tuple and _is_section(get_args(field.annotation)[0]):
        return Shape.SECTIONS
    return Shape.VALUE


def section_of(field: FieldInfo) -> type[Section]:
    """The section class that a field of shape SECTION or SECTIONS holds."""
    annotation: Any = field.annotation
    return annotation if shape_of(field) is Shape.SECTION else get_args(annotation)[0]  # type: ignore[no-any-return]


def formatter_of(field: FieldInfo) -> Callable[[int], str] | None:
    """How a quantity of `field` is written: `format_tokens`, `format_length`, or None for plain values."""
    metadata = list(field.metadata)
    for part in get_args(field.annotation):
        metadata += getattr(part, "__metadata__", ())
    for item in metadata:
        if isinstance(item, BeforeValidator) and item.func in _FORMATTERS:
            return _FORMATTERS[item.func]
    return None


@cache
def recipe_keys() -> tuple[str, ...]:
    """Every key a recipe may have, as dotted paths; a stage's number is written N."""
    return ("extends", *_walk(Recipe, ""))


def join(path: tuple[str, ...]) -> str:
    """The dotted form of `path`, names quoted where TOML would quote them."""
    return ".".join(quote_key(part) for part in path)


def numberless(path: str) -> str:
    """The dotted `path` with the number of a stage written N, as `recipe_keys` writes it."""
    return re.sub(r"^stages\.\d+(?=\.|$)", "stages.N", path)


def field_at(path: tuple[str, ...]) -> FieldInfo:
    """The schema's field for the value at `path`; for a name in a table of the user's own names, the table's."""
    section: type[BaseModel] = Recipe
    parts = iter(path)
    for part in parts:
        field = section.model_fields[part]
        shape = shape_of(field)
        if shape not in (Shape.SECTION, Shape.SECTIONS):
            return field
        section = section_of(field)
        if shape is Shape.SECTIONS:
            next(parts, None)
    raise KeyError(join(path))


def quote_key(name: str) -> str:
    """`name` as a TOML key."""
    return name if _BARE_KEY.fullmatch(name) else quote_text(name)


def quote_text(text: str) -> str:
    """`text` as a TOML basic string on one line."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(escapes.get(c) or (c if c.isprintable() else _unicode_escape(c)) for c in text) + '"'


def _unicode_escape(character: str) -> str:
    return f"\\u{ord(character):04X}" if ord(character) < 0x10000 else f"\\U{ord(character):08X}"


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _walk(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        shape = shape_of(field)
        if shape is Shape.SECTION:
            yield from _walk(section_of(field), f"{prefix}{name}.")
        elif shape is Shape.SECTIONS:
            yield from _walk(section_of(field), f"{prefix}{name}.N.")
        else:
            yield f"{prefix}{name}"
