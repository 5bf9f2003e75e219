"""Against transformers' own LLaMA, with torch: grouped-query heads, tied tables, biases, every rope scaling."""

import jax
import numpy as np
import pytest
from small_models import batch_of, weights_of

from xgen.model import Spec, as_dict, from_dict, logits
from xgen.model.weights import WEIGHTS
from xgen.recipe.schema import Compute, Model, RopeScaling

pytestmark = pytest.mark.oracle

BOUND = 2e-4
"""Of any logit's difference in float32; two of the scalings below lie 0.3 apart at the least."""

SCALINGS = {
    "none": RopeScaling(),
    "linear": RopeScaling(kind="linear", factor=4.0),
    "dynamic": RopeScaling(kind="dynamic", factor=4.0, original_length=64),
    "llama3": RopeScaling(kind="llama3", factor=8.0, original_length=64),
    "llama3 with other turns": RopeScaling(
        kind="llama3", factor=8.0, original_length=64, low_turns=0.5, high_turns=6.0
    ),
    "yarn": RopeScaling(kind="yarn", factor=4.0, original_length=64),
    "yarn with other turns": RopeScaling(
        kind="yarn", factor=4.0, original_length=64, low_turns=0.5, high_turns=8.0, attention_factor=0.8
    ),
}


def model_of(scaling="none", **changes) -> Model:
    sizes = {"layers": 2, "hidden_size": 64, "heads": 4, "kv_heads": 2, "head_size": 16, "mlp_size": 96}
    return Model(**{**sizes, "vocab_size": 128, "rope_scaling": SCALINGS[scaling], **changes})


def config_of(model: Model):
    """Their configuration of our model."""
    from transformers import LlamaConfig

    scaling = model.rope_scaling
    rope = {"rope_type": "default" if scaling.kind == "none" else scaling.kind, "rope_theta": model.rope_theta}
    if scaling.kind != "none":
        rope["factor"] = scaling.factor
    if scaling.kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_turns, "high_freq_factor": scaling.high_turns}
    if scaling.kind == "yarn":
        rope |= {"beta_slow": scaling.low_turns, "beta_fast": scaling.high_turns}
        rope |= {"attention_factor": scaling.attention_factor}
    return LlamaConfig(
        hidden_size=model.hidden_size,
        intermediate_size=model.mlp_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_size,
        vocab_size=model.vocab_size,
        rms_norm_eps=model.norm_epsilon,
        tie_word_embeddings=model.tied_embeddings,
        attention_bias=model.attention_bias,
        mlp_bias=model.mlp_bias,
        # Of a dynamic scaling it is the length from which the base grows; the others do not look at it.
        max_position_embeddings=scaling.original_length * (1 if scaling.kind == "dynamic" else 8),
        rope_parameters=rope,
        attn_implementation="eager",
    )


def loaded(model: Model, named):
    """Their model with our weights."""
    import torch
    from transformers import LlamaForCausalLM

    state = {}
    for row in WEIGHTS:
        if row.name not in named:
            continue
        array = np.asarray(named[row.name])
        for layer, part in enumerate(array if row.axes[0] == "layer" else [array]):
            matrix = part.reshape(-1) if row.init in ("ones", "zeros") else part
            if row.init == "input":
                matrix = part.reshape(part.shape[0], -1).T
            elif row.init == "output":
                matrix = part.reshape(-1, part.shape[-1]).T
            state[row.hugging_face.format(layer=layer)] = torch.tensor(np.ascontiguousarray(matrix))
    theirs = LlamaForCausalLM(config_of(model)).to(torch.float32).eval()
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.tied_embeddings else set())
    theirs.tie_weights()
    return theirs


def assert_same_logits(model: Model, lengths: list[int], bound: float = BOUND) -> None:
    """In a row for each of `lengths`, their model given one row at a time: with a dynamic scaling it looks at all."""
    import torch

    spec = Spec(model, model.vocab_size, Compute(precision="float32"))
    weights = weights_of(spec)
    theirs = loaded(model, as_dict(weights))
    for length in lengths:
        ids, _, segments, positions = batch_of(spec, [[length], [length]], seed=length)
        found = np.asarray(jax.jit(logits, static_argnums=1)(weights, spec, ids, segments, positions))
        with torch.no_grad():
            wanted = theirs(torch.tensor(np.asarray(ids), dtype=torch.long), use_cache=False).logits.numpy()
        assert np.abs(found - wanted).max() <= bound
        assert found.std() > 0.1


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_heads_and_tables(tied, kv_heads):
    assert_same_logits(model_of(tied_embeddings=tied, kv_heads=kv_heads), [200])


@pytest.mark.parametrize(
    "biases", [(), ("attention_bias",), ("mlp_bias",), ("attention_bias", "mlp_bias")], ids="+".join
)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_biases_and_scalings(scaling, biases):
    """16 tokens lie within the original length of 64, 512 far past it."""
    assert_same_logits(model_of(scaling, **dict.fromkeys(biases, True)), [16, 512])


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_dynamic_scaling_of_wide_heads(theta):
    """Around the original length, and at XGen's size of a head."""
    assert_same_logits(model_of("dynamic", head_size=128, rope_theta=theta, attention_bias=True), [63, 64, 65, 1000])


def test_a_missing_bias_is_seen():
    """The comparison can fail: without one layer's key bias, which only moves scores, the logits are others."""
    import torch

    model = model_of(attention_bias=True)
    spec = Spec(model, model.vocab_size, Compute(precision="float32"))
    named = dict(as_dict(weights_of(spec)))
    ids, _, segments, positions = batch_of(spec, [[200]])
    found = np.asarray(jax.jit(logits, static_argnums=1)(from_dict(named, spec), spec, ids, segments, positions))
    named["block.key_bias"] = named["block.key_bias"].at[0].set(0)
    with torch.no_grad():
        wanted = loaded(model, named)(torch.tensor(np.asarray(ids), dtype=torch.long)).logits.numpy()
    assert np.abs(found - wanted).max() > 10 * BOUND
