"""Checkpoints: whole or not there, damage is named and stepped over, a full disk costs nothing, the policy is kept."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from micro_runs import (
    Micro,
    assert_one_error,
    assert_same_run,
    command,
    lines,
    run_process,
    small_disk,
    weights_hash,
)

from xgen.errors import CheckpointError, StorageError
from xgen.recipe.load import load_recipe
from xgen.recipe.schema import Checkpoints


def _largest(path: Path) -> Path:
    """The data file that holds most of the weights."""
    return max((file for file in (path / "weights").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def _truncate(path: Path) -> Path:
    file = _largest(path)
    os.truncate(file, file.stat().st_size // 2)
    return file


def _flip(path: Path) -> Path:
    file = _largest(path)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file


def _delete(path: Path) -> Path:
    file = _largest(path)
    file.unlink()
    return file


def _delete_manifest(path: Path) -> Path:
    (path / "manifest.json").unlink()
    return path / "manifest.json"


def _garble_manifest(path: Path) -> Path:
    (path / "manifest.json").write_bytes(b"\x00\xff" * 100)
    return path / "manifest.json"


def _falsify_manifest(path: Path) -> Path:
    """Valid JSON of the right shape, with another step: only a hash of the manifest itself can tell."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["step"] += 1
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path / "manifest.json"


DAMAGES = (_truncate, _flip, _delete, _delete_manifest, _garble_manifest, _falsify_manifest)


@pytest.mark.parametrize("spoil", DAMAGES)
def test_damage_is_named_set_aside_and_stepped_over(
    micro: Micro, tmp_path: Path, spoil: Callable[[Path], Path]
) -> None:
    from xgen.checkpoints.manifest import newest_whole

    folder = micro.copy(tmp_path / "run") / "checkpoints"
    file = spoil(folder / f"{5120:015d}")
    told: list[str] = []
    chosen = newest_whole(folder, told.append)
    assert chosen is not None
    assert (chosen.tokens, chosen.step, chosen.stage) == (4608, 18, "")
    assert len(told) == 1
    assert str(file) in told[0]
    assert (folder / f"{5120:015d}.damaged").is_dir()


@pytest.mark.parametrize(
    "spoil", [_flip, *(pytest.param(one, marks=pytest.mark.slow) for one in DAMAGES if one != _flip)]
)
def test_a_damaged_newest_checkpoint_costs_only_its_steps(
    micro: Micro, tmp_path: Path, spoil: Callable[[Path], Path]
) -> None:
    run = micro.copy(tmp_path / "run")
    newest = run / "checkpoints" / f"{5120:015d}"
    file = spoil(newest)
    verified = command("checkpoint", "verify", run)
    assert verified.code == 2
    assert str(file) in verified.out
    assert verified.out.count("whole") == 3
    done = command("train", "--resume", run)
    assert done.code == 0, done.err
    told = [line for line in done.err.splitlines() if "damaged" in line]
    assert len(told) == 1
    assert str(file) in told[0]
    assert told[0].endswith("set aside as 000000000005120.damaged; the one before is used")
    assert newest.with_suffix(".damaged").is_dir()
    assert command("checkpoint", "verify", run).code == 0
    resumed = [event for event in lines(run, "events.jsonl") if event["kind"] == "resumed"]
    assert [(event["from"], str(file) in event["reason"]) for event in resumed] == [(4608, True)]
    assert_same_run(run, micro.straight)


def test_with_every_checkpoint_damaged_it_begins_from_the_start(micro: Micro, tmp_path: Path) -> None:
    run = micro.copy(tmp_path / "run")
    for path in (run / "checkpoints").iterdir():
        _flip(path)
    done = command("train", "--resume", run)
    assert done.code == 0, done.err
    assert done.err.count(" is damaged: ") == 4
    assert "none is left: the run begins from the start" in done.err
    assert done.err.count("the one before is used") == 3
    assert_same_run(run, micro.straight)


def test_damage_is_never_read(micro: Micro, tmp_path: Path) -> None:
    run = micro.copy(tmp_path / "run")
    for spoil in DAMAGES:
        path = tmp_path / spoil.__name__ / "checkpoints" / f"{5120:015d}"
        shutil.copytree(run / "checkpoints" / path.name, path)
        file = spoil(path)
        assert_one_error(command("checkpoint", "hash", path.parent.parent), 2, str(file))


def test_an_older_damaged_checkpoint_is_named_by_the_measurement(micro: Micro, tmp_path: Path) -> None:
    run = micro.copy(tmp_path / "run")
    file = _flip(run / "checkpoints" / f"{2560:015d}")
    assert_one_error(command("train", "--resume", run), 2, str(file), "SHA-256")


def _fill(disk: Path, leave: int) -> Path:
    """A file that leaves about `leave` bytes free."""
    filler = disk / "filler"
    space = os.statvfs(disk)
    filler.write_bytes(bytes(max(space.f_bavail * space.f_frsize - leave, 0)))
    return filler


@pytest.mark.parametrize("leave", [0, 200_000])
def test_a_full_disk_is_one_line_and_loses_nothing(micro: Micro, tmp_path: Path, leave: int) -> None:
    """With nothing left not even a line of metrics can be written; with a little, a checkpoint cannot."""
    with small_disk(tmp_path / "disk", "16m") as disk:
        run = micro.copy(disk / "run", tokens=3840)
        before = weights_hash(run)
        filler = _fill(disk, leave)
        done = run_process("train", "--resume", run)
        message = assert_one_error(done, 4, "cannot write", str(run), "free some space")
        assert "no space left on device" in message.lower()
        assert "/work" not in message.replace(str(tmp_path), "")
        assert len(message) < 400
        assert command("checkpoint", "verify", run).code == 0
        assert weights_hash(run) == before
        assert not list((run / "checkpoints").glob("partial-*"))
        filler.unlink()
        assert command("train", "--resume", run).code == 0
        assert_same_run(run, micro.straight)


def test_a_file_size_limit_is_one_line_and_loses_nothing(micro: Micro, tmp_path: Path) -> None:
    """The same without any rights: no file may grow past 30 kB, so no checkpoint can be written."""
    run = micro.copy(tmp_path / "run", tokens=3840)
    limit = 30_000
    assert _largest(run / "checkpoints" / f"{3840:015d}").stat().st_size > limit
    patch = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    done = run_process("train", "--resume", run, patch=patch)
    assert_one_error(done, 4, "cannot write", str(run))
    assert command("checkpoint", "verify", run).code == 0
    assert command("train", "--resume", run).code == 0
    assert_same_run(run, micro.straight)


def test_a_failed_save_stops_the_run_at_once(micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xgen.training import checkpoints

    def fail(path: Path, *_: object) -> None:
        raise StorageError(f"cannot write {path}: the cable is out")

    run = micro.copy(tmp_path / "run", tokens=3840)
    monkeypatch.setattr(checkpoints, "save_tree", fail)
    with monkeypatch.context() as patch:
        # Were the failure only met by the next save, 4608 would be reached.
        saver_save = checkpoints.Saver.save

        def save_and_wait(saver: checkpoints.Saver, *arguments: object) -> None:
            saver_save(saver, *arguments)  # type: ignore[arg-type]
            thread = saver._thread
            assert thread is not None
            thread.join()

        patch.setattr(checkpoints.Saver, "save", save_and_wait)
        assert_one_error(command("train", "--resume", run), 4, "the cable is out")
    assert lines(run)[-1]["tokens"] == 4096 + 256


def _state(seed: int):  # type: ignore[no-untyped-def]
    """A state so small that a save takes milliseconds."""
    import optax

    from xgen.model import Spec, initialise
    from xgen.training.state import State

    recipe = load_recipe("tiny", ["model.layers=1", "model.hidden_size=8", "model.heads=2", "tokenizer.name=bpe:257"])
    weights = initialise(Spec.of(recipe.recipe, 257), seed)
    return State(weights, optax.scale_by_adam().init(weights))


@pytest.mark.parametrize(("keep_last", "keep_every"), [(1, 0), (2, 300), (3, 200)])
def test_retention_keeps_the_last_the_multiples_and_the_stage_ends(
    tmp_path: Path, keep_last: int, keep_every: int
) -> None:
    from xgen.checkpoints.manifest import list_checkpoints
    from xgen.training.checkpoints import Saver

    saved: list[int] = []
    policy = Checkpoints(every=100, keep_last=keep_last, keep_every=keep_every)
    saver = Saver(tmp_path / "checkpoints", policy, lambda checkpoint: saved.append(checkpoint.tokens))
    ends = {250: "a", 550: "b"}
    state = _state(1)
    clock = [100, 200, 250, 300, 400, 500, 550, 600, 700]
    for number, tokens in enumerate(clock):
        saver.save(state, tokens, tokens // 50, ends.get(tokens, ""))
        saver.wait()
        done = clock[: number + 1]
        wanted = {t for t in done if t in done[-keep_last:] or t in ends or (keep_every and t % keep_every == 0)}
        assert {c.tokens for c in list_checkpoints(tmp_path / "checkpoints")} == wanted
        assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {f"{t:015d}" for t in wanted}
    assert saved == clock
    assert {c.stage for c in list_checkpoints(tmp_path / "checkpoints")} >= {"a", "b"}


def test_leftovers_are_cleaned_and_never_listed(micro: Micro, tmp_path: Path) -> None:
    run = micro.copy(tmp_path / "run", tokens=4608)
    folder = run / "checkpoints"
    shutil.copytree(folder / f"{4608:015d}", folder / f"partial-{4864:015d}")
    shutil.copytree(folder / f"{4608:015d}" / "weights", folder / f"partial-{512:015d}" / "weights")
    for verb in ("list", "verify"):
        done = command("checkpoint", verb, run)
        assert done.code == 0
        assert len(done.out.splitlines()) == 3
        assert "partial" not in done.out
    assert command("train", "--resume", run).code == 0
    assert not list(folder.glob("partial-*"))


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    """Every leaf, bit for bit, of the weights and of the optimizer's state."""
    import jax
    import numpy as np
    import optax

    from xgen.checkpoints.weights import stored_weights_sha256, weights_sha256
    from xgen.model import Spec
    from xgen.training.checkpoints import Saver, read_state

    state = _state(3)
    draw = np.random.default_rng(random.Random(4).randrange(2**32))
    leaves, tree = jax.tree.flatten(state)
    state = jax.tree.unflatten(
        tree,
        [draw.standard_normal(leaf.shape).astype(leaf.dtype) if leaf.dtype.kind == "f" else leaf for leaf in leaves],
    )
    saver = Saver(tmp_path, Checkpoints(every=1), lambda _: None)
    saver.save(state, 7, 1, "")
    saver.wait()
    recipe = load_recipe("tiny", ["model.layers=1", "model.hidden_size=8", "model.heads=2", "tokenizer.name=bpe:257"])
    path = tmp_path / f"{7:015d}"
    back = read_state(path, Spec.of(recipe.recipe, 257), optax.scale_by_adam())
    for mine, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()
    assert stored_weights_sha256(path) == weights_sha256(state.weights)
    other = load_recipe("tiny", ["model.layers=1", "model.hidden_size=16", "model.heads=2", "tokenizer.name=bpe:257"])
    with pytest.raises(CheckpointError, match="16"):
        read_state(path, Spec.of(other.recipe, 257), optax.scale_by_adam())


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    """Its stage's name and its files stay: at no moment is there none."""
    from xgen.checkpoints.manifest import list_checkpoints
    from xgen.training.checkpoints import Saver

    saver = Saver(tmp_path, Checkpoints(every=1), lambda _: None)
    saver.save(_state(1), 100, 1, "first")
    saver.wait()
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    saver.save(_state(2), 100, 1, "")
    saver.wait()
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
    assert list_checkpoints(tmp_path)[0].stage == "first"


def test_an_update_that_is_not_finite_is_not_made(micro: Micro, tmp_path: Path) -> None:
    """So high a rate makes the very first update overflow: what is saved are the weights as they were drawn."""
    from xgen.checkpoints.weights import weights_sha256
    from xgen.model import Spec, initialise

    run = tmp_path / "run"
    done = command("train", micro.recipe, "--run", run, "optimizer.learning_rate=1e30")
    message = assert_one_error(done, 3, "step 1 at 0 tokens", "texts:", "nothing was updated", "--position 0")
    assert ".txt" in message
    recipe = load_recipe(run).recipe
    drawn = initialise(Spec.of(recipe, 300), recipe.data.seed)
    assert weights_hash(run, "@0") == weights_sha256(drawn)
    stopped = lines(run, "events.jsonl")[-1]
    assert (stopped["kind"], stopped["reason"], stopped["failed_step"]) == ("stopped", "non-finite", 1)
    assert all(name in micro_names(micro) for name in stopped["documents"])
    assert lines(run) == []
    assert (run / "report.html").is_file()
    shown = command("data", "show", run, "--position", "0")
    assert shown.code == 0, shown.err


def micro_names(micro: Micro) -> set[str]:
    return {f"texts:{file.name}" for file in micro.texts.iterdir()}


@pytest.mark.parametrize("failing", [3840, 4352])
def test_a_non_finite_step_keeps_the_state_before_it(
    micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """At a stage's first step, and within one: the run goes on from there as if nothing had been."""
    from xgen.training import loop

    rate = loop.learning_rate

    def poisoned(recipe: object, tokens: int) -> float:
        return math.nan if tokens > failing else rate(recipe, tokens)  # type: ignore[arg-type]

    run = micro.copy(tmp_path / "run", tokens=3840)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate", poisoned)
        assert_one_error(command("train", "--resume", run), 3, f"step {failing // 256 + 1} at {failing:,} tokens")
    newest = command("checkpoint", "list", run).out.splitlines()[-1].split()
    assert int(newest[0].replace(",", "")) == failing
    assert (newest[-1] == "32") == (failing == 3840), "the end of a stage stays the end of a stage"
    assert command("checkpoint", "verify", run).code == 0
    assert command("train", "--resume", run).code == 0
    assert_same_run(run, micro.straight)
