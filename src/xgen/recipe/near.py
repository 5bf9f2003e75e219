"""Values that would do, near one that does not: for messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isqrt


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    small = [each for each in range(1, isqrt(number) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})


def near(wanted: int, fitting: Iterable[int], written: Callable[[int], str] = str) -> str:
    """The values of `fitting` nearest to `wanted`, up to two below it and two above: "2, 4 or 8"."""
    values = sorted(fitting)
    below = [value for value in values if value < wanted][-2:]
    above = [value for value in values if value > wanted][:2]
    return either([written(value) for value in below + above])


def either(texts: list[str]) -> str:
    """The texts as a choice: "a", "a or b", "a, b or c"."""
    return " or ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
