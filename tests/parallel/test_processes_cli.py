"""`xgen train` as two real processes: one speaks, a signal to one saves on both, and one process can go on."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from micro_runs import Done, Micro, assert_one_error, lines, micro, run_process, start
from processes import STOPPED, free_port

__all__ = ["micro"]


def both(*arguments: object) -> list[subprocess.Popen[str]]:
    """The command as two processes."""
    address = f"127.0.0.1:{free_port()}"
    shared = ("--coordinator", address, "--processes", 2, "--wait", 120)
    return [start("train", *arguments, *shared, "--process", index) for index in range(2)]


def ended(processes: list[subprocess.Popen[str]]) -> list[Done]:
    """How all ended; none is left behind."""
    try:
        told = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [Done(process.returncode, *texts) for process, texts in zip(processes, told, strict=True)]


def after_steps(count: int, run: Path, processes: list[subprocess.Popen[str]]) -> None:

    while len(lines(run)) < count and all(process.poll() is None for process in processes):
        time.sleep(0.02)


@pytest.mark.slow
def test_only_the_first_process_speaks_and_standard_output_is_json(micro: Micro, tmp_path: Path) -> None:
    first, second = ended(both(micro.recipe, "--run", tmp_path / "run", "mesh.fsdp=2", "--json", "-"))
    assert (first.code, second.code) == (0, 0), (first.err, second.err)
    result: dict[str, Any] = json.loads(first.out)
    assert result["tokens"] == micro.result["tokens"]
    assert (second.out, second.err) == ("", "")
    losses, alone = ([line["loss"] for line in lines(run)] for run in (tmp_path / "run", micro.straight))
    assert losses == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_a_signal_to_one_saves_on_both_and_one_process_goes_on(micro: Micro, tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes = both(micro.recipe, "--run", run, "mesh.fsdp=2")
    after_steps(3, run, processes)
    processes[1].terminate()
    first, second = ended(processes)
    told = assert_one_error(first, 75, "SIGTERM on process 1: saved at")
    assert assert_one_error(second, 75) == told
    done = run_process("train", "--resume", run, "--devices", 2, "--quiet")
    assert done.code == 0, done.err
    losses, alone = ([line["loss"] for line in lines(each)] for each in (run, micro.straight))
    assert losses == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_kill_of_one_ends_the_other(lost: int, micro: Micro, tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes = both(micro.recipe, "--run", run, "mesh.fsdp=2")
    after_steps(4, run, processes)
    processes[lost].kill()
    other = ended(processes)[1 - lost]
    assert_one_error(other, STOPPED, f"process {lost} (", "died after step", "xgen train --resume")


def test_devices_of_one_process(micro: Micro, tmp_path: Path) -> None:
    done = run_process("train", micro.recipe, "--run", tmp_path / "run", "--devices", 3, "mesh.fsdp=2")
    assert_one_error(done, 2, "3 devices")
