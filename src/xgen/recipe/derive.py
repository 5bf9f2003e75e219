"""What a recipe leaves out: derived from what it says, or the schema's default. Each value says which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from xgen.recipe.draft import Draft, Origin, Path
from xgen.recipe.keys import Shape, join, section_of, shape_of
from xgen.recipe.schema import Mesh, Recipe, RopeScaling
from xgen.recipe.values import Problem

XGEN_ROWS = 51_200
"""Rows of XGen's embedding; its tokenizer has 50 313 ids."""

ROWS_MULTIPLE = 128
"""Embeddings are padded to a multiple of this, the lane count of a TPU's matrix unit."""

DERIVED_KEYS = frozenset(
    {
        "model.kv_heads",
        "model.head_size",
        "model.mlp_size",
        "model.vocab_size",
        "stages.N.microbatch_tokens",
        "stages.N.mixture",
        "optimizer.warmup",
        "checkpoints.every",
        "evaluation.every",
        "evaluation.target",
        "evaluation.contexts",
    }
)
"""Keys without a default that a recipe may leave out."""

Vocabulary = Callable[[str], int]
"""From a tokenizer's name, file or folder to the rows its embedding needs."""


def derive(draft: Draft) -> None:
    """Fill `draft`, whose given values are valid, with everything but the vocabulary that follows from them.

    What cannot be derived because its own input is missing is left out.
    """
    _derive_model(draft)
    _derive_stages(draft)
    _derive_schedule(draft)
    _derive_evaluation(draft)
    _fill_defaults(draft, Recipe, ())


def _fill(draft: Draft, path: Path, value: Any, detail: str) -> None:
    if not draft.has(path):
        draft.set(path, value, Origin("derived", detail))


def _value(draft: Draft, *path: str) -> Any:
    """What the draft has at `path`, or None."""
    return draft.get(path) if draft.has(path) else None


def _derive_model(draft: Draft) -> None:
    heads, hidden_size = _value(draft, "model", "heads"), _value(draft, "model", "hidden_size")
    if heads is not None:
        _fill(draft, ("model", "kv_heads"), heads, "model.heads (each head has its own keys and values)")
    if heads is not None and hidden_size is not None:
        _fill(draft, ("model", "head_size"), max(1, hidden_size // heads), "model.hidden_size / model.heads")
    if hidden_size is not None and not draft.has(("model", "mlp_size")):
        draft.set(("model", "mlp_size"), *_mlp_size(hidden_size, _value(draft, "model", "activation")))
    at = ("model", "rope_scaling")
    scaling = RopeScaling(**_value(draft, *at) or {})
    _fill(draft, (*at, "high_turns"), scaling.high_turns, f"{join(at)}.kind (as published)")
    _fill(draft, (*at, "attention_factor"), scaling.attention_factor, f"{join(at)}.kind and factor")


def _mlp_size(hidden_size: int, activation: str | None) -> tuple[int, Origin]:
    """LLaMA's rule: 8/3 of the width, so that SwiGLU's three matrices weigh what GeLU's two of 4 x do."""
    if activation == "gelu":
        return 4 * hidden_size, Origin("derived", "4 x model.hidden_size, for gelu's two matrices")
    multiple = 256 if hidden_size >= 1024 else 32
    size = _round_up(-(-8 * hidden_size // 3), multiple)
    return size, Origin("derived", f"8/3 x model.hidden_size, rounded up to a multiple of {multiple}")


def derive_vocabulary(draft: Draft, vocabulary: Vocabulary | None) -> list[Problem]:
    """Fill in model.vocab_size, if need be by asking `vocabulary`; a problem when there is no way to know it.

    Comes after `derive`, once the rest of the recipe is known to be whole.
    """
    if draft.has(("model", "vocab_size")):
        return []
    tokenizer = draft.get(("tokenizer", "name"))
    if tokenizer == "xgen":
        rows, detail = XGEN_ROWS, "tokenizer.name (XGen's own padding of its 50313 ids)"
    elif tokenizer.startswith("bpe:"):
        rows = _round_up(int(tokenizer.removeprefix("bpe:")), ROWS_MULTIPLE)
        detail = f"tokenizer.name, rounded up to a multiple of {ROWS_MULTIPLE}"
    else:
        place = _tokenizer_place(tokenizer, draft.get(("data", "sources")))
        if place is None:
            text = '\'store\' takes the tokenizer of a token store, and no source is one; use "xgen" or "bpe:2048"'
            return [Problem("tokenizer.name", text)]
        if vocabulary is None:
            text = f"not given, and it takes reading the tokenizer {place!r} to derive it; set model.vocab_size"
            return [Problem("model.vocab_size", text)]
        rows, detail = vocabulary(place), f"tokenizer.name (the ids of {place})"
    draft.set(("model", "vocab_size"), rows, Origin("derived", detail))
    return []


def _tokenizer_place(tokenizer: str, sources: dict[str, str]) -> str | None:
    """Where to read the tokenizer: its own name, or for "store" the first source that can be a store."""
    if tokenizer != "store":
        return tokenizer
    return next((place for place in sources.values() if not place.startswith("embedded:")), None)


def _derive_stages(draft: Draft) -> None:
    for index in range(len(_value(draft, "stages") or ())):
        at = ("stages", str(index))
        before = ("stages", str(index - 1)) if index else None
        _derive_batch(draft, at, before)
        _derive_mixture(draft, at, before)
        if before is not None and draft.has((*before, "remat")):
            _fill(draft, (*at, "remat"), draft.get((*before, "remat")), f"{join(before)}.remat")
        for axis, field in Mesh.model_fields.items():
            of_recipe = _value(draft, "mesh", axis)
            _fill(draft, (*at, "mesh", axis), field.default if of_recipe is None else of_recipe, f"mesh.{axis}")


def _derive_batch(draft: Draft, at: Path, before: Path | None) -> None:
    """The batch carries over, so that a step costs the same tokens; so does the microbatch, in whole sequences."""
    if before is not None and draft.has((*before, "batch_tokens")):
        detail = f"{join(before)}.batch_tokens (tokens a step stay constant)"
        _fill(draft, (*at, "batch_tokens"), draft.get((*before, "batch_tokens")), detail)
    batch, length = _value(draft, *at, "batch_tokens"), _value(draft, *at, "length")
    if batch is None or length is None:
        return
    micro = _value(draft, *before, "microbatch_tokens") if before is not None else None
    if before is not None and micro is not None and _value(draft, *before, "batch_tokens") == batch:
        sizes = [size for size in range(_round_up(micro, length), batch, length) if batch % size == 0]
        detail = f"{join(before)}.microbatch_tokens, in whole sequences"
        _fill(draft, (*at, "microbatch_tokens"), sizes[0] if sizes else batch, detail)
    else:
        _fill(draft, (*at, "microbatch_tokens"), batch, f"{join(at)}.batch_tokens (the batch in one piece)")


def _derive_mixture(draft: Draft, at: Path, before: Path | None) -> None:
    if before is not None and draft.has((*before, "mixture")):
        _fill(draft, (*at, "mixture"), dict(draft.get((*before, "mixture"))), f"{join(before)}.mixture")
    elif draft.has(("data", "sources")):
        shares = dict.fromkeys(draft.get(("data", "sources")), 1.0)
        _fill(draft, (*at, "mixture"), shares, "data.sources (equal shares)")


def _derive_schedule(draft: Draft) -> None:
    total = _total_tokens(draft)
    if total is None:
        return
    _fill(draft, ("optimizer", "warmup"), total // 100, "the stages' tokens / 100")
    _fill(draft, ("checkpoints", "every"), max(1, total // 10), "the stages' tokens / 10")
    _fill(draft, ("evaluation", "every"), max(1, total // 10), "the stages' tokens / 10")


def _total_tokens(draft: Draft) -> int | None:
    """Tokens of all stages in whole batches, as `Recipe.total_tokens`; None while a stage is incomplete."""
    total = 0
    for stage in _value(draft, "stages") or ():
        if not stage.get("tokens") or not stage.get("batch_tokens"):
            return None
        total += _round_up(stage["tokens"], stage["batch_tokens"])
    return total or None


def _derive_evaluation(draft: Draft) -> None:
    stages = _value(draft, "stages")
    length = stages[-1].get("length") if stages else None
    if length is None:
        return
    last = f"stages.{len(stages) - 1}.length"
    contexts = _value(draft, "evaluation", "contexts")
    room = length // 8 if not contexts else contexts[0] // 2
    target = max(1, min(max(8, length // 16), room))
    _fill(draft, ("evaluation", "target"), target, f"{last} / 16, at least 8, well below the smallest context")
    target = draft.get(("evaluation", "target"))
    default = tuple(context for context in (length // 8, length // 4, length // 2, length) if context > target)
    _fill(draft, ("evaluation", "contexts"), default, f"1/8, 1/4, 1/2 and 1 of {last}, above evaluation.target")


def _fill_defaults(draft: Draft, section: type[BaseModel], path: Path) -> None:
    for name, field in section.model_fields.items():
        here = (*path, name)
        match shape_of(field):
            case Shape.SECTION:
                if not draft.has(here):
                    draft.set(here, {}, Origin("default"))
                _fill_defaults(draft, section_of(field), here)
            case Shape.SECTIONS:
                for index in range(len(_value(draft, *here) or ())):
                    _fill_defaults(draft, section_of(field), (*here, str(index)))
            case _:
                if not draft.has(here) and not field.is_required():
                    draft.set(here, field.get_default(), Origin("default"))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
