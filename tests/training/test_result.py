"""The result for machines: its keys, and that its figures are those of the logs and of the measurements."""

from __future__ import annotations

import json
import lzma
import math
import statistics
from pathlib import Path

import pytest
from micro_runs import STAGES, Micro, command, lines, run_process

PROMISED = {
    "recipe", "parameters", "tokens", "seconds", "peak_memory_bytes", "stages", "bits_per_byte", "xz_bits_per_byte",
    "fixed_target", "fixed_target_gain",
}  # fmt: skip


def test_the_promised_keys_are_there(micro: Micro) -> None:
    result = micro.result
    assert set(result) >= PROMISED
    for stage in result["stages"]:
        assert set(stage) >= {"name", "length", "tokens", "checkpoint", "tokens_per_second"}
    for row in result["fixed_target"]:
        assert set(row) >= {"checkpoint", "context", "loss", "low", "high", "documents"}
    for row in result["fixed_target_gain"]:
        assert set(row) >= {"checkpoint", "from_context", "to_context", "difference", "low", "high"}
    assert json.loads((micro.straight / "result.json").read_text()) == result


def test_its_figures_are_those_of_the_logs(micro: Micro) -> None:
    result, steps = micro.result, lines(micro.straight)
    assert result["recipe"] == "micro"
    assert result["tokens"] == steps[-1]["tokens"] == 5120
    assert result["seconds"] > sum(line["seconds"] for line in steps)
    assert 50e6 < result["peak_memory_bytes"] < 8e9
    spent = 0
    for stage, (name, (length, last)) in zip(result["stages"], STAGES.items(), strict=True):
        assert (stage["name"], stage["length"], stage["tokens"]) == (name, length, last - spent)
        speeds = [line["tokens_per_second"] for line in steps if line["stage"] == name]
        assert stage["tokens_per_second"] == statistics.median(speeds)
        assert Path(stage["checkpoint"]).name == f"{last:015d}"
        assert Path(stage["checkpoint"]).is_dir()
        spent = last


def test_parameters_are_counted(micro: Micro) -> None:
    """LLaMA's shape by hand: rows of the vocabulary twice, attention, SwiGLU, norms."""
    rows, hidden, mlp = 384, 32, 96
    layer = 4 * hidden * hidden + 3 * hidden * mlp + 2 * hidden
    assert micro.result["parameters"] == 2 * rows * hidden + layer + hidden


def test_its_figures_are_those_of_the_measurements(micro: Micro) -> None:
    measured = json.loads((micro.straight / "evals/after_training.json").read_text())
    result = micro.result
    assert result["fixed_target"] == measured["fixed_target"]
    assert result["fixed_target_gain"] == measured["fixed_target_gain"]
    assert result["xz_bits_per_byte"] == measured["text"]["xz_bits_per_byte"]
    (last,) = [row for row in measured["strided"] if (row["checkpoint"], row["context"]) == ("64", 64)]
    assert result["bits_per_byte"] == last["bits_per_byte"]
    assert last["bits_per_byte"] == pytest.approx(
        last["loss"] * last["tokens"] / math.log(2) / measured["text"]["bytes"]
    )
    by = {(row["checkpoint"], row["context"]): row["loss"] for row in result["fixed_target"]}
    for gain in result["fixed_target_gain"]:
        at = gain["checkpoint"]
        assert gain["difference"] == pytest.approx(by[at, gain["to_context"]] - by[at, gain["from_context"]])


def test_held_out_text_was_not_trained_on(micro: Micro) -> None:
    """And xz is measured on the very bytes the model was: those of held-out documents, end to end."""
    from xgen.data.store import open_store

    measured = json.loads((micro.straight / "evals/after_training.json").read_text())
    store = open_store(micro.straight / "stores/texts")
    held_out = [store.held_out.name(i) for i in range(store.held_out.documents)]
    train = [store.train.name(i) for i in range(store.train.documents)]
    assert len(held_out) == measured["text"]["documents"] >= 2
    assert sorted(held_out + train) == sorted(file.name for file in micro.texts.iterdir())
    parts = [(micro.texts / name).read_bytes() for name in sorted(held_out)]
    assert sum(map(len, parts)) >= measured["text"]["bytes"]
    shortest = 8 * len(lzma.compress(b"".join(parts), preset=9 | lzma.PRESET_EXTREME)) / sum(map(len, parts))
    assert result_near(measured["text"]["xz_bits_per_byte"], shortest)


def result_near(measured: float, of_all: float) -> bool:
    """The excerpts measured on are shorter than the documents, and short text is packed less well."""
    return of_all <= measured < 2 * of_all


def test_standard_output_is_pure_json(micro: Micro, tmp_path: Path) -> None:
    run = micro.copy(tmp_path / "run", tokens=4608)
    done = run_process("train", "--resume", run, "--json", "-")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found == json.loads((run / "result.json").read_text())
    same = ("recipe", "parameters", "tokens", "bits_per_byte", "xz_bits_per_byte", "fixed_target", "fixed_target_gain")
    assert {key: found[key] for key in same} == {key: micro.result[key] for key in same}


def test_a_file_and_quiet(micro: Micro, tmp_path: Path) -> None:
    run = micro.copy(tmp_path / "run")
    done = command("train", "--resume", run, "--quiet", "--json", tmp_path / "found.json")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert json.loads((tmp_path / "found.json").read_text())["run"] == str(run)
