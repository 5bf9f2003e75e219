"""Rotary positions: the relative law, and the published scalings written down by another hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import quick_jit, spec_of

from xgen.model.rope import angles, frequencies, rotate
from xgen.recipe.schema import Model, RopeScaling

FLOAT32 = jnp.dtype("float32")

ROUNDED = 1e-6
"""Frequencies are of float32, as in every LLaMA; the closed forms here are not. Blends of them may lose a digit."""


def model_of(kind="none", factor=1.0, original=8192, head_size=128, theta=500_000.0, **turns) -> Model:
    scaling = RopeScaling(kind=kind, factor=factor, original_length=original, **turns)
    return spec_of(head_size=head_size, rope_theta=theta, rope_scaling=scaling).model


def plain(model: Model) -> list[float]:
    return [1 / model.rope_theta ** (2 * plane / model.head_size) for plane in range(model.head_size // 2)]


def test_unscaled_frequencies():
    model = model_of(theta=10_000.0)
    found = frequencies(model)
    np.testing.assert_allclose(found, plain(model), rtol=ROUNDED)
    assert found[0] == 1
    assert model.rope_scaling.attention_factor == 1


@pytest.mark.parametrize("factor", [2.0, 3.7])
def test_linear_scaling_is_position_interpolation(factor):
    """Chen et al. 2023: position m becomes m / factor."""
    model = model_of("linear", factor)
    np.testing.assert_allclose(frequencies(model), [one / factor for one in plain(model)], rtol=ROUNDED)
    assert model.rope_scaling.attention_factor == 1


@pytest.mark.parametrize(
    ("factor", "original", "turns"),
    [(8.0, 8192, {}), (32.0, 8192, {}), (4.0, 2048, {}), (4.0, 2048, {"low_turns": 0.5, "high_turns": 6.5})],
)
def test_llama3_scaling(factor, original, turns):
    """Llama 3.1's published code: low_freq_factor 1, high_freq_factor 4, by wavelength."""
    model, wanted = model_of("llama3", factor, original, **turns), []
    low, high = turns.get("low_turns", 1), turns.get("high_turns", 4)
    for frequency in plain(model):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            wanted.append(frequency)
        elif wavelength > original / low:
            wanted.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            wanted.append((1 - smooth) * frequency / factor + smooth * frequency)
    kept = sum(one == other for one, other in zip(wanted, plain(model), strict=True))
    assert 0 < kept < 60, "the case has planes of every kind"
    np.testing.assert_allclose(frequencies(model), wanted, rtol=ROUNDED)
    assert model.rope_scaling.attention_factor == 1


def plane_turning(turns: float, model: Model) -> float:
    """The (fractional) plane that turns `turns` times within the original length, by bisection."""
    low, high = -1000.0, 1000.0
    for _ in range(200):
        middle = (low + high) / 2
        radians = model.rope_scaling.original_length * model.rope_theta ** (-2 * middle / model.head_size)
        low, high = (middle, high) if radians / (2 * math.pi) > turns else (low, middle)
    return low


@pytest.mark.parametrize(
    ("factor", "original", "head_size", "theta", "changes"),
    [
        (4.0, 4096, 128, 10_000.0, {}),
        (16.0, 8192, 64, 500_000.0, {}),
        (2.0, 64, 16, 10_000.0, {}),
        (8.0, 100_000, 8, 100.0, {}),
        (4.0, 4096, 128, 10_000.0, {"low_turns": 2.5, "high_turns": 20.0, "attention_factor": 0.9}),
    ],
)
def test_yarn_scaling(factor, original, head_size, theta, changes):
    """Peng et al. 2023: planes of more than 32 turns are kept, those of less than one are interpolated, and between the
    whole planes around the two bounds the share grows evenly; queries and keys are sharpened by 0.1 ln(factor) + 1."""
    model = model_of("yarn", factor, original, head_size, theta, **changes)
    first = max(math.floor(plane_turning(changes.get("high_turns", 32), model)), 0)
    last = min(math.ceil(plane_turning(changes.get("low_turns", 1), model)), head_size - 1)
    wanted = []
    for plane, frequency in enumerate(plain(model)):
        share = min(max((plane - first) / (last - first), 0), 1)
        wanted.append(frequency * (1 - share) + frequency / factor * share)
    np.testing.assert_allclose(frequencies(model), wanted, rtol=ROUNDED)
    sharpening = changes.get("attention_factor", 1 + 0.1 * math.log(factor))
    cosine, sine = angles(jnp.arange(5)[None], jnp.zeros((1, 5), jnp.int32), model, FLOAT32)
    np.testing.assert_allclose(cosine**2 + sine**2, sharpening**2, rtol=1e-5)


def test_yarn_of_factor_one_changes_nothing():
    model = model_of("yarn", 1.0)
    np.testing.assert_allclose(frequencies(model), plain(model), rtol=ROUNDED)
    assert model.rope_scaling.attention_factor == 1


DYNAMIC = model_of("dynamic", 4.0, 64, head_size=16, theta=10_000.0)


def radians(lengths: list[int], model: Model = DYNAMIC) -> np.ndarray:
    """The angles, up to whole turns, in one row of documents of these lengths: [S, P]."""
    segments = np.repeat(np.arange(len(lengths)), lengths)[None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    cosine, sine = quick_jit(angles, static_argnums=(2, 3))(positions, segments, model, FLOAT32)
    return np.arctan2(sine, cosine)[0, :, 0]


@pytest.mark.parametrize(("factor", "length"), [(4.0, 65), (4.0, 100), (1.0, 256), (2.5, 300)])
def test_dynamic_scaling_grows_the_base_with_the_document(factor, length):
    """base = theta (factor n / L - (factor - 1))^(E / (E - 2)), n being the tokens and L the original length."""
    model = model_of("dynamic", factor, 64, head_size=16, theta=10_000.0)
    base = 10_000.0 * (factor * length / 64 - (factor - 1)) ** (16 / 14)
    wanted = np.arange(length)[:, None] * base ** (-np.arange(0, 16, 2) / 16)
    assert np.abs(np.exp(1j * radians([length], model)) - np.exp(1j * wanted)).max() < 1e-5 * length
    slowest = factor * length / 64 - (factor - 1)
    np.testing.assert_allclose(base ** (-14 / 16), plain(model)[-1] / slowest, rtol=ROUNDED)


def test_dynamic_scaling_changes_nothing_within_the_original_length():
    unscaled = model_of("none", head_size=16, theta=10_000.0)
    for lengths in ([64], [1], [20, 64, 3]):
        np.testing.assert_array_equal(radians(lengths), radians(lengths, unscaled))


def test_dynamic_scaling_sees_no_other_document():
    """Each has the angles it has alone, whatever stands beside it; and its own length does matter."""
    first, second, third = 30, 100, 80
    row = radians([first, second, third])
    np.testing.assert_array_equal(row[:first], radians([first]))
    np.testing.assert_array_equal(row[first : first + second], radians([second]))
    np.testing.assert_array_equal(row[first + second :], radians([third]))
    assert np.abs(radians([100])[:80] - radians([80])).max() > 0.1


def test_dynamic_scaling_sees_no_other_row():
    """And numbers of documents need not begin at 0 nor rise by one."""
    positions = jnp.stack([jnp.arange(90), jnp.where(jnp.arange(90) < 70, jnp.arange(90), jnp.arange(90) - 70)])
    segments = jnp.stack([jnp.full(90, 7), jnp.where(jnp.arange(90) < 70, 5, -2)])
    cosine, sine = angles(positions, segments, DYNAMIC, FLOAT32)
    found = np.arctan2(sine, cosine)[:, :, 0]
    np.testing.assert_array_equal(found[0], radians([90]))
    np.testing.assert_array_equal(found[1], radians([70, 20]))


# Ours and transformers' names, at parameters where every plane's treatment occurs, and away from the defaults.
FOREIGN = [
    ("linear", {"factor": 4.0}, {}),
    ("llama3", {"factor": 8.0}, {"low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    (
        "llama3",
        {"factor": 32.0, "low_turns": 0.5, "high_turns": 6.0},
        {"low_freq_factor": 0.5, "high_freq_factor": 6.0},
    ),
    ("yarn", {"factor": 4.0}, {}),
    ("yarn", {"factor": 1.0}, {}),
    ("yarn", {"factor": 16.0, "low_turns": 2.0, "high_turns": 20.0}, {"beta_slow": 2.0, "beta_fast": 20.0}),
    ("yarn", {"factor": 4.0, "low_turns": 30.0}, {"beta_slow": 30.0}),
    ("yarn", {"factor": 4.0, "attention_factor": 0.7}, {"attention_factor": 0.7}),
    ("dynamic", {"factor": 4.0}, {}),
    ("dynamic", {"factor": 1.0}, {}),
]


@pytest.mark.oracle
@pytest.mark.parametrize("original", [64, 8192])
@pytest.mark.parametrize(("head_size", "theta"), [(16, 10_000.0), (128, 500_000.0), (64, 1_000_000.0)])
@pytest.mark.parametrize(("kind", "ours", "theirs"), FOREIGN)
def test_transformers_has_the_same_frequencies(kind, ours, theirs, head_size, theta, original):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = model_of(kind, original=original, head_size=head_size, theta=theta, **ours)
    rope = {"rope_type": kind, "rope_theta": theta, "factor": ours["factor"], **theirs}
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = original
    config = LlamaConfig(head_dim=head_size, max_position_embeddings=original, rope_parameters=rope)
    for length in (1, original, original + 1, 3 * original):
        wanted, sharpening = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
        assert model.rope_scaling.attention_factor == pytest.approx(sharpening)
        found = frequencies(model)
        if kind == "dynamic":
            place = jnp.arange(length)[None]
            found = np.arctan2(*angles(place, jnp.zeros_like(place), model, FLOAT32)[::-1])[0, min(1, length - 1), 0]
            wanted = wanted * (length > 1)
        np.testing.assert_allclose(found, wanted.numpy(), rtol=2e-6)


@pytest.mark.oracle
@pytest.mark.parametrize("theta", [10_000.0, 100_000.0, 500_000.0, 1_000_000.0])
def test_plain_frequencies_are_rounded_as_in_torch(theta):
    """A unit in the last place of one is an angle of 5e-4 at position 8,000: the bits count."""
    import torch

    exponents = torch.arange(0, 64, 2, dtype=torch.int64).float() / 64
    found = frequencies(model_of("none", 1.0, 64, head_size=64, theta=theta)).astype(np.float32)
    np.testing.assert_array_equal(found, (1.0 / (theta**exponents)).numpy())


def turned(x, positions, model):
    return rotate(x, *angles(positions, jnp.zeros_like(positions), model, FLOAT32))


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
    cosine, _ = angles(jnp.full((1, 1), 8191), jnp.zeros((1, 1), jnp.int32), model, FLOAT32)
    wanted = np.cos(8191 * np.asarray(plain(model)))
    assert np.abs(np.asarray(cosine)[0, 0, 0] - wanted).max() < 8192 * 2.0**-24 * 1.5


def test_bfloat16_is_turned_in_float32():
    model = model_of(head_size=8)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 8)), jnp.bfloat16)
    at = jnp.arange(3)[None] + 5000
    wide = turned(x.astype(jnp.float32), at, model)
    assert turned(x, at, model).dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned(x, at, model), wide.astype(jnp.bfloat16))
    assert jax.eval_shape(lambda: angles(at, at, model, FLOAT32))[0].shape == (1, 3, 1, 4)
