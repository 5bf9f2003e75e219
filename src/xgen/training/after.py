"""After the last step: every stage's checkpoint measured on the same held-out text, and the run's result."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xgen.checkpoints.manifest import Checkpoint, list_checkpoints
from xgen.checkpoints.weights import read_weights
from xgen.errors import CheckpointError
from xgen.measure import Measurements, measure_checkpoints
from xgen.model import parameter_count
from xgen.training.evaluate import scorer
from xgen.training.folder import CHECKPOINTS, MEASUREMENTS, METRICS, RESULT, read_lines, write_json
from xgen.training.hardware import peak_memory
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
    """Measure all stages' checkpoints and write `evals/after_training.json`; None without held-out documents."""
    held_out = run.held_out(run.recipe.evaluation.tokens)
    if held_out is None:
        return None
    checkpoints = stage_checkpoints(run)
    scorers = [(name, scorer(_reading(found.path, run), run.spec)) for name, found in checkpoints.items()]
    lengths, text = run.tokenizer.byte_lengths, held_out.text(run.tokenizer.token_bytes)
    found = measure_checkpoints(scorers, held_out, run.recipe.evaluation, lengths, text, progress)
    write_json(run.folder / MEASUREMENTS, found)
    return found


def _reading(path: Path, run: Run) -> Callable[[], Any]:
    return lambda: read_weights(path, run.spec)


def result(run: Run, measured: Measurements | None, seconds: float) -> dict[str, Any]:
    """What `--json` prints, also kept as `result.json`. Figures that were not measured are null or empty."""
    value: dict[str, Any] = {
        "recipe": run.recipe.name,
        "parameters": parameter_count(run.spec),
        "tokens": run.recipe.total_tokens,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "stages": _stages(run),
        "bits_per_byte": _bits_per_byte(run, measured),
        "xz_bits_per_byte": measured["text"]["xz_bits_per_byte"] if measured else None,
        "fixed_target": measured["fixed_target"] if measured else [],
        "fixed_target_gain": measured["fixed_target_gain"] if measured else [],
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
