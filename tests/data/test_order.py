"""Orders are permutations, keyed, the same everywhere; mixtures hold their shares at every moment."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xgen.data.order import _mix, derive_key, document_order, permute, source_counts, source_of
from xgen.errors import DataError

keys = st.integers(0, 2**64 - 1)
weight_lists = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


@given(count=st.integers(1, 5000), key=keys)
def test_permute_is_a_bijection(count: int, key: int) -> None:
    assert sorted(permute(np.arange(count), count, key).tolist()) == list(range(count))


@given(count=st.integers(1, 2**40), key=keys, data=st.data())
def test_permute_stays_in_range_and_needs_no_neighbours(count: int, key: int, data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=20)))
    moved = permute(index, count, key)
    assert moved.min() >= 0
    assert moved.max() < count
    assert moved.tolist() == [permute(index[place : place + 1], count, key)[0] for place in range(len(index))]


def test_permute_looks_random() -> None:
    count = 10_000
    moved = permute(np.arange(count), count, 7)
    # For a random permutation the rank correlation has deviation 1/sqrt(n) = 0.01, and fixed points are Poisson(1).
    assert abs(np.corrcoef(np.arange(count), moved)[0, 1]) < 0.05
    assert np.count_nonzero(moved == np.arange(count)) < 10
    gaps = np.abs(np.diff(moved))
    assert gaps.mean() == pytest.approx(count / 3, rel=0.03)
    assert not np.array_equal(moved, permute(np.arange(count), count, 8))


@pytest.mark.parametrize("index", [-1, 5])
def test_permute_refuses_what_is_outside(index: int) -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.4"):
        permute(np.array([index]), 5, 1)


@given(seed=st.integers(0, 2**31), epoch=st.integers(0, 1000), documents=st.integers(0, 500))
def test_document_order_is_a_permutation(seed: int, epoch: int, documents: int) -> None:
    assert sorted(document_order(seed, "a", epoch, documents).tolist()) == list(range(documents))


def test_document_order_depends_on_seed_source_and_epoch() -> None:
    orders = {
        tuple(document_order(seed, source, epoch, 50).tolist())
        for seed in (1, 2)
        for source in ("a", "b")
        for epoch in (0, 1)
    }
    assert len(orders) == 8


def test_orders_are_frozen() -> None:
    """Another order would change every run there is: a resumed run must meet the batches it was begun with."""
    assert document_order(1, "messages", 0, 10).tolist() == [9, 2, 5, 4, 0, 8, 1, 6, 3, 7]
    assert permute(np.arange(10), 10, 12345).tolist() == [6, 8, 7, 9, 3, 0, 5, 2, 4, 1]
    assert derive_key("sequences", 1, "messages", 0, 0) == 2159137747401421698


def test_the_hash_is_splitmix64() -> None:
    """The generator's published first outputs from seed 0: its state grows by a constant, its output is our hash."""
    states = (np.arange(3, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    assert [hex(word) for word in _mix(states).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_keys_tell_text_from_numbers_and_where_parts_end() -> None:
    assert len({derive_key("1", 2), derive_key(1, 2), derive_key("1", "2"), derive_key("12"), derive_key(12)}) == 5


@given(weights=weight_lists, sequences=st.integers(1, 2000))
def test_sources_number_their_own_sequences_without_gap(weights: list[float], sequences: int) -> None:
    source, within = source_of(np.arange(sequences), weights)
    assert set(source.tolist()) <= set(range(len(weights)))
    for number in range(len(weights)):
        mine = within[source == number]
        assert mine.tolist() == list(range(len(mine)))
    assert source_counts(sequences, weights) == [int((source == number).sum()) for number in range(len(weights))]


@given(weights=weight_lists, start=st.integers(0, 2**40), sequences=st.integers(1, 500))
def test_any_run_of_sequences_holds_the_shares(weights: list[float], start: int, sequences: int) -> None:
    source, _ = source_of(np.arange(start, start + sequences), weights)
    total = sum(map(Fraction, weights))
    for number, weight in enumerate(weights):
        due = Fraction(weight) / total * sequences
        # The error of the shares themselves is 2**-32 each; it shows over 2**40 sequences before, not within a run.
        assert abs(int((source == number).sum()) - due) < 4


def test_counts_are_exact_for_huge_runs() -> None:
    assert source_counts(3 * 10**15, [1.0, 1.0, 1.0]) == pytest.approx([10**15] * 3, rel=1e-9)
    assert sum(source_counts(2**60 + 7, [0.3, 0.5, 0.1])) == 2**60 + 7


def test_a_vanishing_weight_is_refused() -> None:
    with pytest.raises(DataError, match="leave the source out"):
        source_of(np.arange(3), [1.0, 1e-12])
