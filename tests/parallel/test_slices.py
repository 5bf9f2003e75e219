"""What a slice's name means, which are sold, and what is next to them."""

import math

import pytest

from xgen.errors import RecipeError
from xgen.parallel.slices import CHIPS, GIB, PEAKS, ladder, larger, parse_slice, smaller


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "wraps"),
    [
        ("v4:8x8x8", 512, 128, (True, True, True)),
        ("v4:2x2x1", 4, 1, (False, False, False)),
        ("v4:2x4x4", 32, 8, (False, False, False)),
        ("v4:8x8x4", 256, 64, (True, True, True)),
        ("v5p:4x4x12", 192, 48, (True, True, True)),
        ("v5e:16x16", 256, 64, (True, True)),
        ("v5e:8x16", 128, 32, (False, True)),
        ("v6e:2x4", 8, 1, (False, False)),
        ("2*v5e:16x16", 512, 128, (True, True)),
        ("h100:64", 64, 8, (False,)),
        ("a100:4", 4, 1, (False,)),
    ],
)
def test_a_name_says_chips_hosts_and_rings(name: str, chips: int, hosts: int, wraps: tuple[bool, ...]) -> None:
    slice_ = parse_slice(name)
    assert (slice_.name, slice_.chips, slice_.hosts, slice_.wraps) == (name, chips, hosts, wraps)
    assert slice_.compiles == name.lstrip("2*").startswith("v")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v4-128", "write KIND:SHAPE"),
        ("v7:4x4x4", "there are v4, v5p, v5e, v6e, h100"),
        ("v4:8x8", "not sold as 8x8; its shapes are 2x2x1"),
        ("v4:3x4x4", "multiples of 4 up to 4096 chips"),
        ("v4:2x1x2", "not sold as 2x1x2"),
        ("v4:16x16x24", "not sold"),
        ("v5e:16x32", "its shapes are 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16$"),
        ("v6e:4x4x4", "not sold"),
        ("0*v5e:16x16", "1 to 16 can be joined"),
        ("h100:12", "1, 2, 4 or a multiple of 8"),
        ("h100:8x8", "by its number alone, as in h100:64"),
        ("h100:0", "not whole hosts"),
    ],
)
def test_a_wrong_name_says_what_there_is(name: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        parse_slice(name)


@pytest.mark.parametrize("kind", list(CHIPS))
def test_the_ladder_is_sold_and_ordered(kind: str) -> None:
    steps = ladder(kind)
    assert [step.chips for step in steps] == sorted(step.chips for step in steps)
    assert all(parse_slice(step.name) == step for step in steps)
    middle = steps[len(steps) // 2]
    assert [*smaller(middle), middle, *larger(middle)] == list(steps)


def test_an_unknown_ladder_is_an_error() -> None:
    with pytest.raises(RecipeError, match="there are v4"):
        ladder("tpu")


def test_rates_are_the_published_ones() -> None:
    # arXiv 2304.01433, table 4, and the vendors' pages: FLOP/s, memory, bytes/s of all links in one direction.
    known = {"v4": (275e12, 32 * GIB, 300e9), "v5p": (459e12, 96 * GIB, 600e9), "v5e": (197e12, 16 * GIB, 200e9)}
    known |= {"v6e": (918e12, 32 * GIB, 400e9), "h100": (989.5e12, 80 * 10**9, 450e9)}
    for name, (peak, memory, links) in known.items():
        chip = CHIPS[name]
        assert (chip.peak_flops, chip.memory) == (peak, memory)
        assert math.isclose(chip.links * chip.link_rate, links)
        assert 0.9 * memory < chip.usable_memory < memory
    assert PEAKS["TPU v5 lite"] == 197e12
