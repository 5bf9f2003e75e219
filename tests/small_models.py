"""Small decoders and batches for the tests, and how errors are measured."""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from xgen.model import Spec, Weights, abstract, as_dict, from_dict
from xgen.recipe.schema import Compute, Model

VARIANTS = {
    "xgen": {},
    "grouped_tied": {"kv_heads": 2, "tied_embeddings": True},
    "parallel": {"circuits": "parallel", "kv_heads": 1},
    "jaxformer": {"circuits": "parallel", "activation": "gelu", "norm": "layer", "tied_embeddings": True},
    "layer_norm": {"norm": "layer", "activation": "gelu"},
    "biased": {"attention_bias": True, "mlp_bias": True, "kv_heads": 2},
    "biased_gelu": {"mlp_bias": True, "circuits": "parallel", "activation": "gelu", "norm": "layer"},
}
"""Every choice of the model's shape, in combinations that cover the code."""

SCALINGS = {
    "none": {},
    "linear": {"kind": "linear", "factor": 4.0},
    "dynamic": {"kind": "dynamic", "factor": 2.0, "original_length": 16},
    "llama3": {"kind": "llama3", "factor": 8.0, "original_length": 32},
    "yarn": {"kind": "yarn", "factor": 4.0, "original_length": 64, "high_turns": 8.0},
}
"""Every kind of rope scaling, at lengths where it tells on documents of a few dozen tokens."""

SIZES = {
    "layers": 2,
    "hidden_size": 32,
    "heads": 4,
    "kv_heads": 4,
    "head_size": 8,
    "mlp_size": 48,
    "vocab_size": 96,
}


def spec_of(variant: str = "xgen", precision: str = "float32", attention: str = "auto", **changes) -> Spec:
    """A two-layer decoder; 90 of its 96 rows are real tokens."""
    model = Model(**{**SIZES, "initialisation": "fan_in", **VARIANTS[variant], **changes})
    real = min(90, model.vocab_size)
    return Spec(model, real, Compute(precision=precision, attention=attention))


def weights_of(spec: Spec, seed: int = 0) -> Weights:
    """Random weights, norms away from 1 and biases away from 0, so that no gradient hides behind them."""
    random = np.random.default_rng(seed)
    arrays = {}
    for name, shape in as_dict(abstract(spec)).items():
        noise = random.normal(size=shape.shape)
        if "norm" in name:
            values = 0.2 * noise + (0 if name.endswith("bias") else 1)
        else:
            values = 0.6 * noise / np.sqrt(spec.model.hidden_size)
        arrays[name] = jnp.asarray(values, jnp.float32)
    return from_dict(arrays, spec)


def batch_of(spec: Spec, lengths: list[list[int]], seed: int = 0) -> tuple[jax.Array, ...]:
    """Random ids and targets, segments and positions int32 [B, S]; `lengths` are each row's documents."""
    shape = (len(lengths), sum(lengths[0]))
    random = np.random.default_rng(seed)
    ids, targets = (random.integers(0, spec.real_vocab, shape, np.int32) for _ in range(2))
    segments = np.stack([np.repeat(np.arange(len(row)), row) for row in lengths]).astype(np.int32)
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths]).astype(np.int32)
    return tuple(map(jnp.asarray, (ids, targets, segments, positions)))


def relative_error(found, wanted) -> float:
    """||found - wanted|| / ||wanted|| over all elements of one array, in float64."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def exact(function: Callable, *arrays):
    """`function` of `arrays` (any tree; None stays None) compiled and run in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(_widened, arrays)
        return jax.tree.map(np.asarray, quick_jit(function)(*wide))


def _widened(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


@cache
def quick_jit(function: Callable, **options) -> Callable:
    """`jax.jit` without LLVM's optimisation, for functions that run once: half the time to compile."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)
