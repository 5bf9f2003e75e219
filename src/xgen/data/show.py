"""A batch for a reader's eyes: its rows, the documents they came from, and the text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from xgen.data.reader import Batch, Reader, Span
from xgen.errors import RecipeError
from xgen.recipe.schema import Recipe
from xgen.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class ShownBatch:
    batch: Batch
    stage: str
    step: int
    """as metrics.jsonl counts: the first is 1"""
    spans: list[Span]
    texts: list[str]
    """of each span, decoded"""


def show(reader: Reader, position: int, tokenizer: Tokenizer) -> ShownBatch:
    """The batch that begins at token `position`, with its documents and their text."""
    batch = reader.batch(position)
    spans = reader.documents(position)
    texts = [tokenizer.decode(batch.ids[span.row, span.start : span.stop].tolist()) for span in spans]
    recipe = reader.recipe
    before = sum(stage.steps for stage in recipe.stages[: batch.stage])
    stage = recipe.stages[batch.stage]
    step = before + (position - recipe.stage_start(batch.stage)) // stage.batch_tokens + 1
    return ShownBatch(batch, stage.name, step, spans, texts)


def step_position(recipe: Recipe, step: int) -> int:
    """Token position at which `step` begins; steps count from 1, as in metrics.jsonl."""
    left = step - 1
    for index, stage in enumerate(recipe.stages):
        if 0 <= left < stage.steps:
            return recipe.stage_start(index) + left * stage.batch_tokens
        left -= stage.steps
    total = sum(stage.steps for stage in recipe.stages)
    raise RecipeError(f"there is no step {step}: the run's steps are 1 to {total}")


def batch_position(recipe: Recipe, position: int) -> int:
    """Token position at which the batch begins that holds the run's token `position`."""
    if not 0 <= position < recipe.total_tokens:
        raise RecipeError(f"there is no token position {position}: the run's are 0 to {recipe.total_tokens - 1}")
    index = recipe.stage_at(position)
    into = position - recipe.stage_start(index)
    return position - into % recipe.stages[index].batch_tokens


def as_json(shown: ShownBatch) -> dict[str, Any]:
    """Everything in the batch: `ids`, `targets`, `segments`, `positions` by row, and the spans with their text."""
    batch = shown.batch
    return {
        "position": batch.position,
        "step": shown.step,
        "stage": shown.stage,
        "rows": batch.ids.shape[0],
        "length": batch.ids.shape[1],
        "documents": [{**asdict(span), "text": text} for span, text in zip(shown.spans, shown.texts, strict=True)],
        "ids": batch.ids.tolist(),
        "targets": batch.targets.tolist(),
        "segments": batch.segments.tolist(),
        "positions": batch.positions.tolist(),
    }


def as_text(shown: ShownBatch, width: int) -> str:
    """A line a span: the row, its columns, the document, and the first `width` characters of the text."""
    batch = shown.batch
    rows, length = batch.ids.shape
    where = f"step {shown.step}, token position {batch.position:,}, stage {shown.stage}"
    lines = [f"{where}: {rows} sequences of {length} tokens"]
    row = -1
    for span, text in zip(shown.spans, shown.texts, strict=True):
        if span.row != row:
            row = span.row
            lines.append(f"row {row}")
        head = text if len(text) <= width else f"{text[:width]}..."
        lines.append(
            f"  {span.start:>6}-{span.stop:<6} {span.source}: {span.name}, from its token {span.offset:,}: {head!r}"
        )
    return "\n".join(lines)
