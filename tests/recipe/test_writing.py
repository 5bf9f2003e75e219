"""A resolved recipe written down is the same recipe; its hash and its differences are of its values alone."""

import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from samples import SMALLEST, inline, recipes, write

from xgen.recipe.load import changed_keys, dump_toml, load_recipe, recipe_hash


@settings(max_examples=150, deadline=None)
@given(recipes())
def test_a_written_recipe_reads_back_equal_with_nothing_left_to_derive(table: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        text = "\n".join(f"{key} = {inline(value)}" for key, value in table.items())
        recipe = load_recipe(write(Path(folder), text)).recipe
        again = load_recipe(write(Path(folder), dump_toml(recipe), "again.toml"))
    assert again.recipe == recipe
    derived = [path for path, origin in again.origins.items() if origin.kind != "given"]
    assert all(".mesh." in path and path.startswith("stages.") for path in derived)  # they follow [mesh], see dump_toml
    assert recipe_hash(again.recipe) == recipe_hash(recipe)
    assert changed_keys(recipe, again.recipe) == []


@settings(max_examples=50, deadline=None)
@given(recipes())
def test_what_is_given_is_kept(table: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        text = "\n".join(f"{key} = {inline(value)}" for key, value in table.items())
        recipe = load_recipe(write(Path(folder), text)).recipe
    _assert_within(table, recipe.model_dump(mode="json"))


def _assert_within(part: Any, whole: Any) -> None:
    """Every value of `part` stands in `whole` at its place."""
    if isinstance(part, dict):
        for key, value in part.items():
            _assert_within(value, whole[key])
    elif isinstance(part, list):
        assert len(part) == len(whole)
        for left, right in zip(part, whole, strict=True):
            _assert_within(left, right)
    else:
        assert part == whole


def test_the_written_form_is_toml_in_units() -> None:
    table = tomllib.loads(dump_toml(load_recipe("xgen-7b-8k").recipe))
    assert table["stages"][2]["length"] == "8K"
    assert table["stages"][0]["tokens"] == "800B"
    assert table["stages"][1]["batch_tokens"] == "4M"
    assert table["notes"]["optimizer.learning_rate"].startswith("LLaMA's value")


def test_a_recipe_written_before_a_key_was_added_is_the_same_recipe(tmp_path: Path) -> None:
    """Run folders outlive releases: what was written without biases and turns means what it meant."""
    recipe = load_recipe("tiny", ["model.rope_scaling={ kind = 'yarn', factor = 4, original_length = '2K' }"]).recipe
    text = dump_toml(recipe)
    scaling, biases = text.partition(", low_turns")[2].partition("}")[0], "attention_bias = false\nmlp_bias = false\n"
    older = text.replace(", low_turns" + scaling, " ").replace(biases, "")
    assert 'rope_scaling = { kind = "yarn", factor = 4.0, original_length = "2K" }\ntied_embeddings' in older
    again = load_recipe(write(tmp_path, older)).recipe
    assert changed_keys(recipe, again) == []
    assert again == recipe


def test_changed_keys_are_those_that_differ(tmp_path: Path) -> None:
    source = write(tmp_path, SMALLEST)
    old = load_recipe(source).recipe
    new = load_recipe(source, ["model.layers=3", "stages.1.mixture={ a = 1 }", "optimizer.betas=[0.9, 0.99]"]).recipe
    assert changed_keys(old, new) == ["model.layers", "optimizer.betas", "stages.1.mixture.b"]
    assert recipe_hash(old) != recipe_hash(new)


def test_a_stage_more_is_a_change_of_all_its_keys(tmp_path: Path) -> None:
    source = write(tmp_path, SMALLEST)
    old = load_recipe(source).recipe
    new = old.model_copy(update={"stages": old.stages[:1]})
    changed = changed_keys(old, new)
    assert "stages.1.length" in changed
    assert all(path.startswith("stages.1.") for path in changed)


@pytest.mark.parametrize("override", ["data.seed=2", "model.norm_epsilon=2e-6", "stages.1.tokens=5001", "name=other"])
def test_any_value_changes_the_hash(tmp_path: Path, override: str) -> None:
    source = write(tmp_path, SMALLEST)
    assert recipe_hash(load_recipe(source).recipe) != recipe_hash(load_recipe(source, [override]).recipe)


def test_the_order_of_names_changes_neither_hash_nor_keys(tmp_path: Path) -> None:
    one = load_recipe(write(tmp_path, SMALLEST), ["data.sources={ a = 'x', b = 'y' }"]).recipe
    other = load_recipe(write(tmp_path, SMALLEST), ["data.sources={ b = 'y', a = 'x' }"]).recipe
    assert recipe_hash(one) == recipe_hash(other)
    assert changed_keys(one, other) == []
