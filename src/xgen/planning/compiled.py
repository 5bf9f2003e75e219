"""What the plan asks of a compiler: a small protocol, so that the arithmetic stands without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from xgen.parallel.mesh import Sizes
from xgen.parallel.roofline import Roofline
from xgen.parallel.slices import Slice
from xgen.recipe.schema import Recipe


@dataclass(frozen=True)
class CompiledFacts:
    """What the compiler says of one stage's step, per chip; FLOPs and collective bytes with loops multiplied out, None
    where it made a program that cannot be read (`unread` says why)."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    compile_seconds: float
    flops: float | None
    collectives: Mapping[str, Mapping[str, int]] | None
    """By kind: how often in a step ("count"), the bytes that are exchanged ("bytes"), and of these what one chip sends
    ("sent")."""
    largest_temporaries: tuple[tuple[str, int], ...] = ()
    """Shape and bytes of the largest."""
    roofline: Roofline | None = None
    unread: str = ""

    @property
    def bytes_per_chip(self) -> int:
        """Arguments, outputs that lie in no argument's place, and temporaries."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes


@dataclass(frozen=True)
class OutOfMemory:
    """The compiler refused the step: it needs more than a chip has. `bytes_per_chip`: what it said, None if nothing."""

    bytes_per_chip: int | None
    compile_seconds: float


CompileStage = Callable[[Recipe, int, Sizes, Slice], "CompiledFacts | OutOfMemory"]
"""(recipe with the choice written into it, index of the stage, mesh, slice) -> what the compiler says."""
