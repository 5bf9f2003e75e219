"""Before and after: sums of both sides of the old length against sums made by hand, and the bins that lead there."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from xgen.measure import position_bins
from xgen.measure.losses import Sums
from xgen.measure.since import Kept, SinceStart, since_start


@pytest.mark.parametrize(("length", "since"), [(128, 64), (4096, 2048), (6000, 2000), (100, 99), (8192, 1024)])
def test_bins_part_at_the_old_length_and_leave_no_gap(length: int, since: int) -> None:
    bins = position_bins(length, since)
    assert bins[0][0] == 1
    assert bins[-1][1] == length
    assert all(last + 1 == first for (_, last), (first, _) in pairwise(bins))
    assert since in [first for first, _ in bins]
    assert sum(first >= since for first, _ in bins) >= min(4, length - since)
    assert {first for first, _ in position_bins(length)} <= {first for first, _ in bins}


def test_a_length_that_is_not_passed_changes_no_bin() -> None:
    assert position_bins(128, 128) == position_bins(128, 4096) == position_bins(128)


def made_up(seed: int, bins: int, contexts: list[int]) -> Kept:
    """Three documents, the last too short to be scored."""
    random = np.random.default_rng(seed)
    tokens = np.array([[7.0], [4.0], [0.0]])

    def sums(columns: int) -> Sums:
        return Sums(random.uniform(1, 9, (3, columns)) * (tokens > 0), np.repeat(tokens, columns, 1))

    targets = {context: Sums(one.loss[:, 0], one.tokens[:, 0]) for context in contexts for one in [sums(1)]}
    return Kept(sums(bins), targets)


def pick(rows: list[SinceStart], checkpoint: str, measure: str, first: int) -> SinceStart:
    [row] = [one for one in rows if (one["checkpoint"], one["measure"], one["from"]) == (checkpoint, measure, first)]
    return row


def test_both_sides_and_every_context_are_compared_with_all_that_was_before() -> None:
    bins, contexts = position_bins(32, 8), [16, 32]
    kept = {name: made_up(seed, len(bins), contexts) for seed, name in enumerate(["start", "a", "b"])}
    rows = since_start(kept, bins, 8, 4)
    assert [[change["against"] for change in row["changes"]] for row in rows if row["from"] == 8] == [
        [], ["start"], ["start", "a"],
    ]  # fmt: skip
    columns = [number for number, (first, _) in enumerate(bins) if first >= 8]
    past = {name: one.by_position.loss[:, columns].sum() for name, one in kept.items()}
    count = 11.0 * len(columns)
    row = pick(rows, "b", "by_position", 8)
    assert (row["to"], row["documents"], row["tokens"]) == (33, 2, count)
    assert row["loss"] == pytest.approx(past["b"] / count)
    assert [change["difference"] for change in row["changes"]] == pytest.approx(
        [(past["b"] - past["start"]) / count, (past["b"] - past["a"]) / count]
    )
    for change in row["changes"]:
        assert change["low"] is not None
        assert change["high"] is not None
        assert change["low"] <= change["difference"] <= change["high"]
    target = pick(rows, "a", "fixed_target", 29)
    assert target["to"] == 33
    difference = (kept["a"].targets[32].loss.sum() - kept["start"].targets[32].loss.sum()) / 11
    assert target["changes"][0]["difference"] == pytest.approx(difference)


def test_no_side_past_the_old_length_and_no_document_long_enough_give_no_rows() -> None:
    bins = position_bins(32)
    rows = since_start({"start": made_up(1, len(bins), [32])}, bins, 64, 4)
    assert [(row["from"], row["to"]) for row in rows] == [(1, 33), (29, 33)]
    empty = Kept(Sums(np.zeros((2, len(bins))), np.zeros((2, len(bins)))), {32: Sums(np.zeros(2), np.zeros(2))})
    assert since_start({"start": empty}, bins, 64, 4) == []
