"""Quantities: decimal for tokens, binary for lengths, exact in both directions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xgen.errors import RecipeError
from xgen.recipe.units import UnitError, format_length, format_tokens, parse_length, parse_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("800B", 800_000_000_000),
        ("1.5T", 1_500_000_000_000),
        ("1.1M", 1_100_000),
        ("120K", 120_000),
        ("120k", 120_000),
        ("12_000", 12_000),
        (" 7 M ", 7_000_000),
        ("0", 0),
        (640, 640),
        (1e6, 1_000_000),
    ],
)
def test_tokens_are_decimal(text: object, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    ("text", "tokens"), [("2K", 2048), ("4M", 4_194_304), ("512K", 524_288), ("1.5k", 1536), ("100", 100), (64, 64)]
)
def test_lengths_are_binary(text: object, tokens: int) -> None:
    assert parse_length(text) == tokens


@pytest.mark.parametrize(
    "wrong", ["", "K", "12Q", "1..5M", "-5", "1e6x", "1,000", "5 %", -1, 1.5, "0.0001K", True, None, [1], float("nan"),
              float("inf")],
)  # fmt: skip
@pytest.mark.parametrize("parse", [parse_tokens, parse_length])
def test_what_is_no_quantity_is_named_with_an_example_of_one(parse: object, wrong: object) -> None:
    with pytest.raises(UnitError) as caught:
        parse(wrong)  # type: ignore[operator]
    assert repr(wrong) in str(caught.value)
    assert "K" in str(caught.value).partition("write")[2]


def test_a_length_has_no_billions() -> None:
    with pytest.raises(UnitError, match="'1B' is not a length"):
        parse_length("1B")


def test_unit_errors_are_recipe_errors_and_value_errors() -> None:
    assert issubclass(UnitError, RecipeError)
    assert issubclass(UnitError, ValueError)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(800_000_000_000, "800B"), (1_500_000_000_000, "1.5T"), (2_505_000_000, "2.505B"), (1_204_224, "1_204_224"),
     (12_042, "12_042"), (640, "640"), (0, "0")],
)  # fmt: skip
def test_tokens_are_written_short_where_that_is_exact(tokens: int, text: str) -> None:
    assert format_tokens(tokens) == text


@pytest.mark.parametrize(
    ("tokens", "text"), [(2048, "2K"), (4_194_304, "4M"), (1536, "1.5K"), (2000, "2_000"), (8, "8")]
)
def test_lengths_are_written_short_where_that_is_exact(tokens: int, text: str) -> None:
    assert format_length(tokens) == text


quantities = st.integers(0, 10**16) | st.builds(
    lambda digits, zeros: digits * 10**zeros, st.integers(0, 99_999), st.integers(0, 12)
)


@given(quantities | st.builds(lambda digits, bits: digits << bits, st.integers(0, 99_999), st.integers(0, 30)))
def test_what_is_written_reads_back_exactly(tokens: int) -> None:
    assert parse_tokens(format_tokens(tokens)) == tokens
    assert parse_length(format_length(tokens)) == tokens
