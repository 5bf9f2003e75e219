"""`xgen plan` on the command line: its table, its JSON, its page, its errors, and how long it takes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from micro_runs import assert_one_error, command, run_process


def test_a_plan_in_all_its_forms(tmp_path: Path) -> None:
    done = command(
        *("plan", "xgen-7b-8k", "--on", "v4:8x8x8", "--no-compile", "--json", tmp_path / "plan.json"),
        *("--page", tmp_path / "plan.html", "--price", "2"),
    )
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["parameters"] == 6_895_702_016
    assert found["assumptions"]["price"] == 2
    for text in (
        "41.7 G",
        "43.3 G",
        "46.6 G",
        "6.47e+22",
        "--price 2",
        "--grid 0.385",
        "It fits.",
        "remat dots",
        "1.32 x FLOPs",
        found["command"],
    ):
        assert text in done.out.replace("\n", " ")
    assert "<svg" in (tmp_path / "plan.html").read_text()


def test_json_alone_on_standard_output() -> None:
    done = command("plan", "tiny", "--on", "h100:8", "--json", "-")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["recipe"], found["slice"], found["chips"]) == ("tiny", "h100:8", 8)


def test_what_does_not_fit_is_said_and_the_plan_is_made() -> None:
    done = command("plan", "xgen-7b-8k", "--on", "v4:2x2x1", "--no-compile")
    assert done.code == 0
    assert "It does not fit." in done.out
    assert "v4:2x2x2 (8 chips)" in done.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "--on SLICE"),
        (("--on", "v4:3x3x3"), "v4:3x3x3"),
        (("--on", "tpu"), "KIND:SHAPE"),
        (("--on", "v9:2x2"), "no such kind"),
        (("--on", "h100:7"), "h100:7"),
        (("--on", "v4:8x8x8", "--utilisation", "1.5"), "--utilisation 1.5"),
        (("--on", "v4:8x8x8", "--pue", "0.5"), "--pue 0.5"),
        (("--on", "v4:8x8x8", "--price", "-3"), "--price -3"),
        (("--on", "h100:8", "--compile"), "no compiler for h100"),
        (("mesh.tensor=3", "--on", "v4:8x8x8"), "mesh"),
        (("stages.0.remat=some", "--on", "v4:8x8x8"), "stages.0.remat"),
        (("--on", "v4:8x8x8", "--page", "/nowhere/plan.html"), "/nowhere"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], told: str) -> None:
    compiler = () if "--compile" in arguments else ("--no-compile",)
    done = command("plan", "xgen-7b-8k", *arguments, *compiler)
    assert_one_error(done, 4 if "/nowhere" in told else 2, told)


@pytest.mark.slow
def test_arithmetic_takes_seconds() -> None:
    start = time.process_time(), time.perf_counter()
    done = run_process("plan", "xgen-7b-8k", "--on", "v4:8x8x8", "--no-compile")
    assert done.code == 0, done.err
    assert time.perf_counter() - start[1] < 20  # 2 s on a machine that does nothing else
