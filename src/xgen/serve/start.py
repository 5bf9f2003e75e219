"""From a MODEL to what the server serves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jax

from xgen.convert.adapters import require_adapter
from xgen.convert.description import Description
from xgen.convert.open import open_model
from xgen.errors import DataError, RecipeError
from xgen.infer.cache import token_bytes
from xgen.infer.engine import Engine
from xgen.infer.open import Opened, engine_of, open_template
from xgen.infer.program import Settings
from xgen.infer.timing import weights_read
from xgen.model import parameter_count
from xgen.recipe.schema import Compute
from xgen.serve.logs import note
from xgen.serve.replies import Memory
from xgen.serve.schemas import MOST_CHOICES
from xgen.serve.translate import Translator

if TYPE_CHECKING:
    from xgen.serve.app import Model

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Wanted:
    """A MODEL and how it is laid out.

    `window`: tokens of a prompt with its answer, None for as many as the model was trained on; `memory`: bytes of the
    key-value cache, None for the engine's own choice; `adapters`: LoRA folders by the name that they are asked for;
    `name`: what the model itself is asked for, None for its own name; `queue`: requests that wait besides those that
    have one of the `slots`. `chat`: with the model's chat template, or with `template` (see `open_template`).
    """

    model: str
    name: str | None = None
    adapters: Mapping[str, Path] | None = None
    slots: int = 8
    window: int | None = None
    page: int = 128
    chunk: int = 512
    memory: int | None = None
    int8_weights: bool = False
    int8_cache: bool = False
    precision: Precision = "bfloat16"
    queue: int = 256
    lenient: bool = False
    chat: bool = True
    template: str | None = None


class Loader:
    """Loads a model when it is called, after all that can be found wrong without its weights was looked for."""

    def __init__(self, wanted: Wanted) -> None:
        """Raises CheckpointError, DataError and RecipeError."""
        self._wanted = wanted
        self._description, self._source = open_model(wanted.model)
        self._settings = _settings(wanted, self._description)
        name, adapters = wanted.name or self._description.name, wanted.adapters or {}
        if name in adapters:
            raise RecipeError(f"the model and an adapter are both called {name!r}; give one another name with --name")
        for folder in adapters.values():
            require_adapter(folder)
        self.translator = Translator(
            self._description,
            name=name,
            window=self._settings.window,
            adapters=tuple(adapters),
            template=open_template(self._description, wanted.template) if wanted.chat else None,
            lenient=wanted.lenient,
            most_choices=min(MOST_CHOICES, wanted.queue + wanted.slots),
        )

    def engine(self, report: Callable[[str, float], None]) -> Engine:
        """The engine, warm and not yet started. `report` is told of each program and of the seconds it took."""
        return self._opened(report).engine

    def _opened(self, report: Callable[[str, float], None]) -> Opened:
        wanted = self._wanted
        return engine_of(
            self._description,
            self._source,
            self._settings,
            precision=wanted.precision,
            adapters=wanted.adapters,
            queue=wanted.queue,
            report=report,
        )

    def __call__(self) -> Model:
        """What a server serves, started; the log tells what was compiled."""
        from xgen.serve.app import Model  # needs Starlette, which the command line's other verbs do without

        opened = self._opened(lambda program, seconds: note("compiled", program=program, seconds=round(seconds, 3)))
        opened.engine.start()
        spec = replace(self._description.spec, compute=Compute(precision=self._wanted.precision))
        memory = Memory(
            device=jax.default_backend(),
            weight_bytes=weights_read(opened.program, spec, self._settings.int8_weights),
            token_bytes=token_bytes(spec, self._settings.int8_cache),
        )
        return Model(opened.engine, self.translator, parameter_count(spec), int(time.time()), memory)


def _settings(wanted: Wanted, description: Description) -> Settings:
    longest = description.context_length
    window = longest if wanted.window is None else wanted.window
    if window > longest:
        raise RecipeError(
            f"--window {window} is beyond the {longest} tokens that {description.name} was trained on; use no more"
        )
    tokens = None
    if wanted.memory is not None:
        spec = replace(description.spec, compute=Compute(precision=wanted.precision))
        tokens = wanted.memory // token_bytes(spec, wanted.int8_cache)
        if tokens < window:
            raise RecipeError(
                f"--memory of {wanted.memory} bytes holds {tokens} tokens, which is less than one window of {window}; "
                f"give at least {window * token_bytes(spec, wanted.int8_cache)} bytes or shorten --window"
            )
    return Settings(
        window=window,
        slots=wanted.slots,
        page=wanted.page,
        chunk=min(wanted.chunk, window),
        cache_tokens=tokens,
        int8_weights=wanted.int8_weights,
        int8_cache=wanted.int8_cache,
    )


def adapters_of(given: list[str]) -> dict[str, Path]:
    """Adapters as the command line has them, NAME=DIR. Raises DataError for anything else and for a name twice."""
    found: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise DataError(f"--adapter {text!r} must be NAME=DIR, as law=runs/law")
        if name in found:
            raise DataError(f"--adapter gives the name {name!r} twice; each needs its own")
        found[name] = Path(folder)
    return found
