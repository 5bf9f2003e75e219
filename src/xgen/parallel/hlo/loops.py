"""How often a loop of a compiled program runs: said by the compiler, or worked out from its start, step and end."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping

from xgen.parallel.hlo.text import Computation, HloError, Instruction, Module

Value = int | tuple["Value | None", ...]
"""A scalar, or a tuple whose unknown parts are None."""

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_MOST = 2**40
_SAME = ("copy", "bitcast", "convert", "reshape", "opt-barrier", "copy-start", "copy-done")
_COUNTED = ("pred", "s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")
_ARITHMETIC: Mapping[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
}
_ORDER: Mapping[str, Callable[[int, int], bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}


class _UnknownError(Exception):
    """A value that only the running program knows."""


def trip_count(module: Module, loop: Instruction, given: Mapping[str, float]) -> float:
    """Times that a while loop's body runs. `given`: by the loop's name, or, for loops whose end only the data know, by
    a part of the place that it was traced from.

    Raises HloError when neither the compiler's note nor the loop's start, step and condition nor `given` say it.
    """
    if loop.name in given:
        return given[loop.name]
    known = _KNOWN.search(loop.tail)
    if known:
        return int(known[1])
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    try:
        return _count(module, loop, module[condition], module[body])
    except _UnknownError as unknown:
        placed = [part for part in given if part in loop.op_name]
        if placed:
            return given[max(placed, key=len)]
        raise HloError(
            f"{loop}: how often it runs is not in the text ({unknown}); give its count by name or by a part of its "
            f"place, {loop.op_name!r}"
        ) from None


def _count(module: Module, loop: Instruction, condition: Computation, body: Computation) -> int:
    carried = _Evaluation(module, module[loop.computation], None).value(loop.operands[0])
    if not isinstance(carried, tuple):
        raise _UnknownError("its start is no tuple")
    if len(carried) != len(body.parameters[0].parts):
        raise HloError(f"{loop}: its body takes another tuple than it is given")
    state = carried

    def goes_on(values: tuple[Value | None, ...]) -> bool:
        return bool(_Evaluation(module, condition, values).value(condition.root))

    def after(values: tuple[Value | None, ...]) -> tuple[Value | None, ...]:
        """One turn: what the body makes of the values that are known."""
        found = _Evaluation(module, body, values).partial(body.root)
        return tuple(new if old is not None else None for old, new in zip(values, found, strict=True))

    if not goes_on(state):
        return 0
    first, second = after(state), after(after(state))
    steps = [_difference(a, b) for a, b in zip(state, first, strict=True)]
    again = [_difference(a, b) for a, b in zip(first, second, strict=True)]
    # What does not move by equal steps is not known: should the condition read it, that is the error.
    state = tuple(v if one == two else None for v, one, two in zip(state, steps, again, strict=True))
    if not any(steps):
        raise _UnknownError("nothing that its condition reads moves")

    def turned(n: int) -> tuple[Value | None, ...]:
        return tuple(
            v + n * s if isinstance(v, int) and s is not None else v for v, s in zip(state, steps, strict=True)
        )

    high = 1
    while goes_on(turned(high)):
        high *= 2
        if high > _MOST:
            raise _UnknownError("its condition never ends it")
    low = high // 2  # the condition holds after `low` turns and not after `high`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if goes_on(turned(middle)) else (low, middle)
    return high


def _difference(a: Value | None, b: Value | None) -> int | None:
    return b - a if isinstance(a, int) and isinstance(b, int) else None


class _Evaluation:
    """Of one computation's scalars, for a given argument tuple; what is not known at compile time raises."""

    def __init__(self, module: Module, computation: Computation, argument: Value | None) -> None:
        self.module = module
        self.computation = computation
        self.argument = argument
        self.called: list[Value | None] | None = None
        self._found: dict[str, Value | _UnknownError] = {}

    def value(self, name: str) -> Value:
        """Raises _UnknownError."""
        if name not in self._found:
            try:
                self._found[name] = self._value(self.computation[name])
            except _UnknownError as unknown:
                self._found[name] = unknown
        found = self._found[name]
        if isinstance(found, _UnknownError):
            raise found
        return found

    def _value(self, one: Instruction) -> Value:
        operands = one.operands
        if one.opcode == "tuple":
            return self.partial(one.name)
        if any(array.dims or array.dtype not in _COUNTED for array in one.arrays) and len(one.parts) == 1:
            raise _UnknownError(f"{one} is no whole number")
        if one.opcode in _SAME:
            return self.value(operands[0])
        if one.opcode == "constant":
            return _constant(one)
        if one.opcode == "parameter":
            return self._parameter(one)
        if one.opcode == "get-tuple-element":
            return self._element(one)
        if one.opcode in _ARITHMETIC:
            return _ARITHMETIC[one.opcode](self._integer(operands[0]), self._integer(operands[1]))
        if one.opcode == "compare":
            compare = _ORDER[one.attribute("direction")]
            return int(compare(self._integer(operands[0]), self._integer(operands[1])))
        if one.opcode in ("fusion", "call"):
            (callee,) = one.called("calls", "to_apply")
            inner = _Evaluation(self.module, self.module[callee], None)
            inner.called = [self._known(operand) for operand in operands]
            return inner.value(inner.computation.root)
        raise _UnknownError(f"{one} is computed")

    def partial(self, name: str) -> tuple[Value | None, ...]:
        """Of a tuple: its parts, None for those not known."""
        one = self.computation[name]
        if one.opcode == "tuple":
            return tuple(self._known(operand) for operand in one.operands)
        found = self.value(name)
        if not isinstance(found, tuple):
            raise _UnknownError(f"{one} is no tuple")
        return found

    def _known(self, name: str) -> Value | None:
        try:
            return self.value(name)
        except _UnknownError:
            return None

    def _integer(self, name: str) -> int:
        found = self.value(name)
        if not isinstance(found, int):
            raise _UnknownError(f"{self.computation[name]} is a tuple")
        return found

    def _parameter(self, one: Instruction) -> Value:
        number = int(one.arguments[0])
        found = self.called[number] if self.called is not None else self.argument
        if found is None:
            raise _UnknownError(f"{one} is an input")
        return found

    def _element(self, one: Instruction) -> Value:
        source = self.computation[one.operands[0]]
        if source.opcode == "while":
            (body,) = source.called("body")
            # What a loop passes on untouched is what it was given.
            index = int(one.attribute("index"))
            inside = self.module[body]
            kept = inside[inside.root]
            if kept.opcode == "tuple" and _passes(inside, kept.operands[index], index):
                return self._part(self.value(source.operands[0]), index, one)
            raise _UnknownError(f"{one} comes out of a loop")
        return self._part(self.value(one.operands[0]), int(one.attribute("index")), one)

    @staticmethod
    def _part(whole: Value, index: int, one: Instruction) -> Value:
        part = whole[index] if isinstance(whole, tuple) else None
        if part is None:
            raise _UnknownError(f"{one} is computed")
        return part


def _passes(body: Computation, name: str, index: int) -> bool:
    one = body[name]
    if one.opcode in ("copy", "bitcast"):
        return _passes(body, one.operands[0], index)
    return (
        one.opcode == "get-tuple-element"
        and int(one.attribute("index")) == index
        and body[one.operands[0]].opcode == "parameter"
    )


def _constant(one: Instruction) -> int:
    text = one.arguments[0].strip()
    words = {"true": 1, "false": 0}
    if text in words:
        return words[text]
    if not re.fullmatch(r"-?\d+", text):
        raise _UnknownError(f"{one} is {text[:20]}")
    return int(text)
