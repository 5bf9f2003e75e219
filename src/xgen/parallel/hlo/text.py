"""A compiled program's text (`compiled.as_text()`) as values: computations, instructions, arrays, replica groups.

The grammar is that of XLA's printer, for CPU, GPU and TPU. What is not understood raises HloError: a plan must not rest
on what was passed over.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from xgen.errors import XgenError


class HloError(XgenError):
    """A compiled program's text says something that cannot be read or counted."""


_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "token": 0, "opaque": 0,
    "f4e2m1fn": 4, "f8e3m4": 8, "f8e4m3": 8, "f8e4m3b11fnuz": 8, "f8e4m3fn": 8, "f8e4m3fnuz": 8, "f8e5m2": 8,
    "f8e5m2fnuz": 8, "f8e8m0fnu": 8,
}  # fmt: skip

MAIN_MEMORY = 0
"""Layouts name memory as S(n); without one it is the chip's main memory. TPU: 1 is VMEM, 3 is v4's CMEM, 5 the host."""

_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=?]*)\](\{[^{}]*\})?")
_TILE = re.compile(r"T\(([0-9,*]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$", re.DOTALL)
_OPCODE = re.compile(r"\s*([a-z][a-z0-9-]*)\(")
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[(){}\[\],]')
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclass(frozen=True)
class Array:
    """One array: its element type, its dimensions, the memory it lies in, its bytes there.

    `padded_bytes`: with what the layout's tiles add; `bytes`: without.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int
    padded_bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return -(-self.elements * _BITS[self.dtype] // 8)

    @property
    def shape(self) -> str:
        """As XLA writes it: bf16[8,128]."""
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """`parts`: the result's arrays, one tuple for each part of a tuple, or one in all. `arguments`: what stands between
    the brackets. `tail`: the attributes, unread."""

    name: str
    opcode: str
    parts: tuple[tuple[Array, ...], ...]
    arguments: tuple[str, ...]
    tail: str
    computation: str

    @property
    def arrays(self) -> tuple[Array, ...]:
        """All arrays of the result."""
        return tuple(array for part in self.parts for array in part)

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of other instructions."""
        if self.opcode in ("parameter", "constant"):
            return ()
        return tuple(argument.split()[-1].removeprefix("%") for argument in self.arguments)

    @cached_property
    def attributes(self) -> dict[str, str]:
        """By name, as written."""
        pairs = (piece.partition("=") for piece in _split(self.tail))
        return {name.strip(): value.strip() for name, _, value in pairs if name.strip()}

    def attribute(self, name: str) -> str:
        """Raises HloError when it is not there."""
        if name not in self.attributes:
            raise HloError(f"{self}: no {name} among {', '.join(self.attributes) or 'no attributes'}")
        return self.attributes[name]

    def called(self, *names: str) -> tuple[str, ...]:
        """The computations that these attributes name, where there are any."""
        given = (self.attributes[name] for name in names if name in self.attributes)
        return tuple(found.strip().removeprefix("%") for value in given for found in value.strip("{}").split(","))

    def integers(self, name: str) -> tuple[int, ...]:
        """Of an attribute such as lhs_contracting_dims={1,2}; empty when it is not there."""
        inside = self.attributes.get(name, "{}").strip("{}")
        return tuple(int(number) for number in inside.split(",") if number.strip())

    @property
    def op_name(self) -> str:
        """The place in the traced program that it came from; empty when the text does not say."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.tail)
        return found[1] if found else ""

    def __str__(self) -> str:
        return f"%{self.name} ({self.opcode}, in %{self.computation})"


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the text, operands before users."""

    name: str
    root: str
    instructions: dict[str, Instruction] = field(repr=False)

    def __getitem__(self, name: str) -> Instruction:
        if name not in self.instructions:
            raise HloError(f"computation %{self.name} uses %{name}, which it does not have")
        return self.instructions[name]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that take a name as operand."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self:
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """By number."""
        return {int(one.arguments[0]): one for one in self if one.opcode == "parameter"}


@dataclass(frozen=True)
class Module:
    """A whole program, as one device of `devices` runs it."""

    name: str
    entry: str
    devices: int
    computations: dict[str, Computation] = field(repr=False)

    def __getitem__(self, name: str) -> Computation:
        if name not in self.computations:
            raise HloError(f"program {self.name}: no computation %{name}")
        return self.computations[name]


def parse(text: str) -> Module:
    """Read a program. Raises HloError at the first line that is not understood."""
    head = re.match(r"\s*HloModule ([^\s,]+)", text)
    if head is None:
        raise HloError(f"not a compiled program's text: it begins {text.strip()[:60]!r}, not 'HloModule'")
    header = text[: text.find("\n\n")] if "\n\n" in text else text
    counts = [int(n) for key in ("num_partitions", "replica_count") for n in re.findall(rf"\b{key}=(\d+)", header)]
    computations, entry = {}, ""
    for title, lines in _bodies(text):
        found = _COMPUTATION.match(title)
        assert found is not None
        computation = _computation(found[2], lines)
        computations[computation.name] = computation
        entry = computation.name if found[1] else entry
    if not entry:
        raise HloError(f"program {head[1]}: no ENTRY computation; is the text whole?")
    return Module(head[1], entry, math.prod(counts), computations)


def _bodies(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each computation's title and its instructions, an instruction that was broken over lines made one again."""
    title, lines = "", list[str]()
    for line in text.splitlines():
        if not title:
            if _COMPUTATION.match(line):
                title, lines = line, []
        elif line.rstrip() == "}" or line.startswith("}, execution_thread="):
            yield title, lines
            title = ""
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += line
        elif line.strip():
            raise HloError(f"computation {title[:60]!r}: not an instruction: {line[:120]!r}")
    if title:
        raise HloError(f"computation {title[:60]!r} does not end; is the text whole?")


def _computation(name: str, lines: list[str]) -> Computation:
    instructions, root = {}, ""
    for line in lines:
        instruction = _instruction(line, name)
        instructions[instruction.name] = instruction
        root = instruction.name if line.lstrip().startswith("ROOT ") else root
    if not root:
        raise HloError(f"computation %{name} has no ROOT")
    return Computation(name, root, instructions)


def _instruction(line: str, computation: str) -> Instruction:
    found = _INSTRUCTION.match(line)
    assert found is not None
    start = found.end()
    end = _closing(line, start) if line[start] == "(" else line.find(" ", start)
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        raise HloError(f"computation %{computation}: no opcode in {line[:160]!r}")
    close = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : close - 1]
    literal = opcode[1] in ("parameter", "constant")
    arguments = (inside,) if literal else tuple(_split(_COMMENT.sub("", inside)))
    parts = tuple(_parts(line[start:end]))
    return Instruction(found[2], opcode[1], parts, arguments, line[close:].lstrip(", "), computation)


def _closing(line: str, start: int) -> int:
    """Just past the bracket that closes the one at `start`."""
    depth = 0
    for token in _BRACKETS.finditer(line, start):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if depth == 0 and token[0] == ")":
            return token.end()
    raise HloError(f"a bracket is not closed in {line[:160]!r}")


def _split(text: str) -> list[str]:
    """At the commas that stand in no bracket and no string."""
    pieces, depth, start = [], 0, 0
    for token in _BRACKETS.finditer(text):
        if token[0] in "({[":
            depth += 1
        elif token[0] in ")}]":
            depth -= 1
        elif token[0] == "," and depth == 0:
            pieces.append(text[start : token.start()])
            start = token.end()
    return [piece.strip() for piece in (*pieces, text[start:]) if piece.strip()]


def _parts(text: str) -> Iterator[tuple[Array, ...]]:
    text = _COMMENT.sub("", text)
    for piece in _split(text[1:-1]) if text.startswith("(") else [text]:
        if piece.startswith("("):
            yield tuple(array for part in _parts(piece) for array in part)
        else:
            yield (_array(piece),)


def _array(text: str) -> Array:
    found = _ARRAY.fullmatch(text)
    if found is None or found[1] not in _BITS:
        raise HloError(f"not an array's shape: {text[:120]!r}; known types: {', '.join(_BITS)}")
    dims = tuple(int(n.lstrip("<=")) for n in found[2].split(",") if n)
    layout = found[3] or ""
    space = _SPACE.search(layout)
    padded = -(-_padded_elements(dims, layout) * _BITS[found[1]] // 8)
    return Array(found[1], dims, int(space[1]) if space else MAIN_MEMORY, padded)


def _padded_elements(dims: tuple[int, ...], layout: str) -> int:
    """{1,0:T(8,128)}: dimensions from the minor one on, then the tile that covers the last ones."""
    tile = _TILE.search(layout)
    if tile is None or not dims:
        return math.prod(dims)
    if "*" in tile[1]:
        raise HloError(f"layout {layout!r}: tiles that join dimensions are not known here")
    order = [int(n) for n in layout.strip("{}").partition(":")[0].split(",") if n]
    if sorted(order) != list(range(len(dims))):
        raise HloError(f"layout {layout!r} does not order the dimensions of {dims}")
    physical = [dims[n] for n in reversed(order)]
    sides = [int(n) for n in tile[1].split(",")]
    physical = [1] * (len(sides) - len(physical)) + physical
    covered = len(physical) - len(sides)
    rounded = [-(-size // side) * side for size, side in zip(physical[covered:], sides, strict=True)]
    return math.prod(physical[:covered]) * math.prod(rounded)


def backend_config(instruction: Instruction) -> dict[str, object]:
    """The compiler's notes on an instruction; empty when there are none. Raises HloError when they are not JSON."""
    text = instruction.attributes.get("backend_config", "")
    if not text or not text.startswith("{"):
        return {}
    try:
        read = json.loads(text)
    except ValueError as wrong:
        raise HloError(f"{instruction}: its backend_config is not JSON: {text[:120]!r} ({wrong})") from None
    return dict(read)
