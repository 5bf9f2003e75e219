"""`xgen convert`: a MODEL of one kind into one of another."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from xgen.convert.gguf_write import write_gguf
from xgen.convert.hf_write import write_hugging_face
from xgen.convert.native import write_native
from xgen.convert.open import is_gguf, is_hugging_face, open_model
from xgen.errors import CheckpointError
from xgen.model.weights import parameter_count

Form = Literal["hf", "gguf", "from-hf", "from-gguf"]
Progress = Callable[[float], None]

SHARD_BYTES = 2 * 10**9
"""Of a Hugging Face folder: small enough to be fetched again without much pain."""


def convert(
    model: str | Path,
    out: str | Path,
    form: Form,
    *,
    dtype: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write MODEL to `out`, which must not exist: as a Hugging Face folder ("hf"), as a GGUF file ("gguf"), or from one
    of these as a folder of XGen's own ("from-hf", "from-gguf"). Returns what was done, as `--json` prints it.

    `dtype` "auto" keeps the types that are stored. Raises CheckpointError for a model that the form cannot hold.
    """
    begin, target = time.perf_counter(), Path(out)
    _check_kind(Path(model), form)
    description, source = open_model(model)
    notes: tuple[str, ...] = ()
    if form == "hf":
        notes = write_hugging_face(description, source, target, dtype, shard_bytes, progress)
    elif form == "gguf":
        notes = write_gguf(description, source, target, dtype, progress)
    else:
        write_native(description, source, target, progress)
    return {
        "out": str(target),
        "form": form,
        "name": description.name,
        "parameters": parameter_count(description.spec),
        "dtype": description.dtype if dtype == "auto" else dtype,
        "context_length": description.context_length,
        "vocabulary": {"tokens": description.real_vocab, "rows": description.model.vocab_size},
        "tokenizer": description.tokenizer is not None,
        "repairs": list(description.repairs),
        "notes": list(notes),
        "bytes": sum(file.stat().st_size for file in ([target] if target.is_file() else target.rglob("*"))),
        "seconds": time.perf_counter() - begin,
    }


def _check_kind(model: Path, form: Form) -> None:
    if form == "from-hf" and not is_hugging_face(model):
        raise CheckpointError(f"{model} is no Hugging Face folder: it has no config.json; name the folder that has one")
    if form == "from-gguf" and not is_gguf(model):
        raise CheckpointError(f"{model} is no GGUF file; name one that ends in .gguf")
