"""XGen from Python: the same things as the command line does, joined from the rooms."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from xgen.errors import RecipeError, StoppedByPeer, XgenError
from xgen.recipe.load import Base, load_recipe
from xgen.recipe.schema import Recipe

if TYPE_CHECKING:
    from xgen.loaded import LoadedModel
    from xgen.parallel.world import World
    from xgen.training.run import Clock, Run
    from xgen.training.signals import Signals
    from xgen.training.state import State


class Task(Protocol):
    """A piece of work outside the steps; told the fraction that is done, 0 to 1."""

    def advance(self, fraction: float) -> None: ...


class Display(Protocol):
    """Whoever watches a run: `xgen.cli.progress.Progress` on a terminal, `Silent` from Python."""

    def stage(self, name: str, length: int) -> None: ...
    def step(self, tokens: int, loss: float, tokens_per_second: float) -> None: ...
    def evaluation(self, loss: float) -> None: ...
    def note(self, text: str) -> None: ...
    def task(self, description: str) -> AbstractContextManager[Task]: ...


class Silent:
    """A display that shows nothing."""

    def stage(self, name: str, length: int) -> None: ...
    def step(self, tokens: int, loss: float, tokens_per_second: float) -> None: ...
    def evaluation(self, loss: float) -> None: ...
    def note(self, text: str) -> None: ...
    def advance(self, fraction: float) -> None: ...

    @contextmanager
    def task(self, description: str) -> Iterator[Task]:  # noqa: ARG002 - nothing is shown
        yield self


def train(
    recipe: str | Path | Recipe,
    *,
    run: str | Path,
    overrides: Iterable[str] = (),
    start: str | Path | None = None,
    display: Display | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """Train `recipe` in the new folder `run`, measure every stage's checkpoint, write the report.

    `recipe` is a shipped name, a file or a `Recipe`; `overrides` are "key=value" as on the command line. `start` is a
    MODEL of any kind whose weights the run begins with in place of fresh ones: it gives all of [model] and the
    tokenizer that the recipe leaves out. `world` are the processes that train together (`xgen.parallel.start.connect`),
    each of which calls this. Returns the result (docs/reference/run-folder.md lists its keys). Raises the errors of
    `xgen.errors`.
    """
    from xgen.parallel.hardware import use_compilation_cache
    from xgen.parallel.world import World
    from xgen.recipe.load import require_base
    from xgen.training.run import Clock, create, first_state, too_short
    from xgen.training.signals import Signals
    from xgen.training.start import open_start

    begin, watched, signals = time.perf_counter(), display or Silent(), Signals()
    model = open_start(start) if start is not None else None
    base = model.base if model is not None else None
    wanted = recipe if isinstance(recipe, Recipe) else _resolved(recipe, overrides, base)
    if base is not None:
        require_base(wanted, base)
    processes = world or World()
    with signals.installed():
        use_compilation_cache()
        _agree(processes, wanted)
        with _Tasks(watched) as tasks:
            opened = create(wanted, Path(run), Path.cwd(), tasks.report, model, processes)
        _record_start(opened)
        for text in [*(model.description.repairs if model is not None else ()), *too_short(opened)]:
            watched.note(text)
        if opened.held_out(opened.recipe.evaluation.tokens) is None:
            watched.note("no source has held-out documents: nothing will be measured (set data.held_out above 0)")
        return _finish(opened, first_state(opened), Clock(), watched, signals, begin)


def resume(
    run: str | Path,
    *,
    overrides: Iterable[str] = (),
    display: Display | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """Go on with the run in folder `run` from its newest whole checkpoint; the result is that of `train`.

    `overrides` may change `checkpoints.*`, `evaluation.*` and what only says how a step is computed: meshes,
    `microbatch_tokens`, `remat` and `compute.exchange`. `world` is as for `train`; how many processes there were before
    does not matter.
    """
    from xgen.parallel.hardware import use_compilation_cache
    from xgen.parallel.world import World
    from xgen.training.run import reopen, restore
    from xgen.training.signals import Signals

    begin, watched, signals = time.perf_counter(), display or Silent(), Signals()
    folder = Path(run)
    wanted = resolve_run(folder, overrides)
    with signals.installed():
        use_compilation_cache()
        processes = world or World()
        _agree(processes, wanted)
        opened = reopen(wanted, folder, processes)
        damaged: list[str] = []
        state, clock = restore(opened, damaged.append)
        for text in damaged:
            watched.note(text)
        if clock.tokens == 0:
            _record_start(opened)
            watched.note(f"{folder} has no step that was saved: it begins from the start")
        elif clock.tokens >= opened.recipe.total_tokens:
            watched.note(f"{folder} is trained to its last token: only the measurement and the report are made again")
        facts = {"from": clock.tokens, "reason": "; ".join(damaged) or "asked for"}
        opened.recorder.event("resumed", tokens=clock.tokens, step=clock.step, **facts)
        return _finish(opened, state, clock, watched, signals, begin)


def plan(
    recipe: str | Path | Recipe,
    *,
    on: str,
    overrides: Iterable[str] = (),
    start: str | Path | None = None,
    compiler: bool | None = None,
    report: Callable[[str], None] | None = None,
    **assumptions: float | None,
) -> dict[str, Any]:
    """What `recipe` needs and costs, stage by stage, on the slice `on`, as "v4:8x8x8"; nothing is run.

    What a named recipe leaves out of mesh, microbatch_tokens and remat is chosen: the cheapest that fits. `compiler`:
    ask the real one; None asks it when it is installed. `report` is told what is waited for. `assumptions`:
    utilisation, price, power, pue, grid. Returns what `xgen plan --json` writes (docs/plan-a-pod.md). Raises
    RecipeError.
    """
    from xgen.planning import plan as make_plan

    return make_plan(recipe, on=on, overrides=overrides, start=start, compiler=compiler, report=report, **assumptions)


def resolve(source: str | Path, overrides: Iterable[str] = (), start: str | Path | None = None) -> Recipe:
    """The resolved recipe `source`: a shipped name, a file, or a run folder; `start` is the MODEL it continues."""
    from xgen.training.start import open_start

    return _resolved(source, overrides, open_start(start).base if start is not None else None)


def _resolved(source: str | Path, overrides: Iterable[str], base: Base | None) -> Recipe:
    from xgen.tokens.tokenizer import embedding_rows

    return load_recipe(source, tuple(overrides), vocabulary=embedding_rows, base=base).recipe


def resolve_run(folder: Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of the run in `folder`. Raises RecipeError when there is none."""
    if not (folder / "recipe.toml").is_file():
        raise RecipeError(f"{folder} holds no run (no recipe.toml); start one with `xgen train RECIPE --run {folder}`")
    return resolve(folder, overrides)


def load(model: str | Path, *, precision: Literal["float32", "bfloat16"] = "float32") -> LoadedModel:
    """A trained model: a run folder (its newest checkpoint), DIR@TOKENS or DIR@STAGE, a converted folder, a Hugging
    Face folder or a GGUF file. `precision` is that of activations and products.

    It has `.tokenizer`, `.description`, `.logits(ids)` [B S V] and `.loss(ids)` [B S-1]. Raises CheckpointError when
    there is none.
    """
    from xgen.loaded import load as load_model

    return load_model(model, precision)


def sources_override(data: Iterable[str]) -> list[str]:
    """The override that makes `data`, each "PATH" or "NAME=PATH", a recipe's sources in equal shares.

    A token store brings its own tokenizer, so the recipe's is set aside for it.
    """
    import json
    from collections import Counter

    from xgen.data.store import is_store

    named = [text.partition("=") if "=" in text else (Path(text).name or "text", "=", text) for text in data]
    if not named:
        return []
    twice = [name for name, count in Counter(name for name, _, _ in named).items() if count > 1]
    if twice:
        raise RecipeError(f"--data: two sources are called {', '.join(twice)}; tell them apart with --data NAME=PATH")
    sources = ", ".join(f"{json.dumps(name)} = {json.dumps(place)}" for name, _, place in named)
    told = ", ".join(place for _, _, place in named)
    overrides = [f"data.sources={{ {sources} }}", f"description={json.dumps(f'Trained on {told}')}"]
    if any(is_store(Path(place)) for _, _, place in named):
        overrides.append("tokenizer.name=store")
    return overrides


def _agree(processes: World, wanted: Recipe) -> None:
    """Raise ProcessesError when the processes have different recipes, or would compile different programs for it: with
    kernels of our own the layers are no loop."""
    from xgen.model import native

    processes.agree("the recipe", wanted.model_dump(mode="json"))
    if wanted.compute.precision == "bfloat16" and native.platform() == "cpu":
        with processes.busy("building kernels"):
            there = native.library() is not None
        by = "xgen's kernels" if there else "XLA alone (docs/performance.md says when)"
        processes.agree("arithmetic", {"what computes bfloat16": by})


def _finish(run: Run, state: State, clock: Clock, watched: Display, signals: Signals, begin: float) -> dict[str, Any]:
    """Train what is left, measure, write result and report; a run that stops early has a report as well."""
    from xgen.parallel.hardware import peak_memory
    from xgen.report.page import write_report
    from xgen.training.after import measure, result
    from xgen.training.loop import train as train_stages

    earlier = clock.seconds

    def lost(news: str) -> None:
        run.recorder.event("stopped", tokens=clock.tokens, step=clock.step, reason=news)

    run.world.before_exit(lost)
    try:
        with run.world.blaming():
            train_stages(run, state, clock, watched, signals)
            del state
            with watched.task("measuring every stage's checkpoint") as task, run.world.busy("measuring"):
                run.world.barrier("measure all")
                measured = measure(run, task.advance)
        for text in measured["notes"] if measured else ["no source has held-out documents: nothing was measured"]:
            watched.note(text)
        seconds = earlier + time.perf_counter() - begin
        facts = {"seconds": seconds, "peak_memory_bytes": peak_memory()}
        run.recorder.event("finished", tokens=clock.tokens, step=clock.step, **facts)
        found: dict[str, Any] = run.world.broadcast(
            "result", result(run, measured, seconds) if run.world.is_writer else None
        )
        if run.world.is_writer:
            write_report(run.folder)
    except XgenError as error:
        if isinstance(error, StoppedByPeer):
            lost(str(error))
        if run.world.is_writer and not signals.at_once:
            with suppress(XgenError):  # why the run stops matters more
                write_report(run.folder)
        raise
    finally:
        run.recorder.close()
    return found


def _record_start(run: Run) -> None:
    run.recorder.event("run_started", tokens=0, step=0, **_facts(run))


def _facts(run: Run) -> dict[str, Any]:
    import jax

    from xgen import __version__
    from xgen.model import parameter_count

    return {
        "version": __version__,
        "recipe": run.recipe.name,
        "parameters": parameter_count(run.spec),
        "devices": [str(device) for device in jax.devices()],
        "train_tokens": {name: int(store.train.token_count) for name, store in run.stores.items()},
        "sources": dict(run.recipe.data.sources),
    }


class _Tasks:
    """Shows work reported as (what, fraction) as one task after the other."""

    def __init__(self, watched: Display) -> None:
        self._watched, self._what = watched, ""
        self._open = ExitStack()
        self._task: Task = Silent()

    def __enter__(self) -> _Tasks:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def report(self, what: str, fraction: float) -> None:
        what = what.partition(" (")[0]  # the counts in brackets change as the work goes on
        if what != self._what:
            self._open.close()
            self._what, self._task = what, self._open.enter_context(self._watched.task(what))
        self._task.advance(fraction)
