"""The compiled sampler against a plain one: NumPy in float64, one row at a time, that sorts the vocabulary.

`weights_by_sorting` is written from `Sampling`'s docstring alone.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xgen.errors import DataError
from xgen.infer.check import LARGEST_CHANGE, LEAST_REPETITION
from xgen.infer.request import Sampling
from xgen.infer.sampling import (
    MOST_BANNED,
    Chosen,
    Controls,
    banned_row,
    choose,
    count,
    fresh,
    row_controls,
    with_ban,
    with_slot,
)

SLOTS, VOCABULARY = 6, 700
GREEDY = Sampling(temperature=0.0)
compiled = jax.jit(choose)
placed = jax.jit(with_slot)


def controls_of(*rows: tuple[Sampling, list[int], list[int]], vocabulary: int = VOCABULARY) -> Controls:
    controls = fresh(max(SLOTS, len(rows)), vocabulary)
    for slot, (sampling, prompt, output) in enumerate(rows):
        controls = placed(controls, slot, row_controls(sampling, prompt, output, vocabulary))
    return controls


def drawn(logits: np.ndarray, controls: Controls, places: np.ndarray, slots: list[int] | None = None) -> Chosen:
    rows = np.arange(len(logits)) if slots is None else np.array(slots)
    chosen = compiled(jnp.asarray(logits), jnp.asarray(rows, jnp.int32), jnp.asarray(places, jnp.int32), controls, True)
    return Chosen(*map(np.asarray, chosen))


def many(logits: np.ndarray, sampling: Sampling, draws: int, prompt=(), output=(), ban=((), 0)) -> np.ndarray:
    """Ids drawn for places 0 to `draws` - 1 of one row."""
    controls = placed(fresh(1, len(logits)), 0, row_controls(sampling, list(prompt), list(output), len(logits)))
    controls = with_ban(controls, 0, banned_row(ban[0]), ban[1])
    ids = [
        drawn(np.tile(logits, (64, 1)), controls, np.arange(start, start + 64), [0] * 64).ids
        for start in range(0, draws, 64)
    ]
    return np.concatenate(ids)[:draws]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    exact = logits.astype(np.float64)
    top = exact.max(-1, keepdims=True)
    return exact - top - np.log(np.exp(exact - top).sum(-1, keepdims=True))


def shaped_by_hand(logits: np.ndarray, sampling: Sampling, prompt: list[int], output: list[int]) -> np.ndarray:
    """Logits after bias and penalties, token by token, in float32 as the model gives them."""
    shaped = logits.astype(np.float32).copy()
    for index, value in sampling.logit_bias:
        shaped[index] += np.float32(value)
    for index in {*prompt, *output}:
        factor = np.float32(sampling.repetition_penalty)
        shaped[index] = shaped[index] / factor if shaped[index] > 0 else shaped[index] * factor
    for index in set(output):
        times = np.float32(output.count(index))
        shaped[index] -= np.float32(sampling.presence_penalty) + np.float32(sampling.frequency_penalty) * times
    return shaped


def weights_by_sorting(shaped: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, float]:
    """Probability of each token, float64; and how near the mass came to a `top_p` decided otherwise."""
    exact = shaped.astype(np.float64)
    order = sorted(range(len(exact)), key=lambda index: (-exact[index], index))
    order = [index for index in order if exact[index] > -1e29]
    if sampling.top_k:
        order = order[: sampling.top_k]
    mass = np.exp((exact[order] - exact[order[0]]) / np.float64(np.float32(sampling.temperature)))
    sums = np.cumsum(mass) / mass.sum()
    margin = 1.0
    if sampling.top_p < 1:
        wanted = np.float64(np.float32(sampling.top_p))
        margin = float(np.abs(sums - wanted).min())
        order = order[: int(np.argmax(sums >= wanted)) + 1]
    mass = mass[: len(order)]
    mass[mass < np.float32(sampling.min_p)] = 0
    probabilities = np.zeros(len(exact))
    probabilities[order] = mass / mass.sum()
    return probabilities, margin


samplings = st.builds(
    Sampling,
    temperature=st.floats(0.0625, 3),
    top_p=st.one_of(st.just(1.0), st.floats(0, 1)),
    top_k=st.one_of(st.just(0), st.integers(1, 40), st.integers(1, 2 * VOCABULARY)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
    presence_penalty=st.one_of(st.just(0.0), st.floats(-2, 2, width=16)),
    frequency_penalty=st.one_of(st.just(0.0), st.floats(-2, 2, width=16)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 2, width=16)),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-20, 20, width=16), max_size=4).map(
        lambda biases: tuple(biases.items())
    ),
    seed=st.integers(-(2**63), 2**63),
)
kinds = st.sampled_from(["normal", "peaked", "flat", "tied", "equal", "masked", "bfloat16"])
tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)


def logits_of(kind: str, seed: int, vocabulary: int = VOCABULARY) -> np.ndarray:
    random = np.random.default_rng(seed)
    logits = random.normal(size=vocabulary) * {"peaked": 12, "flat": 0.01}.get(kind, 3)
    if kind == "tied":
        logits = np.round(logits)
    if kind == "equal":
        logits[:] = 1.5
    if kind == "masked":
        logits[vocabulary // 2 :] = -1e30
    logits = logits.astype(np.float32)
    return np.asarray(jnp.asarray(logits).astype(jnp.bfloat16).astype(jnp.float32)) if kind == "bfloat16" else logits


class TestAgainstSorting:
    @settings(deadline=None, max_examples=150)
    @given(samplings, kinds, tokens, tokens, st.integers(0, 2**32))
    def test_what_can_be_drawn_and_how_often(self, sampling, kind, prompt, output, seed) -> None:
        """Every draw is of a token that the cuts keep, and on 256 draws the frequencies are the probabilities'."""
        logits = logits_of(kind, seed)
        wanted, margin = weights_by_sorting(shaped_by_hand(logits, sampling, prompt, output), sampling)
        ids = many(logits, sampling, 256, prompt, output)
        # At a boundary that float32 cannot tell apart, one token more or less may be kept.
        if margin > 1e-5 and abs(sampling.min_p - 1) > 1e-5:
            assert set(ids) <= set(np.flatnonzero(wanted))
        assert mean_is_right(ids, wanted)

    @settings(deadline=None, max_examples=100)
    @given(samplings, kinds, tokens, tokens, st.integers(0, 2**32))
    def test_the_likeliest_is_taken_at_temperature_zero(self, sampling, kind, prompt, output, seed) -> None:
        logits = logits_of(kind, seed)
        greedy = replace(sampling, temperature=0.0)
        wanted = int(np.argmax(shaped_by_hand(logits, greedy, prompt, output)))
        controls = controls_of((greedy, prompt, output))
        assert drawn(logits[None], controls, np.array([7])).ids[0] == wanted

    @settings(deadline=None, max_examples=40)
    @given(kinds, st.integers(0, 2**32), samplings)
    def test_log_probabilities_are_of_the_model_itself(self, kind, seed, sampling) -> None:
        logits = logits_of(kind, seed)
        chosen = drawn(logits[None], controls_of((sampling, [1], [2])), np.array([0]))
        exact = log_softmax(logits)
        np.testing.assert_allclose(chosen.logprobs[0], exact[chosen.ids[0]], atol=1e-5)
        order = np.lexsort((np.arange(VOCABULARY), -logits))[:20]
        assert list(chosen.top_ids[0]) == list(order)
        np.testing.assert_allclose(chosen.top_logprobs[0], exact[order], rtol=1e-6, atol=1e-5)


def mean_is_right(ids: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether the mean log-probability of `ids` is within six standard errors of its expectation."""
    known = wanted > 0
    values = np.log(np.where(known, wanted, 1))
    values[~known] = values[known].min()
    mean = float((wanted * values).sum())
    spread = math.sqrt(max(0.0, float((wanted * (values - mean) ** 2).sum())))
    # One draw of a token as rare as 1 in 256 may not be counted against a spread that it dominates.
    allowed = 6 * spread / math.sqrt(len(ids)) + abs(values[known].min() - mean) * 3 / len(ids) + 1e-4
    return abs(float(values[ids].mean()) - mean) <= allowed


class TestCuts:
    """Which tokens are kept, seen by drawing often at a high temperature, where each is about as likely."""

    FLAT = (np.arange(40, dtype=np.float32) // 4)[::-1].copy()  # four of each value, the highest first

    def kept(self, logits: np.ndarray, **settings_) -> set[int]:
        return set(many(logits, Sampling(**{"temperature": 1.0, **settings_}), 512).tolist())

    def test_top_k_keeps_the_lowest_ids_of_equals(self) -> None:
        for top_k in (1, 2, 3, 4, 5, 7):
            assert self.kept(self.FLAT, top_k=top_k, temperature=8.0) == set(range(top_k))

    def test_top_k_of_equals_far_apart(self) -> None:
        logits = np.zeros(51_200, np.float32)
        logits[[70, 30_000, 255, 256, 51_199]] = 5
        assert self.kept(logits, top_k=3) == {70, 255, 256}

    def test_top_p_includes_the_one_that_crosses(self) -> None:
        logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
        assert self.kept(logits, top_p=0.39) == {1}
        assert self.kept(logits, top_p=0.41) == {1, 3}
        assert self.kept(logits, top_p=0.69) == {1, 3}
        assert self.kept(logits, top_p=0.71) == {1, 3, 2}
        assert self.kept(logits, top_p=0.91) == {0, 1, 2, 3}

    def test_top_p_keeps_the_lowest_ids_of_equals_and_one_at_least(self) -> None:
        equal = np.zeros(8, np.float32)
        assert self.kept(equal, top_p=0.0) == {0}
        assert self.kept(equal, top_p=0.125) == {0}
        assert self.kept(equal, top_p=0.13) == {0, 1}
        assert self.kept(equal, top_p=0.5) == {0, 1, 2, 3}

    def test_top_p_is_of_what_top_k_kept(self) -> None:
        logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
        assert self.kept(logits, top_k=2, top_p=0.58) == {0, 1}
        assert self.kept(logits, top_k=2, top_p=0.56) == {0}

    def test_min_p_is_relative_to_the_likeliest(self) -> None:
        logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
        assert self.kept(logits, min_p=0.6) == {0, 1}
        assert self.kept(logits, min_p=0.2) == {0, 1, 2, 3}

    def test_banned_tokens_are_drawn_from_their_place_on(self) -> None:
        logits = np.zeros(5, np.float32)
        ids = many(logits, Sampling(), 640, ban=((1, 3), 320))
        assert set(ids[:320].tolist()) == {0, 2, 4}
        assert set(ids[320:].tolist()) == {0, 1, 2, 3, 4}
        assert many(logits, GREEDY, 64, ban=((0, 1), 32)).tolist() == [2] * 32 + [0] * 32

    def test_masked_tokens_are_never_drawn(self) -> None:
        logits = np.full(300, -1e30, np.float32)
        logits[[3, 280]] = 0
        for sampling in (Sampling(temperature=100.0), Sampling(top_k=10), Sampling(top_p=0.999), GREEDY):
            assert set(many(logits, sampling, 256).tolist()) <= {3, 280}

    @pytest.mark.parametrize(
        "sampling",
        [Sampling(), GREEDY, Sampling(top_k=5), Sampling(top_p=0.9), Sampling(min_p=0.5), Sampling(top_k=5, top_p=0.9)],
    )
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_of_logits_that_are_no_numbers_comes_an_id_all_the_same(self, sampling: Sampling, value: float) -> None:
        """One past the vocabulary would have no embedding; the log-probability tells that it means nothing."""
        logits = np.full(VOCABULARY, value, np.float32)
        chosen = drawn(logits[None], controls_of((sampling, [], [])), np.array([3]))
        assert 0 <= chosen.ids[0] < VOCABULARY
        assert np.isnan(chosen.logprobs[0])

    @pytest.mark.parametrize("temperature", [0.0, 1e-46, 1e-38, 1.0, 1e30])
    @pytest.mark.parametrize(
        "changes",
        [
            {"repetition_penalty": LEAST_REPETITION},
            {"repetition_penalty": LARGEST_CHANGE},
            {"presence_penalty": LARGEST_CHANGE, "frequency_penalty": LARGEST_CHANGE},
            {"presence_penalty": -LARGEST_CHANGE, "frequency_penalty": -LARGEST_CHANGE},
            {"logit_bias": ((1, LARGEST_CHANGE), (2, -LARGEST_CHANGE)), "repetition_penalty": LEAST_REPETITION},
            {"logit_bias": ((1, -LARGEST_CHANGE),), "repetition_penalty": LARGEST_CHANGE},
            {"top_p": 1e-300, "min_p": 1.0},
        ],
    )
    def test_the_strongest_settings_draw_tokens_all_the_same(self, changes: dict, temperature: float) -> None:
        logits = logits_of("masked", 2) * 1000
        logits[VOCABULARY // 2 :] = -1e30
        ids = many(logits, Sampling(temperature=temperature, **changes), 64, range(300), [1] * 300)
        assert set(ids.tolist()) <= set(range(VOCABULARY // 2))

    def test_more_than_can_be_banned_is_refused(self) -> None:
        with pytest.raises(DataError, match="keeps 25 tokens"):
            banned_row(range(MOST_BANNED + 1))

    def test_a_bias_of_no_token_is_refused(self) -> None:
        with pytest.raises(DataError, match="token 5; the model's ids are 0 to 4"):
            row_controls(Sampling(logit_bias=((5, 1.0),)), [], [], 5)


class TestDistribution:
    @pytest.mark.parametrize(
        "sampling",
        [Sampling(), Sampling(temperature=0.7), Sampling(top_p=0.9), Sampling(top_k=20), Sampling(min_p=0.05)],
        ids=["plain", "cool", "top_p", "top_k", "min_p"],
    )
    @pytest.mark.parametrize("vocabulary", [30, 1000])
    def test_chi_square(self, sampling: Sampling, vocabulary: int) -> None:
        """Over 2^14 places of one seed, which also shows that places are independent."""
        draws = 1 << 14
        logits = logits_of("normal", 5, vocabulary) / 2
        wanted, _ = weights_by_sorting(logits, sampling)
        found = np.bincount(many(logits, sampling, draws), minlength=vocabulary)
        assert found[wanted == 0].sum() == 0
        # Cells that expect fewer than ten are one.
        often = wanted * draws >= 10
        cells = [*zip(found[often], wanted[often] * draws, strict=True)]
        if not often.all():
            cells.append((found[~often].sum(), max(wanted[~often].sum() * draws, 1e-9)))
        chi_square = sum((seen - due) ** 2 / due for seen, due in cells if due > 1)
        free = sum(due > 1 for _, due in cells) - 1
        # Wilson and Hilferty: this is nearly a standard normal variable.
        normal = ((chi_square / free) ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free))
        assert abs(normal) < 4

    def test_seeds_are_independent(self) -> None:
        """Over 2^12 seeds at one place: half of them draw each of two equals."""
        rows = [(Sampling(seed=seed), [], []) for seed in range(64)]
        controls = controls_of(*rows, vocabulary=2)
        ones = sum(drawn(np.zeros((64, 2)), controls, np.full(64, place)).ids.sum() for place in range(64))
        assert abs(ones - 2048) < 4 * 32

    def test_rare_tokens_are_drawn_as_often_as_they_should(self) -> None:
        """A thousand tokens of two in a million each, beside a certain one: float32 sums would swallow single ones."""
        logits = np.full(1025, math.log(2e-6), np.float32)
        logits[1024] = 0
        ids = many(logits, Sampling(), 1 << 15)
        assert abs((ids < 1024).sum() - 67) < 5 * math.sqrt(67)


@cache
def crowd() -> tuple[np.ndarray, Controls, np.ndarray]:
    """64 rows of every kind, over a real vocabulary's size."""
    vocabulary = 51_200
    names = ["normal", "peaked", "flat", "tied", "masked", "bfloat16"]
    random = np.random.default_rng(3)
    logits = np.stack([logits_of(names[row % len(names)], row, vocabulary) for row in range(64)])
    choices = [
        GREEDY,
        Sampling(top_p=0.9, temperature=0.7),
        Sampling(top_k=50, top_p=0.95),
        Sampling(min_p=0.1, repetition_penalty=1.2),
        Sampling(presence_penalty=0.5, frequency_penalty=0.5, temperature=0.0),
        Sampling(logit_bias=((5, 3.0),), top_p=0.5),
        Sampling(),
    ]
    rows = []
    for row in range(64):
        known = random.integers(0, vocabulary, 40).tolist()
        rows.append((replace(choices[row % len(choices)], seed=row), known[:20], known[20:]))
    return logits, controls_of(*rows, vocabulary=vocabulary), random.integers(0, 9000, 64)


class TestAlone:
    @pytest.mark.parametrize("size", [1, 2, 8])
    def test_a_row_has_the_same_result_in_any_batch(self, size: int) -> None:
        """Bit for bit, log-probabilities too, in batches of other sizes and of other rows in another order."""
        logits, controls, places = crowd()
        whole = drawn(logits, controls, places, list(range(64)))
        order = np.random.default_rng(size).permutation(64)
        for start in range(0, 64, size):
            rows = order[start : start + size]
            part = drawn(logits[rows], controls, places[rows], rows.tolist())
            for name, all_rows, these in zip(Chosen._fields, whole, part, strict=True):
                np.testing.assert_array_equal(these, all_rows[rows], err_msg=name)

    def test_the_slot_does_not_matter(self) -> None:
        row = Sampling(seed=9, top_p=0.9), [1, 2], [3]
        logits = logits_of("normal", 1)[None]
        found = set()
        for slot in range(SLOTS):
            controls = placed(fresh(SLOTS, VOCABULARY), slot, row_controls(*row, VOCABULARY))
            found.add(int(drawn(logits, controls, np.array([11]), [slot]).ids[0]))
        assert len(found) == 1

    def test_counting_is_as_if_the_output_had_been_known(self) -> None:
        sampling = Sampling(frequency_penalty=0.3, seed=4)
        controls = controls_of((sampling, [3], []), (sampling, [3], [8, 9, 9]))
        for index in (8, 9, 9):
            controls = count(controls, jnp.array([0, SLOTS]), jnp.array([index, 5]))
        np.testing.assert_array_equal(controls.counts[0], controls.counts[1])

    def test_setting_one_slot_leaves_the_others(self) -> None:
        before = controls_of((Sampling(seed=1), [1], [2]), (Sampling(seed=2), [3], [4]))
        after = with_ban(placed(before, 1, row_controls(GREEDY, [], [], VOCABULARY)), 1, banned_row([7]), 9)
        for old, new in zip(before, after, strict=True):
            np.testing.assert_array_equal(old[0], new[0])
        assert after.temperature[1] == 0
        assert after.banned[1].tolist() == [7] + [-1] * 23

    def test_no_setting_compiles_anew(self) -> None:
        traces = 0

        def traced(*given: jax.Array) -> Chosen:
            nonlocal traces
            traces += 1
            return choose(*given)

        choose_once, places = jax.jit(traced), jnp.zeros(1, jnp.int32)
        for sampling in (GREEDY, Sampling(top_p=0.5), Sampling(top_k=3, logit_bias=((1, 2.0),)), Sampling(min_p=0.2)):
            controls = placed(fresh(SLOTS, VOCABULARY), 0, row_controls(sampling, [1], [2], VOCABULARY))
            for top in (True, False):
                choose_once(jnp.zeros((1, VOCABULARY)), places, places, controls, jnp.array(top))
        assert traces == 1
