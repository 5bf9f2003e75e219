"""What can be rented: accelerators by name, the shapes they are sold in, their rates, and what they cost.

Every figure is a published one or a stated assumption: where it comes from stands beside it. Prices and power are
starting points that a plan may change, not offers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from xgen.errors import RecipeError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator. Bytes, bytes/s and FLOP/s of one chip; every rate is one direction.

    `kinds`: as JAX's `device_kind` names it. `memory`: what the vendor states. `usable_memory`: what one program may
    take. `links`: to neighbours in the slice, each of `link_rate`; on a GPU one NVLink switch. `network_rate`: out of
    the slice (a GPU: out of the host), over the data centre's network. `host`: chips on one host of a large slice.
    `dimensions`: of the network inside a slice, 0 when all of a host's chips meet in one switch. `ring`: an axis of
    this many chips, or a multiple of it, closes into a ring; 0 when none does.
    """

    name: str
    kinds: tuple[str, ...]
    memory: int
    usable_memory: int
    peak_flops: float
    memory_rate: float
    links: int
    link_rate: float
    network_rate: float
    host: int
    dimensions: int
    ring: int
    dollars_per_hour: float
    watts: float
    topology: str | None = None
    """libtpu's chip configuration; None when no compiler for it runs without the chip."""


# Peaks, memory and its rate: the vendors' pages (cloud.google.com/tpu/docs/{v4,v5p,v5e,v6e}; NVIDIA's data sheets).
# Usable memory of a TPU: the limit that libtpu 0.0.42 itself states when it refuses a program that is too large
# ("exceeds available HBM (30.75G)"); v5p's page says 95 GB: 96 GiB less the runtime's share. Of a GPU: 0.92 of it, as
# XLA_PYTHON_CLIENT_MEM_FRACTION is commonly set (JAX takes 0.75 unless told): an assumption.
# Links: v4: 6 of 50 GB/s (arXiv 2304.01433, table 4). v5e and v6e: 400 and 800 GB/s a chip in both directions over 4
# ports (the pages). v5p: 4,800 Gbit/s a chip over 6. GPU: NVLink 3 and 4, 600 and 900 GB/s in both directions.
# Network: v5e 6.4 Tbit/s over 256 chips (the page). v6e and v5p 4 and 1 adapters of 200 Gbit/s a host of 8 and
# of 4 chips; v4 assumed as v5p. GPU: one adapter of 400 (200) Gbit/s a GPU, as in DGX H100 (A100).
# Prices: a chip-hour on demand, Google's lists for the United States (v4, v5p, v5e, v6e, a3-highgpu-8g, a2-ultragpu-1g,
# a2-highgpu-1g), from memory of 2025. They move: state your own.
# Power: v4's 170 W is the mean under production load (arXiv 2304.01433, table 4: 121 to 192 W); a GPU's is the limit of
# the SXM module. v5e, v5p and v6e: not published; guesses.
_CHIPS = (
    Chip(
        name="v4", kinds=("TPU v4",), memory=32 * GIB, usable_memory=int(30.75 * GIB), peak_flops=275e12,
        memory_rate=1228e9, links=6, link_rate=50e9, network_rate=6.25e9, host=4, dimensions=3, ring=4,
        dollars_per_hour=3.22, watts=170.0, topology="megacore",
    ),
    Chip(
        name="v5p", kinds=("TPU v5", "TPU v5p"), memory=96 * GIB, usable_memory=int(95.74 * GIB), peak_flops=459e12,
        memory_rate=2765e9, links=6, link_rate=100e9, network_rate=6.25e9, host=4, dimensions=3, ring=4,
        dollars_per_hour=4.20, watts=350.0, topology="megacore",
    ),
    Chip(
        name="v5e", kinds=("TPU v5 lite", "TPU v5e"), memory=16 * GIB, usable_memory=int(15.75 * GIB),
        peak_flops=197e12, memory_rate=819e9,
        links=4, link_rate=50e9, network_rate=3.125e9, host=4, dimensions=2, ring=16,
        dollars_per_hour=1.20, watts=150.0, topology="default",
    ),
    Chip(
        name="v6e", kinds=("TPU v6 lite", "TPU v6e"), memory=32 * GIB, usable_memory=int(31.25 * GIB),
        peak_flops=918e12, memory_rate=1638e9,
        links=4, link_rate=100e9, network_rate=12.5e9, host=4, dimensions=2, ring=16,
        dollars_per_hour=2.70, watts=300.0, topology="default",
    ),
    Chip(
        name="h100", kinds=("NVIDIA H100 80GB HBM3",), memory=80 * 10**9, usable_memory=int(0.92 * 80e9),
        peak_flops=989.5e12, memory_rate=3350e9, links=1, link_rate=450e9, network_rate=50e9, host=8, dimensions=0,
        ring=0, dollars_per_hour=11.06, watts=700.0,
    ),
    Chip(
        name="a100", kinds=("NVIDIA A100-SXM4-80GB",), memory=80 * 10**9, usable_memory=int(0.92 * 80e9),
        peak_flops=312e12, memory_rate=2039e9, links=1, link_rate=300e9, network_rate=25e9, host=8, dimensions=0,
        ring=0, dollars_per_hour=5.07, watts=400.0,
    ),
    Chip(
        name="a100-40", kinds=("NVIDIA A100-SXM4-40GB",), memory=40 * 10**9, usable_memory=int(0.92 * 40e9),
        peak_flops=312e12, memory_rate=1555e9, links=1, link_rate=300e9, network_rate=25e9, host=8, dimensions=0,
        ring=0, dollars_per_hour=3.67, watts=400.0,
    ),
)  # fmt: skip

CHIPS: Mapping[str, Chip] = {chip.name: chip for chip in _CHIPS}
PEAKS: Mapping[str, float] = {kind: chip.peak_flops for chip in _CHIPS for kind in chip.kinds}
"""Published dense bfloat16 peaks in FLOP/s, by JAX's device kind."""

Shape = tuple[int, ...]

# Cloud TPU's "supported configurations". Of v4 and v5p every box of whole 4 x 4 x 4 cubes is sold; these are listed.
_CUBES = (
    (2, 2, 1),
    (2, 2, 2),
    (2, 2, 4),
    (2, 4, 4),
    (4, 4, 4),
    (4, 4, 8),
    (4, 8, 8),
    (8, 8, 8),
    (8, 8, 16),
    (8, 16, 16),
)
_SQUARES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_LISTED: Mapping[str, tuple[Shape, ...]] = {
    "v4": _CUBES,
    "v5p": (*_CUBES, (16, 16, 16), (16, 16, 24)),
    "v5e": _SQUARES,
    "v6e": _SQUARES,
}
_MOST = {"v4": 4096, "v5p": 6144}
_MOST_SLICES = 16
_NAME = re.compile(r"(?:(?P<slices>\d+)\*)?(?P<kind>[a-z][a-z0-9-]*):(?P<shape>\d+(?:x\d+)*)")


@dataclass(frozen=True)
class Slice:
    """Chips that are rented together: `slices` equal parts, each of `shape`, joined by the data centre's network."""

    chip: Chip
    shape: Shape
    slices: int = 1

    @property
    def name(self) -> str:
        """As `parse_slice` reads it."""
        joined = "x".join(map(str, self.shape))
        return f"{f'{self.slices}*' if self.slices > 1 else ''}{self.chip.name}:{joined}"

    @property
    def kind(self) -> str:
        return self.chip.name

    @property
    def chips_per_slice(self) -> int:
        return math.prod(self.shape)

    @property
    def chips(self) -> int:
        """In all; JAX shows one device a chip (the two cores of a v4 or v5p chip run as one, "megacore")."""
        return self.chips_per_slice * self.slices

    @property
    def chips_per_host(self) -> int:
        """Up to 8 chips of v5e and v6e share one host; larger slices of them have hosts of 4."""
        one_host = 8 if self.chip.dimensions in (0, 2) else self.chip.host
        return self.chips_per_slice if self.chips_per_slice <= one_host else self.chip.host

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host

    @property
    def compiles(self) -> bool:
        """Whether a compiler for it runs on a machine without one."""
        return self.chip.topology is not None

    @property
    def wraps(self) -> tuple[bool, ...]:
        """By dimension of the shape: whether its chips close into a ring."""
        ring = self.chip.ring
        # A v4 or v5p slice is a torus only in whole cubes; of v5e and v6e an axis as long as the pod's closes.
        whole = self.chip.dimensions != 3 or all(n % ring == 0 for n in self.shape)
        return tuple(bool(ring) and whole and n % ring == 0 for n in self.shape)


def parse_slice(text: str) -> Slice:
    """The slice that "v4:8x8x8", "v5e:16x16", "2*v5e:16x16" (two slices) or "h100:64" names.

    Raises RecipeError that lists what exists.
    """
    found = _NAME.fullmatch(text.strip().lower())
    if found is None:
        raise RecipeError(
            f"slice {text!r}: write KIND:SHAPE, as in v4:8x8x8, 2*v5e:16x16 or h100:64; kinds: {_kinds()}"
        )
    kind, slices = found["kind"], int(found["slices"] or 1)
    if kind not in CHIPS:
        raise RecipeError(f"slice {text!r}: no such kind {kind!r}; there are {_kinds()}")
    if not 1 <= slices <= _MOST_SLICES:
        raise RecipeError(f"slice {text!r}: {slices} slices; 1 to {_MOST_SLICES} can be joined")
    shape = tuple(int(n) for n in found["shape"].split("x"))
    chip = CHIPS[kind]
    if chip.dimensions == 0:
        return Slice(chip, _gpus(chip, shape, slices, text))
    if not _sold(chip, shape):
        raise RecipeError(f"slice {text!r}: {kind} is not sold as {found['shape']}; {_sold_shapes(chip)}")
    return Slice(chip, shape, slices)


def ladder(kind: str) -> tuple[Slice, ...]:
    """The listed shapes of a kind in order of chips; then several slices together. Raises RecipeError for no kind."""
    if kind not in CHIPS:
        raise RecipeError(f"no such kind of chip {kind!r}; there are {_kinds()}")
    chip = CHIPS[kind]
    if chip.dimensions == 0:
        return tuple(Slice(chip, (2**power,)) for power in range(13))
    single = [Slice(chip, shape) for shape in _LISTED[kind]]
    joined = [Slice(chip, _LISTED[kind][-1], slices) for slices in (2, 4, 8, 16)]
    return (*single, *joined)


def smaller(slice_: Slice) -> tuple[Slice, ...]:
    """The listed shapes of the same kind with fewer chips, the fewest first."""
    return tuple(other for other in ladder(slice_.kind) if other.chips < slice_.chips)


def larger(slice_: Slice) -> tuple[Slice, ...]:
    """The listed shapes of the same kind with more chips, the fewest first."""
    return tuple(other for other in ladder(slice_.kind) if other.chips > slice_.chips)


def _kinds() -> str:
    return ", ".join(CHIPS)


def _gpus(chip: Chip, shape: Shape, slices: int, text: str) -> Shape:
    """How many: part of one host, or whole hosts."""
    if len(shape) > 1 or slices > 1:
        raise RecipeError(f"slice {text!r}: {chip.name} is named by its number alone, as in {chip.name}:64")
    count = shape[0]
    if count < 1 or (count % chip.host if count > chip.host else chip.host % count):
        raise RecipeError(
            f"slice {text!r}: {count} {chip.name} are not whole hosts; take 1, 2, 4 or a multiple of {chip.host}"
        )
    return shape


def _sold(chip: Chip, shape: Shape) -> bool:
    if len(shape) != chip.dimensions:
        return False
    if tuple(sorted(shape)) in {tuple(sorted(listed)) for listed in _LISTED[chip.name]}:
        # The four chips of a host of v4 and v5p are a square of the first two dimensions.
        return chip.dimensions == 2 or (shape[0] % 2 == 0 and shape[1] % 2 == 0)
    cubes = chip.dimensions == 3 and all(n >= 4 and n % 4 == 0 for n in shape)
    return cubes and math.prod(shape) <= _MOST[chip.name]


def _sold_shapes(chip: Chip) -> str:
    listed = ", ".join("x".join(map(str, shape)) for shape in _LISTED[chip.name])
    if chip.dimensions == 2:
        return f"its shapes are {listed}"
    most = _MOST[chip.name]
    return f"its shapes are {listed}, and any AxBxC of multiples of 4 up to {most} chips, in any order"
