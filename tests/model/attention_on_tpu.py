"""A program: compiles attention, forward and backward, for TPUs that are not there; prints what the compiler made."""

from __future__ import annotations

import json
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xgen.model.attention import attention

CHIPS = {"v4:4x4x4": "megacore", "v5p:4x4x4": "megacore", "v5e:16x16": "default", "v6e:16x16": "default"}
CASES = [
    {"chips": "v4:4x4x4", "columns": 2048, "parts": 1, "heads": 2, "kv_heads": 2, "head": 128},
    {"chips": "v4:4x4x4", "columns": 8192, "parts": 1, "heads": 2, "kv_heads": 1, "head": 64},
    {"chips": "v4:4x4x4", "columns": 32_768, "parts": 4, "heads": 2, "kv_heads": 2, "head": 128},
    {"chips": "v4:4x4x4", "columns": 32_768, "parts": 4, "heads": 2, "kv_heads": 2, "head": 128, "exchange": "ring"},
    {"chips": "v5p:4x4x4", "columns": 8192, "parts": 2, "heads": 2, "kv_heads": 2, "head": 128},
    {"chips": "v5e:16x16", "columns": 8192, "parts": 1, "heads": 2, "kv_heads": 2, "head": 128},
    {"chips": "v6e:16x16", "columns": 131_072, "parts": 8, "heads": 2, "kv_heads": 1, "head": 128},
]
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def compiled(
    devices: np.ndarray, columns: int, parts: int, heads: int, kv_heads: int, head: int, exchange: str = "gather"
):
    """The program of one layer's attention on `parts` chips a sequence."""
    mesh = Mesh(devices.reshape(-1, parts), ("fsdp", "context"))
    spec = PartitionSpec("fsdp", "context")
    context = ("context",) if parts > 1 else ()

    def both(q, k, v, segments):
        mixed = lambda q, k, v: attention(q, k, v, segments, "auto", context, exchange)  # noqa: E731
        result, pull = jax.vjp(mixed, q, k, v)
        return result, *pull(result)

    def given(*shape, kind=jnp.bfloat16):
        return jax.ShapeDtypeStruct((mesh.shape["fsdp"], columns, *shape), kind, sharding=NamedSharding(mesh, spec))

    inside = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    keys = given(kv_heads, head)
    return inside.lower(given(heads, head), keys, keys, given(kind=jnp.int32)).compile()


def main() -> None:
    opened: dict[str, np.ndarray] = {}
    found = []
    for case in CASES:
        chips, shape = case["chips"], {name: value for name, value in case.items() if name != "chips"}
        if chips not in opened:
            topology = topologies.get_topology_desc(platform="tpu", topology_name=chips, chip_config_name=CHIPS[chips])
            opened[chips] = np.array(topology.devices)
        started = time.monotonic()
        program = compiled(opened[chips], **shape)
        text = program.as_text()
        result = {
            "kernels": sorted(set(re.findall(r"splash_mha_(fwd|dq|dkv)", text))),
            "collectives": [name for name in COLLECTIVES if re.search(rf" {name}(-start)?\(", text)],
            "temporary": program.memory_analysis().temp_size_in_bytes,
            "seconds": round(time.monotonic() - started, 1),
        }
        found.append(case | result)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
