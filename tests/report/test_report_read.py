"""A run folder is read as it lies; what cannot be read is said."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
from synthetic_runs import CONTINUED, FINISHED, RESUMED, UNFINISHED, measurements, write_run

from xgen.errors import DataError
from xgen.report.read import read_run


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run")


def change_line(path, at, change):
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[at] = change(lines[at])
    path.write_text("".join(lines), encoding="utf-8")


def test_what_was_written_is_read_back(folder):
    run = read_run(folder)
    assert len(run.steps) == sum(FINISHED.steps)
    assert run.tokens == FINISHED.total
    assert run.trained
    assert run.remarks == ()
    for line, at in zip((folder / "metrics.jsonl").read_text().splitlines(), range(len(run.steps)), strict=True):
        written = json.loads(line)
        assert run.recipe.stages[run.steps.stage[at]].name == written["stage"]
        for name in (
            "step",
            "tokens",
            "length",
            "loss",
            "grad_norm",
            "update_norm",
            "param_norm",
            "lr",
            "tokens_per_second",
        ):
            assert getattr(run.steps, name)[at] == written[name]
    assert np.isnan(run.steps.flops_utilisation).all()
    assert [one.tokens for one in run.evaluations()] == sorted({one.tokens for one in run.evaluations()})
    assert run.measured is not None
    assert len(run.measured.strided) == 3 * 4


def test_the_made_up_run_has_the_names_that_runs_write(folder):
    """The other side of the files: a name that training or measurement changes must be changed here too."""
    from xgen.measure import stages as writer
    from xgen.measure.since import Change, SinceStart
    from xgen.training.folder import STEP_KEYS

    assert set(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])) == set(STEP_KEYS)
    made_up = measurements(FINISHED)
    assert set(made_up) == set(writer.Measurements.__annotations__)
    assert set(made_up["text"]) == set(writer.Text.__annotations__)
    assert set(made_up["strided"][0]) <= set(writer.Strided.__annotations__)
    assert set(made_up["by_position"][0]["bins"][0]) == set(writer.Bin.__annotations__)
    assert set(made_up["fixed_target"][0]) == set(writer.FixedTarget.__annotations__)
    assert set(made_up["fixed_target_gain"][0]) == set(writer.Gain.__annotations__)
    changed = measurements(CONTINUED)["since_start"][-1]
    assert set(changed) == set(SinceStart.__annotations__)
    assert set(changed["changes"][0]) == set(Change.__annotations__)


def test_steps_that_stand_in_the_log_twice_are_kept_once_the_last_taking(tmp_path):
    folder = write_run(tmp_path / "run", RESUMED)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    run = read_run(folder)
    assert run.steps.step.tolist() == list(range(1, sum(RESUMED.steps) + 1))
    assert run.steps.repeated == len(lines) - sum(RESUMED.steps) > 0
    last = {line["step"]: line["loss"] for line in lines}
    assert run.steps.loss.tolist() == [last[step] for step in run.steps.step.tolist()]
    assert len(run.of_kind("resumed")) == 2
    tokens = [one.tokens for one in run.evaluations()]
    assert tokens == sorted(set(tokens))


def test_a_torn_last_line_is_left_out_and_told(folder):
    whole = read_run(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 601, "tok')
    run = read_run(folder)
    assert len(run.steps) == len(whole.steps)
    assert run.remarks == (
        f"metrics.jsonl: line cut short and left out (line {len(whole.steps) + 1}); a kill while writing does this.",
    )


def test_files_not_there_yet_are_told(folder):
    (folder / "metrics.jsonl").unlink()
    shutil.rmtree(folder / "evals")
    run = read_run(folder)
    assert len(run.steps) == 0
    assert run.tokens == 0
    assert run.measured is None
    assert "metrics.jsonl is missing" in run.remarks[0]


def test_an_unfinished_run_is_not_trained(tmp_path):
    run = read_run(write_run(tmp_path / "run", UNFINISHED))
    assert not run.trained
    assert run.measured is None


def test_bounds_that_are_not_known_are_no_numbers(folder):
    path = folder / "evals" / "after_training.json"
    value = json.loads(path.read_text())
    value["fixed_target_gain"][0]["low"] = None
    path.write_text(json.dumps(value))
    run = read_run(folder)
    assert run.measured is not None
    assert math.isnan(run.measured.fixed_target_gain[0].low)


@pytest.mark.parametrize(
    ("file", "at", "change", "words"),
    [
        ("metrics.jsonl", 3, lambda line: line.replace('"loss":', '"lost":'), "line 4: no loss"),
        (
            "metrics.jsonl",
            3,
            lambda line: line.replace('"stage": "64"', '"stage": "65"'),
            "stage '65' is not in the recipe",
        ),
        ("metrics.jsonl", 3, lambda line: line.replace('"step": 4', '"step": 4.5'), "4.5, not a whole number"),
        ("metrics.jsonl", 3, lambda line: line.replace('"lr": ', '"lr": "x", "l": '), "'x', not a number"),
        ("metrics.jsonl", 3, lambda _: "[1]\n", "line 4: expected an object"),
        ("events.jsonl", 1, lambda line: line.replace('"kind": ', '"kin": '), "line 2: kind is None"),
        ("events.jsonl", 1, lambda line: line.replace('"time": ', '"time": "noon", "t": '), "'noon', not a number"),
        ("recipe.toml", 0, lambda _: "name = \n", "is not TOML"),
        ("recipe.toml", 0, lambda _: "naem = 'x'\n", "is no resolved recipe"),
        ("evals/after_training.json", 0, lambda _: "{", "is not what a run writes"),
        ("evals/after_training.json", 0, lambda _: "{}", "is not what a run writes"),
        (
            "evals/after_training.json",
            0,
            lambda line: line.replace('"documents": 48', '"documents": "x"', 1),
            "text.documents",
        ),
    ],
)
def test_a_file_that_no_run_writes_is_an_error_that_names_it(folder, file, at, change, words):
    change_line(folder / file, at, change)
    with pytest.raises(DataError, match=r"recipe|metrics|events|after_training") as caught:
        read_run(folder)
    assert words in str(caught.value)
    assert str(folder / file) in str(caught.value)


def test_a_folder_that_is_no_run_is_an_error_with_the_remedy(tmp_path):
    with pytest.raises(DataError, match=r"no run folder.*xgen train --run"):
        read_run(tmp_path)


def test_bytes_that_are_no_text_are_an_error(folder):
    (folder / "recipe.toml").write_bytes(b"name = '\xff'\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read_run(folder)


def test_a_loss_that_is_no_number_is_read_as_such(folder):
    change_line(folder / "metrics.jsonl", 5, lambda line: line.replace('"grad_norm": ', '"grad_norm": NaN, "g": '))
    run = read_run(folder)
    assert math.isnan(run.steps.grad_norm[5])
    assert run.steps.grad_norm[np.arange(len(run.steps)) != 5].min() > 0


def test_another_run_is_another_page(tmp_path):
    """The oracle of the tests is not a constant: the seed changes what is read."""
    one = read_run(write_run(tmp_path / "one"))
    other = read_run(write_run(tmp_path / "other", replace(FINISHED, seed=8)))
    assert one.steps.loss.tolist() != other.steps.loss.tolist()
