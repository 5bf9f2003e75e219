"""The engine's compiled programs: one step over rows of new tokens, in a few fixed shapes, and one that scores.

Decoding is the step with one column. All that a request may choose is in arrays, so that nothing compiles once `warm`
is through: programs are compiled ahead of time and refuse any other shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from xgen.errors import RecipeError
from xgen.infer import sampling
from xgen.infer.cache import HEADS, Cache, empty, token_bytes
from xgen.infer.forward import Where, forward, next_logits
from xgen.infer.protocol import Choice, Part, Row, Scores
from xgen.infer.quantise import Served, partitions, serve, stored_bytes
from xgen.infer.request import MOST_TOP_LOGPROBS, Sampling
from xgen.model import Spec, Weights, native
from xgen.parallel.hardware import memory_limit
from xgen.parallel.program import EVERYWHERE, ONE_DEVICE, Layout

COMPILED_AT_ONCE = 2
"""Programs that `warm` makes side by side."""

SCORED_AT_ONCE = 64
"""Columns whose logits `score` holds at a time."""

SHARE_OF_MEMORY = 0.4
"""Of what a device has, for pages, where nothing is said."""


@dataclass(frozen=True)
class Settings:
    """How the engine is laid out. `window`: most tokens of a row; `slots`: rows under way at once; `page`: tokens of a
    page; `chunk`: columns of the widest prefill; `cache_tokens`: places of all pages (None: `slots` whole windows, or
    what SHARE_OF_MEMORY holds if that is less)."""

    window: int
    slots: int = 8
    page: int = 128
    chunk: int = 512
    cache_tokens: int | None = None
    int8_weights: bool = False
    int8_cache: bool = False


class Batch(NamedTuple):
    """Rows of new tokens; `slots` say how each samples, `counted` are those whose sample is taken, else scratch."""

    ids: Int[Array, "R C"]
    table: Int[Array, "R M"]
    start: Int[Array, " R"]
    length: Int[Array, " R"]
    slots: Int[Array, " R"]
    counted: Int[Array, " R"]


class Compiled:
    """`xgen.infer.protocol.Program` by JAX, on one device or a mesh."""

    def __init__(self, spec: Spec, weights: Mapping[str, Served], settings: Settings, layout: Layout):
        self.slots, self.page, self.window = settings.slots, settings.page, settings.window
        self.pages = _pages(spec, settings)
        self.prefill_shapes: Sequence[tuple[int, int]] = _prefill_shapes(settings)
        self.score_columns = settings.chunk
        self.adapters: Sequence[str] = tuple(weights)
        self._spec = spec if layout.single else layout.spec(spec)
        self._weights, self._layout = dict(weights), layout
        # A bfloat16 product of a single row is ten times slower than one of two on XLA's CPU.
        slow = spec.dtype == jnp.bfloat16 and jax.default_backend() == "cpu" and native.library() is None
        lonely = 2 if slow else 1
        self._buckets = tuple(size for size in _powers(settings.slots) if size >= lonely) or (lonely,)
        widest = max(columns for _, columns in self.prefill_shapes)
        self._columns = -(-settings.window // settings.page) + -(-widest // settings.page) + 1
        self._places = partitions(self._weights[""], spec)
        self._cache = self._put(empty(spec, self.pages, settings.page, settings.int8_cache), HEADS)
        self._controls = self._put(sampling.fresh(settings.slots, spec.model.vocab_size), EVERYWHERE)
        self._programs: dict[tuple[str, int, int], Any] = {}

    @property
    def weight_bytes(self) -> int:
        return stored_bytes(self._weights[""])

    @property
    def cache_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._cache))

    def set_slot(self, slot: int, prompt: Sequence[int], output: Sequence[int], sampling_: Sampling) -> None:
        row = sampling.row_controls(sampling_, prompt, output, self._spec.model.vocab_size)
        self._controls = self._program("slot", 0, 0)(self._controls, np.int32(slot), row)

    def ban(self, slot: int, ids: Sequence[int], until: int) -> None:
        row = sampling.banned_row(ids)
        self._controls = self._program("ban", 0, 0)(self._controls, np.int32(slot), row, np.int32(until))

    def prefill(self, adapter: str, parts: Sequence[Part]) -> Choice:
        longest = max(len(part.ids) for part in parts)
        rows, columns = next(s for s in self.prefill_shapes if s[0] >= len(parts) and s[1] >= longest)
        batch = self._batch(rows, columns)
        for at, part in enumerate(parts):
            self._fill(batch, at, part.slot, part.pages, part.ids, part.start, part.wanted)
        return self._step(adapter, batch, len(parts), any(part.top for part in parts))

    def decode(self, adapter: str, rows: Sequence[Row]) -> Choice:
        batch = self._batch(next(size for size in self._buckets if size >= len(rows)), 1)
        for at, row in enumerate(rows):
            self._fill(batch, at, row.slot, row.pages, (row.token,), row.place, True)
        return self._step(adapter, batch, len(rows), any(row.top for row in rows))

    def score(self, adapter: str, part: Part, targets: Sequence[int]) -> tuple[Scores, Choice]:
        batch = self._batch(1, self.score_columns)
        self._fill(batch, 0, part.slot, part.pages, part.ids, part.start, part.wanted)
        wanted = np.zeros(self.score_columns, np.int32)
        wanted[: len(targets)] = targets
        program = self._program("score", 1, self.score_columns)
        weights = self._weights[adapter]
        self._cache, self._controls, scores, chosen = program(weights, self._cache, self._controls, batch, wanted)
        count = len(part.ids)
        return Scores(*(np.asarray(leaf)[:count] for leaf in scores)), _choice(chosen, 1)

    def warm(self, report: Callable[[str, float], None]) -> None:
        shapes = [("step", rows, columns) for rows, columns in self.prefill_shapes]
        shapes += [("step", rows, 1) for rows in self._buckets]
        wanted = [("slot", 0, 0), ("ban", 0, 0), *shapes, ("score", 1, self.score_columns)]

        def timed(key: tuple[str, int, int]) -> float:
            begin = time.perf_counter()
            self._program(*key)
            return time.perf_counter() - begin

        with ThreadPoolExecutor(COMPILED_AT_ONCE) as pool:
            for key, seconds in zip(wanted, pool.map(timed, wanted), strict=True):
                report(_told(*key), seconds)

    def _step(self, adapter: str, batch: Batch, rows: int, top: bool) -> Choice:
        program = self._program("step", *batch.ids.shape)
        self._cache, self._controls, chosen = program(
            self._weights[adapter], self._cache, self._controls, batch, np.bool_(top)
        )
        return _choice(chosen, rows)

    def _batch(self, rows: int, columns: int) -> Any:
        """A `Batch`, to be filled, of scratch rows alone: they write to page 0 and draw for the scratch slot."""
        shapes = ((rows, columns), (rows, self._columns), (rows,), (rows,), (rows,), (rows,))
        values = (0, 0, 0, 1, self.slots, self.slots)
        arrays: list[Any] = [np.full(shape, value, np.int32) for shape, value in zip(shapes, values, strict=True)]
        return Batch(*arrays)

    def _fill(
        self, batch: Any, at: int, slot: int, pages: Sequence[int], ids: Sequence[int], start: int, wanted: bool
    ) -> None:
        batch.ids[at, : len(ids)] = ids
        batch.table[at, : len(pages)] = pages
        batch.start[at], batch.length[at], batch.slots[at] = start, len(ids), slot
        if wanted:
            batch.counted[at] = slot

    def _put(self, tree: Any, place: PartitionSpec) -> Any:
        if self._layout.single:
            return tree
        return jax.device_put(tree, self._layout.sharding(place))

    def _program(self, name: str, rows: int, columns: int) -> Any:
        key = (name, rows, columns)
        if key not in self._programs:
            self._programs[key] = self._compiled(name, rows, columns)
        return self._programs[key]

    def _compiled(self, name: str, rows: int, columns: int) -> Any:
        if name in ("slot", "ban"):
            return self._compiled_control(name)
        function = {"step": advance, "score": score}[name]
        last = np.bool_(False) if name == "step" else np.zeros(columns, np.int32)
        given = (self._weights[""], self._cache, self._controls, self._batch(rows, columns), last)
        bound = partial(function, self._spec)
        if not self._layout.single:
            inputs = (self._places, HEADS, EVERYWHERE, EVERYWHERE, EVERYWHERE)
            outputs = (HEADS, *(EVERYWHERE,) * (2 if name == "step" else 3))
            bound = self._layout.spread(bound, inputs, outputs)  # type: ignore[assignment]
        return jax.jit(bound, donate_argnums=(1, 2)).lower(*given).compile()

    def _compiled_control(self, name: str) -> Any:
        if name == "slot":
            row = sampling.row_controls(Sampling(), (), (), self._spec.model.vocab_size)
            given: tuple[Any, ...] = (self._controls, np.int32(0), row)
            return jax.jit(sampling.with_slot, donate_argnums=0).lower(*given).compile()
        given = (self._controls, np.int32(0), sampling.banned_row(()), np.int32(0))
        return jax.jit(sampling.with_ban, donate_argnums=0).lower(*given).compile()


def build(
    spec: Spec, weights: Mapping[str, Weights | Served], settings: Settings, layout: Layout = ONE_DEVICE
) -> Compiled:
    """The programs of a model, nothing compiled yet. `weights` by name, the model's own as ""; all of one shape.

    On a mesh `Weights` lie as `xgen.parallel.program.weight_shardings` says. Raises RecipeError for settings that
    contradict the model or each other.
    """
    _check(spec, settings)
    served = {
        name: one if isinstance(one, Served) else serve(one, spec, settings.int8_weights, layout.sizes)
        for name, one in weights.items()
    }
    return Compiled(spec, served, settings, layout)


def advance(
    spec: Spec, weights: Served, cache: Cache, controls: sampling.Controls, batch: Batch, top: Array
) -> tuple[Cache, sampling.Controls, sampling.Chosen]:
    """Put each row's new tokens into the cache and draw the token after the last of them."""
    x, cache = forward(weights, spec, cache, batch.ids, Where(batch.table, batch.start, batch.length))
    controls, chosen = _drawn(spec, weights, x, controls, batch, top)
    return cache, controls, chosen


def score(
    spec: Spec,
    weights: Served,
    cache: Cache,
    controls: sampling.Controls,
    batch: Batch,
    targets: Int[Array, " C"],
) -> tuple[Cache, sampling.Controls, tuple[Array, Array, Array], sampling.Chosen]:
    """`advance` for one row, and of each column the log-probability of its target and the likeliest tokens."""
    x, cache = forward(weights, spec, cache, batch.ids, Where(batch.table, batch.start, batch.length))

    def some(part: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        hidden, wanted = part
        logs = jax.nn.log_softmax(next_logits(weights, spec, hidden), axis=-1)
        best, ids = jax.lax.top_k(logs, MOST_TOP_LOGPROBS)
        return jnp.take_along_axis(logs, wanted[:, None], axis=1)[:, 0], ids, best

    columns = targets.shape[0]
    at_once = next(size for size in range(min(SCORED_AT_ONCE, columns), 0, -1) if columns % size == 0)
    parts = x[0].reshape(columns // at_once, at_once, -1), targets.reshape(-1, at_once)
    scores = tuple(leaf.reshape(columns, *leaf.shape[2:]) for leaf in jax.lax.map(some, parts))
    controls, chosen = _drawn(spec, weights, x, controls, batch, jnp.bool_(True))
    return cache, controls, (scores[0], scores[1], scores[2]), chosen


def _drawn(
    spec: Spec, weights: Served, x: Float[Array, "R C D"], controls: sampling.Controls, batch: Batch, top: Array
) -> tuple[sampling.Controls, sampling.Chosen]:
    last = jnp.take_along_axis(x, (batch.length - 1)[:, None, None], axis=1)[:, 0]
    logits = next_logits(weights, spec, last)
    chosen = sampling.choose(logits, batch.slots, batch.start + batch.length, controls, top)
    return sampling.count(controls, batch.counted, chosen.ids), chosen


def _choice(chosen: sampling.Chosen, rows: int) -> Choice:
    return Choice(*(np.asarray(leaf)[:rows] for leaf in chosen))


def _told(name: str, rows: int, columns: int) -> str:
    told = {"slot": "set a row's sampling", "ban": "hold back the end", "score": f"score {columns} tokens"}
    if name in told:
        return told[name]
    return f"decode {rows} row{'s' * (rows > 1)}" if columns == 1 else f"prefill {rows} x {columns}"


def _powers(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to `most`, which is the last."""
    return (*(1 << n for n in range(most.bit_length()) if 1 << n < most), most)


def _prefill_shapes(settings: Settings) -> tuple[tuple[int, int], ...]:
    """The widest; four short prompts at once; a short one; a few tokens."""
    chunk = settings.chunk
    shapes = {(1, min(32, chunk)), (1, max(chunk // 4, 1)), (min(4, settings.slots), max(chunk // 4, 1)), (1, chunk)}
    return tuple(sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape[1])))


def _pages(spec: Spec, settings: Settings) -> int:
    """Of the pool, with the scratch page."""
    window = -(-settings.window // settings.page)
    if settings.cache_tokens is not None:
        return -(-settings.cache_tokens // settings.page) + 1
    page_bytes = settings.page * token_bytes(spec, settings.int8_cache)
    affordable = int(SHARE_OF_MEMORY * memory_limit() / page_bytes)
    return max(min(settings.slots * window, affordable), window) + 1


def _check(spec: Spec, settings: Settings) -> None:
    scaling = spec.model.rope_scaling
    if scaling.kind == "dynamic" and settings.window > scaling.original_length:
        raise RecipeError(
            f"window {settings.window} is beyond the {scaling.original_length} tokens from which this model's dynamic "
            "rope scaling turns earlier tokens anew, which a cache cannot follow; use a window of at most "
            f"{scaling.original_length}"
        )
    for name in ("window", "slots", "page", "chunk"):
        if getattr(settings, name) < 1:
            raise RecipeError(f"{name} {getattr(settings, name)} is no count; use at least 1")
    if settings.cache_tokens is not None and settings.cache_tokens < settings.window:
        raise RecipeError(
            f"a cache of {settings.cache_tokens} tokens cannot hold one row of {settings.window}; give it at least as "
            "many as the window, or shorten the window"
        )
