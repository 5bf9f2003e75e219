"""XGen's own models: a run's checkpoints, and the folder that other people's models are converted into.

A converted folder has `model.json` (the description), `tokenizer.json` if the model has a tokenizer, and one
checkpoint, `checkpoints/000000000000000`, with one safetensors file a row of the weights table.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveInt, ValidationError, model_validator

from xgen.checkpoints.manifest import choose, folder_name, require_whole, split_model, write_manifest
from xgen.checkpoints.stored import open_stored, read_whole
from xgen.checkpoints.weights import require_fit
from xgen.convert.description import Description, StoredType
from xgen.convert.output import Progress, staged
from xgen.convert.pieces import TYPES, Source, require_finite
from xgen.convert.safetensors_file import SafetensorsFile
from xgen.errors import CheckpointError
from xgen.model.spec import Spec
from xgen.model.weights import Weight, parameter_count, rows
from xgen.recipe.check import check_rope
from xgen.recipe.load import load_recipe
from xgen.recipe.schema import Model, Recipe, Section
from xgen.tokens.tokenizer import Tokenizer, load_tokenizer

DESCRIPTION = "model.json"
TOKENIZER = "tokenizer.json"
START = "start.json"
"""In a run folder: the description of the model that the run continues, in the form of `model.json`."""

_ALSO_IN_START = ("from", "weights_sha256")

TokenId = Annotated[int, Field(ge=0)]


class DescriptionFile(Section):
    """What `model.json` holds: a Description; of its tokenizer only the token that ends a document."""

    format: Literal[1] = 1
    name: str
    model: Model
    real_vocab: PositiveInt
    context_length: PositiveInt
    begin_id: TokenId | None
    bos_id: TokenId | None = None
    end_ids: tuple[TokenId, ...]
    pad_id: TokenId | None
    chat_template: str | None
    dtype: StoredType
    origin: dict[str, Any]
    repairs: tuple[str, ...]
    end_of_text: str | None

    @classmethod
    def of(cls, description: Description) -> DescriptionFile:
        facts = {field.name: vars(description)[field.name] for field in fields(description)}
        tokenizer: Tokenizer | None = facts.pop("tokenizer")
        end = None if tokenizer is None else tokenizer.decode([tokenizer.end_of_text])
        return cls(**facts, end_of_text=end)

    @classmethod
    def read(cls, file: Path, beside: tuple[str, ...] = ()) -> DescriptionFile:
        """`file` without the keys `beside`.

        Raises CheckpointError when it is missing, damaged, or describes no model that can be.
        """
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(facts, dict):
                raise ValueError("it is no JSON object")
            return cls.model_validate({key: value for key, value in facts.items() if key not in beside})
        except OSError as cause:
            raise CheckpointError(f"cannot read {file}: {cause.strerror or cause}; put it back") from cause
        except ValidationError as cause:
            fault = cause.errors()[0]
            where = ".".join(map(str, fault["loc"])) or "model"
            told = f"{where}: {fault['msg']}, got {fault['input']!r:.40}"
        except (ValueError, RecursionError) as cause:
            told = str(cause)
        raise CheckpointError(f"{file} describes no model that this XGen knows ({told}); convert the model again")

    def description(self, folder: Path) -> Description:
        """With the tokenizer that lies in `folder`, if the model has one."""
        facts: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields}
        del facts["format"]
        end = facts.pop("end_of_text")
        return Description(**facts, tokenizer=None if end is None else load_tokenizer(str(folder / TOKENIZER), end))

    @model_validator(mode="after")
    def _possible(self) -> DescriptionFile:
        model = self.model
        ids = [index for index in (self.begin_id, self.bos_id, *self.end_ids, self.pad_id) if index is not None]
        if max(self.real_vocab, *(index + 1 for index in ids), 0) > model.vocab_size:
            raise ValueError(f"{model.vocab_size} rows cannot hold the tokens and special ids")
        if model.heads % model.kv_heads or model.head_size % 2 or list(check_rope(model)):
            raise ValueError("heads, head size or rotary scaling do not fit each other")
        return self


def description_json(description: Description) -> dict[str, Any]:
    """What `model.json` holds, as JSON values."""
    return DescriptionFile.of(description).model_dump(mode="json")


class RunSource:
    """The weights of one checkpoint, of a run or of a converted folder, a layer of a row at a time."""

    def __init__(self, path: Path, spec: Spec) -> None:
        """Raises CheckpointError when files are missing or the checkpoint is not of a model of `spec`.

        The files' SHA-256 are compared at the first read.
        """
        self.spec = spec
        self._path, self._checked = path, False
        manifest = require_whole(path, contents=False)
        require_fit(manifest, spec)
        self._rows = open_stored(path, manifest)

    def dtype(self, row: Weight, layer: int | None) -> np.dtype:  # noqa: ARG002 - a row's layers have one type
        return self._rows[row.name].dtype

    def read(self, row: Weight, layer: int | None) -> np.ndarray:
        if not self._checked:
            require_whole(self._path)
            self._checked = True
        stored = self._rows[row.name]
        piece = read_whole(stored, stored.dtype) if layer is None else stored.read(layer, layer + 1)[0]
        place = "" if layer is None else f", layer {layer}"
        require_finite(piece, f"weight {row.name}{place} of {self._path}")
        return piece


def is_native(model: str) -> bool:
    """Whether `model` names a run folder or a converted one, or a checkpoint in it."""
    folder = _folder(model)
    return (folder / "recipe.toml").is_file() or (folder / DESCRIPTION).is_file()


def open_run(model: str) -> tuple[Description, RunSource]:
    """The description and the weights of `model`: a run folder (its newest checkpoint), a converted folder,
    DIR@TOKENS or DIR@STAGE. Raises CheckpointError when there is no such checkpoint or it is damaged."""
    description = describe_run(model)
    return description, RunSource(choose(model)[-1], description.spec)


def describe_run(model: str) -> Description:
    """The description that `open_run` gives."""
    folder = _folder(model)
    if not (folder / "recipe.toml").is_file():
        return DescriptionFile.read(folder / DESCRIPTION).description(folder)
    recipe, tokens = load_recipe(folder).recipe, int(choose(model)[-1].name)
    tokenizer = load_tokenizer(str(folder / TOKENIZER), recipe.tokenizer.end_of_text)
    start = DescriptionFile.read(folder / START, _ALSO_IN_START) if (folder / START).is_file() else None
    seen = [stage.length for n, stage in enumerate(recipe.stages) if recipe.stage_start(n) < tokens]
    before = [start.context_length] if start else []
    return Description(
        name=recipe.name,
        model=start.model if start is not None and tokens == 0 else recipe.model,  # before the run changed its rope
        real_vocab=tokenizer.size,
        context_length=max(seen + before, default=recipe.stages[0].length),
        tokenizer=tokenizer,
        begin_id=start.begin_id if start else None,
        bos_id=start.bos_id if start else None,
        end_ids=start.end_ids if start else (tokenizer.end_of_text,),
        pad_id=start.pad_id if start else tokenizer.end_of_text,
        chat_template=start.chat_template if start else None,
        origin=_origin(folder, recipe, tokens, start),
    )


def write_native(description: Description, source: Source, out: Path, progress: Progress | None = None) -> None:
    """Write the model as the folder `out`, which must not exist; it is there whole or not at all.

    A row's type is kept; where its layers have several, it becomes float32, which holds them all.
    """
    spec = source.spec
    total, done = parameter_count(spec), 0
    text = json.dumps(description_json(description), indent=1, allow_nan=False)
    with staged(out) as folder:
        checkpoint = folder / "checkpoints" / folder_name(0)
        (checkpoint / "weights").mkdir(parents=True)
        for row in rows(spec):
            layers = range(spec.model.layers) if row.axes[0] == "layer" else [None]
            types = {source.dtype(row, layer) for layer in layers}
            dtype = types.pop() if len(types) == 1 else TYPES["float32"]
            file = checkpoint / "weights" / f"{row.name}.safetensors"
            with SafetensorsFile(file, {row.name: (dtype, row.shape(spec))}) as stream:
                for layer in layers:
                    piece = source.read(row, layer)
                    stream.write(piece)
                    done += piece.size
                    if progress is not None:
                        progress(done / total)
        shapes = {row.name: list(row.shape(spec)) for row in rows(spec)}
        facts = {"tokens": 0, "step": 0, "stage": "", "storage": "safetensors", "shapes": shapes}
        write_manifest(checkpoint, facts)
        if description.tokenizer is not None:
            description.tokenizer.save(folder / TOKENIZER)
        (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def _origin(folder: Path, recipe: Recipe, tokens: int, start: DescriptionFile | None) -> dict[str, Any]:
    """What a run's checkpoint of `tokens` came from."""
    spent = [(stage, min(stage.spent, tokens - recipe.stage_start(n))) for n, stage in enumerate(recipe.stages)]
    origin: dict[str, Any] = {
        "kind": "run",
        "recipe": recipe.name,
        "stages": [{"name": s.name, "length": s.length, "tokens": part} for s, part in spent if part > 0],
        "data": dict(recipe.data.sources),
        "tokens": tokens,
    }
    result = folder / "result.json"
    if tokens == recipe.total_tokens and result.is_file():  # it tells of the last checkpoint only
        try:
            origin["bits_per_byte"] = json.loads(result.read_text(encoding="utf-8"))["bits_per_byte"]
        except (OSError, ValueError, KeyError, TypeError) as cause:
            raise CheckpointError(f"{result} is damaged ({cause}); delete it, or resume the run to make it") from cause
    if start is not None:
        origin["continued_from"] = start.name
        if "license" in start.origin:  # it holds for what is made from the model
            origin["license"] = start.origin["license"]
    return origin


def _folder(model: str) -> Path:
    return Path(split_model(model)[0])
