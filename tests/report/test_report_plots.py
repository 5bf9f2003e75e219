"""A drawing shows its data where the axes say, and is well-formed."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xgen.report.plots import (
    NARROW,
    SMALL,
    WIDE,
    Axis,
    Hit,
    Interval,
    Plot,
    Rule,
    Series,
    draw,
    draw_intervals,
    spread,
)

SVG = "{http://www.w3.org/2000/svg}"


def plot(
    *series: Series, bounds: tuple[float, float] | None = None, rules: tuple[Rule, ...] = (), hits: tuple[Hit, ...] = ()
) -> Plot:
    axis = Axis("y", lambda value: f"{value:g}", bounds=bounds)
    return Plot("p", "Title", "Description", Axis("x", lambda value: f"{value:g}"), axis, series, rules, hits)


def line(ys: list[float], **more: object) -> Series:
    return Series("name", "t0", np.arange(float(len(ys))), np.asarray(ys), **more)


def drawn(what: Plot, size=WIDE) -> ET.Element:
    return ET.fromstring(draw(what, size))


def classed(root: ET.Element, word: str) -> list[ET.Element]:
    return [element for element in root.iter() if word in element.get("class", "").split()]


def points(element: ET.Element) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in element.get("points", "").split()]


def tick_places(root: ET.Element, anchor: str) -> dict[float, float]:
    """Value of each y tick (anchor "end") to its px, read off the drawing as an eye would."""
    texts = [
        element
        for element in root.iter(f"{SVG}text")
        if element.get("text-anchor") == anchor and element.get("class") is None
    ]
    return {float(text.text): float(text.get("y")) - 4 for text in texts}


@pytest.mark.parametrize("size", [WIDE, NARROW, SMALL])
def test_points_lie_where_the_ticks_say(size):
    ys = [2.0, 3.5, 2.25, 4.0]
    root = drawn(plot(line(ys)), size)
    ticks = tick_places(root, "end")
    low, high = min(ticks), max(ticks)
    for (_, y), value in zip(points(classed(root, "line")[0]), ys, strict=True):
        expected = ticks[low] + (value - low) / (high - low) * (ticks[high] - ticks[low])
        assert y == pytest.approx(expected, abs=0.11)


def test_a_value_that_is_no_number_leaves_a_gap():
    root = drawn(plot(line([1.0, 2.0, math.nan, 4.0, 5.0])))
    assert [len(points(element)) for element in classed(root, "line")] == [2, 2]


def test_past_the_trained_length_the_line_is_dashed_and_the_marks_are_hollow():
    root = drawn(plot(line([1.0, 2.0, 3.0, 4.0], marker="circle", solid_until=1.0)))
    solid, dashed = classed(root, "line")
    assert "past" not in solid.get("class").split()
    assert "past" in dashed.get("class").split()
    assert points(solid)[-1] == points(dashed)[0]
    assert ["past" in mark.get("class").split() for mark in classed(root, "mark")] == [False, False, True, True]


def test_a_band_encloses_its_line():
    y = np.array([3.0, 2.0, 2.5])
    root = drawn(plot(line(y.tolist(), low=y - 0.5, high=y + 0.25)))
    polygon = points(classed(root, "band")[0])
    inside = points(classed(root, "line")[0])
    for (x, y_px), (upper_x, upper), (lower_x, lower) in zip(inside, polygon[:3], polygon[:2:-1], strict=True):
        assert x == upper_x == lower_x
        assert upper < y_px < lower


def test_a_point_above_the_frame_is_written_out():
    root = drawn(plot(line([1.0, 1.5, 9.0], marker="circle"), bounds=(1.0, 2.0)))
    assert [element.text for element in classed(root, "above")] == ["↑ 9.00"]
    assert len(classed(root, "mark")) == 2


@pytest.mark.parametrize("ys", [[], [math.nan, math.nan], [2.0]])
def test_little_or_no_data_still_gives_a_drawing(ys):
    assert drawn(plot(line(ys, label="l", marker="square"))).tag == f"{SVG}svg"


def test_texts_are_escaped_and_cut_where_there_is_no_room():
    evil = '"><script>&' + "x" * 200
    what = Plot(
        "p",
        evil,
        evil,
        Axis("x", str),
        Axis("y", str),
        (line([1.0, 2.0], label=evil),),
        (Rule(0.0, evil, "t0"),),
        (Hit(0.0, evil),),
    )
    root = drawn(what, NARROW)
    assert root.find(f"{SVG}title").text == evil
    assert not list(root.iter("script"))
    for element in root.iter(f"{SVG}text"):
        said = "".join(child.tail or "" for child in element) + (element.text or "")
        assert len(said) < 80


def test_a_rule_says_its_short_name_where_the_long_one_has_no_room():
    rules = (
        Rule(0.0, "2k · length 2,048", "t0", "2k", until=3.0),
        Rule(2.9, "4k · length 4,096", "t1", "4k", until=3.0),
    )
    root = drawn(plot(line([1.0, 2.0, 3.0, 4.0]), rules=rules))
    said = [element.find(f"{SVG}title").tail for element in classed(root, "name")]
    assert said == ["2k · length 2,048", "4k"]


def test_every_strip_that_answers_the_pointer_has_a_width_and_they_fill_the_frame():
    hits = tuple(Hit(float(x), f"at {x}") for x in range(500))
    root = drawn(plot(line(list(range(500))), hits=hits))
    strips = [group.find(f"{SVG}rect") for group in classed(root, "hit")]
    assert 50 < len(strips) <= 90
    edges = [(float(strip.get("x")), float(strip.get("x")) + float(strip.get("width"))) for strip in strips]
    for (_, end), (start, _) in pairwise(edges):
        assert start == pytest.approx(end, abs=0.15)
    base = classed(root, "base")[0]
    assert edges[0][0] == pytest.approx(float(base.get("x1")), abs=0.1)
    assert edges[-1][1] == pytest.approx(float(base.get("x2")), abs=0.2)


@settings(deadline=None)  # a busy machine is no fault of the code
@given(st.lists(st.floats(-50, 350), max_size=12), st.floats(1, 40))
def test_labels_are_moved_apart_in_their_order_and_stay_inside(wanted, gap):
    placed = spread(wanted, gap, 0.0, 300.0)
    assert len(placed) == len(wanted)
    apart = min(gap, 300.0 / max(1, len(wanted) - 1))
    for (_, one), (_, other) in pairwise(sorted(zip(wanted, placed, strict=True))):
        assert other - one >= apart - 1e-6
    assert all(-1e-6 <= y <= 300 + 1e-6 for y in placed)


def test_labels_that_do_not_collide_stay_where_they_are():
    assert spread([10.0, 200.0, 100.0], 14.0, 0.0, 300.0) == [10.0, 200.0, 100.0]


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_an_interval_lies_on_its_side_of_zero(size):
    rows = [
        Interval("a", -0.05, -0.07, -0.03, "gain"),
        Interval("b", 0.02, 0.01, 0.03, "worse"),
        Interval("c", 0.0, -0.01, 0.01, "?"),
        Interval("d", math.nan, math.nan, math.nan, "unknown"),
    ]
    root = ET.fromstring(draw_intervals("g", "Title", "x", rows, "t1", size))
    zero = float(classed(root, "zero")[0].get("x1"))
    ends = [(float(w.get("x1")), float(w.get("x2"))) for w in classed(root, "whisker")]
    assert len(ends) == 3
    assert ends[0][0] < ends[0][1] < zero < ends[1][0] < ends[1][1]
    assert ends[2][0] < zero < ends[2][1]
