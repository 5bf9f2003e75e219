"""`xgen train` as real processes: one speaks, a signal to one saves on all, four measure what one does."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from micro_runs import Done, Micro, assert_one_error, lines, micro, run_process, start, untimed
from processes import STOPPED, free_port

from xgen.model import native

__all__ = ["micro"]

Popen = subprocess.Popen[str]

FLOAT32 = "compute.precision=float32"
CLOSE = 1e-5
"""Of figures in float32, whose sums are taken in another order. In bfloat16 losses drift apart by 1e-4 and more."""

MESH_OF_EACH_STAGE = (
    "stages.0.mesh.fsdp=4",
    *("stages.1.mesh.replica=2", "stages.1.mesh.fsdp=1", "stages.1.mesh.tensor=2"),
    *("stages.2.mesh.fsdp=2", "stages.2.mesh.context=2"),
)


@pytest.fixture(scope="module")
def straight(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process in float32."""
    run = tmp_path_factory.mktemp("float32") / "run"
    done = run_process("train", micro.recipe, FLOAT32, "--run", run, "--quiet")
    assert done.code == 0, done.err
    return run


def together(*arguments: object, count: int = 2, patches: Mapping[int, str] | None = None) -> list[Popen]:
    """The command as `count` processes. `patches`: code that some run first, by process."""
    address = f"127.0.0.1:{free_port()}"
    shared = ("--coordinator", address, "--processes", count, "--wait", 120)
    patched = patches or {}
    return [start("train", *arguments, *shared, "--process", n, patch=patched.get(n, "")) for n in range(count)]


def ended(processes: list[Popen]) -> list[Done]:
    """How all ended; none is left behind."""
    try:
        told = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [Done(process.returncode, *texts) for process, texts in zip(processes, told, strict=True)]


def after_steps(count: int, run: Path, processes: list[Popen]) -> None:
    while len(lines(run)) < count and all(process.poll() is None for process in processes):
        time.sleep(0.02)


@pytest.mark.slow
def test_only_the_first_process_speaks_and_its_output_is_json(micro: Micro, straight: Path, tmp_path: Path) -> None:
    first, second = ended(together(micro.recipe, FLOAT32, "--run", tmp_path / "run", "mesh.fsdp=2", "--json", "-"))
    assert (first.code, second.code) == (0, 0), (first.err, second.err)
    result: dict[str, Any] = json.loads(first.out)
    assert result["tokens"] == micro.result["tokens"]
    assert (second.out, second.err) == ("", "")
    losses, alone = ([line["loss"] for line in lines(run)] for run in (tmp_path / "run", straight))
    assert losses == pytest.approx(alone, rel=CLOSE)


def measured(run: Path) -> dict[str, Any]:
    """All that a run tells of its model: each step's line without its times, the evaluations with the texts that were
    written, and the measurement after training; by dotted name."""
    events = [line for line in lines(run, "events.jsonl") if line["kind"] in ("evaluation", "sample")]
    for line in events:
        line.pop("seconds", None)
        line.pop("time")
    after = json.loads((run / "evals" / "after_training.json").read_text())
    return dict(flat({"steps": untimed(run), "events": events, "after": after}))


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested JSON."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(item, f"{name}.{key}")
    else:
        yield name, value


@pytest.mark.slow
def test_four_processes_measure_what_one_does(micro: Micro, straight: Path, tmp_path: Path) -> None:
    """Every figure within 1e-5 in float32, over three stages of which each has its own mesh; texts to the letter."""
    four = tmp_path / "four"
    for one in ended(together(micro.recipe, FLOAT32, "--run", four, *MESH_OF_EACH_STAGE, count=4)):
        assert one.code == 0, one.err
    wanted, found = measured(straight), measured(four)
    assert found.keys() == wanted.keys()
    assert sum(name.endswith(".grad_norm") for name in wanted) == 20
    assert sum(".loss_by_position." in name for name in wanted) > 20
    figures = {name for name, value in wanted.items() if isinstance(value, float)}
    print("largest difference:", max(abs(found[name] - wanted[name]) / max(1, abs(wanted[name])) for name in figures))
    assert {n: found[n] for n in figures} == pytest.approx({n: wanted[n] for n in figures}, rel=CLOSE, abs=CLOSE)
    assert {n: found[n] for n in found.keys() - figures} == {n: wanted[n] for n in wanted.keys() - figures}


@pytest.mark.slow
@pytest.mark.skipif(native.library() is None, reason=f"no kernels on this machine: {native.missing()}")
def test_processes_that_would_compute_in_two_ways_are_refused(micro: Micro, tmp_path: Path) -> None:
    off = "import os; os.environ['XGEN_NATIVE'] = 'off'"
    for one in ended(together(micro.recipe, "--run", tmp_path / "run", "mesh.fsdp=2", patches={1: off})):
        assert_one_error(one, 2, 'what computes bfloat16 is "xgen\'s kernels" on process 0', "XLA alone", "process 1")


@pytest.mark.slow
def test_a_signal_to_one_saves_on_both_and_one_process_goes_on(micro: Micro, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes = together(micro.recipe, FLOAT32, "--run", run, "mesh.fsdp=2")
    after_steps(3, run, processes)
    processes[1].terminate()
    first, second = ended(processes)
    told = assert_one_error(first, 75, "SIGTERM on process 1: saved at")
    assert assert_one_error(second, 75) == told
    done = run_process("train", "--resume", run, "--devices", 2, "--quiet")
    assert done.code == 0, done.err
    losses, alone = ([line["loss"] for line in lines(each)] for each in (run, straight))
    assert losses == pytest.approx(alone, rel=CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_kill_of_one_ends_the_other(lost: int, micro: Micro, tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes = together(micro.recipe, "--run", run, "mesh.fsdp=2")
    after_steps(4, run, processes)
    processes[lost].kill()
    other = ended(processes)[1 - lost]
    told = assert_one_error(other, STOPPED, f"process {lost} (", "died after step", "xgen train --resume")
    if lost == 0:
        assert all(event["kind"] != "stopped" for event in lines(run, "events.jsonl")), "nobody is left to write it"
    else:
        assert stop_in_the_log(run, processes[lost], "died") in told


@pytest.mark.slow
def test_a_process_that_hangs_is_in_the_log(micro: Micro, tmp_path: Path) -> None:
    """The writer is ended within a collective, and another thread than its main one writes the stop."""
    run = tmp_path / "run"
    processes = together(micro.recipe, "--run", run, "mesh.fsdp=2")
    after_steps(4, run, processes)
    processes[1].send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    try:
        [writer] = ended(processes[:1])
    finally:
        processes[1].kill()
        processes[1].wait()
    print("seconds until the writer had ended:", round(time.monotonic() - begin, 1))
    told = assert_one_error(writer, STOPPED)
    assert stop_in_the_log(run, processes[1], "hangs") in told


def stop_in_the_log(run: Path, lost: Popen, how: str) -> str:
    """The reason that the log's last event tells, which must name process 1 and the step that it was last known at."""
    stopped, last = lines(run, "events.jsonl")[-1], lines(run)[-1]
    assert (stopped["kind"], stopped["step"], stopped["tokens"]) == ("stopped", last["step"], last["tokens"])
    found = re.match(rf"process 1 \(.*, pid {lost.pid}\) {how} after step (\d+)", stopped["reason"])
    assert found, stopped["reason"]
    assert abs(int(found[1]) - stopped["step"]) <= 1
    return str(stopped["reason"])


def test_devices_of_one_process(micro: Micro, tmp_path: Path) -> None:
    done = run_process("train", micro.recipe, "--run", tmp_path / "run", "--devices", 3, "mesh.fsdp=2")
    assert_one_error(done, 2, "3 devices")


COMPILES_LATE = """
import time, jax, xgen.training.after as after
measure, waiting = after.measure_checkpoints, []
def late(event, seconds, **more):
    if waiting and event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
        waiting.clear()
        time.sleep(40)
def measure_late(*arguments, **more):
    waiting.append(True)
    return measure(*arguments, **more)
after.measure_checkpoints = measure_late
jax.monitoring.register_event_duration_secs_listener(late)
"""


@pytest.mark.slow
def test_one_that_compiles_the_measurement_late_is_waited_for(micro: Micro, tmp_path: Path) -> None:
    """gloo gives up after 30 seconds when not all come to the first collective of a group. Of a run that is trained to
    its end, it is the measurement's."""
    run = micro.copy(tmp_path / "run")
    begin = time.monotonic()
    for done in ended(together("--resume", run, "mesh.fsdp=2", patches={1: COMPILES_LATE})):
        assert done.code == 0, done.err
    assert time.monotonic() - begin > 40
