"""Hypothesis without a clock, since a busy machine is no failure of ours; and a cache of each test's own."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where XGEN_CACHE points to: a tokenizer that another test, or an older version, has learnt would hide a fault."""
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XGEN_CACHE", str(place))
    return place
