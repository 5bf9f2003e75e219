"""Real processes on the loopback address: they find each other, agree, stop together, and say what was wrong."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from processes import Process, free_port, plans, started, wait_until

LATEST_SECONDS = 60


def sum_of_squares(devices: int) -> float:
    """Of 0, 1, ... 8n - 1, which `one_process.py` sums over n devices; by the closed form."""
    last = 8 * devices - 1
    return last * (last + 1) * (2 * last + 1) / 6


def test_two_processes_with_two_devices_each(tmp_path: Path) -> None:
    with started(tmp_path, plans(2, devices=2, recipe={"model": {"layers": 2}})) as processes:
        for index, process in enumerate(processes):
            assert process.end() == 0, process.errors
            assert process.errors == []
            events = process.events
            assert events[0] | {"time": 0} == {
                "kind": "connected", "time": 0, "index": index, "count": 2, "writer": index == 0
            }  # fmt: skip
            assert events[1]["told"] == "from the writer"
            assert process.steps == [1, 2, 3, 4, 5]
            assert {event["total"] for event in events if event["kind"] == "step"} == {sum_of_squares(4)}
            assert events[-1]["gathered"] == [0, 1]


def test_the_schedulers_variables_are_enough(tmp_path: Path) -> None:
    shared = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    port = {"JAX_COORDINATOR_PORT": str(free_port())}
    variables = [{**shared, **port, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    with started(tmp_path, [{"idle": True}] * 2, variables) as processes:
        for index, process in enumerate(processes):
            assert process.end() == 0, process.errors
            assert process.events[0]["index"] == index


def test_one_process_waits_for_nobody(tmp_path: Path) -> None:
    alone = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "elsewhere", "SLURM_NTASKS": "1"}
    variables: list[Mapping[str, str]] = [{}, {**alone, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}]
    with started(tmp_path, [{"devices": 2}, {"devices": 2}], variables) as processes:
        for process in processes:
            assert process.end() == 0, process.errors
            assert process.events[0]["count"] == 1
            assert process.events[-2]["total"] == sum_of_squares(2)


def wrong(tmp_path: Path, made: list[dict[str, Any]], *wanted: str, name: str = "ProcessesError") -> list[Process]:
    """All of these processes must end with one error of ours, in time."""
    begin = time.monotonic()
    with started(tmp_path, made) as processes:
        for process in processes:
            assert process.end() == 2, process.errors
            process.one_error(*wanted)
            assert process.events[-1]["error"] == name
    assert time.monotonic() - begin < LATEST_SECONDS
    return processes


def test_a_missing_process_is_named(tmp_path: Path) -> None:
    made = plans(4, limits={"start": 12.0})
    processes = wrong(tmp_path, [made[0], made[2]], "4 processes", "12 seconds", "--wait")
    for process in processes:
        process.one_error("processes 1, 3 did not come", f"0 ({socket.gethostname()}), 2 ({socket.gethostname()})")


def test_an_unreachable_coordinator(tmp_path: Path) -> None:
    made = plans(2, limits={"start": 3.0})
    wrong(tmp_path, made[1:], "process 1 cannot reach process 0", made[1]["settings"]["coordinator"], "refused")


def test_a_coordinator_that_does_not_answer(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        settings = {"coordinator": f"127.0.0.1:{mute.getsockname()[1]}", "processes": 2, "process": 1}
        wrong(tmp_path, [{"limits": {"start": 3.0}, "settings": settings}], "answers, but not all of the 2")


def test_a_coordinator_whose_port_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as other:
        settings = {"coordinator": f"127.0.0.1:{other.getsockname()[1]}", "processes": 2, "process": 0}
        wrong(tmp_path, [{"settings": settings}], "cannot listen at port", "another run")


def test_two_processes_with_one_index(tmp_path: Path) -> None:
    made = plans(3)
    wrong(tmp_path, [made[0], made[1], made[1]], "two processes call themselves process 1", "own --process")


def test_different_counts(tmp_path: Path) -> None:
    made = plans(2)
    made[1]["settings"]["processes"] = 3
    wrong(tmp_path, made, "process 1", "processes 3", "with 2")


def test_different_devices(tmp_path: Path) -> None:
    made = plans(2)
    made[0]["devices"], made[1]["devices"] = 1, 2
    wrong(tmp_path, made, "differ in the devices they see", "1 of cpu", "2 of cpu")


def test_different_recipes(tmp_path: Path) -> None:
    made = plans(2, idle=True)
    made[0]["recipe"], made[1]["recipe"] = ({"optimizer": {"clip": clip}, "name": "same"} for clip in (1.0, 0.5))
    wrong(tmp_path, made, "differ in the recipe: optimizer.clip is 1.0 on process 0 and 0.5 on process 1")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"coordinator": "h:1", "processes": 2, "process": 2}, "between 0 and 1"),
        ({"coordinator": "h:1", "processes": 2, "process": -1}, "--process -1"),
        ({"coordinator": "h:1", "processes": 0, "process": 0}, "--processes 0"),
        ({"coordinator": "h", "processes": 2, "process": 0}, "HOST:PORT"),
        ({"coordinator": "h:99999", "processes": 2, "process": 0}, "HOST:PORT"),
        ({"processes": 2}, "add --coordinator and --process"),
        ({"coordinator": "h:1"}, "add --processes and --process"),
        ({"process": 1}, "add --coordinator and --processes"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xgen.errors import RecipeError
    from xgen.parallel.start import Settings, connect

    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    with pytest.raises(RecipeError, match=wanted):
        connect(Settings(**settings))


def test_a_forgotten_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from xgen.errors import RecipeError
    from xgen.parallel.start import connect

    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "h:1")
    with pytest.raises(RecipeError, match="JAX_COORDINATOR_ADDRESS"):
        connect()


def test_devices_are_emulated_only_where_they_can_be() -> None:
    import jax

    from xgen.errors import RecipeError
    from xgen.parallel.start import emulate

    with pytest.raises(RecipeError, match="between 1 and"):
        emulate(0)
    before = jax.config.jax_platforms  # type: ignore[attr-defined]
    try:
        jax.config.update("jax_platforms", "tpu")
        with pytest.raises(RecipeError, match="JAX_PLATFORMS=tpu"):
            emulate(4)
    finally:
        jax.config.update("jax_platforms", before)
    jax.devices()
    with pytest.raises(RecipeError, match="already started"):
        emulate(4)


@pytest.mark.parametrize("signalled", [[0], [1], [0, 1]])
def test_a_signal_to_one_stops_all_after_the_same_step(signalled: list[int], tmp_path: Path) -> None:
    with started(tmp_path, plans(2, steps=100_000)) as processes:
        wait_until(lambda: all(len(process.steps) > 3 for process in processes), processes)
        for index in signalled:
            processes[index].child.send_signal(signal.SIGTERM)
        assert [process.end() for process in processes] == [75, 75]
        said = {process.one_error("SIGTERM on process") for process in processes}
        assert len(said) == 1
        assert processes[0].steps[-1] == processes[1].steps[-1]
        assert said.pop().endswith(f"stopped after step {processes[0].steps[-1]}")
