"""The optimizers against their papers' formulas in numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import relative_error, spec_of, weights_of

from xgen.model import as_dict, from_dict
from xgen.model.weights import WEIGHTS
from xgen.recipe.schema import Optimizer
from xgen.training.optimizer import build

MATRICES = {row.name for row in WEIGHTS if row.init in ("embedding", "input", "output")}


def choices(**changes) -> Optimizer:
    return Optimizer(**{"learning_rate": 1e-2, "warmup": 0, **changes})


def gradients_of(spec, count, scale=1.0):
    """Random gradients of global norms 0.3, 3, 0.3, 3, ... x scale: clipped to 1, every second one is."""
    for step in range(count):
        drawn = as_dict(weights_of(spec, seed=100 + step))
        norm = np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in drawn.values()))
        factor = (3.0 if step % 2 else 0.3) * scale / norm
        yield from_dict({name: x * factor for name, x in drawn.items()}, spec)


def run(optimizer, weights, gradients, rate):
    """Weights after plain steps with the transformation, as the step takes them."""
    transformation = build(optimizer)
    state, update = transformation.init(weights), jax.jit(transformation.update)
    for gradient in gradients:
        direction, state = update(gradient, state, weights)
        weights = jax.tree.map(lambda w, d: w - rate * d, weights, direction)
    return weights


def adamw(optimizer, weights, gradients, rate):
    """Loshchilov and Hutter 2019, clipped by global norm (Pascanu et al. 2013); decay on matrices."""
    arrays = {name: np.asarray(x, np.float64) for name, x in as_dict(weights).items()}
    first, second = ({name: np.zeros_like(x) for name, x in arrays.items()} for _ in range(2))
    one, two = optimizer.betas
    for step, tree in enumerate(gradients, 1):
        given = {name: np.asarray(x, np.float64) for name, x in as_dict(tree).items()}
        norm = np.sqrt(sum((x**2).sum() for x in given.values()))
        for name, x in given.items():
            gradient = x * min(1, optimizer.clip / norm)
            first[name] = one * first[name] + (1 - one) * gradient
            second[name] = two * second[name] + (1 - two) * gradient**2
            slope = first[name] / (1 - one**step)
            direction = slope / (np.sqrt(second[name] / (1 - two**step)) + optimizer.epsilon)
            decay = optimizer.weight_decay if name in MATRICES else 0
            arrays[name] = arrays[name] - rate * (direction + decay * arrays[name])
    return arrays


@pytest.mark.parametrize("variant", ["xgen", "jaxformer"])
def test_adamw_is_the_papers_over_five_steps(variant):
    """The change of each weight, to 1e-5: what float32 keeps of it beside the weight."""
    spec, rate = spec_of(variant), 1e-2
    optimizer, weights = choices(weight_decay=0.3, betas=(0.8, 0.95)), weights_of(spec)
    gradients = list(gradients_of(spec, 5))
    found, wanted = as_dict(run(optimizer, weights, gradients, rate)), adamw(optimizer, weights, gradients, rate)
    for name, before in as_dict(weights).items():
        before = np.asarray(before, np.float64)
        assert relative_error(np.asarray(found[name], np.float64) - before, wanted[name] - before) < 1e-5, name


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("variant", ["xgen", "jaxformer"])
def test_without_a_gradient_matrices_decay_and_nothing_else_moves(name, variant):
    spec = spec_of(variant)
    optimizer, weights = choices(name=name, weight_decay=0.25), weights_of(spec)
    transformation = build(optimizer)
    zeros = jax.tree.map(jnp.zeros_like, weights)
    direction = as_dict(jax.jit(transformation.update)(zeros, transformation.init(weights), weights)[0])
    for row, array in as_dict(weights).items():
        wanted = 0.25 * np.asarray(array) if row in MATRICES else np.zeros(array.shape)
        np.testing.assert_allclose(direction[row], wanted, atol=1e-6, err_msg=row)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_gradients_are_clipped_by_their_global_norm(name):
    """After a clipped step the moments are those of the gradient scaled to norm `clip`, whatever its length was."""
    spec = spec_of()
    weights = weights_of(spec)
    transformation = build(choices(name=name, clip=0.5))
    (given,) = gradients_of(spec, 1, scale=1 / 0.3)
    seen, update = [], jax.jit(transformation.update)
    for scale in (0.25, 0.5, 1.0, 8.0):
        scaled = jax.tree.map(lambda x, s=scale: x * s, given)
        seen.append(jax.tree.leaves(update(scaled, transformation.init(weights), weights)[1]))
    for quarter, half, one, eight in zip(*seen, strict=True):
        np.testing.assert_allclose(one, half, rtol=1e-5)
        np.testing.assert_allclose(eight, half, rtol=1e-5)
        if np.ndim(half) > 1:
            assert not np.allclose(quarter, half, rtol=0.1, atol=0)


def as_matrix(name, layer):
    """[inputs, outputs] of one layer."""
    inputs = layer.shape[:-1] if name == "block.output" else layer.shape[:1]
    return np.asarray(layer, np.float64).reshape(int(np.prod(inputs)), -1)


@pytest.mark.parametrize("variant", ["xgen", "parallel"])
def test_muon_orthogonalises_every_layers_matrix_on_its_own(variant):
    """Its singular values are nearly equal, its singular vectors the momentum's, and its root mean square is 0.2, near
    what Adam's updates have (Liu et al. 2025)."""
    spec = spec_of(variant)
    weights = weights_of(spec)
    transformation = build(choices(name="muon", weight_decay=0.0))
    (given,) = gradients_of(spec, 1)
    # One layer's gradient a thousand times the other's: only an update of each on its own treats them alike.
    given = jax.tree.map(lambda x: x.at[0].mul(1e-3) if x.shape[0] == spec.model.layers else x, given)
    direction = as_dict(jax.jit(transformation.update)(given, transformation.init(weights), weights)[0])
    matrices = sorted(name for name in as_dict(weights).keys() & MATRICES if name.startswith("block."))
    assert len(matrices) == 7
    for name in matrices:
        for layer, gradient in zip(direction[name], as_dict(given)[name], strict=True):
            found, slope = as_matrix(name, layer), as_matrix(name, gradient)
            left, _, right = np.linalg.svd(slope, full_matrices=False)
            values = np.linalg.svd(found, compute_uv=False) / (0.2 * np.sqrt(max(found.shape)))
            # Five iterations lift all but the very smallest.
            assert np.quantile(values, 0.1) > 0.6, name
            assert values.max() < 1.3, name
            assert np.sum(found * (left @ right)) / np.linalg.norm(found) / np.linalg.norm(left @ right) > 0.95
            assert np.sqrt(np.mean(found**2)) == pytest.approx(0.2, rel=0.2), name


def test_muon_leaves_tables_and_vectors_to_adam():
    """Adam with Nesterov's momentum: after one step Adam's direction, elsewhere longer by one and the same factor."""
    spec = spec_of("layer_norm")
    weights = weights_of(spec)
    (given,) = gradients_of(spec, 1)
    found = []
    for name in ("muon", "adamw"):
        transformation = build(choices(name=name, weight_decay=0.0))
        update = jax.jit(transformation.update)
        found.append(as_dict(update(given, transformation.init(weights), weights)[0]))
    for row, direction in found[0].items():
        ratio = np.asarray(direction / found[1][row])
        of_adam = np.allclose(ratio, NESTEROV, rtol=1e-3)
        assert of_adam == (row not in MATRICES or row in ("embedding", "head")), row


# Dozat 2016 at the first step: 0.9 m / (1 - 0.9^2) + 0.1 g / (1 - 0.9), where m = 0.1 g, against Adam's g.
NESTEROV = 0.9 * 0.1 / (1 - 0.9**2) + 0.1 / (1 - 0.9)
