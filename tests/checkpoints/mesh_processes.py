"""Starts the processes of `mesh_job.py`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

SIZES = {"layers": 3, "hidden_size": 64, "heads": 8, "kv_heads": 8, "head_size": 8, "mlp_size": 96, "vocab_size": 136}
"""Every axis that is split fits meshes of 8, and no part is a power of two all round."""

_TESTS = Path(__file__).parent.parent


def begin(
    folder: Path, actions: list[dict[str, Any]], processes: int = 1, devices: int = 1, sizes: dict[str, int] = SIZES
) -> list[subprocess.Popen[str]]:
    """`processes` of so many devices each, that do `actions` with the checkpoints in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    facts = {"folder": str(folder), "processes": processes, "devices": devices, "sizes": sizes, "actions": actions}
    job = folder.parent / f"job-{uuid.uuid4().hex}.json"
    job.write_text(json.dumps({**facts, "coordinator": f"127.0.0.1:{port}"}))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_TESTS)}
    return [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("mesh_job.py")), str(index), str(job)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(processes)
    ]


def found(started: list[subprocess.Popen[str]]) -> list[list[Any]]:
    """What each action gave on each process: [action][process]."""
    try:
        ends = [process.communicate(timeout=400) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, ends, strict=True):
        assert process.returncode == 0, errors
    return [list(answers) for answers in zip(*(json.loads(out.splitlines()[-1]) for out, _ in ends), strict=True)]


def run(folder: Path, actions: list[dict[str, Any]], **options: Any) -> list[list[Any]]:
    return found(begin(folder, actions, **options))
