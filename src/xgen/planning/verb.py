"""The plan as users ask for it: by a recipe's name, with the compiler when it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from xgen.parallel.mesh import Sizes
from xgen.parallel.slices import Slice, parse_slice
from xgen.planning.compiled import CompiledFacts, CompileStage, OutOfMemory
from xgen.planning.compiler import require_compiler, the_compiler
from xgen.planning.make import plan_recipe
from xgen.planning.words import mesh
from xgen.recipe.load import Base, load_recipe
from xgen.recipe.schema import Recipe


def plan(
    recipe: str | Path | Recipe,
    *,
    on: str,
    overrides: Iterable[str] = (),
    start: str | Path | None = None,
    compiler: bool | None = None,
    report: Callable[[str], None] | None = None,
    **assumptions: float | None,
) -> dict[str, Any]:
    """What `recipe` (a shipped name, a file, or a `Recipe`) needs and costs on the slice `on`, as "v4:8x8x8".

    What a named recipe leaves out, mesh, microbatch_tokens and remat, the plan chooses; a `Recipe` is taken as it is.
    `compiler`: ask the real one; None asks it when it is installed. `report` is told what is being waited for.
    `assumptions`: utilisation, price, power, pue, grid. Returns what `xgen plan --json` writes
    (docs/plan-a-pod.md). Raises RecipeError.
    """
    where = parse_slice(on)
    compile_stage = _compiler(where, compiler, report or (lambda _: None))
    if isinstance(recipe, Recipe):
        return plan_recipe(recipe, where, assumptions=assumptions, compile_stage=compile_stage)
    from xgen.tokens.tokenizer import embedding_rows  # reading tokenizers is slow to import

    wanted = tuple(overrides)
    found = load_recipe(recipe, wanted, vocabulary=embedding_rows, base=_base(start))
    command = [str(recipe), *wanted, *(["--from", str(start)] if start is not None else [])]
    return plan_recipe(
        found.recipe,
        where,
        origins=found.origins,
        assumptions=assumptions,
        compile_stage=compile_stage,
        command=command,
    )


def _compiler(on: Slice, wanted: bool | None, report: Callable[[str], None]) -> CompileStage | None:
    if wanted:
        require_compiler(on)
    found = the_compiler(on) if wanted is not False else None
    if found is None:
        return None
    asked = found

    def compile_stage(recipe: Recipe, index: int, sizes: Sizes, on: Slice) -> CompiledFacts | OutOfMemory:
        stage = recipe.stages[index]
        report(f"compiling stage {stage.name} for {on.name}: {mesh(sizes._asdict())}, remat {stage.remat}")
        return asked(recipe, index, sizes, on)

    return compile_stage


def _base(start: str | Path | None) -> Base | None:
    if start is None:
        return None
    from xgen.training.start import open_start

    return open_start(start).base
