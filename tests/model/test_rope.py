"""Rotary positions: the relative law, and the published scalings written down by another hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import spec_of

from xgen.model.rope import angles, attention_factor, frequencies, rotate
from xgen.recipe.schema import Model, RopeScaling


def model_of(kind="none", factor=1.0, original=8192, head_size=128, theta=500_000.0) -> Model:
    scaling = RopeScaling(kind=kind, factor=factor, original_length=original)
    return spec_of(head_size=head_size, rope_theta=theta, rope_scaling=scaling).model


def plain(model: Model) -> list[float]:
    return [1 / model.rope_theta ** (2 * plane / model.head_size) for plane in range(model.head_size // 2)]


def test_unscaled_frequencies():
    model = model_of(theta=10_000.0)
    found = frequencies(model)
    np.testing.assert_allclose(found, plain(model), rtol=1e-14)
    assert found[0] == 1
    assert attention_factor(model) == 1


@pytest.mark.parametrize("factor", [2.0, 3.7])
def test_linear_scaling_is_position_interpolation(factor):
    """Chen et al. 2023: position m becomes m / factor."""
    model = model_of("linear", factor)
    np.testing.assert_allclose(frequencies(model), [one / factor for one in plain(model)], rtol=1e-14)
    assert attention_factor(model) == 1


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (4.0, 2048)])
def test_llama3_scaling(factor, original):
    """Llama 3.1's published code: low_freq_factor 1, high_freq_factor 4, by wavelength."""
    model, wanted = model_of("llama3", factor, original), []
    for frequency in plain(model):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / 4:
            wanted.append(frequency)
        elif wavelength > original / 1:
            wanted.append(frequency / factor)
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            wanted.append((1 - smooth) * frequency / factor + smooth * frequency)
    kept = sum(one == other for one, other in zip(wanted, plain(model), strict=True))
    assert 0 < kept < 60, "the case has planes of every kind"
    np.testing.assert_allclose(frequencies(model), wanted, rtol=1e-12)
    assert attention_factor(model) == 1


def plane_turning(turns: float, model: Model) -> float:
    """The (fractional) plane that turns `turns` times within the original length, by bisection."""
    low, high = -1000.0, 1000.0
    for _ in range(200):
        middle = (low + high) / 2
        radians = model.rope_scaling.original_length * model.rope_theta ** (-2 * middle / model.head_size)
        low, high = (middle, high) if radians / (2 * math.pi) > turns else (low, middle)
    return low


@pytest.mark.parametrize(
    ("factor", "original", "head_size", "theta"),
    [(4.0, 4096, 128, 10_000.0), (16.0, 8192, 64, 500_000.0), (2.0, 64, 16, 10_000.0), (8.0, 100_000, 8, 100.0)],
)
def test_yarn_scaling(factor, original, head_size, theta):
    """Peng et al. 2023: planes of more than 32 turns are kept, those of less than one are interpolated, and between the
    whole planes around the two bounds the share grows evenly; queries and keys are sharpened by 0.1 ln(factor) + 1."""
    model = model_of("yarn", factor, original, head_size, theta)
    first = max(math.floor(plane_turning(32, model)), 0)
    last = min(math.ceil(plane_turning(1, model)), head_size - 1)
    wanted = []
    for plane, frequency in enumerate(plain(model)):
        share = min(max((plane - first) / (last - first), 0), 1)
        wanted.append(frequency * (1 - share) + frequency / factor * share)
    np.testing.assert_allclose(frequencies(model), wanted, rtol=1e-12)
    assert attention_factor(model) == pytest.approx(1 + 0.1 * math.log(factor))
    cosine, sine = angles(jnp.arange(5)[None], model, jnp.dtype("float32"))
    np.testing.assert_allclose(cosine**2 + sine**2, attention_factor(model) ** 2, rtol=1e-5)


def test_yarn_of_factor_one_changes_nothing():
    model = model_of("yarn", 1.0)
    np.testing.assert_allclose(frequencies(model), plain(model), rtol=1e-14)
    assert attention_factor(model) == 1


def turned(x, positions, model):
    return rotate(x, *angles(positions, model, jnp.dtype("float32")))


@pytest.mark.parametrize("kind", ["none", "linear", "llama3", "yarn"])
def test_a_score_depends_on_the_distance_only(kind):
    model = model_of(kind, 4.0 if kind != "none" else 1.0, 64, head_size=16, theta=10_000.0)
    q, k = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 1, 1, 16)), jnp.float32)
    scores = {}
    for distance in (0, 3, 50):
        for start in (0, 17, 400):
            there, here = (jnp.full((1, 1), place) for place in (start + distance, start))
            scores[distance, start] = float(jnp.vdot(turned(q, there, model), turned(k, here, model)))
    for (distance, _), score in scores.items():
        assert score == pytest.approx(scores[distance, 0], abs=2e-4)
    assert abs(scores[0, 0] - scores[3, 0]) > 1e-2


def test_planes_are_halves_not_neighbours():
    """Plane 0 is (x_0, x_{E/2}) and turns one radian a position."""
    model = model_of(head_size=8)
    x = jnp.zeros((1, 1, 1, 8)).at[..., 0].set(1.0)
    found = np.asarray(turned(x, jnp.full((1, 1), 2), model))[0, 0, 0]
    np.testing.assert_allclose(found, [math.cos(2), 0, 0, 0, math.sin(2), 0, 0, 0], atol=1e-7)


def test_turns_are_exact_far_out():
    """In float32, at the last of 8,192 positions, to the rounding of the angle itself."""
    model = model_of(head_size=8, theta=10_000.0)
    cosine, _ = angles(jnp.full((1, 1), 8191), model, jnp.dtype("float32"))
    wanted = np.cos(8191 * np.asarray(plain(model)))
    assert np.abs(np.asarray(cosine)[0, 0, 0] - wanted).max() < 8192 * 2.0**-24 * 1.5


def test_bfloat16_is_turned_in_float32():
    model = model_of(head_size=8)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 8)), jnp.bfloat16)
    at = jnp.arange(3)[None] + 5000
    wide = turned(x.astype(jnp.float32), at, model)
    assert turned(x, at, model).dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned(x, at, model), wide.astype(jnp.bfloat16))
    assert jax.eval_shape(lambda: angles(at, model, jnp.dtype("float32")))[0].shape == (1, 3, 1, 4)
