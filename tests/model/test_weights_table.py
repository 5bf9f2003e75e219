"""The weights table, and what derives from it: counts, FLOPs, decay, initialisation, the pytree by name."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import VARIANTS, spec_of

from xgen.errors import CheckpointError, RecipeError
from xgen.model import (
    WEIGHTS,
    Spec,
    Weights,
    abstract,
    as_dict,
    flops_per_token,
    from_dict,
    initialise,
    parameter_count,
)
from xgen.model.weights import Block, decayed
from xgen.recipe.load import load_recipe

SEVEN_B = Spec.of(load_recipe("xgen-7b-8k").recipe, real_vocab=50_313)


def test_xgen_7b_has_its_published_parameters():
    """Two tables of 51,200 rows; a layer's four 4096 x 4096 and three 4096 x 11008 matrices and two norms; a norm."""
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert 2 * 51_200 * 4096 + 32 * layer + 4096 == 6_895_702_016
    assert parameter_count(SEVEN_B) == 6_895_702_016


@pytest.mark.parametrize(("length", "billions"), [(2048, 41.7), (4096, 43.3), (8192, 46.6)])
def test_xgen_7b_flops_per_token(length, billions):
    """Six a matrix weight but the embedding's, and 4 x 4096 a layer and visible key, three times, for length/2 keys."""
    products = 6_895_702_016 - 51_200 * 4096 - 65 * 4096
    flops = flops_per_token(SEVEN_B, length)
    assert flops == 6 * products + 3 * 32 * 4 * 4096 * length / 2
    assert round(flops / 1e9, 1) == billions


def test_a_tied_head_costs_what_an_untied_one_does():
    assert flops_per_token(spec_of("xgen", tied_embeddings=True), 64) == flops_per_token(spec_of("xgen"), 64)
    table = 96 * 32
    assert parameter_count(spec_of("xgen")) - parameter_count(spec_of("xgen", tied_embeddings=True)) == table


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_count_is_that_of_the_arrays(variant):
    arrays = as_dict(abstract(spec_of(variant))).values()
    assert parameter_count(spec_of(variant)) == sum(math.prod(array.shape) for array in arrays)


def test_every_field_has_one_row_and_every_row_a_field():
    fields = [f"block.{field.name}" for field in dataclasses.fields(Block)]
    fields += [field.name for field in dataclasses.fields(Weights) if field.name != "block"]
    assert sorted(fields) == sorted(row.name for row in WEIGHTS)


def test_foreign_names_are_unique_and_name_the_layer_exactly_where_there_are_layers():
    for names in ([row.hugging_face for row in WEIGHTS], [row.gguf for row in WEIGHTS]):
        assert len(set(names)) == len(names)
        assert [("{layer}" in name) for name in names] == [row.axes[0] == "layer" for row in WEIGHTS]


ATTENTION_BIASES = {f"block.{name}_bias" for name in ("query", "key", "value", "output")}
MLP_BIASES = {f"block.{name}_bias" for name in ("gate", "up", "down")}
BIASES = ATTENTION_BIASES | MLP_BIASES
NORM_BIASES = {"block.attention_norm_bias", "block.mlp_norm_bias", "final_norm_bias"}
ABSENT = {
    "xgen": NORM_BIASES | BIASES,
    "grouped_tied": NORM_BIASES | BIASES | {"head"},
    "parallel": NORM_BIASES | BIASES | {"block.mlp_norm"},
    "jaxformer": {"block.mlp_norm", "block.mlp_norm_bias", "block.gate", "head"} | BIASES,
    "layer_norm": {"block.gate"} | BIASES,
    "biased": NORM_BIASES,
    "biased_gelu": {"block.mlp_norm", "block.mlp_norm_bias", "block.gate", "block.gate_bias"} | ATTENTION_BIASES,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_has_the_weights_its_shape_asks_for(variant):
    spec = spec_of(variant)
    weights = as_dict(abstract(spec))
    assert {row.name for row in WEIGHTS} - weights.keys() == ABSENT[variant]
    assert jax.tree.leaves(from_dict(weights, spec)) == list(weights.values())


def test_the_axes_of_each_weight():
    spec = spec_of("xgen", layers=3, hidden_size=10, heads=6, kv_heads=2, head_size=4, mlp_size=14, vocab_size=91)
    assert {name: array.shape for name, array in as_dict(abstract(spec)).items()} == {
        "embedding": (91, 10),
        "block.attention_norm": (3, 10),
        "block.query": (3, 10, 6, 4),
        "block.key": (3, 10, 2, 4),
        "block.value": (3, 10, 2, 4),
        "block.output": (3, 6, 4, 10),
        "block.mlp_norm": (3, 10),
        "block.gate": (3, 10, 14),
        "block.up": (3, 10, 14),
        "block.down": (3, 14, 10),
        "final_norm": (10,),
        "head": (10, 91),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("block.up"), "block.up is missing"),
        (lambda arrays: arrays.update(stranger=arrays["final_norm"]), "stranger is not in the weights table"),
        (lambda arrays: arrays.update(head=arrays["embedding"]), "head has shape (96, 32), the model needs (32, 96)"),
        (lambda arrays: arrays.update({"block.mlp_norm_bias": arrays["block.mlp_norm"]}), "block.mlp_norm_bias is not"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message):
    spec = spec_of()
    arrays = as_dict(abstract(spec))
    change(arrays)
    with pytest.raises(CheckpointError) as caught:
        from_dict(arrays, spec)
    assert message in str(caught.value)


def test_every_misfit_is_named_at_once():
    arrays = as_dict(abstract(spec_of()))
    del arrays["head"], arrays["embedding"]
    with pytest.raises(CheckpointError, match="embedding is missing; head is missing"):
        from_dict(arrays, spec_of())


def test_more_ids_than_rows_is_refused():
    with pytest.raises(RecipeError, match="51200 rows cannot hold the tokenizer's 60000 ids"):
        Spec(SEVEN_B.model, 60_000)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decay_is_exactly_on_matrices(variant):
    matrices = {"embedding", "head", "block.query", "block.key", "block.value", "block.output"}
    matrices |= {"block.gate", "block.up", "block.down"}
    found = as_dict(decayed(abstract(spec_of(variant))))
    assert {name for name, decays in found.items() if decays} == matrices - ABSENT[variant]
    assert {name for name, decays in found.items() if not decays} == found.keys() - matrices


def test_initial_values_depend_on_the_seed_and_the_weights_own_shape_only():
    one, other = initialise(spec_of(), 7), initialise(spec_of(vocab_size=200, mlp_size=80, kv_heads=1), 7)
    for name in ("query", "output"):
        np.testing.assert_array_equal(getattr(one.block, name), getattr(other.block, name))
    assert (np.asarray(one.embedding) != np.asarray(initialise(spec_of(), 8).embedding)).all()


def test_no_two_weights_are_drawn_alike():
    arrays = as_dict(initialise(spec_of(initialisation="normal"), 7))
    layers = [np.ravel(layer) for name, array in arrays.items() if "norm" not in name for layer in array]
    for place, one in enumerate(layers):
        for other in layers[:place]:
            shared = min(one.size, other.size)
            assert not np.allclose(one[:shared], other[:shared])


@pytest.mark.parametrize("initialisation", ["normal", "fan_in"])
def test_initial_scales(initialisation):
    """Drawn normals cut at three deviations have 0.9866 of the plain ones' deviation."""
    sizes = {"layers": 8, "hidden_size": 64, "mlp_size": 256, "heads": 4, "head_size": 32, "vocab_size": 512}
    weights = as_dict(initialise(spec_of(**sizes, initialisation=initialisation), 3))
    into = {"block.output": 128, "block.down": 256}
    for name, array in weights.items():
        assert array.dtype == jnp.float32
        if "norm" in name:
            assert (np.asarray(array) == 1).all()
            continue
        scale = 0.02
        if initialisation == "fan_in" and name != "embedding":
            scale = into.get(name, 64) ** -0.5 * (0.25 if name in into else 1)
        assert abs(np.std(array) / (0.9866 * scale) - 1) < 0.02, name
        assert abs(np.mean(array)) < 0.02 * scale
        assert np.abs(array).max() <= 3 * scale * (1 + 1e-6)


def test_biases_start_at_zero():
    weights = initialise(spec_of("layer_norm"), 0)
    for bias in (weights.final_norm_bias, weights.block.attention_norm_bias, weights.block.mlp_norm_bias):
        assert not np.asarray(bias).any()
