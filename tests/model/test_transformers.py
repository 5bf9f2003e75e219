"""Against transformers' own LLaMA, with torch: frequencies, logits, grouped-query heads, tied tables."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import batch_of, weights_of

from xgen.model import Spec, as_dict, logits
from xgen.model.rope import attention_factor, frequencies
from xgen.model.weights import WEIGHTS
from xgen.recipe.schema import Compute, Model, RopeScaling

pytestmark = pytest.mark.oracle

SCALINGS = {
    "none": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "original_length": 64},
    "yarn": {"factor": 4.0, "original_length": 64},
}


def model_of(kind, **changes) -> Model:
    sizes = {"layers": 2, "hidden_size": 64, "heads": 4, "kv_heads": 2, "head_size": 16, "mlp_size": 96}
    scaling = RopeScaling(kind=kind, **SCALINGS[kind])
    return Model(**{**sizes, "vocab_size": 128, "rope_scaling": scaling, **changes})


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
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
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
        max_position_embeddings=1024,
        rope_parameters=rope,
        attn_implementation="eager",
    )


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
@pytest.mark.parametrize("head_size", [16, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_frequencies(kind, head_size, theta):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = model_of(kind, head_size=head_size, rope_theta=theta)
    wanted, factor = ROPE_INIT_FUNCTIONS[kind](config_of(model), "cpu")
    np.testing.assert_allclose(frequencies(model), wanted.numpy(), rtol=1e-5)
    assert attention_factor(model) == pytest.approx(factor)


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
            matrix = part
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


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits(kind, tied, kv_heads):
    import torch

    model = model_of(kind, tied_embeddings=tied, kv_heads=kv_heads)
    spec = Spec(model, model.vocab_size, Compute(precision="float32"))
    weights = weights_of(spec)
    ids, _, segments, positions = batch_of(SimpleNamespace(real_vocab=128), [[200], [200]])
    found = jax.jit(logits, static_argnums=1)(weights, spec, ids, segments, positions)
    with torch.no_grad():
        wanted = loaded(model, as_dict(weights))(torch.tensor(np.asarray(ids), dtype=torch.long)).logits.numpy()
    assert np.abs(found - wanted).max() <= 1e-4
    assert jnp.std(found) > 0.1
