"""What a plan may choose for a stage, and every such choice that a slice allows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from xgen.errors import RecipeError
from xgen.model import Spec
from xgen.parallel.mesh import Sizes
from xgen.parallel.rules import require_even
from xgen.recipe.near import divisors
from xgen.recipe.schema import Mesh, Recipe, Stage
from xgen.recipe.units import format_length

Remat = Literal["none", "dots", "block"]
REMATS: tuple[Remat, ...] = get_args(Remat)
"""From most memory and fewest FLOPs to the opposite."""


@dataclass(frozen=True)
class Choice:
    """How one stage is spread and cut."""

    sizes: Sizes
    microbatch_tokens: int
    remat: Remat

    def applied(self, stage: Stage) -> Stage:
        """The stage with this choice written into it."""
        return stage.model_copy(
            update={
                "mesh": Mesh(**self.sizes._asdict()),
                "microbatch_tokens": self.microbatch_tokens,
                "remat": self.remat,
            }
        )


@dataclass(frozen=True)
class Freedom:
    """Which parts of a stage's choice its recipe leaves open."""

    mesh: bool = False
    microbatch_tokens: bool = False
    remat: bool = False

    @property
    def any(self) -> bool:
        return self.mesh or self.microbatch_tokens or self.remat


ALL = Freedom(mesh=True, microbatch_tokens=True, remat=True)


def with_choice(recipe: Recipe, index: int, choice: Choice) -> Recipe:
    """The recipe with `choice` written into stage `index`."""
    stages = list(recipe.stages)
    stages[index] = choice.applied(stages[index])
    return recipe.model_copy(update={"stages": tuple(stages)})


def written_differs(one: Choice, base: Choice | None) -> int:
    """In how many of its three parts a choice is not what the recipe says."""
    return 3 if base is None else sum(a != b for a, b in zip(vars(one).values(), vars(base).values(), strict=True))


def overrides(index: int, wanted: Choice, stage: Stage, written: Sizes | None) -> list[str]:
    """What must be added to the command, as "key=value", so that stage `index` is run by `wanted`; `written` is what
    the recipe's own mesh means on this slice, None where it means nothing."""
    same = {
        "mesh": wanted.sizes == written,
        "microbatch_tokens": wanted.microbatch_tokens == stage.microbatch_tokens,
        "remat": wanted.remat == stage.remat,
    }
    return [text for key, texts in stated(index, wanted).items() if not same[key] for text in texts]


def stated(index: int, wanted: Choice) -> dict[str, list[str]]:
    """All of a choice as "key=value", by the stage's key."""
    at = f"stages.{index}"
    return {
        "mesh": [f"{at}.mesh.{axis}={size}" for axis, size in wanted.sizes._asdict().items()],
        "microbatch_tokens": [f"{at}.microbatch_tokens={format_length(wanted.microbatch_tokens)}"],
        "remat": [f"{at}.remat={wanted.remat}"],
    }


def choices(spec: Spec, stage: Stage, base: Choice | None, free: Freedom, chips: int, slices: int) -> Iterator[Choice]:
    """Every choice that cuts the stage evenly on `chips` chips in `slices` slices; what is not free is as in `base`."""
    for sizes in meshes_of(chips, slices, spec) if free.mesh or base is None else [base.sizes]:
        ways = sizes.replica * sizes.fsdp
        # Rows are dealt out over the data axes; the tensor and context axes share a row.
        if not divides(spec, stage.model_copy(update={"microbatch_tokens": ways * stage.length}), sizes):
            continue
        micros = microbatches(stage, ways)
        if base is not None and not free.microbatch_tokens:
            micros = [micro for micro in micros if micro == base.microbatch_tokens]
        remats = REMATS if base is None or free.remat else (base.remat,)
        yield from (Choice(sizes, micro, remat) for micro in micros for remat in remats)


def divides(spec: Spec, stage: Stage, sizes: Sizes) -> bool:
    """Whether the mesh cuts the model and the stage's microbatch evenly."""
    try:
        require_even(spec.model, stage, sizes, "stage")
    except RecipeError:
        return False
    return True


def meshes_of(chips: int, slices: int, spec: Spec) -> Iterator[Sizes]:
    """Every mesh of `chips` chips that can hold the model in even parts, and whose weights' shards stay within one
    slice: between slices lies the slower network, which only the replicas' gradients, once a step, should cross."""
    model = spec.model
    for tensor in divisors(math.gcd(chips // slices, model.kv_heads)):
        for shards in divisors(math.gcd(chips // slices // tensor, model.hidden_size)):
            yield from (
                Sizes(chips // tensor // shards, shards // context, context, tensor) for context in divisors(shards)
            )


def microbatches(stage: Stage, ways: int) -> list[int]:
    """Tokens of a microbatch, largest first: whole sequences that divide the batch and deal out evenly `ways` ways."""
    if stage.sequences % ways:
        return []
    return [rows * ways * stage.length for rows in reversed(divisors(stage.sequences // ways))]
