"""`xgen train` as typed: usage, exit codes, `--debug`, and what reaches the two output streams."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from micro_runs import Micro, assert_one_error, command, run_process


@pytest.mark.parametrize(
    "arguments",
    [("train", "--no-such-option"), ("nosuchverb",), ("checkpoint", "nosuchverb"), ("checkpoint", "list")],
)
def test_usage_errors_exit_with_2(arguments: tuple[str, ...]) -> None:
    done = command(*arguments)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert done.err
    assert not done.out


def test_what_to_train_and_where_must_be_said(tmp_path: Path) -> None:
    assert_one_error(command("train", "tiny"), 2, "--run DIR")
    assert_one_error(command("train", "--run", tmp_path / "run"), 2, "RECIPE")
    done = command("train", "--resume", tmp_path, "--run", tmp_path / "run")
    assert_one_error(done, 2, "leave out --run")


def test_debug_shows_the_traceback() -> None:
    """In a process of its own, as a user sees it."""
    plain, told = run_process("train", "tiyn", "--run", "x"), run_process("--debug", "train", "tiyn", "--run", "x")
    assert plain.code == told.code == 2
    assert "Traceback" not in plain.err
    assert plain.err.count("\n") == 1
    assert "Traceback (most recent call last)" in told.err
    assert told.err.splitlines()[-1] == plain.err.strip()
    assert command("train", "tiyn", "--run", "x", "--debug").err.splitlines()[-1] == plain.err.strip()


def test_a_result_that_could_not_be_written_is_refused_before_training(micro: Micro, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = command("train", micro.recipe, "--run", run, "--json", tmp_path / "no/such/result.json")
    assert_one_error(done, 4, "no/such")
    assert_one_error(command("train", micro.recipe, "--run", run, "--json", tmp_path), 4, "it is a folder")
    assert not run.exists()


def test_plain_lines_tell_the_run(micro: Micro, tmp_path: Path) -> None:
    run = micro.copy(tmp_path / "run", tokens=3840)
    done = command("train", "--resume", run)
    assert done.code == 0
    figures, report = done.out.splitlines()
    assert " bits per byte (xz -9e: " in figures
    assert report == f"report: {run / 'report.html'}"
    told = done.err.splitlines()
    assert "stage 64" in told
    assert any(line.startswith("5.12K of 5.12K tokens (100 %)") for line in told)
    assert any(line.startswith("held-out loss") for line in told)
    assert "\x1b" not in done.err, "no control characters where there is no terminal"


def test_preparation_is_one_task_a_source(micro: Micro, tmp_path: Path) -> None:
    done = command("train", micro.recipe, "--run", tmp_path / "run", "evaluation.tokens=10")
    assert done.code == 2
    assert done.err.count("texts: tokenising ...") == 1


def test_data_replaces_the_recipe_s_sources(micro: Micro, tmp_path: Path) -> None:
    """A ready store brings its tokenizer; the run is the recipe's, on other text."""
    store = tmp_path / "ready"
    assert command("prepare", micro.texts, "--out", store, "--tokenizer", "bpe:300", "--held-out", "0.2").code == 0
    run = tmp_path / "run"
    done = command("train", micro.recipe, "--run", run, "--data", store, "--json", "-", "evaluation.every=1M")
    assert done.code == 0, done.err
    assert json.loads(done.out)["recipe"] == "micro"
    assert f'ready = "{store}"' in (run / "recipe.toml").read_text()
    assert not (run / "stores/ready").exists(), "a ready store stays where it is"


def test_two_sources_of_one_name_are_refused(micro: Micro, tmp_path: Path) -> None:
    done = command("train", micro.recipe, "--run", tmp_path / "r", "--data", "a/texts", "--data", "b/texts")
    assert_one_error(done, 2, "texts", "NAME=")


def test_the_version_is_told() -> None:
    told = command("--version")
    assert told.code == 0
    assert told.out.startswith("xgen ")


def test_a_run_does_not_move_into_a_folder_of_texts(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear reader", encoding="utf-8")
    told = command("train", "tiny", "--run", tmp_path)
    assert told.code == 2
    assert "letter.txt" in told.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letter.txt"]


def test_what_is_missing_is_what_is_asked_for(tmp_path: Path) -> None:
    assert "--run DIR" in command("train", "tiny").err
    assert "RECIPE" in command("train", "--run", tmp_path / "run").err
    assert "takes no recipe" in command("train", "tiny", "--resume", tmp_path).err
