"""The model that a run continues: taken over once, so that a resume needs nothing but the run's own folder.

Its weights become the checkpoint at token 0, all else that is known of it `start.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from xgen.convert.description import Description
from xgen.convert.native import START as START_FILE
from xgen.convert.native import description_json
from xgen.convert.pieces import Source
from xgen.errors import CheckpointError
from xgen.recipe.base import Base
from xgen.recipe.schema import Model, Recipe


@dataclass(frozen=True)
class Opened:
    """A MODEL to be continued, before its weights are read; `place` is what the user called it."""

    place: str
    description: Description
    source: Source

    @property
    def base(self) -> Base:
        tokenizer = self.description.tokenizer
        end_of_text = tokenizer.decode([tokenizer.end_of_text]) if tokenizer is not None else None
        return Base(self.place, self.description.model, self.description.context_length, end_of_text)


@dataclass(frozen=True)
class Start:
    """What a run knows of the model that it continues."""

    place: str
    model: Model
    context_length: int
    sha256: str

    def rope_changed(self, recipe: Recipe) -> bool:
        before, now = self.model, recipe.model
        return (before.rope_theta, before.rope_scaling) != (now.rope_theta, now.rope_scaling)


def open_start(model: str | Path) -> Opened:
    """MODEL of any kind, to be continued. Raises CheckpointError when it is none."""
    from xgen.convert.open import open_model

    return Opened(str(model), *open_model(model))


def start_json(opened: Opened, weights_sha256: str) -> dict[str, Any]:
    """What `start.json` holds: the model's description, where it was, and the SHA-256 of its weights."""
    facts = {"from": opened.place, "weights_sha256": weights_sha256}
    return {**description_json(opened.description), **facts}


def read_start(folder: Path) -> Start | None:
    """The model that the run in `folder` continues; None when it began with fresh weights."""
    path = folder / START_FILE
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        model = Model.model_validate(value["model"])
        return Start(value["from"], model, value["context_length"], value["weights_sha256"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as cause:
        raise CheckpointError(
            f"cannot read {path} ({cause}), which says what model the run continues; put it back as it was written"
        ) from cause
