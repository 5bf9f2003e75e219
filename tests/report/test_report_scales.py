"""Scales put round numbers where they belong; thinning hides no value."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xgen.report.scales import log_scale, nice_scale, thin


@settings(deadline=None)  # a busy machine is no fault of the code
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(1, 50))
def test_every_value_lies_in_the_band_of_its_group(values, points):
    y = np.asarray(values)
    x = np.arange(1.0, len(y) + 1)
    thinned = thin(x, y, points)
    assert len(thinned.x) <= points
    for i, end in enumerate(thinned.x):
        group = y[int(end) - (int(end) - 1) % thinned.per_point - 1 : int(end)]
        assert thinned.low[i] == group.min()
        assert thinned.high[i] == group.max()
        assert thinned.mean[i] == pytest.approx(group.mean(), abs=1e-6)
    assert thinned.low.min() == y.min()
    assert thinned.high.max() == y.max()


def test_a_spike_of_one_step_among_hundreds_of_thousands_is_kept():
    y = np.full(375_000, 2.0)
    y[123_456] = 9.0
    thinned = thin(np.arange(375_000.0), y, 160)
    assert thinned.high.max() == 9.0
    assert np.flatnonzero(thinned.high == 9.0).tolist() == [123_456 // thinned.per_point]


def test_values_that_are_no_numbers_are_left_out_and_a_group_of_them_is_a_gap():
    thinned = thin(np.arange(6.0), np.array([1.0, np.nan, np.inf, np.nan, 5.0, 7.0]), 3)
    assert thinned.mean.tolist()[0] == 1.0
    assert math.isnan(thinned.mean[1])
    assert math.isnan(thinned.low[1])
    assert thinned.mean.tolist()[2] == 6.0


@settings(deadline=None)  # a busy machine is no fault of the code
@given(st.floats(-1e5, 1e5), st.floats(1e-3, 1e9), st.integers(2, 8), st.booleans())
def test_ticks_are_round_evenly_spaced_and_within_the_scale(low, width, about, exact):
    high = low + width
    if not high > low:
        return
    scale = nice_scale(low, high, 0.0, 100.0, about, exact=exact)
    assert scale.low <= low + 1e-8 * width + 1e-9 * abs(low)
    assert scale.high >= high - 1e-8 * width - 1e-9 * abs(high)
    steps = np.diff(scale.ticks)
    assert len(scale.ticks) <= about + 3
    if len(steps):
        assert np.allclose(steps, steps[0], rtol=1e-6)
        mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
        assert min(abs(mantissa - round_) for round_ in (1, 2, 2.5, 5, 10)) < 1e-3
    for tick in scale.ticks:
        assert -1e-6 <= scale(tick) <= 100 + 1e-6


def test_a_linear_scale_maps_its_ends_and_its_middle():
    scale = nice_scale(0.0, 10.0, 300.0, 20.0, 5)
    assert (scale(0.0), scale(5.0), scale(10.0)) == (300.0, 160.0, 20.0)


def test_a_logarithmic_scale_spaces_powers_of_two_evenly():
    scale = log_scale(1, 256, 0, 80, 12)
    assert scale.ticks == (1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert [scale(tick) for tick in scale.ticks] == pytest.approx([10 * i for i in range(9)])
    assert log_scale(1, 8192, 0, 80, 7).ticks == (1, 4, 16, 64, 256, 1024, 4096)


@pytest.mark.parametrize("make", [nice_scale, log_scale])
@pytest.mark.parametrize("high", [3.0, math.nextafter(3.0, 4.0)])
def test_a_single_value_has_a_scale_too(make, high):
    scale = make(3.0, high, 0.0, 100.0, 5)
    assert 0 < scale(3.0) < 100
