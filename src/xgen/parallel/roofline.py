"""How long a program must take at least on a slice: by its products, its memory traffic and its exchanges.

Each is the work divided by the slice's published rate. When all three overlap wholly the step takes the longest of
them (`seconds`); when nothing overlaps, their sum (`serial_seconds`). Latencies are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from xgen.errors import RecipeError
from xgen.parallel.hlo import Collective, Work, crossing
from xgen.parallel.slices import Slice
from xgen.parallel.topology import Place


@dataclass(frozen=True)
class Rates:
    """What one chip is assumed to reach, every rate in one direction: FLOP/s, bytes/s of memory, of one link, of the
    network between slices (or hosts of GPUs). `links_of_axis`: by dimension of the slice, links that an exchange along
    it may use at once."""

    flops: float
    memory: float
    link: float
    network: float
    links_of_axis: tuple[int, ...]

    @staticmethod
    def published(slice_: Slice, attained: float = 1.0) -> Rates:
        """The vendor's peaks, all times `attained`.

        An axis that closes into a ring lets a chip send both ways (2 links); on an open one the chip at the end has one
        neighbour, and the exchange waits for it (1 link).
        """
        chip = slice_.chip
        links = tuple(2 if closed else 1 for closed in slice_.wraps) if chip.dimensions else (chip.links,)
        return Rates(
            chip.peak_flops * attained,
            chip.memory_rate * attained,
            chip.link_rate * attained,
            chip.network_rate * attained,
            links,
        )


@dataclass(frozen=True)
class Roofline:
    """Seconds of one run on one device. `exchanges`: of each collective, with its seconds."""

    compute_seconds: float
    memory_seconds: float
    link_seconds: float
    network_seconds: float
    rates: Rates
    exchanges: tuple[tuple[Collective, float], ...] = field(repr=False)

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by what bounds them."""
        return {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds,
            "links": self.link_seconds,
            "network": self.network_seconds,
        }

    @property
    def seconds(self) -> float:
        """When everything overlaps: the longest."""
        return max(self.parts.values())

    @property
    def serial_seconds(self) -> float:
        """When nothing overlaps."""
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        """The part that takes the longest: "compute", "memory", "links" or "network"."""
        return max(self.parts, key=self.parts.__getitem__)


def roofline(work: Work, slice_: Slice, places: Sequence[Place] | None = None, rates: Rates | None = None) -> Roofline:
    """The bounds of a program's work on one chip of a slice.

    `places`: of the program's devices in its order (`topology.places(mesh.devices.flat)`); without them they are taken
    in the order of the slice's coordinates, the last one fastest. `rates`: the published ones unless given.
    Raises RecipeError when the program exchanges among other devices than the slice has.
    """
    assumed = rates or Rates.published(slice_)
    where = tuple(places) if places is not None else _in_order(slice_)
    links = network = 0.0
    exchanges = []
    for one in work.collectives:
        over_links, over_network = _seconds(one, slice_, where, assumed)
        links, network = links + over_links, network + over_network
        exchanges.append((one, over_links + over_network))
    return Roofline(
        work.flops / assumed.flops, work.memory_bytes / assumed.memory, links, network, assumed, tuple(exchanges)
    )


def _in_order(slice_: Slice) -> tuple[Place, ...]:
    if slice_.chip.dimensions == 0:
        hosts = slice_.chips_per_host
        return tuple(Place(n // hosts, (n % hosts,)) for n in range(slice_.chips))
    found = [()]
    for size in slice_.shape:
        found = [(*coords, n) for coords in found for n in range(size)]  # type: ignore[misc]
    return tuple(Place(number, coords) for number in range(slice_.slices) for coords in found)


def _seconds(one: Collective, slice_: Slice, where: Sequence[Place], rates: Rates) -> tuple[float, float]:
    """Over the slice's links, and over the network between slices."""
    if one.between_slices:
        return 0.0, crossing(one.kind, len(one.groups[0])) * one.bytes / rates.network
    if max(device for group in one.groups for device in group) >= len(where):
        raise RecipeError(f"slice {slice_.name}: the program was compiled for more than its {len(where)} chips")
    if one.permutes:
        return _permute(one, slice_, where, rates)
    worst = (0.0, 0.0)
    for group in one.groups:
        worst = max(worst, _group(one, [where[device] for device in group], slice_, rates), key=sum)
    return worst


def _group(one: Collective, members: Sequence[Place], slice_: Slice, rates: Rates) -> tuple[float, float]:
    parts = len({member.slice for member in members})
    together = len(members) // parts  # of one slice
    over_network = 0.0
    if parts > 1:
        # The members in one slice share the crossing: each sends its part.
        over_network = crossing(one.kind, parts) * one.bytes / (together * rates.network)
    if together == 1:
        return 0.0, over_network
    first = [member.coords for member in members if member.slice == members[0].slice]
    extents = [len({coords[axis] for coords in first}) for axis in range(len(first[0]))]
    return _linked(one.kind, one.bytes, together, extents, slice_, rates), over_network


def _linked(kind: str, size: int, members: int, extents: Sequence[int], slice_: Slice, rates: Rates) -> float:
    """Seconds of one exchange of `size` bytes over links.

    Gather: each of n members holds size/n and must receive the rest, (n-1)/n of the size, and all that it receives
    comes in over its own links at once: rings along every axis that the group spans share the load. Reduce-scatter is
    its mirror, all-reduce both in turn.

    All-to-all: of the size that each member holds, half goes to the other half of the group. Cut the group across its
    longest axis of m: n/2 members send half of their size over n/m links (twice that when the axis closes):
    n/2 x size/2 / (n/m) = size x m/4 a link, m/8 on a ring.
    """
    if slice_.chip.dimensions == 0:
        return crossing(kind, members) * size / (rates.link * rates.links_of_axis[0])
    spanned = [(extent, _lanes(axis, extent, slice_, rates)) for axis, extent in enumerate(extents) if extent > 1]
    if not spanned:
        return 0.0
    if kind == "all-to-all":
        return max(size * extent / (4 * lanes) for extent, lanes in spanned) / rates.link
    return crossing(kind, members) * size / (rates.link * sum(lanes for _, lanes in spanned))


def _lanes(axis: int, extent: int, slice_: Slice, rates: Rates) -> int:
    """An axis closes into a ring only for a group that spans all of it."""
    if axis >= len(slice_.shape) or extent < slice_.shape[axis]:
        return 1
    return rates.links_of_axis[axis]


def _permute(one: Collective, slice_: Slice, where: Sequence[Place], rates: Rates) -> tuple[float, float]:
    """Each sends all of it to one other; h hops away every link on the way carries h such messages."""
    hops, crosses = 0, False
    for source, target in one.groups:
        a, b = where[source], where[target]
        crosses = crosses or a.slice != b.slice
        if a.slice == b.slice and a != b:
            hops = max(hops, _hops(a.coords, b.coords, slice_))
    return hops * one.bytes / rates.link, one.bytes / rates.network if crosses else 0.0


def _hops(a: Sequence[int], b: Sequence[int], slice_: Slice) -> int:
    if slice_.chip.dimensions == 0:
        return 1
    total = 0
    for axis, (x, y) in enumerate(zip(a, b, strict=True)):
        apart = abs(x - y)
        closed = axis < len(slice_.wraps) and slice_.wraps[axis]
        total += min(apart, slice_.shape[axis] - apart) if closed else apart
    return total
