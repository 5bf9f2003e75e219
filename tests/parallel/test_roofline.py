"""Seconds by closed form, on programs' work that is written down here."""

import math

import pytest

from xgen.errors import RecipeError
from xgen.parallel.hlo import Collective, Work
from xgen.parallel.roofline import Rates, roofline
from xgen.parallel.slices import parse_slice
from xgen.parallel.topology import Place

V4 = parse_slice("v4:4x4x4")  # 50 GB/s a link, each axis a ring of four
LINE = tuple(range(4))  # the last axis, in the slice's own order
ALL = tuple(range(64))
BYTES = 10**9


def exchange(kind: str, *groups: tuple[int, ...], between: bool = False) -> Work:
    return Work({}, 0, (Collective(kind, groups, between, 1, BYTES),), {}, ())


@pytest.mark.parametrize(
    ("kind", "group", "shares"),
    [
        ("all-gather", LINE, 3 / 4 / 2),  # two directions
        ("reduce-scatter", LINE, 3 / 4 / 2),
        ("all-reduce", LINE, 2 * 3 / 4 / 2),
        ("all-gather", ALL, 63 / 64 / 6),  # three rings
        ("all-to-all", LINE, 4 / 8),  # bisection of a ring of four
        ("all-to-all", ALL, 4 / 8),
        ("all-gather", (0, 1), 1 / 2),  # half of a ring is no ring
    ],
)
def test_rings(kind: str, group: tuple[int, ...], shares: float) -> None:
    found = roofline(exchange(kind, group), V4)
    assert math.isclose(found.link_seconds, shares * BYTES / 50e9)
    assert found.bound == "links"
    assert found.network_seconds == 0


def test_the_slowest_group_counts() -> None:
    apart = (0, 1), (2, 3, 6, 7)
    both = roofline(exchange("all-gather", *apart), V4).seconds
    assert both == max(roofline(exchange("all-gather", group), V4).seconds for group in apart)


def test_an_open_axis_has_one_way() -> None:
    small = parse_slice("v5e:2x4")
    found = roofline(exchange("all-gather", (0, 1, 2, 3)), small)
    assert math.isclose(found.link_seconds, 3 / 4 * BYTES / 50e9)


def test_a_permute_pays_for_its_hops() -> None:
    around = exchange("collective-permute", (0, 1), (1, 2), (2, 3), (3, 0))
    assert math.isclose(roofline(around, V4).link_seconds, BYTES / 50e9)
    across = exchange("collective-permute", (0, 2), (1, 3), (2, 0), (3, 1))
    assert math.isclose(roofline(across, V4).link_seconds, 2 * BYTES / 50e9)


def test_between_slices() -> None:
    two = parse_slice("2*v5e:16x16")
    told = roofline(exchange("all-reduce", (1, 2), between=True), two)
    assert math.isclose(told.network_seconds, BYTES / 3.125e9)
    assert told.bound == "network"
    # The same exchange, of one chip here and one there, found out from where they stand.
    found = roofline(exchange("all-reduce", (0, 256)), two)
    assert found.network_seconds == told.network_seconds


def test_gpus_meet_in_a_switch_and_over_adapters() -> None:
    found = roofline(exchange("all-gather", tuple(range(16))), parse_slice("h100:16"))
    assert math.isclose(found.link_seconds, 7 / 8 * BYTES / 450e9)
    assert math.isclose(found.network_seconds, 1 / 2 * BYTES / (8 * 50e9))


def test_products_and_memory_and_what_bounds() -> None:
    work = Work({"dot": 275e12, "splash": 275e12}, int(1.228e12), (), {}, ())
    found = roofline(work, V4)
    assert found.parts == {"compute": 2.0, "memory": 1.0, "links": 0.0, "network": 0.0}
    assert (found.bound, found.seconds, found.serial_seconds) == ("compute", 2.0, 3.0)
    half = roofline(work, V4, rates=Rates.published(V4, attained=0.5))
    assert half.seconds == 4.0


def test_where_devices_stand_changes_the_cost() -> None:
    # A group of four along an axis, or the four chips of a square: one ring, or two open axes.
    square = [Place(0, (x, y, 0)) for x in (0, 1) for y in (0, 1)]
    line = [Place(0, (0, 0, z)) for z in range(4)]
    work = exchange("all-gather", LINE)
    assert roofline(work, V4, square).seconds == roofline(work, V4, line).seconds
    assert math.isclose(roofline(work, V4, square).seconds, 3 / 4 * BYTES / (2 * 50e9))


def test_another_slice_s_program_is_refused() -> None:
    with pytest.raises(RecipeError, match="more than its 4 chips"):
        roofline(exchange("all-gather", LINE, (4, 5)), parse_slice("v4:2x2x1"))
