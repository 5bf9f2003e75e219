"""Each value of a recipe by itself: is its key known, is it of the right kind, does it lie in range."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, get_args

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
    unknown_key: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


def parse_values(draft: Draft) -> list[Problem]:
    """Parse every value of `draft` in place (units become integers) and take out what is wrong, a problem for each."""
    problems = []
    for path, problem in list(_check_section(draft, draft.tree, Recipe, ())):
        origin = draft.origin(path)
        if origin is not None and origin.kind == "inherited":
            problem = replace(problem, text=f"{problem.text} (in {origin.detail})")
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
        yield path, Problem(join(path), f"{_shown(node)} is not a table; its keys are {keys}")
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
        yield (
            path,
            Problem(join(path), f"{_shown(node)} is not a list of stages; write each as a table headed [[stages]]"),
        )
        return
    for index, part in enumerate(node):
        yield from _check_section(draft, part, section, (*path, str(index)))


def _check_table(node: dict[str, Any], key: str, field: FieldInfo, path: Path) -> _Found:
    if not isinstance(node[key], dict):
        example = "{ natural = 1.0, code = 0.5 }" if key == "mixture" else '{ mine = "stores/mine" }'
        yield path, Problem(join(path), f"{_shown(node[key])} is not a table; write {key} = {example}")
        return
    name_type, value_type = get_args(field.annotation)
    for name in list(node[key]):
        yield from _check_value({name: name}, name, _adapter(name_type), (*path, name))
        yield from _check_value(node[key], name, _adapter(value_type), (*path, name))


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
    """An unknown key, with the nearest of its table's keys, else its home elsewhere, else all of the table's."""
    known = [*section.model_fields, *(() if path else ("extends",))]
    near = difflib.get_close_matches(key, known, n=1)
    homes = [home for home in _homes(Recipe, "") if home.rpartition(".")[2] == key]
    table = f"[{join(path)}]" if path else "a recipe"
    if key in _ELSEWHERE:
        remedy = f"did you mean {_ELSEWHERE[key]}?"
    elif near:
        remedy = f"did you mean {join((*path, near[0]))}?"
    elif homes:
        remedy = f"did you mean {' or '.join(homes)}?"
    else:
        remedy = f"the keys of {table} are {', '.join(known)}"
    return Problem(join((*path, key)), f"unknown key; {remedy}", unknown_key=True)


def _homes(section: type[BaseModel], prefix: str) -> Iterator[str]:
    """Every key and section, dotted, of the stages' the first stage's."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if shape_of(field) is Shape.SECTION:
            yield from _homes(section_of(field), f"{prefix}{name}.")
        elif shape_of(field) is Shape.SECTIONS:
            yield from _homes(section_of(field), f"{prefix}{name}.0.")


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
    "int_from_float": lambda _: "is not a whole number; write digits only",
    "int_type": lambda _: "is not a whole number; write digits only, without quotes",
    "float_type": lambda _: "is not a number; write it without quotes",
    "finite_number": lambda _: "is not a finite number",
    "bool_type": lambda _: "is neither true nor false",
    "string_type": lambda _: "is not text; write it in quotes",
    "tuple_type": lambda _: "is not a list; write values in brackets, as in [1, 2]",
    "too_short": lambda ctx: f"has too few values; give at least {ctx['min_length']}",
    "too_long": lambda ctx: f"has too many values; give {ctx['max_length']}",
}


def _in_words(value: Any, cause: ValidationError) -> str:
    """What is wrong with `value`: one sentence, the value first."""
    errors = cause.errors(include_url=False)
    error = errors[0]
    context = error.get("ctx", {})
    if error["loc"] and isinstance(error["loc"][0], str):  # named branches: the one union, Mesh's counts
        return f'{_shown(value)} is neither a whole number above 0 nor "rest"'
    if error["type"] == "value_error":  # raised by our own validators, which name the value
        return str(context["error"])
    if error["type"] == "missing":  # of a list of fixed size, whose places are counted from 0
        return f"{_shown(value)} has too few values; give {int(errors[-1]['loc'][0]) + 1}"
    words = _WORDS[error["type"]](context) if error["type"] in _WORDS else error["msg"]
    return f"{_shown(error['input'])} {words}"


def _shown(value: Any) -> str:
    """`value` as the user wrote it, more or less: TOML's true and brackets instead of Python's."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shown, value))}]"
    return repr(value)


# What other trainers and model files call our keys.
_ELSEWHERE = {
    "lr": "optimizer.learning_rate",
    "max_lr": "optimizer.learning_rate",
    "warmup_steps": "optimizer.warmup",
    "grad_clip": "optimizer.clip",
    "max_grad_norm": "optimizer.clip",
    "batch_size": "stages.0.batch_tokens",
    "micro_batch_size": "stages.0.microbatch_tokens",
    "steps": "stages.0.tokens",
    "max_steps": "stages.0.tokens",
    "seq_len": "stages.0.length",
    "max_length": "stages.0.length",
    "context_length": "stages.0.length",
    "num_hidden_layers": "model.layers",
    "n_layers": "model.layers",
    "num_attention_heads": "model.heads",
    "n_heads": "model.heads",
    "num_key_value_heads": "model.kv_heads",
    "head_dim": "model.head_size",
    "intermediate_size": "model.mlp_size",
    "hidden_dim": "model.hidden_size",
    "hidden_act": "model.activation",
    "rms_norm_eps": "model.norm_epsilon",
    "tie_word_embeddings": "model.tied_embeddings",
}
