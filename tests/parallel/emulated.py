"""Programs run in a process of their own on emulated devices: how many there are is settled once a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent

_PRELUDE = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", {devices})
sys.path[:0] = {path!r}
import {module}
{module}.main({arguments!r})
"""

# Code for a test's few numbers is not worth optimising.
_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def emulated(module: str, arguments: dict[str, Any], devices: int = 8, timeout: float = 1500) -> Any:
    """What `main(arguments)` of tests/parallel/`module`.py prints as JSON on its last line, on so many devices."""
    code = _PRELUDE.format(
        devices=devices, path=[str(TESTS), str(TESTS / "parallel")], module=module, arguments=arguments
    )
    environment = {**os.environ, "XLA_FLAGS": _FLAGS, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])
