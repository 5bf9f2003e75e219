"""A model in memory as a source of pieces, and descriptions for it."""

from __future__ import annotations

from functools import cache
from typing import Any

from memory_source import MemorySource
from small_models import SIZES, weights_of

from xgen.convert.description import Description
from xgen.convert.pieces import TYPES, Source, pieces
from xgen.model import Spec, Weights
from xgen.recipe.schema import Compute, Model, RopeScaling
from xgen.tokens.tokenizer import Tokenizer, load_tokenizer, train_bpe


class ArraySource(MemorySource):
    """`types` says of rows, by name, in which type they are stored; float32 otherwise."""

    def __init__(self, spec: Spec, weights: Weights, types: dict[str, str] | None = None) -> None:
        super().__init__(spec, weights)
        self.weights = weights
        self.arrays |= {name: self.arrays[name].astype(TYPES[dtype]) for name, dtype in (types or {}).items()}


@cache
def small_tokenizer() -> Tokenizer:
    """Byte-level, 280 ids."""
    return train_bpe(["the cat sat on the mat; the bat spat at the rat, and that was that. " * 9] * 9, 280)


@cache
def xgen_tokenizer() -> Tokenizer:
    return load_tokenizer("xgen")


SHAPES: dict[str, dict[str, Any]] = {
    "xgen": {},
    "grouped": {"kv_heads": 2},
    "tied": {"tied_embeddings": True, "kv_heads": 1},
    "biased": {"attention_bias": True, "mlp_bias": True, "kv_heads": 2},
    "attention_biased": {"attention_bias": True},
    "wide_heads": {"head_size": 16},
    "theta": {"rope_theta": 500_000.0, "norm_epsilon": 1e-5},
    "linear": {"rope_scaling": {"kind": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"kind": "dynamic", "factor": 2.0, "original_length": 64}},
    "llama3": {"rope_scaling": {"kind": "llama3", "factor": 8.0, "original_length": 64}},
    "yarn": {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_length": 64}},
    "yarn_stated": {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_length": 64, "attention_factor": 1.5}},
}
"""Every choice of LLaMA's shape."""


def llama(shape: str = "xgen", *, tokenizer: Tokenizer | None = None, **facts: Any) -> tuple[Description, ArraySource]:
    """A two-layer model with random weights, of which a few rows of the vocabulary are padding."""
    changes = dict(SHAPES[shape])
    scaling = RopeScaling(**changes.pop("rope_scaling", {}))
    real = tokenizer.size if tokenizer is not None else 300
    sizes = {**SIZES, "vocab_size": real + 20, "rope_scaling": scaling}
    model = Model(**{**sizes, **changes})
    spec = Spec(model, real, Compute(precision="float32"))
    description = Description("small", model, real, 256, tokenizer, **facts)
    return description, ArraySource(spec, weights_of(spec))


def assert_same_pieces(found: Source, wanted: Source) -> None:
    for row, layer in pieces(wanted.spec):
        assert found.dtype(row, layer) == wanted.dtype(row, layer), row.name
        assert found.read(row, layer).tobytes() == wanted.read(row, layer).tobytes(), row.name
