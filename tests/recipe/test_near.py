"""Values that would do, as a message names them."""

from __future__ import annotations

import pytest

from xgen.recipe.near import divisors, either, near


@pytest.mark.parametrize("number", [1, 2, 12, 97, 3600])
def test_divisors(number: int) -> None:
    assert divisors(number) == [each for each in range(1, number + 1) if number % each == 0]


@pytest.mark.parametrize(
    ("wanted", "told"), [(3, "1, 2, 4 or 6"), (0, "1 or 2"), (100, "6 or 12"), (4, "2, 3, 6 or 12")]
)
def test_two_below_and_two_above(wanted: int, told: str) -> None:
    assert near(wanted, divisors(12)) == told
    assert near(3, [], str) == ""


def test_a_choice() -> None:
    assert [either(texts) for texts in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a or b", "a, b or c"]
