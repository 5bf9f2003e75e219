"""One process of a run is killed, stopped, hung or fails: the others end in time, and say who and since which step."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest
from processes import STOPPED, Process, plans, started, stop_and_look, wait_until

LATEST_SECONDS = 60
"""The promise; what is measured is far below it."""


def ended_for(processes: list[Process], lost: int, begin: float, *wanted: str) -> float:
    """The others end with one message that names `lost` and a step near its last. Returns the longest seconds."""
    others = [process for index, process in enumerate(processes) if index != lost]
    for process in others:
        assert process.end() == STOPPED, process.errors
    taken = time.monotonic() - begin
    assert taken < LATEST_SECONDS
    for process in others:
        told = process.one_error(f"error: process {lost} (", f"pid {processes[lost].child.pid})", *wanted)
        steps = processes[lost].steps
        found = re.search(r"after step (\d+)", told)
        assert (int(found[1]) if found else 0) in range(len(steps) - 2, len(steps) + 2)
    return taken


def step_reached(processes: list[Process], step: int) -> None:
    wait_until(lambda: all(len(process.steps) >= step for process in processes), processes)


@pytest.mark.parametrize("lost", [0, 2])
def test_a_killed_process(lost: int, tmp_path: Path) -> None:
    with started(tmp_path, plans(3, steps=100_000)) as processes:
        step_reached(processes, 5)
        begin = time.monotonic()
        processes[lost].child.kill()
        assert ended_for(processes, lost, begin, "died") < 15


@pytest.mark.slow
def test_one_of_four_killed_at_random_moments(tmp_path: Path) -> None:
    """Also while JAX starts, while programs compile, and between steps."""
    draw, taken = random.Random(4), []
    for trial in range(10):
        lost = 0 if trial % 3 == 0 else draw.randrange(4)
        with started(tmp_path, plans(4, steps=100_000, rest=0.02)) as processes:
            wait_until(lambda found=processes: all(p.events for p in found), processes)  # type: ignore[misc]
            time.sleep(draw.uniform(0, 4))
            begin = time.monotonic()
            processes[lost].child.kill()
            taken.append(ended_for(processes, lost, begin, "died"))
    print("seconds until all others had ended:", [round(seconds, 2) for seconds in taken])
    assert max(taken) < 15


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_stopped_process(lost: int, tmp_path: Path) -> None:
    """SIGSTOP: nothing closes, nobody speaks; the others hang in a collective."""
    with started(tmp_path, plans(4, steps=100_000)) as processes:
        step_reached(processes, 5)
        begin = time.monotonic()
        stop_and_look(processes[lost])
        taken = ended_for(processes, lost, begin, "hangs", "not a word from it for 2")
    print("seconds until all others had ended:", round(taken, 2))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_whose_main_thread_hangs(lost: int, tmp_path: Path) -> None:
    """It still speaks, but the others are a step ahead of it."""
    made = plans(3, steps=100_000, limits={"behind": 4.0})
    made[lost]["hang_at"] = 8
    with started(tmp_path, made) as processes:
        step_reached(processes, 7)
        for process in processes:
            assert process.end() == STOPPED
            process.one_error(f"error: process {lost} (", "hangs after step 7, before the next step", "waited 4 sec")
            assert process.steps[-1] == 7


def test_a_process_that_fails_says_why_to_all(tmp_path: Path) -> None:
    made = plans(3, steps=100_000)
    made[1]["fail_at"] = 6
    with started(tmp_path, made) as processes:
        assert processes[1].end() == 1
        for process in (processes[0], processes[2]):
            assert process.end() == STOPPED
            process.one_error("process 1 (", "stopped after step 5: the disk is on fire")


def test_a_kill_during_the_start(tmp_path: Path) -> None:
    """Before all have met, the others name who did not come."""
    with started(tmp_path, plans(3, limits={"start": 15.0})[:2]) as processes:
        time.sleep(4)
        processes[1].child.kill()
        assert processes[0].end() == 2
        processes[0].one_error("processes 1, 2 did not come")
