"""The real trained model that the interchange is proved on, from the package index."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import llama_server as llama
import pytest
from packages import smollm2_gguf


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return smollm2_gguf()


@pytest.fixture(scope="session")
def llama_server() -> Callable[..., AbstractContextManager[llama.LlamaServer]]:
    """`with llama_server(file) as server:` is llama.cpp with a GGUF file loaded."""
    return llama.llama_server
