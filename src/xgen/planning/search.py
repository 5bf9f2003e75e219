"""The cheapest choice that fits: on a slice of a given size the cheapest is the fastest, judged by arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from xgen.model import Spec
from xgen.model.attention.blocks import Blocks
from xgen.model.flops import flops_per_token
from xgen.model.weights import rows
from xgen.parallel.mesh import Sizes
from xgen.parallel.slices import Slice
from xgen.planning.choice import ALL, Choice, Freedom, choices, written_differs
from xgen.planning.memory import FLOAT32, Memory, arithmetic
from xgen.recipe.schema import Optimizer, Stage

NEAR = 1.02
"""Choices within 2 % of the fastest are equally cheap as far as this arithmetic can tell; the one nearest to the recipe
wins."""

MARGIN = 0.9
"""Share of the limit that a choice of the plan's own may need by arithmetic."""

LESS = 0.8
"""Share of a refused choice's memory that the next one may need."""

PRODUCT_SHARE = 0.6
"""Of the peak that large products reach; the same for every choice, so that it only weighs products against moves."""

EXPOSED = 0.2
"""Share of the exchange of weights that does not hide behind products: the first and last of each microbatch, and what
it takes from the memory's rate. It makes many small microbatches dearer than few large ones."""


@dataclass(frozen=True)
class Candidate:
    choice: Choice
    memory: Memory
    seconds: float
    """Of a step, by arithmetic: for ranking."""


@cache
def executed_flops(spec: Spec, length: int, remat: str) -> float:
    """FLOPs a token that the hardware runs under a policy, where the model's are `flops_per_token`.

    The TPU's attention kernels compute whole blocks up to the diagonal, and backward the scores again. `dots` runs the
    attention forward again, `block` the whole layer but its last product, whose result nothing needs.
    """
    model, kernels = spec.model, Blocks.of(length, 1).products
    forward, attention = kernels["fwd"], sum(kernels.values())
    if remat != "none":
        attention += forward
    width = model.layers * model.heads * model.head_size
    # The model's six products (two forward, four backward) each count the causal half of the square.
    found = flops_per_token(spec, length) + (attention - 3) * 2.0 * width * length
    if remat == "block":
        stacked = {row.name: math.prod(row.shape(spec)) for row in rows(spec) if row.stacked_matrix}
        found += 2.0 * (sum(stacked.values()) - stacked["block.down"])
    return found


@cache
def _matrix_elements(spec: Spec) -> int:
    return sum(math.prod(row.shape(spec)) for row in rows(spec) if row.decay)


def step_seconds(spec: Spec, stage: Stage, choice: Choice, on: Slice) -> float:
    """Of one step: products, or the weights' gathering and scattering when that takes longer (it runs beside them, but
    for a share); and what the tensor and context axes exchange within each layer, where each waits for the other."""
    sizes, model, width = choice.sizes, spec.model, spec.dtype.itemsize
    products = executed_flops(spec, stage.length, choice.remat) * stage.batch_tokens / sizes.devices
    shards, part = sizes.fsdp * sizes.context, _matrix_elements(spec) / sizes.tensor
    gathers = 2 if choice.remat == "none" else 3
    passing = part * (gathers * width + FLOAT32) * (1 - 1 / shards) * (stage.batch_tokens // choice.microbatch_tokens)
    replicas = part / shards * FLOAT32 * 2 * (1 - 1 / sizes.replica)
    stream = stage.batch_tokens / (sizes.devices / sizes.tensor) * width * model.layers
    # A layer sums the stream over tensor twice forward and twice backward; a sum passes each element twice.
    within = 8 * stream * model.hidden_size * (1 - 1 / sizes.tensor)
    # Keys and values go once around the ring forward, and backward with their gradients.
    around = 3 * stream * 2 * model.kv_heads * model.head_size / sizes.tensor * (sizes.context - 1)
    outer, inner = _rate(on, sizes.devices // on.slices), _rate(on, sizes.tensor * sizes.context)
    between = on.chip.network_rate if on.slices > 1 else outer
    moved = passing / outer + replicas / between
    compute = products / (on.chip.peak_flops * PRODUCT_SHARE)
    return max(compute, moved) + EXPOSED * min(compute, moved) + (within + around) / inner


def _rate(on: Slice, together: int) -> float:
    """Bytes a second in and out of one chip when so many neighbours exchange: a GPU's are those of one host."""
    one_switch = on.chip.dimensions == 0
    return on.chip.network_rate if one_switch and together > on.chip.host else on.chip.links * on.chip.link_rate


def candidate(spec: Spec, stage: Stage, optimizer: Optimizer, choice: Choice, on: Slice) -> Candidate:
    memory = arithmetic(spec, stage, optimizer, choice)
    return Candidate(choice, memory, step_seconds(spec, stage, choice, on))


def cheapest(
    spec: Spec, stage: Stage, optimizer: Optimizer, on: Slice, base: Choice | None, free: Freedom, most: int = 1
) -> list[Candidate]:
    """The cheapest choice that fits with a margin, and up to `most` - 1 after it, each the next cheapest that needs
    clearly less memory, in case that a compiler refuses the one before; none when nothing fits.

    `base` is what the recipe says (None: it says nothing that can be run here); what is not `free` stays as it is.
    """
    limit = MARGIN * on.chip.usable_memory
    every = choices(spec, stage, base, free, on.chips, on.slices)
    ranked = sorted(((step_seconds(spec, stage, choice, on), choice) for choice in every), key=lambda pair: pair[0])
    found: list[Candidate] = []
    near: list[Candidate] = []
    for seconds, choice in ranked:
        if near and not found and seconds > NEAR * near[0].seconds:
            found = [min(near, key=lambda one: (written_differs(one.choice, base), one.seconds))]
        if len(found) == most:
            break
        one = Candidate(choice, arithmetic(spec, stage, optimizer, choice), seconds)
        if one.memory.total > (limit if not found else LESS * found[-1].memory.total):
            continue
        (found if found else near).append(one)
    return found or [min(near, key=lambda one: (written_differs(one.choice, base), one.seconds))] if near else []


def fits_somewhere(spec: Spec, stages: tuple[Stage, ...], optimizer: Optimizer, on: Slice) -> bool:
    """Whether every stage has a choice that fits `on`."""
    return all(cheapest(spec, stage, optimizer, on, None, ALL) for stage in stages)


def mesh_name(sizes: Sizes) -> str:
    """Axes of more than one chip: "fsdp 128 x tensor 4"."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes._asdict().items() if size > 1) or "one chip"
