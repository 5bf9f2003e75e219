"""The second start of a recipe finds what the first one compiled and learnt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SHORT = [f"stages.{number}.tokens=4K" for number in range(3)] + ["evaluation.tokens=4K", "evaluation.every=12K"]
"""`tiny`, its programs unchanged: two steps a stage."""


def train(run: Path, cache: Path) -> float:
    """A whole run of `tiny` from the command line with the cache in `cache`; the seconds its first stage compiled."""
    xgen = [sys.executable, "-c", "from xgen.cli.app import main; main()"]
    command = [*xgen, "train", "tiny", *SHORT, "--run", run]
    done = subprocess.run(command, env=os.environ | {"XGEN_CACHE": str(cache)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return next(event["compile_seconds"] for event in events if event["kind"] == "stage_started")


def steps_and_tokenizers(cache: Path) -> set[str]:
    """The compiled training steps in the cache, and the tokenizers."""
    compiled = {path.name for path in (cache / "xgen/compiled").glob("jit_step-*-cache")}
    return compiled | {path.name for path in (cache / "xgen/tokenizers").iterdir()}


def test_a_second_start_compiles_no_step_and_learns_no_tokenizer(tmp_path: Path) -> None:
    first = train(tmp_path / "first", tmp_path / "cache")
    kept = steps_and_tokenizers(tmp_path / "cache")
    assert len(kept) == 3 + 1
    second = train(tmp_path / "second", tmp_path / "cache")
    assert steps_and_tokenizers(tmp_path / "cache") == kept
    assert second < first / 2
    # Nothing of it shows in what is learnt.
    assert (tmp_path / "first/metrics.jsonl").read_text().count("\n") == 6
    for name in ("tokenizer.json", "stores/messages/manifest.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
