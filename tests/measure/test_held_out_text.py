"""The sample of held-out text: within budget, fair to the sources, nothing left out in silence."""

import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xgen.errors import DataError, RecipeError
from xgen.measure import sample_documents, xz_bits_per_byte


class Split:
    """A split in memory; document i holds the ids 0, i, i, ..."""

    def __init__(self, *lengths: int):
        self.offsets = np.cumsum([0, *lengths])
        self.documents = len(lengths)

    def name(self, index: int) -> str:
        return f"document {index}"

    def document(self, index: int) -> np.ndarray:
        length = int(self.offsets[index + 1] - self.offsets[index])
        return np.array([0] + [index] * (length - 1), np.uint16)


SIZES = st.lists(st.integers(2, 400), max_size=12)


@settings(deadline=None)
@given(SIZES, SIZES, st.integers(60, 3000), st.integers(2, 60))
def test_the_sample_keeps_to_its_budget_and_to_long_documents(first, second, tokens, at_least):
    if not first + second:
        return
    found = sample_documents({"a": Split(*first), "b": Split(*second)}, tokens, at_least)
    sizes = {"a": first, "b": second}
    for document in found.documents:
        length = sizes[document.source][int(document.name.split()[1])]
        assert document.ids.dtype == np.int32
        assert document.whole == (len(document.ids) == length)
        assert length >= at_least or max(first + second) < at_least
    total = sum(len(ids) for ids in found.ids)
    assert total <= tokens
    # The budget is used up, but for the rounding of equal shares, unless there is no more text.
    assert total > tokens - len(found.documents) or all(document.whole for document in found.documents)


def test_sources_take_turns_and_short_documents_leave_their_share_to_the_long():
    found = sample_documents({"a": Split(*[1000] * 50), "b": Split(30, 1000)}, 1200, 30)
    assert [(d.source, len(d.ids)) for d in found.documents].count(("b", 30)) == 1
    assert {d.source for d in found.documents[-2:]} == {"b"}
    lengths = sorted(len(d.ids) for d in found.documents)
    assert lengths == [30] + [1170 // 12] * 12
    assert found.notes == ("13 of 52 held-out documents are measured on (evaluation.tokens is 1200).",)


def test_what_is_left_out_is_said():
    found = sample_documents({"a": Split(10, 500, 20, 600)}, 10_000, 100)
    assert [len(ids) for ids in found.ids] == [500, 600]
    assert found.notes == ("2 of 4 held-out documents are shorter than 100 tokens and left out.",)
    found = sample_documents({"a": Split(10, 20)}, 10_000, 100)
    assert [len(ids) for ids in found.ids] == [10, 20]
    assert "No held-out document has the 100 tokens" in found.notes[0]
    assert "the longest has 20" in found.notes[0]


def test_nothing_to_measure_on_or_with_is_an_error():
    with pytest.raises(DataError, match=r"data\.held_out"):
        sample_documents({"a": Split(), "b": Split()}, 1000, 10)
    with pytest.raises(RecipeError, match=r"evaluation\.tokens: 9 are less than the 10"):
        sample_documents({"a": Split(50)}, 9, 10)


def test_the_sample_depends_on_its_seed_alone():
    splits = {"a": Split(*range(300, 400))}
    names = [[d.name for d in sample_documents(splits, 3000, 50, seed).documents] for seed in (1, 1, 2)]
    assert names[0] == names[1] != names[2]


def test_text_is_that_of_all_tokens_but_the_end_of_texts():
    sample = sample_documents({"a": Split(3, 4)}, 100, 2)
    assert sample.text(lambda token: bytes([65 + token])) == b"AABBB"


def test_xz_is_the_command_line_tools_to_the_byte():
    words = [b"%x" % word for word in np.random.default_rng(1).zipf(1.3, 30_000)]
    text = b" ".join(words)
    try:
        tool = subprocess.run(["xz", "-9e", "-T1", "-c"], input=text, capture_output=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("no xz here")
    assert xz_bits_per_byte(text) == 8 * len(tool) / len(text)


def test_xz_finds_no_bits_to_save_in_noise():
    noise = np.random.default_rng(1).bytes(100_000)
    assert 8 < xz_bits_per_byte(noise) < 8.02
    with pytest.raises(DataError, match="empty"):
        xz_bits_per_byte(b"")
