"""Between the plan and the real compiler: who has one, and what its refusals say."""

from __future__ import annotations

import pytest

from xgen.errors import RecipeError
from xgen.parallel.slices import parse_slice
from xgen.planning import compiler
from xgen.planning.compiler import _told_bytes, _visible, require_compiler, the_compiler


@pytest.mark.parametrize(
    ("on", "there", "told"),
    [("h100:8", True, "no compiler for h100"), ("v5e:1x1", True, "single chip"), ("v4:2x2x1", False, "not installed")],
)
def test_where_there_is_no_compiler(on: str, there: bool, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "available", lambda: there)
    assert the_compiler(parse_slice(on)) is None
    with pytest.raises(RecipeError, match=told):
        require_compiler(parse_slice(on))


def test_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "available", lambda: True)
    require_compiler(parse_slice("v4:2x2x1"))
    assert the_compiler(parse_slice("v4:2x2x1")) is not None


def test_a_refusal_says_how_much_it_would_take() -> None:
    said = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 63.80G of 30.75G hbm. Exceeded hbm capacity by 33.05G."
    )
    assert _told_bytes(said) == pytest.approx(63.8 * 2**30)
    assert _told_bytes("RESOURCE_EXHAUSTED: vmem") is None


def test_whole_blocks_up_to_the_diagonal_are_computed() -> None:
    assert _visible(8192) == sum(range(1, 17)) * 512**2 / 8192**2
    assert _visible(256) == 1.0
