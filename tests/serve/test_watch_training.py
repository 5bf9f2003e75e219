"""A real `xgen train`, watched from before its recipe is there, over a stop and a resume, to its end."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import httpx
import pytest
from micro_runs import RECIPE, end, lines, start, write_texts
from watching import until, watched

LONGER = ("stages.0.tokens=256000", "evaluation.every=51200", "checkpoints.every=51200")
"""So that the run can be stopped in its first stage, and does not measure and save all the time."""


@pytest.mark.slow
def test_a_real_run_is_watched_from_its_start_over_a_resume_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setenv("XGEN_CACHE", str(tmp_path / "cache"))
    recipe, run = tmp_path / "micro.toml", tmp_path / "run"
    texts = write_texts(tmp_path / "texts")
    recipe.write_text(RECIPE.format(texts=json.dumps(str(texts))))
    training = start("train", recipe, *LONGER, "--run", run, "--quiet")
    seen: list[str] = []
    try:
        until(lambda: (run / ".lock").exists(), "the folder", 300)
        with watched(run) as server, httpx.Client(base_url=server.address, timeout=30) as page:

            def reached(wanted: str) -> bool:
                seen.append(str(page.get("/state.json").json()["state"]))
                return seen[-1] == wanted

            until(lambda: reached("running"), "the first step", 300)
            assert re.search(r"<dt>step</dt><dd><b>[0-9,]+</b>", page.get("/part/top").text)
            training.send_signal(signal.SIGTERM)
            assert end(training).code == 75
            until(lambda: reached("stopped"), "the stop")
            assert "SIGTERM" in page.get("/part/top").text
            stopped = lines(run)[-1]["step"]
            training = start("train", "--resume", run, "--quiet")
            until(lambda: reached("finished"), "the end", 300)
            done = end(training)
            assert done.code == 0, done.err
            assert_like_report(page.get("/").text, run)
            assert len(lines(run)) > stopped
            assert "resumed" in page.get("/part/log").text
    finally:
        training.kill()
    order = [state for state, before in zip(seen, [None, *seen], strict=False) if state != before]
    assert order[-1] == "finished"
    assert order.index("running") < order.index("stopped") < len(order) - 1
    assert "silent" not in order


def assert_like_report(page: str, run: Path) -> None:
    """Every section of the report that the run wrote for itself is on the page, letter by letter."""
    sections = re.findall(r"(?s)<section id=.*?</section>", (run / "report.html").read_text(encoding="utf-8"))
    assert len(sections) >= 8
    for section in sections:
        assert section in page
