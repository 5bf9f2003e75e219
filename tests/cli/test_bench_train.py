"""`xgen bench train`: its JSON keeps its shape, its cases are those asked for, and what cannot be is told in a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from micro_runs import RECIPE, assert_one_error, command

KEYS = ["device", "cores", "matmul_peaks", "published_peak_flops", "ruler", "cases"]
CASE_KEYS = [
    "shape",
    "sizes",
    "parameters",
    "length",
    "batch",
    "microbatch",
    "precision",
    "remat",
    "attention",
    "optimizer",
    "steps",
    "flops_per_token",
    "tokens_per_second",
    "seconds_per_step",
    "spread",
    "compile_seconds",
    "peak_memory_bytes",
    "program_bytes",
    "matmul_peak_flops",
    "matmul_peaks",
    "utilisation",
    "published_peak_flops",
    "published_utilisation",
    "ruler",
    "error",
]
SHAPE = "d32 L1 h2 ff48 V64"


@pytest.mark.slow
def test_recipes_and_shapes_at_every_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "micro.toml"
    recipe.write_text(RECIPE.format(texts='"no text is read"'))
    cache = tmp_path / "cache"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    asked = (
        recipe,
        "compute.attention=reference",
        "--shape",
        SHAPE,
        "--length",
        "16,32",
        "--batch",
        "4",
        "--steps",
        "2",
    )
    done = command("bench", "train", *asked, "--precision", "float32", "--remat", "dots", "--json", "-")
    assert done.code == 0, done.err
    (line,) = done.out.splitlines()
    found = json.loads(line)
    assert list(found) == KEYS
    assert min(found["matmul_peaks"].values()) > 1e8
    assert found["ruler"].startswith("causal")
    cases = found["cases"]
    names = [(str(recipe), 16), (str(recipe), 32), (SHAPE, 16), (SHAPE, 32)]
    assert [(case["shape"], case["length"]) for case in cases] == names
    for case in cases:
        assert list(case) == CASE_KEYS
        assert (case["precision"], case["remat"], case["attention"]) == ("float32", "dots", "reference")
        assert case["error"] is None
        assert case["tokens_per_second"] == pytest.approx(4 * case["length"] / case["seconds_per_step"])
        assert case["matmul_peak_flops"] == found["matmul_peaks"]["float32"]
        used = case["tokens_per_second"] * case["flops_per_token"] / case["matmul_peak_flops"]
        assert case["utilisation"] == pytest.approx(used)
        assert 0 < used < 1
        assert 2**25 < case["peak_memory_bytes"] < 2**32
        assert case["compile_seconds"] > 0
    assert not cache.exists() or not any(cache.iterdir())


@pytest.mark.slow
def test_the_table_and_a_case_that_fails(tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    done = command("bench", "train", "--shape", SHAPE, "--length", "16", "--batch", "1", "--steps", "1")
    assert done.code == 0, done.err
    assert SHAPE in done.out
    assert "FLOPs counted: causal" in done.out
    asked = ("--shape", SHAPE, "--length", "16", "--attention", "splash", "--quiet", "--json", target)
    done = command("bench", "train", *asked)
    told = f"1 of 1 cases failed: {SHAPE} at 16 tokens: compute.attention: splash is for TPUs"
    assert_one_error(done, 2, told)
    (case,) = json.loads(target.read_text())["cases"]
    assert case["error"].startswith("compute.attention: splash")
    assert case["tokens_per_second"] is None


def test_what_cannot_be_timed_is_told_in_a_line_before_anything_runs() -> None:
    for arguments, told in (
        (("nope",), "there is no recipe 'nope'"),
        (("--shape", "d512"), "shape 'd512' is neither a recipe nor each of d (hidden_size)"),
        (("--length", "4"), "length 4 is too short to train on; give 8 tokens or more"),
        (("--length", "2X"), "'2X' is not a length"),
        (("--batch", "0"), "batch 0 holds no sequence; give 1 or more"),
        (("--batch", "4", "--microbatch", "3"), "microbatch 3 does not divide the batch of 4 sequences; use 1, 2 or 4"),
        (("--steps", "0"), "steps 0 leave nothing to measure; give 1 or more"),
        (("model.hidden=3",), "model.hidden: unknown key"),
        (("--json", "/nowhere/found.json"), "cannot write /nowhere/found.json"),
    ):
        assert_one_error(command("bench", "train", *arguments), 2 if "--json" not in arguments else 4, told)
