"""The weights of a Hugging Face folder: which files hold them, whether they fit the table, and reading them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol, cast

import numpy as np
from safetensors import SafetensorError, safe_open

from xgen.checkpoints.stored import SAFETENSORS_TYPES
from xgen.convert.description import StoredType
from xgen.convert.json_file import LARGEST, read_json
from xgen.convert.pieces import foreign_name, foreign_shape, from_foreign, pieces, require_finite
from xgen.convert.torch_bin import tensors_of
from xgen.errors import CheckpointError
from xgen.model.spec import Spec
from xgen.model.weights import Weight

PLACES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where transformers looks for weights, first come first served."""

HARMLESS = (
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.(inv_freq|cos_cached|sin_cached)",
    r"model\.rotary_emb\.inv_freq",
)
"""Tables that old releases stored and that follow from `rope_theta`."""

PART = 8 << 20
"""Bytes copied at once out of a mapped file: what is mapped counts as resident memory until it is closed."""

SHOWN = 10
"""Of many faults an error shows the first so many."""

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Tensor(Protocol):
    """One tensor in a file."""

    @property
    def path(self) -> Path: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def read(self) -> np.ndarray: ...


@dataclass(frozen=True)
class SafeTensor:
    """A tensor in a safetensors file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        """All of it, mapped and closed part by part."""
        found = np.empty(self.shape, self.dtype)
        count = max(1, PART // max(1, found[:1].nbytes))
        for first in range(0, self.shape[0], count):
            last = min(first + count, self.shape[0])
            with _opened(self.path) as file:
                found[first:last] = file.get_slice(self.name)[first:last]
        return found


class HuggingFaceSource:
    """Weights of a folder, whose names and shapes are known to fit `spec`."""

    def __init__(self, spec: Spec, tensors: Mapping[str, Tensor]) -> None:
        self._spec, self._tensors = spec, tensors

    @property
    def spec(self) -> Spec:
        return self._spec

    def dtype(self, row: Weight, layer: int | None) -> np.dtype:
        return self._tensors[foreign_name(row.hugging_face, layer)].dtype

    def read(self, row: Weight, layer: int | None) -> np.ndarray:
        name = foreign_name(row.hugging_face, layer)
        array = read_tensor(name, self._tensors[name])
        if name == _EMBEDDING and self._spec.model.tied_embeddings and _HEAD in self._tensors:
            self._require_tied(array)
        return from_foreign(row, array, self._spec)

    def _require_tied(self, embedding: np.ndarray) -> None:
        head = read_tensor(_HEAD, self._tensors[_HEAD])
        same = (head == embedding).all(axis=1)
        if not same.all():
            where = f"{_HEAD} of {self._tensors[_HEAD].path} differs from {_EMBEDDING} in row {int(np.argmin(same))}"
            remedy = "set tie_word_embeddings in config.json to false if the model was trained so"
            raise CheckpointError(f"{where}, though they should be tied; {remedy}")


def tensors_in(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by name; none is read. Raises CheckpointError when the file is missing or damaged."""
    if path.suffix == ".bin":
        return dict(tensors_of(path))
    found: dict[str, Tensor] = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            part = file.get_slice(name)
            kind = part.get_dtype()
            if kind not in SAFETENSORS_TYPES:
                known = ", ".join(SAFETENSORS_TYPES)
                raise CheckpointError(
                    f"{name!a:.100} of {path} is stored as {kind}; known are {known}: get one of those"
                )
            found[name] = SafeTensor(path, name, tuple(part.get_shape()), SAFETENSORS_TYPES[kind])
    return found


def read_tensor(name: str, tensor: Tensor) -> np.ndarray:
    """The values of `tensor`. Raises CheckpointError when its file is damaged or holds what is no finite number."""
    try:
        array = tensor.read()
    except (OSError, SafetensorError) as cause:
        raise CheckpointError(f"cannot read {name} of {tensor.path}: {cause}; fetch it again") from cause
    require_finite(array, f"{name} of {tensor.path}")
    return array


def source_of(folder: Path, spec: Spec) -> tuple[HuggingFaceSource, tuple[str, ...]]:
    """The weights of the model in `folder`, every name, shape and type checked; none is read. And what was passed over.

    Raises CheckpointError that lists what is missing, unknown or misshapen.
    """
    tensors, notes = _find(folder)
    idle = [name for name in tensors if any(re.fullmatch(pattern, name) for pattern in HARMLESS)]
    if idle:
        notes.append(
            f"{len(idle)} stored tables of rotary positions, as {idle[0]}, are left out: rope_theta gives them"
        )
    _require_fit(folder, {name: tensor for name, tensor in tensors.items() if name not in set(idle)}, spec)
    return HuggingFaceSource(spec, tensors), tuple(notes)


def stored_type(source: HuggingFaceSource) -> StoredType:
    """The type that most of the values are stored in."""
    counts: Counter[str] = Counter()
    for row, layer in pieces(source.spec):
        counts[source.dtype(row, layer).name] += math.prod(row.shape(source.spec))
    return cast(StoredType, counts.most_common(1)[0][0])


def _find(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    there = [place for place in PLACES if (folder / place).exists()]
    if not there:
        raise CheckpointError(
            f"{folder} holds no weights: it needs one of {', '.join(PLACES)}; fetch the model's other files too"
        )
    notes = [f"{place} is left unread: {there[0]} holds the weights" for place in there[1:]]
    place = folder / there[0]
    if place.suffix != ".json":
        return tensors_in(place), notes
    listed = _listed(place)
    tensors: dict[str, Tensor] = {}
    for file in dict.fromkeys(listed.values()):
        for name, tensor in tensors_in(folder / file).items():
            if name in tensors:
                raise CheckpointError(f"{name!a:.100} is in {tensors[name].path.name} and in {file}; fetch them again")
            tensors[name] = tensor
    lost = [name for name, file in listed.items() if name not in tensors or tensors[name].path.name != file]
    if lost:
        _refuse(place, [f"{name!a:.100} is not in {listed[name]}" for name in lost], "its files and it do not agree")
    return tensors, notes


def _listed(index: Path) -> dict[str, str]:
    """Tensor -> file of the index at `index`; files are of its own folder. (A file itself may be a link: the hub's
    cache on disk is made of links.)"""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index} has no weight_map of tensors to files; fetch it again")
    suffix = ".safetensors" if ".safetensors" in index.name else ".bin"
    for file in listed.values():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+", file) or not file.endswith(suffix):
            raise CheckpointError(
                f"{index} names the file {file!a:.100}: only {suffix} files of the same folder are read; fetch it again"
            )
    return listed


def _opened(path: Path) -> safe_open:
    try:
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}; fetch the model's missing files")
        with path.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        if header > LARGEST:
            raise CheckpointError(
                f"{path} states a header of {header} bytes; no model's is over {LARGEST}; fetch it again"
            )
        return safe_open(path, "numpy")
    except (OSError, SafetensorError) as cause:
        raise CheckpointError(f"{path} is no whole safetensors file: {cause}; fetch it again") from cause


def _require_fit(folder: Path, tensors: Mapping[str, Tensor], spec: Spec) -> None:
    """Raise CheckpointError unless `tensors` are those of the table, of its shapes."""
    wanted = {foreign_name(row.hugging_face, layer): foreign_shape(row, spec) for row, layer in pieces(spec)}
    wrong = [
        f"{name} has shape {tensors[name].shape}, not {shape}" if name in tensors else f"{name} is missing"
        for name, shape in wanted.items()
        if name not in tensors or tensors[name].shape != shape
    ]
    unknown = tensors.keys() - wanted.keys()
    if spec.model.tied_embeddings and _HEAD in unknown:
        unknown.remove(_HEAD)
        if (shape := tensors[_HEAD].shape) != wanted[_EMBEDDING]:
            wrong.append(f"{_HEAD} has shape {shape}, not {wanted[_EMBEDDING]}")
    if wrong == [f"{_HEAD} is missing"] and not unknown:
        wrong = [f"{_HEAD} is missing: set tie_word_embeddings to true if the model was trained so"]
    wrong += [f"{name!a:.100} is unknown" for name in sorted(unknown)]
    if wrong:
        _refuse(folder, wrong, "its weights do not fit its config.json")
    _require_stored(folder, {name: tensors[name] for name in wanted})


def _require_stored(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError when `tensors` are larger than their files: a small .bin may show one storage as many
    tensors, of which only the head may honestly be the embedding."""
    needed = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for name, tensor in tensors.items() if name != _HEAD)
    stored = sum(path.stat().st_size for path in {tensor.path for tensor in tensors.values()})
    if needed > stored:
        raise CheckpointError(
            f"{folder}: its weights take {needed:,} bytes and its files have {stored:,}: some share what is stored; "
            "save it again with every tensor for itself"
        )


def _refuse(place: Path, faults: list[str], why: str) -> NoReturn:
    more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    raise CheckpointError(f"{place}: {why}, {count}: {'; '.join(faults[:SHOWN])}{more}")
