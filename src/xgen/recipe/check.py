"""A whole recipe against itself: values that are each possible, but not together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import lcm

from xgen.recipe.draft import Origin
from xgen.recipe.keys import quote_key
from xgen.recipe.near import divisors, either, near
from xgen.recipe.schema import Mesh, Model, Recipe, RopeScaling
from xgen.recipe.units import format_length, format_tokens
from xgen.recipe.values import Problem

XGEN_IDS = 50_313
"""Real ids of XGen's tokenizer."""

SMALLEST_SHARE = 2.0**-32
"""Of a mixture: the resolution in which sequences are dealt out to sources."""

LONGEST_CONTEXT = 8
"""Evaluation may look past the last stage's length, to show how a model fails there, up to this many times it."""


def check_recipe(recipe: Recipe, origins: Mapping[str, Origin], continued: bool = False) -> list[Problem]:
    """A problem for every contradiction in `recipe`; `origins` tell a derived value from a given one. The shape of a
    model that is `continued` cannot be mended."""
    return [
        *_check_model(recipe.model, origins),
        *_check_vocabulary(recipe, continued),
        *_check_mesh("mesh", recipe.mesh, recipe.model),
        *_check_stages(recipe, origins),
        *_check_schedule(recipe),
        *_check_evaluation(recipe),
        *_check_notes(recipe, origins),
    ]


def _check_model(model: Model, origins: Mapping[str, Origin]) -> Iterator[Problem]:
    if origins["model.head_size"].kind == "derived" and model.hidden_size % model.heads:
        fitting = near(model.heads, (n for n in divisors(model.hidden_size) if model.hidden_size // n % 2 == 0))
        below = model.hidden_size // (2 * model.heads) * 2 * model.heads
        widths = either([str(width) for width in (below, below + 2 * model.heads) if width])
        text = f"{model.heads} does not divide model.hidden_size {model.hidden_size}; use "
        remedy = f"{fitting} heads, or hidden_size {widths}" if fitting else f"hidden_size {widths}"
        yield Problem("model.heads", f"{text}{remedy}, or set model.head_size")
    elif model.head_size % 2:
        text = f"{model.head_size}{_came(origins, 'model.head_size')} is odd, and rotary positions turn pairs; "
        yield Problem("model.head_size", text + "choose heads or head_size so that it is even")
    if model.heads % model.kv_heads:
        fitting = near(model.kv_heads, divisors(model.heads))
        yield Problem("model.kv_heads", f"{model.kv_heads} does not divide heads {model.heads}; use {fitting}")
    yield from check_rope(model)


def check_rope(model: Model) -> Iterator[Problem]:
    """A problem for every contradiction in the rotary positions, wherever the model comes from."""
    scaling, at = model.rope_scaling, "model.rope_scaling"
    if scaling.kind == "none" and scaling.factor != 1.0:
        text = f'{scaling.factor:g} has no effect while kind is "none"; set {at}.kind or take it out'
        yield Problem(f"{at}.factor", text)
    if scaling.factor < 1.0:
        yield Problem(f"{at}.factor", f"{scaling.factor:g} would shorten the context; use 1 or more")
    plain = RopeScaling()
    for name, kinds in _ONLY_OF.items():
        value = getattr(scaling, name)
        if scaling.kind not in kinds and value != getattr(plain, name):
            text = f'{value:g} has no effect while kind is "{scaling.kind}"; take it out, or set kind to '
            yield Problem(f"{at}.{name}", text + either([f'"{kind}"' for kind in kinds]))
    if scaling.kind in _ONLY_OF["high_turns"] and scaling.high_turns <= scaling.low_turns:
        text = f"{scaling.high_turns:g} is not above low_turns {scaling.low_turns:g}, and planes are blended between; "
        yield Problem(f"{at}.high_turns", f"{text}use more, or fewer low_turns")
    if scaling.kind == "dynamic" and model.head_size < 4:
        text = f"{model.head_size} has no slower plane for a dynamic rope_scaling to stretch; use 4 or more"
        yield Problem("model.head_size", text)
    if scaling.kind == "yarn" and model.rope_theta <= 1.0:
        text = f"{model.rope_theta:g} lets no plane turn slower than another, which yarn tells them by; use more than 1"
        yield Problem("model.rope_theta", text)


_ONLY_OF = {"low_turns": ("llama3", "yarn"), "high_turns": ("llama3", "yarn"), "attention_factor": ("yarn",)}
"""The kinds of scaling that have a use for a key."""


def _check_vocabulary(recipe: Recipe, continued: bool) -> Iterator[Problem]:
    name, rows = recipe.tokenizer.name, recipe.model.vocab_size
    ids = XGEN_IDS if name == "xgen" else int(name.removeprefix("bpe:")) if name.startswith("bpe:") else 0
    if rows < ids:
        remedy = "take a smaller tokenizer" if continued else f"use {ids} or more, or leave it out"
        text = f"{rows} rows are too few for the {ids} ids of tokenizer {name!r}; {remedy}"
        yield Problem("model.vocab_size", text)


def _check_mesh(path: str, mesh: Mesh, model: Model) -> Iterator[Problem]:
    if model.heads % mesh.tensor:
        text = f"{mesh.tensor} does not divide model.heads {model.heads}; use "
        yield Problem(f"{path}.tensor", text + near(mesh.tensor, divisors(model.heads)))
    if mesh.replica == "rest" and mesh.fsdp == "rest":
        yield Problem(path, 'replica and fsdp cannot both be "rest"; give one of them a number')


def _check_stages(recipe: Recipe, origins: Mapping[str, Origin]) -> Iterator[Problem]:
    names = [stage.name for stage in recipe.stages]
    for index, stage in enumerate(recipe.stages):
        path = f"stages.{index}"
        if stage.name in names[:index]:
            text = f"{stage.name!r} is also the name of stage {names.index(stage.name)}; give each stage its own"
            yield Problem(f"{path}.name", text)
        yield from _check_batch(index, recipe, origins)
        yield from _check_mixture(index, recipe, origins)
        if any(origins[f"{path}.mesh.{axis}"].kind != "derived" for axis in Mesh.model_fields):
            yield from _check_mesh(f"{path}.mesh", stage.mesh, recipe.model)
        if stage.length % stage.mesh.context:
            text = f"{stage.mesh.context}{_came(origins, f'{path}.mesh.context')} does not divide {path}.length "
            fitting = near(stage.mesh.context, divisors(stage.length))
            yield Problem(f"{path}.mesh.context", f"{text}{format_length(stage.length)}; use {fitting}")


def _check_batch(index: int, recipe: Recipe, origins: Mapping[str, Origin]) -> Iterator[Problem]:
    path, stage = f"stages.{index}", recipe.stages[index]
    length, batch, micro = stage.length, stage.batch_tokens, stage.microbatch_tokens
    first, last = _same_batch(index, recipe, origins)
    if any(batch % earlier.length for earlier in recipe.stages[first:index]):
        return  # told of the stage that this batch was taken over from
    if batch % length:
        fits = length if index > first else lcm(*(later.length for later in recipe.stages[first:last]))
        below = batch // fits * fits
        sizes = either([format_length(size) for size in (below, below + fits) if size])
        text = f"{format_length(batch)}{_came(origins, f'{path}.batch_tokens')} is not a multiple of "
        yield Problem(f"{path}.batch_tokens", f"{text}{path}.length {format_length(length)}; use {sizes}")
    elif micro % length or batch % micro:
        fitting = [length * sequences for sequences in divisors(batch // length)]
        text = f"{format_length(micro)} is not whole sequences of {format_length(length)} that divide the batch of "
        sizes = near(micro, fitting, written=format_length)
        yield Problem(f"{path}.microbatch_tokens", f"{text}{format_length(batch)}; use {sizes}")


def _same_batch(index: int, recipe: Recipe, origins: Mapping[str, Origin]) -> tuple[int, int]:
    """The stages from the first, which states a batch, up to the last (not included), that take it over."""
    states = [origins[f"stages.{number}.batch_tokens"].kind != "derived" for number in range(len(recipe.stages))]
    first = max(number for number in range(index + 1) if states[number])
    return first, next((number for number in range(first + 1, len(states)) if states[number]), len(states))


def _check_mixture(index: int, recipe: Recipe, origins: Mapping[str, Origin]) -> Iterator[Problem]:
    path, mixture, sources = f"stages.{index}.mixture", recipe.stages[index].mixture, ", ".join(recipe.data.sources)
    if not recipe.data.sources:
        if index == 0:  # once is enough
            yield Problem("data.sources", 'is empty; name at least one, as in sources = { mine = "stores/mine" }')
        return
    if not mixture and (index == 0 or recipe.stages[index - 1].mixture):  # a stage that takes over {} is not at fault
        yield Problem(path, f"is empty; give weights to some of the sources {sources}, or leave it out")
    total = sum(mixture.values())
    for name, weight in mixture.items():
        place = f"{path}.{quote_key(name)}"
        if origins[place].kind == "derived":
            continue  # told of the stage that states it
        if weight < SMALLEST_SHARE * total:
            yield Problem(place, f"{weight:g} is less than 2**-32 of the mixture; take the source out")
        if name not in recipe.data.sources:
            text = f"there is no source {name!r}; the sources are {sources}; set {path} or data.sources.{name}"
            yield Problem(place, text)


def _check_schedule(recipe: Recipe) -> Iterator[Problem]:
    warmup, total = recipe.optimizer.warmup, recipe.total_tokens
    if warmup >= total:
        text = f"{format_tokens(warmup)} is not shorter than the run of {format_tokens(total)} tokens; "
        yield Problem("optimizer.warmup", text + f"use {format_tokens(total // 100)}, its hundredth, or leave it out")


def _check_evaluation(recipe: Recipe) -> Iterator[Problem]:
    contexts, target = recipe.evaluation.contexts, recipe.evaluation.target
    written = ", ".join(map(format_length, contexts))
    if list(contexts) != sorted(set(contexts)):
        fitting = ", ".join(map(format_length, sorted(set(contexts))))
        yield Problem("evaluation.contexts", f"{written} do not rise from each to the next; use {fitting}")
    if target >= min(contexts):
        text = f"{format_length(target)} leaves no context in the smallest of evaluation.contexts, "
        yield Problem("evaluation.target", f"{text}{format_length(min(contexts))}; use a smaller target")
    last = recipe.stages[-1].length
    if max(contexts) > LONGEST_CONTEXT * last:
        text = f"{format_length(max(contexts))} is more than {LONGEST_CONTEXT} times the last stage's length "
        remedy = f"{format_length(last)}; use {format_length(LONGEST_CONTEXT * last)} at most"
        yield Problem("evaluation.contexts", text + remedy)


def _check_notes(recipe: Recipe, origins: Mapping[str, Origin]) -> Iterator[Problem]:
    for key in recipe.notes:
        if key not in origins and not any(path.startswith(f"{key}.") for path in origins):
            text = 'notes a key this recipe does not have; write the whole path, as in "optimizer.learning_rate"'
            yield Problem(f'notes."{key}"', text)


def _came(origins: Mapping[str, Origin], path: str) -> str:
    """What a derived value came from, in brackets, so that its reader knows what to change; nothing for others."""
    origin = origins[path]
    return f" (from {origin.detail.partition(' (')[0]})" if origin.kind == "derived" else ""
