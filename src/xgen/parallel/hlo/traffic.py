"""Bytes that an instruction moves to and from the chip's main memory, and what it leaves there.

An instruction reads its operands and writes its results, as fused instructions keep what lies between to themselves.
Three things do not move whole: what only a slice is read of (a layer of stacked weights), what is updated in place (a
stacked residual), and what lies in the chip's own fast memory (layouts with S(n), n > 0). A value that several
instructions read counts each time.
"""

from __future__ import annotations

from collections.abc import Iterable

from xgen.parallel.hlo.text import MAIN_MEMORY, Array, Computation, HloError, Instruction, Module

_SLICES = ("dynamic-slice", "slice", "gather")
_ONE_TO_ONE = ("bitcast", "convert", "copy", "reshape", "transpose")
_NOTHING = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "SliceId", "ZeroCrop")


def traffic(module: Module, one: Instruction, base: str) -> tuple[int, list[Array]]:
    """Bytes moved, and the arrays of the result that are new in main memory. `base`: the opcode without "-start"."""
    computation = module[one.computation]
    results = _results(one, base)
    operands = [(name, computation[name].arrays) for name in one.operands]
    if base == "custom-call" and one.attribute("custom_call_target").strip('"') in _NOTHING:
        return 0, _main(results)
    if base == "fusion":
        return _fusion(module, one, [arrays for _, arrays in operands])
    if base in _SLICES:
        # Only the chosen part is read, with the indices that choose it.
        indices = [array for _, arrays in operands[1:] for array in arrays]
        source = _scaled(operands[0][1][0], results[0].elements)
        return source + _sum(results) + _sum(indices), _main(results)
    if base == "dynamic-update-slice":
        update = computation[one.operands[1]].arrays[0]
        return _sum([update]) + _scaled(results[0], update.elements), []
    if base == "scatter":
        # Each updated place is read and written, where the indices say.
        updates = [array for _, arrays in operands[len(results) + 1 :] for array in arrays]
        places = sum(2 * _scaled(result, updates[0].elements) for result in results)
        return places + _sum(updates) + _sum(operands[len(results)][1]), []
    return _sum(array for _, arrays in operands for array in arrays) + _sum(results), _main(results)


def _results(one: Instruction, base: str) -> list[Array]:
    """Of a start instruction the tuple also holds its operands and flags: (operand, result, flag ...), copies the other
    way round. The result is what the done instruction gives; both parts of a copy have the same size."""
    if base == one.opcode:
        return list(one.arrays)
    if base == "all-reduce":
        return list(one.arrays)
    if len(one.parts) < 2:
        raise HloError(f"{one}: begins what another instruction ends, but its result has one part")
    return list(one.parts[0] if base == "copy" else one.parts[1])


def continues(computation: Computation, one: Instruction) -> bool:
    """Whether a collective only carries on one that another fusion began: TPU's compiler lets an exchange run beside
    several fusions in turn and repeats its instruction, with the same chain_id, in each."""
    began = any("AsyncCollectiveStart" in user.tail for user in computation.users[one.name])
    return "chain_id=" in one.tail and not began


def _fusion(module: Module, one: Instruction, operands: list[tuple[Array, ...]]) -> tuple[int, list[Array]]:
    inside = module[one.called("calls")[0]]
    moved = 0
    for number, arrays in enumerate(operands):
        if len(arrays) != 1:
            raise HloError(f"{one}: takes a tuple; what it reads of it is not known here")
        if arrays[0].space == MAIN_MEMORY:
            moved += _scaled(arrays[0], _read(module, inside, inside.parameters[number].name))
    root = inside[inside.root]
    if "AsyncCollectiveStart" in root.tail:
        return moved + _sum(one.parts[1]), _main(one.parts[1])
    roots = root.operands if root.opcode == "tuple" else (root.name,)
    if len(roots) != len(one.arrays):  # a root of several results that is no tuple: all are written
        return moved + _sum(one.arrays), _main(one.arrays)
    new: list[Array] = []
    for name, result in zip(roots, one.arrays, strict=True):
        written = _written(module, inside, name)
        moved += _scaled(result, min(written, result.elements))
        if written >= result.elements and result.space == MAIN_MEMORY:
            new.append(result)
    return moved, new


def _read(module: Module, inside: Computation, name: str) -> int:
    """Elements of a fused computation's value that its users take."""
    whole = sum(array.elements for array in inside[name].arrays)
    taken = 0
    for user in inside.users[name]:
        if user.opcode == "tuple" or "AsyncCollectiveDone" in user.tail or continues(inside, user):
            continue  # passed on as it is
        first = user.operands[0] == name
        if user.opcode in _SLICES and first and name not in user.operands[1:]:
            taken += user.arrays[0].elements
        elif user.opcode in ("dynamic-update-slice", "scatter") and first and name not in user.operands[1:]:
            # Written in place: of the old content nothing is read (a scatter adds to the places it touches).
            taken += inside[user.operands[-1]].arrays[0].elements if user.opcode == "scatter" else 0
        elif user.opcode in _ONE_TO_ONE and user.arrays[0].elements == whole:
            # What the fusion returns of it is read for that, all of it.
            returned = user.name == inside.root or any(far.opcode == "tuple" for far in inside.users[user.name])
            taken += whole if returned else _read(module, inside, user.name)
        elif user.opcode == "fusion":
            callee = module[user.called("calls")[0]]
            places = [number for number, operand in enumerate(user.operands) if operand == name]
            taken += sum(_read(module, callee, callee.parameters[number].name) for number in places)
        else:
            return whole
    return min(taken, whole)


def _written(module: Module, inside: Computation, name: str) -> int:
    """Elements of a fused computation's result that are written: of an update in place, the update."""
    one = inside[name]
    if one.opcode == "parameter" or "AsyncCollectiveDone" in one.tail or continues(inside, one):
        return 0  # passed on as it is
    if one.opcode in _ONE_TO_ONE and inside[one.operands[0]].opcode != "parameter":
        return _written(module, inside, one.operands[0])
    if one.opcode in ("dynamic-update-slice", "scatter") and _is_parameter(module, inside, one.operands[0]):
        return inside[one.operands[1 if one.opcode == "dynamic-update-slice" else -1]].arrays[0].elements
    if one.opcode == "fusion" and len(one.arrays) == 1:
        callee = module[one.called("calls")[0]]
        return _written(module, callee, callee.root)
    return sum(array.elements for array in one.arrays)


def _is_parameter(module: Module, inside: Computation, name: str) -> bool:
    one = inside[name]
    if one.opcode in ("bitcast", "copy", "convert", "reshape"):
        return _is_parameter(module, inside, one.operands[0])
    return one.opcode == "parameter"


def _scaled(array: Array, elements: int) -> int:
    """Bytes of so many of an array's elements, with their share of its padding; none if it lies in fast memory."""
    if array.space != MAIN_MEMORY or not array.elements:
        return 0
    return round(array.padded_bytes * elements / array.elements)


def _sum(arrays: Iterable[Array]) -> int:
    return sum(array.padded_bytes for array in arrays if array.space == MAIN_MEMORY)


def _main(arrays: Iterable[Array]) -> list[Array]:
    return [array for array in arrays if array.space == MAIN_MEMORY]
