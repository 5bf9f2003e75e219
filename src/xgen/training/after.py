"""After the last step: every stage's checkpoint measured on the same held-out text, and the run's result."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from xgen.checkpoints.manifest import Checkpoint, folder_name, list_checkpoints
from xgen.checkpoints.weights import read_weights
from xgen.errors import CheckpointError
from xgen.measure import Measurements, Score, measure_checkpoints
from xgen.model import Spec, Weights, parameter_count
from xgen.parallel.hardware import peak_memory
from xgen.parallel.program import weight_shardings
from xgen.recipe.base import NEW_ROPE, START
from xgen.training.evaluate import scorer
from xgen.training.folder import CHECKPOINTS, MEASUREMENTS, METRICS, RESULT, read_lines, write_json
from xgen.training.run import Run

Progress = Callable[[float], None]


def stage_checkpoints(run: Run) -> dict[str, Checkpoint]:
    """The checkpoint that ends each stage. Raises CheckpointError when one is gone."""
    found = {checkpoint.stage: checkpoint for checkpoint in list_checkpoints(run.folder / CHECKPOINTS)}
    gone = [stage.name for stage in run.recipe.stages if stage.name not in found]
    if gone:
        raise CheckpointError(
            f"{run.folder / CHECKPOINTS} lacks the checkpoint that ends stage {', '.join(gone)}; "
            f"put it back, or train again in another folder"
        )
    return {stage.name: found[stage.name] for stage in run.recipe.stages}


def measure(run: Run, progress: Progress | None = None) -> Measurements | None:
    """Measure all stages' checkpoints, and the model that the run continues, and write `evals/after_training.json`;
    None without held-out documents."""
    held_out = run.held_out(run.recipe.evaluation.tokens)
    if held_out is None:
        return None
    scorers = [*_untrained(run)]
    scorers += [(name, _scorer(run, found.path, run.spec)) for name, found in stage_checkpoints(run).items()]
    lengths, text = run.tokenizer.byte_lengths, held_out.text(run.tokenizer.token_bytes)
    since = run.start.context_length if run.start is not None else None
    found = measure_checkpoints(scorers, held_out, run.recipe.evaluation, lengths, text, progress, since=since)
    if run.world.is_writer:
        write_json(run.folder / MEASUREMENTS, found)
    return found


def _untrained(run: Run) -> Iterator[tuple[str, Score]]:
    """The model that the run continues: as it was, and, where the run changes its rope, with nothing but that changed.
    So what training did is told from what the rope did."""
    if run.start is None:
        return
    path = run.folder / CHECKPOINTS / folder_name(0)
    yield START, _scorer(run, path, replace(run.spec, model=run.start.model))
    if run.start.rope_changed(run.recipe):
        yield NEW_ROPE, _scorer(run, path, run.spec)


def _scorer(run: Run, path: Path, spec: Spec) -> Score:
    """Over the checkpoint at `path`, on the last stage's mesh."""
    layout = run.layouts[-1]

    def weights() -> Weights:
        if layout.single:
            return read_weights(path, spec)
        return read_weights(path, spec, weight_shardings(spec, layout), run.world)

    return scorer(weights, spec, layout, run.world)


def result(run: Run, measured: Measurements | None, seconds: float) -> dict[str, Any]:
    """What `--json` prints, by process 0; also kept as `result.json`. Figures that were not measured are null or
    empty."""
    value: dict[str, Any] = {
        "recipe": run.recipe.name,
        "from": run.start.place if run.start is not None else None,
        "parameters": parameter_count(run.spec),
        "tokens": run.recipe.total_tokens,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "stages": _stages(run),
        "bits_per_byte": _bits_per_byte(run, measured),
        "xz_bits_per_byte": measured["text"]["xz_bits_per_byte"] if measured else None,
        "fixed_target": measured["fixed_target"] if measured else [],
        "fixed_target_gain": measured["fixed_target_gain"] if measured else [],
        "since_start": measured["since_start"] if measured else [],
        "run": str(run.folder),
        "report": str(run.folder / "report.html"),
    }
    write_json(run.folder / RESULT, value)
    return value


def _stages(run: Run) -> list[dict[str, Any]]:
    """Each stage with the median of its steps' tokens/s, null when its lines are gone."""
    speeds: dict[str, list[float]] = {stage.name: [] for stage in run.recipe.stages}
    for line in read_lines(run.folder / METRICS):
        speeds[line["stage"]].append(line["tokens_per_second"])
    paths = stage_checkpoints(run)
    return [
        {
            "name": stage.name,
            "length": stage.length,
            "tokens": stage.spent,
            "checkpoint": str(paths[stage.name].path),
            "tokens_per_second": statistics.median(speeds[stage.name]) if speeds[stage.name] else None,
        }
        for stage in run.recipe.stages
    ]


def _bits_per_byte(run: Run, measured: Measurements | None) -> float | None:
    """Of the last stage's model at the largest context."""
    if measured is None:
        return None
    last, context = run.recipe.stages[-1].name, max(run.recipe.evaluation.contexts)
    cells = [c["bits_per_byte"] for c in measured["strided"] if (c["checkpoint"], c["context"]) == (last, context)]
    return cells[0] if cells and math.isfinite(cells[0]) else None
