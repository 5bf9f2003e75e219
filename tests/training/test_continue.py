"""A model continued: its weights and its tokenizer taken over whole, its rope, its length and nothing else changed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from micro_runs import (
    SLOW_STEPS,
    Micro,
    assert_same_run,
    at_tokens,
    command,
    end,
    freeze,
    lines,
    start,
    weights_hash,
    writing,
)

from xgen import api
from xgen.convert.gguf_write import write_gguf
from xgen.convert.hf_write import write_hugging_face
from xgen.convert.native import open_run, write_native
from xgen.convert.open import open_model
from xgen.errors import CheckpointError, DataError, RecipeError
from xgen.model import initialise
from xgen.recipe.base import NEW_ROPE
from xgen.tokens.tokenizer import load_tokenizer
from xgen.training.run import Run, create, first_state
from xgen.training.start import open_start

LONGER = """
name = "longer"
[data]
sources = {{ texts = {texts} }}
held_out = 0.2
[optimizer]
learning_rate = 5e-3
[[stages]]
name = "128"
length = 128
tokens = 4096
batch_tokens = 512
[checkpoints]
every = 1024
[evaluation]
every = 4096
tokens = 4000
samples = 0
"""
"""No model and no tokenizer: twice the length of the micro run's last stage."""


def recipe(micro: Micro) -> Path:
    path = micro.base / "longer.toml"
    path.write_text(LONGER.format(texts=json.dumps(str(micro.texts))))
    return path


@pytest.fixture(scope="module")
def longer(micro: Micro) -> dict[str, Any]:
    """The result of the run that nothing interrupted."""
    return api.train(recipe(micro), run=micro.base / "longer", start=micro.straight)


@pytest.fixture
def straight(longer: dict[str, Any]) -> Path:
    return Path(longer["run"])


def rows(result: dict[str, Any], checkpoint: str, first: int) -> dict[str, Any]:
    """Loss by position of a checkpoint from `first` on."""
    [row] = [
        row
        for row in result["since_start"]
        if (row["checkpoint"], row["measure"], row["from"]) == (checkpoint, "by_position", first)
    ]
    return row


def begun(micro: Micro, folder: Path, model: str | Path, *overrides: str) -> Run:
    """A run that is begun from `model` and has made no step."""
    opened = open_start(model)
    wanted = api.resolve(recipe(micro), overrides, model)
    return create(wanted, folder, Path.cwd(), opened=opened)


def test_it_begins_with_the_models_weights_and_tokenizer(micro: Micro, longer: dict[str, Any], straight: Path) -> None:
    first, *_, last = command("checkpoint", "list", straight).out.splitlines()
    assert (first.split()[-1], last.split()[-1]) == ("start", "128")
    told = json.loads((straight / "start.json").read_text())
    assert weights_hash(straight, "@start") == weights_hash(micro.straight) == told["weights_sha256"]
    assert told["from"] == str(micro.straight) == longer["from"]
    assert told["context_length"] == 64
    assert (straight / "tokenizer.json").read_bytes() == (micro.straight / "tokenizer.json").read_bytes()
    assert micro.result["from"] is None


def test_training_at_twice_the_length_lowers_the_loss_past_the_old_one(longer: dict[str, Any], straight: Path) -> None:
    row = rows(longer, "128", 64)
    [change] = row["changes"]
    assert (change["against"], row["to"], row["documents"]) == ("start", 129, 2)
    assert change["high"] < -0.05
    before = rows(longer, "start", 64)
    assert before["changes"] == []
    assert row["loss"] - before["loss"] == pytest.approx(change["difference"])
    assert "Past the 64 tokens that" in (straight / "report.html").read_text()
    contexts = [one["context"] for one in longer["fixed_target"] if one["checkpoint"] == "start"]
    assert contexts == [16, 32, 64, 128]


def test_a_rate_of_nothing_lowers_nothing(micro: Micro, tmp_path: Path) -> None:
    """The test above can fail: what falls there falls by learning."""
    small = ("optimizer.learning_rate=1e-12", "stages.0.tokens=1024", "checkpoints.every=4096")
    result = api.train(recipe(micro), run=tmp_path / "run", start=micro.straight, overrides=small)
    for first in (1, 64):
        [change] = rows(result, "128", first)["changes"]
        assert abs(change["difference"]) < 1e-6


def test_the_start_is_measured_with_the_rope_it_had_and_with_the_new_one(micro: Micro, tmp_path: Path) -> None:
    """The start's rows are those that the micro run, measured in the same way, has of its own last checkpoint."""
    same = ("evaluation.contexts=[16, 64, 128]", "evaluation.target=8", "evaluation.tokens=4000")
    short = ("stages.0.tokens=512", "evaluation.every=4096", "evaluation.stride=0.5")
    before = api.resume(micro.copy(tmp_path / "copy"), overrides=[*same, "evaluation.stride=0.5"])
    result = api.train(
        recipe(micro),
        run=tmp_path / "run",
        start=tmp_path / "copy",
        overrides=[*same, *short, "model.rope_scaling.kind=linear"],
    )

    def table(found: dict[str, Any], checkpoint: str) -> list[Any]:
        return [
            {key: value for key, value in row.items() if key != "checkpoint"}
            for row in found["fixed_target"]
            if row["checkpoint"] == checkpoint
        ]

    assert table(result, "start") == table(before, "64")
    assert table(result, NEW_ROPE) != table(result, "start")
    assert [change["against"] for change in rows(result, "128", 64)["changes"]] == ["start", NEW_ROPE]
    assert open_model(f"{tmp_path / 'run'}@start")[0].model == open_model(tmp_path / "copy")[0].model
    page = (tmp_path / "run" / "report.html").read_text()
    assert "rope_scaling.factor from 1 to 2 and rope_scaling.original_length from 8192 to 64" in page


def test_kill_at_any_moment_changes_nothing_and_the_model_is_needed_once(
    micro: Micro, straight: Path, tmp_path: Path
) -> None:
    run, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(micro.straight, model)
    begin = ("train", recipe(micro), "--from", model, "--run", run)
    for moment in (lambda: writing(run), at_tokens(run, 512)):
        process = start(*begin, patch=SLOW_STEPS)
        assert freeze(process, moment), end(process).err
        begun_already = (run / "recipe.toml").exists()
        process.kill()
        end(process)
        assert begun_already == (moment() and not writing(run)), "what can be resumed has its first weights"
    shutil.rmtree(model)
    process = start("train", "--resume", run, patch=SLOW_STEPS)
    assert freeze(process, at_tokens(run, 2560)), end(process).err
    process.kill()
    end(process)
    done = command("train", "--resume", run, "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert_same_run(run, straight)
    assert weights_hash(run, "@start") == weights_hash(straight, "@start")
    kinds = [event["kind"] for event in lines(run, "events.jsonl")]
    assert kinds.count("run_started") == 1


def test_without_its_first_weights_a_run_is_not_begun_afresh(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="not even of the weights it began with"):
        api.resume(tmp_path / "run")
    (tmp_path / "run" / "start.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"start\.json"):
        api.resume(tmp_path / "run")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizer_starts_empty_whichever_it_is(micro: Micro, tmp_path: Path, name: str) -> None:
    run = begun(micro, tmp_path / "run", micro.straight, f"optimizer.name={name}")
    state = first_state(run)
    fresh = run.transformation.init(initialise(run.spec, 1))
    assert jax.tree.all(jax.tree.map(np.array_equal, state.optimizer, fresh))
    run.recorder.close()
    assert weights_hash(tmp_path / "run") == weights_hash(micro.straight)


def test_a_checkpoint_in_the_middle_is_a_model_as_well(micro: Micro, tmp_path: Path) -> None:
    run = begun(micro, tmp_path / "run", f"{micro.straight}@32")
    run.recorder.close()
    assert run.start is not None
    assert run.start.context_length == 32
    assert weights_hash(tmp_path / "run") == weights_hash(micro.straight, "@32")


@pytest.mark.parametrize("kind", ["hugging face", "gguf", "converted"])
def test_other_peoples_files_are_models_as_well(micro: Micro, tmp_path: Path, kind: str) -> None:
    model = tmp_path / ("model.gguf" if kind == "gguf" else "model")
    description, source = open_run(str(micro.straight))
    if kind == "hugging face":
        write_hugging_face(description, source, model)
    elif kind == "gguf":
        write_gguf(description, source, model)
    else:
        write_native(description, source, model)
    run = begun(micro, tmp_path / "run", model)
    run.recorder.close()
    assert weights_hash(tmp_path / "run") == weights_hash(micro.straight)
    kept = {"initialisation": description.model.initialisation}  # no other format has a word for it
    assert run.recipe.model.model_copy(update=kept) == description.model
    text = "abc nop <|endoftext|>"
    assert run.tokenizer.encode(text) == load_tokenizer(str(micro.straight / "tokenizer.json")).encode(text)
    assert first_state(run).weights.embedding.shape == (384, 32)


def test_a_model_without_a_tokenizer_takes_the_recipes(micro: Micro, tmp_path: Path) -> None:
    description, source = open_run(str(micro.straight))
    write_native(replace(description, tokenizer=None), source, tmp_path / "bare")
    with pytest.raises(RecipeError, match=r"bare has no tokenizer; set tokenizer\.name to the tokenizer\.json that"):
        begun(micro, tmp_path / "run", tmp_path / "bare")
    with pytest.raises(RecipeError, match=r"bare has no tokenizer, and the ids of 'bpe:300', learnt now, would mean"):
        begun(micro, tmp_path / "run", tmp_path / "bare", "tokenizer.name=bpe:300")
    with pytest.raises(RecipeError, match=r"384 rows are too few for the 400 ids .*; take a smaller tokenizer"):
        begun(micro, tmp_path / "run", tmp_path / "bare", "tokenizer.name=bpe:400")
    file = micro.straight / "tokenizer.json"
    run = begun(micro, tmp_path / "run", tmp_path / "bare", f"tokenizer.name={file}")
    run.recorder.close()
    assert run.tokenizer.fingerprint == load_tokenizer(str(file)).fingerprint


def test_another_tokenizer_than_the_models_is_refused(micro: Micro, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'bpe:290' \(290 ids, .* has learnt another .*tokenizer\.name=store"):
        begun(micro, tmp_path / "run", micro.straight, "tokenizer.name=bpe:290")
    done = command("prepare", micro.texts, "--out", tmp_path / "store", "--tokenizer", "bpe:290")
    assert done.code == 0, done.err
    with pytest.raises(DataError, match=r"source 'other' .* was made with tokenizer"):
        begun(micro, tmp_path / "run", micro.straight, f"data.sources={{ other = '{tmp_path / 'store'}' }}")
    run = begun(micro, tmp_path / "run", micro.straight, "tokenizer.name=bpe:300")  # the very one, trained once more
    run.recorder.close()


def test_a_recipe_that_was_resolved_elsewhere_is_held_to_the_model(micro: Micro, tmp_path: Path) -> None:
    wanted = api.resolve(recipe(micro), ["tokenizer.name=bpe:300"], micro.straight)
    changed = wanted.model_copy(update={"model": wanted.model.model_copy(update={"heads": 4})})
    with pytest.raises(RecipeError, match=r"model\.heads: 4 is not the 2 of .*; leave it out"):
        api.train(changed, run=tmp_path / "run", start=micro.straight)
    assert not (tmp_path / "run").exists()


def test_documents_no_longer_than_the_model_has_seen_are_told(micro: Micro, tmp_path: Path) -> None:
    from xgen.training.run import too_short

    (tmp_path / "short").mkdir()
    for number in range(40):
        (tmp_path / "short" / f"{number}.txt").write_text(f"abc {number}")
    shorts = f"data.sources={{ short = '{tmp_path / 'short'}' }}"
    run = begun(micro, tmp_path / "run", micro.straight, shorts)
    run.recorder.close()
    assert "stages of 128 tokens cannot teach it more context" in too_short(run)[0]
    long = begun(micro, tmp_path / "long", micro.straight)
    long.recorder.close()
    assert too_short(long) == []
