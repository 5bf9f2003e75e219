"""Models in memory, to be written by any writer."""

from __future__ import annotations

import numpy as np
from small_models import weights_of

from xgen.convert.description import Description
from xgen.convert.pieces import TYPES
from xgen.model import Spec, Weights, as_dict
from xgen.model.weights import Weight


class MemorySource:
    """Weights in memory as a Source; `arrays` by row, of any type."""

    def __init__(self, spec: Spec, weights: Weights, dtype: str = "float32") -> None:
        self._spec = spec
        self.arrays = {name: np.asarray(array).astype(TYPES[dtype]) for name, array in as_dict(weights).items()}

    @property
    def spec(self) -> Spec:
        return self._spec

    def dtype(self, row: Weight, layer: int | None) -> np.dtype:  # noqa: ARG002 - a Source's signature
        return self.arrays[row.name].dtype

    def read(self, row: Weight, layer: int | None) -> np.ndarray:
        return self.arrays[row.name] if layer is None else self.arrays[row.name][layer]


def model_in_memory(spec: Spec, dtype: str = "float32", **told) -> tuple[Description, MemorySource]:
    """Random weights of `spec` and their description; `told` says what else the description has."""
    described = Description(**{"name": "small", "context_length": 1024, "dtype": dtype, **told}, **_of(spec))
    return described, MemorySource(spec, weights_of(spec), dtype)


def _of(spec: Spec) -> dict:
    return {"model": spec.model, "real_vocab": spec.real_vocab}
