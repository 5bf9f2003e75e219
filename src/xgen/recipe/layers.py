"""From files and overrides to one draft: find a recipe, follow its `extends`, lay the overrides on top."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from xgen.errors import RecipeError
from xgen.recipe import draft as drafts
from xgen.recipe.base import Base, lay_base
from xgen.recipe.draft import Draft, Origin, Tree
from xgen.recipe.keys import Shape, field_at, join, section_of, shape_of
from xgen.recipe.schema import Recipe

EXTENDS = "extends"
NOTES = "notes"
IDENTITY = ("name", "description")
"""Keys that say which recipe this is; a recipe that extends another has its own."""

_OVERRIDE = re.compile(r"""((?:[^="']|"[^"]*"|'[^']*')+)=(.*)""", re.DOTALL)
_OPENS_A_VALUE = ("{", "[", '"', "'")


@cache
def shipped_recipes() -> tuple[str, ...]:
    """The names of the recipes that come with the package, smallest model first."""
    folder = resources.files("xgen.recipe") / "shipped"
    names = {entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")}
    return tuple(sorted(names, key=lambda name: (not name.startswith("tiny"), _parameters_in(name), name)))


def read_layers(source: str | Path, overrides: Sequence[str], base: Base | None = None) -> Draft:
    """The draft of the recipe `source` with everything it extends, and at the bottom `base`, below it and `overrides`
    above it."""
    draft = Draft()
    if base is not None:
        lay_base(draft, base)
    chain = _chain(str(source))
    for depth, (label, table) in enumerate(chain):
        own = depth == len(chain) - 1
        if not own:
            table = {key: value for key, value in table.items() if key not in IDENTITY}
        _lay(draft, table, Origin("given" if own else "inherited", label))
    _name_after_file(draft, chain[-1][0])
    for text in overrides:
        path, value = parse_override(text)
        _override(draft, text, path, value)
    return draft


def parse_override(text: str) -> tuple[drafts.Path, Any]:
    """The path and the value of "stages.0.tokens=120K". A bare word is text, all else is TOML.

    Raises RecipeError when `text` is not key=value or its value opens a TOML list, table or string that does not end.
    """
    match = _OVERRIDE.fullmatch(text)
    if match is None:
        raise RecipeError(f"override {text!r} is not key=value; write for example model.heads=8")
    if not match[2].strip():
        raise RecipeError(f"override {text!r} has no value after its =; write for example model.heads=8")
    path, written = _override_path(text, match[1]), match[2].strip()
    value = _override_value(text, written)
    return path, value if isinstance(value, str) or not _takes_text(path) else written


def _parameters_in(name: str) -> float:
    """The size a model's name states, in millions: 125 for "xgen-125m"; 0 when it states none."""
    match = re.search(r"-(\d+)([mb])\b", name)
    return float(match[1]) * (1000 if match[2] == "b" else 1) if match else 0.0


def _chain(source: str) -> list[tuple[str, Tree]]:
    """The recipe and all it extends, as (label, table), the most basic first."""
    chain: list[tuple[str, Tree]] = []
    seen: list[str] = []
    folder: Path | None = None
    wanted: str | None = source
    while wanted is not None:
        label, location = _find(wanted, folder)
        if label in seen:
            raise RecipeError(f"recipe {label} extends itself: {' -> '.join([*seen, label])}; break the circle")
        seen.append(label)
        table = _read(label, location)
        wanted = table.pop(EXTENDS, None)
        if wanted is not None and not isinstance(wanted, str):
            raise RecipeError(f'{label}: extends: {wanted!r} is not a recipe; write a name or a path, as in "tiny"')
        folder = location.parent if isinstance(location, Path) else None
        chain.insert(0, (label, table))
    return chain


def _find(wanted: str, folder: Path | None) -> tuple[str, Any]:
    """The label and the file of the recipe called `wanted`, paths read relative to `folder`."""
    if wanted in shipped_recipes():
        return wanted, resources.files("xgen.recipe") / "shipped" / f"{wanted}.toml"
    path = Path(wanted).expanduser()
    path = folder / path if folder is not None else path
    try:
        if (path / "recipe.toml").is_file():
            path = path / "recipe.toml"
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as cause:
        raise RecipeError(f"recipe {wanted}: cannot be read: {cause.strerror}; check name and permissions") from cause
    if is_file:
        return str(path), path
    if is_folder:
        raise RecipeError(f"folder {path} holds no recipe.toml; name a file, a run folder or one of {_shipped()}")
    if path.suffix == ".toml" or path.name != wanted:
        raise RecipeError(f"there is no recipe file {path}; name a file that exists or one of {_shipped()}")
    longer = [name for name in shipped_recipes() if wanted and name.startswith(wanted)]
    near = longer or difflib.get_close_matches(wanted, shipped_recipes(), n=1)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise RecipeError(f"there is no recipe {wanted!r}; {hint}shipped are {_shipped()}; a file of yours ends in .toml")


def _shipped() -> str:
    return ", ".join(shipped_recipes())


def _read(label: str, location: Any) -> Tree:
    try:
        return tomllib.loads(location.read_text(encoding="utf-8-sig"))  # some editors begin a file with a mark
    except tomllib.TOMLDecodeError as cause:
        raise RecipeError(f'{label}: not TOML: {cause}; text goes in quotes, as in tokens = "800B"') from cause
    except UnicodeDecodeError as cause:
        raise RecipeError(f"{label}: not UTF-8 text at byte {cause.start}; save it as UTF-8") from cause
    except OSError as cause:
        raise RecipeError(f"{label}: cannot be read: {cause.strerror}; check its permissions") from cause


def _lay(draft: Draft, table: Tree, origin: Origin) -> None:
    """Lay `table` over `draft`: sections and notes merge key by key, all else is replaced whole.

    Sources and stages are replaced whole because half of another recipe's corpus or schedule is never meant.
    """
    notes = table.get(NOTES, {})
    for path, value in _units(table, Recipe, ()):
        _put(draft, path, value, origin)
    if isinstance(notes, dict):
        for key, text in notes.items():
            draft.set((NOTES, key), text, origin)
    else:
        draft.set((NOTES,), notes, origin)


def _units(table: Tree, section: Any, path: drafts.Path) -> list[tuple[drafts.Path, Any]]:
    """What of `table` is replaced as one: values, tables of the user's own names, lists."""
    units: list[tuple[drafts.Path, Any]] = []
    for key, value in table.items():
        field = section.model_fields.get(key)
        if (*path, key) == (NOTES,):
            continue
        if field is not None and shape_of(field) is Shape.SECTION and isinstance(value, dict):
            units += _units(value, section_of(field), (*path, key))
        else:
            units.append(((*path, key), value))
    return units


def _put(draft: Draft, path: drafts.Path, value: Any, origin: Origin) -> None:
    """Set a value and drop the notes that spoke of the one it replaces."""
    draft.set(path, value, origin)
    notes = draft.tree.get(NOTES)
    if isinstance(notes, dict):
        stem = join(path)
        for key in [key for key in notes if _within(key, stem) or _within(stem, key)]:
            draft.remove((NOTES, key))


def _within(inner: str, outer: str) -> bool:
    return inner == outer or inner.startswith(f"{outer}.")


def _name_after_file(draft: Draft, label: str) -> None:
    if not draft.has(("name",)):
        draft.set(("name",), Path(label).stem, Origin("derived", f"the name of the file {label}"))


def _override(draft: Draft, text: str, path: drafts.Path, value: Any) -> None:
    if path[0] == EXTENDS:
        raise RecipeError(f"override {text!r}: extends belongs in a recipe file; name that recipe instead of this one")
    if path[-2:-1] == ("mixture",) and not draft.has(path[:-1]):
        sources = draft.get(("data", "sources")) if draft.has(("data", "sources")) else ()
        whole = ", ".join(f"{name} = 1" for name in dict.fromkeys([*sources, path[-1]]))
        raise RecipeError(
            f"override {text!r}: {join(path[:-2])} states no mixture of which one weight could change; "
            f"give it whole, as in {join(path[:-1])}='{{ {whole} }}'"
        )
    try:
        if path[0] == NOTES:
            draft.set(path, value, Origin("override", "command line"))
        else:
            _put(draft, path, value, Origin("override", "command line"))
    except KeyError as cause:
        raise RecipeError(f"override {text!r}: {_missing_part(draft, path)}") from cause


def _missing_part(draft: Draft, path: drafts.Path) -> str:
    """Why nothing can be set at `path`: its first part that is no table and no stage."""
    for end in range(1, len(path) + 1):
        stem = path[:end]
        node = draft.get(stem[:-1])
        if isinstance(node, list):
            if not (path[end - 1].isdecimal() and int(path[end - 1]) < len(node)):
                last = f"0 to {len(node) - 1}" if len(node) > 1 else "0"
                return f"there is no {join(stem)}; stages are numbered from 0, this recipe has {last}"
        elif not isinstance(node, Mapping):
            return f"{join(stem[:-1])} is a value, not a table; it has no key {path[end - 1]!r}"
    return f"there is no {join(path)}"


def _override_path(text: str, key: str) -> drafts.Path:
    try:
        node: Any = tomllib.loads(f"{key.strip()} = 0")
    except tomllib.TOMLDecodeError as cause:
        raise RecipeError(f"override {text!r}: {key!r} is not a key; write for example stages.0.tokens=120K") from cause
    path: list[str] = []
    while isinstance(node, dict):
        if len(node) != 1:
            raise RecipeError(f"override {text!r}: {key!r} is not one key; give one key=value per override")
        [(part, node)] = node.items()
        path.append(part)
    return tuple(path)


def _takes_text(path: drafts.Path) -> bool:
    """Whether the key at `path` holds text, so that stages.0.name=64 needs no quotes within quotes."""
    try:
        return field_at(path).annotation is str
    except KeyError:
        return False


def _override_value(text: str, value: str) -> Any:
    try:
        table = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError as cause:
        if value.startswith(_OPENS_A_VALUE):
            raise RecipeError(
                f"override {text!r}: {value!r} is not a TOML value: {cause}; "
                "text inside a table or a list goes in quotes, as in data.sources={ mine = 'stores/mine' }"
            ) from cause
        return value
    if set(table) != {"value"}:
        raise RecipeError(f"override {text!r} sets more than one key; give one key=value per override")
    return table["value"]
