"""The reference page speaks of every key."""

import re
from pathlib import Path

import pytest

from xgen.recipe.derive import DERIVED_KEYS
from xgen.recipe.keys import recipe_keys

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "recipes.md"


def rows() -> dict[str, list[str]]:
    """The cells of the page's table rows whose first cell is code, by that code."""
    found: dict[str, list[str]] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
        if line.startswith("| `"):
            assert cells[0].strip("`") not in found, f"two rows for {cells[0]}"
            found[cells[0].strip("`")] = cells[1:]
    return found


def test_every_key_has_its_row_and_every_row_its_key() -> None:
    assert set(rows()) == set(recipe_keys())


@pytest.mark.parametrize("key", recipe_keys())
def test_a_row_says_what_a_key_means_and_what_happens_without_it(key: str) -> None:
    meaning, value, without = rows()[key]
    assert len(meaning) > 10
    assert value
    assert without
    if key in DERIVED_KEYS:
        assert without not in ("required", "default")
