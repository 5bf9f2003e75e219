"""The plan of a whole recipe on a slice: every stage, the sum, what was assumed, and what to change."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from xgen.model import Spec, parameter_count
from xgen.model.flops import flops_per_token
from xgen.parallel.slices import Slice, ladder, parse_slice
from xgen.planning.assumptions import NOTHING, Cost, assume, cost
from xgen.planning.choice import stated
from xgen.planning.compiled import CompiledFacts, CompileStage
from xgen.planning.search import executed_flops, fits_somewhere
from xgen.planning.stages import Planned, freedom, plan_stage
from xgen.recipe.draft import Origin
from xgen.recipe.schema import Recipe


def plan_recipe(
    recipe: Recipe,
    on: str | Slice,
    *,
    origins: Mapping[str, Origin] | None = None,
    assumptions: Mapping[str, float | None] | None = None,
    compile_stage: CompileStage | None = None,
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What `recipe` needs and costs on the slice `on`, ready for `json.dumps` (docs/plan-a-pod.md lists its keys).

    `origins` tell what the recipe states from what it leaves to the plan; without them all of it is stated.
    `assumptions` change defaults by name: utilisation, price (dollars a chip-hour), power (watts a chip), pue, grid (kg
    CO2 a kWh). With `compile_stage` memory, FLOPs and collectives are the compiler's. `command`: the words that name
    the recipe after `xgen train`. Raises RecipeError for an unknown slice, an impossible assumption, and a mesh that
    cannot be laid on the slice.
    """
    where = parse_slice(on) if isinstance(on, str) else on
    by = assume(where, dict(assumptions or {}))
    spec = Spec(recipe.model, recipe.model.vocab_size, recipe.compute)
    given = origins if origins is not None else _all_given(recipe)
    stages = _stated_after(
        [
            plan_stage(recipe, index, spec, where, freedom(given, index), compile_stage)
            for index in range(len(recipe.stages))
        ]
    )
    costs = [cost(one.stage.spent * flops_per_token(spec, one.stage.length), where, by) for one in stages]
    total = sum(costs, NOTHING)
    fits = all(one.fits for one in stages)
    changes = [text for one in stages for text in one.overrides]
    return {
        "recipe": recipe.name,
        "slice": where.name,
        "chips": where.chips,
        "parameters": parameter_count(spec),
        "stages": [_stage(one, each, spec, where) for one, each in zip(stages, costs, strict=True)],
        "total": {
            "fits": fits,
            "tokens": recipe.total_tokens,
            "steps": sum(one.stage.steps for one in stages),
            "flops": sum(one.stage.spent * flops_per_token(spec, one.stage.length) for one in stages),
            "compile_seconds": _compile_seconds(stages),
            **vars(total),
        },
        "assumptions": by.values(),
        "assumption_sources": by.sources(),
        "proposals": changes,
        "command": shlex.join(["xgen", "train", *(command or [recipe.name]), *changes, "--run", "DIR"])
        if fits
        else None,
        "smallest_slice": _smallest_slice(spec, recipe, where),
        "notes": _notes(stages, costs, where, compile_stage is not None),
    }


def _all_given(recipe: Recipe) -> dict[str, Origin]:
    """Origins for a recipe that was built in Python: every value is its author's."""
    given = Origin("given", "the recipe")
    keys = ("microbatch_tokens", "remat", "mesh.replica", "mesh.fsdp", "mesh.context", "mesh.tensor")
    return {f"stages.{index}.{key}": given for index in range(len(recipe.stages)) for key in keys}


def _stated_after(stages: list[Planned]) -> list[Planned]:
    """A stage that leaves a key out takes it from the one before: where that one's is changed, the later ones state
    their own, so that all are run as they were planned."""
    found, changed = [], set[str]()
    for index, one in enumerate(stages):
        keys = stated(index, one.best.choice)
        changed |= {key for key, texts in keys.items() if set(texts) & set(one.overrides)}
        found.append(replace(one, overrides=tuple(text for key in keys if key in changed for text in keys[key])))
    return found


def _stage(one: Planned, each: Cost, spec: Spec, on: Slice) -> dict[str, Any]:
    stage, told = one.stage, one.compiled
    facts = told if isinstance(told, CompiledFacts) else None
    flops = flops_per_token(spec, stage.length)
    return {
        "name": stage.name,
        "length": stage.length,
        "tokens": stage.spent,
        "tokens_per_step": stage.batch_tokens,
        "steps": stage.steps,
        "flops_per_token": flops,
        "executed_flops_per_token": executed_flops(spec, stage.length, stage.remat),
        "mesh": one.best.choice.sizes._asdict(),
        "microbatch_tokens": stage.microbatch_tokens,
        "rematerialisation": stage.remat,
        "chosen_by": one.by,
        "overrides": list(one.overrides),
        "fits": one.fits,
        "bytes_per_chip": one.bytes_per_chip,
        "limit_bytes_per_chip": on.chip.usable_memory,
        "bytes_by_kind": one.by_kind,
        "source": "arithmetic" if told is None else "compiler",
        "arithmetic_bytes_per_chip": one.best.memory.total,
        "worst_moment": one.best.memory.moment,
        "compile_seconds": None if told is None else told.compile_seconds,
        "collectives": None
        if facts is None or facts.collectives is None
        else {kind: dict(each) for kind, each in facts.collectives.items()},
        "largest_temporaries": None
        if facts is None or facts.collectives is None
        else [{"shape": shape, "bytes": size} for shape, size in facts.largest_temporaries],
        "roofline": _roofline(facts, stage.batch_tokens * flops / on.chips),
        "as_written": _written(one, on),
        "policies": [
            {
                "rematerialisation": policy.remat,
                "bytes_per_chip": policy.memory.total,
                "fits": policy.fits,
                "executed_flops_per_token": policy.executed_flops,
                "flops_over_model": policy.executed_flops / flops,
            }
            for policy in one.policies
        ],
        "advice": list(one.advice),
        **vars(each),
    }


def _roofline(facts: CompiledFacts | None, model_flops: float) -> dict[str, Any] | None:
    """The compiled program's least time; `flops_over_model`: what it computes beyond the model's FLOPs."""
    if facts is None or facts.roofline is None or facts.flops is None:
        return None
    line = facts.roofline
    return {
        "seconds": line.seconds,
        "serial_seconds": line.serial_seconds,
        "bound": line.bound,
        "parts": line.parts,
        "flops": facts.flops,
        "flops_over_model": facts.flops / model_flops,
    }


def _written(one: Planned, on: Slice) -> dict[str, Any]:
    """The recipe's own choice beside the plan's."""
    if one.written is None:
        return {"fits": False, "reason": one.why_not_written, "bytes_per_chip": None, "mesh": None}
    choice, memory = one.written.choice, one.written.memory
    return {
        "fits": memory.total <= on.chip.usable_memory,
        "reason": "",
        "bytes_per_chip": memory.total,
        "mesh": choice.sizes._asdict(),
        "microbatch_tokens": choice.microbatch_tokens,
        "rematerialisation": choice.remat,
    }


def _compile_seconds(stages: list[Planned]) -> float | None:
    told = [one.compiled.compile_seconds for one in stages if one.compiled is not None]
    return sum(told) if told else None


def _smallest_slice(spec: Spec, recipe: Recipe, on: Slice) -> dict[str, Any] | None:
    """The listed slice of the same kind with fewest chips on which every stage fits, by arithmetic."""
    for other in ladder(on.kind):
        if fits_somewhere(spec, recipe.stages, recipe.optimizer, other):
            return {"slice": other.name, "chips": other.chips}
    return None


def _notes(stages: list[Planned], costs: list[Cost], on: Slice, compiled: bool) -> list[str]:
    """What a reader must know before believing the figures."""
    notes = []
    if not compiled:
        why = "the compiler was not asked" if on.compiles else "no compiler for these chips runs without one"
        notes.append(f"Memory is by arithmetic ({why}).")
    for one, each in zip(stages, costs, strict=True):
        assumed = each.hours * 3600 / one.stage.steps
        facts = one.compiled if isinstance(one.compiled, CompiledFacts) else None
        if facts is not None and facts.unread:
            notes.append(
                f"Stage '{one.stage.name}': the memory is the compiler's, but its program cannot be read "
                f"({facts.unread}); FLOPs and least times are by arithmetic."
            )
        if facts is not None and facts.roofline is not None:
            least, how = facts.roofline.seconds, f"the compiled program's roofline ({facts.roofline.bound})"
        else:
            least, how = one.best.seconds, "the arithmetic of products and exchanges"
        if one.fits and least > assumed:
            notes.append(
                f"Stage '{one.stage.name}': the utilisation assumes {assumed:.3g} s a step, and {how} says "
                f"{least:.3g} s; hours and dollars are {least / assumed:.2f} times too small: lower --utilisation."
            )
    return notes
