"""Following a run folder: whatever happens to the logs, what was read in bits is what a reading of the whole gives."""

from __future__ import annotations

import json
import os
import random
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import FINISHED, HOSTILE, RESUMED, RUNS, UNFINISHED, write_run

from xgen.errors import DataError
from xgen.report.read import Run, Steps, read_run
from xgen.serve.watch import follow
from xgen.serve.watch.follow import Follower
from xgen.serve.watch.status import State, patience, stages_of, status_of
from xgen.training.folder import Recorder

LOGS = ("metrics.jsonl", "events.jsonl")


def assert_same(found: Run | None, wanted: Run) -> None:
    assert found is not None
    for field in fields(Run):
        if field.name != "steps":
            assert getattr(found, field.name) == getattr(wanted, field.name), field.name
    for field in fields(Steps):
        np.testing.assert_array_equal(getattr(found.steps, field.name), getattr(wanted.steps, field.name), field.name)


def all_of(follower: Follower) -> Run | None:
    """What the follower sees once it has read everything."""
    while follower.poll():
        pass
    assert follower.seen().behind == 0
    return follower.seen().run


def emptied(folder: Path) -> dict[str, bytes]:
    """Empty the logs of a folder and return what they held."""
    held = {name: (folder / name).read_bytes() for name in LOGS}
    for name in LOGS:
        (folder / name).write_bytes(b"")
    return held


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_there_is_read_as_the_report_reads_it(tmp_path, name):
    folder = write_run(tmp_path / "run", RUNS[name])
    follower = Follower(folder)
    found = all_of(follower)
    wanted = read_run(folder)
    if name == "hostile":  # Start and Measured hold NaN, which is unequal to itself
        assert_same(replace(found, measured=wanted.measured), wanted)
        return
    assert_same(found, wanted)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("made", [UNFINISHED, HOSTILE], ids=["unfinished", "hostile"])
def test_lines_that_arrive_in_torn_pieces_are_each_taken_once_and_whole(tmp_path, made, seed):
    draw = random.Random(seed)
    folder = write_run(tmp_path / "run", made)
    held = emptied(folder)
    follower = Follower(folder)
    written = dict.fromkeys(LOGS, 0)
    while any(written[name] < len(held[name]) for name in LOGS):
        name = draw.choice(LOGS)
        end = min(written[name] + draw.choice((1, 7, 150, 4096, 30_000)), len(held[name]))
        with (folder / name).open("ab") as file:
            file.write(held[name][written[name] : end])
        written[name] = end
        follower.poll()
        found = follower.seen().run
        assert found is not None
        assert len(found.steps) == held["metrics.jsonl"][: written["metrics.jsonl"]].count(b"\n")
        assert len(found.events) == held["events.jsonl"][: written["events.jsonl"]].count(b"\n")
        assert found.remarks == ()
    assert_same(replace(all_of(follower), measured=None), replace(read_run(folder), measured=None))


def test_a_long_log_is_taken_in_pieces(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", FINISHED)
    size = (folder / "metrics.jsonl").stat().st_size
    monkeypatch.setattr(follow, "PIECE_BYTES", size // 4)
    follower = Follower(folder)
    behind = []
    while follower.poll():
        behind.append(follower.seen().behind)
    assert behind == sorted(behind, reverse=True)
    assert behind[0] >= size // 2
    assert status_of(replace(follower.seen(), behind=1), 0.0).state is State.READING
    assert_same(follower.seen().run, read_run(folder))


def test_a_resume_that_cuts_the_logs_back_is_followed(tmp_path):
    folder = write_run(tmp_path / "run", replace(UNFINISHED, resumed_at=()))
    follower = Follower(folder)
    before = all_of(follower)
    recorder = Recorder(folder)
    try:
        recorder.cut_back(400_000)
        cut = all_of(follower)
        assert_same(cut, read_run(folder))
        assert before is not None
        assert cut is not None
        assert cut.tokens <= 400_000 < before.tokens
        recorder.event("resumed", tokens=cut.tokens, step=len(cut.steps), reason="asked for")
        lines = (write_run(tmp_path / "whole", UNFINISHED) / "metrics.jsonl").read_text().splitlines()
        for line in lines[len(cut.steps) :]:
            recorder.step(**json.loads(line))
            follower.poll()
    finally:
        recorder.close()
    assert_same(all_of(follower), read_run(folder))
    np.testing.assert_array_equal(follower.seen().run.steps.loss, before.steps.loss)


def test_a_log_that_was_replaced_by_a_longer_one_between_two_looks_is_read_anew(tmp_path):
    folder = write_run(tmp_path / "run", UNFINISHED)
    follower = Follower(folder)
    all_of(follower)
    other = write_run(tmp_path / "other", replace(RESUMED, seed=8))
    for name in LOGS:
        os.replace(other / name, folder / name)
    found, wanted = all_of(follower), read_run(folder)
    assert_same(replace(found, measured=None), replace(wanted, measured=None))
    assert found.steps.repeated == wanted.steps.repeated > 0


def test_a_log_that_is_cut_in_place_or_taken_away_is_read_anew(tmp_path):
    folder = write_run(tmp_path / "run", UNFINISHED)
    follower = Follower(folder)
    all_of(follower)
    with (folder / "metrics.jsonl").open("rb+") as file:
        file.truncate(file.read(5000).rindex(b"\n") + 1)
    assert_same(all_of(follower), read_run(folder))
    (folder / "metrics.jsonl").unlink()
    assert len(all_of(follower).steps) == 0


def test_a_line_torn_by_a_kill_is_left_out_and_told_as_in_the_report(tmp_path):
    folder = write_run(tmp_path / "run", UNFINISHED)
    path = folder / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 343, "tok')
    follower = Follower(folder)
    assert all_of(follower).remarks == ()  # it may still be completed
    with path.open("a") as file:
        file.write("\n")
    found = all_of(follower)
    assert_same(found, read_run(folder))
    assert found.remarks
    path.write_text(whole)
    os.utime(path, (1, 1))
    assert all_of(follower).remarks == ()


def test_a_foreign_line_is_told_and_the_rest_is_shown_until_the_file_is_mended(tmp_path):
    folder = write_run(tmp_path / "run", UNFINISHED)
    path = folder / "metrics.jsonl"
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text("".join([*lines[:5], '{"step": 6}\n', "[1]\n", *lines[5:]]))
    follower = Follower(folder)
    assert len(all_of(follower).steps) == len(lines)
    assert "metrics.jsonl, line 6: no tokens" in follower.seen().problem
    beside = tmp_path / "mended"
    beside.write_text(whole)
    os.replace(beside, path)
    assert_same(all_of(follower), read_run(folder))
    assert follower.seen().problem == ""


def test_a_recipe_that_is_damaged_is_told_until_it_is_mended_and_another_one_begins_anew(tmp_path):
    folder = write_run(tmp_path / "run", UNFINISHED)
    follower = Follower(folder)
    all_of(follower)
    path = folder / "recipe.toml"
    text = path.read_text()
    path.write_text("name = ")
    follower.poll()
    assert "not TOML" in follower.seen().problem
    assert not follower.poll()
    path.write_text(text.replace('name = "tiny"', 'name = "other"'))
    found = all_of(follower)
    assert follower.seen().problem == ""
    assert found.recipe.name == "other"
    assert_same(found, read_run(folder))


def test_a_folder_without_a_run_is_refused_and_one_that_is_being_prepared_is_awaited(tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*none; name the folder"):
        Follower(tmp_path / "none")
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(DataError, match=r"no recipe\.toml"):
        Follower(folder)
    (folder / ".lock").touch()
    follower = Follower(folder)
    follower.poll()
    assert status_of(follower.seen(), 0.0).state is State.PREPARING
    source = write_run(tmp_path / "whole", FINISHED)
    for name in ("events.jsonl", "metrics.jsonl", "recipe.toml"):
        os.replace(source / name, folder / name)
    assert_same(all_of(follower), read_run(folder))


def with_events(folder: Path, *kinds: str) -> Follower:
    """A follower of an unfinished run whose last events are `kinds`, each a minute after the one before."""
    path = folder / "events.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if line["kind"] != "stopped"]
    last = lines[-1]
    for number, kind in enumerate(kinds, start=1):
        lines.append({**last, "kind": kind, "time": last["time"] + 60 * number, "reason": "SIGTERM"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    follower = Follower(folder)
    all_of(follower)
    return follower


@pytest.mark.parametrize(
    ("kinds", "silent_for", "state"),
    [
        ((), 1.0, State.RUNNING),
        ((), 1000.0, State.SILENT),
        (("stopped",), 1000.0, State.STOPPED),
        (("stopped", "resumed"), 1.0, State.RUNNING),
        (("stopped", "resumed"), 10_000.0, State.SILENT),
        (("finished",), 1e6, State.FINISHED),
        (("finished", "resumed", "finished"), 1e6, State.FINISHED),
    ],
)
def test_the_state_follows_from_the_last_turn_and_the_silence(tmp_path, kinds, silent_for, state):
    folder = write_run(tmp_path / "run", UNFINISHED)
    follower = with_events(folder, *kinds)
    written = max((folder / name).stat().st_mtime for name in LOGS)
    status = status_of(follower.seen(), written + silent_for)
    assert status.state is state
    assert status.last_line == written
    if state is State.SILENT:
        assert status.since == written
    assert (status.reason == "SIGTERM") == (state is State.STOPPED)


def test_before_a_step_and_after_the_last_one_a_run_may_be_silent_for_longer(tmp_path):
    begun = write_run(tmp_path / "begun", replace(UNFINISHED, until=0))
    measuring = write_run(tmp_path / "measuring", replace(FINISHED, measured=False))
    for folder, state in ((begun, State.STARTING), (measuring, State.MEASURING)):
        lines = (folder / "events.jsonl").read_text().splitlines(keepends=True)
        (folder / "events.jsonl").write_text("".join(lines[:-1]))  # the last is `stopped` or `finished`
        follower = Follower(folder)
        run = all_of(follower)
        assert status_of(follower.seen(), follower.seen().last_line + 300).state is state
        assert status_of(follower.seen(), follower.seen().last_line + 3000).state is State.SILENT
        assert patience(run, State.RUNNING) < 300


def test_the_time_left_is_the_tokens_left_over_the_rate(tmp_path):
    run = all_of(Follower(write_run(tmp_path / "run", UNFINISHED)))
    first, second, third = stages_of(run)
    assert (first.done, first.seconds_left) == (first.tokens, 0.0)
    assert second.done == run.tokens - first.tokens
    here = run.steps.tokens_per_second[run.steps.stage == 1]
    assert second.rate == pytest.approx(np.median(here))
    assert second.seconds_left == pytest.approx((second.tokens - second.done) / second.rate)
    assert third.seconds_left == pytest.approx(third.tokens / second.rate)  # no rate of its own yet
    assert first.seconds_done == pytest.approx(sum(2048 / run.steps.tokens_per_second[run.steps.stage == 0]))
