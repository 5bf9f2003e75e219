"""GGUF files for the tests: read and written by the gguf library, independently of our own reader and writer."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from memory_source import MemorySource, model_in_memory
from small_models import SCALINGS, spec_of

from xgen.convert.description import Description
from xgen.convert.gguf_write import write_gguf
from xgen.model import Spec

SHAPES = {
    "xgen": {},
    "grouped_tied": {"kv_heads": 2, "tied_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True, "kv_heads": 2},
}
ROPES = {
    "none": {},
    "linear": SCALINGS["linear"],
    "llama3": {"kind": "llama3", "factor": 8.0, "original_length": 64},
    "yarn": {"kind": "yarn", "factor": 4.0, "original_length": 256},
    "yarn_sharp": {"kind": "yarn", "factor": 4.0, "original_length": 256, "attention_factor": 1.5},
}
"""What GGUF can hold of the shapes, and of rope scaling."""


def gguf_spec(shape: str = "xgen", rope: str = "none", **changes) -> Spec:
    """A two-layer model whose heads have 16 planes, rows of 64; all rows of the vocabulary are tokens."""
    sizes = {"hidden_size": 64, "heads": 4, "head_size": 32, "mlp_size": 96, "vocab_size": 384}
    found = spec_of(rope_scaling=ROPES[rope], **{**sizes, **SHAPES[shape], **changes})
    return Spec(found.model, found.model.vocab_size, found.compute)


def small_file(path: Path, quantisation: str = "f32", spec: Spec | None = None) -> tuple[Description, MemorySource]:
    """Write a small model without a tokenizer to `path`."""
    description, source = model_in_memory(spec or gguf_spec())
    write_gguf(description, source, path, quantisation)
    return description, source


def rewritten(path: Path, fields: dict | None = None, tensors: dict | None = None, kinds: dict | None = None) -> Path:
    """`path` with some fields and tensors replaced, added, or left out (None), by the gguf library.

    `kinds` says of which type the bytes of a tensor are.
    """
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    found = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    arrays = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    stored = {tensor.name: tensor.tensor_type for tensor in reader.tensors} | (kinds or {})
    found |= fields or {}
    writer = gguf.GGUFWriter(path.with_name("rewritten.gguf"), found.get("general.architecture") or architecture)
    for key, value in found.items():
        if value is not None and key != "general.architecture":
            kind = gguf.GGUFValueType.get_type(value)
            unsigned = kind == gguf.GGUFValueType.INT32
            writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if unsigned else kind)
    for name, array in (arrays | (tensors or {})).items():
        if array is not None:
            writer.add_tensor(name, array, raw_dtype=stored.get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("rewritten.gguf")
