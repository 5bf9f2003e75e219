"""A MODEL, opened for the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from xgen.convert.adapters import merge_adapter, require_adapter
from xgen.convert.description import Description
from xgen.convert.open import open_model
from xgen.convert.pieces import Source, assemble
from xgen.errors import DataError
from xgen.infer.engine import Engine
from xgen.infer.program import Compiled, Settings, build
from xgen.infer.quantise import serve_from
from xgen.parallel.hardware import use_compilation_cache
from xgen.recipe.schema import Compute
from xgen.tokens.chat import ChatTemplate


@dataclass(frozen=True)
class Opened:
    """An engine, not yet started, with what it is an engine of."""

    engine: Engine
    program: Compiled
    description: Description


def open_engine(
    model: str | Path,
    settings: Settings | None = None,
    *,
    precision: Literal["float32", "bfloat16"] = "bfloat16",
    adapters: Mapping[str, str | Path] | None = None,
    queue: int = 256,
    report: Callable[[str, float], None] | None = None,
) -> Opened:
    """The engine of MODEL (see `xgen.load`), its programs compiled or taken from the cache of compiled programs.

    `settings`: None for those of `Settings` with the model's context length as window. `adapters`: LoRA folders by
    name. `report` is told of each program and of the seconds it took. Raises CheckpointError when there is no such
    model or adapter, RecipeError for settings that contradict it.
    """
    description, source = open_model(model)
    chosen = settings or Settings(window=description.context_length)
    return engine_of(description, source, chosen, precision=precision, adapters=adapters, queue=queue, report=report)


def engine_of(
    description: Description,
    source: Source,
    settings: Settings,
    *,
    precision: Literal["float32", "bfloat16"] = "bfloat16",
    adapters: Mapping[str, str | Path] | None = None,
    queue: int = 256,
    report: Callable[[str, float], None] | None = None,
) -> Opened:
    """`open_engine` of a model whose description and weights `open_model` gave."""
    use_compilation_cache()
    spec = replace(description.spec, compute=Compute(precision=precision))
    if adapters:
        for folder in adapters.values():
            require_adapter(Path(folder))
        own = assemble(source)
        weights = {"": own} | {name: merge_adapter(Path(folder), own, spec) for name, folder in adapters.items()}
        program = build(spec, weights, settings)
    else:
        program = build(spec, {"": serve_from(source, settings.int8_weights, spec)}, settings)
    program.warm(report or (lambda *_: None))
    return Opened(Engine(program, description, queue=queue), program, description)


def open_template(description: Description, source: str | None = None) -> ChatTemplate | None:
    """How conversations are written for the model: by `source`, "xgen" or a file that holds a Jinja template, or else
    by the model's own template, if it has one.

    Raises DataError for a template that cannot be read, for one without a tokenizer, and where Jinja2 is missing.
    """
    text = description.chat_template if source is None else _template_text(source)
    if text is None:
        return None
    if description.tokenizer is None:
        raise DataError(f"model {description.name} has no tokenizer, which a chat template needs; use token ids")
    end = description.end_ids[0] if description.end_ids else None
    return ChatTemplate(text, description.tokenizer, description.named_begin, end, description.pad_id)


def _template_text(source: str) -> str:
    if source == "xgen":
        return source
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, ValueError) as cause:
        raise DataError(
            f'cannot read the chat template {source}: {cause}; give "xgen" or a file with a Jinja template'
        ) from cause
