"""Each value of a recipe by itself: is its key known, is it of the right kind, does it lie in range."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from xgen.recipe.draft import Draft, Path
from xgen.recipe.keys import Shape, join, section_of, shape_of
from xgen.recipe.schema import Recipe

_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
"""Strict: `heads = "8"` and `heads = true` are mistakes, not eights and ones."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: where, and what with its remedy."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


def parse_values(draft: Draft) -> list[Problem]:
    """Parse every value of `draft` in place (units become integers) and take out what is wrong, a problem for each."""
    problems = []
    for path, problem in list(_check_section(draft, draft.tree, Recipe, ())):
        problems.append(problem)
        if draft.has(path):
            draft.remove(path)
    return problems


def missing_values(draft: Draft) -> list[Problem]:
    """A problem for every key that a complete recipe needs and `draft` lacks."""
    return list(_missing(draft, Recipe, ()))


_Found = Iterator[tuple[Path, Problem]]


def _check_section(draft: Draft, node: Any, section: type[BaseModel], path: Path) -> _Found:
    if not isinstance(node, dict):
        keys = ", ".join(section.model_fields)
        yield path, Problem(join(path), f"{node!r} is not a table; its keys are {keys}")
        return
    for key in list(node):
        here = (*path, key)
        if key not in section.model_fields:
            yield here, _unknown(key, section, path)
            continue
        field, value = section.model_fields[key], node[key]
        match shape_of(field):
            case Shape.SECTION:
                yield from _check_section(draft, value, section_of(field), here)
            case Shape.SECTIONS:
                yield from _check_sections(draft, value, section_of(field), here)
            case Shape.TABLE:
                yield from _check_table(node, key, field, here)
            case Shape.VALUE:
                yield from _check_value(node, key, _adapter_of(field), here)


def _check_sections(draft: Draft, node: Any, section: type[BaseModel], path: Path) -> _Found:
    if not isinstance(node, list) or not node or not all(isinstance(part, dict) for part in node):
        yield path, Problem(join(path), f"{node!r} is not a list of stages; write each as a table headed [[stages]]")
        return
    for index, part in enumerate(node):
        yield from _check_section(draft, part, section, (*path, str(index)))


def _check_table(node: dict[str, Any], key: str, field: FieldInfo, path: Path) -> _Found:
    if not isinstance(node[key], dict):
        example = "{ natural = 1.0, code = 0.5 }" if key == "mixture" else '{ mine = "stores/mine" }'
        yield path, Problem(join(path), f"{node[key]!r} is not a table; write {key} = {example}")
        return
    adapter = _adapter(get_args(field.annotation)[1])
    for name in list(node[key]):
        yield from _check_value(node[key], name, adapter, (*path, name))


def _check_value(node: dict[str, Any], key: str, adapter: TypeAdapter[Any], path: Path) -> _Found:
    value = tuple(node[key]) if isinstance(node[key], list) else node[key]
    try:
        node[key] = adapter.validate_python(value)
    except ValidationError as cause:
        yield path, Problem(join(path), _in_words(node[key], cause))


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=_STRICT)


def _adapter_of(field: FieldInfo) -> TypeAdapter[Any]:
    annotation: Any = field.annotation
    return _adapter(Annotated[annotation, *field.metadata] if field.metadata else annotation)


def _unknown(key: str, section: type[BaseModel], path: Path) -> Problem:
    """An unknown key, with the nearest of its table's keys, else the nearest anywhere, else all of the table's."""
    near = difflib.get_close_matches(key, section.model_fields, n=1, cutoff=0.6)
    if near:
        return Problem(join((*path, key)), f"unknown key; did you mean {join((*path, near[0]))}?")
    elsewhere = [place for place in _homes(Recipe, "") if place.rpartition(".")[2] == key]
    if elsewhere:
        return Problem(join((*path, key)), f"unknown key; {key} belongs at {' or '.join(elsewhere)}")
    table = f"[{join(path)}]" if path else "a recipe"
    return Problem(join((*path, key)), f"unknown key; the keys of {table} are {', '.join(section.model_fields)}")


def _homes(section: type[BaseModel], prefix: str) -> Iterator[str]:
    """Every key and section, dotted, a stage's number written N."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if shape_of(field) is Shape.SECTION:
            yield from _homes(section_of(field), f"{prefix}{name}.")
        elif shape_of(field) is Shape.SECTIONS:
            yield from _homes(section_of(field), f"{prefix}{name}.N.")


def _missing(draft: Draft, section: type[BaseModel], path: Path) -> Iterator[Problem]:
    for name, field in section.model_fields.items():
        here = (*path, name)
        shape = shape_of(field)
        if shape is Shape.SECTION:
            yield from _missing(draft, section_of(field), here)
        elif not draft.has(here) and field.is_required():
            yield Problem(join(here), _HOW_TO_GIVE.get(here[-1], "is missing and cannot be derived; give it a value"))
        elif shape is Shape.SECTIONS:
            for index in range(len(draft.get(here))):
                yield from _missing(draft, section_of(field), (*here, str(index)))


_HOW_TO_GIVE = {
    "stages": "is missing; a recipe needs at least one [[stages]] with name, length, tokens and batch_tokens",
    "sources": 'is missing; say where the documents are, as in sources = { mine = "stores/mine" }',
    "batch_tokens": 'is missing; give the tokens of one optimizer step, as in batch_tokens = "512K"',
    "length": 'is missing; give the tokens of one sequence, as in length = "2K"',
    "tokens": 'is missing; give the tokens to train on, as in tokens = "10B"',
    "learning_rate": "is missing; give the peak rate, as in learning_rate = 3e-4",
}


# Pydantic's error types, in our words. Each takes what the error says of itself (its `ctx`).
_WORDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "literal_error": lambda ctx: f"is none of {ctx['expected'].replace(' or ', ', ')}",
    "greater_than": lambda ctx: f"is not above {ctx['gt']:g}; give a larger number",
    "greater_than_equal": lambda ctx: f"is below {ctx['ge']:g}; give at least that",
    "less_than": lambda ctx: f"is not below {ctx['lt']:g}; give a smaller number",
    "less_than_equal": lambda ctx: f"is above {ctx['le']:g}; give at most that",
    "int_type": lambda _: "is not a whole number; write it without quotes or a fraction",
    "float_type": lambda _: "is not a number; write it without quotes",
    "finite_number": lambda _: "is not a finite number",
    "bool_type": lambda _: "is neither true nor false",
    "string_type": lambda _: "is not text; write it in quotes",
    "tuple_type": lambda _: "is not a list; write values in brackets, as in [1, 2]",
    "missing": lambda _: "has too few values",
    "too_short": lambda ctx: f"has too few values; give at least {ctx['min_length']}",
    "too_long": lambda ctx: f"has too many values; give {ctx['max_length']}",
    "value_error": lambda ctx: str(ctx["error"]),
}


def _in_words(value: Any, cause: ValidationError) -> str:
    """What is wrong with `value`: one sentence, the value first."""
    errors = cause.errors(include_url=False)
    if len({error["loc"][0] for error in errors if error["loc"]}) > 1 and get_origin(type(value)) is None:
        return f"{value!r} is neither a whole number above 0 nor \"rest\""
    error = errors[0]
    words = _WORDS.get(error["type"], lambda _: error["msg"])(error.get("ctx", {}))
    if error["type"] == "value_error":
        return words
    return f"{error['input']!r} {words}" if error["type"] != "missing" else f"{value!r} {words}"
