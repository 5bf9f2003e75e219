"""Memory of one training step on one chip, by arithmetic: a sum that can be read and checked by hand.

What lies there always (weights, optimizer state, the batch) is exact. What comes and goes is the largest of three
moments: the loss, the backward pass of one layer, the optimizer. What XLA fuses away, or keeps longer than it must, is
the uncertainty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from jax.sharding import PartitionSpec

from xgen.model import Spec
from xgen.model.loss import CHUNK_LOGITS
from xgen.model.weights import Weight, rows
from xgen.parallel.mesh import LINE, Sizes
from xgen.parallel.rules import partition
from xgen.planning.choice import Choice
from xgen.recipe.schema import Optimizer, Stage

FLOAT32 = 4
BATCH_ARRAYS = 4
"""ids, targets, segments, positions: int32 each."""

KINDS = ("parameters", "optimizer", "gradients", "activations", "temporaries")

OPTIMIZER_COPIES = 1.0
"""Float32 copies of the weights' shards that the update holds beside the gradient: the directions, whose norm is needed
before the first weight may be written."""


@dataclass(frozen=True)
class Memory:
    """Bytes a chip at the step's worst moment, by kind, and which moment that is.

    `activations` are what the forward pass keeps for the backward pass; `temporaries` all else that comes and goes, the
    batch's tokens among it.
    """

    by_kind: dict[str, int]
    moment: str

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


@dataclass(frozen=True)
class Local:
    """One chip's part of a microbatch and of the model: sizes of the arrays it sees."""

    tokens: int
    hidden: int
    query: int
    """Heads x head size of this chip."""
    key: int
    inner: int
    vocabulary: int
    width: int
    """Bytes of the compute type."""
    gated: bool
    sequential: bool
    layers: int


def arithmetic(spec: Spec, stage: Stage, optimizer: Optimizer, choice: Choice) -> Memory:
    """Memory of the stage's step under `choice`, without a compiler."""
    at, sizes = local(spec, choice), choice.sizes
    weights = weight_bytes(spec, sizes)
    state = optimizer_bytes(spec, optimizer, sizes)
    batch = batch_bytes(stage, sizes)
    accumulated = weights if choice.microbatch_tokens < stage.batch_tokens else 0
    kept = at.layers * kept_of_layer(at, choice.remat)
    moments = {
        "the loss": (accumulated, kept, loss_bytes(at)),
        "a layer's backward pass": (accumulated + weights, kept, layer_bytes(at, choice)),
        "the optimizer": (weights, 0, round(OPTIMIZER_COPIES * weights)),
    }
    moment = max(moments, key=lambda name: sum(moments[name]))
    gradients, activations, temporaries = moments[moment]
    found = (weights, state, gradients, activations, temporaries + batch)
    return Memory(dict(zip(KINDS, found, strict=True)), moment)


def local(spec: Spec, choice: Choice) -> Local:
    model, sizes = spec.model, choice.sizes
    return Local(
        tokens=choice.microbatch_tokens // (sizes.devices // sizes.tensor),
        hidden=model.hidden_size,
        query=model.heads * model.head_size // sizes.tensor,
        key=model.kv_heads * model.head_size // sizes.tensor,
        inner=model.mlp_size // sizes.tensor,
        vocabulary=model.vocab_size // sizes.tensor,
        width=spec.dtype.itemsize,
        gated=model.activation == "swiglu",
        sequential=model.circuits == "sequential",
        layers=model.layers,
    )


# --- what lies there always ------------------------------------------------------------------------


@cache
def weight_bytes(spec: Spec, sizes: Sizes) -> int:
    """Float32 masters: matrices in parts over fsdp x context and tensor, vectors along the stream whole."""
    return sum(shard_bytes(row, spec, sizes) for row in rows(spec))


def shard_bytes(row: Weight, spec: Spec, sizes: Sizes) -> int:
    """Float32 bytes of one chip's part of a weight."""
    parts: dict[str, int] = {**sizes._asdict(), LINE: 1}  # of fsdp, whose whole size is counted
    return FLOAT32 * math.prod(row.shape(spec)) // math.prod(parts[axis] for axis in _axes(partition(row)))


def _axes(place: PartitionSpec) -> Iterator[str]:
    for entry in place:
        yield from () if entry is None else (entry,) if isinstance(entry, str) else entry


def batch_bytes(stage: Stage, sizes: Sizes) -> int:
    """The whole batch's rows and columns of this chip, all microbatches."""
    return BATCH_ARRAYS * FLOAT32 * stage.batch_tokens // (sizes.devices // sizes.tensor)


@cache
def optimizer_bytes(spec: Spec, optimizer: Optimizer, sizes: Sizes) -> int:
    """AdamW: two moments a weight. Muon: one for the layers' matrices, Adam's two for the rest."""
    muon = optimizer.name == "muon"
    return sum(shard_bytes(row, spec, sizes) * (1 if muon and row.stacked_matrix else 2) for row in rows(spec))


# --- what the forward pass keeps -------------------------------------------------------------------


def kept_of_layer(at: Local, remat: str) -> int:
    """Bytes one layer keeps for its backward pass.

    block: its input. dots: also every product's result that the backward pass reads. none: all that it reads.
    """
    stream = at.tokens * at.hidden * at.width
    if remat == "block":
        return stream
    if remat == "dots":
        products = at.query + 2 * at.key + at.hidden + (2 if at.gated else 1) * at.inner
        return stream + at.tokens * products * at.width
    return residuals(at)


def residuals(at: Local) -> int:
    """All that a layer's backward pass reads: each norm's input and result in float32 and its output, the rotated
    queries and keys, the values, the mixed heads with each one's float32 sum, and SwiGLU's five inner arrays."""
    norms = 2 if at.sequential else 1
    norm = at.hidden * (2 * FLOAT32 + at.width)
    heads = (2 * at.query + 2 * at.key) * at.width
    inner = (5 if at.gated else 2) * at.inner * at.width
    return at.tokens * (norms * norm + heads + inner)


# --- what comes and goes ---------------------------------------------------------------------------


def loss_bytes(at: Local) -> int:
    """The gathered head in the compute type, its whole float32 gradient, one chunk's logits with their gradient, and
    the final hidden states with theirs."""
    head = at.hidden * at.vocabulary * (at.width + FLOAT32)
    chunk = min(CHUNK_LOGITS, at.tokens * at.vocabulary) * (FLOAT32 + at.width)
    return head + chunk + 3 * at.tokens * at.hidden * at.width


def layer_bytes(at: Local, choice: Choice) -> int:
    """One layer's backward pass: what it recomputes, the gradients of its widest arrays, and the largest product's
    gathered weight with that weight's float32 gradient before it is summed and dealt out."""
    recomputed = {"block": residuals(at), "dots": residuals(at) - kept_of_layer(at, "dots"), "none": 0}[choice.remat]
    wide = at.tokens * ((2 if at.gated else 1) * at.inner + 2 * at.hidden) * at.width
    shards = choice.sizes.fsdp * choice.sizes.context
    largest = max(at.hidden * at.inner, at.hidden * at.query)
    gathered = largest * (at.width + FLOAT32) if shards > 1 else largest * at.width
    return max(recomputed, 0) + wide + gathered
