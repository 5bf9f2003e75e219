"""The training loop: stages over one token clock."""

from __future__ import annotations

import math
import time
from typing import Protocol

import jax
import numpy as np

from xgen.checkpoints.manifest import Checkpoint
from xgen.data.prefetch import prefetch
from xgen.data.reader import Batch
from xgen.errors import NonFiniteError, RecipeError, StoppedBySignal
from xgen.model import flops_per_token
from xgen.parallel.hardware import memory_limit, peak_flops
from xgen.training.checkpoints import Saver
from xgen.training.evaluate import evaluate, loop_tokens, write_sample
from xgen.training.folder import CHECKPOINTS
from xgen.training.run import Clock, Run
from xgen.training.schedule import learning_rate
from xgen.training.signals import Signals
from xgen.training.state import State, abstract_state, move
from xgen.training.step import Metrics, StepFunction, Tokens, compile_step, mean_loss_by_position

_NAMED_DOCUMENTS = 12


class Display(Protocol):
    """What the loop tells whoever watches."""

    def stage(self, name: str, length: int) -> None: ...
    def step(self, tokens: int, loss: float, tokens_per_second: float) -> None: ...
    def evaluation(self, loss: float) -> None: ...
    def note(self, text: str) -> None: ...


def train(run: Run, state: State, clock: Clock, display: Display, signals: Signals) -> State:
    """Train from `clock` to the recipe's last token.

    Every stage is compiled, and its memory checked, before the first step. Raises StoppedBySignal once a signal's
    checkpoint is written, NonFiniteError before a step that would spoil the weights, StorageError when a checkpoint
    or a line of the logs cannot be written.
    """
    if clock.tokens >= run.recipe.total_tokens:
        return state
    remaining = range(run.recipe.stage_at(clock.tokens), len(run.recipe.stages))
    with run.world.busy("compiling"):
        programs = {index: compile_stage(run, index) for index in remaining}
    session = _Session(run, clock, display, signals)
    with signals.deferred():
        for index in remaining:
            state = session.placed(index, state)
            state = session.stage(index, programs[index][0], programs[index][1], state)
        with run.world.busy("saving"):
            session.saver.wait()
    return state


def compile_stage(run: Run, index: int) -> tuple[StepFunction, float]:
    """The stage's compiled step and the seconds it took. Raises RecipeError when it cannot fit in memory."""
    stage, layout = run.recipe.stages[index], run.layouts[index]
    begin = time.perf_counter()
    state = abstract_state(run.spec, run.transformation, layout)
    compiled = compile_step(run.spec, stage, run.recipe.optimizer, run.transformation, state, layout)
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else 0
    if needed > memory_limit():
        raise RecipeError(
            f"stage {stage.name!r}: a step at length {stage.length} needs {needed / 2**30:.1f} GiB a device, and "
            f"there are {memory_limit() / 2**30:.1f}; lower stages.{index}.microbatch_tokens "
            f"(now {stage.microbatch_tokens}), "
            f'or set stages.{index}.remat = "block" (now "{stage.remat}")'
        )
    return compiled, time.perf_counter() - begin


class _Session:
    """One process's part of a run: what the steps of all its stages share."""

    def __init__(self, run: Run, clock: Clock, display: Display, signals: Signals) -> None:
        self.run, self.clock, self.display, self.signals = run, clock, display, signals
        self.saver = Saver(run.folder / CHECKPOINTS, run.recipe.checkpoints, self._saved, run.world)
        longest = max(run.recipe.evaluation.contexts)
        self.held_out = run.held_out(loop_tokens(run.recipe.evaluation.tokens, longest))
        self._layout = run.layout_at(clock.tokens)
        self._peak = peak_flops()

    def placed(self, index: int, state: State) -> State:
        """The state on the mesh of stage `index`; the caller lets go of the one on the mesh before."""
        if self._layout == self.run.layouts[index]:
            return state
        self._layout = self.run.layouts[index]
        self.run.world.ready("move")
        return move(state, self.run.spec, self._layout)

    def stage(self, index: int, step: StepFunction, compile_seconds: float, state: State) -> State:
        """Train the rest of one stage."""
        stage, end = self.run.recipe.stages[index], self.run.recipe.stage_start(index + 1)
        self.display.stage(stage.name, stage.length)
        if self.clock.tokens == self.run.recipe.stage_start(index):
            facts = {"stage": stage.name, "length": stage.length, "stage_tokens": stage.spent}
            self._event("stage_started", compile_seconds=compile_seconds, **facts)
        positions = range(self.clock.tokens, end, stage.batch_tokens)
        for batch in prefetch(self.run.reader, positions, rows=self._layout.rows(stage.sequences)):
            state = self._step(step, state, batch)
            self._after_step(state, stage.name, stage.length, ends=self.clock.tokens == end)
        return state

    def _step(self, step: StepFunction, state: State, batch: Batch) -> State:
        """One step and its line."""
        stage = self.run.recipe.stages[batch.stage]
        begin = time.perf_counter()
        rate = learning_rate(self.run.recipe, batch.position + stage.batch_tokens)
        rows = self._layout.rows(stage.sequences)
        arrays = (batch.ids, batch.targets, batch.segments, batch.positions)
        tokens = Tokens(*[self._layout.place(array, stage.sequences, rows) for array in arrays])
        self.run.world.begins(self.clock.step + 1, stage.name)
        state, metrics = step(state, tokens, self._layout.constant(np.float32(rate)))
        metrics = jax.device_get(metrics)
        seconds = time.perf_counter() - begin
        if not metrics.finite:
            self._stop_non_finite(state, batch, metrics)
        self.clock.tokens += stage.batch_tokens
        self.clock.step += 1
        speed = stage.batch_tokens / seconds
        self.run.recorder.step(
            step=self.clock.step,
            tokens=self.clock.tokens,
            stage=stage.name,
            length=stage.length,
            loss=float(metrics.loss),
            grad_norm=float(metrics.grad_norm),
            update_norm=float(metrics.update_norm),
            param_norm=float(metrics.param_norm),
            lr=rate,
            tokens_per_second=speed,
            seconds=seconds,
            flops_utilisation=self._utilisation(speed, stage.length),
            loss_by_position=mean_loss_by_position(metrics.bin_losses, metrics.bin_tokens),
        )
        self.display.step(self.clock.tokens, float(metrics.loss), speed)
        return state

    def _after_step(self, state: State, stage: str, length: int, *, ends: bool) -> None:
        """Measure, save and stop where the clock says so."""
        recipe = self.run.recipe
        batch = recipe.stages[recipe.stage_at(self.clock.tokens - 1)].batch_tokens
        if ends or _due(self.clock.tokens, batch, recipe.evaluation.every):
            with self.run.world.busy("measuring"):
                self._evaluate(state, length)
        signal = self._stop_wanted()
        if ends or signal or _due(self.clock.tokens, batch, recipe.checkpoints.every):
            with self.run.world.busy("saving"):
                self.run.recorder.sync()
                self.saver.save(state, self.clock.tokens, self.clock.step, stage if ends else "")
        if signal:
            with self.run.world.busy("saving"):
                self.saver.wait()
            self._event("stopped", reason=signal)
            raise StoppedBySignal(
                f"{signal}: saved at {self.clock.tokens:,} tokens; go on with `xgen train --resume {self.run.folder}`"
            )

    def _stop_wanted(self) -> str:
        """The signal for which all processes stop after this step; "" to go on."""
        if self.run.world.count == 1:
            self.saver.check()
            return self.signals.received
        # One's failed write is known to all, but to each in its own time: they agree to stop, and `save` raises it.
        local = self.signals.received or ("a checkpoint could not be written" if self.saver.failing else None)
        return self.run.world.stop_wanted(self.clock.step, local) or ""

    def _evaluate(self, state: State, length: int) -> None:
        if self.held_out is None:
            return
        begin = time.perf_counter()
        run, lengths = self.run, self.run.tokenizer.byte_lengths
        found = evaluate(state.weights, run.spec, self.held_out, length, lengths, self._layout, run.world)
        if not math.isfinite(found.loss):
            self.saver.wait()
            raise NonFiniteError(
                f"held-out loss after step {self.clock.step} ({self.clock.tokens:,} tokens) is {found.loss}: the "
                "weights have run away; the checkpoints before it are kept. Lower optimizer.learning_rate, in a new run"
            )
        self.display.evaluation(found.loss)
        facts = {"loss": found.loss, "loss_by_position": found.loss_by_position, "documents": found.documents}
        seconds = time.perf_counter() - begin
        self._event("evaluation", length=length, held_out_tokens=found.tokens, **facts, seconds=seconds)
        for document in self.held_out.documents[: run.recipe.evaluation.samples]:
            prompt, text = write_sample(
                state.weights, run.spec, run.tokenizer, document, self.clock.tokens, self._layout, run.world
            )
            self._event("sample", prompt=prompt, text=text, document=document.name)

    def _stop_non_finite(self, state: State, batch: Batch, metrics: Metrics) -> None:
        """Save the weights as they were before the step, and name what it would have learnt from."""
        with self.run.world.busy("saving"):
            self.saver.save(state, self.clock.tokens, self.clock.step, "")
            self.saver.wait()
        names = list(dict.fromkeys(f"{s.source}:{s.name}" for s in self.run.reader.documents(batch.position)))
        self._event("stopped", reason="non-finite", failed_step=self.clock.step + 1, documents=names)
        shown = ", ".join(names[:_NAMED_DOCUMENTS])
        more = f" and {len(names) - _NAMED_DOCUMENTS} more" if len(names) > _NAMED_DOCUMENTS else ""
        raise NonFiniteError(
            f"step {self.clock.step + 1} at {batch.position:,} tokens: loss {float(metrics.loss)}, gradient norm "
            f"{float(metrics.grad_norm)}, norm of the update {float(metrics.update_norm)}; "
            "nothing was updated and the weights before it are saved. Its documents: "
            f"{shown}{more}. See them with `xgen data show {self.run.folder} --position {batch.position}`; "
            "a lower optimizer.learning_rate or compute.precision=float32 may cure it"
        )

    def _saved(self, checkpoint: Checkpoint) -> None:
        facts = {"path": checkpoint.path.name, "bytes": checkpoint.bytes, "stage": checkpoint.stage}
        self.run.recorder.event("checkpoint", tokens=checkpoint.tokens, step=checkpoint.step, **facts)

    def _event(self, kind: str, **facts: object) -> None:
        self.run.recorder.event(kind, tokens=self.clock.tokens, step=self.clock.step, **facts)

    def _utilisation(self, tokens_per_second: float, length: int) -> float | None:
        if self._peak is None:
            return None
        return tokens_per_second * flops_per_token(self.run.spec, length) / (self._peak * self._layout.sizes.devices)


def _due(tokens: int, batch: int, every: int) -> bool:
    """Whether a multiple of `every` was reached within the last `batch` tokens."""
    return every > 0 and tokens // every > (tokens - batch) // every
