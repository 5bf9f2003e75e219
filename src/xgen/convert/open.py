"""Any MODEL, opened: a run folder or one of its checkpoints, a converted folder, a Hugging Face folder, a GGUF file."""

from __future__ import annotations

from pathlib import Path

from xgen.convert.description import Description
from xgen.convert.gguf_read import open_gguf
from xgen.convert.hf_read import open_hugging_face
from xgen.convert.native import is_native, open_run
from xgen.convert.pieces import Source
from xgen.errors import CheckpointError


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def is_hugging_face(path: Path) -> bool:
    return (path / "config.json").is_file()


def open_model(model: str | Path) -> tuple[Description, Source]:
    """The description and the weights of MODEL; nothing large is read yet.

    Raises CheckpointError when it is none of the kinds, is damaged, or is of an architecture that is not LLaMA's.
    """
    path = Path(model)
    if is_gguf(path):
        return open_gguf(path)
    if is_native(str(model)):
        return open_run(str(model))
    if is_hugging_face(path):
        return open_hugging_face(path)
    raise CheckpointError(_what_it_is(path))


def _what_it_is(path: Path) -> str:
    kinds = "a run folder, DIR@TOKENS or DIR@STAGE, a folder with config.json and weights, or a .gguf file"
    if path.is_file():
        return f"{path} is no model: a file must be GGUF and end in .gguf; a MODEL is {kinds}"
    if path.is_dir():
        return f"{path} holds no model (no recipe.toml, model.json or config.json); a MODEL is {kinds}"
    return f"there is no model {path}; a MODEL is {kinds}"
