"""Laws of the plans: what is scored, how often, with what to its left."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xgen.errors import RecipeError
from xgen.measure import windows

LENGTHS = st.lists(st.integers(1, 90), max_size=5)


def scored(plan: windows.Windows) -> list[tuple[int, int, int]]:
    """(document, token, ids it is predicted from), read off the definition of a window."""
    rows = zip(plan.document, plan.start, plan.first, plan.last, strict=True)
    return [(int(d), int(token), int(token - start)) for d, start, first, last in rows for token in range(first, last)]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 40), st.data())
def test_strided_scores_every_token_exactly_once_with_the_context_promised(lengths, context, data):
    stride = data.draw(st.integers(1, context))
    plan = windows.strided(lengths, context, stride)
    found = scored(plan)
    assert Counter((d, token) for d, token, _ in found) == Counter(
        (d, token) for d, length in enumerate(lengths) for token in range(1, length)
    )
    assert all(min(token, context - stride + 1) <= seen <= context for _, token, seen in found)
    assert plan.scored == len(found)
    assert_inside(plan, lengths)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 20), st.data())
def test_by_position_scores_exactly_the_tokens_a_window_away_from_both_ends(lengths, length, data):
    offsets = [data.draw(st.integers(0, length - 1)) for _ in lengths]
    plan = windows.by_position(lengths, length, offsets)
    core = Counter((d, token) for d, n in enumerate(lengths) for token in range(length, n - length + 1))
    assert Counter((d, token) for d, token, _ in scored(plan)) == core
    assert_inside(plan, lengths)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 15))
def test_over_all_offsets_every_token_stands_at_every_position_equally_often(size, length):
    places = Counter()
    for offset in range(length):
        places.update((token, seen) for _, token, seen in scored(windows.by_position([size], length, [offset])))
    assert places == Counter(
        (token, seen) for token in range(length, size - length + 1) for seen in range(1, length + 1)
    )


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 6), st.integers(1, 5), st.integers(0, 9))
def test_fixed_targets_are_disjoint_equal_for_all_contexts_and_inside_their_document(lengths, target, spans, seed):
    contexts = [target + 1, target + 4, 3 * target + 4]
    plans = windows.fixed_target(lengths, contexts, target, spans, seed)
    found = {context: scored(plan) for context, plan in plans.items()}
    tokens = {context: [(d, token) for d, token, _ in rows] for context, rows in found.items()}
    assert tokens[contexts[0]] == tokens[contexts[1]] == tokens[contexts[2]]
    assert len(set(tokens[contexts[0]])) == len(tokens[contexts[0]])
    for context, plan in plans.items():
        assert (plan.stop - plan.start == context).all()
        assert all(context - target < seen <= context for _, _, seen in found[context])
        assert_inside(plan, lengths)
    per_document = Counter(plans[contexts[0]].document.tolist())
    for d, length in enumerate(lengths):
        room = max(0, (length - 1 - contexts[-1]) // target + 1)
        assert per_document[d] == min(spans, room)


def test_fixed_targets_reach_every_place_of_a_document():
    reached = set()
    for seed in range(200):
        reached |= {token for _, token, _ in scored(windows.fixed_target([41], [4, 8], 2, 3, seed)[8])}
    assert reached == set(range(7, 41))


@settings(deadline=None)
@given(st.integers(1, 5000))
def test_position_bins_partition_the_counts_and_begin_at_powers_of_two(length):
    bins = windows.position_bins(length)
    assert [count for first, last in bins for count in range(first, last + 1)] == list(range(1, length + 1))
    assert [first for first, _ in bins] == [2**k for k in range(len(bins))]


def test_the_last_bin_of_a_power_of_two_is_its_upper_half():
    assert windows.position_bins(16) == [(1, 1), (2, 3), (4, 7), (8, 16)]


@settings(deadline=None)
@given(st.integers(1, 40_000))
def test_a_batch_is_about_sixteen_thousand_ids(context):
    rows = windows.rows_per_batch(context)
    assert rows >= 1
    assert rows == 1 or 16_384 - context < rows * context <= 16_384


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: windows.strided([9], 4, 5), "stride: 5"),
        (lambda: windows.strided([9], 4, 0), "stride must be at least 1, not 0"),
        (lambda: windows.strided([9], 0, 1), "context must be at least 1, not 0"),
        (lambda: windows.fixed_target([9], [8, 4], 4, 1, 1), "at most 3"),
        (lambda: windows.fixed_target([9], [8], 0, 1, 1), "target must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_named(call, says):
    with pytest.raises(RecipeError, match=says):
        call()


def assert_inside(plan: windows.Windows, lengths: list[int]) -> None:
    sizes = np.array(lengths, np.int64)[plan.document]
    assert (plan.start >= 0).all()
    assert (plan.stop <= sizes - 1).all()
    assert (plan.start < plan.first).all()
    assert (plan.first < plan.last).all()
    assert (plan.last <= plan.stop + 1).all()
    assert (plan.stop - plan.start <= plan.context).all()
