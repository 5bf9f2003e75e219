"""The house rules: imports run downward only, functions fit a screen, nothing of a machine or registry is committed."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "xgen"

# A room may import rooms of lower floors only. The report reads a run's files and knows the recipe, no room between.
FLOORS = {
    "errors": 0,
    "folders": 0,
    "recipe": 1,
    "tokens": 2,
    "model": 2,
    "checkpoints": 3,
    "data": 3,
    "parallel": 3,
    "convert": 4,
    "measure": 4,
    "infer": 5,
    "training": 5,
    "loaded": 6,
    "planning": 7,
    "report": 6,
    "serve": 7,
    "api": 8,
    "cli": 9,
}
LONGEST_FUNCTION = 60
LONGEST_FILE = 500
FILES = sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (module.split(".")[1] for module in modules if module.startswith("xgen."))


def upward(room: str, imported: str) -> bool:
    return imported != room and FLOORS[imported] >= FLOORS[room]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_downward(path: Path) -> None:
    if path.name == "__init__.py" and path.parent == SOURCE:
        return
    room = room_of(path)
    assert not [other for other in imported_rooms(path) if upward(room, other)]


def test_the_floors_can_catch_an_upward_import() -> None:
    assert upward("model", "data")
    assert upward("tokens", "model")
    assert not upward("training", "model")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_functions_and_files_fit(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < LONGEST_FUNCTION, node.name


def test_nothing_committed_names_a_registry_or_a_machine() -> None:
    if not (ROOT / ".git").exists():
        pytest.fail("run the tests from a git checkout: this one reads what is committed")
    hosts = "|".join(("pypi" + r"\.org", "python" + "hosted", "registry" + r"\.npmjs", "deb" + r"\.debian"))
    found = subprocess.run(
        ["git", "grep", "-nIE", hosts, "--", "."], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.stdout == ""
