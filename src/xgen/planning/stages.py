"""One stage of a plan: what the recipe says of it, what is chosen, whether that fits, and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from xgen.errors import RecipeError
from xgen.model import Spec
from xgen.parallel.mesh import Sizes, sizes
from xgen.parallel.rules import require_even
from xgen.parallel.slices import Slice
from xgen.planning.choice import ALL, REMATS, Choice, Freedom, choices, overrides, with_choice
from xgen.planning.compiled import CompiledFacts, CompileStage, OutOfMemory
from xgen.planning.memory import KINDS, Memory, batch_bytes
from xgen.planning.search import Candidate, candidate, cheapest, executed_flops, mesh_name
from xgen.recipe.draft import Origin
from xgen.recipe.schema import Mesh, Recipe, Stage
from xgen.recipe.units import format_length

TRIES = 3
"""Choices that are given to the compiler, cheapest first, before a stage is said not to fit."""


@dataclass(frozen=True)
class Policy:
    """What one rematerialisation costs, all else as planned."""

    remat: str
    memory: Memory
    fits: bool
    executed_flops: float


@dataclass(frozen=True)
class Planned:
    """What is planned for one stage."""

    stage: Stage
    """With the choice written into it."""
    by: str
    """ "recipe" or "plan": who made the choice."""
    best: Candidate
    fits: bool
    written: Candidate | None
    """The recipe's own choice, None when it cannot be cut evenly on this slice."""
    why_not_written: str
    overrides: tuple[str, ...]
    """What the command needs so that `xgen train` runs the stage as planned."""
    policies: tuple[Policy, ...]
    advice: tuple[str, ...]
    compiled: CompiledFacts | OutOfMemory | None = None

    @property
    def bytes_per_chip(self) -> int:
        said = self.compiled.bytes_per_chip if self.compiled is not None else None
        return self.best.memory.total if said is None else said

    @property
    def by_kind(self) -> dict[str, int]:
        memory = self.best.memory
        if self.bytes_per_chip == memory.total:
            return memory.by_kind
        return compiled_kinds(memory, self.bytes_per_chip, batch_bytes(self.stage, self.best.choice.sizes))


def plan_stage(
    recipe: Recipe, index: int, spec: Spec, on: Slice, free: Freedom, compile_stage: CompileStage | None
) -> Planned:
    """Plan stage `index` of `recipe` on the slice `on`; what is not `free` stays as the recipe says.

    Raises RecipeError when the recipe's own mesh cannot be laid on the slice, or none can.
    """
    stage, place = recipe.stages[index], f"stages.{index}"
    written_sizes = None if free.mesh and _impossible(stage, on) else sizes(stage.mesh, on.chips, f"{place}.mesh")
    base = None if written_sizes is None else Choice(written_sizes, stage.microbatch_tokens, stage.remat)
    why_not = _why_uneven(spec, stage, base, place) if base is not None else _impossible(stage, on)
    if base is not None and why_not and not free.any:
        raise RecipeError(why_not)
    written = None if base is None or why_not else candidate(spec, stage, recipe.optimizer, base, on)
    search_from = base if base is not None else Choice(Sizes(1, 1, 1, 1), stage.microbatch_tokens, stage.remat)
    found = cheapest(spec, stage, recipe.optimizer, on, search_from, free, TRIES if compile_stage else 1)
    if not found and written is not None and written.memory.total <= on.chip.usable_memory:
        found = [written]  # the margin is for what the plan itself proposes
    best, fits = (found[0], True) if found else (_smallest(recipe, index, spec, on, search_from, free), False)
    compiled: CompiledFacts | OutOfMemory | None = None
    if compile_stage is not None:
        best, compiled, fits = _compiled(recipe, index, on, found or [best], compile_stage)
    chosen = best.choice
    return Planned(
        stage=chosen.applied(stage),
        by="recipe" if base is not None and chosen == base else "plan",
        best=best,
        fits=fits,
        written=written,
        why_not_written=why_not,
        overrides=tuple(overrides(index, chosen, stage, written_sizes)),
        policies=_policies(recipe, index, spec, on, chosen),
        advice=() if fits else _advice(recipe, index, spec, on, free, best),
        compiled=compiled,
    )


def freedom(origins: Mapping[str, Origin], index: int) -> Freedom:
    """What stage `index` leaves to the plan: whatever its recipe did not say, but derived or took from a default."""

    def left_out(path: str) -> bool:
        return path not in origins or origins[path].kind in ("derived", "default")

    at = f"stages.{index}"
    mesh = all(left_out(f"{place}.{axis}") for place in (f"{at}.mesh", "mesh") for axis in Mesh.model_fields)
    remat = left_out(f"{at}.remat") and not origins.get(f"{at}.remat", Origin("default")).detail.endswith(".remat")
    return Freedom(mesh, left_out(f"{at}.microbatch_tokens"), remat)


def _impossible(stage: Stage, on: Slice) -> str:
    """Why the recipe's mesh does not have the slice's number of chips; empty when it has."""
    try:
        sizes(stage.mesh, on.chips)
    except RecipeError as error:
        return str(error)
    return ""


def _why_uneven(spec: Spec, stage: Stage, base: Choice, place: str) -> str:
    try:
        require_even(spec.model, stage, base.sizes, place)
    except RecipeError as error:
        return str(error)
    return ""


def _smallest(recipe: Recipe, index: int, spec: Spec, on: Slice, base: Choice, free: Freedom) -> Candidate:
    """The choice that needs least memory, for a stage that does not fit. RecipeError when the slice cannot be cut."""
    stage = recipe.stages[index]
    all_choices = list(choices(spec, stage, base, free, on.chips, on.slices)) or list(
        choices(spec, stage, None, ALL, on.chips, on.slices)
    )
    if not all_choices:
        raise RecipeError(
            f"{on.name}: no mesh of {on.chips} chips cuts stage '{stage.name}' evenly ({stage.sequences} sequences a "
            f"batch, hidden_size {spec.model.hidden_size}, {spec.model.kv_heads} key heads); use "
            f"{_near_chips(spec, stage, on)} chips, or change stages.{index}.batch_tokens"
        )
    every = (candidate(spec, stage, recipe.optimizer, choice, on) for choice in all_choices)
    return min(every, key=lambda one: one.memory.total)


def _near_chips(spec: Spec, stage: Stage, on: Slice) -> str:
    """The numbers of chips below and above the slice's that can be cut evenly."""

    def works(chips: int) -> bool:
        return chips % on.slices == 0 and any(choices(spec, stage, None, ALL, chips, on.slices))

    below = next((chips for chips in range(on.chips - 1, 0, -1) if works(chips)), None)
    above = next((chips for chips in range(on.chips + 1, 2 * on.chips + 1) if works(chips)), None)
    return " or ".join(str(chips) for chips in (below, above) if chips is not None)


def _compiled(
    recipe: Recipe, index: int, on: Slice, found: list[Candidate], compile_stage: CompileStage
) -> tuple[Candidate, CompiledFacts | OutOfMemory, bool]:
    """The first of `found` that the compiler says fits, or the last it refused."""
    for number, one in enumerate(found):
        told = compile_stage(with_choice(recipe, index, one.choice), index, one.choice.sizes, on)
        fits = isinstance(told, CompiledFacts) and told.bytes_per_chip <= on.chip.usable_memory
        if fits or number == len(found) - 1:
            return one, told, fits
    raise AssertionError("there is always a choice to compile")


def _policies(recipe: Recipe, index: int, spec: Spec, on: Slice, chosen: Choice) -> tuple[Policy, ...]:
    stage = recipe.stages[index]
    found = []
    for remat in REMATS:
        one = candidate(spec, stage, recipe.optimizer, replace(chosen, remat=remat), on)
        fits = one.memory.total <= on.chip.usable_memory
        found.append(Policy(remat, one.memory, fits, executed_flops(spec, stage.length, remat)))
    return tuple(found)


def _advice(recipe: Recipe, index: int, spec: Spec, on: Slice, free: Freedom, best: Candidate) -> tuple[str, ...]:
    """What to change on this slice, in words; other slices are the whole plan's business."""
    stage = recipe.stages[index]
    others = cheapest(spec, stage, recipe.optimizer, on, best.choice, ALL) if free != ALL else []
    if others:
        written = None if _impossible(stage, on) else sizes(stage.mesh, on.chips)
        return (f"Stage '{stage.name}' fits with {' '.join(overrides(index, others[0].choice, stage, written))}",)
    always = sum(best.memory.by_kind[kind] for kind in ("parameters", "optimizer", "gradients"))
    if always > on.chip.usable_memory:
        return (
            f"Weights, optimizer and gradients alone take {always / 2**30:.3g} GiB a chip, and a program may take "
            f"{on.chip.usable_memory / 2**30:.3g}: it takes more chips, or chips with more memory.",
        )
    smallest = format_length(best.choice.microbatch_tokens)
    return (
        f"Stage '{stage.name}': no mesh, microbatch and rematerialisation fits; the least memory is that of "
        f"{mesh_name(best.choice.sizes)}, microbatch_tokens {smallest}, remat {best.choice.remat}.",
    )


def compiled_kinds(by_arithmetic: Memory, total: int, batch: int) -> dict[str, int]:
    """The compiler's sum by kind. Weights and optimizer are exact; gradients, and what is kept for the backward pass,
    are taken from the arithmetic as far as the rest of the sum reaches. `batch`: bytes of the batch's tokens."""
    found = {kind: by_arithmetic.by_kind[kind] for kind in ("parameters", "optimizer")}
    rest = max(0, total - sum(found.values()) - batch)
    for kind in ("gradients", "activations"):
        found[kind] = min(by_arithmetic.by_kind[kind], rest)
        rest -= found[kind]
    return {kind: found.get(kind, total - sum(found.values())) for kind in KINDS}
