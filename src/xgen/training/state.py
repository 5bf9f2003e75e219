"""What a step changes, and where it lies on the mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import jax
import optax

from xgen.model import Spec, Weights, abstract, initialise
from xgen.parallel.program import Layout, weight_shardings
from xgen.parallel.rules import state_shardings


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Float32 master weights and the optimizer's state."""

    weights: Weights
    optimizer: optax.OptState


def abstract_state(spec: Spec, transformation: optax.GradientTransformation, layout: Layout) -> State:
    """Shapes and types, on a mesh with where each lies, and no arrays."""
    weights = abstract(spec)
    state = State(weights, jax.eval_shape(transformation.init, weights))
    if layout.single:
        return state

    def placed(leaf: jax.ShapeDtypeStruct, place: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return cast("State", jax.tree.map(placed, state, state_shardings(state, spec, layout.mesh)))


def new_weights(spec: Spec, seed: int, layout: Layout) -> Weights:
    """Freshly drawn; on a mesh each device draws its own part, and no more."""
    if layout.single:
        return initialise(spec, seed)
    weights: Weights = jax.jit(lambda: initialise(spec, seed), out_shardings=weight_shardings(spec, layout))()
    return weights


def new_state(weights: Weights, spec: Spec, transformation: optax.GradientTransformation, layout: Layout) -> State:
    """The weights with an empty optimizer state."""
    if layout.single:
        return State(weights, transformation.init(weights))
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(spec, transformation, layout).optimizer)
    return State(weights, jax.jit(transformation.init, out_shardings=places)(weights))


def move(state: State, spec: Spec, layout: Layout) -> State:
    """The same values where a stage on another mesh wants them."""
    if layout.single:
        return cast("State", jax.device_put(state, layout.mesh.devices.item()))
    return cast("State", jax.device_put(state, state_shardings(state, spec, layout.mesh)))
