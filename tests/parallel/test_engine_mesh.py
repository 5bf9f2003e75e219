"""The engine on a mesh computes what it does on one device."""

from __future__ import annotations

import pytest
from emulated import emulated

pytestmark = pytest.mark.slow

MESHES = [(1, 1, 1, 8), (1, 8, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2)]


@pytest.mark.parametrize(
    ("variant", "int8"),
    [
        ("xgen", False),
        ("biased", False),
        ("grouped_tied", True),
        ("jaxformer", True),
    ],
)
def test_the_engine_on_a_mesh_equals_one_device(variant: str, int8: bool) -> None:
    meshes = MESHES if variant == "xgen" else MESHES[2:]
    found = emulated("engine_cases", {"variant": variant, "int8": int8, "meshes": meshes})
    assert found["tokens"] > 100
    # What is rounded to int8 may round the other way where sums of parts differ in their last bit.
    assert max(found["apart"]) < (0.05 if int8 else 2e-5), found
