"""A recipe in the making: the table as written so far, and where each of its values came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from xgen.recipe.keys import join

Path = tuple[str, ...]
Tree = dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """Where a value came from. `detail` names the file, the keys it was derived from, or is empty for a default."""

    kind: Literal["given", "override", "derived", "default", "inherited"]
    detail: str = ""


@dataclass
class Draft:
    """Nested tables, with the stages as a list of tables, and the origin of every value by its dotted path."""

    tree: Tree = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)

    def has(self, path: Path) -> bool:
        """Whether anything stands at `path`."""
        try:
            self.get(path)
        except KeyError:
            return False
        return True

    def get(self, path: Path) -> Any:
        """What stands at `path`; KeyError when nothing does."""
        node: Any = self.tree
        for part in path:
            node = _child(node, part)
        return node

    def set(self, path: Path, value: Any, origin: Origin) -> None:
        """Put `value` at `path`, replacing what was there, and note `origin` for each value in it.

        KeyError when a part of `path` before the last is not a table or a stage that exists.
        """
        node: Any = self.tree
        for part in path[:-1]:
            if isinstance(node, dict):
                node.setdefault(part, {})
            node = _child(node, part)
        if isinstance(node, list):
            _child(node, path[-1])
            node[int(path[-1])] = value
        elif isinstance(node, dict):
            node[path[-1]] = value
        else:
            raise KeyError(join(path))
        self._forget(path)
        self.origins.update({join(leaf): origin for leaf in leaves(value, path)})

    def origin(self, path: Path) -> Origin | None:
        """The origin of the value at `path`, or of the first value of the table there; None without either."""
        stem = join(path)
        return next((self.origins[key] for key in self.origins if key == stem or key.startswith(f"{stem}.")), None)

    def remove(self, path: Path) -> None:
        """Take away what stands at `path`."""
        del self.get(path[:-1])[path[-1]]
        self._forget(path)

    def _forget(self, path: Path) -> None:
        stem = join(path)
        for key in [key for key in self.origins if key == stem or key.startswith(f"{stem}.")]:
            del self.origins[key]


def leaves(value: Any, path: Path = ()) -> list[Path]:
    """The paths of all values in `value`, which stands at `path`: neither tables nor lists of tables."""
    if isinstance(value, dict):
        return [leaf for key, part in value.items() for leaf in leaves(part, (*path, key))]
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return [leaf for index, part in enumerate(value) for leaf in leaves(part, (*path, str(index)))]
    return [path]


def _child(node: Any, part: str) -> Any:
    if isinstance(node, dict):
        return node[part]
    if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
        return node[int(part)]
    raise KeyError(part)
