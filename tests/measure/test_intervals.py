"""The intervals cover the truth as often as they say."""

from statistics import NormalDist

import numpy as np
import pytest

from xgen.measure import difference_interval, mean_interval
from xgen.measure.intervals import _tail

EXPERIMENTS = 1500


def experiments(documents: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, float]:
    """Losses before and after, tokens: each [documents, EXPERIMENTS]; the true mean and difference.

    Documents have 50 to 400 tokens and a difficulty of their own (gamma, so skewed) that rises with
    their length, which makes the ratio's truth E[tokens x loss] / E[tokens] differ from E[loss].
    """
    generator = np.random.default_rng(seed)
    tokens = generator.integers(50, 401, (documents, EXPERIMENTS)).astype(float)
    hardness = generator.gamma(16, 0.15, tokens.shape) + tokens / 1000
    before = tokens * hardness + np.sqrt(tokens) * generator.normal(0, 1.5, tokens.shape)
    effect = generator.normal(-0.02, 0.05, tokens.shape)
    after = before + tokens * effect
    sizes = np.arange(50, 401)
    return before, after, tokens, 16 * 0.15 + float((sizes**2).mean() / sizes.mean()) / 1000, -0.02


def covered(intervals, truth: float) -> float:
    return float(np.mean([one.low <= truth <= one.high for one in intervals]))


@pytest.mark.parametrize("documents", [10, 24, 48])
def test_coverage_of_means_and_paired_differences(documents):
    before, after, tokens, mean, difference = experiments(documents, seed=documents)
    assert 0.93 <= covered(mean_interval(before, tokens, resamples=2000), mean) <= 0.97
    assert 0.93 <= covered(difference_interval(before, after, tokens, resamples=2000), difference) <= 0.97


def test_the_check_of_coverage_can_fail():
    before, _, tokens, mean, _ = experiments(24, seed=1)
    narrow = mean_interval(before, tokens, resamples=2000)
    halved = [(one.value + one.low) / 2 <= mean <= (one.value + one.high) / 2 for one in narrow]
    assert np.mean(halved) < 0.8


def test_per_document_means_have_their_own_truth():
    before, _, tokens, mean, _ = experiments(48, seed=2)
    truth = 16 * 0.15 + 225 / 1000
    found = mean_interval(before, tokens, per="document", resamples=2000)
    assert 0.93 <= covered(found, truth) <= 0.97
    assert covered(found, mean) < covered(found, truth)
    assert found[0].value == pytest.approx((before / tokens)[:, 0].mean())


def test_paired_intervals_are_far_narrower_than_unpaired_ones():
    before, after, tokens, _, _ = experiments(24, seed=3)
    width = lambda found: np.array([one.high - one.low for one in found])  # noqa: E731
    paired = width(difference_interval(before, after, tokens, resamples=1000))
    alone = [width(mean_interval(losses, tokens, resamples=1000)) for losses in (before, after)]
    assert (paired < 0.3 * np.hypot(*alone)).mean() > 0.99


def test_intervals_are_the_same_for_the_same_seed_and_move_with_it():
    before, _, tokens, _, _ = experiments(24, seed=4)
    one, again, other = (mean_interval(before[:, :3], tokens[:, :3], seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert all(a.value == b.value and a.low != b.low for a, b in zip(one, other, strict=True))


def test_chunks_change_nothing(monkeypatch):
    before, _, tokens, _, _ = experiments(24, seed=5)
    whole = mean_interval(before[:, :2], tokens[:, :2], resamples=999)
    monkeypatch.setattr("xgen.measure.intervals.CHUNK", 24 * 100)
    chunked = mean_interval(before[:, :2], tokens[:, :2], resamples=999)
    bounds = [[bound for one in found for bound in (one.low, one.high)] for found in (whole, chunked)]
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-12)


def test_one_document_gives_a_figure_without_bounds():
    (one,) = mean_interval(np.array([[6.0], [0.0]]), np.array([[3.0], [0.0]]))
    assert (one.value, one.low, one.high, one.documents) == (2.0, None, None, 1)


def test_equal_documents_give_an_interval_of_no_width():
    (one,) = mean_interval(np.full((9, 1), 6.0), np.full((9, 1), 3.0))
    assert (one.value, one.low, one.high) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(("documents", "student"), [(8, 2.364624), (11, 2.228139), (25, 2.063899), (101, 1.983972)])
def test_the_tail_follows_students_table(documents, student):
    expected = NormalDist().cdf(-student * (documents / (documents - 1)) ** 0.5)
    assert _tail(documents) == pytest.approx(expected, rel=0.01)
