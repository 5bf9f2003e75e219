"""Who holds which part of what: one table from the axes of the weights to those of the mesh."""

from __future__ import annotations

from math import gcd

import jax
from jax.sharding import PartitionSpec

from xgen.errors import RecipeError
from xgen.model import Spec
from xgen.model.weights import Axis, Weight, Weights, abstract, map_rows
from xgen.parallel.mesh import LINE, Sizes
from xgen.recipe.near import divisors, near
from xgen.recipe.schema import Model, Stage
from xgen.recipe.units import format_length

RULES: dict[Axis, tuple[str, ...]] = {
    "layer": (),
    "embed": ("fsdp", LINE, "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
"""Mesh axes over which an axis of the weights is stored."""

TOKENS = PartitionSpec(("replica", "fsdp", LINE), "context")
"""A batch [N, S]: sequences over the data axes, columns (in zigzag order) over context."""


def partition(row: Weight) -> PartitionSpec:
    """Of one weight. Axes that the mesh has only once are harmless."""
    return PartitionSpec(*(RULES[axis] for axis in row.axes))


def weight_partitions(spec: Spec) -> Weights:
    """A tree shaped as the weights."""
    return map_rows(abstract(spec), partition)


def state_shardings(tree: object, spec: Spec, mesh: jax.sharding.Mesh) -> object:
    """Shardings of any tree that repeats the weights' (an optimizer's state): a leaf whose path ends in a weight's name
    and that has its shape lies as the weight does, all else everywhere."""
    weights = abstract(spec)
    places = {
        jax.tree_util.keystr(path): (leaf.shape, place)
        for (path, leaf), place in zip(
            jax.tree_util.tree_flatten_with_path(weights)[0],
            jax.tree.leaves(weight_partitions(spec), is_leaf=lambda x: isinstance(x, PartitionSpec)),
            strict=True,
        )
    }

    def of(path: tuple[object, ...], leaf: jax.Array) -> jax.sharding.NamedSharding:
        told = jax.tree_util.keystr(path)
        fits = [place for name, (shape, place) in places.items() if told.endswith(name) and leaf.shape == shape]
        return jax.sharding.NamedSharding(mesh, fits[0] if fits else PartitionSpec())

    return jax.tree_util.tree_map_with_path(of, tree)


def require_even(model: Model, stage: Stage, sizes: Sizes, place: str) -> None:
    """Raise RecipeError when a part would be uneven, with values that would fit. `place`: the stage's key."""
    checks = (_tensor(model, sizes, place), _shards(model, sizes, place), _rows(stage, sizes, place))
    for told in (*checks, _columns(stage, sizes, place)):
        if told:
            raise RecipeError(told)


def _tensor(model: Model, sizes: Sizes, place: str) -> str:
    cut = {key: getattr(model, key) for key in ("heads", "kv_heads", "mlp_size", "vocab_size")}
    uneven = next((key for key, size in cut.items() if size % sizes.tensor), None)
    if uneven is None:
        return ""
    fitting = divisors(gcd(sizes.devices, *cut.values()))
    told = f"{place}.mesh.tensor: {sizes.tensor} does not divide model.{uneven} {cut[uneven]}"
    return f"{told}; use {near(sizes.tensor, fitting)}"


def _shards(model: Model, sizes: Sizes, place: str) -> str:
    """Of the weights along the hidden size."""
    width, shards = model.hidden_size, sizes.fsdp * sizes.context
    if width % shards == 0:
        return ""
    told = f"{place}.mesh: fsdp {sizes.fsdp} x context {sizes.context} does not divide model.hidden_size {width}"
    if width % sizes.context:
        fitting = divisors(gcd(sizes.devices // sizes.tensor, width))
        return f"{told}; use context {near(sizes.context, fitting)}"
    fitting = divisors(gcd(sizes.replica * sizes.fsdp, width // sizes.context))
    return f"{told}; use fsdp {near(sizes.fsdp, fitting)}, and replica for the other devices"


def _rows(stage: Stage, sizes: Sizes, place: str) -> str:
    """Of a microbatch."""
    rows, ways = stage.microbatch_tokens // stage.length, sizes.replica * sizes.fsdp
    if rows % ways == 0:
        return ""
    fewer = near(ways, divisors(gcd(rows, ways)))
    told = (
        f"{place}.microbatch_tokens: {format_length(stage.microbatch_tokens)} is {rows} sequence"
        f"{'s' if rows > 1 else ''} of {format_length(stage.length)}, which cannot be dealt out evenly to replica "
        f"{sizes.replica} x fsdp {sizes.fsdp} devices"
    )
    mesh = f"replica x fsdp of {fewer}, with more devices along {place}.mesh.context or tensor"
    once = ways * stage.length
    if stage.batch_tokens % once == 0:
        fitting = [once * each for each in divisors(stage.batch_tokens // once)]
        return f"{told}; use {near(stage.microbatch_tokens, fitting, format_length)}, or {mesh}"
    whole = -(-stage.batch_tokens // once) * once
    return f"{told}; use {mesh}, or {format_length(once)} with {place}.batch_tokens {format_length(whole)}"


def _columns(stage: Stage, sizes: Sizes, place: str) -> str:
    """Of a sequence: each context part has two stretches of it."""
    if sizes.context == 1 or stage.length % (2 * sizes.context) == 0:
        return ""
    fitting = [parts for parts in divisors(sizes.devices) if parts == 1 or stage.length % (2 * parts) == 0]
    return (
        f"{place}.mesh.context: {sizes.context} parts of two stretches each do not divide {place}.length "
        f"{format_length(stage.length)}; use {near(sizes.context, fitting)}"
    )
