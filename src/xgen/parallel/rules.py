"""Who holds which part of what: one table from the axes of the weights to those of the mesh."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec

from xgen.errors import RecipeError
from xgen.model import Spec
from xgen.model.weights import Axis, Weight, Weights, abstract, map_rows
from xgen.parallel.mesh import LINE, Sizes
from xgen.recipe.schema import Model, Stage

RULES: dict[Axis, tuple[str, ...]] = {
    "layer": (),
    "embed": ("fsdp", LINE, "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
"""Mesh axes over which an axis of the weights is stored. Vectors along "embed" (norms, and biases of what is added to
the stream) are too small to be worth a gather: every device has them whole."""

TOKENS = PartitionSpec(("replica", "fsdp", LINE), "context")
"""A batch [N, S]: sequences over the data axes, columns (in zigzag order) over context."""


def partition(row: Weight) -> PartitionSpec:
    """Of one weight. Axes that the mesh has only once are harmless."""
    return PartitionSpec(*(RULES[axis] if axis != "embed" or row.decay else () for axis in row.axes))


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
    shards, rows = sizes.fsdp * sizes.context, stage.microbatch_tokens // stage.length
    ways = sizes.replica * sizes.fsdp
    checks = [
        ("tensor", sizes.tensor, "model.heads", model.heads),
        ("tensor", sizes.tensor, "model.kv_heads", model.kv_heads),
        ("tensor", sizes.tensor, "model.mlp_size", model.mlp_size),
        ("tensor", sizes.tensor, "model.vocab_size", model.vocab_size),
        ("fsdp x context", shards, "model.hidden_size", model.hidden_size),
        ("replica x fsdp", ways, f"the {rows} sequences of {place}.microbatch_tokens", rows),
        ("2 x context", 2 * sizes.context if sizes.context > 1 else 1, f"{place}.length", stage.length),
    ]
    for axes, parts, what, size in checks:
        if size % parts:
            fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0 and n <= 4 * parts)
            raise RecipeError(
                f"{place}: the mesh's {axes} {parts} does not divide {what}"
                f"{'' if what.startswith('the ') else f' ({size})'}; {axes} could be {fitting}"
            )
