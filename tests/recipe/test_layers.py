"""Recipes lie over one another: what they extend below, overrides above; and each value knows its layer."""

from pathlib import Path

import pytest
from samples import SMALLEST, write

from xgen.errors import RecipeError
from xgen.recipe.load import load_recipe

PARENT = SMALLEST + '\n[notes]\n"optimizer.learning_rate" = "a guess"\n"stages.0.batch_tokens" = "another"\n'


def test_sections_merge_and_say_what_is_inherited(tmp_path: Path) -> None:
    parent = write(tmp_path, PARENT, "parent.toml")
    child = write(tmp_path, 'extends = "parent.toml"\n[model]\nlayers = 9\n')
    resolved = load_recipe(child)
    assert (resolved.recipe.model.layers, resolved.recipe.model.heads) == (9, 4)
    assert resolved.origins["model.layers"].kind == "given"
    assert (resolved.origins["model.heads"].kind, resolved.origins["model.heads"].detail) == ("inherited", str(parent))


def test_sources_and_stages_are_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path, PARENT, "parent.toml")
    stage = '[[stages]]\nname = "only"\nlength = 64\ntokens = "1K"\nbatch_tokens = 64\n'
    child = write(tmp_path, f'extends = "parent.toml"\n{stage}[data]\nsources = {{ c = "x" }}\n')
    recipe = load_recipe(child).recipe
    assert recipe.data.sources == {"c": "x"}
    assert [stage.name for stage in recipe.stages] == ["only"]
    assert not [path for path in load_recipe(child).origins if path.startswith("stages.1")]


def test_a_child_has_a_name_and_a_description_of_its_own(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, 'extends = "tiny"\n', "on-my-letters.toml")).recipe
    assert (recipe.name, recipe.description) == ("on-my-letters", "")


def test_a_note_does_not_outlive_the_value_it_spoke_of(tmp_path: Path) -> None:
    write(tmp_path, PARENT, "parent.toml")
    child = write(tmp_path, 'extends = "parent.toml"\n[optimizer]\nlearning_rate = 1.0\n')
    assert load_recipe(child).recipe.notes == {"stages.0.batch_tokens": "another"}
    assert load_recipe(child, ["stages.0.batch_tokens=512"]).recipe.notes == {}
    restated = write(tmp_path, 'extends = "parent.toml"\n[notes]\n"optimizer.learning_rate" = "sure"\n', "c2.toml")
    assert load_recipe(restated).recipe.notes["optimizer.learning_rate"] == "sure"


def test_recipes_extend_along_a_chain_of_folders(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path, PARENT, "base.toml")
    write(tmp_path / "deep", 'extends = "../base.toml"\n[model]\nlayers = 5\n', "middle.toml")
    top = write(tmp_path, 'extends = "deep/middle.toml"\n[model]\nheads = 8\n', "top.toml")
    model = load_recipe(top).recipe.model
    assert (model.layers, model.heads, model.hidden_size) == (5, 8, 64)


def test_a_circle_is_an_error(tmp_path: Path) -> None:
    first = write(tmp_path, 'extends = "b.toml"\n', "a.toml")
    write(tmp_path, 'extends = "a.toml"\n', "b.toml")
    with pytest.raises(RecipeError, match=r"a\.toml -> .*b\.toml -> .*a\.toml"):
        load_recipe(first)


def test_a_run_folder_is_its_recipe(tmp_path: Path) -> None:
    write(tmp_path, SMALLEST, "recipe.toml")
    assert load_recipe(tmp_path).recipe == load_recipe(tmp_path / "recipe.toml").recipe


def test_windows_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALLEST.replace("\n", "\r\n").encode())
    assert load_recipe(path).recipe.model.layers == 2


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("stages.0.tokens=120K", "stages.0.tokens", 120_000),
        ("stages.1.length = 64", "stages.1.length", 64),
        ("stages.1.length='64'", "stages.1.length", 64),
        ("model.tied_embeddings=true", "model.tied_embeddings", True),
        ("model.activation=gelu", "model.activation", "gelu"),
        ("optimizer.betas=[0.8, 0.9]", "optimizer.betas", (0.8, 0.9)),
        ("stages.0.name=2024", "stages.0.name", "2024"),
        ("evaluation.contexts=['1K', 2000]", None, None),
        ("data.sources={ a = '1', b = '2' }", "data.sources.a", "1"),
        ('data.sources."c"=a=b', "data.sources.c", "a=b"),
        ("mesh.fsdp=4", "mesh.fsdp", 4),
        ("mesh.replica=2", "stages.1.mesh.replica", 2),
    ],
)
def test_overrides_reach_any_value(tmp_path: Path, override: str, path: str | None, value: object) -> None:
    source = write(tmp_path, SMALLEST)
    overrides = [override] if path else [override, "stages.1.length=256"]
    tree = load_recipe(source, overrides).recipe.model_dump()
    if path is None:
        assert tree["evaluation"]["contexts"] == (1024, 2000)
        return
    for part in path.split("."):
        tree = tree[int(part)] if isinstance(tree, (list, tuple)) else tree[part]
    assert tree == value


def test_the_last_override_wins_and_is_marked(tmp_path: Path) -> None:
    resolved = load_recipe(write(tmp_path, SMALLEST), ["model.heads=2", "model.heads=8"])
    assert resolved.recipe.model.heads == 8
    assert resolved.origins["model.heads"].kind == "override"
    assert resolved.origins["model.hidden_size"].kind == "given"


def test_an_override_of_a_table_replaces_it(tmp_path: Path) -> None:
    source = write(tmp_path, SMALLEST)
    resolved = load_recipe(source, ["stages.0.mixture={ a = 1, b = 2 }", "stages.0.mixture={ a = 5 }"])
    assert resolved.recipe.stages[0].mixture == {"a": 5.0}
    assert "stages.0.mixture.b" not in resolved.origins


@pytest.mark.parametrize("override", ["data.sources.a=elsewhere", "data.sources={ c = 'x' }", "data.sources.c=x"])
def test_a_note_of_a_table_goes_when_one_of_its_values_changes(tmp_path: Path, override: str) -> None:
    source = write(tmp_path, SMALLEST + '[notes]\n"data.sources" = "of a certain library"\n')
    assert load_recipe(source).recipe.notes
    assert load_recipe(source, [override]).recipe.notes == {}


def test_a_note_of_a_value_goes_when_its_table_is_replaced(tmp_path: Path) -> None:
    source = write(tmp_path, SMALLEST + '[notes]\n"data.sources.a" = "of a certain library"\n')
    assert load_recipe(source, ["data.sources={ a = 'x' }"]).recipe.notes == {}
    assert load_recipe(source, ["data.sources.b=x"]).recipe.notes
