"""The weights table: each weight declared once.

Initialisation, decay, checkpoints, hashes and the names other people's files use all come from these
rows. A weight without a row, or a row without a weight, is an error.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xgen.errors import CheckpointError
from xgen.model.spec import Spec

Axis = Literal["layer", "vocab", "embed", "heads", "kv_heads", "head", "mlp"]
Init = Literal["embedding", "input", "output", "ones", "zeros"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Block:
    """Weights of all layers, stacked on a leading axis L. None where the model has no such weight."""

    attention_norm: Float[Array, "L D"]
    attention_norm_bias: Float[Array, "L D"] | None
    query: Float[Array, "L D H E"]
    query_bias: Float[Array, "L H E"] | None
    key: Float[Array, "L D K E"]
    key_bias: Float[Array, "L K E"] | None
    value: Float[Array, "L D K E"]
    value_bias: Float[Array, "L K E"] | None
    output: Float[Array, "L H E D"]
    output_bias: Float[Array, "L D"] | None
    mlp_norm: Float[Array, "L D"] | None
    mlp_norm_bias: Float[Array, "L D"] | None
    gate: Float[Array, "L D F"] | None
    gate_bias: Float[Array, "L F"] | None
    up: Float[Array, "L D F"]
    up_bias: Float[Array, "L F"] | None
    down: Float[Array, "L F D"]
    down_bias: Float[Array, "L D"] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weights:
    """All weights of a decoder; float32 masters."""

    embedding: Float[Array, "V D"]
    block: Block
    final_norm: Float[Array, " D"]
    final_norm_bias: Float[Array, " D"] | None
    head: Float[Array, "D V"] | None


def _always(spec: Spec) -> bool:  # noqa: ARG001 - the signature of a row's condition
    return True


def _layer_norm(spec: Spec) -> bool:
    return spec.model.norm == "layer"


def _sequential(spec: Spec) -> bool:
    # Parallel circuits read one norm (GPT-J, PaLM, JaxFormer); sequential ones have a norm each.
    return spec.model.circuits == "sequential"


def _gated(spec: Spec) -> bool:
    return spec.model.activation == "swiglu"


def _untied(spec: Spec) -> bool:
    return not spec.model.tied_embeddings


def _attention_bias(spec: Spec) -> bool:
    return spec.model.attention_bias


def _mlp_bias(spec: Spec) -> bool:
    return spec.model.mlp_bias


def _gate_bias(spec: Spec) -> bool:
    return _gated(spec) and _mlp_bias(spec)


@dataclass(frozen=True)
class Weight:
    """One row. `decay`: weight decay applies (matrices only: decided here, never by the array's rank)."""

    name: str
    axes: tuple[Axis, ...]
    init: Init
    hugging_face: str
    gguf: str
    present: Callable[[Spec], bool] = _always

    @property
    def decay(self) -> bool:
        return self.init in ("embedding", "input", "output")

    @property
    def stacked_matrix(self) -> bool:
        """A matrix of the layers, as against the vocabulary's tables and the vectors."""
        return self.decay and self.axes[0] == "layer"

    def shape(self, spec: Spec) -> tuple[int, ...]:
        return tuple(_axis_size(axis, spec) for axis in self.axes)


_HF = "model.layers.{layer}."
_GG = "blk.{layer}."


def _bias(of: str, axes: tuple[Axis, ...], hugging_face: str, gguf: str, present: Callable[[Spec], bool]) -> Weight:
    """The row of what is added to a product: all are stacked, begin at zero, and are called `bias` by everyone."""
    names = f"{_HF}{hugging_face}.bias", f"{_GG}{gguf}.bias"
    return Weight(f"block.{of}_bias", ("layer", *axes), "zeros", *names, present)


WEIGHTS: tuple[Weight, ...] = (
    Weight("embedding", ("vocab", "embed"), "embedding", "model.embed_tokens.weight", "token_embd.weight"),
    Weight(
        "block.attention_norm", ("layer", "embed"), "ones", _HF + "input_layernorm.weight", _GG + "attn_norm.weight"
    ),
    Weight(
        "block.attention_norm_bias",
        ("layer", "embed"),
        "zeros",
        _HF + "input_layernorm.bias",
        _GG + "attn_norm.bias",
        _layer_norm,
    ),
    Weight(
        "block.query",
        ("layer", "embed", "heads", "head"),
        "input",
        _HF + "self_attn.q_proj.weight",
        _GG + "attn_q.weight",
    ),
    _bias("query", ("heads", "head"), "self_attn.q_proj", "attn_q", _attention_bias),
    Weight(
        "block.key",
        ("layer", "embed", "kv_heads", "head"),
        "input",
        _HF + "self_attn.k_proj.weight",
        _GG + "attn_k.weight",
    ),
    _bias("key", ("kv_heads", "head"), "self_attn.k_proj", "attn_k", _attention_bias),
    Weight(
        "block.value",
        ("layer", "embed", "kv_heads", "head"),
        "input",
        _HF + "self_attn.v_proj.weight",
        _GG + "attn_v.weight",
    ),
    _bias("value", ("kv_heads", "head"), "self_attn.v_proj", "attn_v", _attention_bias),
    Weight(
        "block.output",
        ("layer", "heads", "head", "embed"),
        "output",
        _HF + "self_attn.o_proj.weight",
        _GG + "attn_output.weight",
    ),
    _bias("output", ("embed",), "self_attn.o_proj", "attn_output", _attention_bias),
    Weight(
        "block.mlp_norm",
        ("layer", "embed"),
        "ones",
        _HF + "post_attention_layernorm.weight",
        _GG + "ffn_norm.weight",
        _sequential,
    ),
    Weight(
        "block.mlp_norm_bias",
        ("layer", "embed"),
        "zeros",
        _HF + "post_attention_layernorm.bias",
        _GG + "ffn_norm.bias",
        lambda spec: _layer_norm(spec) and _sequential(spec),
    ),
    Weight(
        "block.gate", ("layer", "embed", "mlp"), "input", _HF + "mlp.gate_proj.weight", _GG + "ffn_gate.weight", _gated
    ),
    _bias("gate", ("mlp",), "mlp.gate_proj", "ffn_gate", _gate_bias),
    Weight("block.up", ("layer", "embed", "mlp"), "input", _HF + "mlp.up_proj.weight", _GG + "ffn_up.weight"),
    _bias("up", ("mlp",), "mlp.up_proj", "ffn_up", _mlp_bias),
    Weight("block.down", ("layer", "mlp", "embed"), "output", _HF + "mlp.down_proj.weight", _GG + "ffn_down.weight"),
    _bias("down", ("embed",), "mlp.down_proj", "ffn_down", _mlp_bias),
    Weight("final_norm", ("embed",), "ones", "model.norm.weight", "output_norm.weight"),
    Weight("final_norm_bias", ("embed",), "zeros", "model.norm.bias", "output_norm.bias", _layer_norm),
    Weight("head", ("embed", "vocab"), "input", "lm_head.weight", "output.weight", _untied),
)


def _axis_size(axis: Axis, spec: Spec) -> int:
    model = spec.model
    sizes: dict[Axis, int] = {
        "layer": model.layers,
        "vocab": model.vocab_size,
        "embed": model.hidden_size,
        "heads": model.heads,
        "kv_heads": model.kv_heads,
        "head": model.head_size,
        "mlp": model.mlp_size,
    }
    return sizes[axis]


def rows(spec: Spec) -> tuple[Weight, ...]:
    """The table's rows that a model of this spec has, in table order."""
    return tuple(row for row in WEIGHTS if row.present(spec))


def parameter_count(spec: Spec) -> int:
    """All parameters, padding rows of the vocabulary included: 6 895 702 016 for XGen-7B."""
    return sum(math.prod(row.shape(spec)) for row in rows(spec))


def abstract(spec: Spec) -> Weights:
    """Shapes and types without arrays."""
    return from_dict({row.name: jax.ShapeDtypeStruct(row.shape(spec), jnp.float32) for row in rows(spec)}, spec)


def as_dict(weights: Weights) -> dict[str, Array]:
    """The weights by name, in table order; absent ones are left out."""
    found = {row.name: _field(weights, row.name) for row in WEIGHTS}
    return {name: array for name, array in found.items() if array is not None}


def from_dict(arrays: Mapping[str, Array | jax.ShapeDtypeStruct], spec: Spec) -> Weights:
    """The pytree of `arrays` by name. Raises CheckpointError for a missing, unknown or misshapen weight."""
    wanted = {row.name: row.shape(spec) for row in rows(spec)}
    wrong = [f"{name} is missing" for name in wanted.keys() - arrays.keys()]
    wrong += [f"{name} is not in the weights table" for name in arrays.keys() - wanted.keys()]
    wrong += [
        f"{name} has shape {tuple(arrays[name].shape)}, the model needs {shape}"
        for name, shape in wanted.items()
        if name in arrays and tuple(arrays[name].shape) != shape
    ]
    if wrong:
        raise CheckpointError("the weights do not fit the model: " + "; ".join(sorted(wrong)))
    block = {field.name: arrays.get(f"block.{field.name}") for field in fields(Block)}
    top = {field.name: arrays.get(field.name) for field in fields(Weights) if field.name != "block"}
    return Weights(block=Block(**block), **top)  # type: ignore[arg-type]  # shapes were checked against the table


def decayed(weights: Weights) -> Weights:
    """A tree of booleans: where weight decay applies."""
    return map_rows(weights, lambda row: row.decay)


def initialise(spec: Spec, seed: int) -> Weights:
    """Float32 weights drawn by the table.

    `normal` is the flat 0.02 that XGen's published config names. `fan_in` draws each matrix with variance
    1/fan-in, and the matrices that write to the residual stream smaller by sqrt(2 layers) (GPT-2), which lets a
    small model learn from few tokens. A weight's values depend on the seed and its own name only.
    """
    root = jax.random.key(seed)
    return from_dict({row.name: _draw(row, spec, root) for row in rows(spec)}, spec)


def _draw(row: Weight, spec: Spec, root: Array) -> Array:
    shape = row.shape(spec)
    if row.init == "ones":
        return jnp.ones(shape, jnp.float32)
    if row.init == "zeros":
        return jnp.zeros(shape, jnp.float32)
    name_number = int.from_bytes(hashlib.sha256(row.name.encode()).digest()[:4], "big")
    key = jax.random.fold_in(root, name_number)
    return _scale(row, spec) * jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32)


def _scale(row: Weight, spec: Spec) -> float:
    if spec.model.initialisation == "normal" or row.init == "embedding":
        return 0.02
    inputs = {"block.output": spec.model.heads * spec.model.head_size, "block.down": spec.model.mlp_size}
    scale = 1 / math.sqrt(inputs.get(row.name, spec.model.hidden_size))
    return scale / math.sqrt(2 * spec.model.layers) if row.init == "output" else scale


def _field(weights: Weights, name: str) -> Array | None:
    group, _, leaf = name.rpartition(".")
    holder = vars(weights.block if group else weights)
    array: Array | None = holder[leaf]
    return array


def map_rows(weights: Weights, value: Callable[[Weight], object]) -> Weights:
    """A tree shaped as `weights` with `value(row)` at each leaf."""
    by_name = {row.name: value(row) for row in WEIGHTS}

    def of(group: Weights | Block, prefix: str) -> dict[str, object]:
        names = [field.name for field in fields(group) if field.name != "block"]
        return {name: None if vars(group)[name] is None else by_name[prefix + name] for name in names}

    block = Block(**of(weights.block, "block."))  # type: ignore[arg-type]  # a tree of values, not of arrays
    return Weights(block=block, **of(weights, ""))  # type: ignore[arg-type]
