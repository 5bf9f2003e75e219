"""Every branch of every sentence says what its numbers say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from xgen.report import words

NAN = math.nan


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (-0.07, -0.03, "gain"),
        (0.01, 0.03, "worse"),
        (-0.01, 0.02, "not shown"),
        (-0.01, 0.0, "not shown"),
        (0.0, 0.02, "not shown"),
        (NAN, 0.1, "not known"),
        (-0.1, NAN, "not known"),
        (0.1, math.inf, "worse"),
    ],
)
def test_a_verdict_needs_an_interval_clear_of_zero(low, high, told):
    assert words.verdict(low, high) == told


def test_the_context_sentence_of_a_gain():
    assert words.context_gain(-0.0504, -0.0703, -0.0301, 64, 256, 40) == (
        "Longer context helps: with 256 tokens of context instead of 64, the last checkpoint’s loss on the very same "
        "held-out tokens is 0.050 nats per token lower (95\xa0% interval 0.030 to 0.070, paired over 40 documents)."
    )


def test_the_context_sentence_of_harm():
    said = words.context_gain(0.03, 0.02, 0.04, 2048, 8192, 1)
    assert said.startswith("Longer context does harm here: with 8,192 tokens of context instead of 2,048")
    assert "0.030 nats per token higher (95\xa0% interval 0.020 to 0.040, paired over 1 document)" in said


@pytest.mark.parametrize(("low", "high"), [(-0.015, 0.007), (-0.02, 0.0)])
def test_the_context_sentence_of_an_interval_that_touches_zero(low, high):
    said = words.context_gain(-0.004, low, high, 64, 256, 40)
    assert said.startswith("No gain from longer context is shown")
    assert "−0.004" in said
    assert "includes 0" in said
    assert "helps" not in said


def test_the_context_sentence_without_a_number():
    assert "not known" in words.context_gain(NAN, NAN, NAN, 64, 256, 1)


@pytest.mark.parametrize(
    ("difference", "low", "high", "said", "unsaid"),
    [
        (1.8, 1.7, 1.9, "fails past them: at 256 tokens its loss is 1.800 nats per token higher than at 64", "not"),
        (
            -0.4,
            -0.41,
            -0.39,
            "does not fail past them: at 256 tokens its loss is still 0.400 nats per token lower",
            "mend",
        ),
        (0.01, -0.02, 0.04, "does not measurably fail past them: at 256 tokens its loss differs by +0.010", "mend"),
        (NAN, NAN, NAN, "could not be judged", "fails"),
    ],
)
def test_the_sentence_about_a_checkpoint_past_its_length(difference, low, high, said, unsaid):
    sentence = words.past_length("64", 64, 256, difference, low, high, "256")
    assert said in sentence
    assert unsaid not in sentence


def test_a_single_stage_has_no_later_stage_to_mend_it():
    assert "mend" in words.past_length("a", 64, 256, 1.8, 1.7, 1.9, "b")
    assert "mend" not in words.past_length("a", 64, 256, 1.8, 1.7, 1.9, "a")


@pytest.mark.parametrize(
    ("bits", "xz", "said"),
    [
        (
            1.91,
            2.09,
            "needs 1.91 bits per byte at a context of 256; xz\xa0-9e needs 2.09 on the same text. That is 8.6\xa0% few",
        ),
        (2.31, 2.09, "That is 11\xa0% more."),
        (2.0901, 2.0899, "the same to two decimals as xz\xa0-9e"),
        (math.inf, 2.09, "not a finite number"),
        (NAN, 2.09, "not a finite number"),
    ],
)
def test_the_sentence_beside_xz(bits, xz, said):
    assert said in words.compression(bits, xz, 48, 256)


@pytest.mark.parametrize(
    ("training", "held_out", "said"),
    [
        (2.60, 2.63, "Held-out is 0.03 higher"),
        (2.63, 2.60, "Held-out is 0.03 lower"),
        (2.600, 2.601, "no gap to two decimals"),
        (NAN, 2.6, "not a finite number"),
    ],
)
def test_the_sentence_about_the_gap(training, held_out, said):
    assert said in words.generalisation(training, held_out, 50)


def test_progress_of_a_whole_run_is_not_worth_a_sentence():
    assert words.progress(100, 100, None, None, True) is None


@pytest.mark.parametrize(
    ("tokens", "stopped", "measured", "said"),
    [
        (100, None, False, "Training is complete, but the measurements"),
        (57, "SIGTERM", False, "not finished: 57 of 100 tokens (57\xa0%), in stage ‘b’. It was stopped (SIGTERM)"),
        (57, None, False, "still going on or was ended from outside"),
        (0, None, False, "no finished step yet. It is at its beginning or was ended."),
        (0, "SIGINT", False, "no finished step yet. It was stopped (SIGINT)."),
    ],
)
def test_progress_of_other_runs(tokens, stopped, measured, said):
    assert said in str(words.progress(tokens, 100, "b", stopped, measured))


def test_resumes():
    assert words.resumes([], 0) is None
    assert words.resumes([368_640], 0) == "The log tells of 1 resume, from 369K tokens."
    twice = str(words.resumes([368_640, 983_040], 24))
    assert twice.startswith("The log tells of 2 resumes, from 369K and 983K tokens. 24 steps stand in the log twice")


def test_spoiled_steps():
    assert words.spoiled(0) is None
    assert "In 1 step the loss was not a finite number" in str(words.spoiled(1))
    assert "In 2 steps" in str(words.spoiled(2))


def test_the_switch_of_stages():
    assert words.switch("4k", 2.5, 2.6, 50).endswith(
        "from 2.500 to 2.600 (+0.100; means of the 50 steps on either side)."
    )
    assert "(−0.100;" in words.switch("4k", 2.6, 2.5, 50)
    assert "not a finite number" in words.switch("4k", NAN, 2.5, 50)


def test_nothing_was_scaled_down_in_the_7b():
    assert words.scale(words.XGEN_7B).startswith("Nothing was scaled down")


def test_what_was_scaled_down_is_named_with_its_numbers():
    tiny = replace(words.XGEN_7B, parameters=1_073_792, tokens=1_228_800, lengths=(64, 128, 256), vocabulary=1024)
    assert words.scale(tiny) == (
        "Scaled down against XGen-7B: parameters (1.07M of 6.9B), training tokens (1.23M of 1.5T), the longest "
        "sequence (256 of 8,192) and the vocabulary (1,024 of 51,200)."
    )


def test_what_is_larger_and_what_is_the_same_is_said_too():
    mixed = replace(words.XGEN_7B, parameters=None, tokens=10**9, lengths=(2048, 16384))
    said = words.scale(mixed)
    assert "Scaled down against XGen-7B: training tokens (1B of 1.5T)." in said
    assert "Larger than in XGen-7B: the longest sequence (16,384, there 8,192)." in said
    assert "The same: the vocabulary." in said
    assert "parameters" not in said


@pytest.mark.parametrize(
    ("value", "reference", "said"),
    [
        (5, 5, "the same"),
        (1_073_792, 6_895_702_016, "1/6,422 of it"),
        (1_228_800, 1_500_000_000_000, "1/1.22M of it"),
        (30, 100, "1/3.33 of it"),
        (91, 100, "91\xa0% of it"),
        (999_999, 1_000_000, "slightly less"),
        (110, 100, "10\xa0% more"),
        (250, 100, "2.5 times it"),
    ],
)
def test_how_a_number_stands_to_the_7b(value, reference, said):
    assert words.against(value, reference) == said


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (64, "64"),
        (999, "999"),
        (999.6, "1K"),
        (1_228_800, "1.23M"),
        (999_600, "1M"),
        (8e11, "800B"),
        (1.5e12, "1.5T"),
        (5e15, "5000T"),
        (math.inf, "not known"),
    ],
)
def test_short_numbers(value, text):
    assert words.short(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0504, "+0.050"),
        (-0.0504, "−0.050"),
        (-0.0001, "0.000"),
        (0.0001, "0.000"),
        (math.inf, "+infinite"),
        (-math.inf, "−infinite"),
        (NAN, "not known"),
    ],
)
def test_signed_numbers_have_a_true_minus_and_zero_has_none(value, text):
    assert words.signed(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4.23, "4.2 s"),
        (48, "48 s"),
        (163.4, "2 min 43 s"),
        (120, "2 min"),
        (11_100, "3 h 5 min"),
        (1.4e6, "16 d 4 h"),
        (NAN, "not known"),
    ],
)
def test_durations(seconds, text):
    assert words.duration(seconds).replace(words.SPACE, " ") == text


@pytest.mark.parametrize(
    ("bytes_", "text"), [(17, "17 bytes"), (2048, "2 KiB"), (310_455, "303 KiB"), (1_932_735_283, "1.8 GiB")]
)
def test_sizes(bytes_, text):
    assert words.size(bytes_).replace(words.SPACE, " ") == text


@pytest.mark.parametrize(("share", "text"), [(0.53, "53 %"), (0.086, "8.6 %"), (0.0, "0 %"), (NAN, "not known")])
def test_percents(share, text):
    assert words.percent(share).replace(words.SPACE, " ") == text


@pytest.mark.parametrize(
    ("difference", "low", "high", "said", "unsaid"),
    [
        (
            -0.4,
            -0.5,
            -0.3,
            ["training lowered the loss", "from 3.400 to 3.000", "\u22120.400", "40 documents"],
            "not shown",
        ),
        (0.4, 0.3, 0.5, ["training raised the loss", "from 2.600 to 3.000", "+0.400"], "lowered"),
        (-0.1, -0.3, 0.1, ["training is not shown to change the loss", "\u22120.300 to +0.100"], "lowered"),
        (-0.1, -0.3, 0.0, ["not shown"], "lowered"),
        (-0.1, NAN, NAN, ["what training did is not known"], "lowered"),
    ],
)
def test_what_training_did_to_a_continued_model(difference, low, high, said, unsaid):
    told = words.moved("Past it", "training", difference, low, high, 3 - difference, 3.0, 40)
    assert told.startswith("Past it, ")
    assert all(text in told for text in said)
    assert unsaid not in told
