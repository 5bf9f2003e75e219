"""A program: attention with its columns spread over emulated devices, every case of it; prints what it found as JSON.

A process of its own, since JAX counts its devices once, and one for all cases, since starting one takes seconds.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from functools import partial

from jaxtyping import install_import_hook

if __name__ == "__main__":
    install_import_hook("xgen.model.attention", "beartype.beartype")

import jax
import jax.numpy as jnp
import numpy as np
import plain_decoder as plain
from jax.sharding import Mesh, PartitionSpec
from small_models import relative_error

from xgen.model.attention import attention, tiles
from xgen.model.attention.blocks import Blocks
from xgen.model.attention.splash import splash
from xgen.model.split import zigzag

CONTEXT = ("context",)
EXCHANGES = ("gather", "ring")
FAST = {"xla_backend_optimization_level": 0}


def drawn(
    length: int, heads: int, kv_heads: int, kind: str, documents: list[list[int]], head: int = 8
) -> tuple[jax.Array, ...]:
    """q, k, v, the result's gradient, and the segments of rows of these documents, in natural order."""
    random = np.random.default_rng(length + heads + kv_heads)
    shapes = [(len(documents), length, count, head) for count in (heads, kv_heads, kv_heads, heads)]
    arrays = [jnp.asarray(random.normal(size=shape), kind) for shape in shapes]
    segments = np.stack([np.repeat(np.arange(len(row)), row) for row in documents])
    return *arrays, jnp.asarray(segments, jnp.int32)


def documents_of(length: int) -> list[list[int]]:
    """One row of one document; one of a long, a single token's, and two whose edges lie inside chunks."""
    long = length // 2 + 3
    return [[length], [long, 1, 7, length - long - 8]]


def with_gradients(function):
    """(q, k, v, the result's gradient, segments) -> the result and the gradients of q, k and v."""

    def both(q, k, v, gradient, segments):
        result, pull = jax.vjp(lambda q, k, v: function(q, k, v, segments), q, k, v)
        return result, *pull(gradient)

    return both


def spread(function, parts: int):
    """`function` of arrays in natural order, computed by `parts` devices that hold their columns in zigzag order."""
    mesh = Mesh(np.array(jax.devices()[:parts]), CONTEXT)
    columns = PartitionSpec(None, "context")
    inside = jax.shard_map(function, mesh=mesh, in_specs=columns, out_specs=columns, check_vma=False)

    def whole(*arrays):
        order = zigzag(arrays[0].shape[1], parts)
        return jax.tree.map(lambda x: x[:, np.argsort(order)], inside(*(x[:, order] for x in arrays)))

    return whole


def compiled(function, *arrays):
    return jax.jit(function).lower(*arrays).compile(compiler_options=FAST)


def errors(found, wanted) -> list[float]:
    return [relative_error(*pair) for pair in zip(found, wanted, strict=True)]


def equality() -> dict[str, dict[str, list[float]]]:
    """Relative errors of the result, dq, dk and dv: against one device, and against a plain float64 computation.

    640 columns on 8 devices are chunks of 40 in three tiles of 16, the last one short; 160 are chunks of one tile; 32
    are chunks of two places, all rows at once.
    """
    tiles.BLOCK = 16
    found = {}
    every = (2, 4, 8)
    cases = [("float32", 640, 4, 2, every), ("float32", 160, 3, 3, (8,)), ("float32", 32, 4, 1, (8,))]
    for kind, length, heads, kv_heads, spreads in [
        *cases,
        ("float64", 640, 4, 2, every),
        ("bfloat16", 640, 4, 2, (8,)),
    ]:
        given = drawn(length, heads, kv_heads, kind, documents_of(length))
        one = compiled(with_gradients(attention), *given)(*given)
        exact = exactly(given)
        for parts in spreads:
            for exchange in EXCHANGES:
                function = partial(attention, backend="blockwise", context=CONTEXT, exchange=exchange)
                result = compiled(spread(with_gradients(function), parts), *given)(*given)
                assert [x.dtype for x in result] == [x.dtype for x in one]
                name = f"{kind} {length} columns on {parts}, {heads}/{kv_heads} heads, {exchange}"
                found[name] = {"one": errors(result, one), "exact": errors(result, exact)}
    return found


def exactly(given: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    wide = [jnp.asarray(x, jnp.float64) for x in given[:-1]]
    return compiled(with_gradients(plain.attention), *wide, given[-1])(*wide, given[-1])


def reference_equality() -> list[float]:
    given = drawn(48, 4, 2, "float32", documents_of(48))
    gathered = partial(attention, backend="reference", context=CONTEXT)
    result = compiled(spread(with_gradients(gathered), 4), *given)(*given)
    return errors(result, compiled(with_gradients(partial(attention, backend="reference")), *given)(*given))


def interpreted() -> dict[str, list[float]]:
    """Splash, step by step as its blocks would run on a TPU, against the plain computation: sizes of head; one query
    head a key head, and more; a length that fills no block; columns in parts that fill no block either; a fused
    backward kernel whose blocks are computed in two parts, and a row too long for it, of two kernels."""
    found = {}
    cases = [(384, 4, 2, 64, 1), (100, 2, 2, 128, 1), (384, 2, 1, 64, 2), (512, 1, 1, 64, 4), (640, 2, 1, 64, 1)]
    cases.append((3072, 1, 1, 64, 1))
    assert [Blocks.of(length // parts, parts).fused for length, _, _, _, parts in cases] == [128] * 4 + [None, 1024]
    for kind, (length, heads, kv_heads, head, parts) in [
        *(("float32", case) for case in cases),
        ("bfloat16", cases[2]),
    ]:
        given = drawn(length, heads, kv_heads, kind, documents_of(length), head)
        if parts == 1:
            function = with_gradients(partial(splash, interpret=True))
        else:
            function = spread(with_gradients(partial(splash, axes=CONTEXT, interpret=True)), parts)
        with jax.enable_x64(False):
            result = compiled(function, *given)(*given)
        assert [x.dtype for x in result] == [jnp.dtype(kind)] * 4
        name = f"{kind} {length} columns on {parts}, {heads}/{kv_heads} heads of {head}"
        found[name] = errors(result, exactly(given))
    return found


def leaks(exchange: str) -> list[tuple[int, int]]:
    """(changed place, place of a result that must not have moved and has), for every place of a row.

    Raises AssertionError when one that should move does not: such a probe would see nothing.
    """
    tiles.BLOCK = 8
    length, rows = 64, [[64], [20, 1, 30, 13]]
    *arrays, _, segments = drawn(length, 2, 1, "float32", rows)
    told = segments
    whole = spread(partial(attention, backend="blockwise", context=CONTEXT, exchange=exchange), 4)
    score = compiled(whole, *arrays, told)
    before, documents, found = np.asarray(score(*arrays, told)), np.asarray(segments), []
    for place in range(length):
        after = np.asarray(score(*(x.at[:, place].add(1) for x in arrays), told))
        moved = (after != before).any(axis=(2, 3))
        allowed = (documents == documents[:, place : place + 1]) & (np.arange(length) >= place)
        assert moved[allowed].all(), f"the token at {place} is not seen by its own document"
        found += [(place, int(other)) for _, other in np.argwhere(moved & ~allowed)]
    return found


def broken(mask: str, exchange: str) -> list[tuple[int, int]]:
    """The leaks when the tiles' mask forgets something."""
    true = tiles._visible
    masks = {
        "causal only": lambda query, key, *_: query[:, None] >= key,
        "documents only": lambda *given: given[2][:, None] == given[3],
    }
    tiles._visible = masks[mask]
    try:
        return leaks(exchange)
    finally:
        tiles._visible = true


def visits(exchange: str) -> dict[int, int]:
    """Pairs of tiles that each of 8 devices computes in both passes, counted as they run: 1,024 places in tiles of 16,
    one row of one key head."""
    tiles.BLOCK = 16
    counts: Counter[int] = Counter()
    true = tiles._visible

    def counted(*given):
        jax.debug.callback(lambda part: counts.update([int(part)]), jax.lax.axis_index(CONTEXT))
        return true(*given)

    tiles._visible = counted
    try:
        given = drawn(1024, 1, 1, "float32", [[1024]])
        function = partial(attention, backend="blockwise", context=CONTEXT, exchange=exchange)
        jax.block_until_ready(compiled(spread(with_gradients(function), 8), *given)(*given))
        jax.effects_barrier()
    finally:
        tiles._visible = true
    return dict(counts)


def memory(parts: int, exchange: str) -> int:
    """Bytes a device reserves for both passes, with 2,048 columns of its own."""
    tiles.BLOCK = 128
    given = drawn(2048 * parts, 1, 1, "float32", [[2048 * parts]], head=64)
    function = partial(attention, backend="blockwise", context=CONTEXT, exchange=exchange)
    mesh = Mesh(np.array(jax.devices()[:parts]), CONTEXT)
    columns = PartitionSpec(None, "context")
    inside = jax.shard_map(with_gradients(function), mesh=mesh, in_specs=columns, out_specs=columns, check_vma=False)
    return int(compiled(inside, *given).memory_analysis().temp_size_in_bytes)


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", True)
    found = {
        "equality": equality(),
        "reference": reference_equality(),
        "interpreted": interpreted(),
        "leaks": {exchange: leaks(exchange) for exchange in EXCHANGES},
        "broken": {"causal only": broken("causal only", "gather"), "documents only": broken("documents only", "ring")},
        "visits": {exchange: visits(exchange) for exchange in EXCHANGES},
        "memory": {exchange: {parts: memory(parts, exchange) for parts in (4, 8)} for exchange in EXCHANGES},
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
