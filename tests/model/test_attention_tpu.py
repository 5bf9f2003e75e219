"""The TPU's own compiler takes attention for slices of each kind of chip, on a machine without one."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

# Other processes of this machine may be compiling for TPUs too, and none is asked which chips it has.
QUIET = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@pytest.fixture(scope="module")
def programs():
    if find_spec("libtpu") is None:
        pytest.fail("these tests need libtpu; pip install 'xgen[tpu]', or leave them out with -m \"not oracle\"")
    program = Path(__file__).parent / "attention_on_tpu.py"
    environment = os.environ | QUIET | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_automatic_attention_is_splash_and_a_ring_is_not(programs, capsys):
    assert len(programs) == 7
    with capsys.disabled():
        for program in programs:
            print("\n", ", ".join(f"{name} {value}" for name, value in program.items()))
    for program in programs:
        # One backward kernel where four of its blocks span the row, else two.
        splash = ["dkv", "fwd"] if program["columns"] <= 8192 else ["dkv", "dq", "fwd"]
        assert program["kernels"] == ([] if "exchange" in program else splash), program


def test_keys_are_gathered_or_go_round(programs):
    """And the gradients' shares are exchanged in the keys' type, not summed as a whole."""
    for program in programs:
        wanted = ["collective-permute"] if "exchange" in program else ["all-gather", "all-to-all"]
        assert program["collectives"] == (wanted if program["parts"] > 1 else []), program
