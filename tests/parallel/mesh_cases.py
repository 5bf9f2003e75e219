"""The step on emulated devices: loss, gradients and curves on meshes, and the same on one device. Run by `emulated`."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import jax
import numpy as np

from xgen.model import Spec, as_dict, decoder, initialise
from xgen.parallel import mesh
from xgen.parallel.mesh import Sizes
from xgen.parallel.program import ONE_DEVICE, Layout
from xgen.parallel.rules import weight_partitions
from xgen.recipe.load import load_recipe
from xgen.recipe.schema import Recipe, Stage
from xgen.training import optimizer
from xgen.training.state import State, move, new_state, new_weights
from xgen.training.step import Tokens, _spread_gradients, compile_step

REAL = 300
"""Ids of the tokenizer; twenty rows more pad the vocabulary."""

SHAPE = (
    "model.layers=2", "model.hidden_size=64", "model.heads=8", "model.kv_heads=8", "model.mlp_size=96",
    "model.vocab_size=320", "compute.precision=float32", "tokenizer.name=bpe:300",
)  # fmt: skip


def recipe(changes: tuple[str, ...] = ()) -> tuple[Recipe, Spec]:
    found = load_recipe("tiny", (*SHAPE, *changes)).recipe
    return found, Spec.of(found, REAL)


def stage_of(recipe: Recipe, length: int, microbatches: int = 1) -> Stage:
    """Eight sequences a microbatch: as many as the most devices along the data axes."""
    batch = {"batch_tokens": 8 * microbatches * length, "microbatch_tokens": 8 * length}
    return recipe.stages[0].model_copy(update={"length": length, "tokens": 100 * length, **batch})


def batch_of(stage: Stage, seed: int) -> list[np.ndarray]:
    """Ids, targets, segments and positions of rows with three documents each, of any lengths."""
    draw = np.random.default_rng(seed)
    stream = draw.integers(0, REAL, (stage.sequences, stage.length + 1), dtype=np.int32)
    segments = np.sort(draw.integers(0, 3, (stage.sequences, stage.length)), axis=1).astype(np.int32)
    segments -= segments[:, :1]
    begins = np.diff(segments, axis=1, prepend=-1) != 0
    columns = np.arange(stage.length)
    positions = columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    return [stream[:, :-1].copy(), stream[:, 1:].copy(), segments, positions.astype(np.int32)]


def tokens_of(stage: Stage, layout: Layout, seed: int) -> Tokens:
    rows = slice(0, stage.sequences)
    return Tokens(*[layout.place(array, stage.sequences, rows) for array in batch_of(stage, seed)])


def meshes(devices: int = 8) -> list[Sizes]:
    """All with so many devices."""
    powers = [2**n for n in range(devices.bit_length())]
    return [Sizes(*sizes) for sizes in product(powers, repeat=4) if np.prod(sizes) == devices]


def layout_of(sizes: Sizes, line: int = 1) -> Layout:
    return Layout(sizes, tuple(jax.devices()[: sizes.devices]), line)


def gradients(recipe: Recipe, spec: Spec, stage: Stage, layout: Layout) -> tuple[float, dict[str, np.ndarray]]:
    weights = initialise(spec, 1)
    if not layout.single:
        weights = jax.device_put(weights, jax.tree.map(layout.sharding, weight_partitions(spec)))
    program = jax.jit(_spread_gradients(spec, stage, recipe.optimizer.z_loss, layout))
    loss, found, _ = program(weights, tokens_of(stage, layout, 0))
    return float(loss), {name: np.asarray(leaf) for name, leaf in as_dict(found).items()}


def curve(recipe: Recipe, spec: Spec, stage: Stage, layout: Layout, steps: int) -> list[list[float]]:
    """Loss and norms of each step, the weights drawn where they lie."""
    transformation = optimizer.build(recipe.optimizer)
    state: State = new_state(new_weights(spec, 1, layout), spec, transformation, layout)
    state = move(state, spec, layout)
    step = compile_step(spec, stage, recipe.optimizer, transformation, state, layout)
    found = []
    for number in range(steps):
        state, metrics = step(state, tokens_of(stage, layout, number), layout.constant(np.float32(3e-3)))
        found.append([float(metrics.loss), float(metrics.grad_norm), float(metrics.param_norm)])
    return found


def largest_difference(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Of any weight's gradient: norm of the difference over the norm."""
    return max(float(np.linalg.norm(found[name] - wanted[name]) / np.linalg.norm(wanted[name])) for name in wanted)


def main(arguments: dict[str, Any]) -> None:
    """`what`: "gradients" or "curve"; `meshes` (all by default), `lengths`, `changes`, `microbatches`, `steps`,
    `line`, `lookup` (tokens that are looked up at once), `staged` (an axis after the other is gathered)."""
    if arguments.get("staged"):
        mesh._takes_whole_sides = lambda *_: False
    decoder.LOOKUP = arguments.get("lookup", decoder.LOOKUP)
    made, spec = recipe(tuple(arguments.get("changes", ())))
    chosen = [Sizes(*sizes) for sizes in arguments.get("meshes", meshes())]
    rows = []
    for length in arguments["lengths"]:
        stage = stage_of(made, length, arguments.get("microbatches", 1))
        one = ONE_DEVICE if jax.device_count() == 1 else layout_of(Sizes(1, 1, 1, 1))
        if arguments["what"] == "gradients":
            loss, wanted = gradients(made, spec, stage, one)
        else:
            straight = np.array(curve(made, spec, stage, one, arguments["steps"]))
        for sizes in chosen:
            row: dict[str, Any] = {"mesh": list(sizes), "length": length}
            if arguments["what"] == "gradients":
                mine, found = gradients(made, spec, stage, layout_of(sizes, arguments.get("line", 1)))
                row |= {"loss": abs(mine / loss - 1), "gradients": largest_difference(found, wanted)}
            else:
                other = np.array(curve(made, spec, stage, layout_of(sizes), arguments["steps"]))
                row |= {"curve": float(np.abs(other / straight - 1).max())}
            rows.append(row)
    print(json.dumps(rows))
