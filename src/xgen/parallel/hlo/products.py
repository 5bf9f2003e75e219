"""FLOPs of the two instructions that multiply matrices. A multiplication and its addition are two."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from xgen.parallel.hlo.text import Array, Computation, HloError, Instruction

_LABELS = re.compile(r"([0-9a-z?]+)_([0-9a-z?]+)->([0-9a-z?]+)")


def dot_flops(computation: Computation, one: Instruction) -> float:
    """2 x elements of the result x the contracted sizes."""
    if "sparsity" in one.attributes:
        raise HloError(f"{one}: sparse products are not counted")
    left = _operand(computation, one, 0)
    contracted: int = math.prod(left.dims[n] for n in one.integers("lhs_contracting_dims"))
    return 2.0 * one.arrays[0].elements * contracted


def convolution_flops(computation: Computation, one: Instruction) -> float:
    """As TPU's compiler writes every product: 2 x batch x output features x input features x the pairs of a place in
    the output and one in the window that meet the input, not its padding or its holes."""
    labels = _LABELS.fullmatch(one.attribute("dim_labels"))
    if labels is None:
        raise HloError(f"{one}: dim_labels {one.attribute('dim_labels')!r} are not understood")
    left = dict(zip(labels[1], _operand(computation, one, 0).dims, strict=True))
    kernel = dict(zip(labels[2], _operand(computation, one, 1).dims, strict=True))
    out = dict(zip(labels[3], one.arrays[0].dims, strict=True))
    spatial = sorted(label for label in out if label.isdigit())
    windows = _windows(one, len(spatial))
    pairs: int = math.prod(
        _meeting(window, left[label], kernel[label], out[label]) for window, label in zip(windows, spatial, strict=True)
    )
    batch_groups = int(one.attributes.get("batch_group_count", "1"))
    # The kernel's own input features are those of one feature group.
    return float(2 * (left["b"] // batch_groups) * out["f"] * kernel["i"] * pairs)


@dataclass(frozen=True)
class _Window:
    """Of one spatial dimension."""

    size: int
    stride: int = 1
    low: int = 0
    left_dilation: int = 1
    right_dilation: int = 1


def _windows(one: Instruction, spatial: int) -> list[_Window]:
    text = one.attributes.get("window", "{}").strip("{}")
    fields = dict(field.split("=", 1) for field in text.split())
    unknown = set(fields) - {"size", "stride", "pad", "lhs_dilate", "rhs_dilate", "rhs_reversal"}
    if unknown or (spatial and "size" not in fields):
        raise HloError(f"{one}: window {text!r} is not understood")

    def each(key: str, default: str) -> list[str]:
        found = fields[key].split("x") if key in fields else [default] * spatial
        if len(found) != spatial:
            raise HloError(f"{one}: window {text!r} has other than {spatial} dimensions")
        return found

    keys = (("size", "1"), ("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1"))
    columns = zip(*(each(key, default) for key, default in keys), strict=True)
    return [
        _Window(int(size), int(stride), int(pad.split("_")[0]), int(left), int(right))
        for size, stride, pad, left, right in columns
    ]


def _meeting(window: _Window, left: int, kernel: int, out: int) -> int:
    """Pairs (output place, window place) whose input place is there: not padding, not a hole of the dilation."""
    if window.size != kernel:
        raise HloError(f"a window of {window.size} over a kernel of {kernel}")
    places = np.arange(out) * window.stride - window.low
    count = 0
    for offset in range(kernel):
        at = places + offset * window.right_dilation
        inside = (at >= 0) & (at < (left - 1) * window.left_dilation + 1) & (at % window.left_dilation == 0)
        count += int(inside.sum())
    return count


def _operand(computation: Computation, one: Instruction, number: int) -> Array:
    return computation[one.operands[number]].arrays[0]
