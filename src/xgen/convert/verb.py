"""`xgen convert`: a MODEL of one kind into one of another."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from xgen.convert.gguf_write import write_gguf
from xgen.convert.hf_write import write_hugging_face
from xgen.convert.native import is_native, write_native
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
    _check_kind(Path(model), target, form)
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


def _check_kind(model: Path, out: Path, form: Form) -> None:
    """Raise CheckpointError when MODEL or `out` is not what the verb is for."""
    kinds = {"from-hf": is_hugging_face(model), "from-gguf": is_gguf(model), "hf": is_native(str(model))}
    if not kinds.get(form, True) and form != "hf" and (model.exists() or form == "from-gguf"):
        wanted = "a folder with config.json" if form == "from-hf" else "a GGUF file, which ends in .gguf"
        other = next((verb for verb, fits in kinds.items() if fits), None)
        what = {
            "from-hf": "it is a Hugging Face folder",
            "from-gguf": "it is a GGUF file",
            "hf": "it is XGen's own already",
        }
        told = f"{what[other]}, which `xgen convert {other}` takes" if other else "name another"
        if not model.exists():
            told = "there is no such file"
        raise CheckpointError(f"{model}: `xgen convert {form}` takes {wanted}; {told}")
    if (form == "gguf") != (out.suffix == ".gguf"):
        named = "must end in .gguf" if form == "gguf" else "is a folder, and only files of GGUF end in .gguf"
        raise CheckpointError(f"{out}: what `xgen convert {form}` makes {named}; choose another name")
