"""Slices that are not here, as the TPU compiler sees them."""

import os
import subprocess
import sys

import pytest

from xgen.errors import RecipeError
from xgen.parallel import topology
from xgen.parallel.slices import CHIPS, ladder, parse_slice
from xgen.parallel.topology import CompilerMissingError, describe, host_bounds


def test_chips_without_a_compiler_of_their_own_are_refused() -> None:
    with pytest.raises(RecipeError, match="no compiler for h100 runs without one; plan it by arithmetic"):
        describe(parse_slice("h100:8"))


def test_without_libtpu_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "find_spec", lambda _: None)
    with pytest.raises(CompilerMissingError, match=r"pip install 'xgen\[tpu\]'"):
        describe(parse_slice("v4:2x2x1"))


@pytest.mark.parametrize("kind", [name for name, chip in CHIPS.items() if chip.dimensions])
def test_hosts_tile_every_slice(kind: str) -> None:
    for slice_ in ladder(kind):
        bounds = host_bounds(slice_)
        assert all(size % bound == 0 for size, bound in zip((*slice_.shape, 1), bounds, strict=False))
        assert bounds[0] * bounds[1] == slice_.chips_per_host


ALL = """
import sys
from xgen.parallel.slices import CHIPS, ladder, parse_slice
from xgen.parallel.topology import describe, places
for kind, chip in CHIPS.items():
    for slice_ in ladder(kind) if chip.topology else ():
        if slice_.chips > 1024:
            continue
        devices = describe(slice_)
        assert len(devices) == slice_.chips, slice_
        assert len({device.process_index for device in devices}) == slice_.hosts, slice_
        assert devices[0].device_kind in chip.kinds, devices[0].device_kind
        assert len(set(places(devices))) == slice_.chips
        assert {place.slice for place in places(devices)} == set(range(slice_.slices))
print("described")
"""


@pytest.mark.oracle
def test_the_compiler_describes_every_slice_that_is_sold() -> None:
    if not topology.available():
        pytest.fail("needs the TPU compiler: pip install 'xgen[tpu]', or leave it out with -m \"not oracle\"")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", ALL], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.endswith("described\n"), done.stderr
