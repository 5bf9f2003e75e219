"""The real TPU compiler, where it is installed: it takes a stage's step on any machine, without a TPU."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from xgen.errors import RecipeError
from xgen.model.attention.blocks import Blocks
from xgen.parallel.mesh import Sizes
from xgen.parallel.slices import CHIPS, Slice
from xgen.parallel.topology import available, describe, places
from xgen.planning.compiled import CompiledFacts, CompileStage, OutOfMemory
from xgen.recipe.schema import Recipe

if TYPE_CHECKING:
    from xgen.parallel.hlo import Collective

LARGEST = 8
"""Temporaries that a plan names."""

_USED = re.compile(r"Used ([0-9.]+)([KMG]) of [0-9.]+[KMG] hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def require_compiler(on: Slice) -> None:
    """Raise RecipeError when a plan for `on` cannot have the compiler's figures."""
    if not on.compiles:
        kinds = ", ".join(name for name, chip in CHIPS.items() if chip.topology is not None)
        raise RecipeError(f"--compile: no compiler for {on.kind} runs without one, only for {kinds}; leave it out")
    if on.chips == 1:
        raise RecipeError(f"--compile: {on.name} is a single chip, which is planned by arithmetic; leave it out")
    if not available():
        raise RecipeError("--compile: the TPU compiler is not installed; pip install 'xgen[tpu]', or leave it out")


def the_compiler(on: Slice) -> CompileStage | None:
    """The compiler of stages for `on`, or None where there is none; the plan says which it had.

    On a single chip there is no mesh to compile for: such a program is always for the machine at hand.
    """
    return compile_for_slice if on.compiles and on.chips > 1 and available() else None


def compile_for_slice(recipe: Recipe, index: int, sizes: Sizes, on: Slice) -> CompiledFacts | OutOfMemory:
    """Compile the stage's step, the very one that `xgen train` runs, for the slice's chips, and read the program."""
    import jax
    from jax.errors import JaxRuntimeError

    jax.config.update("jax_platforms", "cpu")  # a real TPU is not looked for; refused by JAX once it has one
    devices = describe(on)
    begin = time.perf_counter()
    try:
        compiled, ordered = _compile(recipe, index, sizes, devices)
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise RecipeError(
                f"--compile: the TPU compiler failed on stages.{index} ('{recipe.stages[index].name}') for {on.name}: "
                f"{_first_line(error)}; plan it by arithmetic with --no-compile"
            ) from error
        return OutOfMemory(_told_bytes(str(error)), time.perf_counter() - begin)
    blocks = Blocks.of(recipe.stages[index].length // sizes.context, sizes.context)
    return _read(compiled, time.perf_counter() - begin, blocks, on, ordered)


def _compile(recipe: Recipe, index: int, sizes: Sizes, devices: tuple[Any, ...]) -> tuple[Any, list[Any]]:
    from xgen.model import Spec
    from xgen.parallel.program import Layout
    from xgen.training import optimizer
    from xgen.training.state import abstract_state
    from xgen.training.step import compile_step

    spec, layout = Spec(recipe.model, recipe.model.vocab_size, recipe.compute), Layout(sizes, devices)
    change = optimizer.build(recipe.optimizer)
    state = abstract_state(spec, change, layout)
    compiled = compile_step(spec, recipe.stages[index], recipe.optimizer, change, state, layout)
    return compiled, list(layout.mesh.devices.flat)


def _read(compiled: Any, seconds: float, blocks: Blocks, on: Slice, ordered: list[Any]) -> CompiledFacts:
    from jax.errors import JaxRuntimeError

    from xgen.parallel.hlo import read_work, splash
    from xgen.parallel.roofline import roofline

    memory = compiled.memory_analysis()
    facts = CompiledFacts(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        compile_seconds=seconds,
        flops=None,
        collectives=None,
    )
    try:
        text = compiled.as_text()
    except JaxRuntimeError as error:  # seen of libtpu 0.0.52 for v5p, with exchanges in several parts
        return replace(facts, unread=_first_line(error))
    work = read_work(text, splash(blocks.products))
    return replace(
        facts,
        flops=work.flops,
        collectives=_by_kind(work.collectives),
        largest_temporaries=tuple((buffer.shape, buffer.bytes) for buffer in work.buffers[:LARGEST]),
        roofline=roofline(work, on, places(ordered)),
    )


def _by_kind(collectives: Sequence[Collective]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for one in collectives:
        sums = found.setdefault(one.kind, {"count": 0, "bytes": 0, "sent": 0})
        sums["count"] += one.count
        sums["bytes"] += one.bytes
        sums["sent"] += round(one.sent)
    return found


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(" :")


def _told_bytes(error: str) -> int | None:
    """What the step would need, as libtpu says when it refuses it."""
    found = _USED.search(error)
    return round(float(found[1]) * _UNITS[found[2]]) if found is not None else None
