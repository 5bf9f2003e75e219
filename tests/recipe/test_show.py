"""`xgen recipe list|show`: every value with its origin, for people and for machines."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from samples import SMALLEST, write
from typer.testing import CliRunner

from xgen.cli.recipe import recipe_app
from xgen.errors import RecipeError
from xgen.recipe.load import load_recipe, recipe_hash, shipped_recipes
from xgen.recipe.show import as_text, rows


def run(*arguments: str) -> str:
    result = CliRunner().invoke(recipe_app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_rows_are_all_values_and_nothing_else(tmp_path: Path) -> None:
    resolved = load_recipe(write(tmp_path, SMALLEST))
    assert {row.path for row in rows(resolved)} == set(resolved.origins)


def test_show_says_where_each_value_came_from(tmp_path: Path) -> None:
    source = str(write(tmp_path, SMALLEST))
    lines = {line.split()[0]: line for line in run("show", source, "model.layers=3").splitlines()}
    assert lines["model.layers"].split(maxsplit=2)[1:] == ["3", "override on the command line"]
    assert lines["model.heads"].endswith(f"given in {source}")
    assert lines["model.head_size"].endswith("derived from model.hidden_size / model.heads")
    assert lines["model.norm"].split()[1:] == ['"rms"', "default"]
    assert lines["stages.1.tokens"].split()[1] == '"5K"'


def test_show_puts_notes_beside_their_values() -> None:
    lines = run("show", "xgen-7b-8k").splitlines()
    [rate] = [line for line in lines if line.startswith("optimizer.learning_rate")]
    assert rate.endswith("inherited from xgen-7b-4k  # LLaMA's value; XGen's is not published")


def test_a_note_of_a_table_stands_beside_each_of_its_values(tmp_path: Path) -> None:
    resolved = load_recipe(write(tmp_path, SMALLEST + '[notes]\n"data.sources" = "mine"\n'))
    assert {row.path for row in rows(resolved) if row.note == "mine"} == {"data.sources.a", "data.sources.b"}
    assert as_text(resolved).count("# mine") == 2


def test_show_for_machines() -> None:
    found = json.loads(run("show", "xgen-7b-8k", "--json", "-"))
    resolved = load_recipe("xgen-7b-8k")
    assert found["recipe"] == resolved.recipe.model_dump(mode="json")
    assert found["hash"] == recipe_hash(resolved.recipe)
    values = {each["path"]: each for each in found["values"]}
    assert values["stages.2.length"]["value"] == 8192
    assert values["evaluation.contexts"]["value"] == [1024, 2048, 4096, 8192]
    assert values["stages.2.batch_tokens"]["origin"] == "derived"
    assert values["optimizer.clip"]["note"].startswith("LLaMA's value")


def test_json_goes_to_a_file_beside_the_text(tmp_path: Path) -> None:
    text = run("list", "--json", str(tmp_path / "list.json"))
    found = json.loads((tmp_path / "list.json").read_text(encoding="utf-8"))["recipes"]
    assert [each["name"] for each in found] == list(shipped_recipes())
    assert found[-1]["lengths"] == [2048, 4096, 8192]
    assert found[-1]["tokens"] == 1_500_000_000_000
    assert [line.split()[0] for line in text.splitlines()] == list(shipped_recipes())
    assert "2K > 4K > 8K" in text.splitlines()[-1]


def test_mistakes_reach_the_caller_as_our_errors() -> None:
    with pytest.raises(RecipeError, match="did you mean tiny"):
        run("show", "tinny")


def test_listing_recipes_loads_nothing_heavy() -> None:
    script = (
        "import sys; from xgen.cli.recipe import recipe_app; recipe_app(['list'], standalone_mode=False); "
        "sys.exit([name for name in ('jax', 'numpy', 'tokenizers') if name in sys.modules] or 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
