"""Units of recipes: counts of tokens are decimal ("800B"), lengths and batches binary ("2K" is 2048).

Both follow the field's speech: nobody means 8 192 000 000 by "8B tokens", nor 2000 by "a 2K context".
"""

from __future__ import annotations

import re
from fractions import Fraction

from xgen.errors import RecipeError

TOKEN_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
LENGTH_UNITS = {"": 1, "K": 2**10, "M": 2**20}

_QUANTITY = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)")


class UnitError(RecipeError, ValueError):
    """A quantity that cannot be read. Also a ValueError, which is how pydantic collects it."""


def parse_tokens(value: object) -> int:
    """Tokens from an integer or text in decimal units: "800B", "1.5M", "120_000".

    Raises UnitError for anything that is not a whole number of tokens, zero or more.
    """
    return _parse(value, TOKEN_UNITS, "a count of tokens", '120000, "120K", "1.5M", "8B" or "1T" (decimal units)')


def parse_length(value: object) -> int:
    """Tokens of a sequence or a batch from an integer or text in binary units: "2K" is 2048, "4M" is 4 194 304.

    Raises UnitError for anything that is not a whole number of tokens, zero or more.
    """
    return _parse(value, LENGTH_UNITS, "a length in tokens", '512, "2K" (2048) or "4M" (4194304; binary units)')


def format_tokens(tokens: int) -> str:
    """Text that `parse_tokens` reads back to exactly `tokens`: in the largest unit if that is short, else in full."""
    return _format(tokens, TOKEN_UNITS)


def format_length(tokens: int) -> str:
    """Text that `parse_length` reads back to exactly `tokens`: in the largest unit if that is short, else in full."""
    return _format(tokens, LENGTH_UNITS)


def _parse(value: object, units: dict[str, int], what: str, examples: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise UnitError(f"{value!r} is not {what}; write {examples}")
    if isinstance(value, str):
        amount = _amount(value, units)
    else:
        amount = Fraction(value) if value == value and abs(value) != float("inf") else None
    if amount is None:
        raise UnitError(f"{value!r} is not {what}; write {examples}")
    if amount < 0 or amount.denominator != 1:
        raise UnitError(f"{value!r} is not a whole number of tokens, zero or more; write {examples}")
    return int(amount)


def _amount(text: str, units: dict[str, int]) -> Fraction | None:
    match = _QUANTITY.fullmatch(text.strip())
    if match is None or match[2].upper() not in units:
        return None
    return Fraction(match[1].replace("_", "")) * units[match[2].upper()]


def _format(tokens: int, units: dict[str, int]) -> str:
    in_full = f"{tokens:_}"
    unit, size = max((item for item in units.items() if item[1] <= max(1, tokens)), key=lambda item: item[1])
    thousandths = Fraction(tokens, size) * 1000
    if not unit or thousandths.denominator != 1:  # more than three decimals are harder to read than the digits
        return in_full
    short = f"{int(thousandths) // 1000}.{int(thousandths) % 1000:03d}".rstrip("0").rstrip(".") + unit
    return short if len(short) < len(in_full) else in_full
