"""Small programs whose work is known in closed form; run as a script, it prints their compiled texts as JSON.

python compiled_programs.py cpu            eight emulated devices
python compiled_programs.py v5e:2x4        eight chips that are not here
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ROWS, WIDTH, LAYERS = 128, 256, 5
PRODUCT = 2 * ROWS * WIDTH * WIDTH
"""FLOPs of one layer's product."""
CELLS = ROWS * WIDTH
PART = 4 * CELLS // 4
"""Bytes of a quarter of a float32 [ROWS, WIDTH]."""


@dataclass(frozen=True)
class Expected:
    """Of one device. `exchanges`: kind -> (devices of a group, runs, bytes)."""

    flops: int = 0
    exchanges: tuple[tuple[str, int, int, int], ...] = ()


EXPECTED = {
    "scan": Expected(LAYERS * PRODUCT),
    "nested": Expected(3 * LAYERS * PRODUCT),
    "fori": Expected(7 * PRODUCT),
    "down": Expected(4 * PRODUCT),
    "grad": Expected(3 * LAYERS * PRODUCT),
    # Two products a layer: forward 2, again 2 (the second one's result is needed for tanh's gradient), backward 4.
    "remat": Expected(8 * LAYERS * PRODUCT),
    "branch": Expected(2 * PRODUCT),
    # Pairs of a place and a window's place inside 8 x 8 padded by one: (3 x 8 - 2)^2.
    "convolution": Expected(2 * 2 * 16 * 32 * 22**2),
    # A batched product, which TPU's compiler writes as a dilated convolution.
    "batched": Expected(2 * 8 * ROWS * WIDTH * 64),
    "all_gather": Expected(0, (("all-gather", 4, 1, 4 * PART),)),
    "reduce_scatter": Expected(0, (("reduce-scatter", 4, 1, 4 * PART),)),
    "all_reduce": Expected(0, (("all-reduce", 4, 1, PART),)),
    "all_to_all": Expected(0, (("all-to-all", 4, 1, PART),)),
    "permute": Expected(0, (("collective-permute", 8, 1, PART),)),
    # A step over layers whose weights lie in eight parts: forward, again, and two products backward; gathered forward
    # and again backward, their gradients scattered.
    "sharded": Expected(
        4 * 3 * 2 * 1024**3,
        (("all-gather", 8, 2 * 3, 2 * 3 * 4 * 1024**2), ("reduce-scatter", 8, 3, 3 * 4 * 1024**2)),
    ),
    "reduced_in_loop": Expected(0, (("all-reduce", 2, 6, 6 * PART),)),
}

# TPU's compiler rounds to bfloat16 before it gathers what its matrix unit multiplies in bfloat16.
_SHARDED = EXPECTED["sharded"]
_GATHERED = ("all-gather", 8, 2 * 3, 2 * 3 * 2 * 1024**2)
EXPECTED_TPU = EXPECTED | {"sharded": Expected(_SHARDED.flops, (_GATHERED, _SHARDED.exchanges[1]))}


def programs(devices: list[Any]) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """By name: what is compiled, and its abstract arguments."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = Mesh(np.array(devices).reshape(2, 4), ("a", "b"))
    one = NamedSharding(Mesh(np.array(devices[:1]), ("a",)), P())

    def array(*shape: int, place: Any = one) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)

    def layer(x: Any, w: Any) -> Any:
        return jnp.tanh(x @ w)

    def scan(x: Any, ws: Any) -> Any:
        return lax.scan(lambda c, w: (layer(c, w), None), x, ws)[0]

    def twice(ws: Any, x: Any) -> Any:
        body = jax.checkpoint(lambda c, w: (layer(layer(c, w), w.T), None))
        return jnp.sum(lax.scan(body, x, ws)[0])

    def spread(body: Callable[[Any], Any], before: Any, after: Any) -> Callable[[Any], Any]:
        return jax.shard_map(body, mesh=mesh, in_specs=before, out_specs=after, check_vma=False)

    def sharded(ws: Any, x: Any) -> Any:
        def turn(c: Any, w: Any) -> tuple[Any, None]:
            return layer(c, lax.all_gather(w, ("a", "b"), tiled=True)), None

        return jnp.sum(lax.scan(jax.checkpoint(turn), x, ws)[0])

    x, w, ws = array(ROWS, WIDTH), array(WIDTH, WIDTH), array(LAYERS, WIDTH, WIDTH)
    split, whole = P("b", None), P(None, None)
    part, every = (
        array(ROWS, WIDTH, place=NamedSharding(mesh, split)),
        array(ROWS, WIDTH, place=NamedSharding(mesh, whole)),
    )
    stored, rows = P(None, ("a", "b"), None), P(("a", "b"), None)
    ring = [(i, (i + 1) % 4) for i in range(4)]
    return {
        "scan": (scan, (x, ws)),
        "nested": (lambda x, ws: lax.fori_loop(0, 3, lambda _, c: scan(c, ws), x), (x, ws)),
        "fori": (lambda x, w: lax.fori_loop(2, 9, lambda _, c: layer(c, w), x), (x, w)),
        "down": (
            lambda x, w: lax.while_loop(lambda s: s[0] > 1, lambda s: (s[0] - 3, layer(s[1], w)), (jnp.int32(12), x))[
                1
            ],
            (x, w),
        ),
        "grad": (jax.grad(lambda ws, x: jnp.sum(scan(x, ws))), (ws, x)),
        "remat": (jax.grad(twice), (ws, x)),
        "branch": (
            lambda p, x, w: lax.cond(p[0] > 0, lambda: x @ w @ w, lambda: x @ w),
            (array(1), x, w),
        ),
        "convolution": (
            lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
            (array(2, 8, 8, 16), array(3, 3, 16, 32)),
        ),
        "batched": (
            lambda x, w: jnp.einsum("bij,bjk->bik", x, w),
            (array(8, ROWS, WIDTH), array(8, WIDTH, 64)),
        ),
        "all_gather": (spread(lambda x: lax.all_gather(x, "b", tiled=True), split, whole), (part,)),
        "reduce_scatter": (spread(lambda x: lax.psum_scatter(x, "b", tiled=True), whole, split), (every,)),
        "all_reduce": (spread(lambda x: lax.psum(x, "b"), split, whole), (part,)),
        "all_to_all": (spread(lambda x: lax.all_to_all(x, "b", 1, 0, tiled=True), split, split), (part,)),
        "permute": (spread(lambda x: lax.ppermute(x, "b", ring), split, split), (part,)),
        "sharded": (
            jax.shard_map(jax.grad(sharded), mesh=mesh, in_specs=(stored, rows), out_specs=stored, check_vma=False),
            (
                array(3, 1024, 1024, place=NamedSharding(mesh, stored)),
                array(8 * 1024, 1024, place=NamedSharding(mesh, rows)),
            ),
        ),
        "reduced_in_loop": (
            spread(lambda x: lax.fori_loop(0, 6, lambda _, c: jnp.sin(lax.psum(c, "a")), x), split, split),
            (part,),
        ),
    }


def main(where: str) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    if where == "cpu":
        jax.config.update("jax_num_cpu_devices", 8)
        devices = jax.devices()
    else:
        from xgen.parallel.slices import parse_slice
        from xgen.parallel.topology import describe

        devices = list(describe(parse_slice(where)))
    found = {}
    for name, (function, arguments) in programs(devices).items():
        compiled = jax.jit(function).lower(*arguments).compile()
        costs = compiled.cost_analysis() or {}
        found[name] = {"text": compiled.as_text(), "flops": costs.get("flops"), "bytes": costs.get("bytes accessed")}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
