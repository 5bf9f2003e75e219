"""Which devices of a program talk to each other, as its text says it."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import numpy as np

from xgen.parallel.hlo.text import HloError, Instruction

Groups = tuple[tuple[int, ...], ...]
"""Devices by their place in the program's order; of a permute the pairs (from, to)."""

_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\((.*)\))?\s*\{([^{}]*)\}")
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTS = re.compile(r"\{(?:\{[\d,]*\},?)*\}")
_PART = re.compile(r"(.*):\((\d+)\)(\d+)")


def of_instruction(one: Instruction, devices: int) -> Groups:
    """The groups of a collective in a program of `devices` devices. Raises HloError."""
    if "source_target_pairs" in one.attributes:
        return read_groups(one.attribute("source_target_pairs"), devices)
    text = one.attribute("replica_groups")
    if "device_ids" in one.attributes:  # a comma inside the one attribute
        text = f"{text}, device_ids={one.attribute('device_ids')}"
    return read_groups(text, devices)


def read_groups(text: str, devices: int) -> Groups:
    """Groups as text: lists {{0,1},{2,3}} (empty: all together), XLA's iota form [2,4]<=[4,2]T(1,0), or a mesh with the
    axes in use, mesh['a'=4,'b'=2] {'a'}. Raises HloError."""
    text = text.strip()
    iota, mesh = _IOTA.fullmatch(text), _MESH.fullmatch(text)
    if iota:
        table = _iota(_integers(iota[2]), iota[3]).reshape(_integers(iota[1]))
    elif mesh:
        table = _of_mesh(text, mesh[1], mesh[2], mesh[3])
    elif _LISTS.fullmatch(text):
        found = tuple(_integers(one) for one in re.findall(r"\{([\d,]+)\}", text))
        return found or (tuple(range(devices)),)
    else:
        raise HloError(f"replica groups are not understood: {text[:120]!r}")
    return tuple(tuple(int(device) for device in row) for row in table)


def _of_mesh(text: str, axes: str, order: str | None, used: str) -> np.ndarray:
    """[groups, devices of one]: the axes in use innermost."""
    sizes = {name.strip(): int(size) for name, size in (axis.split("=") for axis in axes.split(","))}
    wanted: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    sequence: list[tuple[str, int]] = []
    for piece in (piece.strip() for piece in used.split(",") if piece.strip()):
        part = _PART.fullmatch(piece)  # 'a':(2)4 is the factor 4 of axis 'a' that has a factor 2 before it
        name = part[1] if part else piece
        if name not in sizes:
            raise HloError(f"replica groups {text!r}: no axis {name}")
        before, size = (int(part[2]), int(part[3])) if part else (1, sizes[name])
        wanted[name].append((before, size))
        sequence.append((name, before))
    factors: list[tuple[str, int, int]] = []  # axis, size of what stands before it there, its own size
    for name, size in sizes.items():
        cuts = sorted({1, size, *(n for before, part_size in wanted[name] for n in (before, before * part_size))})
        if any(after % at for at, after in pairwise(cuts)):
            raise HloError(f"replica groups {text!r}: parts of {name} overlap")
        factors += [(name, at, after // at) for at, after in pairwise(cuts)] or [(name, 1, 1)]
    inner = [index for key in sequence for index, (name, at, _) in enumerate(factors) if (name, at) == key]
    outer = [index for index in range(len(factors)) if index not in inner]
    table = _devices(text, order, math.prod(sizes.values())).reshape([size for *_, size in factors])
    return table.transpose(outer + inner).reshape(-1, math.prod(factors[index][2] for index in inner))


def _devices(text: str, order: str | None, count: int) -> np.ndarray:
    if order is None:
        return np.arange(count)
    found = _ORDER.fullmatch(order)
    if found:
        return _iota(_integers(found[1]), found[2])
    if re.fullmatch(r"[\d,]+", order):
        return np.array(_integers(order))
    raise HloError(f"replica groups {text!r}: device_ids {order!r} are not understood")


def _iota(bounds: tuple[int, ...], order: str | None) -> np.ndarray:
    table = np.arange(math.prod(bounds)).reshape(bounds)
    return table.transpose(_integers(order)) if order else table


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
