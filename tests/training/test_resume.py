"""Exact resume: whatever ends a run, and whenever, the resumed one is bit-identical to one that nothing ended."""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path

import pytest
from micro_runs import (
    SLOW_STEPS,
    STAGES,
    Micro,
    assert_same_run,
    at_tokens,
    command,
    end,
    freeze,
    lines,
    run_process,
    start,
    weights_hash,
    writing,
)

SLOW_SAVES = """
import time, xgen.training.checkpoints as c
save = c.save_tree
c.save_tree = lambda *parts: (time.sleep(60), save(*parts))[1]
"""


def test_kill_at_any_moment_changes_nothing(micro: Micro, tmp_path: Path) -> None:
    run = tmp_path / "run"
    switch = STAGES["16"][1]
    lucky = random.Random().randrange(switch + 256, STAGES["64"][1], 256)
    print("random moment: step that ends at", lucky)
    moments = (lambda: writing(run), at_tokens(run, switch), at_tokens(run, lucky))
    process = start("train", micro.recipe, "--run", run, patch=SLOW_STEPS)
    for moment in moments:
        assert freeze(process, moment), end(process).err
        process.kill()
        end(process)
        if moment is not moments[-1]:
            process = start("train", "--resume", run, patch=SLOW_STEPS)
    done = command("train", "--resume", run, "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert_same_run(run, micro.straight)
    assert not writing(run)
    started = [event["stage"] for event in lines(run, "events.jsonl") if event["kind"] == "stage_started"]
    assert started == list(STAGES), "a stage starts once, whatever was killed"


def test_kill_while_a_checkpoint_is_written_leaves_the_one_before(micro: Micro, tmp_path: Path) -> None:
    run = micro.copy(tmp_path / "run", tokens=3840)
    process = start("train", "--resume", run, patch=SLOW_SAVES)
    assert freeze(process, lambda: writing(run)), end(process).err
    process.kill()
    end(process)
    listed = command("checkpoint", "list", run)
    assert "partial" not in listed.out
    assert [line.split()[-1] for line in listed.out.splitlines()] == ["16", "32"]
    assert command("checkpoint", "verify", run).code == 0
    assert command("train", "--resume", run, "--quiet").code == 0
    assert_same_run(run, micro.straight)


def test_a_signal_saves_at_the_very_step(micro: Micro, tmp_path: Path) -> None:
    """SIGTERM, a resume, SIGINT, a resume; at moments that only a signal saves at, being no multiples of 512."""
    run = micro.copy(tmp_path / "run", tokens=3840)
    for name, moment in (("SIGTERM", 4352), ("SIGINT", 4864)):
        process = start("train", "--resume", run, patch=SLOW_STEPS)
        assert freeze(process, at_tokens(run, moment)), end(process).err
        assert "another process is at work on" in command("train", "--resume", run).err
        process.send_signal(signal.Signals[name])
        process.send_signal(signal.SIGCONT)
        done = end(process)
        last = lines(run)[-1]["tokens"]
        assert done.code == 75, done.err
        told = f"error: {name}: saved at {last:,} tokens; go on with `xgen train --resume"
        assert done.err.splitlines()[-1].startswith(told)
        newest = max(int(path.name) for path in (run / "checkpoints").iterdir())
        assert newest == last <= moment + 256
        assert lines(run, "events.jsonl")[-1] | {"time": 0} == {
            "kind": "stopped", "tokens": last, "step": last // 256, "time": 0, "reason": name,
        }  # fmt: skip
        assert "stopped" in (run / "report.html").read_text(), "a run that was stopped has its page"
    assert command("train", "--resume", run).code == 0
    assert_same_run(run, micro.straight)


def test_a_second_signal_is_not_made_to_wait(micro: Micro, tmp_path: Path) -> None:
    run = micro.copy(tmp_path / "run", tokens=3840)
    process = start("train", "--resume", run, patch=SLOW_SAVES)
    assert freeze(process, lambda: writing(run)), end(process).err
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    done = end(process)
    assert done.code == 75, done.err
    # Which of two waiting signals a process is told of first is the system's choice.
    assert re.search("SIG(INT|TERM): stopped at once", done.err.splitlines()[-1])
    assert time.monotonic() - begin < 45, "it waited for the checkpoint, which takes two minutes"
    assert command("checkpoint", "verify", run).code == 0
    assert command("train", "--resume", run).code == 0
    assert_same_run(run, micro.straight)


def test_a_kill_before_the_run_exists_lets_the_same_command_begin_again(micro: Micro, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for patch in (
        "import os, xgen.data.prepare as p; p._assemble = lambda *a: os._exit(9)",  # texts tokenised, no store yet
        "import os, xgen.training.run as r; r.replace_text = lambda *a: os._exit(9)",  # all but recipe.toml
        "import os, xgen.api as a; a._record_start = lambda *a: os._exit(9)",  # recipe.toml, not one step
    ):
        assert run_process("train", micro.recipe, "--run", run, patch=patch).code == 9
    done = command("train", micro.recipe, "--run", run)
    assert done.code == 0, done.err
    assert_same_run(run, micro.straight)
    assert [event["kind"] for event in lines(run, "events.jsonl")].count("run_started") == 1


def test_a_kill_within_the_last_measurement_is_made_up_for(micro: Micro, tmp_path: Path) -> None:
    run = micro.copy(tmp_path / "run")
    (run / "result.json").unlink()
    (run / "evals/after_training.json").unlink()
    patch = "import os, xgen.training.after as a; a.measure_checkpoints = lambda *a, **k: os._exit(9)"
    assert run_process("train", "--resume", run, patch=patch).code == 9
    assert not (run / "result.json").exists()
    done = command("train", "--resume", run)
    assert done.code == 0, done.err
    assert (run / "evals/after_training.json").read_bytes() == (
        micro.straight / "evals/after_training.json"
    ).read_bytes()
    assert (run / "result.json").is_file()
    assert_same_run(run, micro.straight)


def test_a_finished_run_says_so_and_is_measured_again(micro: Micro, tmp_path: Path) -> None:
    run = micro.copy(tmp_path / "run")
    (run / "report.html").unlink()
    done = command("train", "--resume", run, "evaluation.contexts=[16, 32, 64]")
    assert done.code == 0, done.err
    assert "is trained to its last token" in done.err
    assert "stage 64" not in done.err
    assert (run / "report.html").is_file()
    assert '"context": 32' in (run / "evals/after_training.json").read_text()
    assert_same_run(run, micro.straight)


def test_the_texts_are_not_needed_again(micro: Micro, tmp_path: Path) -> None:
    """A run keeps the stores it made: what becomes of the texts does not change its batches."""
    run = micro.copy(tmp_path / "run", tokens=3840)
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(str(micro.texts), str(tmp_path / "gone")))
    assert command("train", "--resume", run).code == 0
    assert_same_run(run, micro.straight)


def test_a_torn_last_line_is_written_again(micro: Micro, tmp_path: Path) -> None:
    run = micro.copy(tmp_path / "run", tokens=4608)
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(whole[:-100])
    assert command("train", "--resume", run).code == 0
    assert_same_run(run, micro.straight)


@pytest.mark.slow
def test_twenty_random_kills_change_nothing(micro: Micro, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    draw = random.Random(seed)
    kills, attempt = 0, 0
    while kills < 20:
        attempt += 1
        run = tmp_path / f"run{attempt}"
        assert (
            run_process(
                "train",
                micro.recipe,
                "--run",
                run,
                patch="import os, xgen.api as a; a._record_start = lambda *a: os._exit(9)",
            ).code
            == 9
        )
        while kills < 20 or not (run / "result.json").exists():
            process = start("train", "--resume", run)
            if kills < 20 and _killed(process, run, draw):
                kills += 1
                continue
            done = end(process)
            assert done.code == 0, done.err
            break
        assert_same_run(run, micro.straight)
    print("kills", kills, "runs", attempt)


def _killed(process, run: Path, draw: random.Random) -> bool:  # type: ignore[no-untyped-def]
    """Kill at a random moment: of the clock, of a checkpoint's writing, of a switch; False when it ended before."""
    how, done = draw.randrange(4), len(lines(run))
    if how == 0:
        hit = freeze(process, lambda: writing(run))
    elif how == 1:
        hit = freeze(process, lambda: bool(now := lines(run)) and now[-1]["tokens"] in (2560, 3840))
    else:
        begin: list[float] = []
        wait = draw.uniform(0, 1.5)

        def moment() -> bool:
            if not begin and len(lines(run)) != done:
                begin.append(time.monotonic())
            return bool(begin) and time.monotonic() - begin[0] > wait

        hit = freeze(process, moment)
    if hit:
        time.sleep(0)
        process.kill()
        end(process)
    return hit


def test_hash_can_tell(micro: Micro) -> None:
    assert weights_hash(micro.straight) != weights_hash(micro.straight, "@4608")
