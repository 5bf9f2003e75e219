"""Weights one piece at a time, so that a model of any size passes through little memory.

A piece is one row of the weights table, of one layer where the row is stacked, in our own layout: the row's axes
without "layer". Sources give pieces, writers ask for them in the order that suits their format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from xgen.errors import CheckpointError
from xgen.model.spec import Spec
from xgen.model.weights import Weight, Weights, from_dict, rows

Piece = tuple[Weight, int | None]
"""A row, and the layer if the row is stacked."""

TYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class Source(Protocol):
    """Weights of a model of `spec`, from wherever they are stored."""

    @property
    def spec(self) -> Spec: ...

    def dtype(self, row: Weight, layer: int | None) -> np.dtype:
        """The type that the piece is stored in: one of TYPES; float32 where the format quantises."""
        ...

    def read(self, row: Weight, layer: int | None) -> np.ndarray:
        """The piece, of shape `piece_shape(row, spec)` and type `dtype(row, layer)`; not kept by the source.

        Raises CheckpointError when it is damaged or holds a value that is no finite number.
        """
        ...


def pieces(spec: Spec) -> Iterator[Piece]:
    """All pieces of a model, in the weights table's order, the layers of a row one after another."""
    for row in rows(spec):
        if row.axes[0] == "layer":
            yield from ((row, layer) for layer in range(spec.model.layers))
        else:
            yield row, None


def piece_shape(row: Weight, spec: Spec) -> tuple[int, ...]:
    shape = row.shape(spec)
    return shape[1:] if row.axes[0] == "layer" else shape


def _inputs(row: Weight) -> int:
    """How many leading axes of a matrix's piece are its inputs; all that follow are its outputs."""
    axes = row.axes[1:] if row.axes[0] == "layer" else row.axes
    return 2 if axes[:2] == ("heads", "head") and len(axes) > 2 else 1


def is_product(row: Weight) -> bool:
    """Whether the row multiplies activations, and so is stored turned round, outputs first, by other formats."""
    return row.decay and row.init != "embedding"


def foreign_shape(row: Weight, spec: Spec) -> tuple[int, ...]:
    """The shape of a piece as Hugging Face and GGUF readers see it: [outputs, inputs], or [size] for a vector."""
    shape = piece_shape(row, spec)
    if is_product(row):
        inputs = _inputs(row)
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])
    return shape if row.init == "embedding" else (math.prod(shape),)


def to_foreign(row: Weight, piece: np.ndarray) -> np.ndarray:
    """A piece of our layout as [outputs, inputs], or flat for a vector."""
    if is_product(row):
        inputs = math.prod(piece.shape[: _inputs(row)])
        return piece.reshape(inputs, -1).T
    return piece if row.init == "embedding" else piece.reshape(-1)


def from_foreign(row: Weight, array: np.ndarray, spec: Spec) -> np.ndarray:
    """The inverse of `to_foreign`."""
    return (array.T if is_product(row) else array).reshape(piece_shape(row, spec))


def foreign_name(pattern: str, layer: int | None) -> str:
    """A row's `hugging_face` or `gguf` name with the layer's number in it."""
    return pattern if layer is None else pattern.replace("{layer}", str(layer))


def require_finite(array: np.ndarray, what: str) -> None:
    """Raise CheckpointError when `array` holds NaN or infinity; `what` names the weight and its file."""
    for start in range(0, array.size, 1 << 24):  # parts, so that no mask as large as the array is held
        part = array.reshape(-1)[start : start + (1 << 24)]
        finite = np.isfinite(part)
        if not finite.all():
            place = start + int(np.argmin(finite))
            raise CheckpointError(
                f"{what} holds {part[place - start]} at element {place}: the model is damaged; fetch it again"
            )


def assemble(source: Source, progress: Callable[[float], None] | None = None) -> Weights:
    """All weights of `source` in float32; beside them no more than one piece is held."""
    spec = source.spec
    arrays = {row.name: np.empty(row.shape(spec), np.float32) for row in rows(spec)}
    wanted = list(pieces(spec))
    for done, (row, layer) in enumerate(wanted, 1):
        arrays[row.name][... if layer is None else layer] = source.read(row, layer)
        if progress is not None:
            progress(done / len(wanted))
    return from_dict({row.name: jnp.asarray(arrays.pop(row.name)) for row in rows(spec)}, spec)
