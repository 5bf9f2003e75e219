"""The optimizer as one optax chain, without the learning rate: the clock supplies that to every step."""

from __future__ import annotations

import optax
from optax import contrib

from xgen.model.weights import Weight, Weights, decayed, map_rows
from xgen.recipe.schema import Optimizer


def build(optimizer: Optimizer) -> optax.GradientTransformation:
    """Clip by global norm, precondition, add decoupled weight decay (matrices only). The caller multiplies the
    result by minus the learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip),
        _muon(optimizer) if optimizer.name == "muon" else _adam(optimizer),
        optax.add_decayed_weights(optimizer.weight_decay, mask=decayed),
    )


def _adam(optimizer: Optimizer) -> optax.GradientTransformation:
    return optax.scale_by_adam(*optimizer.betas, eps=optimizer.epsilon)


def _muon(optimizer: Optimizer) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the layers' matrices, Adam for the rest, both with Nesterov's momentum.

    `consistent_rms` 0.2 gives Muon's updates the root mean square of Adam's (Liu et al. 2025), so that one rate and
    one decay serve both.
    """
    descent = contrib.muon(
        learning_rate=1.0,
        eps=optimizer.epsilon,
        adam_b1=optimizer.betas[0],
        adam_b2=optimizer.betas[1],
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_sides,
    )
    return optax.chain(descent, optax.scale(-1.0))


def _sides(weights: Weights) -> Weights:
    """Which axes of each of the layers' matrices are inputs and which outputs; None: Adam's."""

    def of(row: Weight) -> contrib.MuonDimensionNumbers | None:
        if not row.stacked_matrix:
            return None
        first_output = 2 if row.axes[1] == "embed" else len(row.axes) - 1
        axes = range(len(row.axes))
        return contrib.MuonDimensionNumbers(tuple(axes[1:first_output]), tuple(axes[first_output:]))

    return map_rows(weights, of)
