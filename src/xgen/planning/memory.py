"""Memory of one training step on one chip, by arithmetic: a sum that can be read and checked by hand.

What lies there always (weights, optimizer state, the batch) is exact. What comes and goes is the largest of four
moments: the loss, the backward pass of one layer, that of the embedding, the optimizer. What XLA fuses away, or keeps
longer than it must, is the uncertainty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from jax.sharding import PartitionSpec

from xgen.model import Spec
from xgen.model.attention.blocks import LANES
from xgen.model.decoder import LOOKUP
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
    kernel: int
    """Queries, keys, values and mixed heads of a token as attention's kernel takes them: each head filled up to
    multiples of 128 numbers; of keys and values those of all context parts, unless they go round a ring."""
    inner: int
    vocabulary: int
    width: int
    """Bytes of the compute type."""
    gated: bool
    sequential: bool
    layers: int
    heads: int


def arithmetic(spec: Spec, stage: Stage, optimizer: Optimizer, choice: Choice) -> Memory:
    """Memory of the stage's step under `choice`, without a compiler."""
    at, sizes = local(spec, choice), choice.sizes
    weights = weight_bytes(spec, sizes)
    state = optimizer_bytes(spec, optimizer, sizes)
    batch = batch_bytes(stage, sizes)
    accumulated = weights if choice.microbatch_tokens < stage.batch_tokens else 0
    kept, narrow = at.layers * kept_of_layer(at, choice.remat), narrow_bytes(spec, sizes)
    directions = round(OPTIMIZER_COPIES * weights)
    moments = {
        "the loss": (accumulated, kept, narrow + loss_bytes(at)),
        "a layer's backward pass": (accumulated + weights, kept, narrow + layer_bytes(at, choice)),
        "the embedding's backward pass": (accumulated + weights, 0, embedding_bytes(at, sizes)),
        "the optimizer": (weights, 0, max(directions, orthogonal_bytes(spec, optimizer, sizes))),
    }
    moment = max(moments, key=lambda name: sum(moments[name]))
    gradients, activations, temporaries = moments[moment]
    found = (weights, state, gradients, activations, temporaries + batch)
    return Memory(dict(zip(KINDS, found, strict=True)), moment)


def local(spec: Spec, choice: Choice) -> Local:
    model, sizes = spec.model, choice.sizes
    head = _filled(model.head_size)
    seen = sizes.context if spec.compute.exchange == "gather" else 1
    return Local(
        tokens=choice.microbatch_tokens // (sizes.devices // sizes.tensor),
        hidden=model.hidden_size,
        query=model.heads * model.head_size // sizes.tensor,
        key=model.kv_heads * model.head_size // sizes.tensor,
        kernel=2 * (model.heads + model.kv_heads * seen) * head // sizes.tensor,
        inner=model.mlp_size // sizes.tensor,
        vocabulary=model.vocab_size // sizes.tensor,
        width=spec.dtype.itemsize,
        gated=model.activation == "swiglu",
        sequential=model.circuits == "sequential",
        layers=model.layers,
        heads=model.heads // sizes.tensor,
    )


# --- what lies there always ------------------------------------------------------------------------


@cache
def weight_bytes(spec: Spec, sizes: Sizes) -> int:
    """Float32 masters, in parts over fsdp x context and tensor."""
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

    block: its input. dots: also every product's result that the backward pass reads. none: all that it reads but what
    has no product: the two norms' inputs and results; queries, keys and values; the mixed heads, which lie there twice
    (as the kernel's result and as the next product's operand), and each one's log-sum-exp in float32; SwiGLU's two
    inputs and its result.
    """
    stream = at.tokens * at.hidden * at.width
    if remat == "block":
        return stream
    circuits = (2 if at.gated else 1) * at.inner
    if remat == "dots":
        return stream + at.tokens * (at.query + 2 * at.key + at.hidden + circuits) * at.width
    norms = (4 if at.sequential else 2) * at.hidden
    heads = (at.kernel + at.query) * at.width + at.heads * FLOAT32
    return at.tokens * ((norms + circuits + at.inner) * at.width + heads)


# --- what comes and goes ---------------------------------------------------------------------------


@cache
def narrow_bytes(spec: Spec, sizes: Sizes) -> int:
    """The layers' matrices in the compute type, which XLA makes of all layers' shards before the first one's pass."""
    return (
        sum(shard_bytes(row, spec, sizes) for row in rows(spec) if row.stacked_matrix) * spec.dtype.itemsize // FLOAT32
    )


def loss_bytes(at: Local) -> int:
    """The gathered head in the compute type, its whole float32 gradient, one chunk's logits with their gradient, and
    the final hidden states with theirs."""
    head = at.hidden * at.vocabulary * (at.width + FLOAT32)
    chunk = min(CHUNK_LOGITS, at.tokens * at.vocabulary) * (FLOAT32 + at.width)
    return head + chunk + 3 * at.tokens * at.hidden * at.width


def layer_bytes(at: Local, choice: Choice) -> int:
    """One layer's backward pass when it has come to the feed-forward circuit, from its end.

    Of the stream its input, both norms' results, the input of the second and the gradient; of attention the queries,
    keys, values and the mixed heads; SwiGLU's inputs, its result's gradient and the gate's (the other takes the place
    of one of these); the weights gathered by then, and the float32 gradient of the last one before it is dealt out.
    What the policy keeps of these is read where it lies.
    """
    stream = (5 if at.sequential else 3) * at.hidden
    circuits = (4 if at.gated else 3) * at.inner
    wide = at.hidden * at.inner
    gathered = (2 if at.gated else 1) * wide + 2 * at.hidden * (at.query + at.key)
    shards = choice.sizes.fsdp * choice.sizes.context
    weights = max(wide, at.hidden * at.query) * FLOAT32 + (gathered * at.width if shards > 1 else 0)
    return at.tokens * (stream + circuits + at.kernel) * at.width + weights


def embedding_bytes(at: Local, sizes: Sizes) -> int:
    """The tokens that are looked up at once, with the gradients of their rows in float32 and in the compute type: of
    each row a chip holds only its columns, filled up to 128."""
    shards = sizes.fsdp * sizes.context
    columns = _filled(at.hidden // shards)
    return min(LOOKUP, at.tokens * shards) * columns * (FLOAT32 + at.width)


def _filled(numbers: int) -> int:
    """Of a row of an array, as a TPU's memory holds it."""
    return -(-numbers // LANES) * LANES


def orthogonal_bytes(spec: Spec, optimizer: Optimizer, sizes: Sizes) -> int:
    """Muon's matrices of one kind, of all layers at once and whole on every chip that does not share them over tensor:
    in the compute type, and the products of their shorter sides in float32 and in the compute type."""
    if optimizer.name != "muon":
        return 0
    sides = [_sides(row.shape(spec)) for row in rows(spec) if row.stacked_matrix]
    width = spec.dtype.itemsize
    most = max(long * short * width + short * short * (FLOAT32 + width) for long, short in sides)
    return spec.model.layers * most // sizes.tensor


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """The longer and the shorter side of a layer's matrix; heads and their size are one side."""
    product, hidden = math.prod(shape[1:]), max(shape[1], shape[-1])
    return max(hidden, product // hidden), min(hidden, product // hidden)
