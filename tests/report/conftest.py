"""Made-up run folders, written once for all tests of the report."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_runs import RUNS, write_run

from xgen.report.page import write_report


@pytest.fixture(scope="session")
def page_of(tmp_path_factory: pytest.TempPathFactory):
    """The report.html of a made-up run, by its name in RUNS."""
    written: dict[str, Path] = {}

    def page(name: str) -> Path:
        if name not in written:
            written[name] = write_report(write_run(tmp_path_factory.mktemp("run") / name, RUNS[name]))
        return written[name]

    return page
