"""A run, opened: its recipe, its data, its model and its folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from xgen.checkpoints.manifest import folder_name, newest_whole, split_model
from xgen.checkpoints.processes import agree
from xgen.convert.native import START as START_FILE
from xgen.data.corpora import open_sources, reopen_sources
from xgen.data.reader import Reader
from xgen.data.store import Store, is_store
from xgen.errors import CheckpointError, DataError, RecipeError, StorageError
from xgen.measure import Sample, sample_documents
from xgen.model import Spec
from xgen.parallel.mesh import sizes
from xgen.parallel.program import Layout, weight_shardings
from xgen.parallel.rules import require_even
from xgen.parallel.world import World
from xgen.recipe.base import START
from xgen.recipe.load import changed_keys, dump_toml
from xgen.recipe.schema import Recipe
from xgen.tokens.tokenizer import Tokenizer
from xgen.training import optimizer
from xgen.training.checkpoints import Saver, place_weights, read_state
from xgen.training.folder import (
    CHECKPOINTS,
    EVENTS,
    LOCK,
    METRICS,
    RECIPE,
    RESULT,
    STORES,
    Recorder,
    replace_text,
    write_json,
)
from xgen.training.start import Opened, Start, read_start, start_json
from xgen.training.state import State, abstract_state, new_state, new_weights

SOURCES = "sources.json"
"""Beside the recipe: the fingerprint of each source's store, so that a resumed run meets the same text."""

# What a run writes before its first step.
_OWN = {RECIPE, SOURCES, START_FILE, "tokenizer.json", STORES, METRICS, EVENTS, CHECKPOINTS, "report.html"}

# What may change when a run is resumed: nothing that decides a batch, a weight or the schedule. On another mesh, or in
# other microbatches, the same sums are taken in another order.
_CHANGEABLE = re.compile(
    r"name|description|notes\..*|checkpoints\..*|evaluation\..*|mesh\..*"
    r"|stages\.\d+\.(mesh\..*|mesh|microbatch_tokens|remat)|compute\.exchange"
)

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Run:
    """Everything the loop needs that does not change."""

    folder: Path
    recipe: Recipe
    tokenizer: Tokenizer
    stores: Mapping[str, Store]
    reader: Reader
    spec: Spec
    transformation: optax.GradientTransformation
    recorder: Recorder
    layouts: tuple[Layout, ...]
    """Each stage's mesh."""
    world: World
    """The processes that train it."""
    start: Start | None = None
    """The model that the run continues."""

    def layout_at(self, tokens: int) -> Layout:
        """The mesh of the stage that the clock stands in, or has ended."""
        return self.layouts[self.recipe.stage_at(min(tokens, self.recipe.total_tokens - 1))]

    def held_out(self, tokens: int) -> Sample | None:
        """About `tokens` held-out tokens of documents long enough for the largest context; None without any."""
        splits = {name: store.held_out for name, store in self.stores.items()}
        if not any(split.documents for split in splits.values()):
            return None
        return sample_documents(splits, tokens, max(self.recipe.evaluation.contexts) + 1)  # and the end-of-text


@dataclass
class Clock:
    """Where a run stands; all else about time derives from the tokens. `seconds`: of the steps before this session."""

    tokens: int = 0
    step: int = 0
    seconds: float = 0.0


def create(
    recipe: Recipe,
    folder: Path,
    base: Path,
    progress: Progress | None = None,
    opened: Opened | None = None,
    world: World | None = None,
) -> Run:
    """Begin a run in `folder`, which must not hold one that has made a step. Relative paths of the recipe are taken
    from `base`. `opened` is the model that the run continues; without `world` one process does it all.

    All of `world` call this together. Process 0 prepares the folder, the others open what they find there.
    """
    processes, prepared = world or World(), list[Prepared]()

    def prepare() -> dict[str, Any] | None:
        if not processes.is_writer:
            return None
        prepared.append(_prepare(recipe, folder, base, progress, opened))
        return prepared[0].recipe.model_dump(mode="json")

    with processes.busy("preparing the run"):
        told = agree(processes, "prepare the run", prepare)[0]
    if not prepared:
        resolved = Recipe.model_validate(told)
        prepared.append(Prepared(resolved, *reopen_sources(resolved, folder, folder / STORES)))
        _check_sources(folder, prepared[0].stores)
    run = _assemble(prepared[0], folder, processes)
    run.recorder.cut_back(-1)
    if processes.is_writer:
        _clear(folder)
    if opened is not None:
        run = replace(run, start=_take_over(run, opened, progress))
    if processes.is_writer:  # last: a folder with a recipe is a run that can be resumed
        replace_text(folder / RECIPE, dump_toml(run.recipe))
    return run


class Prepared(NamedTuple):
    """What a run needs from outside: the recipe with all paths and names, and what they led to."""

    recipe: Recipe
    stores: Mapping[str, Store]
    tokenizer: Tokenizer


def _prepare(recipe: Recipe, folder: Path, base: Path, progress: Progress | None, opened: Opened | None) -> Prepared:
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder} is a file, and a run is a folder; choose another place")
    if _has_steps(folder):
        raise RecipeError(
            f"{folder} already holds a run; go on with `xgen train --resume {folder}`, or choose another folder"
        )
    if opened is not None and Path(split_model(opened.place)[0]).resolve() == folder.resolve():
        raise RecipeError(f"{folder} is the model to be continued; choose another folder for the run")
    others = sorted(path.name for path in folder.glob("[!.]*") if path.name not in _OWN) if folder.exists() else []
    if others:
        named = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise RecipeError(
            f"{folder} holds other files ({named}), and a run needs a folder of its own; choose a new one "
            "(texts to train on go to --data)"
        )
    layouts_of(recipe)
    if opened is not None:
        _check_tokenizer(recipe, base, opened)
    claim_folder(folder)
    recipe = _rooted(recipe, base)
    own = opened.description.tokenizer if opened is not None else None
    stores, tokenizer = open_sources(recipe, base, folder / STORES, progress, own)
    recipe = _with_tokenizer(recipe, tokenizer, folder if tokenizer is own else None)
    write_json(folder / SOURCES, {name: store.fingerprint for name, store in stores.items()})
    tokenizer.save(folder / "tokenizer.json")
    return Prepared(recipe, stores, tokenizer)


def claim_folder(folder: Path) -> None:
    """Make the folder, if need be, and see that it can be written, before the long work of preparing text."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    except OSError as cause:
        raise StorageError.writing(folder, cause) from cause


def _has_steps(folder: Path) -> bool:
    metrics = folder / METRICS
    beyond = (path for path in (folder / CHECKPOINTS).glob("*") if folder_name(0) not in path.name)
    return any(beyond) or (metrics.is_file() and metrics.stat().st_size > 0)


def _check_tokenizer(recipe: Recipe, base: Path, opened: Opened) -> None:
    """Raise RecipeError when the model came without a tokenizer, and none that it could know is named."""
    name = recipe.tokenizer.name
    stores = any(is_store(base / source) for source in recipe.data.sources.values())
    if opened.description.tokenizer is None and (name.startswith("bpe:") or (name == "store" and not stores)):
        learnt = f", and the ids of {name!r}, learnt now, would mean nothing to it" if name != "store" else ""
        raise RecipeError(
            f"{opened.place} has no tokenizer{learnt}; set tokenizer.name to the tokenizer.json that it was trained "
            "with, or train on a store that was prepared with that"
        )


def _clear(folder: Path) -> None:
    """Take away what an earlier beginning left that made no step: whether it continued a model is decided anew."""
    try:
        for name in (RECIPE, START_FILE):
            (folder / name).unlink(missing_ok=True)
        if (folder / CHECKPOINTS).exists():
            shutil.rmtree(folder / CHECKPOINTS)
    except OSError as cause:
        raise StorageError.writing(folder, cause) from cause


def _take_over(run: Run, opened: Opened, progress: Progress | None) -> Start | None:
    """Write the model's description and its weights, as the checkpoint at token 0, into the run's folder."""
    what, layout = f"taking over the weights of {opened.place}", run.layouts[0]
    places = None if layout.single else weight_shardings(run.spec, layout)
    with run.world.busy(what):
        weights, digest = place_weights(
            opened.source, places, lambda share: progress(what, share) if progress is not None else None
        )
    run.world.agree(f"the weights of {opened.place}", {"sha256": digest})
    if run.world.is_writer:
        write_json(run.folder / START_FILE, start_json(opened, digest))
    saver = Saver(run.folder / CHECKPOINTS, run.recipe.checkpoints, lambda _: None, run.world)
    saver.save(new_state(weights, run.spec, run.transformation, layout), 0, 0, START)
    saver.wait()
    return read_start(run.folder)


def reopen(recipe: Recipe, folder: Path, world: World | None = None) -> Run:
    """Open the run in `folder` again. `recipe`: its own, or one that differs in what `_CHANGEABLE` names only. All of
    `world` call this together."""
    from xgen.recipe.load import load_recipe

    changed = [key for key in changed_keys(load_recipe(folder).recipe, recipe) if not _CHANGEABLE.fullmatch(key)]
    if changed:
        raise RecipeError(
            f"{folder} cannot be resumed with another {', '.join(changed)}: the weights, batches and schedule so far "
            f"depend on it; only checkpoints.*, evaluation.*, meshes, microbatch_tokens, remat and compute.exchange "
            "may change. Start a new run instead"
        )
    layouts_of(recipe)
    stores, tokenizer = reopen_sources(recipe, folder, folder / STORES)
    _check_sources(folder, stores)
    run = replace(_assemble(Prepared(recipe, stores, tokenizer), folder, world or World()), start=read_start(folder))
    if run.world.is_writer:
        replace_text(folder / RECIPE, dump_toml(recipe))
    return run


def first_state(run: Run) -> State:
    """Freshly drawn weights, the seed being the data's, or those of the model that is continued; and an empty
    optimizer state."""
    if run.start is not None:
        return _read(run, run.folder / CHECKPOINTS / folder_name(0), 0)
    layout = run.layouts[0]
    return new_state(new_weights(run.spec, run.recipe.data.seed, layout), run.spec, run.transformation, layout)


def _read(run: Run, path: Path, tokens: int) -> State:
    layout = run.layout_at(tokens)
    if layout.single:
        return read_state(path, run.spec, run.transformation)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(run.spec, run.transformation, layout))
    return read_state(path, run.spec, run.transformation, places, run.world)


def too_short(run: Run) -> list[str]:
    """In words, when no training document reaches past the length that the continued model knows already."""
    if run.start is None or not run.recipe.data.document_mask:
        return []
    old, new = run.start.context_length, max(stage.length for stage in run.recipe.stages)
    used = {name for stage in run.recipe.stages for name in stage.mixture}
    longest = max(int(np.diff(run.stores[name].train.offsets).max()) for name in used)
    if new <= old or longest > old:
        return []
    return [
        f"no training document is longer than the {old} tokens that {run.start.place} was trained on (the longest has "
        f"{longest}): stages of {new} tokens cannot teach it more context; give it longer documents"
    ]


def restore(run: Run, report: Callable[[str], None]) -> tuple[State, Clock]:
    """State and clock of the newest whole checkpoint, or of the beginning; later lines of the logs are dropped."""
    checkpoint = newest_whole(run.folder / CHECKPOINTS, report, run.world)
    try:
        if run.world.is_writer:
            (run.folder / RESULT).unlink(missing_ok=True)
    except OSError as cause:
        raise StorageError.writing(run.folder / RESULT, cause) from cause
    if checkpoint is None and run.start is not None:
        raise CheckpointError(
            f"{run.folder} has no whole checkpoint, not even of the weights it began with; begin again in another "
            f"folder: `xgen train {run.folder / RECIPE} --from {run.start.place} --run NEW`"
        )
    if checkpoint is None or checkpoint.tokens == 0:
        run.recorder.cut_back(-1)
        return first_state(run), Clock()
    if checkpoint.tokens > run.recipe.total_tokens:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} lies past the recipe's {run.recipe.total_tokens:,} tokens; "
            "it belongs to another run: choose its folder"
        )
    state = _read(run, checkpoint.path, checkpoint.tokens)
    return state, Clock(checkpoint.tokens, checkpoint.step, run.recorder.cut_back(checkpoint.tokens))


def layouts_of(recipe: Recipe) -> tuple[Layout, ...]:
    """Each stage's mesh on the devices there are. Raises RecipeError when one does not fit them, or cuts unevenly."""
    found = []
    for index, stage in enumerate(recipe.stages):
        mesh = sizes(stage.mesh, jax.device_count(), f"stages.{index}.mesh")
        require_even(recipe.model, stage, mesh, f"stages.{index}")
        found.append(Layout(mesh))
    return tuple(found)


def _assemble(prepared: Prepared, folder: Path, world: World) -> Run:
    recipe, stores, tokenizer = prepared
    run = Run(
        folder=folder,
        recipe=recipe,
        tokenizer=tokenizer,
        stores=stores,
        reader=Reader(recipe, stores),
        spec=Spec.of(recipe, tokenizer.size),
        transformation=optimizer.build(recipe.optimizer),
        recorder=Recorder(folder, world),
        layouts=layouts_of(recipe),
        world=world,
    )
    run.held_out(recipe.evaluation.tokens)  # what the measurement at the end cannot do is said before the first step
    return run


def _rooted(recipe: Recipe, base: Path) -> Recipe:
    """The recipe with absolute paths, so that it can be resumed from any folder."""

    def root(name: str) -> str:
        place = base / name
        return str(place.absolute()) if ":" not in name and place.exists() else name

    sources = {name: root(place) for name, place in recipe.data.sources.items()}
    named = recipe.tokenizer.name in ("store", "xgen")
    tokenizer = recipe.tokenizer.name if named else root(recipe.tokenizer.name)
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"sources": sources}),
            "tokenizer": recipe.tokenizer.model_copy(update={"name": tokenizer}),
        }
    )


def _with_tokenizer(recipe: Recipe, tokenizer: Tokenizer, folder: Path | None) -> Recipe:
    """The recipe with what ends its documents, and with the tokenizer in `folder` in place of a continued model's."""
    update = {"end_of_text": tokenizer.decode([tokenizer.end_of_text])}
    if folder is not None:
        update["name"] = str((folder / "tokenizer.json").absolute())
    return recipe.model_copy(update={"tokenizer": recipe.tokenizer.model_copy(update=update)})


def _check_sources(folder: Path, stores: Mapping[str, Store]) -> None:
    try:
        before = json.loads((folder / SOURCES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise DataError(f"cannot read {folder / SOURCES} ({cause}); without it a resume may meet other text") from cause
    for name, store in stores.items():
        if before.get(name) != store.fingerprint:
            raise DataError(
                f"source {name!r} has changed since {folder} began, so its batches would differ; "
                "put the old text back, or start a new run"
            )
