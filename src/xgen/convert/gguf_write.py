"""A model as a GGUF file of llama.cpp's "llama" architecture."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from xgen.convert.description import Description
from xgen.convert.gguf_fields import (
    ARCHITECTURE,
    CONTEXT,
    COUNTS,
    FACTORS,
    NUMBERS,
    SCALING,
    interleaved,
    own_sharpening,
    rotary_factors,
    rotary_heads,
)
from xgen.convert.gguf_header import library
from xgen.convert.output import Progress, require_free, staged
from xgen.convert.pieces import TYPES, Piece, Source, foreign_name, foreign_shape, pieces, to_foreign
from xgen.convert.safetensors_file import cast
from xgen.errors import CheckpointError, DataError
from xgen.model.weights import parameter_count
from xgen.recipe.schema import Model
from xgen.tokens.llama_cpp import to_gguf

# Quantisation -> what llama.cpp calls a file of mostly that.
QUANTISATIONS = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_KINDS = {"F32": TYPES["float32"], "F16": TYPES["float16"], "BF16": TYPES["bfloat16"]}

_PART = 1 << 20
"""Elements turned round and cast at once: 4 MiB in float32."""

_ONLY = {"circuits": "sequential", "activation": "swiglu", "norm": "rms"}
_TOKENIZER = "tokenizer.ggml."


class _Tensor(NamedTuple):
    name: str
    piece: Piece
    shape: tuple[int, ...]
    kind: str


def write_gguf(
    description: Description, source: Source, out: Path, quantisation: str = "auto", progress: Progress | None = None
) -> tuple[str, ...]:
    """Write the file `out`, whole or not at all; returns what the user should know of it, a sentence each.

    `quantisation` is one of QUANTISATIONS, or "auto" for the types that are stored. Vectors are always float32, as
    llama.cpp needs them. Raises CheckpointError for a model that llama.cpp's LLaMA cannot compute or a value too large
    for its type, DataError when `out` exists or llama.cpp cannot tokenize as the model's tokenizer does, StorageError
    when it cannot be written, XgenError when the gguf library is not installed.
    """
    if quantisation not in (*QUANTISATIONS, "auto"):
        raise DataError(f"quantisation {quantisation!r} is not known; use auto, {', '.join(QUANTISATIONS)}")
    require_free(out)
    _check_expressible(description.model)
    tensors = [_tensor(piece, source, quantisation) for piece in pieces(source.spec)]
    fields = _fields(description, tensors)
    gguf = library()
    with staged(out) as partial:
        writer = gguf.GGUFWriter(partial, ARCHITECTURE)
        for key, (value, kind) in fields.items():
            writer.add_key_value(key, value, kind)
        if description.model.rope_scaling.kind == "llama3":
            _declare(writer, FACTORS, (description.model.head_size // 2,), "F32")
        for tensor in tensors:
            _declare(writer, tensor.name, tensor.shape, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with partial.open("ab") as file:
            _pad(file)
            if description.model.rope_scaling.kind == "llama3":
                file.write(rotary_factors(description.model).tobytes())
                _pad(file)
            _write_weights(file, tensors, source, progress or (lambda _: None))
    return _notes(description, tensors, quantisation)


def _check_expressible(model: Model) -> None:
    """Raise CheckpointError for what llama.cpp's llama does not compute."""
    values = model.model_dump()
    wrong = [(f"model.{key}", values[key], repr(wanted)) for key, wanted in _ONLY.items() if values[key] != wanted]
    scaling = model.rope_scaling
    if scaling.kind == "dynamic":
        wrong.append(("model.rope_scaling.kind", "dynamic", "none, linear, llama3 and yarn"))
    if scaling.kind == "yarn" and (scaling.low_turns, scaling.high_turns) != (1, 32):
        turns = f"{scaling.low_turns:g} and {scaling.high_turns:g}"
        wrong.append(("model.rope_scaling.low_turns and high_turns", turns, "1 and 32 with yarn"))
    for key, found, wanted in wrong:
        raise CheckpointError(
            f"{key} is {found!r}: llama.cpp's LLaMA has {wanted} only, so this model has no GGUF form; "
            "keep it as a run or as XGen's own folder"
        )


def _tensor(piece: Piece, source: Source, quantisation: str) -> _Tensor:
    row, layer = piece
    shape = foreign_shape(row, source.spec)
    if len(shape) == 1:
        kind = "F32"
    elif quantisation == "auto":
        stored = source.dtype(row, layer)
        [kind] = [name for name, dtype in _KINDS.items() if dtype == stored]
    elif quantisation == "q8_0":
        kind = "F16" if shape[1] % 32 else "Q8_0"
    else:
        kind = quantisation.upper()
    return _Tensor(foreign_name(row.gguf, layer), piece, shape, kind)


def _notes(description: Description, tensors: list[_Tensor], quantisation: str) -> tuple[str, ...]:
    notes = []
    if description.tokenizer is None:
        notes.append(
            "the model has no tokenizer, so none was written: programs over llama.cpp that pass token ids can use the "
            "file, its own server and command line cannot"
        )
    other = [tensor.name for tensor in tensors if quantisation == "q8_0" and tensor.kind == "F16"]
    if other:
        shown = ", ".join(other[:4]) + (f" and {len(other) - 4} more" if len(other) > 4 else "")
        notes.append(f"float16 instead of q8_0, for their rows are no multiples of 32: {shown}")
    return tuple(notes)


def _fields(description: Description, tensors: list[_Tensor]) -> dict[str, tuple[Any, Any]]:
    """Key -> value and its type, all that llama.cpp's own converter writes for a llama."""
    gguf = library()
    kinds = gguf.GGUFValueType
    model = description.model.model_dump()
    matrices = Counter(tensor.kind for tensor in tensors if len(tensor.shape) > 1)
    mostly = QUANTISATIONS[matrices.most_common(1)[0][0].lower()]
    count = parameter_count(description.spec)
    fields: dict[str, Any] = {
        "general.type": "model",
        "general.name": description.name,
        "general.license": description.origin.get("license"),
        "general.size_label": gguf.size_label(count, count, 0, 0),
        "general.file_type": int(gguf.LlamaFileType[mostly]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        CONTEXT: description.context_length,
        **{key: model[field] for key, field in COUNTS.items()},
        **{key: float(model[field]) for key, field in NUMBERS.items()},
        **_scaling(description.model),
        **_tokenizer(description),
    }
    types = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING, list: kinds.ARRAY}
    return {key: (value, types[type(value)]) for key, value in fields.items() if value is not None}


def _scaling(model: Model) -> dict[str, Any]:
    scaling = model.rope_scaling
    if scaling.kind not in ("linear", "yarn"):
        return {}
    fields: dict[str, Any] = {f"{SCALING}type": scaling.kind, f"{SCALING}factor": scaling.factor}
    if scaling.kind == "yarn":
        fields[f"{SCALING}original_context_length"] = scaling.original_length
        own = own_sharpening(scaling.factor)
        if not math.isclose(scaling.attention_factor, own):
            fields[f"{SCALING}attn_factor"] = scaling.attention_factor / own
    return fields


def _tokenizer(description: Description) -> dict[str, Any]:
    tokenizer, ends = description.tokenizer, description.end_ids
    if tokenizer is None:
        return {f"{_TOKENIZER}model": "no_vocab"}
    tokens = to_gguf(tokenizer.document, description.model.vocab_size)
    first_end = ends[0] if ends else tokenizer.end_of_text
    fields = {
        "model": tokens.model,
        "pre": tokens.pre,
        "tokens": tokens.tokens,
        "token_type": tokens.types,
        "scores": tokens.scores,
        "merges": tokens.merges or None,
        "add_space_prefix": tokens.add_space_prefix,
        # Always stated: llama.cpp's own defaults are ids of other people's vocabularies.
        "bos_token_id": first_end if description.named_begin is None else description.named_begin,
        "eos_token_id": first_end,
        "eot_token_id": ends[1] if len(ends) > 1 else None,
        "eom_token_id": ends[2] if len(ends) > 2 else None,
        "padding_token_id": description.pad_id,
        "add_bos_token": description.begin_id is not None,
        "add_eos_token": False,
    }
    if len(ends) > 3:
        raise CheckpointError(f"the model has {len(ends)} end tokens; GGUF has room for three")
    stated = {f"{_TOKENIZER}{key}": value for key, value in fields.items()}
    return stated | {"tokenizer.chat_template": description.chat_template}


def _declare(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    """Add a tensor to the header; `shape` has the slowest axis first."""
    gguf = library()
    number = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[number]
    # Types that are not bytes keep the library from taking the shape for one of bytes.
    writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * block_bytes, number)


def _write_weights(file: BinaryIO, tensors: list[_Tensor], source: Source, progress: Progress) -> None:
    total, done = parameter_count(source.spec), 0
    for tensor in tensors:
        row, layer = tensor.piece
        array = to_foreign(row, source.read(row, layer))
        if (heads := rotary_heads(row, source.spec.model)) is not None:
            array = interleaved(array, heads)
        step = max(1, _PART // math.prod(array.shape[1:]))
        for start in range(0, len(array), step):
            file.write(_stored(np.ascontiguousarray(array[start : start + step]), tensor).tobytes())
        _pad(file)
        done += array.size
        del array  # so that no more than one piece is held while the next is read
        progress(done / total)


def _stored(part: np.ndarray, tensor: _Tensor) -> np.ndarray:
    if tensor.kind != "Q8_0":
        return cast(part, _KINDS[tensor.kind], tensor.name)
    gguf = library()
    part = part.astype(np.float32).reshape(1, -1)  # as one row: the library takes 16 rows at a time
    largest = float(np.abs(part).max())
    if largest / 127 > float(np.finfo(np.float16).max):  # the scale of a block is a float16
        raise CheckpointError(f"{tensor.name} holds {largest:g}, too large for q8_0; choose bf16 or f32")
    quantised: np.ndarray = gguf.quantize(part, gguf.GGMLQuantizationType.Q8_0)
    return quantised


def _pad(file: BinaryIO) -> None:
    """Zeros to the next place where a tensor may begin."""
    file.write(bytes(-file.tell() % library().GGUF_DEFAULT_ALIGNMENT))
