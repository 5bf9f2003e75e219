"""Laws of the losses, on scorers with closed forms."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scorers import STEP, Scorer, documents, forgetting, saturating

from xgen.errors import DataError, NonFiniteError
from xgen.measure import fixed_target_loss, loss_by_position, position_bins, rows_per_batch, strided_loss, windows

BYTES = np.ones(10 * STEP, np.int32)
KNEE = 32


def mean(sums) -> float:
    return float(sums.loss.sum() / sums.tokens.sum())


@settings(deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=4), st.integers(1, 64), st.data())
def test_strided_adds_up_each_tokens_own_loss_and_never_padding(lengths, context, data):
    stride = data.draw(st.integers(1, context))
    # Integers below 2^24 are exact in float32 and float64, so the sums must agree to the last bit.
    worth = Scorer(lambda document, token, _seen: (document * 37 + token * 101) % 8191)
    sums = strided_loss(worth, documents(*lengths), context, stride, BYTES)
    expected = [sum((d * 37 + token * 101) % 8191 for token in range(1, n)) for d, n in enumerate(lengths)]
    assert sums.loss.tolist() == expected
    assert sums.tokens.tolist() == [n - 1 for n in lengths]
    assert worth.shapes <= {(rows_per_batch(context), context)}


def test_strided_loss_shows_no_gain_past_what_the_model_uses():
    text = documents(700, 40, 333)
    exact = sum(Fraction(4) - Fraction(min(t, KNEE), 64) for n in (700, 40, 333) for t in range(1, n)) / (1073 - 3)
    by_one = [mean(strided_loss(saturating(KNEE), text, context, 1, BYTES)) for context in (32, 64, 128, 256)]
    by_eighth = [mean(strided_loss(saturating(KNEE), text, c, c // 8, BYTES)) for c in (64, 128, 256)]
    assert by_one + by_eighth == pytest.approx([float(exact)] * 7, abs=1e-12)
    # Where the window is as long as what the model uses, a stride of an eighth costs at most that many ids.
    assert 0 < mean(strided_loss(saturating(KNEE), text, KNEE, KNEE // 8, BYTES)) - exact < (KNEE // 8) / 64


def test_disjoint_windows_show_a_gain_that_is_not_there():
    """The artefact this room exists to avoid: fewer cold starts pass for a use of longer context."""
    size = 513

    def cold(context: int) -> Fraction:
        return sum(Fraction(4) - Fraction(min(t % context + 1, KNEE), 64) for t in range(size - 1)) / (size - 1)

    found = [mean(strided_loss(saturating(KNEE), documents(size), c, c, BYTES)) for c in (32, 64, 128, 256)]
    assert found == pytest.approx([float(cold(c)) for c in (32, 64, 128, 256)], abs=1e-12)
    assert all(np.diff(found) < -0.01)


def test_fixed_target_shows_exactly_no_gain_past_what_the_model_uses_and_the_gain_before():
    target, contexts = 8, (16, 40, 64, 128)
    sums = fixed_target_loss(saturating(KNEE), documents(400, 700, 100), contexts, target, spans=9)
    assert mean(sums[40]) == mean(sums[64]) == mean(sums[128]) == 4 - KNEE / 64
    assert mean(sums[16]) == np.mean([4 - seen / 64 for seen in range(16 - target + 1, 17)])
    for one in sums.values():
        assert one.tokens.tolist() == [9 * target, 9 * target, 0]


def test_a_model_broken_past_its_length_is_shown_broken():
    text = documents(511, 511)  # by position each scores 256 tokens: every count of ids twice
    fixed = fixed_target_loss(forgetting(64), text, (32, 64, 128), 8, spans=5)
    assert [mean(fixed[context]) for context in (32, 64, 128)] == [2, 2, 9]
    curve = loss_by_position(forgetting(64), text, 128)
    assert (curve.loss.sum(0) / curve.tokens.sum(0)).tolist() == pytest.approx([2] * 6 + [9 - 7 / 65])
    assert mean(strided_loss(forgetting(64), text, 128, 16, BYTES)) > 8


@settings(deadline=None)
@given(st.lists(st.integers(1, 150), min_size=1, max_size=4), st.integers(1, 40), st.integers(0, 5))
def test_by_position_counts_every_token_in_the_bin_of_what_it_was_predicted_from(lengths, length, seed):
    seen = Scorer(lambda _document, _token, seen: seen)
    sums = loss_by_position(seen, documents(*lengths), length, seed)
    bins = position_bins(length)
    assert sums.loss.shape == (len(lengths), len(bins))
    assert sums.tokens.sum(1).tolist() == [max(0, n - 2 * length + 1) for n in lengths]
    assert (sums.loss >= sums.tokens * [first for first, _ in bins]).all()
    assert (sums.loss <= sums.tokens * [last for _, last in bins]).all()


def test_by_position_is_flat_for_a_model_that_ignores_position_on_text_that_does_not(monkeypatch):
    """Loss that falls along the document must not pass for a loss that falls along the window."""
    length, text = 16, documents(80)
    along = Scorer(lambda _document, token, _seen: np.exp2(12.0 - token // 8))
    loss, tokens = 0, 0
    for offset in range(length):  # every offset once: the expectation over offsets, without chance
        monkeypatch.setattr(windows, "random_offsets", lambda *_, offset=offset: [offset])
        sums = loss_by_position(along, text, length)
        loss, tokens = loss + sums.loss, tokens + sums.tokens
    truth = np.exp2(12.0 - np.arange(length, 80 - length + 1) // 8).mean()
    assert loss / tokens == pytest.approx(np.full((1, 4), truth), rel=1e-12)

    from_the_start = along.loss(None, np.arange(1, length + 1), None)
    assert from_the_start[0] == 4 * from_the_start[-1]  # what windows that begin with the document would have shown


def test_random_offsets_are_the_same_for_all_models_and_differ_between_documents():
    text = documents(*[200] * 8)
    one, other = saturating(4), saturating(8)
    loss_by_position(one, text, 64)
    loss_by_position(other, text, 64)
    assert one.fed == other.fed
    assert len({row[0] % STEP % 64 for row in one.fed}) > 4


def test_one_batch_shape_a_context_and_the_ids_announced():
    told = []
    scorer = saturating(8)
    text = documents(900, 900, 20)
    for context in (64, 128):
        strided_loss(scorer, text, context, 1, BYTES, told.append)
        plan = windows.strided([900, 900, 20], context, 1)
        assert sum(told) == plan.forward_tokens
        told.clear()
    assert scorer.shapes == {(256, 64), (128, 128)}


def test_sums_do_not_lose_small_losses_among_many():
    """Float32 would: 2^24 + 1 has no place in it."""
    scorer = Scorer(lambda _document, token, _seen: np.where(token == 1, 2.0**24, 1.0))
    assert strided_loss(scorer, documents(900), 64, 64, BYTES).loss.tolist() == [2.0**24 + 898]


def test_bytes_are_those_of_the_tokens_scored():
    bytes_of = np.array([0, 1, 2, 5], np.int32)
    text = [np.array([0, 1, 2, 3, 3], np.int32), np.array([3, 1], np.int32)]
    flat = lambda ids, *_: np.ones(ids.shape, np.float32)  # noqa: E731
    assert strided_loss(flat, text, 4, 2, bytes_of).bytes.tolist() == [13, 1]
    with pytest.raises(DataError, match="ids 0 to 3, but the tokenizer has 3"):
        strided_loss(flat, text, 4, 2, bytes_of[:3])


def test_a_loss_that_is_no_number_stops_the_measurement():
    with pytest.raises(NonFiniteError, match="context 16 is inf"):
        strided_loss(Scorer(lambda _d, t, _s: np.where(t == 30, np.inf, 1)), documents(50), 16, 4, BYTES)


def test_a_scorer_of_the_wrong_shape_is_caught():
    with pytest.raises(ValueError, match="shape"):
        strided_loss(lambda ids, *_: np.ones(len(ids), np.float32), documents(50), 16, 4, BYTES)
