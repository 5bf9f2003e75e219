"""Drawing the next token of every row inside a compiled step: every setting is an array, so none can compile anew.

The whole vocabulary is never sorted. What `top_k` and `top_p` keep is a prefix of the tokens by descending likelihood
(equals by ascending id), so each comes down to a threshold, which halving finds exactly over the integers that float32
numbers are ordered by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from xgen.errors import DataError
from xgen.infer.request import MOST_TOP_LOGPROBS, Sampling

MOST_BANNED = 24
"""Tokens that can be kept from being drawn at once."""

MASKED = -1e29
"""Logits below this are of no token: callers mask with -1e30."""

BLOCK = 256
"""Neighbouring ids that are summed first: near the square root of a vocabulary, where two levels cost the least."""


class Controls(NamedTuple):
    """How each of S rows samples; the last row is scratch. `row_controls` gives one row of it, without the S."""

    temperature: Float[Array, " S"]
    top_p: Float[Array, " S"]
    min_p: Float[Array, " S"]
    top_k: Int[Array, " S"]
    presence: Float[Array, " S"]
    frequency: Float[Array, " S"]
    repetition: Float[Array, " S"]
    seed: Int[Array, " S"]
    """uint32."""
    banned: Int[Array, "S 24"]
    """Tokens that are not drawn; -1 is none."""
    banned_until: Int[Array, " S"]
    """The ban holds for places before this one."""
    bias: Float[Array, "S V"]
    prompt_has: Bool[Array, "S V"]
    counts: Int[Array, "S V"]
    """How often each token is in the output."""
    shaped: Bool[Array, " S"]
    """Whether the row has a bias or a penalty at all."""


class Chosen(NamedTuple):
    """The drawn tokens of R rows; log-probabilities are of the logits as they came, in nats. `top_*` are zeros where
    they were not asked for; they descend, equals by ascending id. Rows of NaN logits give NaN and some column."""

    ids: Int[Array, " R"]
    logprobs: Float[Array, " R"]
    top_ids: Int[Array, "R 20"]
    top_logprobs: Float[Array, "R 20"]


def fresh(slots: int, vocabulary: int) -> Controls:
    """`slots` rows and a scratch row that all take the likeliest of `vocabulary` tokens."""
    row = row_controls(Sampling(temperature=0.0), (), (), vocabulary)
    return Controls(*(jnp.stack([jnp.asarray(value)] * (slots + 1)) for value in row))


def row_controls(sampling: Sampling, prompt: Sequence[int], output: Sequence[int], vocabulary: int) -> Controls:
    """One row, as NumPy arrays without the leading axis, for a request whose penalties know `prompt` and `output`.

    `vocabulary` counts the logits. The seed counts modulo 2^32. Raises DataError for a bias of an unknown token.
    """
    bias = np.zeros(vocabulary, np.float32)
    for index, value in sampling.logit_bias:
        if not 0 <= index < vocabulary:
            raise DataError(f"logit_bias names token {index}; the model's ids are 0 to {vocabulary - 1}")
        bias[index] = value
    prompt_has = np.zeros(vocabulary, np.bool_)
    prompt_has[np.asarray(prompt, np.int64)] = True
    penalties = sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty
    row: dict[str, Any] = {  # NumPy's numbers, which the fields of arrays do not name
        "temperature": np.float32(sampling.temperature),
        "top_p": np.float32(sampling.top_p),
        "min_p": np.float32(sampling.min_p),
        "top_k": np.int32(min(sampling.top_k, vocabulary)),
        "presence": np.float32(penalties[0]),
        "frequency": np.float32(penalties[1]),
        "repetition": np.float32(penalties[2]),
        "seed": np.uint32(sampling.seed % 2**32),
        "banned": np.full(MOST_BANNED, -1, np.int32),
        "banned_until": np.int32(0),
        "bias": bias,
        "prompt_has": prompt_has,
        "counts": np.bincount(np.asarray(output, np.int64), minlength=vocabulary).astype(np.int32),
        "shaped": np.bool_(bool(sampling.logit_bias) or penalties != (0.0, 0.0, 1.0)),
    }
    return Controls(**row)


def banned_row(ids: Sequence[int]) -> Int[np.ndarray, " 24"]:
    """`ids` as `with_ban` takes them. Raises DataError for more than MOST_BANNED."""
    if len(ids) > MOST_BANNED:
        raise DataError(
            f"min_tokens keeps {len(ids)} tokens from ending the text; give at most {MOST_BANNED} end tokens"
        )
    return np.array([*ids, *[-1] * (MOST_BANNED - len(ids))], np.int32)


def with_slot(controls: Controls, slot: Int[Array, ""], row: Controls) -> Controls:
    """`controls` with `row` (of `row_controls`) at `slot`."""
    return Controls(*(values.at[slot].set(value) for values, value in zip(controls, row, strict=True)))


def with_ban(controls: Controls, slot: Int[Array, ""], banned: Int[Array, " 24"], until: Int[Array, ""]) -> Controls:
    """`controls` where `slot` does not draw `banned` (of `banned_row`) for places before `until`."""
    return controls._replace(
        banned=controls.banned.at[slot].set(banned), banned_until=controls.banned_until.at[slot].set(until)
    )


def count(controls: Controls, slots: Int[Array, " R"], ids: Int[Array, " R"]) -> Controls:
    """`controls` that know `ids` as the newest tokens of the rows at `slots`."""
    return controls._replace(counts=controls.counts.at[slots, ids].add(1))


def choose(
    logits: Float[Array, "R V"],
    slots: Int[Array, " R"],
    places: Int[Array, " R"],
    controls: Controls,
    report_top: Bool[Array, ""],
) -> Chosen:
    """One token for each row of float32 `logits`, drawn as `Sampling` says for the token at `places`.

    `top_k` and `top_p` break ties for the lowest ids; `top_p` keeps the fewest tokens whose mass, within what `top_k`
    kept, reaches it, and always one. Banned tokens and those masked with -1e30 are never drawn. A row's result depends
    on no other row; work that no row asks for is skipped.
    """
    best = jnp.max(logits, 1)
    likeliest = _first(logits == best[:, None])
    normaliser = best + jnp.log(jnp.sum(jnp.exp(logits - best[:, None]), 1))
    greedy = controls.temperature[slots] == 0
    banned = (controls.banned[slots] >= 0) & (places < controls.banned_until[slots])[:, None]
    changed = jnp.any(controls.shaped[slots]) | jnp.any(banned)

    def careful() -> Int[Array, " R"]:
        changed_logits = lax.cond(
            changed, lambda: _ban(_shape(logits, slots, controls), slots, banned, controls), lambda: logits
        )
        top = jnp.max(changed_logits, 1)
        certain = _first(changed_logits == top[:, None])
        drawn = lax.cond(jnp.all(greedy), lambda: certain, lambda: _draw(changed_logits, top, slots, places, controls))
        return jnp.where(greedy, certain, drawn)

    ids = lax.cond(jnp.all(greedy) & ~changed, lambda: likeliest, careful)
    shape = len(slots), MOST_TOP_LOGPROBS
    top_logits, top_ids = lax.cond(
        report_top, lambda: _top(logits), lambda: (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32))
    )
    top_logprobs = jnp.where(report_top, top_logits - normaliser[:, None], 0)
    return Chosen(ids, jnp.take_along_axis(logits, ids[:, None], 1)[:, 0] - normaliser, top_ids, top_logprobs)


def _first(found: Bool[Array, "R V"]) -> Int[Array, " R"]:
    """The first column that is true; some column where none is. (XLA's own argmax takes several times as long.)"""
    size = found.shape[1]
    return jnp.minimum(jnp.min(jnp.where(found, jnp.arange(size, dtype=jnp.int32), size), 1), size - 1)


def _shape(logits: Float[Array, "R V"], slots: Int[Array, " R"], controls: Controls) -> Float[Array, "R V"]:
    """Logits after bias and penalties."""

    def shaped() -> Float[Array, "R V"]:
        counts = controls.counts[slots]
        biased = logits + controls.bias[slots]
        repetition = controls.repetition[slots][:, None]
        repeated = jnp.where(biased > 0, biased / repetition, biased * repetition)
        known = jnp.where(controls.prompt_has[slots] | (counts > 0), repeated, biased)
        often = controls.presence[slots][:, None] * (counts > 0) + controls.frequency[slots][:, None] * counts
        return jnp.where(controls.shaped[slots][:, None], known - often, logits)

    found: Array = lax.cond(jnp.any(controls.shaped[slots]), shaped, lambda: logits)
    return found


def _ban(
    logits: Float[Array, "R V"], slots: Int[Array, " R"], banned: Bool[Array, "R 24"], controls: Controls
) -> Float[Array, "R V"]:
    rows = jnp.arange(len(slots))[:, None]
    ids = jnp.where(banned, controls.banned[slots], logits.shape[1])
    return logits.at[rows, ids].set(-jnp.inf, mode="drop")


def _draw(
    logits: Float[Array, "R V"],
    best: Float[Array, " R"],
    slots: Int[Array, " R"],
    places: Int[Array, " R"],
    controls: Controls,
) -> Int[Array, " R"]:
    """A token of each row, `best` being its highest logit; of greedy rows any."""
    temperature = jnp.where(controls.temperature[slots] == 0, 1.0, controls.temperature[slots])[:, None]
    top_k, top_p, min_p = controls.top_k[slots], controls.top_p[slots], controls.min_p[slots]
    greedy = controls.temperature[slots] == 0
    size = logits.shape[1]
    everything = jnp.full(best.shape, -jnp.inf), jnp.full(best.shape, size, jnp.int32)

    limited = ~greedy & (top_k > 0) & (top_k < size)
    kept = lax.cond(jnp.any(limited), lambda: _most_likely(logits, best, top_k, limited), lambda: everything)
    weights = jnp.exp((logits - best[:, None]) / temperature)
    weights = jnp.where(_within(logits, kept) & (logits > MASKED), weights, 0)

    limited = ~greedy & (top_p < 1)
    kept = lax.cond(jnp.any(limited), lambda: _nucleus(weights, top_p, limited), lambda: everything)
    weights = jnp.where(_within(weights, kept) & (weights >= min_p[:, None]), weights, 0)

    blocks = _blocks(weights)
    draws = jax.vmap(_uniforms)(controls.seed[slots], places)
    sums = jnp.cumsum(jnp.sum(blocks, 2), 1)
    block = _first(sums > (draws[:, 0] * sums[:, -1])[:, None])
    # A draw of its own within the block: with one for both, the rare tokens would meet the end of float32's precision.
    inner = jnp.cumsum(jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0], 1)
    # Where the weights are no numbers, the last block's last column would be past the vocabulary.
    return jnp.minimum(block * BLOCK + _first(inner > (draws[:, 1] * inner[:, -1])[:, None]), size - 1)


def _uniforms(seed: Int[Array, ""], place: Int[Array, ""]) -> Float[Array, " 2"]:
    """Two numbers between 0 and 1 that seed and place decide."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), place)
    # The middles of 2^23 stretches: times any positive sum, these are above 0 and below the sum after rounding too.
    return ((jax.random.bits(key, (2,), jnp.uint32) >> 9).astype(jnp.float32) + 0.5) * 2.0**-23


Cut = tuple[Float[Array, " R"], Int[Array, " R"]]
"""Of each row: values above the first are kept, and those that equal it up to the second's id."""


def _within(values: Float[Array, "R V"], cut: Cut) -> Bool[Array, "R V"]:
    least, last = cut[0][:, None], cut[1][:, None]
    return (values > least) | ((values == least) & (jnp.arange(values.shape[1], dtype=jnp.int32) <= last))


def _most_likely(
    logits: Float[Array, "R V"], best: Float[Array, " R"], top_k: Int[Array, " R"], limited: Bool[Array, " R"]
) -> Cut:
    """What keeps `top_k` tokens, in rows that are `limited`."""
    wanted = jnp.where(limited, top_k, logits.shape[1]).astype(jnp.float32)

    def reached(least: Float[Array, " R"]) -> Float[Array, " R"]:
        return jnp.sum((logits >= least[:, None]).astype(jnp.int32), 1).astype(jnp.float32)

    low = jnp.full(best.shape, -jnp.inf)
    span = _halve(reached, wanted, (low, jnp.full(best.shape, logits.shape[1], jnp.float32)), best, lambda _: 1.0)
    return _cut_ties(logits, span, jnp.where(limited, wanted - span.above, jnp.inf))


def _nucleus(weights: Float[Array, "R V"], top_p: Float[Array, " R"], limited: Bool[Array, " R"]) -> Cut:
    """What keeps the share `top_p` of the weights, whose highest are 1, in rows that are `limited`."""
    total = jnp.sum(weights, 1)
    wanted = jnp.where(limited, top_p * total, jnp.inf)

    def reached(least: Float[Array, " R"]) -> Float[Array, " R"]:
        return jnp.sum(jnp.where(weights >= least[:, None], weights, 0), 1)

    # All weights below this come to less than half of what may be left out.
    low = jnp.maximum((1 - top_p) * total / (2 * weights.shape[1]), 0)
    span = _halve(reached, wanted, (low, reached(low)), jnp.ones_like(total), lambda least: least)
    needed = jnp.maximum(jnp.ceil((wanted - span.above) / span.least), 1)
    least, last = _cut_ties(weights, span, jnp.where(limited, needed, jnp.inf))
    return jnp.where(limited, least, -jnp.inf), last


_Halving = tuple[Array, Array, Array, Array]
"""Of each row: a threshold that is not too high, one that is (both in `_order`), and what reaches each."""


class _Span(NamedTuple):
    """Of each row: the threshold, and what lies above it."""

    least: Float[Array, " R"]
    above: Float[Array, " R"]
    exact: Bool[Array, " R"]
    """Whether all at the threshold and above are needed."""


def _halve(
    reached: Callable[[Float[Array, " R"]], Float[Array, " R"]],
    wanted: Float[Array, " R"],
    low: tuple[Float[Array, " R"], Float[Array, " R"]],
    best: Float[Array, " R"],
    smallest: Callable[[Float[Array, " R"]], Float[Array, " R"] | float],
) -> _Span:
    """The highest threshold at which `reached` is as much as `wanted`, by halving between `low` (with what it reaches)
    and `best`.

    It is over earlier for a row where nothing can be spared: a token at or above the threshold counts for `smallest`
    of it or more.
    """

    def exact(state: _Halving) -> Bool[Array, " R"]:
        return state[2] - smallest(_number(state[0])) < wanted

    def over(state: _Halving) -> Bool[Array, " R"]:
        return (state[0] + 1 >= state[1]) | exact(state)

    def halved(state: _Halving) -> _Halving:
        below, beyond, at_below, at_beyond = state
        middle = (below & beyond) + ((below ^ beyond) >> 1)
        found = reached(_number(middle))
        enough = (found >= wanted) | over(state)
        stays = (found < wanted) | over(state)
        return (
            jnp.where(stays, below, middle),
            jnp.where(enough, beyond, middle),
            jnp.where(stays, at_below, found),
            jnp.where(enough, at_beyond, found),
        )

    start = _order(low[0]), _order(best) + 1, low[1], jnp.zeros_like(wanted)
    end = lax.while_loop(lambda state: ~jnp.all(over(state)), halved, start)
    return _Span(_number(end[0]), end[3], exact(end))


def _cut_ties(values: Float[Array, "R V"], span: _Span, needed: Float[Array, " R"]) -> Cut:
    """The cut at `span`, of which `needed` of the values that equal its threshold are kept."""
    everything = jnp.full(needed.shape, values.shape[1], jnp.int32)
    needed = jnp.where(span.exact, jnp.inf, needed)

    def counted() -> Int[Array, " R"]:
        blocks = _blocks((values == span.least[:, None]).astype(jnp.float32))
        sums = jnp.cumsum(jnp.sum(blocks, 2), 1)
        block = _first(sums >= needed[:, None])
        one = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
        before = jnp.take_along_axis(sums, block[:, None], 1)[:, 0] - jnp.sum(one, 1)
        last = block * BLOCK + _first(jnp.cumsum(one, 1) >= (needed - before)[:, None])
        return jnp.where(needed <= sums[:, -1], last, everything)

    return span.least, lax.cond(jnp.any(needed < jnp.inf), counted, lambda: everything)


def _order(number: Float[Array, " R"]) -> Int[Array, " R"]:
    """The int32 that has the same place among all as a float32."""
    bits = lax.bitcast_convert_type(number, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _number(order: Int[Array, " R"]) -> Float[Array, " R"]:
    """The inverse of `_order`."""
    return lax.bitcast_convert_type(jnp.where(order < 0, order ^ 0x7FFFFFFF, order), jnp.float32)


def _blocks(values: Float[Array, "R V"]) -> Float[Array, "R B L"]:
    padding = -values.shape[1] % BLOCK
    padded = jnp.pad(values, ((0, 0), (0, padding))) if padding else values
    return padded.reshape(len(values), -1, BLOCK)


def _top(logits: Float[Array, "R V"]) -> tuple[Float[Array, "R 20"], Int[Array, "R 20"]]:
    """The highest logits and their ids."""
    padding = max(0, MOST_TOP_LOGPROBS - logits.shape[1])
    padded = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    values, ids = lax.top_k(padded, MOST_TOP_LOGPROBS)
    return values, ids.astype(jnp.int32)
