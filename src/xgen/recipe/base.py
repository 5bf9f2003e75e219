"""A model below a recipe: what a run that continues the model takes over from it, and what the run may change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from xgen.recipe.draft import Draft, Origin
from xgen.recipe.schema import Model, Recipe
from xgen.recipe.values import Problem
from xgen.recipe.write import toml_value

START = "start"
"""What the model that a run continues is called among the run's stages."""

NEW_ROPE = f"{START}, new rope"
"""What the same model is called when it is measured with the rotary frequencies of the run."""

_FREE = ("rope_theta", "rope_scaling", "initialisation")
"""Keys of the model that no weight depends on: the rotary frequencies are how a longer length is reached."""

_SCALING = ("model", "rope_scaling")


@dataclass(frozen=True)
class Base:
    """The model that a run continues, as far as its recipe is concerned.

    `place` is what messages call it; `context_length` the longest sequence it was trained on; `end_of_text` the token
    that ends its documents, None for a model without a tokenizer.
    """

    place: str
    model: Model
    context_length: int
    end_of_text: str | None = None

    @property
    def origin(self) -> Origin:
        return Origin("inherited", f"the model {self.place}")


def lay_base(draft: Draft, base: Base) -> None:
    """The lowest layer of a recipe: the shape of the model, whole."""
    draft.set(("model",), base.model.model_dump(), base.origin)
    if base.end_of_text is not None:
        draft.set(("tokenizer", "end_of_text"), base.end_of_text, base.origin)


def fit_rope(draft: Draft, base: Base) -> None:
    """Where the recipe states another scaling, drop what belonged to the model's own, and stretch from the length the
    model was trained on to the longest stage unless the recipe says otherwise."""
    before, now = base.model.rope_scaling.model_dump(), draft.tree.get("model", {}).get("rope_scaling", {})
    dropped = {"attention_factor"} if now.get("factor") != before["factor"] else set()
    if now.get("kind") != before["kind"]:
        # How far a stretched model was stretched is a fact about it, whichever way the next one computes it.
        kept = {"factor", "original_length"} if "none" not in (now.get("kind"), before["kind"]) else set()
        dropped = set(before) - kept
    for key in dropped:
        if draft.origin((*_SCALING, key)) == base.origin:
            draft.remove((*_SCALING, key))
    if now.get("kind") in (before["kind"], "none"):
        return
    if not draft.has((*_SCALING, "original_length")):
        origin = Origin("derived", f"the length that {base.place} was trained on")
        draft.set((*_SCALING, "original_length"), base.context_length, origin)
    lengths = [stage["length"] for stage in draft.tree.get("stages", ()) if "length" in stage]
    if lengths and not draft.has((*_SCALING, "factor")):
        origin = Origin("derived", "the longest stage's length / model.rope_scaling.original_length")
        factor = max(1.0, max(lengths) / draft.get((*_SCALING, "original_length")))
        draft.set((*_SCALING, "factor"), factor, origin)


def check_base(recipe: Recipe, base: Base) -> Iterator[Problem]:
    """A problem for everything in which `recipe` cannot continue the model."""
    for key, field in Model.model_fields.items():
        mine, theirs = getattr(recipe.model, key), getattr(base.model, key)
        if key not in _FREE and mine != theirs:
            text = f"{toml_value(field, mine)} is not the {toml_value(field, theirs)} of {base.place}, whose weights "
            yield Problem(f"model.{key}", text + "the run continues; leave it out")
    for index, stage in enumerate(recipe.stages):
        if stage.name == START:
            text = f"{START!r} is the name of the model that the run continues; choose another"
            yield Problem(f"stages.{index}.name", text)
