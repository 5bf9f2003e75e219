"""Between the plan and the real compiler: who has one, and what its refusals say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from jax.errors import JaxRuntimeError

from xgen.errors import RecipeError
from xgen.model.attention.blocks import Blocks
from xgen.parallel.mesh import Sizes
from xgen.parallel.slices import parse_slice
from xgen.planning import compiler
from xgen.planning.compiler import _told_bytes, require_compiler, the_compiler
from xgen.recipe.load import load_recipe


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


class Unreadable:
    """A compiled step whose text the compiler cannot give."""

    def memory_analysis(self) -> SimpleNamespace:
        sizes = dict.fromkeys(("output_size_in_bytes", "alias_size_in_bytes"), 5)
        return SimpleNamespace(argument_size_in_bytes=10, temp_size_in_bytes=7, **sizes)

    def as_text(self) -> str:
        raise JaxRuntimeError("INTERNAL: RET_CHECK failure (hlo_instruction.cc:390) :\n  stack")


def test_a_program_that_cannot_be_read_still_has_its_memory() -> None:
    facts = compiler._read(Unreadable(), 3.0, Blocks.of(8192, 1), parse_slice("v5p:4x4x4"), [])
    assert (facts.bytes_per_chip, facts.flops, facts.collectives, facts.roofline) == (17, None, None, None)
    assert facts.unread == "INTERNAL: RET_CHECK failure (hlo_instruction.cc:390)"


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise JaxRuntimeError("INTERNAL: no such tile\n  stack")

    monkeypatch.setattr(compiler, "_compile", fail)
    monkeypatch.setattr(compiler, "describe", lambda _: ())
    recipe = load_recipe("xgen-7b-8k").recipe
    with pytest.raises(RecipeError, match=r"stages\.1 \('4k'\) for v4:4x4x4: INTERNAL: no such tile; .*--no-compile"):
        compiler.compile_for_slice(recipe, 1, Sizes(1, 64, 1, 1), parse_slice("v4:4x4x4"))
