"""The whole measurement: every figure against a closed form, and what is written to a run."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
from scorers import STEP, Scorer, documents, forgetting, saturating

from xgen.errors import DataError
from xgen.measure import HeldOut, Sample, forward_tokens, measure_checkpoints
from xgen.measure.stages import Measurements

BYTE_LENGTHS = np.full(10 * STEP, 3, np.int32)


@dataclass(frozen=True)
class Settings:
    contexts: tuple[int, ...] = (32, 64, 128)
    target: int = 8
    stride: float = 0.125


def sample(*lengths: int) -> Sample:
    return Sample(tuple(HeldOut("a", f"{ids[0]}", ids, True) for ids in documents(*lengths)))


def measure(*checkpoints, lengths=(700, 500, 400, 300), settings=None, progress=None) -> Measurements:
    text = b"abc" * (sum(lengths) - len(lengths))
    return measure_checkpoints(checkpoints, sample(*lengths), settings or Settings(), BYTE_LENGTHS, text, progress)


def test_every_checkpoint_is_measured_at_every_context():
    result = measure(("2k", forgetting(32)), ("4k", saturating(32)))
    names = [(row["checkpoint"], row["context"]) for row in result["strided"]]
    assert names == [(name, context) for name in ("2k", "4k") for context in (32, 64, 128)]
    assert [(row["checkpoint"], row["context"]) for row in result["fixed_target"]] == names
    assert [(row["checkpoint"], row["length"]) for row in result["by_position"]] == [("2k", 128), ("4k", 128)]
    gains = [(row["checkpoint"], row["from_context"], row["to_context"]) for row in result["fixed_target_gain"]]
    assert gains == [(name, context, 128) for name in ("2k", "4k") for context in (32, 64)]
    assert result["notes"] == []


def test_a_model_that_uses_no_more_shows_no_gain_and_one_that_breaks_shows_a_loss():
    result = measure(("steady", saturating(16)), ("broken", forgetting(64)))
    steady, _, broken, _ = result["fixed_target_gain"]
    assert (steady["difference"], steady["low"], steady["high"]) == (0, 0, 0)
    assert broken["difference"] == broken["low"] == broken["high"] == 7
    assert steady["documents"] == 4


def test_a_gain_is_the_difference_of_the_two_losses_and_its_interval_holds_it():
    wobble = Scorer(lambda document, token, seen: 4 - np.log2(seen) * (8 + document + token % 3) / 64)
    result = measure(("one", wobble))
    loss = {row["context"]: row["loss"] for row in result["fixed_target"]}
    for gain in result["fixed_target_gain"]:
        assert gain["difference"] == pytest.approx(loss[128] - loss[gain["from_context"]], abs=1e-9)
        assert gain["low"] < gain["difference"] < gain["high"] < 0


def test_bits_per_byte_and_perplexity_are_the_losses_in_other_units():
    result = measure(("one", Scorer(lambda _document, _token, seen: np.full(seen.shape, math.log(8)))))
    for row in result["strided"]:
        assert row["loss"] == pytest.approx(math.log(8))
        assert row["perplexity"] == pytest.approx(8)
        assert row["bits_per_byte"] == pytest.approx(1.0)  # three bits a token of three bytes
        assert row["tokens"] == result["text"]["tokens"] == 1896
    assert result["text"]["bytes"] == 3 * 1896


def test_bits_per_byte_of_a_byte_model_is_the_texts_entropy():
    """A model of one id a byte that knows the letters' frequencies: its rate is their entropy, in closed form."""
    share = np.array([0.5, 0.25, 0.125, 0.125])
    letters = np.repeat([1, 2, 3, 4], (share * 800).astype(int))
    ids = np.concatenate([[0], np.random.default_rng(1).permutation(letters)]).astype(np.int32)

    def score(_ids, targets, _positions, _segments):
        return -np.log(np.concatenate([[1], share])[targets]).astype(np.float32)

    held_out = Sample((HeldOut("a", "one", ids, True), HeldOut("a", "two", ids[[0, *range(800, 0, -1)]], True)))
    lengths = np.array([0, 1, 1, 1, 1], np.int32)
    text = held_out.text(lambda token: b"\0abcd"[token : token + 1])
    result = measure_checkpoints([("letters", score)], held_out, Settings(), lengths, text)
    assert [row["bits_per_byte"] for row in result["strided"]] == pytest.approx([1.75] * 3, rel=1e-6)


def test_losses_by_token_and_by_document_are_both_there():
    result = measure(("one", Scorer(lambda document, _token, _seen: document + 1.0)), lengths=(601, 301))
    assert result["strided"][0]["loss"] == pytest.approx((600 * 1 + 300 * 2) / 900)
    assert result["strided"][0]["loss_per_document"] == pytest.approx(1.5)


def test_a_quarter_of_the_largest_context_is_always_compared():
    result = measure(("one", saturating(16)), settings=Settings(contexts=(64, 128)))
    assert [row["from_context"] for row in result["fixed_target_gain"]] == [32, 64]
    assert [row["context"] for row in result["strided"]] == [64, 128]


def test_documents_too_short_are_told_not_hidden():
    result = measure(("one", saturating(16)), lengths=(100, 90))
    assert result["by_position"] == result["fixed_target"] == result["fixed_target_gain"] == []
    assert len(result["strided"]) == 3
    assert "0 of 2 documents" in result["notes"][0]
    result = measure(("one", saturating(16)), lengths=(300, 200))
    assert result["fixed_target"][0]["documents"] == 2
    assert result["by_position"][0]["documents"] == 1
    assert {row["low"] for row in result["by_position"][0]["bins"]} == {None}
    assert "1 of 2 documents" in result["notes"][0]


def test_bins_by_position_are_half_open_and_reach_the_whole_window():
    (curve,) = measure(("one", Scorer(lambda _document, _token, seen: seen)))["by_position"]
    edges = [(row["from"], row["to"]) for row in curve["bins"]]
    assert edges == [(1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 129)]
    assert all(row["from"] <= row["loss"] < row["to"] for row in curve["bins"])
    assert sum(row["tokens"] for row in curve["bins"]) == sum(n - 255 for n in (700, 500, 400, 300))


def test_the_result_is_plain_json():
    result = measure(("one", saturating(16)), ("two", saturating(64)), lengths=(300, 200))
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_measuring_twice_gives_the_same():
    assert measure(("one", saturating(64))) == measure(("one", saturating(64)))


def test_progress_rises_to_one_and_the_cost_is_as_announced():
    told = []
    scorers = [saturating(8), saturating(8)]
    calls = []

    def counting(scorer):
        return lambda ids, *rest: (calls.append(ids.size), scorer(ids, *rest))[1]

    measure(("one", counting(scorers[0])), ("two", counting(scorers[1])), progress=told.append)
    assert told == pytest.approx(np.cumsum(calls) / sum(calls))
    assert told[-1] == 1.0
    assert sum(calls) == 2 * forward_tokens(documents(700, 500, 400, 300), Settings())
    assert scorers[0].shapes == {(512, 32), (256, 64), (128, 128)}


def test_text_of_another_tokenizer_is_refused():
    with pytest.raises(DataError, match="has 3 bytes, but its tokens stand for 597"):
        measure_checkpoints([("one", saturating(8))], sample(200), Settings(), BYTE_LENGTHS, b"abc")
