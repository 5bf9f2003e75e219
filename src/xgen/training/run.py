"""A run, opened: its recipe, its data, its model and its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import optax

from xgen.checkpoints.manifest import newest_whole
from xgen.data.corpora import open_sources, reopen_sources
from xgen.data.reader import Reader
from xgen.data.store import Store
from xgen.errors import CheckpointError, DataError, RecipeError, StorageError
from xgen.measure import Sample, sample_documents
from xgen.model import Spec, initialise
from xgen.recipe.load import changed_keys, dump_toml
from xgen.recipe.schema import Recipe
from xgen.tokens.tokenizer import Tokenizer
from xgen.training import optimizer
from xgen.training.checkpoints import read_state
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
from xgen.training.step import State

SOURCES = "sources.json"
"""Beside the recipe: the fingerprint of each source's store, so that a resumed run meets the same text."""

# What a run writes before its first step.
_OWN = {RECIPE, SOURCES, "tokenizer.json", STORES, METRICS, EVENTS, CHECKPOINTS, "report.html"}

# What may change when a run is resumed: nothing that decides a batch, a weight or the schedule.
_CHANGEABLE = ("name", "description", "notes.", "checkpoints.", "evaluation.")

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


def create(recipe: Recipe, folder: Path, base: Path, progress: Progress | None = None) -> Run:
    """Begin a run in `folder`, which must not hold one that has made a step. Relative paths of the recipe are taken
    from `base`."""
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder} is a file, and a run is a folder; choose another place")
    if _has_steps(folder):
        raise RecipeError(
            f"{folder} already holds a run; go on with `xgen train --resume {folder}`, or choose another folder"
        )
    others = sorted(path.name for path in folder.glob("[!.]*") if path.name not in _OWN) if folder.exists() else []
    if others:
        named = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise RecipeError(
            f"{folder} holds other files ({named}), and a run needs a folder of its own; choose a new one "
            "(texts to train on go to --data)"
        )
    check_devices(recipe)
    claim_folder(folder)
    recipe = _rooted(recipe, base)
    stores, tokenizer = open_sources(recipe, base, folder / STORES, progress)
    write_json(folder / SOURCES, {name: store.fingerprint for name, store in stores.items()})
    tokenizer.save(folder / "tokenizer.json")
    run = _assemble(recipe, folder, stores, tokenizer)
    run.recorder.cut_back(-1)
    replace_text(folder / RECIPE, dump_toml(recipe))  # last: a folder with a recipe is a run that can be resumed
    return run


def claim_folder(folder: Path) -> None:
    """Make the folder, if need be, and see that it can be written, before the long work of preparing text."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    except OSError as cause:
        raise StorageError.writing(folder, cause) from cause


def _has_steps(folder: Path) -> bool:
    metrics = folder / METRICS
    return any((folder / CHECKPOINTS).glob("*")) or (metrics.is_file() and metrics.stat().st_size > 0)


def reopen(recipe: Recipe, folder: Path) -> Run:
    """Open the run in `folder` again. `recipe`: its own, or one that differs in checkpoints and evaluation only."""
    from xgen.recipe.load import load_recipe

    changed = [key for key in changed_keys(load_recipe(folder).recipe, recipe) if not key.startswith(_CHANGEABLE)]
    if changed:
        raise RecipeError(
            f"{folder} cannot be resumed with another {', '.join(changed)}: the weights, batches and schedule so far "
            f"depend on it; only checkpoints.* and evaluation.* may change. Start a new run instead"
        )
    check_devices(recipe)
    stores, tokenizer = reopen_sources(recipe, folder, folder / STORES)
    _check_sources(folder, stores)
    run = _assemble(recipe, folder, stores, tokenizer)
    replace_text(folder / RECIPE, dump_toml(recipe))
    return run


def first_state(run: Run) -> State:
    """Freshly drawn weights and an empty optimizer state; the seed is the data's."""
    weights = initialise(run.spec, run.recipe.data.seed)
    return State(weights, run.transformation.init(weights))


def restore(run: Run, report: Callable[[str], None]) -> tuple[State, Clock]:
    """State and clock of the newest whole checkpoint, or of the beginning; later lines of the logs are dropped."""
    checkpoint = newest_whole(run.folder / CHECKPOINTS, report)
    try:
        (run.folder / RESULT).unlink(missing_ok=True)
    except OSError as cause:
        raise StorageError.writing(run.folder / RESULT, cause) from cause
    if checkpoint is None:
        run.recorder.cut_back(-1)
        return first_state(run), Clock()
    if checkpoint.tokens > run.recipe.total_tokens:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} lies past the recipe's {run.recipe.total_tokens:,} tokens; "
            "it belongs to another run: choose its folder"
        )
    state = read_state(checkpoint.path, run.spec, run.transformation)
    return state, Clock(checkpoint.tokens, checkpoint.step, run.recorder.cut_back(checkpoint.tokens))


def check_devices(recipe: Recipe) -> None:
    """One device is what this version trains on; a mesh that needs more is refused."""
    for place, mesh in (("mesh", recipe.mesh), *((f"stages.{i}.mesh", s.mesh) for i, s in enumerate(recipe.stages))):
        sizes = {axis: size for axis, size in mesh.model_dump().items() if size not in (1, "rest")}
        if sizes:
            needed = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
            raise RecipeError(
                f"{place}: {needed} needs more than one device, and training over several devices is not built yet; "
                'set these axes to 1 (or "rest")'
            )
    if jax.device_count() > 1:
        raise RecipeError(
            f"{jax.device_count()} devices are visible, and training over several devices is not built yet; "
            "show JAX one (for example CUDA_VISIBLE_DEVICES=0)"
        )


def _assemble(recipe: Recipe, folder: Path, stores: Mapping[str, Store], tokenizer: Tokenizer) -> Run:
    reader = Reader(recipe, stores)
    run = Run(
        folder=folder,
        recipe=recipe,
        tokenizer=tokenizer,
        stores=stores,
        reader=reader,
        spec=Spec.of(recipe, tokenizer.size),
        transformation=optimizer.build(recipe.optimizer),
        recorder=Recorder(folder),
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
