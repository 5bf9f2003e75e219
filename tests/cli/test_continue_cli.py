"""`xgen train --from` as typed: what it is refused for, and what `xgen recipe show --from` shows."""

from __future__ import annotations

import json
from pathlib import Path

from micro_runs import Micro, assert_one_error, command

LONGER = """
data.sources = {{ texts = {texts} }}
optimizer.learning_rate = 1e-4
[[stages]]
name = "{name}"
length = 128
tokens = 1024
batch_tokens = 512
"""


def recipe(micro: Micro, folder: Path, name: str = "128") -> Path:
    path = folder / "longer.toml"
    path.write_text(LONGER.format(texts=json.dumps(str(micro.texts)), name=name))
    return path


def test_a_resumed_run_has_its_own_weights(micro: Micro, tmp_path: Path) -> None:
    done = command("train", "--resume", micro.straight, "--from", tmp_path)
    assert_one_error(done, 2, "--resume goes on with the run's own weights: leave out --from")


def test_what_is_no_model_is_refused_before_anything_is_written(micro: Micro, tmp_path: Path) -> None:
    begin = ("train", recipe(micro, tmp_path), "--run", tmp_path / "run", "--from")
    assert_one_error(command(*begin, tmp_path / "nothing"), 2, "there is no model", ".gguf")
    assert_one_error(command(*begin, f"{micro.straight}@7"), 2, "no such checkpoint", "64")
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_does_not_fit_is_refused(micro: Micro, tmp_path: Path) -> None:
    begin = ("train", recipe(micro, tmp_path, "start"), "--run", tmp_path / "run", "--from", micro.straight)
    assert_one_error(command(*begin), 2, "stages.0.name: 'start' is the name of the model that the run continues")
    assert_one_error(
        command(*begin, "stages.0.name=128", "model.layers=2"), 2, "model.layers: 2 is not the 1 of", "leave it out"
    )


def test_the_model_itself_is_no_place_for_the_run(micro: Micro, tmp_path: Path) -> None:
    wanted = recipe(micro, tmp_path)
    own = micro.copy(tmp_path / "own")
    assert_one_error(command("train", wanted, "--run", own, "--from", own), 2, "already holds a run")


def test_a_recipe_over_a_model_is_shown_with_what_it_takes_over(micro: Micro, tmp_path: Path) -> None:
    done = command("recipe", "show", recipe(micro, tmp_path), "--from", micro.straight, "model.rope_theta=50_000")
    assert done.code == 0, done.err
    [layers] = [line for line in done.out.splitlines() if line.startswith("model.layers")]
    assert layers.endswith(f"inherited from the model {micro.straight}")
    [theta] = [line for line in done.out.splitlines() if line.startswith("model.rope_theta")]
    assert "override" in theta
