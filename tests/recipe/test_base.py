"""A recipe over a model that is continued: what it takes over, what it may change, what it must not."""

from pathlib import Path

import pytest
from samples import write

from xgen.errors import RecipeError
from xgen.recipe.base import Base
from xgen.recipe.load import Resolved, load_recipe
from xgen.recipe.schema import Model, RopeScaling

SHAPE = {"layers": 3, "hidden_size": 96, "heads": 4, "kv_heads": 2, "head_size": 16, "mlp_size": 200, "vocab_size": 777}
BASE = Base("runs/old", Model(**SHAPE, rope_theta=5e5, norm_epsilon=1e-5), 2048, "</s>")
STAGES = """
[data]
sources = { mine = "stores/mine" }
[optimizer]
learning_rate = 1e-4
[[stages]]
name = "8k"
length = "8K"
tokens = "64K"
batch_tokens = "8K"
"""


def load(folder: Path, text: str = STAGES, *overrides: str, base: Base | None = BASE) -> Resolved:
    return load_recipe(write(folder, text), overrides, base=base)


def test_what_the_recipe_leaves_out_is_the_models(tmp_path: Path) -> None:
    resolved = load(tmp_path)
    assert resolved.recipe.model == BASE.model
    assert resolved.recipe.tokenizer.end_of_text == "</s>"
    for key in ("model.kv_heads", "model.rope_scaling.kind", "tokenizer.end_of_text"):
        assert (resolved.origins[key].kind, resolved.origins[key].detail) == ("inherited", "the model runs/old")
    with pytest.raises(RecipeError, match=r"model\.layers"):
        load(tmp_path, base=None)


def test_the_same_value_stated_again_is_no_contradiction(tmp_path: Path) -> None:
    resolved = load(tmp_path, STAGES + "[model]\nlayers = 3\n", "model.heads=4")
    assert resolved.recipe.model == BASE.model
    assert resolved.origins["model.layers"].kind == "given"


def test_any_other_shape_is_refused_with_both_values(tmp_path: Path) -> None:
    text = STAGES + "[model]\nlayers = 2\ntied_embeddings = true\nnorm_epsilon = 1e-6\n"
    with pytest.raises(RecipeError) as refused:
        load(tmp_path, text, "model.vocab_size=1024")
    told = str(refused.value).splitlines()
    for key, mine, theirs in (
        ("layers", "2", "3"), ("vocab_size", "1024", "777"), ("norm_epsilon", "1e-06", "1e-05"),
        ("tied_embeddings", "true", "false"),
    ):  # fmt: skip
        begin = f"  model.{key}: {mine} is not the {theirs} of runs/old"
        assert [line for line in told if line.startswith(begin) and line.endswith("leave it out")], told
    assert len(told) == 5


def test_the_rope_and_the_initialisation_may_change(tmp_path: Path) -> None:
    changed = load(tmp_path, STAGES, "model.rope_theta=1e6", "model.initialisation=fan_in").recipe.model
    assert changed == BASE.model.model_copy(update={"rope_theta": 1e6, "initialisation": "fan_in"})


def test_a_new_scaling_stretches_from_the_models_length_to_the_longest_stage(tmp_path: Path) -> None:
    resolved = load(tmp_path, STAGES, "model.rope_scaling.kind=linear")
    scaling = resolved.recipe.model.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_length) == ("linear", 4.0, 2048)
    assert resolved.origins["model.rope_scaling.factor"].kind == "derived"
    stated = load(tmp_path, STAGES, "model.rope_scaling.kind=linear", "model.rope_scaling.factor=8").recipe.model
    assert stated.rope_scaling.factor == 8.0


def test_another_scaling_of_a_stretched_model_keeps_its_factor_and_no_scaling_drops_it(tmp_path: Path) -> None:
    scaling = RopeScaling(kind="llama3", factor=8.0, original_length=4096)
    base = Base("runs/old", BASE.model.model_copy(update={"rope_scaling": scaling}), 32768)
    assert load(tmp_path, base=base).recipe.model.rope_scaling == scaling
    other = load(tmp_path, STAGES, "model.rope_scaling.kind=linear", base=base).recipe.model.rope_scaling
    assert (other.factor, other.original_length) == (8.0, 4096)
    none = load(tmp_path, STAGES, "model.rope_scaling.kind=none", base=base).recipe.model.rope_scaling
    assert none.factor == 1.0


def test_no_stage_may_bear_the_models_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages\.0\.name: 'start' is the name of the model"):
        load(tmp_path, STAGES.replace('"8k"', '"start"'))
    full = STAGES.replace('"8k"', '"start"') + "[model]\nlayers = 1\nhidden_size = 8\nheads = 1\nvocab_size = 9\n"
    assert load(tmp_path, full, base=None).recipe.stages[0].name == "start"


def test_a_new_factor_takes_its_own_attention_factor(tmp_path: Path) -> None:
    scaling = RopeScaling(kind="yarn", factor=4.0, original_length=2048)
    base = Base("runs/old", BASE.model.model_copy(update={"rope_scaling": scaling}), 8192)
    doubled = load(tmp_path, STAGES, "model.rope_scaling.factor=8", base=base).recipe.model.rope_scaling
    assert doubled == RopeScaling(kind="yarn", factor=8.0, original_length=2048)
    assert doubled.attention_factor > scaling.attention_factor
